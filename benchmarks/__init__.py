"""Ratios against what one would otherwise call, one file per claim: `python -m benchmarks`."""
