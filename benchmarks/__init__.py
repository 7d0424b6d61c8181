"""Measurements that print ratios taken alternately in one run: `python -m benchmarks`."""
