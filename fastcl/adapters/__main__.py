"""`python -m fastcl.adapters LIBRARY PROGRAM ...`: a program that is not edited, with the losses of `fastcl.patch`."""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from fastcl.adapters.patching import patch, tell
from fastcl.errors import FastclError


def main(argv: list[str] | None = None) -> None:
    """Patch libraries and run a program in this process, as `python` would run it.

    Args:
        argv: libraries, the program and its arguments. None: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastcl.adapters",
        description="Run a Python program whose losses compute with fastcl. With several processes: torchrun "
        "--nproc-per-node 4 -m fastcl.adapters LIBRARY -m MODULE ...",
    )
    parser.add_argument("--force", action="store_true", help="also releases that fastcl was not compared with")
    parser.add_argument("libraries", metavar="LIBRARY[,LIBRARY]", help="what fastcl.patch takes")
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, metavar="PROGRAM", help="SCRIPT.py or -m MODULE, and its arguments"
    )
    args = parser.parse_args(argv)
    words = args.program[args.program[:1] == ["--"] :]
    is_module = words[:1] == ["-m"]
    words = words[is_module:]
    if not words:
        parser.error("name a program: SCRIPT.py or -m MODULE")
    if not is_module and not os.path.exists(words[0]):
        parser.error(f"no such file: {words[0]}")
    try:
        tell(patch(*args.libraries.split(","), force=args.force))
    except FastclError as error:
        parser.error(str(error))
    sys.argv[:] = words
    if is_module:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
