"""What the command line of `fastcl` takes: commands, their arguments, their help."""

from __future__ import annotations

import argparse

from fastcl import __version__
from fastcl.config.written import listing, preset_names
from fastcl.io.outputs import named_path

_DESCRIPTION = """\
Train self-supervised and supervised contrastive models side by side on the same views, and measure how they align.

  fastcl demo --out runs/demo                  a complete run on scikit-learn's digits, a few minutes on two CPU cores
  fastcl train CONFIG.toml --out runs/x        any data, any timm encoder; the same command resumes a stopped run
  fastcl config > CONFIG.toml                  a config with every key and its meaning; --preset NAME: a complete run
  fastcl eval runs/x                           accuracy of probes on the frozen features of every model of a run
  fastcl report runs/x                         one self-contained HTML page for a run, finished or not
  fastcl align A.npy B.npy                     CKA, RSA and drift of two feature files, or CKA of all their layers
  fastcl views --data SOURCE --out views.png   what the models see: images and their views by every renderer
  fastcl doctor                                versions and devices of this machine, and a numerical self-test
"""

_COMMANDS = {
    "demo": ("a complete run on scikit-learn's digits", """
Trains CL (dcl), NSCL, SupCon and cross-entropy from one initialisation on the same batches and views, with two
controls: an identity twin, which must stay bit-identical, and a reseeded twin, the noise floor. Writes the run and
report.html into --out. The same command resumes a stopped run."""),
    "train": ("train from a TOML file", """
`fastcl config` prints a config to start from; the keys are listed below. Writes into --out:

  run.json          settings, seed, versions, device
  metrics.jsonl     alignment of every pair and accuracy of every model, per epoch
  steps.jsonl       losses, loss gap and same-class softmax mass of every model, per step
  pairs.jsonl       drift, CKA and RSA of the loss embeddings of the first two models, per step
  timing.jsonl      seconds and images per second, per epoch
  tensorboard/      the same curves
  checkpoints/      the last two; the same command resumes a stopped run, bit for bit
  layers.json       CKA of the reference's layers with those of every other model, at the end
  weights/, features/, report.html   at the end

Several processes share each batch, one for each GPU:

  torchrun --nproc-per-node 4 -m fastcl train run.toml --out runs/x"""),
    "config": ("a commented config for train", """
Prints every key with its meaning and its default (with --preset: the preset's value). Edit it or train it as it is:

  fastcl config --preset omniglot > run.toml
  fastcl train run.toml --out runs/x --set data.source=omniglot:PATH"""),
    "eval": ("linear probe, k-NN, class centres and few shots on frozen features", """
Fits simple classifiers on the features of the training images and prints their accuracy on both splits: a linear probe
(its penalty chosen on held-out training images), the k nearest neighbours by cosine (majority and weighted vote), the
nearest class centre, and from a few images of each class the nearest centre and a linear probe, with the mean and 95 %
interval over repeated draws. No label of a test image is used.

  fastcl eval runs/x                           every model of a run, finished or not; writes runs/x/evaluation.json
  fastcl eval runs/x --probes knn,ncc --k 1,10,50
  fastcl eval --features train.npz test.npz --json out.json

The same command resumes a stopped one, and measures only what is not in the JSON file yet. A feature file is .npz or
.safetensors with the arrays 'features' (samples, width), 'labels' (integers) and, if the training samples are to be
drawn by names of their own, 'ids'."""),
    "align": ("CKA, RSA and drift of two feature files, or CKA of all pairs of layers", """
Each file holds one (samples, width) matrix: .npy, or .npz / .safetensors with a single array or one named 'features'.
Row k of both files must be the same sample. Prints CKA (linear, cosine; biased, debiased), RSA (Pearson; with
--spearman also by ranks), the drift of the similarities, its relative sizes rho and r, and the lower bounds of CKA and
RSA that follow from them (arXiv 2510.08852).

Layers: A and B are files with one array per layer, or folders with one feature file per layer (outputs with more than
two dimensions are flattened). Prints the debiased linear CKA of every layer of A with every layer of B; --out draws it:

  fastcl align resnet.npz vit.npz --out layers.svg"""),
    "report": ("one self-contained HTML page for a run", """
Works on unfinished runs too. Figures: alignment with the reference model per epoch and the noise floor, weight gap,
drift of the similarities per step beside Theorem 1 of arXiv 2510.08852, alignment of every pair and of every layer,
losses, loss gap and same-class mass, accuracy, CDNV. Tables: final numbers, drift and certificates, what `fastcl eval`
has measured, settings, versions."""),
    "views": ("a contact sheet of images and their views", """
Each row is a training image and its two views: by torchvision, and by every other renderer that this machine and the
images support, with the difference from torchvision (blue: darker, red: brighter; mean and maximum in grey levels).
For a renderer that cannot be used, the reason is given. With the preset, size and seed of a run, these are the views
that it trains on.

  fastcl views --data digits --size 16 --out digits.png   # what fastcl demo trains
  fastcl views --data folder:photos.zip --preset simclr --size 96 --samples 4 --out grid.png"""),
    "doctor": ("versions and devices of this machine, and a numerical self-test", """
Prints versions, devices and optional packages, then checks losses and similarities against float64. The exit status is
1 if a check fails."""),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The parser of `fastcl`; `args.command` is the name of the command."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(prog="fastcl", description=_DESCRIPTION, formatter_class=raw)
    whole.add_argument("--version", action="version", version=f"fastcl {__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    subs = {}
    for name, (text, details) in _COMMANDS.items():
        subs[name] = commands.add_parser(name, help=text, description=f"{text}\n{details}", formatter_class=raw)
        subs[name].set_defaults(command=name)
    subs["train"].add_argument("config", type=named_path, metavar="CONFIG.toml")
    subs["train"].epilog = listing()
    presets = f"a complete run: {', '.join(preset_names())} (default: every key with its default)"
    subs["config"].add_argument("--preset", metavar="NAME", help=presets)
    for name in ("demo", "train"):
        subs[name].add_argument("--out", type=named_path, required=True, metavar="DIR", help="folder of the run")
        subs[name].add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
            help="override a config value, such as train.epochs=3; the value is TOML or a bare string; repeatable",
        )  # fmt: skip
        subs[name].add_argument("--profile", action="store_true", help="also profile a few steps into DIR/profile/")
    _add_eval(subs["eval"])
    for name in ("a", "b"):
        text = "feature file, or folder of layers"
        subs["align"].add_argument(name, type=named_path, metavar=name.upper(), help=text)
    subs["align"].add_argument("--json", type=named_path, metavar="FILE", help="write the numbers at full precision")
    subs["align"].add_argument(
        "--spearman", action="store_true", help="also RSA by ranks: about 20 s for 8,192 samples"
    )
    subs["align"].add_argument("--out", type=named_path, metavar="FILE", help="draw the layers' CKA: .svg or .png")
    subs["report"].add_argument("dir", type=named_path, metavar="DIR", help="folder of the run")
    text = "page to write (default: DIR/report.html)"
    subs["report"].add_argument("--out", type=named_path, metavar="FILE", help=text)
    _add_views(subs["views"])
    return whole


def _add_eval(probes: argparse.ArgumentParser) -> None:
    probes.add_argument("run", type=named_path, nargs="?", metavar="RUN", help="folder of a run")
    text = "two feature files with labels, instead of a run"
    probes.add_argument("--features", type=named_path, nargs=2, metavar=("TRAIN", "TEST"), help=text)
    text = "which to run, separated by commas (default: %(default)s)"
    probes.add_argument("--probes", default="linear,ncc,knn,few-shot", metavar="NAMES", help=text)
    for name, text in (("k", "numbers of neighbours"), ("shots", "training samples of each class")):
        default = {"k": "1,5,20", "shots": "1,5,10,20,50,100"}[name]
        text = f"{text}, separated by commas (default: those of {default} that there are)"
        probes.add_argument(f"--{name}", type=_counts, metavar="N,...", help=text)
    for name, default, text in (("repeats", 5, "draws of the few shots"), ("seed", 0, "seed of all draws")):
        probes.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    text = "file for the numbers at full precision (default: RUN/evaluation.json)"
    probes.add_argument("--json", type=named_path, metavar="FILE", help=text)
    text = "where the run's images are now, such as data.source=folder:PATH; also data.root, data.renderer, "
    text += "data.workers, train.device; repeatable"
    probes.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=text)


