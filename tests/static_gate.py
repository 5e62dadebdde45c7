"""The static gate in processes of its own: the tests' process interprets kernels."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITNESSES = "static_witnesses"  # not tests.static_witnesses: some packages install a module "tests"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), variables.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)


def gate(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return run("-m", "bench.static", *arguments, **environment)
