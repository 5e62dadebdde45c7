"""The files between a call and its gradient: those of the map in CONTRIBUTING.md, and few."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from test_structure import ROOT

import fastcl

MOST = 24  # may only fall
TITLE = "## From the call to the gradient"


def entered(call: Callable[[], Any]) -> list[str]:
    """Files of fastcl/ and kernels/ whose code runs in a call, in the order in which each is first entered."""
    codes: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            codes.setdefault(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    paths = dict.fromkeys(code.co_filename for code in codes)
    found = [Path(path).resolve() for path in paths if not path.startswith("<")]
    ours = [path for path in found if {ROOT / "fastcl", ROOT / "kernels"} & set(path.parents)]
    return list(dict.fromkeys(path.relative_to(ROOT).as_posix() for path in ours))


def journey() -> list[str]:
    """A second call: the first one imports the kernels and makes its plan, later ones are replayed."""
    from fastcl.rowstats.triton import replay

    replay.forget()
    z1, z2 = (v.requires_grad_() for v in torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)))
    with fastcl.backend("triton"):
        fastcl.ntxent_loss(z1, z2).backward()
        return entered(lambda: fastcl.ntxent_loss(z1, z2).backward())


def mapped(text: str) -> list[str]:
    """The files in the first column of the map's table."""
    return re.findall(r"^\| `([^`]+\.py)` \|", text.partition(TITLE)[2].partition("\n## ")[0], re.M)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are files that run in the interpreter alone")
def test_the_map_shows_every_file_that_a_call_enters():
    found, shown = journey(), mapped((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    listed = "\n".join(f"{k:3} {path}" for k, path in enumerate(found, 1))
    assert found == shown, (
        f"entered, but not in CONTRIBUTING.md: {set(found) - set(shown)}; there, but not entered: "
        f"{set(shown) - set(found)}; in this order:\n{listed}"
    )
    assert len(found) <= MOST, f"a call enters {len(found)} files, {MOST} are allowed:\n{listed}"


def test_what_counts_as_entered():
    code = compile("def f(): pass\nf()", str(ROOT / "fastcl" / "checks.py"), "exec")
    assert entered(lambda: exec(code)) == ["fastcl/checks.py"]
    assert entered(lambda: re.escape("x")) == []
    assert mapped(f"| `a.py` |\n{TITLE}\n| `b.py` | c |\n| `d.py` | `e.py` |\n## F\n| `g.py` |") == ["b.py", "d.py"]
