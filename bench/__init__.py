"""Benchmarks of fastcl against what a user would write otherwise: `python -m bench.losses --out DIR`, `make bench`."""
