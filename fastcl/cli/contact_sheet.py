"""A picture of what the models see: source images, their views by every renderer, and how much those differ."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from torch import Tensor

from fastcl.data import PRESETS, RENDERERS, Dataset, Split, ViewLoader, ViewPlan, ViewSpec, load, make_renderer
from fastcl.data.renderers.choose import obstacle
from fastcl.data.sources.subset import part
from fastcl.errors import FastclError, shown, suggest
from fastcl.io.files import write_atomic
from fastcl.io.outputs import check_output

_SPAN = 8  # grey levels: the colour map runs from blue at -8 through white to red at 8
_NAME = 20  # maximum letters of a class name
_INCHES = 1.3  # size of one image in the sheet
_REFERENCE = "torchvision"


def contact_sheet(
    data: Dataset,
    spec: ViewSpec,
    out: Path,
    *,
    renderers: tuple[str, ...] = tuple(reversed(RENDERERS)),
    samples: int = 8,
    seed: int = 0,
    epoch: int = 0,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Draw one row per sample: the image, its two views by torchvision, then for each other available renderer its two
    views and a colour map of each pixel's largest channel difference from torchvision.

    Args:
        data: its first training images in the epoch's order are drawn.
        spec: settings of the views.
        out: the picture, .png or another format of matplotlib.
        renderers: names from RENDERERS.
        samples: number of rows.
        seed: seed of the view plan.
        epoch: epoch whose views are drawn.
        device: device of the renderers; None: CUDA if available.

    Returns:
        For each renderer (mean, max) of the absolute differences in grey levels, or why it is not available.

    Raises:
        FastclError: an unknown renderer or picture format, fewer images than samples, an image that cannot be decoded,
            a file that cannot be written.
    """
    _check_picture(out, [])
    for name in renderers:
        if name not in RENDERERS:
            raise FastclError(f"--renderers: unknown renderer {name!r}{suggest(name, RENDERERS)}")
    if not 0 < samples <= len(data.train):
        raise FastclError(f"--samples must be in [1, {len(data.train)}] (training images), got {samples}")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = ViewLoader(data.train, ViewPlan(spec, seed), len(data.train))
    chosen = loader.batch(epoch, 0)[:samples]
    few = part(data.train, chosen)
    plan, here = loader.plan, np.arange(samples)
    params = [plan.draw(epoch, few.ids, view, few.sizes) for view in (0, 1)]
    found: dict[str, Any] = {}
    pictures: dict[str, list[Tensor]] = {}
    for name in dict.fromkeys((_REFERENCE, *renderers)):
        if reason := obstacle(name, few, spec, device):
            found[name] = reason
            continue
        views = make_renderer(name, few, spec, device)(here, params)
        pictures[name] = [_levels(v, spec) for v in views]
        apart = torch.stack([(a - b).abs() for a, b in zip(pictures[name], pictures[_REFERENCE], strict=True)])
        found[name] = (apart.mean().item(), apart.max().item())
    title = f"{shown(data.name)}: views of {spec.size} x {spec.size} pixels, seed {seed}, epoch {epoch}"
    _draw(few, [_short(data.classes[c]) for c in few.labels], pictures, found, title, out)
    return found


def preset_for(data: Dataset) -> str:
    """The preset that fits a data set, by its channels, then by the median of the images' shorter sides."""
    if data.channels == 1:
        return "characters"
    side = float(np.median(data.train.sizes.min(1)))
    return next((name for name in ("cifar", "tiny-imagenet") if side <= 1.5 * PRESETS[name].size), "imagenet")


def show_views(args: Any) -> None:
    """The command `fastcl views`; args are its parsed arguments. Raises FastclError as `load` and `contact_sheet` do,
    and before any work if the picture would be written over or among the images."""
    _check_picture(args.out, _sources(args))
    data = load(args.data, root=args.root, corrupt=args.corrupt)
    preset = args.preset or preset_for(data)
    spec = ViewSpec.preset(preset, **({} if args.size is None else {"size": args.size}))
    renderers = tuple(name.strip() for name in args.renderers.split(","))
    found = contact_sheet(
        data, spec, args.out, renderers=renderers, samples=args.samples, seed=args.seed, epoch=args.epoch
    )
    print(f"{shown(data.name)}: views of {args.samples} training images, preset {preset} at {spec.size} pixels "
          f"(--preset, --size), seed {args.seed}, epoch {args.epoch}")  # fmt: skip
    for name, result in found.items():
        if isinstance(result, str):
            print(f"  {name:12} not available: {result}")
        elif name == _REFERENCE:
            print(f"  {name:12} the reference")
        else:
            print(f"  {name:12} differs by {result[0]:.2f} grey levels on average, {result[1]:.1f} at most")
    print(f"contact sheet: {shown(args.out)}")


