"""What `fastcl.patch` leaves to the originals, and what torch.compile makes of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from originals import value_and_gradients
from patched import B, D, alone, of, views  # noqa: F401
from reference import normal
from torch import Tensor

import fastcl
from fastcl.adapters import payoff, solo_learn


def both(library: str, call: Callable[[], Any]) -> tuple[Any, Any]:
    """Results, or errors, of a call of the original, and of fastcl in its place."""
    found = []
    for patched in (False, True):
        with fastcl.patch(library) if patched else torch.enable_grad():
            try:
                found.append(call())
            except Exception as error:
                found.append(repr(error))
    return found[0], found[1]


def raises(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("fastcl computed")


@pytest.mark.parametrize(
    ("place", "hook"),
    (
        ("open_clip.loss:SigLipLoss", "get_logits"),
        ("open_clip.loss:SigLipLoss", "_loss"),
        ("open_clip.loss:ClipLoss", "get_ground_truth"),
        ("stable_pretraining.losses.joint_embedding:NTXEntLoss", "_compute"),
    ),
)
def test_an_override_on_the_class_or_on_the_loss_itself_is_the_originals(place: str, hook: str) -> None:
    kind, options = of(place), {"logit_scale": 3.0, "logit_bias": None} if "open_clip" in place else {}
    plain = getattr(kind, hook)

    def doubled(self: Any, *args: Any, **given: Any) -> Any:
        found = plain(self, *args, **given)
        return tuple(2 * v for v in found) if isinstance(found, tuple) else 2 * found

    loss = kind()
    setattr(loss, hook, doubled.__get__(loss))
    of_subclass = type("Subclass", (kind,), {hook: doubled})()
    if hook == "get_ground_truth":  # labels: twice the first is the first
        a, b = (v[:1] for v in views())
    else:
        a, b = views()
    for one in (loss, of_subclass):
        original, patched = both(place.partition(".")[0], lambda one=one: one(a, b, **options))
        assert isinstance(original, Tensor)
        torch.testing.assert_close(patched, original, rtol=0, atol=0)


def test_documents_without_a_query_are_the_originals() -> None:
    kind = of("sentence_transformers.sentence_transformer.losses:MultipleNegativesRankingLoss")
    loss = kind(torch.nn.Sequential(torch.nn.Identity()), directions=("query_to_doc",))
    for count in (B + 2, B - 2):
        rows = [normal(B, D), normal(count, D, seed=1)]
        original, patched = both(
            "sentence_transformers", lambda rows=rows: loss.compute_loss_from_embeddings(rows, None)
        )
        assert str(patched) == str(original)


@pytest.mark.parametrize("shape", ((B + 1, D), (D,)))
def test_rows_that_solo_learn_refuses(shape: tuple[int, ...]) -> None:
    for place in ("solo.losses.nnclr:nnclr_loss_func", "solo.losses.simclr:simclr_loss_func"):
        original, patched = both("solo", lambda place=place: of(place)(normal(B, D), normal(*shape)))
        assert str(patched) == str(original)


def test_division_by_zero_is_the_originals() -> None:
    loss = of("stable_pretraining.losses.multimodal:CLIPLoss")()
    original, patched = both("stable_pretraining", lambda: loss(*views(), 0.0))
    assert str(patched) == str(original)


def test_what_was_not_measured_is_the_originals_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, queue = of("solo.losses.moco:moco_loss_func"), normal(D, 8)
    monkeypatch.setattr(solo_learn, "queue_loss", raises)
    with fastcl.patch("solo"):
        with pytest.raises(AssertionError, match="fastcl computed"):
            loss(*views(), queue)  # the limits are 0 here
        monkeypatch.setitem(payoff.FEWEST, "not measured", 2**62)
        assert loss(*views(), queue).isfinite()
        meta = normal(B, D).to("meta")
        assert payoff.worthwhile("not measured", meta)


@pytest.mark.parametrize("place", ("info_nce:info_nce", "solo.losses.nnclr:nnclr_loss_func"))
def test_whole_graphs_before_a_patch_in_it_and_after_it(place: str) -> None:
    function, leaves = of(place), views()
    library = place.partition(":")[0].partition(".")[0]
    expected = value_and_gradients(function(*leaves), leaves)
    step = torch.compile(lambda a, b: function(a, b), backend="eager", fullgraph=True)
    found = [step(*leaves)]
    with fastcl.patch(library):
        found += [step(*leaves), torch.compile(lambda a, b: function(a, b), backend="eager", fullgraph=True)(*leaves)]
    found.append(step(*leaves))
    for one in found:
        torch.testing.assert_close(value_and_gradients(one, leaves), expected, rtol=1e-9, atol=1e-9)


def test_a_function_that_was_replaced_again_stays_as_it_is() -> None:
    function = of("info_nce:info_nce")
    kept = function.__code__
    patched = fastcl.patch("info_nce")
    other = function.__code__ = (lambda *args: None).__code__
    try:
        with pytest.warns(UserWarning, match="info_nce was replaced again"):
            patched.restore()
        assert function.__code__ is other
    finally:
        function.__code__ = kept
