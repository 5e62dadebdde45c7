"""What type checkers make of a user's file, that the ceilings hold, and that words in types are the words known."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from wheels import build_wheel, copy_of_sources, environment, pip

from fastcl import OBJECTIVES, choices
from fastcl.similarity.sums.rows import KERNELS, Kernel

ROOT = Path(__file__).resolve().parents[2]
USER = ROOT / "tests" / "typed_user.py"
# A `type: ignore` under which there is no error is one itself.
STRICT = {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": "error"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory, source_files) -> Path:
    """The python of an environment that has a wheel of this checkout."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "wheel").mkdir()
    wheel = build_wheel(copy_of_sources(folder / "tree", source_files), folder / "wheel")
    python = environment(folder / "venv")
    pip(python, "install", wheel, cwd=folder)
    return python


def complaints_of(tool: str, *options: str | Path, cwd: Path) -> str:
    """What a checker says; nothing where it is content."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed (the extra 'dev' brings it)")
    command = [sys.executable, "-m", tool, *map(str, options)]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # it leads to the checkout
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{tool} ended with {done.returncode}\n{done.stdout}{done.stderr}"


def by_mypy(python: Path, *users: Path) -> str:
    # The cache holds the types of PyTorch. "silent": of what the file imports, only the types count.
    options = "--strict", "--follow-imports=silent", f"--cache-dir={ROOT / '.mypy_cache'}", "--no-error-summary"
    return complaints_of("mypy", *options, f"--python-executable={python}", *users, cwd=users[0].parent)


def by_pyright(python: Path, *users: Path) -> str:
    (users[0].parent / "pyrightconfig.json").write_text(json.dumps(STRICT | {"include": [user.name for user in users]}))
    return complaints_of("basedpyright", "--pythonpath", python, cwd=users[0].parent)


@pytest.mark.slow
@pytest.mark.parametrize("check", [by_mypy, by_pyright])
def test_a_users_file_is_typed_strictly_against_an_installed_wheel(check, installed, tmp_path):
    user, wrong = tmp_path / "user.py", tmp_path / "wrong.py"
    user.write_text(USER.read_text(encoding="utf-8"))
    wrong.write_text(
        "import fastcl\nfastcl.backend(1)\nprint(fastcl.last_backend() + 1)\nx = 1  # type: ignore[misc]\n"
    )
    found = check(installed, user, wrong)
    assert all(f"wrong.py:{line}" in found for line in (2, 3, 4)), found
    assert "user.py" not in found, found


def test_types_and_tables_hold_the_same_words():
    assert get_args(choices.ObjectiveName) == tuple(OBJECTIVES)
    assert get_args(Kernel) == KERNELS


@pytest.fixture(scope="module")
def type_errors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("type_errors", ROOT / ".ci" / "type_errors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_more_type_errors_than_a_ceiling_fail_and_fewer_ask_to_lower_it(type_errors):
    ceilings = {"fastcl/train": 2, "fastcl/train/measures": 0, "bench": 1}
    held = {"fastcl/train/step.py": ["a", "b"], "bench/losses/run.py": ["c"]}
    assert type_errors.verdict(held, ceilings) == ([], [])
    failed, lower = type_errors.verdict(held | {"fastcl/train/models.py": ["d"]}, ceilings)
    assert (
        failed == ["a", "b", "d", "fastcl/train: 3 type errors, but only 2 are allowed (pyproject.toml)"] and not lower
    )
    assert type_errors.verdict(held | {"fastcl/losses/x.py": ["e"]}, ceilings) == (["e"], [])
    failed, _ = type_errors.verdict(held | {"fastcl/train/measures/x.py": ["f"]}, ceilings)
    assert failed == ["f", "fastcl/train/measures: 1 type errors, but only 0 are allowed (pyproject.toml)"]
    failed, lower = type_errors.verdict({"fastcl/train/step.py": ["a"], "bench/run.py": ["c"]}, ceilings)
    assert not failed and lower == ["fastcl/train: only 1 type errors; lower the ceiling of 2 in pyproject.toml"]
