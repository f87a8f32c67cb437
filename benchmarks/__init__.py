"""Timings of every op beside what one would use instead. Start: `python -m benchmarks.run --help`."""
