"""Released models in and out: Hugging Face directories of the families that `families` lists.

    config_json, rope   keys of config.json, each used, known to be without effect, or refused
    deepseek            a family: its config.json both ways, and the name map of its tensors as data (`names`)
    hf_dir              a directory read lazily: index, shards, tensors by rows, block FP8 dequantized
    hf_model            such a directory as a model of ours: every tensor accounted for, any range of a master
    import_run          ... written as a run directory
    stored, export_hf   a checkpoint of ours written as such a directory; `precision` says what is FP8 in it
    readers             the rules by which vLLM and SGLang read such a directory, as checks

Nothing that is read is executed: no remote code, no pickles.
"""
