"""Measurements: each is run as `python -m benchmarks.<name>` from the checkout."""
