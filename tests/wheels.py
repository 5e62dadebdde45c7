"""Wheels of this checkout, and environments to install them into; without network."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")} | variables
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(python: Path | str, *arguments: str | Path, cwd: Path) -> None:
    """pip without network, without dependencies and without an isolated build environment."""
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, *arguments, *offline, cwd=cwd)


def copy_of_sources(folder: Path, source_files: Iterable[Path]) -> Path:
    """A copy of the sources, so that no build/ or egg-info is left in the checkout; skips where it cannot be built."""
    setuptools = importlib.metadata.version("setuptools")
    if int(setuptools.split(".")[0]) < 77:
        pytest.skip(f"pyproject.toml asks for setuptools 77.0.3 or newer, this environment has {setuptools}")
    for path in source_files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    (folder / "fastcl" / "kernels").symlink_to(Path("..", "kernels"))
    return folder


def build_wheel(tree: Path, folder: Path) -> Path:
    """The wheel of a source tree, in a folder that holds no other."""
    pip(sys.executable, "wheel", tree, "--wheel-dir", folder, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def environment(folder: Path) -> Path:
    """A fresh virtual environment that sees this one's packages but for any fastcl; the path of its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    # pip does not install beside a fastcl of the same version, and an editable one is found after it: each package is
    # linked by itself. Lines of a .pth file are searched last, and .pth files that they lead to are not read.
    origins = {Path(importlib.util.find_spec(name).origin).parents[1] for name in ("torch", "triton", "setuptools")}
    for origin in origins:
        for path in origin.iterdir():
            if "fastcl" not in path.name and not (borrowed / path.name).exists():
                (borrowed / path.name).symlink_to(path)
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    return python
