"""What the command line of `fastcl` takes: commands, their arguments, their help."""

from __future__ import annotations

import argparse

from fastcl import __version__
from fastcl.choices import DATA_PARTS, EQUAL
from fastcl.config.written import listing, preset_names
from fastcl.io.outputs import named_path

_DESCRIPTION = """\
Train self-supervised and supervised contrastive models side by side on the same views, and measure how they align.

  fastcl demo --out runs/demo                  a complete run on scikit-learn's digits, a few minutes on two CPU cores
  fastcl config > CONFIG.toml                  a config with every key and its meaning; --preset NAME: a complete run
  fastcl train CONFIG.toml --out runs/x        any data, any timm encoder; the same command resumes a stopped run
  fastcl eval runs/x                           accuracy of probes on the frozen features of every model of a run
  fastcl report runs/x                         one self-contained HTML page for a run, finished or not
  fastcl sweep CONFIG.toml --over train.temperature=0.1,0.5,1.0 --seeds 3 --out runs/s     a run for every combination
  fastcl compare runs/x                        a run's alignment beside the curves of arXiv 2510.08852
  fastcl align A.npy B.npy                     similarity of two feature files, of all their layers, or of named models
  fastcl views --data SOURCE --out views.png   what the models see: images and their views by every renderer
  fastcl doctor                                versions and devices of this machine, and a numerical self-test
"""

