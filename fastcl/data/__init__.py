"""Images, the view plan, and the renderers that apply it."""

from fastcl.data.loader import ViewLoader, eval_batches
from fastcl.data.plan import PRESETS, ViewParams, ViewPlan, ViewSpec, center_view
from fastcl.data.render import render_torchvision
from fastcl.data.sources import Dataset, Split, load

__all__ = [
    "PRESETS",
    "Dataset",
    "Split",
    "ViewLoader",
    "ViewParams",
    "ViewPlan",
    "ViewSpec",
    "center_view",
    "eval_batches",
    "load",
    "render_torchvision",
]
