"""Benchmarks, one `bench_<what>.py` each; run from the repository root as `python -m benchmarks.bench_<what>`."""
