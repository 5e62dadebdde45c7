"""Bytes, memory and time of a CLIP loss over ranks, computed from formulas."""