def _check_picture(out: Path, inputs: list[Path]) -> None:
    """Raise FastclError unless matplotlib supports this ending and the file can be written."""
    if out.suffix.lower().lstrip(".") not in FigureCanvasBase.get_supported_filetypes():
        raise FastclError(f"--out: {shown(out)} must end in .png or another image format of matplotlib")
    check_output(out, "--out", inputs)


def _sources(args: Any) -> list[Path]:
    """Files and folders of the images. For torchvision the folders in its root, which may also hold other files."""
    kind, _, place = args.data.partition(":")
    if kind != "torchvision":
        return [Path(place)] if place else []
    try:
        return [path for path in Path(args.root).iterdir() if path.is_dir()] if args.root else []
    except (OSError, ValueError):  # loading will report what is wrong with the folder
        return []


def _short(name: str) -> str:
    name = shown(name)
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _levels(views: Tensor, spec: ViewSpec) -> Tensor:
    """Grey levels of normalised views: (n, S, S, C) in [0, 255], float32 on the CPU."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu")[:, None, None] for v in (spec.mean, spec.std))
    return ((views.cpu() * std + mean) * 255).permute(0, 2, 3, 1).clamp(0, 255)


def _difference(x: Tensor, y: Tensor) -> np.ndarray:
    """x - y in the channel that differs most: (n, S, S) grey levels."""
    apart = x - y
    return apart.gather(3, apart.abs().argmax(3, keepdim=True)).squeeze(3).numpy()


def _draw(
    split: Split,
    labels: list[str],
    pictures: dict[str, list[Tensor]],
    found: dict[str, Any],
    title: str,
    out: Path,
) -> None:
    reference = pictures[_REFERENCE]
    columns: list[tuple[str, np.ndarray, list[str]]] = [
        ("source", [split.image(row) for row in range(len(split))], labels)
    ]
    for name, views in pictures.items():
        columns += [(f"{name}\nview {v + 1}", x.round().byte().numpy(), []) for v, x in enumerate(views)]
        if name == _REFERENCE:
            continue
        for v, (x, y) in enumerate(zip(views, reference, strict=True)):
            texts = [f"mean {d.mean():.2f}, max {d.max():.1f}" for d in (x - y).abs()]
            head = f"{name} - torchvision, view {v + 1}\nlevels: blue ≤ -{_SPAN}, red ≥ {_SPAN}"
            columns.append((head, _difference(x, y), texts))
    missing = [f"{name} is not available here: {why}" for name, why in found.items() if isinstance(why, str)]
    rows, width = len(split), max(len(columns) * _INCHES + 0.4, 5.0)
    height = rows * (_INCHES + 0.25) + 0.85 + 0.25 * len(missing)
    figure = Figure(figsize=(width, height), dpi=120)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for k, (head, images, texts) in enumerate(columns):
        for row, axis in enumerate(grid[:, k]):
            _show(axis, images[row])
            axis.set_title(head if row == 0 else "", fontsize=6)
            axis.set_xlabel(texts[row] if texts else "", fontsize=6, parse_math=False)
    figure.text(0.02, 1 - 0.1 / height, title, fontsize=9, va="top", parse_math=False)
    figure.text(0.02, 0.1 / height, "\n".join(missing), fontsize=7, va="bottom", parse_math=False, wrap=True)
    figure.subplots_adjust(0.02, (0.25 + 0.25 * len(missing)) / height, 0.98, 1 - 0.6 / height, 0.08, 0.25)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=out.suffix.lower()[1:])
    except (OSError, RuntimeError, ValueError) as error:  # some formats need another program
        raise FastclError(f"--out: {shown(out)} cannot be drawn ({error})") from error
    write_atomic(out, picture.getvalue())


def _show(axis: Axes, image: np.ndarray) -> None:
    """Show pixels (H, W, C) uint8, or differences (H, W)."""
    if image.ndim == 2:
        axis.imshow(image, cmap="bwr", vmin=-_SPAN, vmax=_SPAN)
    else:
        axis.imshow(image.squeeze(2) if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])
