"""What is claimed of costs, as programs: `python -m benchmarks.NAME` from the root of the repository."""
