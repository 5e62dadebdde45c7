"""The command line where its streams, its arguments or its installation are not as they should be."""

import builtins
import io
import sys

import numpy as np
import pytest
from tiny_run import run

from fastcl.cli import main as cli
from fastcl.cli.main import main
from fastcl.errors import FastclError


class _AsciiTerminal(io.TextIOWrapper):
    """Standard output where letters beyond ASCII cannot be written."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")

    def text(self) -> str:
        return self.buffer.getvalue().decode("ascii")


def test_letters_that_a_terminal_lacks_are_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := _AsciiTerminal())
    monkeypatch.setitem(cli._RUN, "doctor", lambda _: print("caf\u00e9 \u2013 \udce9"))
    assert main(["doctor"]) == 0
    assert terminal.text() == "caf\\xe9 \\u2013 \\udce9\n"


@pytest.mark.parametrize("command", ["", "demo", "train", "config", "align", "report", "views", "doctor"])
def test_help_on_an_ascii_terminal(command, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := _AsciiTerminal())
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0 and len(terminal.text()) > 200


def test_an_ascii_locale_costs_no_result(tmp_path, monkeypatch):
    """Layers that are undefined are shown as a dash that ASCII has not."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", first=rng.normal(size=(20, 3)), dead=np.ones((20, 3)))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("align", tmp_path / "a.npz", tmp_path / "a.npz", "--json", tmp_path / "o.json")
    assert done.returncode == 0 and (tmp_path / "o.json").exists() and "Traceback" not in done.stdout, done.stdout
    with open("/dev/full", "w") as full:
        failed = run("align", tmp_path / "a.npz", tmp_path / "a.npz", output=full)
    assert failed.returncode == 1


@pytest.mark.parametrize("arguments", (
    ["train", "", "--out", "x"], ["train", "c.toml", "--out", ""], ["demo", "--out", ""], ["report", ""],
    ["report", "x", "--out", ""], ["align", "", "b"], ["align", "a", "b", "--json", ""],
    ["align", "a", "b", "--out", ""], ["views", "--data", "digits", "--out", ""],
))  # fmt: skip
def test_empty_paths_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "the path is empty" in capsys.readouterr().err


def test_the_config_is_no_folder_of_a_run(tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text("[train]\nepochs = 1\n")
    assert main(["train", str(config), "--out", str(config)]) == 1
    assert "c.toml is a file; choose a folder" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    inside = config.rename(tmp_path / "run" / "layers.json")
    assert main(["train", str(inside), "--out", str(tmp_path / "run")]) == 1
    assert f"the run would overwrite {inside}" in capsys.readouterr().err
    assert inside.read_text() == "[train]\nepochs = 1\n"


def failing(monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setitem(cli._RUN, "doctor", fail)


@pytest.mark.parametrize("error, message", (
    (ModuleNotFoundError("No module named 'timm'", name="timm"),
     "no module timm; in a checkout: pip install '.[train]'; from a wheel: pip install 'FILE.whl[train]'"),
    (ModuleNotFoundError("No module named 'PIL.Image'", name="PIL.Image"), "no module PIL.Image; in a checkout"),
    (ModuleNotFoundError("No module named 'importlib.readers'", name="importlib.readers"),
     "Python's own module importlib.readers cannot be loaded (No module named 'importlib.readers'); check that it is"),
    (ModuleNotFoundError("No module named 'fastcl.train'", name="fastcl.train"), "fastcl itself cannot be loaded (No"),
    (ModuleNotFoundError("No module named 'httpx'", name="httpx"), "module httpx cannot be loaded"),
    (ImportError("libx.so: cannot open shared object file"), "a module cannot be loaded (libx.so: cannot open"),
    (ImportError("libjpeg.so: cannot open", name="PIL._imaging"), "module PIL._imaging cannot be loaded (libjpeg.so"),
    (PermissionError(13, "Permission denied", "/x/caf\udce9.py"),
     "cannot read or write /x/caf\\xe9.py: Permission denied"),
    (OSError(24, "Too many open files"), "cannot read or write a file: Too many open files"),
    (TimeoutError("timed\nout"), "TimeoutError: timed\\nout"),
    (ConnectionRefusedError(111, "Connection refused"), "ConnectionRefusedError: [Errno 111] Connection refused"),
    (OSError(28, "No space left on device"), "cannot read or write standard output: No space left on device"),
    (FastclError("bad \udce9"), "bad \\xe9"),
))  # fmt: skip
def test_what_fails_around_a_command_is_one_line(error, message, capsys, monkeypatch):
    failing(monkeypatch, error)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which may be given up
    assert main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1, said


def test_an_interrupt_of_a_call_is_a_status(capsys, monkeypatch):
    """A program that calls main keeps its own signals."""
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["doctor"]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    failing(monkeypatch, builtins.KeyError("x"))
    with pytest.raises(KeyError):
        main(["doctor"])
