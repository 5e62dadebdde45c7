"""Views by NVIDIA DALI: decode, crop, resize, flip and rotate as the plan says; then fastcl's colour stage.

DALI's own random operators depend on the slot in the batch and on the samples seen so far. None is used here: every
parameter of every sample is an input of the pipeline, so a view does not depend on the rest of the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastcl.data.limits import check_workers
from fastcl.data.plan import ViewParams, ViewSpec
from fastcl.data.renderers.colour import colour_stage
from fastcl.data.renderers.dali_graph import CHUNK, DEPTH, build, crop_inputs, region_inputs
from fastcl.data.renderers.transfer import to_device
from fastcl.data.renderers.validate import check_request
from fastcl.data.sources.load import Split
from fastcl.errors import FastclError, install_hint

Batch = tuple[np.ndarray, Sequence[ViewParams]]
_Kind = tuple[bool, int]  # of pipeline: whether its inputs are JPEG files (else pixels), number of views


class DaliRenderer:
    """Views of a split's images. JPEG files are decoded by DALI, everything else by the split's own reader.

    Each sample is decoded once for all its views, and only the region that they cover. On CUDA the decoder, crop,
    resize, flip and rotation are GPU operators; that path has not been run.

    Args:
        split: the images.
        spec: output size, rotation, blur kernel and normalisation.
        device: device on which the operators run and of the views.
        threads: number of DALI's own threads; 0 means 1. Does not change the pixels.

    Raises:
        FastclError: DALI cannot be used here (see `obstacle`).
    """

    def __init__(self, split: Split, spec: ViewSpec, device: torch.device | str, *, threads: int = 0) -> None:
        device = torch.device(device)
        check_workers(threads, "threads")
        reason = obstacle(split, spec, device)
        if reason:
            raise FastclError(f"data.renderer 'dali': {reason}")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.split, self.spec, self.device, self.threads = split, spec, device, max(threads, 1)
        # A pipeline returns results in the order of its runs, so concurrent streams need separate pipelines.
        self._idle: dict[_Kind, list[Any]] = {}

    def __call__(self, positions: np.ndarray, params: Sequence[ViewParams]) -> tuple[Tensor, ...]:
        """Views of the samples.

        Args:
            positions: (b,) positions in the split.
            params: parameters of each view, b rows each, boxes in pixels.

        Returns:
            One (b, C, size, size) float32 tensor per view, on the device.

        Raises:
            FastclError: as for `check_request`, or an image that cannot be decoded (named).
        """
        with closing(self.stream([(positions, params)])) as results:
            return next(results)

    def stream(self, batches: Iterable[Batch]) -> Generator[tuple[Tensor, ...], None, None]:
        """Yields the views of many batches in order, while DALI already works on the next ones.

        Args:
            batches: (positions, params) as for a call; consumed a few ahead of the results.

        Raises:
            FastclError: as for a call.
        """
        flying: deque[_Job] = deque()
        pipelines: dict[_Kind, Any] = {}
        try:
            for job in (job for batch in batches for job in self._jobs(*batch, pipelines)):
                self._start(job)
                flying.append(job)
                if len(flying) == DEPTH:
                    yield from self._finish(flying)
            while flying:
                yield from self._finish(flying)
        finally:
            _drain(flying)
            for kind, pipeline in pipelines.items():
                self._idle.setdefault(kind, []).append(pipeline)

    def _jobs(self, positions: np.ndarray, params: Sequence[ViewParams], pipelines: dict[_Kind, Any]) -> Iterator[_Job]:
        split, positions = self.split, np.asarray(positions)
        check_request(split, self.spec, positions, params)
        result = _Result(params, len(positions), [])
        for start in range(0, len(positions), CHUNK):
            chunk = positions[start : start + CHUNK]
            files: list[bytes | Any] = [split.file(int(p)) for p in chunk]  # None: not a JPEG file, use pixels
            for encoded in (True, False):
                of_kind = np.flatnonzero([(file is not None) == encoded for file in files])
                if not len(of_kind):
                    continue
                if encoded:
                    images = [np.frombuffer(files[k], np.uint8) for k in of_kind]
                else:
                    images = [np.ascontiguousarray(split.image(int(p))) for p in chunk[of_kind]]
                kind = encoded, len(params)
                if kind not in pipelines:
                    pipelines[kind] = self._pipeline(kind)
                yield _Job(pipelines[kind], encoded, chunk[of_kind], start + of_kind, images, result)

    def _pipeline(self, kind: _Kind) -> Any:
        try:
            return self._idle[kind].pop()
        except (KeyError, IndexError):
            encoded, views = kind
            return build(self.spec, views, encoded, self.device, self.threads)

    def _start(self, job: _Job) -> None:
        params = [p[job.rows] for p in job.result.params]
        corner = np.zeros((len(job.rows), 2), np.int32)
        if job.encoded:
            region = region_inputs(params, self.split.sizes[job.positions])
            corner = region["region_start"]
            for name, values in region.items():
                job.pipeline.feed_input(name, values)
        for view, p in enumerate(params):
            for name, values in crop_inputs(p, corner, self.spec).items():
                job.pipeline.feed_input(f"{name}{view}", values)
        job.pipeline.feed_input("images", job.images)
        job.pipeline.schedule_run()

    def _finish(self, flying: deque[_Job]) -> Iterator[tuple[Tensor, ...]]:
        """Collects the first job, and yields its batch's views if this completes the batch."""
        job = flying.popleft()
        try:
            outputs = self._outputs(job)
        except RuntimeError as error:
            _drain(flying)
            self._blame(job, error)
        result = job.result
        if not result.pixels:
            shape = (len(result.params[0]), outputs[0].shape[3], self.spec.size, self.spec.size)
            result.pixels = [torch.empty(shape, dtype=torch.uint8, device=self.device) for _ in outputs]
        rows = to_device(torch.from_numpy(job.rows), self.device)
        for pixels, output in zip(result.pixels, outputs, strict=True):
            pixels[rows] = output.permute(0, 3, 1, 2)
        result.missing -= len(job.rows)
        if not result.missing:
            yield tuple(colour_stage(x, p, self.spec) for x, p in zip(result.pixels, result.params, strict=True))

    def _outputs(self, job: _Job) -> list[Tensor]:
        """One (n, size, size, C) uint8 tensor per view. The CUDA stream, not the host, waits for GPU operators."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        outputs = job.pipeline.share_outputs(cuda_stream=stream)
        tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        job.pipeline.release_outputs()
        return tensors

    def _blame(self, job: _Job, error: RuntimeError) -> NoReturn:
        """Finds the image that made a run fail, and raises an error that names it."""
        for k, position in enumerate(job.positions.tolist()):
            one = slice(k, k + 1)
            alone = replace(job, positions=job.positions[one], rows=job.rows[one], images=job.images[one])
            try:
                self._start(alone)
                self._outputs(alone)
            except RuntimeError as reason:
                self.split.image(position)  # if the split's reader fails too, its error names the file
                lines = str(reason).strip().splitlines()
                told = next((line for line in lines if "rror" in line), lines[-1])  # the rest is a stack trace
                raise FastclError(
                    f"DALI cannot render the image of sample id {self.split.ids[position]}: {told}"
                ) from error
        raise FastclError(
            f"DALI cannot render a batch, although it renders each of its images alone: {error}"
        ) from error


def obstacle(split: Split, spec: ViewSpec, device: torch.device | str) -> str | None:
    """Reason why DALI cannot render this split here, or None."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return f"DALI works on cpu and cuda, not on {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a library that DALI links to is missing
        return f"DALI cannot be imported ({error}); {install_hint('dali')}"
    return None


@dataclass
class _Result:
    """The views of one batch, filled in job by job."""

    params: Sequence[ViewParams]
    missing: int  # images not rendered yet
    pixels: list[Tensor]  # per view (b, C, size, size) uint8; empty until the first job gives C


@dataclass(frozen=True)
class _Job:
    """One pipeline run, which renders some rows of one batch."""

    pipeline: Any
    encoded: bool
    positions: np.ndarray  # (n,) positions in the split
    rows: np.ndarray  # (n,) rows of the batch
    images: list[np.ndarray]  # n JPEG files (bytes,), or n images (H, W, C), uint8
    result: _Result


def _drain(flying: deque[_Job]) -> None:
    """Removes unwanted results from their pipelines, so that later runs get their own."""
    while flying:
        pipeline = flying.popleft().pipeline
        try:
            pipeline.share_outputs()
        except RuntimeError:
            continue  # not needed: the caller has stopped, or an earlier failure is being reported
        pipeline.release_outputs()
