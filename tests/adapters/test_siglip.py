"""open_clip's SigLipLoss in one process: the adapter, `fastcl.sigmoid_loss` and the original, against the formula."""

from collections.abc import Callable

import pytest
import torch
from originals import loaded, sigmoid, unit, value_and_gradients
from reference import normal
from torch import Tensor

import fastcl
from fastcl.adapters.open_clip import SigLipLoss


def original(*arguments: Tensor) -> Tensor:
    return loaded("open_clip", "loss.py").SigLipLoss()(*arguments)


def adapter(*arguments: Tensor) -> Tensor:
    return SigLipLoss()(*arguments, output_dict=True)["contrastive_loss"]


def dense(*arguments: Tensor) -> Tensor:
    with fastcl.backend("dense"):
        return fastcl.sigmoid_loss(*arguments, normalize=False)


@pytest.mark.parametrize("loss", (original, adapter, dense))
def test_value_and_gradients(loss: Callable[..., Tensor]) -> None:
    for n, d, scale, bias in ((1, 3, 10.0, -10.0), (9, 5, 10.0, -10.0), (17, 24, 117.0, -12.9)):
        image = normal(n, d)
        leaves = [unit(v).requires_grad_() for v in (image, image + normal(n, d, seed=1))]
        leaves += [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (scale, bias)]
        want = value_and_gradients(sigmoid(*leaves).mean(), leaves)
        torch.testing.assert_close(value_and_gradients(loss(*leaves), leaves), want, rtol=1e-10, atol=1e-12)


def test_options() -> None:
    rows = [unit(normal(5, 4, seed=k)) for k in (1, 2)]
    torch.testing.assert_close(SigLipLoss()(*rows, 10.0, None), sigmoid(*rows, torch.tensor(10.0)).mean())
    assert SigLipLoss().dist_impl == "bidir" and SigLipLoss(dist_impl="shift").dist_impl == "shift"
    with pytest.raises(ValueError, match="dist_impl must be one of bidir, .*'ring'"):
        SigLipLoss(dist_impl="ring")
