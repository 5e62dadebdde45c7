"""The DALI pipeline of `dali.py`, and its inputs computed from a plan's parameters.

Crops are resized as in Pillow and torchvision. Where the filter reaches past the border, these use only the weights
inside the image, normalised to a sum of 1; DALI repeats the border pixel, which differs by many grey levels in the
outermost rows and columns of a downscaled image. So each crop gets a margin of zeros, and the filter's output is
divided by the weight that fell on pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastcl.data.plan import ViewParams, ViewSpec

CHUNK = 128  # maximum images per pipeline run; bounds the memory for decoded images
DEPTH = 3  # pipeline runs in flight
HW_DECODER_LOAD = 0.0  # share of the GPU's JPEG engine: its pixels differ, and the batch decides which images it gets

# Margin in pixels. A decoder may upsample the chroma of a region without the pixels around it; one more JPEG block on
# each side keeps this effect out of the crops. On the CPU, decoding a region equals the same part of a full decoding
# even without the margin.
_REGION_MARGIN = 16


def build(spec: ViewSpec, views: int, encoded: bool, device: torch.device, threads: int, most: int = CHUNK) -> Any:
    """A pipeline from images to views.

    Inputs: `images`, JPEG files (bytes,) or pixels (H, W, C), uint8; for files also `region_start` and `region_extent`
    (see `region_inputs`); and for each view v the names of `crop_inputs` with v appended.
    Outputs: one (n, size, size, C) uint8 per view.

    Args:
        spec: output size, and whether there is any rotation.
        views: views per image.
        encoded: whether images are JPEG files.
        device: CPU operators for cpu, GPU operators for cuda.
        threads: DALI's CPU threads.
        most: maximum images per run.
    """
    from nvidia.dali.pipeline import Pipeline

    fn, types = _operators()
    gpu = device.type == "cuda"
    # With a deeper prefetch queue the first schedule_run would need that many batches at once; runs queue up anyway.
    # exec_dynamic: outputs stay valid during further runs.
    pipeline = Pipeline(most, threads, device.index if gpu else None, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        if encoded:
            images = fn.decoders.image_slice(
                fn.external_source(name="images", dtype=types.UINT8, ndim=1),
                device="mixed" if gpu else "cpu",
                start=fn.external_source(name="region_start", dtype=types.INT32, ndim=1),
                shape=fn.external_source(name="region_extent", dtype=types.INT32, ndim=1),
                axes=[0, 1],
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                hw_decoder_load=HW_DECODER_LOAD,
            )
        else:
            images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
            images = images.gpu() if gpu else images
        pipeline.set_outputs(*(_view(images, v, spec, gpu) for v in range(views)))
    pipeline.build()
    return pipeline


def _operators() -> tuple[Any, Any]:
    """DALI's operators and types. They are created at import, so its type stubs lack them."""
    from nvidia.dali import fn, types

    return fn, types


def _view(images: Any, v: int, spec: ViewSpec, gpu: bool) -> Any:
    """The operators of one view. Operands must be on the operator's device, named arguments in CPU memory."""
    fn, types = _operators()

    def given(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=f"{name}{v}", dtype=dtype, ndim=ndim)

    extent, margin = given("extent", types.INT32, 1), given("margin", types.INT32, 1)
    x = fn.slice(images, start=given("start", types.INT32, 1), shape=extent, axes=[0, 1])
    x = fn.slice(x, start=-margin, shape=extent + 2 * margin, axes=[0, 1], out_of_bounds_policy="pad")
    x = fn.resize(
        x,
        roi_start=fn.cast(margin, dtype=types.FLOAT),
        roi_end=fn.cast(margin + extent, dtype=types.FLOAT),
        size=[spec.size, spec.size],
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT,
    )
    gain = given("rows", types.FLOAT, 3) * given("columns", types.FLOAT, 3)
    x = fn.cast(x * (gain.gpu() if gpu else gain), dtype=types.UINT8)
    x = fn.flip(x, horizontal=given("flip", types.INT32, 0), vertical=0)
    if spec.rotation:
        angle = given("angle", types.FLOAT, 0)
        x = fn.rotate(x, angle=angle, keep_size=True, interp_type=types.INTERP_LINEAR, fill_value=0)
    return x


def region_inputs(params: Sequence[ViewParams], sizes: np.ndarray) -> dict[str, np.ndarray]:
    """The region of each image to decode: the bounding rectangle of its views' boxes, plus a margin.

    Args:
        params: parameters of each view, n rows each, boxes in pixels.
        sizes: (n, 2) height and width.

    Returns:
        `region_start` and `region_extent`, (n, 2) int32 pixels, rows before columns.
    """
    first = np.min([p.box[:, :2] for p in params], axis=0) - _REGION_MARGIN
    last = np.max([p.box[:, :2] + p.box[:, 2:] for p in params], axis=0) + _REGION_MARGIN
    first, last = np.maximum(first, 0), np.minimum(last, sizes)
    return {"region_start": first.astype(np.int32), "region_extent": (last - first).astype(np.int32)}


def crop_inputs(params: ViewParams, corner: np.ndarray, spec: ViewSpec) -> dict[str, np.ndarray]:
    """Arguments of one view's operators.

    Args:
        params: parameters of n views, boxes in pixels.
        corner: (n, 2) int32 pixels: where in the image the decoded region starts.
        spec: output size, and whether there is any rotation.

    Returns:
        `start` and `extent` of the crop and the `margin` of zeros around it, (n, 2) int32; factors `rows`
        (n, size, 1, 1) and `columns` (n, 1, size, 1) float32 that compensate for the zeros; `flip` (n,) int32; with
        rotation also `angle` (n,) float32 degrees.
    """
    extent = params.box[:, 2:].astype(np.int32)
    reach = np.ceil(np.maximum(extent / spec.size, 1)).astype(np.int32)  # the filter's radius
    inputs = {
        "start": params.box[:, :2].astype(np.int32) - corner,
        "extent": extent,
        "margin": reach + 1,
        "rows": _gain(extent[:, 0], spec.size)[:, :, None, None],
        "columns": _gain(extent[:, 1], spec.size)[:, None, :, None],
        "flip": params.flip.astype(np.int32),
    }
    return inputs | ({"angle": params.angle.astype(np.float32)} if spec.rotation else {})


def _gain(extent: np.ndarray, size: int) -> np.ndarray:
    """(n, size) float32: total weight of the antialiased linear filter divided by its weight inside the image."""
    step = (extent / size)[:, None, None]  # source pixels per output pixel
    reach = np.maximum(step, 1)
    centre = (np.arange(size)[:, None] + 0.5) * step
    taps = np.floor(centre - reach) + np.arange(2 * np.ceil(reach.max()) + 2)
    weight = np.maximum(0, 1 - np.abs(taps + 0.5 - centre) / reach)
    inside = (taps >= 0) & (taps < extent[:, None, None])
    return (weight.sum(2) / (weight * inside).sum(2)).astype(np.float32)
