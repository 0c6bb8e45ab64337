"""Tokenizes JSON lines with Hugging Face `datasets`, as peers' preparation scripts do: the peer of `bench_tokenize`.

    python -m benchmarks.datasets_tokenize INPUT.jsonl TOKENIZER.json OUTPUT.bin NUM_PROC CACHE

`load_dataset`, then `map` in batches of 1,000 documents on NUM_PROC processes, then the ids of all documents, written
one after the other as uint16: what nanoGPT's `data/openwebtext/prepare.py` does, but in batches, and in shards of
1,000 documents where that takes 1,024 of any size; both are faster. A document's ids end with id 0, the end-of-text
of the tokenizers trained here. It imports nothing of fp8moe.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

SHARD = 1000


def main(argv: list[str]) -> None:
    """Write the ids; arguments as at the top of this module."""
    from datasets import load_dataset
    from tokenizers import Tokenizer

    source, tokenizer_path, output, num_proc, cache = argv
    tokenizer = Tokenizer.from_file(tokenizer_path)

    def process(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        ids = [[*one.ids, 0] for one in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]
        return {"ids": ids, "len": [len(one) for one in ids]}

    texts = load_dataset("json", data_files=source, split="train", cache_dir=cache)
    options = {} if int(num_proc) == 1 else {"num_proc": int(num_proc)}
    encoded = texts.map(process, batched=True, remove_columns=["text"], **options)
    tokens = np.memmap(output, dtype=np.uint16, mode="w+", shape=(sum(encoded["len"]),))
    place, shards = 0, -(-len(encoded) // SHARD)
    for number in range(shards):
        part = np.concatenate(encoded.shard(shards, number, contiguous=True).with_format("numpy")["ids"])
        tokens[place : place + len(part)] = part
        place += len(part)
    tokens.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
