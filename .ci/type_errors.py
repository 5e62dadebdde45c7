"""Counts type errors by folder and holds them against the ceilings in pyproject.toml ([tool.fastcl.type-errors]).

A folder without a ceiling may have none. More errors than a ceiling fail; fewer ask to lower it.
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
    """The folder whose ceiling counts for a file, the innermost one; "" where none does."""
    above = [parent.as_posix() for parent in Path(path).parents]
    return next((folder for folder in above if folder in ceilings), "")


def verdict(errors: Mapping[str, Sequence[str]], ceilings: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """What fails, and what should be lowered.

    Args:
        errors: by path, relative to the checkout.
        ceilings: by folder.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for path, lines in errors.items():
        found[folder_of(path, ceilings)] += lines
    failed = found.pop("", [])
    lower = []
    for folder, ceiling in ceilings.items():
        lines = found[folder]
        if len(lines) > ceiling:
            failed += [*lines, f"{folder}: {len(lines)} type errors, {ceiling} are allowed (pyproject.toml)"]
        elif len(lines) < ceiling:
            lower.append(f"{folder}: {len(lines)} type errors, lower its ceiling of {ceiling} in pyproject.toml")
    return failed, lower


def errors_now() -> dict[str, list[str]]:
    """What the checker says of this checkout, by path."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"basedpyright ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    found: dict[str, list[str]] = defaultdict(list)
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        if one["severity"] == "error":
            path = Path(one["file"]).relative_to(ROOT).as_posix()
            line = one["range"]["start"]["line"] + 1
            found[path].append(f"{path}:{line}: {one['message'].splitlines()[0]} ({one.get('rule', 'syntax')})")
    return found


def main() -> int:
    """Says what fails; the exit status."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    failed, lower = verdict(errors_now(), project["tool"]["fastcl"]["type-errors"])
    print(*failed, *lower, sep="\n", end="\n" if failed or lower else "")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
