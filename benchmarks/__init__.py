"""Measurements: `python -m benchmarks` of speed, `python -m benchmarks.parity` of training against serving."""
