"""Measurements of `stages/benchmark.py`: ratios taken side by side in one process."""
