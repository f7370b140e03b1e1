"""Benchmarks: what is timed is first checked for equality, in the same function."""
