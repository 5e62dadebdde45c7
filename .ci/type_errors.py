"""Compares type errors per folder with the ceilings in pyproject.toml ([tool.fastcl.type-errors]).

A folder without a ceiling must have no errors. More errors than a ceiling fail; with fewer, the ceiling should be
lowered.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]


def folder_of(path: str, ceilings: Mapping[str, int]) -> str:
    """The innermost folder around a file that has a ceiling, or ""."""
    above = [parent.as_posix() for parent in Path(path).parents]
    return next((folder for folder in above if folder in ceilings), "")


def verdict(errors: Mapping[str, Sequence[str]], ceilings: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Messages for failures, and for ceilings that should be lowered.

    Args:
        errors: messages by path relative to the checkout.
        ceilings: allowed errors by folder.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for path, lines in errors.items():
        found[folder_of(path, ceilings)] += lines
    failed = found.pop("", [])
    lower = []
    for folder, ceiling in ceilings.items():
        lines = found[folder]
        if len(lines) > ceiling:
            failed += [*lines, f"{folder}: {len(lines)} type errors, but only {ceiling} are allowed (pyproject.toml)"]
        elif len(lines) < ceiling:
            lower.append(f"{folder}: only {len(lines)} type errors; lower the ceiling of {ceiling} in pyproject.toml")
    return failed, lower


def errors_now() -> dict[str, list[str]]:
    """The type checker's errors in this checkout, by path."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"basedpyright exited with status {done.returncode}:\n{done.stdout}{done.stderr}")
    found: dict[str, list[str]] = defaultdict(list)
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        if one["severity"] == "error":
            path = Path(one["file"]).relative_to(ROOT).as_posix()
            line = one["range"]["start"]["line"] + 1
            found[path].append(f"{path}:{line}: {one['message'].splitlines()[0]} ({one.get('rule', 'syntax')})")
    return found


def main() -> int:
    """Print the messages and return the exit status."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    failed, lower = verdict(errors_now(), project["tool"]["fastcl"]["type-errors"])
    print(*failed, *lower, sep="\n", end="\n" if failed or lower else "")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
