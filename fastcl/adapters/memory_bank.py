"""lightly's memory bank, which its NTXentLoss keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastcl.adapters.shared import gathered


class MemoryBankModule(nn.Module):
    """A bank of unit rows, oldest overwritten first.

    Args:
        size: 0 for no bank, or (number of rows, width).
        gather_distributed: enqueue the rows of all ranks.

    Raises:
        ValueError: a negative size, a number of rows without a width, or more than two numbers.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int] = 0, gather_distributed: bool = False) -> None:
        super().__init__()
        shape = (size,) if isinstance(size, int) else tuple(size)
        if any(n < 0 for n in shape):
            raise ValueError(f"Illegal memory bank size {size}: it must not be negative")
        if shape != (0,) and len(shape) != 2:
            raise ValueError(f"memory bank size must be 0 or (number of rows, width), got {size}: name both")
        self.size, self.gather_distributed = shape, gather_distributed
        dtype, device = torch.get_default_dtype(), torch.get_default_device()  # as lightly's
        rows = torch.empty(shape, dtype=dtype, device=device)
        if len(shape) == 2:
            rows = normalize(torch.randn(shape, dtype=dtype, device=device), dim=-1)
        self.register_buffer("bank", rows, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Overwrite the oldest rows. Rows that do not fit at the end of the bank are dropped, as lightly drops them."""
        rows = gathered(rows) if self.gather_distributed else rows
        start = int(self.bank_ptr)
        stop = min(start + len(rows), self.size[0])
        self.bank[start:stop] = rows[: stop - start]
        self.bank_ptr.fill_(stop % self.size[0])
