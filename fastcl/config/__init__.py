"""The settings of a run: every key with its meaning, read from and written to TOML. Needs no optional dependencies."""
