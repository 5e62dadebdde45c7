"""The reference renderer: torchvision's operators on the CPU, one image at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastcl.data.plan import ViewParams, ViewSpec
from fastcl.data.renderers.colour import colour_stage


def render_torchvision(images: Sequence[np.ndarray], params: ViewParams, spec: ViewSpec) -> Tensor:
    """Views of images: torchvision crops, resizes (bilinear, antialiased), flips and rotates; then the colour stage.

    Args:
        images: n arrays (H, W, C) uint8; sizes may differ.
        params: parameters of the n views, boxes in pixels.
        spec: output size, blur kernel and normalisation.

    Returns:
        (n, C, size, size) float32 on the CPU. A view depends only on its image and parameters, bit for bit.
    """
    rendered = [_geometry(image, params, k, spec.size) for k, image in enumerate(images)]
    return colour_stage(torch.stack(rendered), params, spec)


def _geometry(image: np.ndarray, params: ViewParams, k: int, size: int) -> Tensor:
    # Imported here because it takes seconds: `import fastcl.data` and the other renderers do without it.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    top, left, height, width = (int(v) for v in params.box[k])
    x = torch.from_numpy(image[top : top + height, left : left + width].transpose(2, 0, 1).copy())
    x = F.resize(x, [size, size], antialias=True)
    if params.flip[k]:
        x = F.horizontal_flip(x)
    if params.angle[k]:
        x = F.rotate(x, float(params.angle[k]), interpolation=InterpolationMode.BILINEAR)
    return x
