"""Every way of having fastcl - wheel, sdist, editable install, plain checkout - gives the same importable package."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from wheels import build_wheel, copy_of_sources, environment, pip, run

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "contrastive/prepare.py"
REPORT = """
import importlib.util, json, fastcl.errors, fastcl.kernels, fastcl.kernels.contrastive.prepare as kernel
spec = importlib.util.find_spec("kernels")
print(json.dumps({
    "errors": fastcl.errors.__file__,
    "kernel": kernel.__file__,
    "path": list(fastcl.kernels.__path__),
    "top_level_kernels": list(spec.submodule_search_locations) if spec else [],
}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory, source_files) -> Path:
    return copy_of_sources(tmp_path_factory.mktemp("checkout"), source_files)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def modules(tree: Path) -> set[str]:
    """What a wheel must hold: all code, configurations, templates and data of fastcl/, kernels/ as fastcl/kernels."""
    suffixes = ("py", "toml", "j2", "css", "json")
    package = {path.relative_to(tree) for suffix in suffixes for path in (tree / "fastcl").rglob(f"*.{suffix}")}
    kernels = [path for suffix in ("py", "json") for path in (tree / "kernels").rglob(f"*.{suffix}")]
    families = {"fastcl" / path.relative_to(tree) for path in kernels}
    return {path.as_posix() for path in package | families} | {"fastcl/py.typed"}


def test_the_wheel_holds_all_modules_and_no_package_of_its_own_called_kernels(wheel, tree):
    held = names(wheel)
    assert {name for name in held if ".dist-info/" not in name} == modules(tree)
    assert {name.split("/")[0].split("-")[0] for name in held} == {"fastcl"}
    assert any(name.endswith("/licenses/LICENSE") for name in held)
    (entry_points,) = [name for name in held if name.endswith("entry_points.txt")]
    with zipfile.ZipFile(wheel) as archive:
        assert "fastcl = fastcl.cli.main:main" in archive.read(entry_points).decode()


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    (built,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(built, folder)
    return folder / built.name.removesuffix(".tar.gz")


def test_the_sdist_holds_every_file_and_builds_the_same_wheel(sdist, wheel, source_files, tmp_path):
    held = {path.relative_to(sdist) for path in sdist.rglob("*") if path.is_file()}
    assert set(source_files) - {Path(".gitignore")} <= held
    pip(sys.executable, "wheel", sdist, "--wheel-dir", tmp_path, cwd=tmp_path)
    (rebuilt,) = tmp_path.glob("*.whl")
    assert names(rebuilt) == names(wheel)


@pytest.mark.slow
def test_the_tests_of_the_sdist_are_collected(sdist):
    options = "--collect-only", "--assert=plain", "-q", "-p", "no:cacheprovider"
    said = run(sys.executable, "-m", "pytest", *options, cwd=sdist)
    files = {line.partition("::")[0] for line in said.splitlines() if "::" in line}
    assert files == {path.relative_to(sdist).as_posix() for path in (sdist / "tests").rglob("test_*.py")}


def test_the_long_description_has_no_link_into_the_checkout(wheel):
    link = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        head, _, shown = archive.read(metadata).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head

    def targets(text: str) -> list[str]:
        return link.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))

    ours = [target.partition("#")[0] for target in targets(readme) if not target.startswith("https:")]
    assert ours and all((ROOT / target).exists() for target in ours)
    assert targets(shown) == [target for target in targets(readme) if target.startswith("https:")] != []
    assert all(target in shown for target in ours if not target.endswith(".svg")) and "```python" in shown


def test_a_wheel_is_whole_and_leaves_the_name_kernels_to_others(wheel, tmp_path):
    python = environment(tmp_path / "venv")
    pip(python, "install", wheel, cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert not (site / "kernels").exists()
    other = site / "kernels" / "__init__.py"  # another project's package of that name
    other.parent.mkdir()
    other.write_text("")
    report = json.loads(run(python, "-c", REPORT, cwd=tmp_path))
    assert report["errors"] == str(site / "fastcl" / "errors.py")
    assert report["kernel"] == str(site / "fastcl" / "kernels" / KERNEL)
    assert report["path"] == [str(site / "fastcl" / "kernels")]
    assert report["top_level_kernels"] == [str(other.parent)]


def test_an_editable_install_reads_the_checkout_and_sees_new_families(tree, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(tree, checkout, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    python = environment(tmp_path / "venv")
    pip(python, "install", "--editable", checkout, cwd=tmp_path)
    report = json.loads(run(python, "-c", REPORT, cwd=tmp_path))
    assert report["errors"] == str(checkout / "fastcl" / "errors.py")
    assert report["kernel"] == str(checkout / "fastcl" / "kernels" / KERNEL)
    assert not any(location.startswith(str(checkout)) for location in report["top_level_kernels"])
    (checkout / "kernels" / "later").mkdir()
    (checkout / "kernels" / "later" / "__init__.py").write_text("")
    run(python, "-c", "import fastcl.kernels.later", cwd=tmp_path)


def test_a_plain_checkout_needs_no_install(tree, tmp_path):
    python = environment(tmp_path / "venv")
    report = json.loads(run(python, "-c", REPORT, cwd=tmp_path, PYTHONPATH=str(tree)))
    assert report["errors"] == str(tree / "fastcl" / "errors.py")
    assert report["kernel"] == str(tree / "fastcl" / "kernels" / KERNEL)


def test_the_oldest_versions_of_the_matrix_are_those_that_are_allowed():
    project, matrix = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", ".ci/matrix"))
    (floor,) = re.findall(r"^check floor (\S+) torch==(\S+)\.0 triton==(\S+)\.0 ", matrix, re.MULTILINE)
    assert [f'requires-python = ">={floor[0]}"', f'"torch>={floor[1]}",', f'"triton>={floor[2]};'] == re.findall(
        r'requires-python = "[^"]*"|"torch>=[^"]*",|"triton>=[^;]*;', project
    )


def test_versions_without_their_python_are_said_to_be_skipped(tmp_path):
    bash = shutil.which("bash")
    done = subprocess.run([bash, ROOT / ".ci" / "matrix"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" not in done.stdout
    assert "gpu: SKIPPED, python3.12 not found (set PYTHON312)" in done.stdout and "floor: SKIPPED" in done.stdout
