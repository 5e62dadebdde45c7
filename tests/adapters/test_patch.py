"""`fastcl.patch`: who follows, what is undone, what calls the original, and programs that are not edited."""

import copy
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import nt_xent, value_and_gradients, without_their_init
from reference import normal
from torch import Tensor

import fastcl
from fastcl import FastclError
from fastcl.adapters import patching, replacements
from fastcl.adapters.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
B, D = 6, 5


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rows are enough, and nothing stays replaced."""
    monkeypatch.setattr(replacements, "FEWEST", dict.fromkeys(replacements.FEWEST, 0))
    without_their_init(monkeypatch)
    yield
    assert not patching._active


def of(place: str) -> Any:
    """What stands at module:name; skips where the library is not installed."""
    module, _, name = place.partition(":")
    return getattr(pytest.importorskip(module), name)


def views() -> list[Tensor]:
    return [normal(B, D, seed=k).requires_grad_() for k in (1, 2)]


def tuples(loss: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: loss(torch.cat([a, b]), (torch.arange(B) % 3).repeat(2))


CALLS = {
    "lightly": [
        lambda: of("lightly.loss.ntx_ent_loss:NTXentLoss")(0.2),
        lambda: of("lightly.loss.ntx_ent_loss:NTXentLoss")(-0.2),
        lambda: of("lightly.loss.ntx_ent_loss:NTXentLoss")(0.2, (16, D)),
        lambda: of("lightly.loss.ntx_ent_loss:NTXentLoss")(-0.2, (16, D)),
        lambda: of("lightly.loss.dcl_loss:DCLLoss")(),
        lambda: of("lightly.loss.dcl_loss:DCLWLoss")(),
    ],
    "open_clip": [
        lambda: lambda a, b: of("open_clip.loss:ClipLoss")()(a, b, 3.0),
        lambda: lambda a, b: of("open_clip.loss:ClipLoss")()(a, b, 3.0, output_dict=True)["contrastive_loss"],
        lambda: lambda a, b: of("open_clip.loss:CoCaLoss")(1, 1)(a, b, a[:, None], torch.zeros(B, 1).long(), 3.0)[0],
    ],
    "info_nce": [
        lambda: of("info_nce:info_nce"),
        lambda: of("info_nce:InfoNCE")(0.2, reduction="none"),
        lambda: lambda a, b: of("info_nce:info_nce")(a, b, b.roll(1, 0).expand(B, B, D), negative_mode="paired"),
        lambda: lambda a, b: of("info_nce:info_nce")(a, b, negative_keys=b[:3]),
    ],
    "pytorch_metric_learning": [
        lambda: tuples(of("pytorch_metric_learning.losses:NTXentLoss")()),
        lambda: tuples(of("pytorch_metric_learning.losses:SupConLoss")()),
        lambda: of("pytorch_metric_learning.losses:SelfSupervisedLoss")(
            of("pytorch_metric_learning.losses:NTXentLoss")()
        ),
    ],
}


@pytest.mark.parametrize("library", CALLS)
def test_values_gradients_and_everything_that_is_undone(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses made and names imported before the patch compute with fastcl inside it alone, with the same numbers."""
    ran: list[str] = []

    def noticing(target: replacements.Target) -> replacements.Target:
        def ours(*args: Any, **options: Any) -> Any:
            found = target.ours(*args, **options)
            ran.append(target.place if found is not NotImplemented else "")
            return found

        return target._replace(ours=ours)

    targets = tuple(map(noticing, replacements.TARGETS[library]))
    monkeypatch.setitem(replacements.TARGETS, library, targets)
    for make in CALLS[library]:
        torch.manual_seed(0)
        loss = make()
        loss = loss.double() if isinstance(loss, torch.nn.Module) else loss
        twin = copy.deepcopy(loss)  # banks move on
        want = [value_and_gradients(loss(*(rows := views())), rows) for _ in range(2)]
        kept = [patching._owner(target.place) for target in targets]
        before = [vars(owner).get(name) for owner, name in kept]
        ran.clear()
        with fastcl.patch(library) as done:
            assert done.replaced == tuple(target.place for target in targets) and library in str(done)
            got = [value_and_gradients(twin(*(rows := views())), rows) for _ in range(2)]
            assert len(ran) >= 2 and all(ran)
        assert [vars(owner).get(name) for owner, name in kept] == before
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        ran.clear()
        loss(*views())
        assert not ran


def lightly_loss(temperature: float = 0.2) -> Any:
    return of("lightly.loss.ntx_ent_loss:NTXentLoss")(temperature)


