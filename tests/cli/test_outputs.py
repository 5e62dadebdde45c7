"""What commands write: never over what they read, checked before the work, whole or not at all."""

import errno
import importlib
import io
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_images import write_tree

from fastcl import FastclError
from fastcl.cli.main import main
from fastcl.errors import shown
from fastcl.io.files import write_atomic
from fastcl.io.outputs import check_folder, check_output

LATIN = os.fsdecode(b"caf\xe9")  # a name that is not UTF-8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two matrices, two folders of layers and an image tree, in the current folder."""
    rng = np.random.default_rng(0)
    for name in ("x.npy", "y.npy", "a/l1.npy", "a/l2.npy", "b/l1.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, rng.normal(size=(12, 3)))
    image = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(image, "PNG")
    write_tree(tmp_path / "photos", {f"{c}/{k}.png": image.getvalue() for c in "pq" for k in range(3)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 1, arguments
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out, captured
    return captured.err


def test_no_output_takes_the_place_of_an_input(folder, capsys):
    os.link("y.npy", "hard.json")
    os.symlink("y.npy", "soft.json")
    os.symlink(".", "here")
    os.symlink("y.npy", "named.npy")
    os.link("photos/p/0.png", "hard.png")
    before = contents(folder)
    for output in ("y.npy", "./y.npy", "here/y.npy", "x.npy", str(folder / "y.npy"), "hard.json", "soft.json"):
        message = refused(capsys, "align", "x.npy", "y.npy", "--json", output)
        assert f"error: --json: {Path(output)} is " in message
    refused(capsys, "align", "x.npy", "named.npy", "--json", "y.npy")
    for output in ("a/l1.npy", "b/l1.npy", "a/new.npy", "new.NPZ"):
        assert "error: --json: " in refused(capsys, "align", "a", "b", "--json", output)
    assert "error: --out: " in refused(capsys, "align", "a", "b", "--json", "o.svg", "--out", "./o.svg")
    for output in ("photos/p/0.png", "photos/p/new.png", "photos/new/new.png", "here/photos/new.png"):
        message = refused(capsys, "views", "--data", "folder:photos", "--out", output, "--samples", "1")
        assert "is inside photos, which this command reads" in message
    assert contents(folder) == before
    assert main(["align", "a", "b", "--json", "a/cka.json", "--out", "a/cka.svg"]) == 0  # no layer, destroys none
    assert contents(folder).keys() - before.keys() == {str(folder / "a" / name) for name in ("cka.json", "cka.svg")}


def test_outputs_that_cannot_be_written_are_refused_before_the_work(folder, capsys, monkeypatch):
    os.symlink("loop", "loop")
    os.symlink("absent/o.json", "dangling.json")
    os.mkfifo("pipe.json")
    Path("file").touch()
    before = contents(folder)

    def work(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr("fastcl.cli.align.read_layers", work)
    monkeypatch.setattr("fastcl.cli.contact_sheet.load", work)
    cases = {
        ".": "not a file name", "a": "is a folder", "/dev/null": "is a device", "pipe.json": "pipe",
        "dangling.json": "is a link to absent/o.json", "/dev/stdout": "is a link", "file/o.json": "Not a directory",
        "loop/o.json": "symbolic links", "n" * 300: "File name too long", f"new/{'n' * 300}/o.json": "name too long",
        "e\u00e9" * 90: "name too long", "o\0.json": "null", "/proc/o.json": "cannot be written",
        "new/../o\n.json/x" * 400: "name too long",
    }  # fmt: skip
    for output, reason in cases.items():
        message = refused(capsys, "align", "x.npy", "y.npy", "--json", output)
        assert message.startswith("error: --json: ") and reason in message, message
    for output, reason in {"a.png": "is a folder", "file/o.png": "Not a directory", "/proc/o.png": "written"}.items():
        Path("a.png").mkdir(exist_ok=True)
        message = refused(capsys, "views", "--data", "digits", "--out", output)
        assert message.startswith("error: --out: ") and reason in message, message
    assert contents(folder) == before and not (folder / "new").exists()


@contextmanager
def without_rights(folder: Path):
    """As a user who may not enter the folder."""
    user = os.geteuid()
    folder.chmod(0)
    try:
        if user == 0:  # root may do anything
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_what_may_not_be_read_or_cannot_be_a_path_is_one_line(folder, capsys):
    os.symlink("loop", "loop")
    os.mkfifo("pipe.npy")
    Path("locked").mkdir()
    np.save("locked/z.npy", np.ones((3, 2)))
    with without_rights(folder / "locked"):
        for arguments in (
            ("align", "locked/z.npy", "y.npy"), ("align", "x.npy", "locked/z.npy"), ("align", "locked", "b"),
            ("align", "x.npy", "y.npy", "--json", "locked/new/o.json"), ("align", "a", "b", "--out", "locked/o.svg"),
            ("views", "--data", "digits", "--out", "locked/new/o.png"),
        ):  # fmt: skip
            assert "Permission denied" in refused(capsys, *arguments)
    for name, reason in {
        "n" * 300: "File name too long", "loop": "symbolic links", "x.npy/z.npy": "Not a directory", "z\0.npy": "null",
        "pipe.npy": "not a regular file", "absent\n.npy": "absent\\n.npy does not exist",
    }.items():  # fmt: skip
        for arguments in ((name, "y.npy"), ("y.npy", name)):
            assert reason in refused(capsys, "align", *arguments), arguments


def test_names_that_are_not_utf8_are_shown_escaped(folder, capsys):
    names = os.fsencode(folder) + b"/caf\xe9"
    os.rename("a", names)
    os.rename("photos/p", os.fsencode(folder) + b"/photos/caf\xe9")
    os.rename(os.path.join(LATIN, "l1.npy"), os.path.join(LATIN, LATIN + ".npy"))
    assert main(["align", LATIN, "b", "--json", "new/o.json", "--out", "o.svg"]) == 0
    text = Path("new/o.json").read_bytes().decode() + Path("o.svg").read_bytes().decode() + capsys.readouterr().out
    text.encode()  # no surrogate is left
    assert json.loads(Path("new/o.json").read_bytes())["layers_a"] == ["caf\\xe9", "l2"]
    assert "layers of caf\\xe9" in text and "caf\\xe9: " not in text
    assert main(["views", "--data", "folder:photos", "--out", f"{LATIN}.png", "--samples", "2", "--renderers",
                 "torchvision", "--size", "8"]) == 0  # fmt: skip
    assert Path(f"{LATIN}.png").stat().st_size and "contact sheet: caf\\xe9.png" in capsys.readouterr().out
    assert shown("a\nb\x1b[0m caf\u00e9") == "a\\nb\\x1b[0m caf\u00e9"


class Deaf(io.TextIOBase):
    """A terminal whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_align_writes_its_files_before_it_prints_and_prints_what_ascii_has(folder, monkeypatch, capsys):
    np.save("a/dead.npy", np.ones((12, 3)))
    plain = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    assert main(["align", "a", "b", "--json", "o.json"]) == 0
    plain.flush()
    assert plain.buffer.getvalue().decode("ascii").splitlines()[2].split() == ["dead", "-"]
    assert json.loads(Path("o.json").read_bytes())["cka_linear_debiased"][0] == [None]
    monkeypatch.setattr(sys, "stdout", Deaf())
    assert main(["align", "x.npy", "y.npy", "--json", "p.json"]) == 1
    assert json.loads(Path("p.json").read_bytes())["samples"] == 12
    monkeypatch.undo()
    os.chdir(folder)
    monkeypatch.setattr("fastcl.cli.align.write_atomic", lambda *_: write_atomic(folder / "x.npy" / "o.json", b""))
    assert main(["align", "x.npy", "y.npy", "--json", "q.json"]) == 1
    captured = capsys.readouterr()
    assert "linear CKA, biased" in captured.out and "cannot be written (" in captured.err  # the numbers are not lost


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / ("n" * 255)
    write_atomic(path, b"first")
    os.symlink(path, tmp_path / "link")
    write_atomic(tmp_path / "link", b"own")  # no link is followed
    assert path.read_bytes() == b"first" and (tmp_path / "link").read_bytes() == b"own"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()):

        def fails(_, error=error):
            raise error

        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(FastclError if isinstance(error, OSError) else KeyboardInterrupt):
            write_atomic(path, b"second")
    assert path.read_bytes() == b"first" and [p.name for p in path.parent.iterdir()] == [path.name]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_folders_for_results_are_checked(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    os.symlink("absent", tmp_path / "dangling")
    os.symlink("data", tmp_path / "link")
    for name, reason in {
        "file": "is a file", "dangling": "is a link to absent", "file/new": "Not a directory",
        "data": "is read by this command", "link": "is read", "n" * 256: "too long",
    }.items():  # fmt: skip
        with pytest.raises(FastclError, match=f"^--out: .*{reason}"):
            check_folder(tmp_path / name, "--out", [tmp_path / "data"])
    for name in ("link", "new/x", "data"):
        check_folder(tmp_path / name, "--out")
    assert not (tmp_path / "new").exists() and not list((tmp_path / "data").iterdir())
    check_output(tmp_path / "link" / "o.json", "--json", [tmp_path / "absent"])


@pytest.mark.parametrize("name", [
    "data.run", "data.decoder", "gpu.run", "gpu.repeat", "gpu.tune", "harness.ceilings", "losses.run",
    "similarity.run", "static.run", "training.run",
])  # fmt: skip
def test_every_benchmark_looks_at_its_outputs_first(name, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    more = {"gpu.run": ["--rehearse"], "gpu.repeat": ["--scale", "tiny"]}.get(name, [])
    bench = importlib.import_module(f"bench.{name}")
    for out, reason in (("", "the path is empty"), (str(tmp_path / "file" / "new"), "Not a directory")):
        with pytest.raises(SystemExit) as stop:
            bench.main(["--out", out, *more])
        assert stop.value.code == 2 and reason in capsys.readouterr().err
    if name in ("data.run", "data.decoder", "training.run"):
        for data, reason in (("", "the path is empty"), (str(tmp_path / "file"), "Not a directory")):
            with pytest.raises(SystemExit):
                bench.main(["--out", str(tmp_path), "--data", data, "--tiny"])
            assert reason in capsys.readouterr().err
    if name == "static.run":
        with pytest.raises(SystemExit):
            bench.main(["--json", str(tmp_path)])
        assert "--json: " in capsys.readouterr().err
    if name == "training.run":  # the folders of its runs are emptied
        with pytest.raises(SystemExit):
            bench.main(["--out", str(tmp_path), "--data", str(tmp_path / "runs" / "data"), "--tiny"])
        assert "--data lies there" in capsys.readouterr().err
