"""Loss curves of the examples, each trained with the original loss and with fastcl's, and the figure that shows both.

curves.json has the loss of every step; curves.svg is drawn from it, by `--draw` without training.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench.harness.command import Command, at_least
from bench.harness.figures import drawing
from bench.harness.records import machine, write_file

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS = 70
# By example, what the panel says and the package of the original loss; None: plain PyTorch.
PANELS = {
    "simclr_lightly": ("SimCLR: lightly", "lightly"),
    "supcon_metric_learning": ("SupCon: pytorch-metric-learning", "pytorch-metric-learning"),
    "plain_loop": ("NT-Xent: plain PyTorch", None),
    "lightning_module": ("Lightning module: lightly", "lightly"),
    "clip_towers": ("CLIP, learnable scale: open_clip", "open-clip-torch"),
    "moco_queue": ("MoCo, a queue: info-nce-pytorch", "info-nce-pytorch"),
    "sentences": ("Sentences: plain PyTorch", None),
}
WAYS = ("original", "fastcl")


def trained(steps: int) -> dict[str, dict[str, list[float]]]:
    """Losses of all steps by example and by loss; examples whose libraries are absent are left out, with a message."""
    sys.path.insert(0, str(EXAMPLES))
    found: dict[str, dict[str, list[float]]] = {}
    for name in PANELS:
        try:
            train = importlib.import_module(name).train
            found[name] = {way: train(way, steps) for way in WAYS}
        except ImportError as error:
            print(f"{name} did not run: {error}")
    return found


def draw(losses: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """Write the figure: a panel for each example, the original's curve wide, fastcl's on it."""
    columns = 4
    rows = -(-len(losses) // columns)
    with drawing(file, 11, 2.4 * rows) as figure:
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, (name, of) in zip(axes, losses.items(), strict=False):
            ax.plot(of["original"], color="#E69F00", linewidth=4.5, alpha=0.6, label="original loss")
            ax.plot(of["fastcl"], color="#0072B2", linewidth=1.2, label="fastcl")
            ax.set_title(PANELS[name][0], fontsize=9)
            ax.set_xlabel("step")
            ax.grid(True)
        for ax in axes[len(losses) :]:
            ax.axis("off")
        axes[0].set_ylabel("loss")
        where = axes[len(losses)] if len(axes) > len(losses) else axes[0]
        where.legend(*axes[0].get_legend_handles_labels(), loc="center")


def main(argv: list[str] | None = None) -> int:
    """Train, write the losses and draw them; return the exit status."""
    parser = Command("curves", [__doc__ or ""])
    parser.add_argument("--steps", type=at_least(1), default=STEPS, metavar="N", help="default: %(default)s")
    parser.add_argument("--draw", action="store_true", help="only draw the losses that are in --out")
    args = parser.parse(argv)
    file = args.out / "curves.json"
    if not args.draw:
        packages = [package for _, package in PANELS.values() if package]
        record = machine(torch.device("cpu"), packages) | {"losses": trained(args.steps)}
        write_file(file, json.dumps(record, indent=None, separators=(",", ":"), allow_nan=False) + "\n")
    draw(json.loads(file.read_text(encoding="utf-8"))["losses"], args.out / "curves.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
