"""Committed facts about the launches that the tests hold, so that only what has changed is compiled again."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from bench.harness.command import ROOT
from bench.harness.records import write_file
from bench.static import compile as compiler
from bench.static import sass
from bench.static.compile import Facts, Job

RESULTS = ROOT / "bench" / "results" / "static"
# Architectures and a pattern of their cases. Hopper in full; of the others the most common case, the one that takes
# most registers, and wide rows.
GATED = (
    ((90,), ""),
    ((80, 86, 89, 100, 120), "(ntxent fp16 d=128|supcon fp16 d=(256|512)|twins fp32 d=512)$"),
)


def key(job: Job, triton: str) -> str:
    """What the facts about a job follow from: its code, its arguments, the compiler, and what reads machine code."""
    arguments = {name: value for name, value in asdict(job).items() if name != "root"}
    readers = [plain(Path(str(module.__file__))) for module in (compiler, sass)]
    parts = [triton, json.dumps(arguments), code(Path(job.root), job.module), *readers]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@cache
def code(root: Path, module: str) -> str:
    """A hash of the code of a module of kernels and of all that it imports from `root`, whatever its comments."""
    found: dict[Path, str] = {}
    _collect(root.joinpath(*module.split(".")).with_suffix(".py"), root, found)
    return hashlib.sha256("".join(found[path] for path in sorted(found)).encode()).hexdigest()


def load(triton: str) -> dict[str, Facts]:
    """The committed facts for a version of Triton by `key`; empty if there are none."""
    path = _path(triton)
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: Facts(**facts) for name, facts in rows.items()}


def save(triton: str, jobs: list[Job], facts: list[Facts | str], report: str) -> None:
    """Write the facts about jobs as those committed, one launch on each line, and the report on them; jobs without
    facts are left out."""
    rows = {key(job, triton): asdict(one) for job, one in zip(jobs, facts, strict=True) if isinstance(one, Facts)}
    lines = (f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    write_file(RESULTS / f"{triton}.md", report)
    write_file(_path(triton), "{\n" + ",\n".join(lines) + "\n}\n")


def _path(triton: str) -> Path:
    return RESULTS / f"facts-{triton}.json"


def _collect(path: Path, root: Path, found: dict[Path, str]) -> None:
    if path in found or not path.exists():
        return
    found[path] = plain(path)
    for other in _imported(path, root):
        _collect(other, root, found)


def _imported(path: Path, root: Path) -> Iterable[Path]:
    """Files that a file may import names from; some do not exist."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            folder = root if not node.level else path.parents[node.level - 1]
            module = folder.joinpath(*(node.module or "").split("."))
            yield module.with_suffix(".py")
            yield from (module / f"{name.name}.py" for name in node.names)


@cache
def plain(path: Path) -> str:
    """The code of a file without comments and docstrings, in one form."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)
