"""The sigmoid loss of SigLIP: every pair of an image and a text is a decision of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastcl.choices import REDUCTIONS, Precision, Reduction
from fastcl.errors import FastclError, one_of
from fastcl.exchange import Ranks, gathers
from fastcl.rowstats.request import Batch, check_pairs
from fastcl.rowstats.sigmoid_sums import check_options, few_sum, sigmoid_sums, unpaired_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    precision: Precision | None = None,
    gather_distributed: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's sigmoid loss (Zhai et al. 2023): for each image, which texts are its own, one decision a text.

    With logits l_ij = <image_i, text_j> * logit_scale + logit_bias the loss of image i is
    softplus(-l_ii) + sum over j != i of softplus(l_ij). There is no N x N matrix on the chunked and Triton backends.

    Args:
        image, text: (N, D) embeddings, float16, bfloat16, float32 or float64; rows k of both are pair k. Computed in
            float32, float64 for float64.
        logit_scale: positive number, or a tensor with one element, which then gets a gradient. SigLIP starts at 10 and
            learns its logarithm.
        logit_bias: number of any sign, or a tensor with one element, which then gets a gradient. SigLIP starts at -10.
        normalize: divide rows by their norms first.
        reduction: "mean" over the N images, as in SigLIP: the sum over all N x N pairs divided by N; "sum" over all
            pairs, or "none" for (N,), the losses of the images.
        precision: of the Triton backend's products, as `fastcl.row_stats`; the logits of the pairs themselves are
            never narrower than float32.
        gather_distributed: compare this rank's images with the texts of all ranks, as `contrastive_loss`: the average
            of the ranks' shares, and of their gradients, is the loss of the global batch. All texts travel, (M, D),
            above 2 GiB in slices, and their gradients are added up over the ranks.
        group: the ranks, a group of torch.distributed; None: all.

    Returns:
        A scalar, or (N,) with reduction "none"; float32, or float64 for float64 rows.

    Raises:
        FastclError: image and text differ in shape, dtype or device, an empty batch, a scale that is not positive and
            finite, a bias that is not finite, an unknown reduction or precision; with gather_distributed as
            `fastcl.row_stats`.
    """
    call = _Call(image, text, logit_scale, logit_bias, normalize, precision)
    if gather_distributed is not False and gathers(gather_distributed):
        return _share(call, reduction, group)
    call.check(reduction)
    return call.loss(reduction)


class _Call(NamedTuple):
    """The arguments of a call that decide about the losses of its images."""

    image: Tensor
    text: Tensor
    scale: float | Tensor
    bias: float | Tensor
    normalize: bool
    precision: str | None

    def check(self, reduction: str) -> None:
        """Raise FastclError unless they, and the reduction, can be used."""
        check_pairs(self.image, self.text)
        check_options(self.scale, self.bias, self.precision)
        if reduction not in REDUCTIONS:
            raise FastclError(one_of("reduction", REDUCTIONS, reduction))

    def loss(self, reduction: str) -> Tensor:
        """The loss among these rows."""
        if reduction != "none" and (found := few_sum(*self[:5], reduction)) is not None:
            return found
        losses = self.losses()
        return losses if reduction == "none" else getattr(losses, reduction)()

    def losses(self) -> Tensor:
        """(N,) losses among these rows."""
        own, others = sigmoid_sums(*self)
        return others - logsigmoid(own)

    def other_ranks(self, ranks: Ranks) -> Tensor:
        """(N,): what the texts of the other ranks add to the losses."""
        from fastcl.rowstats import at_run_time, meeting

        def of(sent: meeting.Sent) -> Tensor:
            text = at_run_time.other_rows(sent.rows, sent.ranks)
            return unpaired_sums(self.image, text, self.scale, self.bias, self.normalize, self.precision)

        first, *more = meeting.in_slices(of, meeting.Sent(self.text, None, ranks).slices())
        return sum(more, start=first)


def _share(call: _Call, reduction: str, group: ProcessGroup | None) -> Tensor:
    """This rank's share of the loss of all ranks' pairs."""
    from fastcl.rowstats import meeting, sharded  # which one process does not need
    from fastcl.rowstats.agreement import Request, agreed, number

    facts: dict[str, object] = {"function": "sigmoid_loss"}

    def request() -> Request:
        call.check(reduction)
        learns = isinstance(call.bias, Tensor) and call.bias.requires_grad
        facts.update(reduction=reduction, logit_scale=number(call.scale), logit_bias=number(call.bias))
        facts["need of logit_bias's gradient"] = learns
        return Batch.pairs(call.image, call.text), meeting.Options(call.scale, call.normalize, True, call.precision)

    found = agreed(request, facts, group)
    if isinstance(found, Tensor):  # refused
        return found
    batch, options, (ranks, _) = found
    assert batch.y is not None
    call = _Call(batch.x, batch.y, call.scale, call.bias, call.normalize, options.precision)
    if ranks.world == 1:
        return call.loss(reduction)
    return sharded.share_of(call.losses() + call.other_ranks(ranks), ranks, reduction)
