"""The commands of `fastcl`."""