def _counts(text: str) -> tuple[int, ...]:
    """argparse `type` for integers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas, got {text!r}") from None


def _add_views(views: argparse.ArgumentParser) -> None:
    views.add_argument("--data", required=True, metavar="SOURCE", help="data source as in a config, such as digits")
    views.add_argument("--root", metavar="DIR", help="folder of the torchvision data set")
    text = "image file to write, such as grid.png"
    views.add_argument("--out", type=named_path, required=True, metavar="FILE", help=text)
    corrupt = "if an image cannot be decoded: stop, or leave out all such images (default: %(default)s)"
    views.add_argument("--corrupt", choices=("stop", "skip"), default="stop", help=corrupt)
    presets = "cifar, tiny-imagenet, imagenet, simclr or characters (default: chosen by the images)"
    views.add_argument("--preset", metavar="NAME", help=presets)
    views.add_argument("--renderers", default="torchvision,dali,triton", metavar="NAMES", help="default: %(default)s")
    for name, default, text in (
        ("samples", 8, "number of images"), ("seed", 0, "seed of the view plan"), ("epoch", 0, "epoch of the views"),
        ("size", None, "side of a view in pixels (default: the preset's)"),
    ):  # fmt: skip
        shown = text if default is None else f"{text} (default: {default})"
        views.add_argument(f"--{name}", type=int, default=default, metavar="N", help=shown)
