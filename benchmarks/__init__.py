"""Benchmarks: ours and a peer measured in the same run. `python -m benchmarks --help`."""
