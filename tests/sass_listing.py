"""Listings of machine code with encodings, as nvdisasm prints them."""

import gzip
import hashlib
from pathlib import Path

from bench.static import sass
from bench.static.compile import Facts
from bench.static.jobs import Compiled


def listing(*lines: str) -> str:
    """A line is a label or an instruction, which {stall, write, read, wait} may follow."""
    text = "\t.section\t.text.kernel\n"
    for k, line in enumerate(lines):
        if line.endswith(":"):
            text += f"{line}\n"
            continue
        line, _, fields = line.partition(" {")
        stall, write, read, wait = [int(field) for field in fields.rstrip("}").split(",")] if fields else [1, 7, 7, 0]
        word = (stall | write << 5 | read << 8 | wait << 11) << 41
        text += f"        /*{16 * k:04x}*/    {line} ;   /* 0x{k:016x} */\n{' ' * 40}/* 0x{word:016x} */\n"
    return text


def code(*lines: str) -> list[sass.Block]:
    """The blocks of a listing."""
    return sass.blocks(listing(*lines))


def compiled(folder: Path, *lines: str, **changes) -> Compiled:
    """A kernel with this code: four warps, of which four programs fit on a multiprocessor."""
    text = listing(*lines).encode()
    file = folder / f"{hashlib.sha256(text).hexdigest()}.gz"  # listings are read once
    file.write_bytes(gzip.compress(text))
    facts = dict(
        registers=128, stack=0, local=0, shared=1024, tensor_memory=0, warps=4, dot=True,
        tensor={"HGMMA": 8, "HMMA": 0, "UTCMMA": 0}, register_operand=0, waits=2, broken=0, chained=6,
        messages=[], hazards=[], exponentials=32,
    )  # fmt: skip
    return Compiled(Facts(**(facts | changes)), str(file))
