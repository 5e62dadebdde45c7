"""DALI under a DataLoader: worker processes read the files, one DALI pipeline in the calling process renders them.

For storage so slow that reading, not decoding, limits `fastcl.data.dali`; the views are the same, bit for bit (with
CPU operators; not run on a GPU).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastcl.data.colour import colour_stage
from fastcl.data.dali import Batch, DaliRenderer
from fastcl.data.dali_graph import build, crop_inputs, region_inputs
from fastcl.data.plan import ViewSpec
from fastcl.data.sources import Split
from fastcl.errors import FastclError

Item = tuple[int, dict[str, np.ndarray]]  # a position in the split, and its row of every input of the pipeline


def proxy_stream(
    split: Split,
    spec: ViewSpec,
    device: torch.device | str,
    batches: Iterable[Batch],
    *,
    workers: int = 1,
    threads: int = 0,
) -> Iterator[tuple[Tensor, ...]]:
    """The views of many batches, in their order, as `DaliRenderer.stream` gives them.

    The end of the stream can take 5 seconds: DALI's server looks that rarely whether it is still wanted. So one stream
    serves a whole run, not an epoch.

    Args:
        split: the images; grey or RGB JPEG files, all of them.
        spec: output size, rotation, blur kernel and normalisation.
        device: where the operators run and the views are made.
        batches: for each (b,) positions in the split and, for each view, its b parameters; none larger than the first.
        workers: processes that read files, at least 1.
        threads: DALI's own threads; 0 means 1.

    Raises:
        FastclError: DALI or its proxy cannot be used here, workers below 1, an image that is no JPEG file or cannot be
            decoded (named), or a batch larger than the first one.
    """
    if torch.version.cuda is None or workers < 1:
        raise FastclError(
            f"DALI's proxy needs at least 1 worker, got {workers}, and a PyTorch built with CUDA (it calls NVTX), "
            f"got {torch.__version__}"
        )
    renderer = DaliRenderer(split, spec, device, threads=threads)  # also checks that DALI can be used
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    from nvidia.dali.plugin.pytorch.experimental.proxy import DALIServer, DataLoader

    most, views = len(first[0]), len(first[1])
    # A server and a pipeline for each stream: both keep what an abandoned one has asked for.
    pipeline = build(spec, views, True, renderer.device, renderer.threads, most)
    waiting: deque[Batch] = deque()
    with DALIServer(pipeline) as server:
        loader = DataLoader(
            server, _Files(split, server.proxy), num_workers=workers, multiprocessing_context="fork",
            batch_sampler=_work(split, spec, chain([first], batches), most, waiting),
            generator=torch.Generator("cpu"),  # else it would draw a number from the caller's
        )  # fmt: skip
        with torch.device("cpu"):  # the loader draws a seed on the default device
            results = iter(loader)
        while (outputs := _next(results, split, waiting)) is not None:
            _, params = waiting.popleft()
            pixels = (x.permute(0, 3, 1, 2).contiguous() for x in outputs)
            yield tuple(colour_stage(x, p, spec) for x, p in zip(pixels, params, strict=True))


def _next(results: Iterator[Any], split: Split, waiting: deque[Batch]) -> Any:
    try:
        return next(results, None)
    except RuntimeError as error:
        _blame(split, waiting, error)


class _Files(Dataset):
    """Asks the server for the views of one file; runs in the workers."""

    def __init__(self, split: Split, proxy: Any) -> None:
        self.split, self.proxy = split, proxy

    def __getitem__(self, item: Item) -> Any:
        position, inputs = item
        try:
            file = self.split.encoded(position) if self.split.encoded else None
        except FastclError:
            file = None
        # Without a file DALI fails, and the calling process says why: an error raised here would arrive as a traceback.
        views = self.proxy(images=np.frombuffer(file or b"-", np.uint8), **inputs)
        return views if isinstance(views, tuple) else (views,)


def _work(
    split: Split, spec: ViewSpec, batches: Iterable[Batch], most: int, waiting: deque[Batch]
) -> Iterator[list[Item]]:
    """The DataLoader's batches; those that it has taken and not given back are waiting."""
    for positions, params in batches:
        if len(positions) > most:
            raise FastclError(f"batches must not be larger than the first one, {most}; got {len(positions)}")
        waiting.append((positions, params))
        inputs = region_inputs(params, split.sizes[positions])
        for v, p in enumerate(params):
            crops = crop_inputs(p, inputs["region_start"], spec)
            inputs |= {f"{name}{v}": values for name, values in crops.items()}
        rows = range(len(positions))
        yield [(int(positions[k]), {name: np.asarray(values[k]) for name, values in inputs.items()}) for k in rows]


def _blame(split: Split, waiting: deque[Batch], error: RuntimeError) -> NoReturn:
    """Raises what is wrong with the first image that is no JPEG file, or that its own reader refuses too."""
    for positions, _ in waiting:
        for position in positions.tolist():
            split.image(position)
            if split.encoded is None or split.encoded(position) is None:
                what = f"sample id {split.ids[position]} is none"
                raise FastclError(f"DALI's proxy takes JPEG files only; {what}") from error
    raise FastclError(f"DALI's proxy fails: {str(error).strip().splitlines()[-1]}") from error
