"""What is wrong with a machine stands in the report of `fastcl doctor` and does not end it."""

from importlib import metadata

import torch

from fastcl.cli import doctor


def test_packages_and_cards_that_cannot_be_asked_are_named(monkeypatch):
    def fails(error):
        def ask(*_):
            raise error

        return ask

    monkeypatch.setattr(metadata, "version", fails(PermissionError(13, "Permission denied")))
    assert doctor._version("numpy") == "unknown (PermissionError: [Errno 13] Permission denied)"
    monkeypatch.setattr(metadata, "version", lambda _: None)  # of a damaged description
    assert doctor._version("numpy") == "unknown"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fails(RuntimeError("CUDA error:\nunknown")))
    assert doctor._gpu() == "query failed: CUDA error:\\nunknown"
