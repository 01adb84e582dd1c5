"""Side-by-side measurements: each file one benchmark, `python -m benchmarks.NAME --json`; results in results/."""