_COMMANDS = {
    "demo": ("a complete run on scikit-learn's digits", """
Trains CL (dcl), NSCL, SupCon and cross-entropy from one initialisation on the same batches and views, with two
controls: an identity twin, which must stay bit-identical, and a reseeded twin, the noise floor. Writes the run and
report.html into --out. The same command resumes a stopped run."""),
    "config": ("a commented config for train", """
Prints every key with its meaning and its default (with --preset: the preset's value). Edit it or train it as it is:

  fastcl config --preset omniglot > run.toml
  fastcl train run.toml --out runs/x --set data.source=omniglot:PATH"""),
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
    "report": ("one self-contained HTML page for a run or a sweep", """
Works on unfinished runs too. Figures: alignment with the reference model per epoch and the noise floor, weight gap,
drift of the similarities per step beside Theorem 1 of arXiv 2510.08852, alignment of every pair and of every layer,
losses, loss gap and same-class mass, accuracy, CDNV. Tables: final numbers, drift and certificates, what `fastcl eval`
has measured, settings, versions. Of a sweep, finished or not: its table anew, and its page (see `fastcl sweep`)."""),
    "sweep": ("a run for every combination of settings and seeds", """
Trains a run for each combination of the --over values and the seeds, each in a process of its own, and gathers what
they measured. Each combination is a cell; all are checked before the first one runs. The same command goes on after a
stop, repeats no finished run, and tries failed ones again; with more values or seeds it extends the sweep.

  fastcl sweep run.toml --over train.batch_size=64,128,256 --over lr_rule=constant,sqrt,linear --seeds 3 --out runs/s
  fastcl sweep run.toml --over data.classes=2,5,10 --equal steps --out runs/classes --dry-run
  fastcl report runs/s                      the table and the page anew, at any time

KEY is a key of the config (`fastcl train --help` lists them), or lr_rule: how optim.lr follows train.batch_size
(constant, fourth-root, sqrt, linear; at the config's batch size all agree). All cells are evaluated on equally many
held-out images. Writes into --out:

  table.csv         every measured value: a row for each cell, epoch, and pair of models or model; also table.parquet if
                    pyarrow is installed
  sweep.html        figures with the seeds as bands, final numbers with their spread, failed cells
  cells/            one folder for each run, as fastcl train writes it; also configs/ and logs/"""),
    "compare": ("a run's alignment beside the curves of arXiv 2510.08852", """
Prints CKA and RSA of nscl, supcon and ce with CL at every evaluated epoch beside the published value, the difference,
and whether it is within the band in which the two cannot be told apart; then every setting in which the run differs
from the published one, and what is doubtful about the published numbers. Works on unfinished runs too. Between two
published epochs values are interpolated; outside of them there are none.

  fastcl compare runs/x --out paper.svg                        the published run of the same data and temperature
  fastcl compare runs/x --target cifar100-tau-1.0 --json paper.json
  fastcl compare --list                                        all of them

A run measures on held-out images, most published curves on training images: the output says what it compares."""),
    "align": ("similarity of two feature files, of all pairs of layers, or of models by name", """
Each file holds one (samples, width) matrix: .npy, or .npz / .safetensors with a single array or one named 'features'.
Row k of both files must be the same sample. Prints CKA (linear, cosine; biased, debiased), RSA (Pearson; with
--spearman also by ranks), the overlap of nearest neighbours, Procrustes, the drift of the similarities, its relative
sizes rho and r, and the lower bounds of CKA and RSA that follow from them (arXiv 2510.08852). With p-values and 95 %
intervals:

  fastcl align cl.npy nscl.npy --permutations 1000 --bootstrap 1000

Layers: A and B are files with one array per layer, or folders with one feature file per layer (outputs with more than
two dimensions are flattened). Prints the debiased linear CKA of every layer of A with every layer of B; --out draws it:

  fastcl align resnet.npz vit.npz --out layers.svg

Models: encoders of timm or torchvision with random weights, or those of a file or of the library (--pretrained), see
the same images, each as it was made to see them; their features before the classifier are compared, pair by pair:

  fastcl align --models resnet18,vit_tiny_patch16_224,torchvision:resnet18 --data folder:photos --samples 500
  fastcl align --models resnet18,resnet18=trained.safetensors --data digits --layers --out layers.svg"""),
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
    whole = argparse.ArgumentParser(prog="fastcl", description=_DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    whole.add_argument("--version", action="version", version=f"fastcl {__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    subs = {}
    for name, (text, details) in _COMMANDS.items():
        subs[name] = commands.add_parser(
            name, help=text, description=f"{text}\n{details}", formatter_class=raw, allow_abbrev=False
        )
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
    _add_align(subs["align"])
    subs["report"].add_argument("dir", type=named_path, metavar="DIR", help="folder of the run or sweep")
    text = "page to write (default: DIR/report.html; of a sweep DIR/sweep.html)"
    subs["report"].add_argument("--out", type=named_path, metavar="FILE", help=text)
    _add_views(subs["views"])
    _add_sweep(subs["sweep"])
    _add_compare(subs["compare"])
    return whole


def _add_align(align: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        text = "feature file, or folder of layers"
        align.add_argument(name, type=named_path, metavar=name.upper(), nargs="?", help=text)
    align.add_argument("--json", type=named_path, metavar="FILE", help="write the numbers at full precision")
    align.add_argument("--out", type=named_path, metavar="FILE", help="draw the layers' CKA: .svg or .png")
    align.add_argument("--spearman", action="store_true", help="also RSA by ranks: about 20 s for 8,192 samples")
    text = "p-value of each similarity from R permutations of the samples of B, such as 1000"
    align.add_argument("--permutations", type=int, metavar="R", help=text)
    text = "95 %% interval of each similarity from R random halves of the samples, such as 1000"
    align.add_argument("--bootstrap", type=int, metavar="R", help=text)
    for name, letter, default, text in (
        ("neighbours", "K", 10, "neighbours that mutual k-NN compares"), ("seed", "N", 0, "of all random numbers"),
    ):  # fmt: skip
        align.add_argument(f"--{name}", type=int, default=default, metavar=letter, help=f"{text} (default: {default})")
    models = align.add_argument_group("models by name, instead of A and B")
    text = "two or more, with commas, each [timm:|torchvision:]NAME[=FILE], FILE being its weights"
    models.add_argument("--models", metavar="NAMES", help=text)
    models.add_argument("--data", metavar="SOURCE", help="data source as in a config, such as folder:PATH")
    models.add_argument("--root", metavar="DIR", help="folder of the torchvision data set")
    models.add_argument("--samples", type=int, metavar="N", help="random images of it (default: all)")
    text = "which of its images (default: %(default)s)"
    models.add_argument("--part", choices=DATA_PARTS, default="all", help=text)
    text = "weights of the library, which it may fetch; without it, and without FILE, random ones"
    models.add_argument("--pretrained", action="store_true", help=text)
    text = "compare layers of two models: their stages, or those that PATTERNS (with commas) name"
    models.add_argument("--layers", nargs="?", const="", metavar="PATTERNS", help=text)


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("config", type=named_path, metavar="CONFIG.toml")
    text = "a key and its values, TOML or bare strings; repeatable: all combinations are run"
    sweep.add_argument("--over", action="append", default=[], metavar="KEY=V1,V2,...", help=text)
    text = "number of seeds: the config's train.seed and those that follow it (default: %(default)s)"
    sweep.add_argument("--seeds", type=int, default=1, metavar="N", help=text)
    sweep.add_argument("--out", type=named_path, required=True, metavar="DIR", help="folder of the sweep")
    text = "steps: set each cell's epochs so that all take about as many steps as the config (default: %(default)s)"
    sweep.add_argument("--equal", choices=EQUAL, default="epochs", help=text)
    text = "runs at a time, which share the threads; GPUs are given out in turn (default: 1, or one for each GPU)"
    sweep.add_argument("--jobs", type=int, metavar="N", help=text)
    sweep.add_argument("--dry-run", action="store_true", help="check and list the cells, and write nothing")


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


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("run", type=named_path, nargs="?", metavar="RUN", help="folder of the run")
    text = "name of a published run (default: that of the run's data set, number of classes and temperature)"
    compare.add_argument("--target", metavar="NAME", help=text)
    compare.add_argument("--list", action="store_true", help="list the published runs, and what they show")
    compare.add_argument("--out", type=named_path, metavar="FILE", help="draw both: .svg or .png")
    compare.add_argument("--json", type=named_path, metavar="FILE", help="write the numbers at full precision")


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
