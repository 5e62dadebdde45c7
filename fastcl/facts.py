"""What ranks compare before they compute together, as numbers that travel in one collective."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

REFUSED = -1  # in place of the number of rows: this rank has raised an error
_WORDS = 64  # of 8 bytes: room for the facts, or for the message of an error
_NUMBERS = 4  # that devices hold
_FIRST = 3  # word of the text


def packed(counts: Sequence[int], text: str, numbers: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(71,) int64: two counts, then a checksum of the text, its first 512 bytes and four numbers, by their bits.

    Args:
        counts: of this rank's rows; they may differ between ranks.
        text: facts, one a line: the name that an error gives it, a colon and the value.
        numbers: further facts, tensors of one element. Those elsewhere than the device are left out: to read them
            would wait for theirs.
    """
    raw = text.encode()
    words = struct.unpack(f"<{_WORDS}q", raw[: 8 * _WORDS].ljust(8 * _WORDS, b"\0"))
    row = [*counts, zlib.crc32(raw), *words, *[0] * _NUMBERS]
    told = torch.tensor(row, dtype=torch.int64, device=device)
    for k, number in enumerate([*numbers.values()][:_NUMBERS], _FIRST + _WORDS):
        if number.device.type == device.type:
            told[k] = number.detach().reshape(()).double().view(torch.int64)
    return told


def are_same(table: Tensor) -> bool:
    """Whether the facts of all ranks, (world, 71) on the CPU, are the same, and no rank refuses."""
    return bool((table[:, 2:] == table[:1, 2:]).all()) and bool((table[:, 0] != REFUSED).all())


def difference(table: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Message about the first rank that refused, or about the first fact that is not the same on all ranks.

    Args:
        names: of the numbers.
    """
    texts = [_bytes(row[_FIRST : _FIRST + _WORDS]).rstrip(b"\0").decode(errors="ignore") for row in table]
    for rank, (row, text) in enumerate(zip(table, texts, strict=True)):
        if row[0] == REFUSED:
            return f"rank {rank} of {len(table)}: {text}"
    found: list[dict[str, object]] = [
        {line.partition(": ")[0]: line.partition(": ")[2] for line in text.split("\n")} for text in texts
    ]
    for facts, row in zip(found, table, strict=True):
        facts.update(zip(names, struct.unpack(f"<{_NUMBERS}d", _bytes(row[-_NUMBERS:])), strict=False))
    for name, value in found[0].items():
        for rank, other in enumerate(found):
            if other.get(name) != value:
                return (
                    f"all ranks of a global batch must have the same {name}, got {value} on rank 0 and "
                    f"{other.get(name)} on rank {rank}"
                )
    return f"all ranks of a global batch must have the same arguments, got on rank 0: {texts[0]}"


def _bytes(words: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(words)}q", *words)
