"""The command line: what each command does, and how a process ends. `parser.py` says what the commands take."""

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

from fastcl import interrupts
from fastcl.cli.parser import parser
from fastcl.config.written import DEMO, commented, preset_file
from fastcl.errors import FastclError, ToldElsewhere, ToldHere, install_hint, shown
from fastcl.io.files import cause
from fastcl.io.run_names import EVALUATION, REPORT, SWEEP

if TYPE_CHECKING:
    from fastcl.train.group import Ranks

# Modules that training, reports and data import and the base package does not install.
_TRAIN = {"PIL", "filelock", "jinja2", "matplotlib", "numpy", "safetensors", "scipy", "sklearn", "tensorboard", "timm",
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
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.raiseExceptions = False  # no tracebacks for a closed pipe while a run goes on
    try:
        _RUN[args.command](args)
    except ToldElsewhere:
        return 1
    except FastclError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output is gone; a run's folder is complete anyway
        sys.stdout = None
        return 1
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            sys.stdout = None
        return _fail(_words(error))
    except KeyboardInterrupt:
        print(interrupts.line("interrupted", sys.argv[1:] if argv is None else argv), end="", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _words(error: Exception) -> str:
    """What to say of an error; nothing of one that nobody expects."""
    if isinstance(error, FastclError):
        return str(error)
    if isinstance(error, ImportError):
        return _why_not_imported(error)
    if not isinstance(error, OSError):
        return ""
    if error.filename is None and (error.errno is None or isinstance(error, TimeoutError | ConnectionRefusedError)):
        return f"{type(error).__name__}: {shown(str(error))}"  # of no file
    # A file of Python or a library, or standard output: its reader is gone, or it is on a full disk.
    where = "standard output" if error.errno in (*_FULL, errno.EPIPE) else "a file"
    where = where if error.filename is None else shown(str(error.filename))
    return f"cannot read or write {where}: {cause(error)}"


def _why_not_imported(error: ImportError) -> str:
    """The message for a module that is not installed or, if it is, cannot be loaded."""
    root = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and root in _TRAIN:
        return f"no module {error.name}; {install_hint('train')}"
    owner = {"fastcl": "fastcl itself", "": "a module"}.get(root, f"module {error.name}")
    owner = f"Python's own module {error.name}" if root in sys.stdlib_module_names else owner
    return f"{owner} cannot be loaded ({error}); check that it is completely installed and readable"


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
    except Exception as error:
        if ranks.size == 1:
            raise
        atexit.register(os._exit, 1)  # the process would wait for exchanges with ranks that have gone
        if isinstance(error, ToldHere | ToldElsewhere):
            raise
        raise ranks.failed(error, _words(error)) from error
    except KeyboardInterrupt:
        if ranks.size > 1:
            ranks.interrupted()
            atexit.register(os._exit, 130)
        raise


def _run_on(ranks: Ranks, config: Path, args: argparse.Namespace) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from fastcl.report import write_report
    from fastcl.train import Lockstep, load_config

    if not ranks.first:
        logging.getLogger().setLevel(logging.CRITICAL)  # the first rank speaks
    with ranks.watched(), ranks.together():
        settings = load_config(config, args.overrides)
    run = Lockstep(settings, args.out, inputs=(config,))
    data, twins, epochs = run.data, run.twins, run.config.train.epochs
    if ranks.first:
        print(
            f"{data.name}: {len(data.train)} training and {len(data.test)} held-out images of {len(data.classes)} "
            f"classes; {len(twins)} models ({', '.join(t.name for t in twins)}) in lockstep on {run.device} for "
            f"{epochs} epoch{'s' * (epochs != 1)} of {len(run.loader)} steps"
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
    shows = [path for path in (*out.glob("*.jsonl"), out / "layers.json", out / EVALUATION) if path.is_file()]
    return report.is_file() and all(report.stat().st_mtime_ns >= path.stat().st_mtime_ns for path in shows)


def _sweep(args: argparse.Namespace) -> None:
    from fastcl.sweep.sweeping import listing, plan_sweep, run_sweep

    if args.dry_run:
        plan = plan_sweep(args.config, args.over, args.seeds, args.out, args.equal)
        print(listing(plan, args.out))
    else:
        run_sweep(args.config, args.over, args.seeds, args.out, equal=args.equal, jobs=args.jobs)


def _report(args: argparse.Namespace) -> None:
    if (args.dir / SWEEP).is_file():
        from fastcl.sweep import write_sweep_report

        page = write_sweep_report(args.dir, args.out)
    else:
        from fastcl.report import write_report

        page = write_report(args.dir, args.out)
    print(f"report: {shown(page)}")


def _align(args: argparse.Namespace) -> None:
    from fastcl.cli.similarity_table import wanted_by

    wanted = wanted_by(args)
    if args.models is not None or args.data is not None:
        from fastcl.cli.align_models import align_models

        align_models(args, wanted)
        return
    from fastcl.cli.align import align, check_files

    check_files(args)
    align(args.a, args.b, wanted, args.json, args.out)


def _eval(args: argparse.Namespace) -> None:
    from fastcl.cli.probing import evaluate_frozen

    evaluate_frozen(args)


def _views(args: argparse.Namespace) -> None:
    from fastcl.cli.contact_sheet import show_views

    show_views(args)


def _compare(args: argparse.Namespace) -> None:
    from fastcl.cli.compare import compare_run

    compare_run(args)


def _doctor(args: argparse.Namespace) -> None:
    from fastcl.cli.doctor import examine

    if not examine():
        raise FastclError("the self-test failed; see above")


_RUN = {
    "demo": _demo, "config": _config, "train": _train, "eval": _eval, "report": _report, "sweep": _sweep,
    "compare": _compare, "align": _align, "views": _views, "doctor": _doctor,
}  # fmt: skip
