"""Data: text files to a tokenizer, to indexed token files, to packed samples, to a `Batch`.

Training calls `build.open_data`. Nothing here knows ranks or process groups: samples are numbered in one global stream
and asked for by number, so every number of ranks sees the same data.
"""
