"""From how many rows fastcl computes a loss on a CPU, where the original takes less time for few."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.adapters.shared import world_size

# By kind of loss, in rows of one set or view. From there on one loss of the kind was never slower, by the medians:
# bench/results/cpu/adapters.md, 128 columns. With fewer than 16 rows nothing was measured; "several directions" was
# tried by hand and is not in the record.
FEWEST = {"two views": 16, "one direction": 256, "two directions": 64, "classes": 32, "peers": 256, "queue": 16,
          "all pairs": 128, "in batch": 16, "several directions": 512, "not measured": 2**62}  # fmt: skip


def worthwhile(kind: str, rows: Tensor) -> bool:
    """Whether a patch computes a loss of this kind (`FEWEST`) of rows (N, D), one set or view, by fastcl."""
    return rows.device.type != "cpu" or len(rows) >= FEWEST[kind]


def pays(kind: str, rows: Tensor) -> bool:
    """Whether an adapter that is a subclass of the original does.

    It also does in half precision, where originals round every step, and on several ranks, which must not part ways.
    """
    wide = rows.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return worthwhile(kind, rows) or not wide or world_size() > 1
