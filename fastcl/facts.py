"""What ranks compare before they compute together, as numbers that travel in one collective."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

REFUSED = -1  # in place of the number of rows: this rank has raised an error
_WORDS = 64  # of 8 bytes: room for the facts, or for the message of an error
_NUMBERS = 16  # that devices hold
A_TENSOR = "a tensor"  # the value of these in the text
_FIRST = 3  # word of the text


def packed(counts: Sequence[int], text: str, numbers: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(83,) int64: two counts, then a checksum of the text, its first 512 bytes and sixteen numbers, by their bits.

    Args:
        counts: of this rank's rows; they may differ between ranks.
        text: facts, one a line: the name that an error gives it, a colon and the value.
        numbers: facts whose value in the text is `A_TENSOR`, of one element, in the order of the text. Those elsewhere
            than the device are left out: to read them would wait for theirs.
    """
    raw = text.encode()
    words = struct.unpack(f"<{_WORDS}q", raw[: 8 * _WORDS].ljust(8 * _WORDS, b"\0"))
    row = [*counts, zlib.crc32(raw), *words, *[0] * _NUMBERS]
    told = torch.tensor(row, dtype=torch.int64, device=device)
    for k, number in enumerate([*numbers.values()][:_NUMBERS], _FIRST + _WORDS):
        if number.device.type == device.type:
            told[k] = number.detach().reshape(()).double().add(0).view(torch.int64)  # -0 is 0
    return told


def are_same(table: Tensor) -> bool:
    """Whether the facts of all ranks, (world, 83) on the CPU, are the same, and no rank refuses."""
    return bool((table[:, 2:] == table[:1, 2:]).all()) and bool((table[:, 0] != REFUSED).all())


def difference(table: Sequence[Sequence[int]]) -> str:
    """Message about the first rank that refused, or about the first fact that is not the same on all ranks."""
    texts = [_bytes(row[_FIRST : _FIRST + _WORDS]).rstrip(b"\0").decode(errors="ignore") for row in table]
    for rank, (row, text) in enumerate(zip(table, texts, strict=True)):
        if row[0] == REFUSED:
            return f"rank {rank} of {len(table)}: {text}"
    found = [{line.partition(": ")[0]: line.partition(": ")[2] for line in text.split("\n")} for text in texts]
    if all(row[2:-_NUMBERS] == table[0][2:-_NUMBERS] for row in table):  # so the texts are the same
        names = [name for name, value in found[0].items() if value == A_TENSOR]
        found = [dict(zip(names, _numbers(row[-_NUMBERS:]), strict=False)) for row in table]
    for name, value in found[0].items():
        for rank, other in enumerate(found):
            if other.get(name) != value:
                return (
                    f"all ranks of a global batch must have the same {name}, got {value} on rank 0 and "
                    f"{other.get(name)} on rank {rank}"
                )
    return f"all ranks of a global batch must have the same arguments, got on rank 0: {texts[0]}"


def _numbers(words: Sequence[int]) -> list[str]:
    return [str(value) for value in struct.unpack(f"<{_NUMBERS}d", _bytes(words))]


def _bytes(words: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(words)}q", *words)
