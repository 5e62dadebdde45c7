"""The command line: demo, train, config, align, report, views, doctor."""

from __future__ import annotations

import argparse
import atexit
import errno
import logging
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from fastcl import __version__, interrupts
from fastcl.config.written import DEMO, commented, listing, preset_file, preset_names
from fastcl.errors import FastclError, ToldElsewhere, install_hint, shown
from fastcl.io.files import cause
from fastcl.io.outputs import named_path
from fastcl.io.run_names import REPORT

if TYPE_CHECKING:
    from fastcl.train.group import Ranks

_DESCRIPTION = """\
Train self-supervised and supervised contrastive models side by side on the same views, and measure how they align.

  fastcl demo --out runs/demo                  a complete run on scikit-learn's digits, a few minutes on two CPU cores
  fastcl train CONFIG.toml --out runs/x        any data, any timm encoder; the same command resumes a stopped run
  fastcl config > CONFIG.toml                  a config with every key and its meaning; --preset NAME: a complete run
  fastcl report runs/x                         one self-contained HTML page for a run, finished or not
  fastcl align A.npy B.npy                     CKA, RSA and drift of two feature files, or CKA of all their layers
  fastcl views --data SOURCE --out views.png   what the models see: images and their views by every renderer
  fastcl doctor                                versions and devices of this machine, and a numerical self-test
"""


# Modules that training, reports and data import and the base package does not install.
_TRAIN = {"PIL", "filelock", "jinja2", "matplotlib", "numpy", "safetensors", "sklearn", "tensorboard", "timm",
          "tomli", "torchvision", "tqdm"}  # fmt: skip

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # errors of a failed write


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its arguments. None: those of this process, in which case SIGINT, SIGTERM and SIGHUP end the process with
            one line and status 130, 143 or 129.

    Returns:
        The exit status: 0 success, 1 a reported error, 130 interrupted.
    """
    if argv is None:
        interrupts.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # the encoding may lack a character; logs in files must not lag
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return _command(argv)
    finally:
        if argv is None:
            interrupts.finish()


def _command(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.raiseExceptions = False  # no tracebacks for a closed pipe while a run goes on
    try:
        args.run(args)
    except ToldElsewhere:
        return 1
    except FastclError as error:
        return _fail(str(error))
    except ImportError as error:
        return _fail(_why_not_imported(error))
    except BrokenPipeError:  # the reader of our output is gone; a run's folder is complete anyway
        sys.stdout = None
        return 1
    except OSError as error:  # a file of Python or a library, or standard output on a full disk
        sys.stdout = None if error.filename is None else sys.stdout
        where = "standard output" if error.errno in _FULL else "a file"
        where = where if error.filename is None else shown(str(error.filename))
        return _fail(f"cannot read or write {where}: {cause(error)}")
    except KeyboardInterrupt:
        print(interrupts.line("interrupted", sys.argv[1:] if argv is None else argv), end="", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _why_not_imported(error: ImportError) -> str:
    """The message for a module that is not installed or, if it is, cannot be loaded."""
    root = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and root in _TRAIN:
        return f"no module {error.name}; {install_hint('train')}"
    owner = {"fastcl": "fastcl itself", "": "a module"}.get(root, f"module {error.name}")
    owner = f"Python's own module {error.name}" if root in sys.stdlib_module_names else owner
    return f"{owner} cannot be loaded ({error}); check that it is completely installed and readable"


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="fastcl", description=_DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"fastcl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    subs = {}
    for name, (run, text, details) in _COMMANDS.items():
        subs[name] = commands.add_parser(name, help=text, description=f"{text}\n{details}", formatter_class=raw)
        subs[name].set_defaults(run=run)
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
    return parser


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


def _demo(args: argparse.Namespace) -> None:
    with preset_file(DEMO) as config:
        _run(config, args)


def _train(args: argparse.Namespace) -> None:
    _run(args.config, args)


def _config(args: argparse.Namespace) -> None:
    print(commented(args.preset), end="")


def _run(config: Path, args: argparse.Namespace) -> None:
    from fastcl.train.group import start

    ranks = start()
    try:
        _run_on(ranks, config, args)
    except FastclError:
        if ranks.size > 1:  # at exit the process would wait for exchanges with ranks that have gone
            atexit.register(os._exit, 1)
        raise


def _run_on(ranks: Ranks, config: Path, args: argparse.Namespace) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from fastcl.report import write_report
    from fastcl.train import Lockstep, load_config

    if not ranks.first:
        logging.getLogger().setLevel(logging.CRITICAL)  # the first rank speaks
    with ranks.together():
        settings = load_config(config, args.overrides)
    run = Lockstep(settings, args.out, inputs=(config,))
    data, twins = run.data, run.twins
    if ranks.first:
        print(
            f"{data.name}: {len(data.train)} training and {len(data.test)} held-out images of {len(data.classes)} "
            f"classes; {len(twins)} models ({', '.join(t.name for t in twins)}) in lockstep on {run.device} for "
            f"{run.config.train.epochs} epochs of {len(run.loader)} steps"
        )
    with logging_redirect_tqdm():
        run.run(profile=args.profile)
    ranks.close()
    if not ranks.first:
        return
    report = args.out / REPORT
    if not _is_newest(report, args.out):
        write_report(args.out)
    print(f"report: {shown(report)}")


def _is_newest(report: Path, out: Path) -> bool:
    """Whether a run's report exists and was written after what it shows."""
    shows = [path for path in (*out.glob("*.jsonl"), out / "layers.json") if path.is_file()]
    return report.is_file() and all(report.stat().st_mtime_ns >= path.stat().st_mtime_ns for path in shows)


