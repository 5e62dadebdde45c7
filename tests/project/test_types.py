"""What a type checker makes of a user's file, and that the words of the types are the words that are known."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from fastcl import OBJECTIVES, choices
from fastcl.similarity.sums.rows import KERNELS, Kernel

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_users_file_is_typed_strictly(tmp_path, monkeypatch):
    user = tmp_path / "user.py"
    user.write_text((ROOT / "tests" / "typed_user.py").read_text(encoding="utf-8"))
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    # "silent": of what the file imports, only the types count. The cache holds those of PyTorch.
    options = ("--strict", "--follow-imports=silent", f"--cache-dir={ROOT / '.mypy_cache'}", "--no-error-summary")
    done = subprocess.run([sys.executable, "-m", "mypy", *options, user], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_types_and_tables_hold_the_same_words():
    assert get_args(choices.ObjectiveName) == tuple(OBJECTIVES)
    assert get_args(Kernel) == KERNELS
