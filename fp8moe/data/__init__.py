"""Text to batches: corpus -> tokenizer -> indexed token files -> packed samples -> `Batch`.

`build.open_data` is the entrance. Nothing here knows ranks or process groups: a caller asks for samples by their number
in one global stream, so every layout of processes sees the same data.
"""