def _report(args: argparse.Namespace) -> None:
    from fastcl.report import write_report

    print(f"report: {shown(write_report(args.dir, args.out))}")


def _align(args: argparse.Namespace) -> None:
    from fastcl.cli.align import align

    align(args.a, args.b, args.json, args.out, args.spearman)


def _views(args: argparse.Namespace) -> None:
    from fastcl.cli.contact_sheet import show_views

    show_views(args)


def _doctor(args: argparse.Namespace) -> None:
    from fastcl.cli.doctor import examine

    if not examine():
        raise FastclError("the self-test failed; see above")


_COMMANDS = {
    "demo": (_demo, "a complete run on scikit-learn's digits", """
Trains CL (dcl), NSCL, SupCon and cross-entropy from one initialisation on the same batches and views, with two
controls: an identity twin, which must stay bit-identical, and a reseeded twin, the noise floor. Writes the run and
report.html into --out. The same command resumes a stopped run."""),
    "train": (_train, "train from a TOML file", """
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
    "config": (_config, "a commented config for train", """
Prints every key with its meaning and its default (with --preset: the preset's value). Edit it or train it as it is:

  fastcl config --preset omniglot > run.toml
  fastcl train run.toml --out runs/x --set data.source=omniglot:PATH"""),
    "align": (_align, "CKA, RSA and drift of two feature files, or CKA of all pairs of layers", """
Each file holds one (samples, width) matrix: .npy, or .npz / .safetensors with a single array or one named 'features'.
Row k of both files must be the same sample. Prints CKA (linear, cosine; biased, debiased), RSA (Pearson; with
--spearman also by ranks), the drift of the similarities, its relative sizes rho and r, and the lower bounds of CKA and
RSA that follow from them (arXiv 2510.08852).

Layers: A and B are files with one array per layer, or folders with one feature file per layer (outputs with more than
two dimensions are flattened). Prints the debiased linear CKA of every layer of A with every layer of B; --out draws it:

  fastcl align resnet.npz vit.npz --out layers.svg"""),
    "report": (_report, "one self-contained HTML page for a run", """
Works on unfinished runs too. Figures: alignment with the reference model per epoch and the noise floor, weight gap,
drift of the similarities per step beside Theorem 1 of arXiv 2510.08852, alignment of every pair and of every layer,
losses, loss gap and same-class mass, accuracy, CDNV. Tables: final numbers, drift and certificates, settings,
versions."""),
    "views": (_views, "a contact sheet of images and their views", """
Each row is a training image and its two views: by torchvision, and by every other renderer that this machine and the
images support, with the difference from torchvision (blue: darker, red: brighter; mean and maximum in grey levels).
For a renderer that cannot be used, the reason is given. With the preset, size and seed of a run, these are the views
that it trains on.

  fastcl views --data digits --size 16 --out digits.png   # what fastcl demo trains
  fastcl views --data folder:photos.zip --preset simclr --size 96 --samples 4 --out grid.png"""),
    "doctor": (_doctor, "versions and devices of this machine, and a numerical self-test", """
Prints versions, devices and optional packages, then checks losses and similarities against float64. The exit status is
1 if a check fails."""),
}  # fmt: skip
