"""Benchmarks of fastcl against what users would write otherwise: `python -m bench.losses --out DIR`, `make bench`."""
