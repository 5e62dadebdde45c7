"""Renderers: each applies a plan to images and draws no random numbers itself."""