def test_patches_overlap_in_any_order() -> None:
    kind = type(lightly_loss())
    original = kind.forward
    first, second = fastcl.patch("lightly"), fastcl.patch("lightly")
    replaced = kind.forward
    first.restore()
    first.restore()
    assert kind.forward is replaced is not original and "restored" in repr(first) and "restored" not in repr(second)
    with fastcl.patch("lightly", "lightly"):
        second.restore()
        assert kind.forward is replaced
    assert kind.forward is original
    with pytest.raises(KeyError), fastcl.patch("lightly"):
        raise KeyError
    assert kind.forward is original


def test_what_somebody_else_put_there_stays() -> None:
    kind = type(lightly_loss())
    original = kind.forward
    done = fastcl.patch("lightly")
    kind.forward = mine = lambda self, a, b: a.sum()
    try:
        with pytest.warns(UserWarning, match="replaced again"):
            done.restore()
        assert kind.forward is mine
        with pytest.raises(FastclError, match=r"lightly 1.*NTXentLoss.forward.*1\.6\.0.*force"):
            fastcl.patch("lightly")
        with fastcl.patch("lightly", force=True):
            assert lightly_loss()(*views()).item() == pytest.approx(nt_xent(*views(), 0.2).mean().item())
        assert kind.forward is mine
    finally:
        kind.forward = original


def test_wrong_names_replace_nothing() -> None:
    original = type(lightly_loss()).forward
    for names, message in ((("lightly", "lightning"), "lightning"), ((), "libraries")):
        with pytest.raises(FastclError, match=rf"(?s)(?=.*{message}).*lightly"):
            fastcl.patch(*names)
    with pytest.MonkeyPatch.context() as gone:
        gone.setitem(sys.modules, "info_nce", None)
        with pytest.raises(FastclError, match="info_nce cannot be patched"):
            fastcl.patch("lightly", "info_nce")
    assert type(lightly_loss()).forward is original


def test_the_original_answers_what_fastcl_refuses_or_is_slower_at(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = views()
    nce = of("info_nce:info_nce")
    signature = inspect.signature(nce)
    with fastcl.patch("lightly", "open_clip", "info_nce"):
        assert inspect.signature(nce) == signature
        with pytest.raises(ValueError, match="^<query> and <positive_key> must must have"):  # in its own words
            nce(a, b[1:])
        clip = of("open_clip.loss:ClipLoss")()
        assert clip(a.float(), b.half().float(), -2.0).isfinite()  # a negative scale

        class Sharper(type(clip)):
            def get_logits(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
                found = super().get_logits(*args, **options)
                return found[0] * 2, found[1] * 2

        assert Sharper()(a, b, 3.0).item() == pytest.approx(clip(a, b, 6.0).item())
        monkeypatch.setattr(replacements, "FEWEST", dict.fromkeys(replacements.FEWEST, B))
        rows: list[int] = []
        monkeypatch.setattr("fastcl.adapters.lightly.ntxent_loss", lambda x, *_, **__: rows.append(len(x)) or x.sum())
        for fewer in (0, 1):
            lightly_loss()(a[fewer:], b[fewer:])
        assert rows == [B]


PROGRAM = """
import sys, info_nce, neighbour
from fastcl.adapters import patching
print(__name__, sys.argv[1:], patching._active["info_nce:info_nce"].holders)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a program and a module that it imports."""
    of("info_nce:info_nce")
    (tmp_path / "neighbour.py").write_text("value = 3\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def test_a_program_that_is_not_edited(folder: Path) -> None:
    """By the command and, besides, by the variable; both say what they did."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTCL_PATCH": "info_nce"}
    command = [sys.executable, "-m", "fastcl.adapters", "info_nce", "-m", "program", "--x"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("__main__ ['--x'] 2\n", 0), ran.stderr
    assert ran.stderr == "fastcl: info_nce 0.1.4: info_nce\n" * 2


def test_a_script(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setattr(sys, "path", ["before", *sys.path])
    monkeypatch.setenv("RANK", "1")  # which says nothing
    main(["--force", "info_nce", str(folder / "program.py"), "-m", "--x"])
    try:
        said = capsys.readouterr()
        assert (said.out, said.err) == ("__main__ ['-m', '--x'] 1\n", "")
        for words, message in ((["info_nce", "--"], "name a program"), (["info", "x.py"], "library must be")):
            with pytest.raises(SystemExit):
                main(words)
            assert message in capsys.readouterr().err
    finally:
        patching._release("info_nce:info_nce")
