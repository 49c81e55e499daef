"""Benchmarks: peers side by side, in one process, interleaved. Run by `make bench`."""
