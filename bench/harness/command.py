"""The command line of every benchmark: options that several share, and their checks."""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.harness.records import MEMORY_GIB, memory_limit
from fastcl.errors import FastclError, shown
from fastcl.io.files import cause
from fastcl.io.outputs import check_folder, named_path

ROOT = Path(__file__).resolve().parents[2]


def at_least(least: int) -> Callable[[str], int]:
    """The argparse `type` of whole numbers that are not smaller."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return integer


def positive(text: str) -> float:
    """argparse `type` of positive numbers."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def pattern(text: str) -> re.Pattern[str]:
    """argparse `type` of regular expressions."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


OPTIONS: dict[str, dict[str, Any]] = {
    "out": {"type": named_path, "metavar": "DIR", "help": "folder of the results; older ones in it are replaced"},
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto",
               "help": "auto: cuda where there is one (the default)"},
    "repeats": {"type": at_least(1), "metavar": "R", "help": "rounds per case at most (default: %(default)s)"},
    "seconds": {"type": positive, "metavar": "S", "help": "per case and provider: no round begins after it, and a "
                "provider is skipped where one call takes longer (default: %(default)s)"},
    "memory": {"type": positive, "metavar": "GIB", "help": "skip what would need more, or three quarters of the "
               f"device's memory (default: {MEMORY_GIB}; CUDA: that)"},
    "data": {"type": named_path, "metavar": "FOLDER", "help": "folder of the real images (default: $FASTCL_DATA, else "
             "../shared/data); other images where they are absent"},
    "tiny": {"action": "store_true", "help": "sizes that prove that it works and measure nothing"},
    "workers": {"type": at_least(1), "default": 2, "metavar": "N",
                "help": "processes that compile (default: %(default)s)"},
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser of `python -m bench.NAME` with some of OPTIONS."""

    def __init__(self, name: str, texts: Sequence[str], *options: str, **defaults: object) -> None:
        """A parser of some options, with their defaults; `texts` are the description and what follows the options."""
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(f"python -m bench.{name}", None, *texts, formatter_class=raw, allow_abbrev=False)
        for option in options:
            self.add_argument(f"--{option}", required=option == "out" and "out" not in defaults, **OPTIONS[option])
        self.set_defaults(**defaults)

    def add_names(self, option: str, names: Sequence[str], text: str = "default: all") -> None:
        """Add an option that takes any of some names; all of them by default."""
        self.add_argument(option, nargs="+", choices=names, default=names, metavar="NAME", help=text)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Make a FastclError of the block an error of the command line."""
        try:
            yield
        except FastclError as error:
            self.error(str(error))

    def compiling(self) -> None:
        """End the program with a message if kernels are for Triton's interpreter in this process."""
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            self.error("TRITON_INTERPRET is set, which turns kernels into what cannot be compiled; unset it")


class Command(Parser):
    """A parser of a benchmark that writes its results to --out."""

    def __init__(self, name: str, texts: Sequence[str], *options: str, **defaults: object) -> None:
        """As `Parser`, with --out."""
        super().__init__(name, texts, "out", *options, **defaults)

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """The arguments, of which --device is the device, --data a folder and --memory a number; exits with a message
        if one is invalid or names a folder that cannot be used. Standard output escapes unprintable characters from
        here on."""
        args = self.parse_args(argv)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        if hasattr(args, "data"):
            args.data = args.data or Path(os.environ.get("FASTCL_DATA") or ROOT.parent / "shared" / "data")
        self._check_folders(args.out, getattr(args, "data", None))
        if hasattr(args, "device"):
            if args.device == "cuda" and not torch.cuda.is_available():
                self.error("--device cuda: torch finds no CUDA device")
            cuda = args.device != "cpu" and torch.cuda.is_available()
            args.device = torch.device("cuda" if cuda else "cpu")
        if hasattr(args, "memory"):
            args.memory = memory_limit(args.memory, args.device)
        return args

    def _check_folders(self, out: Path | None, data: Path | None) -> None:
        """Exit with a message if --out cannot be written or is the folder of the images, or if that cannot be read."""
        with self.refusing():
            if out is not None:
                check_folder(out, "--out", [data] if data else [])
            try:
                if data is not None and data.exists():
                    os.scandir(data).close()
            except OSError as error:
                raise FastclError(f"--data: {shown(data)} cannot be read ({cause(error)})") from error
