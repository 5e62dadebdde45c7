"""What the tests of adapters share."""

import pytest

from fastcl.adapters import shared


@pytest.fixture(autouse=True)
def few_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters compute few rows themselves, which they would leave to their originals."""
    monkeypatch.setattr(shared, "FEWEST", dict.fromkeys(shared.FEWEST, 0))
