"""`fastcl.patch`: who follows, what is undone, what calls the original, and programs that are not edited."""

import copy
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import nt_xent, value_and_gradients
from patched import B, D, alone, of, views  # noqa: F401
from torch import Tensor

import fastcl
from fastcl import FastclError
from fastcl.adapters import patching, payoff, replacements, targets
from fastcl.adapters.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def tuples(loss: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: loss(torch.cat([a, b]), (torch.arange(B) % 3).repeat(2))


STABLE, SYMMETRIC = "stable_pretraining.losses.joint_embedding", ("query_to_doc", "doc_to_query")


def ranking(cached: str) -> Callable[..., Any]:
    """A loss of sentence-transformers, of embeddings alone."""
    kind = of(f"sentence_transformers.sentence_transformer.losses:{cached}MultipleNegativesRankingLoss")
    return lambda **options: kind(torch.nn.Sequential(torch.nn.Identity()), **options)


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
        lambda: lambda a, b: of("open_clip.loss:SigLipLoss")()(a, b, logit_scale=3.0, logit_bias=-1.0),
        lambda: lambda a, b: of("open_clip.loss:SigLipLoss")()(a, b, 3.0, None, output_dict=True)["contrastive_loss"],
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
    "sentence_transformers": [
        lambda: lambda a, b: ranking("")().compute_loss_from_embeddings([a, b, b.roll(1, 0)], None),
        lambda: lambda a, b: ranking("")(directions=SYMMETRIC, scale=3.0).compute_loss_from_embeddings([a, b], None),
        lambda: lambda a, b: ranking("Cached")(mini_batch_size=4).calculate_loss([a.split(4), b.split(4)]),
    ],
    "solo": [
        lambda: of("solo.losses.simclr:simclr_loss_func"),
        lambda: lambda a, b: of("solo.losses.simclr:simclr_loss_func")(z1=a, z2=b, temperature=0.3),
        lambda: lambda a, b: of("solo.losses.moco:moco_loss_func")(a, b, a.roll(1, 0).T.detach(), 0.5),
        lambda: of("solo.losses.nnclr:nnclr_loss_func"),
    ],
    "stable_pretraining": [
        lambda: lambda a, b: of(f"{STABLE}:InfoNCELoss")(0.3)(a, b[1:], torch.tensor([3, -100, 0, 0, 4, 1])),
        lambda: of(f"{STABLE}:NTXEntLoss")(0.3),
        lambda: of("stable_pretraining.losses.multimodal:CLIPLoss")(),
        lambda: lambda a, b: of("stable_pretraining.losses.multimodal:CLIPLoss")()(a, b, logit_scale=a[0, 0].exp()),
    ],
}


def replaced(library: str, rows: tuple[targets.Target, ...]) -> tuple[str, ...]:
    """Where the newest release on the registry has losses."""
    return tuple(dict.fromkeys(row.place for row in rows if library != "solo" or "1.0.2" in row.digests))


@pytest.mark.parametrize("library", CALLS)
def test_values_gradients_and_everything_that_is_undone(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses made and names imported before the patch compute with fastcl inside it alone, with the same numbers."""
    ran: list[str] = []

    def noticing(target: targets.Target) -> targets.Target:
        def ours(*args: Any, **options: Any) -> Any:
            found = target.ours(*args, **options)
            ran.append(target.place if found is not NotImplemented else "")
            return found

        return target._replace(ours=ours)

    rows = tuple(map(noticing, targets.TARGETS[library]))
    monkeypatch.setitem(targets.TARGETS, library, rows)
    for make in CALLS[library]:
        torch.manual_seed(0)
        loss = make()
        loss = loss.double() if isinstance(loss, torch.nn.Module) else loss
        twin = copy.deepcopy(loss)  # banks move on
        want = [value_and_gradients(loss(*(leaves := views())), leaves) for _ in range(2)]
        kept = [patching._owner(place) for place in replaced(library, rows)]
        before = [vars(owner).get(name) for owner, name in kept]
        ran.clear()
        with fastcl.patch(library) as done:
            assert done.replaced == replaced(library, rows) and library in str(done)
            got = [value_and_gradients(twin(*(leaves := views())), leaves) for _ in range(2)]
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
        monkeypatch.setattr(payoff, "FEWEST", dict.fromkeys(payoff.FEWEST, B))
        rows: list[int] = []
        monkeypatch.setattr("fastcl.adapters.lightly.ntxent_loss", lambda x, *_, **__: rows.append(len(x)) or x.sum())
        for fewer in (0, 1):
            lightly_loss()(a[fewer:], b[fewer:])
        assert rows == [B]


def test_the_original_computes_with_options_of_whole_matrices_and_on_several_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = views()
    stable, mask = of(f"{STABLE}:InfoNCELoss")(0.3), torch.rand(B, B, generator=torch.Generator().manual_seed(0)) < 0.3
    simclr, nnclr = of("solo.losses.simclr:simclr_loss_func"), of("solo.losses.nnclr:nnclr_loss_func")
    calls: list[Callable[[], Tensor]] = [
        lambda: stable(a, b, torch.arange(B), mask.fill_diagonal_(False)),
        lambda: simclr(a, b, 0.3, extra_pos_mask=torch.ones(2 * B, 2 * B, dtype=torch.bool)),
        lambda: nnclr(a, b),
    ]
    want = [call().item() for call in calls]
    monkeypatch.setattr(replacements, "world_size", lambda: 2)  # the registry's nnclr_loss_func does not gather
    monkeypatch.setattr("fastcl.adapters.solo_learn.one_way", None)  # which fastcl's would call
    with fastcl.patch("stable_pretraining", "solo"):
        assert [call().item() for call in calls] == want


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
        for words, message in (
            (["info_nce", "--"], "name a program"),
            (["info", str(folder / "program.py")], "library must be"),
            (["--force", "info_nce", "x.py"], "no such file: x.py"),
        ):
            with pytest.raises(SystemExit):
                main(words)
            assert message in capsys.readouterr().err
    finally:
        patching._release("info_nce:info_nce")


def test_a_library_has_its_distributions_name_too() -> None:
    of("info_nce:InfoNCE")
    with fastcl.patch("info-nce-pytorch", "info_nce") as one, fastcl.patch("info_nce") as other:
        assert one.replaced == other.replaced
