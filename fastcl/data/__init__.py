"""Images, the view plan, and the renderers that apply it."""

from fastcl.config.view_spec import PRESETS, ViewSpec
from fastcl.data.loader import Batch, EvalViews, ViewLoader
from fastcl.data.plan import ViewParams, ViewPlan, center_view
from fastcl.data.renderers.choose import RENDERERS, Renderer, TorchvisionRenderer, choose_renderer, make_renderer
from fastcl.data.renderers.torchvision import render_torchvision
from fastcl.data.sources.decode import DECODED_LIMIT, keep_decoded
from fastcl.data.sources.load import Dataset, Split, load
from fastcl.data.sources.subset import subsample

__all__ = [
    "DECODED_LIMIT",
    "PRESETS",
    "RENDERERS",
    "Batch",
    "Dataset",
    "EvalViews",
    "Renderer",
    "Split",
    "TorchvisionRenderer",
    "ViewLoader",
    "ViewParams",
    "ViewPlan",
    "ViewSpec",
    "center_view",
    "choose_renderer",
    "keep_decoded",
    "load",
    "make_renderer",
    "render_torchvision",
    "subsample",
]
