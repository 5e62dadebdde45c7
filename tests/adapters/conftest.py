"""What the tests of adapters share."""

import pytest

from fastcl.adapters import payoff


@pytest.fixture(autouse=True)
def few_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are enough for adapters and patches, which would leave them to the originals."""
    monkeypatch.setattr(payoff, "FEWEST", dict.fromkeys(payoff.FEWEST, 0))
