"""What `fastcl.patch` replaces, by library, and the sources that it was written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastcl.adapters import inf_cl, lightly, open_clip, replacements, solo_learn, stable_pretraining
from fastcl.adapters.replacements import if_alone, if_worthwhile


class Target(NamedTuple):
    """A method or a function that is replaced.

    A place may have several rows, for releases that differ there; one that is not in all releases of its library is
    left out where it is absent.

    Args:
        place: module:qualified name.
        ours: called with the arguments of the original; returns NotImplemented if the original has to compute.
        sources: what computes the value in the original, as names like `place`; the replaced function is one of them.
        digests: of those sources, by the releases that have them.
        hooks: methods that a subclass may override and that `ours` does not call; with an override the original
            computes.
        adapter: the module that `ours` imports when it is called, since it needs the library.
    """

    place: str
    ours: Callable[..., Any]
    sources: tuple[str, ...]
    digests: dict[str, str]
    hooks: tuple[str, ...] = ()
    adapter: str = ""


DISTRIBUTIONS = {
    "inf_cl": "inf-cl",
    "info_nce": "info-nce-pytorch",
    "lightly": "lightly",
    "open_clip": "open-clip-torch",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "sentence_transformers": "sentence-transformers",
    "solo": "solo-learn",
    "stable_pretraining": "stable-pretraining",
    "vissl": "vissl",
}


def _of(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(owner + name for name in names)


_CLIP, _SIGLIP = "open_clip.loss:ClipLoss.", "open_clip.loss:SigLipLoss."
_PML = "pytorch_metric_learning.losses."
_PAIRS = _of(f"{_PML}generic_pair_loss:GenericPairLoss.", "compute_loss", "mat_based_loss", "pair_based_loss")
_SOLO, _SOLO_GATHERS = "solo.losses.", _of("solo.utils.misc:", "gather", "GatherLayer.forward", "GatherLayer.backward")
_STABLE = "stable_pretraining.losses."
_INFONCE = _of(f"{_STABLE}joint_embedding:InfoNCELoss.", "forward", "_compute")
_VISSL = "vissl.losses.simclr_info_nce_loss:SimclrInfoNCECriterion."
_FLASH = _of("inf_cl.flash:", "_cal_flash_loss", "_flash_prob_forward", "_flash_prob_backward", "FlashProb.forward",
             "FlashProb.backward")  # fmt: skip
_RANKING = "sentence_transformers.sentence_transformer.losses."
_SIMILARITIES = _of("sentence_transformers.util:", "cos_sim", "dot_score", "all_gather_with_grad")


def _stable(file: str, name: str, ours: Callable[..., Any], newest: str, before: str) -> tuple[Target, Target]:
    """0.1.7 computes the rank's own loss, whose rows it gathers in vain."""
    place = f"{_STABLE}{file}:{name}.forward"
    sources = tuple(dict.fromkeys((place, *_INFONCE, "stable_pretraining.utils.distributed:all_gather")))
    return (Target(place, ours, sources, {"0.1.8": newest}, ("_compute",)),
            Target(place, if_alone(ours), sources, {"0.1.7": before}, ("_compute",)))  # fmt: skip


