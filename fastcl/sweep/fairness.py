"""Makes the cells of a sweep comparable: equally many evaluated images, and equally many optimiser steps if asked for.

A sweep over classes or batch sizes changes the steps of an epoch, and one over classes the number of held-out images,
on which CKA and RSA depend (biased CKA most). In arXiv 2510.08852 both change together with what its figures are about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from fastcl.config.settings import Config
from fastcl.errors import FastclError
from fastcl.sweep.grid import Cell
from fastcl.train.early import Extent

IMAGES = "data.test_images"
# Settings in epochs that grow with the number of epochs, so that they are the same number of steps.
_IN_EPOCHS = ("optim.warmup_epochs", "train.eval_every", "train.checkpoint_every")


def with_equal_steps(cells: Sequence[Cell], extents: Mapping[str, Extent], base: Config, steps: int) -> list[Cell]:
    """Cells whose epochs are set so that each takes about as many steps as the config: the nearest whole number of
    epochs, at least one. Warm-up, evaluations and checkpoints move along, unless they are swept.

    All seeds of the same values get the same number of epochs.

    Args:
        cells: the cells.
        extents: of each cell, by its name.
        base: the config of the sweep.
        steps: of an epoch of that config.

    Raises:
        FastclError: the number of epochs is itself swept.
    """
    if any("train.epochs" in cell.values for cell in cells):
        raise FastclError("--equal steps sets train.epochs of every cell; leave out --over train.epochs")
    steps_of: dict[tuple[str, ...], int] = {}
    found = []
    for cell in cells:
        length = steps_of.setdefault(tuple(cell.values.values()), extents[cell.name].steps)
        epochs = max(1, round(base.train.epochs * steps / length))
        found.append(dataclasses.replace(cell, config=_lasting(cell, epochs)))
    return found


def _lasting(cell: Cell, epochs: int) -> Config:
    """The config of a cell with another number of epochs."""
    config = cell.config
    changes: dict[str, dict[str, float]] = {"train": {"epochs": epochs}, "optim": {}}
    for key in _IN_EPOCHS:
        table, name = key.split(".")
        if key not in cell.values:
            value = getattr(getattr(config, table), name) * epochs / config.train.epochs
            changes[table][name] = value if table == "optim" else max(1, round(value))
    tables = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **tables)


def with_equal_images(
    cells: Sequence[Cell], extents: Mapping[str, Extent], before: int | None
) -> tuple[list[Cell], int | None]:
    """Cells that are all evaluated on as many held-out images as the one that has fewest, and that number.

    A config or sweep that sets `data.test_images` itself is left as it is, and the number is None.

    Args:
        cells: the cells.
        extents: of each cell, by its name.
        before: the number that earlier cells of this sweep were evaluated on; None: there are none.

    Raises:
        FastclError: a cell has fewer images than those before it.
    """
    if any(cell.config.data.test_images is not None for cell in cells):
        return list(cells), None
    fewest = min(cells, key=lambda cell: extents[cell.name].test)
    count = extents[fewest.name].test
    if before is not None and count < before:
        raise FastclError(
            f"{fewest.name} has only {count} held-out images, and the cells of this sweep are evaluated on {before}; "
            f"choose another --out for a sweep with it, or set {IMAGES} in the config from the start"
        )
    count = count if before is None else before
    return [dataclasses.replace(cell, config=_evaluated_on(cell.config, count)) for cell in cells], count


def _evaluated_on(config: Config, count: int) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, test_images=count))
