"""Calls that no renderer takes: each refuses the same ones, with the same words."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from dali_views import array_split, drawn
from small_images import noise

from fastcl import FastclError
from fastcl.data import RENDERERS, ViewParams, ViewSpec, make_renderer
from fastcl.data.renderers.choose import obstacle


def _moved(box: list[float]) -> Callable[[ViewParams], ViewParams]:
    return lambda p: replace(p, box=np.array([p.box[0], box, p.box[2]]))


@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize(
    ("positions", "change", "message"),
    [
        ([0, 1], lambda p: p, r"per position \(2\), got \[2, 3\]"),
        ([], lambda p: p, r"per position \(0\), got \[3, 3\]"),
        ([0, 1, 2], None, r"per position \(3\), got \[\]"),
        ([0, 1, 3], lambda p: p, r"positions must be in \[0, 3\), got 0 to 3"),
        ([-1, 1, 2], lambda p: p, r"positions must be in \[0, 3\), got -1 to 2"),
        ([0.0, 1.0, 1.5], lambda p: p, "positions must be .* integers.* float64"),
        ([0, 1, 2], _moved([0, 1, 9, 9]), r"within the 9x9 image, got \[0.0, 1.0, 9.0, 9.0\]"),
        ([0, 1, 2], _moved([0, 0, 0, 9]), r"within the 9x9 image, got \[0.0, 0.0, 0.0, 9.0\]"),
        ([0, 1, 2], _moved([0, 0, 9, 0]), r"within the 9x9 image, got \[0.0, 0.0, 9.0, 0.0\]"),
        ([0, 1, 2], _moved([-1, 0, 5, 5]), r"within the 9x9 image, got \[-1.0, 0.0, 5.0, 5.0\]"),
        ([0, 1, 2], _moved([0, -1, 5, 5]), r"within the 9x9 image, got \[0.0, -1.0, 5.0, 5.0\]"),
        ([0, 1, 2], _moved([5, 0, 5, 5]), r"within the 9x9 image, got \[5.0, 0.0, 5.0, 5.0\]"),
        ([0, 1, 2], _moved([0, 0.5, 5, 5]), r"must be whole pixels .*, got \[0.0, 0.5, 5.0, 5.0\]"),
        ([0, 1, 2], lambda p: replace(p, angle=np.array([0.0, 7, 0])), "rotation is 0.* rotated by 7.0 degrees"),
    ],
)
def test_what_cannot_be_rendered(name, positions, change, message, device):
    split, spec = array_split([noise(k, 9, 9) for k in range(3)]), ViewSpec(size=8)
    if reason := obstacle(name, split, spec, device):
        pytest.skip(reason)
    renderer, params = make_renderer(name, split, spec, device), drawn(split, np.arange(3), spec)
    given = [] if change is None else [params[0], change(params[1])]  # the first view is as it should be
    if len(positions) == 2:
        given[0] = given[0][:2]
    with pytest.raises(FastclError, match=message):
        renderer(np.array(positions), given)
    assert len(renderer(np.arange(3), params)[1]) == 3, "usable after a refusal"
