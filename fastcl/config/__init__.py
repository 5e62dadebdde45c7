"""The settings of a run: every key with its meaning, read from TOML and written as TOML. Needs no extra package."""
