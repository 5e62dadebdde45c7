"""How far the bounds of fastcl.theory are from what similarity descent measures, on random settings."""
