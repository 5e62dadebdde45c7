"""What tests of `fastcl.patch` share: names of other libraries, two views, and a clean end."""

from collections.abc import Iterator
from typing import Any

import pytest
from originals import without_their_init
from reference import normal
from torch import Tensor

from fastcl.adapters import patching

B, D = 6, 5


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing stays replaced."""
    without_their_init(monkeypatch)
    yield
    assert not patching._active


def of(place: str) -> Any:
    """What stands at module:name; skips where the library is not installed."""
    module, _, name = place.partition(":")
    return getattr(pytest.importorskip(module), name)


def views() -> list[Tensor]:
    return [normal(B, D, seed=k).requires_grad_() for k in (1, 2)]
