"""Renderers: each applies a plan to images and draws nothing itself."""