TARGETS: dict[str, tuple[Target, ...]] = {
    "inf_cl": (
        Target("inf_cl.flash:cal_flash_loss", inf_cl.cal_flash_loss, ("inf_cl.flash:cal_flash_loss", *_FLASH),
               dict.fromkeys(("1.2.1", "1.2"), "21a89770925dddcc")),
        Target("inf_cl.ring:cal_ring_loss", inf_cl.cal_ring_loss,
               (*_of("inf_cl.ring:", "cal_ring_loss", "_cal_ring_loss", "RingProb.forward", "RingProb.backward",
                     "GradientGather.backward"), *_FLASH), {"1.2.1": "8cae32c6739a10e5", "1.2": "bf6064c05a414046"}),
        Target("inf_cl.ring:cal_inf_loss", inf_cl.cal_inf_loss,
               (*_of("inf_cl.ring:", "cal_inf_loss", "_cal_inf_loss", "InfProb.forward", "InfProb.backward",
                     "GradientGather.backward"), *_FLASH), dict.fromkeys(("1.2.1", "1.2"), "5715d3690e79dbb0")),
    ),
    "info_nce": (Target("info_nce:info_nce", replacements.infonce, ("info_nce:info_nce", "info_nce:normalize"),
                        {"0.1.4": "e440d08d4d064c39", "0.1.3": "a2bd52f85e7a7eea"}),),
    "lightly": (
        Target("lightly.loss.ntx_ent_loss:NTXentLoss.forward", replacements.lightly_ntxent,
               ("lightly.loss.ntx_ent_loss:NTXentLoss.forward",),
               {"1.6.0": "c2fe35b380b7abbe", "1.5.26": "c2fe35b380b7abbe", "1.5.23": "90dbb1e967200034"}),
        Target("lightly.loss.dcl_loss:DCLLoss.forward", if_worthwhile("two views", lightly.DCLLoss.forward),
               ("lightly.loss.dcl_loss:DCLLoss.forward", "lightly.loss.dcl_loss:DCLLoss._loss"),
               dict.fromkeys(("1.6.0", "1.5.26", "1.5.23"), "79eda9174765df8d"), ("_loss",)),
    ),
    "open_clip": (
        Target(_CLIP + "forward", replacements.openclip_clip,
               (*_of(_CLIP, "forward", "get_logits", "get_ground_truth"), "open_clip.loss:gather_features"),
               dict.fromkeys(("3.3.0", "3.2.0"), "166c422f18754b8d"), ("get_logits", "get_ground_truth")),
        Target(_SIGLIP + "forward", if_worthwhile("all pairs", open_clip.SigLipLoss.forward),
               _of(_SIGLIP, "forward", "_loss", "get_logits", "get_ground_truth"),
               dict.fromkeys(("3.3.0", "3.2.0"), "9707f5eee56d7928"), ("_loss", "get_logits", "get_ground_truth")),
    ),
    "pytorch_metric_learning": tuple(
        Target(f"{_PML}{file}:{name}.compute_loss", replacements.metric_learning(name, kind),
               (*_PAIRS, f"{_PML}{file}:{name}._compute_loss"), {"2.9.0": newest, "2.8.1": before}, ("_compute_loss",),
               "fastcl.adapters.metric_learning")
        for file, name, kind, newest, before in (
            ("ntxent_loss", "NTXentLoss", "classes", "dc24a6229451e3b9", "245febab1333ac1b"),
            ("supcon_loss", "SupConLoss", "peers", "92ca1637acfe8307", "c7a43656b3e16168"),
        )
    ),
    "sentence_transformers": tuple(
        Target(place, ours, (place, *_SIMILARITIES), dict.fromkeys(("6.2.0", "6.1.0"), found),
               adapter="fastcl.adapters.sentence_transformers")
        for place, ours, found in (
            (f"{_RANKING}multiple_negatives_ranking:MultipleNegativesRankingLoss.compute_loss_from_embeddings",
             replacements.ranking, "23f7fd34217a84f2"),
            (f"{_RANKING}cached_multiple_negatives_ranking:CachedMultipleNegativesRankingLoss.calculate_loss",
             replacements.cached_ranking, "af4fec471b7dd631"),
        )
    ),
    "solo": (
        Target(_SOLO + "simclr:simclr_loss_func", replacements.solo_indexes,
               (_SOLO + "simclr:simclr_loss_func", *_SOLO_GATHERS), {"1.0.6": "32e863d9c2368130"}),
        Target(_SOLO + "simclr:simclr_loss_func", replacements.solo_views, (_SOLO + "simclr:simclr_loss_func",),
               {"1.0.2": "c397f0496c40e373"}),
        Target(_SOLO + "mocov2plus:mocov2plus_loss_func",
               if_worthwhile("not measured", solo_learn.mocov2plus_loss_func),
               (_SOLO + "mocov2plus:mocov2plus_loss_func",), {"1.0.6": "6d2fe7d4db804f66"}),
        Target(_SOLO + "moco:moco_loss_func", if_worthwhile("not measured", solo_learn.moco_loss_func),
               (_SOLO + "moco:moco_loss_func",), {"1.0.2": "638f6efb0ce44ff2"}),
        Target(_SOLO + "mocov3:mocov3_loss_func", if_worthwhile("one direction", solo_learn.mocov3_loss_func),
               (_SOLO + "mocov3:mocov3_loss_func", "solo.utils.misc:concat_all_gather_no_grad"),
               {"1.0.6": "6d51f21b01e92cb6"}),
        Target(_SOLO + "nnclr:nnclr_loss_func", replacements.solo_nnclr,
               (_SOLO + "nnclr:nnclr_loss_func", *_SOLO_GATHERS), {"1.0.6": "d8fafe680b6cf253"}),
        Target(_SOLO + "nnclr:nnclr_loss_func", if_alone(replacements.solo_nnclr),
               (_SOLO + "nnclr:nnclr_loss_func",), {"1.0.2": "e798cbb5aebf8923"}),
    ),
    "stable_pretraining": (
        *_stable("joint_embedding", "InfoNCELoss", replacements.stable_infonce,
                 "8ede4c4039e5e04b", "07c0a8dae6be12ef"),
        *_stable("joint_embedding", "NTXEntLoss", if_worthwhile("two views", stable_pretraining.NTXEntLoss.forward),
                 "f4bb30d782d1d643", "f408e59fac4fd3eb"),
        *_stable("multimodal", "CLIPLoss", if_worthwhile("two directions", stable_pretraining.CLIPLoss.forward),
                 "fdd011b5b56dba9d", "333600d5660b6bfc"),
    ),
    "vissl": (
        Target(_VISSL + "forward", replacements.vissl_simclr,
               _of(_VISSL, "forward", "precompute_pos_neg_mask", "gather_embeddings"),
               dict.fromkeys(("0.1.6", "0.1.5"), "ad45dd7c7e6750df"), ("precompute_pos_neg_mask", "gather_embeddings")),
    ),
}  # fmt: skip
