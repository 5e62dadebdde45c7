"""The command line of every benchmark: shared options, their checks, and the folder of the real images."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness.records import MEMORY_GIB, memory_limit
from fastcl.errors import FastclError, shown
from fastcl.io.files import cause
from fastcl.io.outputs import check_folder, named_path

ROOT = Path(__file__).resolve().parents[2]


class Command(argparse.ArgumentParser):
    """A parser of `python -m bench.NAME` with the option --out; the methods add other options that benchmarks share."""

    def __init__(self, name: str, description: str, epilog: str | None = None, required: bool = True) -> None:
        super().__init__(f"python -m bench.{name}", description=description, epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        self.add_argument("--out", type=named_path, required=required, metavar="DIR",
            help="folder of the results; older ones in it are replaced")  # fmt: skip

    def add_rounds(self, repeats: int, seconds: float) -> None:
        """Add --device, --repeats and --seconds with their defaults."""
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
            help="auto: cuda where there is one (the default)")  # fmt: skip
        self.add_argument("--repeats", type=int, default=repeats, metavar="R",
            help="rounds per case at most (default: %(default)s)")  # fmt: skip
        self.add_argument("--seconds", type=float, default=seconds, metavar="S",
            help="per case and provider: no round begins after it, and a provider is skipped where one call takes "
            "longer (default: %(default)s)")  # fmt: skip

    def add_memory(self) -> None:
        """Add --memory."""
        self.add_argument("--memory", type=float, metavar="GIB", help="skip what would need more, or three quarters of "
            f"the device's memory (default: {MEMORY_GIB}; CUDA: that)")  # fmt: skip

    def add_names(self, option: str, names: Sequence[str], text: str = "default: all") -> None:
        """Add an option that takes any of some names; all of them by default."""
        self.add_argument(option, nargs="+", choices=names, default=names, metavar="NAME", help=text)

    def add_images(self, *files: str) -> None:
        """Add --data, the folder of files with real images, and --tiny."""
        self.add_argument("--data", type=named_path, metavar="FOLDER", help=f"folder of {', '.join(files)} (default: "
            "$FASTCL_DATA, else ../shared/data); other images where they are absent")  # fmt: skip
        self.add_tiny()

    def add_tiny(self) -> None:
        """Add --tiny."""
        self.add_argument("--tiny", action="store_true", help="sizes that prove that it works and measure nothing")

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """The arguments, of which --device is the device, --data a folder and --memory a number; exits with a message
        if one is invalid or names a folder that cannot be used. Standard output escapes unprintable characters from
        here on."""
        args = self.parse_args(argv)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        if hasattr(args, "data"):
            args.data = args.data or Path(os.environ.get("FASTCL_DATA") or ROOT.parent / "shared" / "data")
        try:
            if args.out is not None:
                check_folder(args.out, "--out", [args.data] if hasattr(args, "data") else [])
        except FastclError as error:
            self.error(str(error))
        self._check_images(getattr(args, "data", None))
        if hasattr(args, "device"):
            if args.device == "cuda" and not torch.cuda.is_available():
                self.error("--device cuda: torch finds no CUDA device")
            cuda = args.device != "cpu" and torch.cuda.is_available()
            args.device = torch.device("cuda" if cuda else "cpu")
        if hasattr(args, "memory"):
            args.memory = memory_limit(args.memory, args.device)
        for name in ("d", "repeats", "seconds", "memory"):
            values = getattr(args, name, [])
            if bad := [v for v in (values if isinstance(values, list) else [values]) if not v > 0]:
                self.error(f"--{name}: must be positive, got {bad[0]}")
        return args

    def _check_images(self, folder: Path | None) -> None:
        """Exit with a message if the folder is there and cannot be read."""
        try:
            if folder is not None and folder.exists():
                os.scandir(folder).close()
        except OSError as error:
            self.error(f"--data: {shown(folder)} cannot be read ({cause(error)})")
