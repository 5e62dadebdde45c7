"""Signals end a command with one line and a fitting status, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from tiny_run import ROOT, start, tiny_toml

from fastcl import interrupts
from fastcl.cli.main import main

LINES = {"SIGINT": "interrupted\n", "SIGTERM": "ended by SIGTERM\n", "SIGHUP": "ended by SIGHUP\n"}
# The module alone: a process that loads torch takes seconds to start.
HEAD = f"""
import importlib.util, os, signal, sys, time
spec = importlib.util.spec_from_file_location("interrupts", {str(ROOT / "fastcl" / "interrupts.py")!r})
interrupts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interrupts)
interrupts.install()

def work():  # not one long sleep: a signal just before it begins is answered only when it ends
    for _ in range(600): time.sleep(0.1)
"""
READY = 'print("ready", flush=True)\n'
SLEEP = READY + "work()\n"


def launch(code: str, *arguments: str, **options) -> subprocess.Popen:
    """A process in a group of its own, once it has said that it is ready."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    process = subprocess.Popen([sys.executable, "-c", HEAD + code, *arguments], start_new_session=True, **options)
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen, name: str, times: int = 1) -> tuple[int, str]:
    """Status and stderr after a signal to the whole group, as a terminal sends it."""
    for _ in range(times):
        try:
            os.killpg(process.pid, getattr(signal, name))
        except ProcessLookupError:
            break
    _, error = process.communicate(timeout=60)
    return process.returncode, error


MOMENTS = {
    "at work": SLEEP,
    "in an import": "import builtins\nbuiltins.__import__ = lambda *_: work()\n" + READY + "import json\n",
    "in a finaliser": f"class A:\n def __del__(self):\n  {READY}  work()\nA()\n",
    "in a callback": f"import weakref\nclass A: pass\ndef call(_):\n {READY} work()\na = A()\n"
                     "b = weakref.ref(a, call)\ndel a\n",
    "where all is caught": READY + "while True:\n try: work()\n except BaseException: pass\n",
    "at exit": f"import atexit\n@atexit.register\ndef late():\n {READY} work()\n",
    "with children": "import multiprocessing\nfork = multiprocessing.get_context('fork')\n"
                     "for _ in range(3): fork.Process(target=time.sleep, args=(60,), daemon=True).start()\n" + SLEEP,
}  # fmt: skip


def ends(child: int) -> bool:
    """Whether a process ends within ten seconds; it is killed if it does not."""
    for _ in range(1000):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return True
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return False


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("times", (1, 2))
def test_one_line_and_a_status_at_any_moment(moment, times):
    for name, said in LINES.items():
        assert end(launch(MOMENTS[moment]), name, times) == (128 + getattr(signal, name), said)


def test_a_run_says_how_it_goes_on():
    more = "; the same command resumes from the last checkpoint\n"
    assert end(launch(SLEEP, "train"), "SIGINT") == (130, "interrupted" + more)
    assert end(launch(SLEEP, "report"), "SIGINT") == (130, "interrupted\n")


def test_the_cause_of_another_process_is_told_with_the_signal_that_followed():
    code = "interrupts.watch(lambda word: f'another was {word}')\n" + SLEEP
    said = {name: line.removesuffix("\n") for name, line in LINES.items()}
    said["SIGTERM"] += " (another was ended by SIGTERM)"
    for name, line in said.items():
        assert end(launch(code), name) == (128 + getattr(signal, name), f"{line}\n")


def test_ignored_signals_stay_ignored():
    """nohup ignores SIGHUP, a shell SIGINT of what it runs in the background."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = launch(READY + "sys.stdin.readline()\nprint('alive', flush=True)\nwork()\n",
                     preexec_fn=ignore, stdin=subprocess.PIPE)  # fmt: skip
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "alive\n"
    assert end(process, "SIGTERM") == (143, LINES["SIGTERM"])


def test_incomplete_files_go_and_children_end_at_once(tmp_path):
    code = """
import multiprocessing, pathlib
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
child.start()
pathlib.Path(sys.argv[1], "pid").write_text(str(child.pid))
path = pathlib.Path(sys.argv[1], "part")
path.write_text("half")
with interrupts.removing(pathlib.Path(sys.argv[1], "done")): pathlib.Path(sys.argv[1], "done").write_text("whole")
with interrupts.removing(path):
    print("ready", flush=True)
    work()
"""
    process = launch(code, str(tmp_path))
    process.terminate()  # this process alone
    assert process.wait(timeout=60) == 143
    child = int((tmp_path / "pid").read_text())
    assert ends(child), "the child lives on"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "pid"]
    process.communicate()


def test_a_forked_child_says_nothing(tmp_path):
    code = """
child = os.fork()
if not child:
    os._exit((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) != (signal.SIG_IGN, signal.SIG_DFL))
print("ready", flush=True)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    process = launch(code)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0


def test_a_reader_that_has_stopped_reading_does_not_keep_the_process():
    fill = "os.set_blocking(2, False)\ntry:\n while True: os.write(2, b'x' * 4096)\nexcept BlockingIOError: pass\n"
    process = launch(fill + "os.set_blocking(2, True)\n" + SLEEP)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_the_command_itself(name, tmp_path):
    """While torch is imported, and in training with worker processes."""
    number = getattr(signal, name)
    early = start("doctor", start_new_session=True)
    maps = Path(f"/proc/{early.pid}/maps")
    while early.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.005)
    assert end_of(early, number) == (128 + number, LINES[name])
    more = "; the same command resumes from the last checkpoint"
    settings = ["--set", "data.workers=2", "--set", "train.epochs=200", "--set", 'train.models=["dcl"]']
    late = start("train", tiny_toml(tmp_path / "c.toml"), "--out", tmp_path / "run", *settings, start_new_session=True)
    while late.poll() is None and not (tmp_path / "run" / "steps.jsonl").exists():
        time.sleep(0.01)
    status, output = end_of(late, number)
    assert status == 128 + number and output.endswith(LINES[name].strip() + more + "\n"), output
    assert "Traceback" not in output and "Exception ignored" not in output


def end_of(process: subprocess.Popen, number: int) -> tuple[int, str]:
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def test_a_signal_after_the_command_leaves_its_status():
    """While modules are cleared Python has put its own handlers back, but for signals that are ignored."""
    code = ("class A:\n def __del__(self, say=print, sleep=time.sleep):\n"
            "  say('ready', flush=True); sleep(0.3)\na = A()\ninterrupts.finish()\nsys.exit(1)\n")  # fmt: skip
    assert end(launch(code, "align"), "SIGINT") == (1, "")


def test_a_command_of_its_own_process_finishes(monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "argv", ["fastcl", "--version"])
    for name in ("install", "finish"):
        monkeypatch.setattr(interrupts, name, partial(calls.append, name))
    with pytest.raises(SystemExit):
        main()
    assert calls == ["install", "finish"]


def test_processes_begun_by_a_command_end_with_it(tmp_path):
    """Even if the signal comes while one is being started, whose id is not known yet."""
    code = """
import subprocess, pathlib
def begin():
    child = subprocess.Popen(["sh", "-c", "sleep 60 & echo $! > $0; wait", sys.argv[1]], start_new_session=True)
    if sys.argv[2] == "early":
        print("ready", flush=True)
        for _ in range(600): time.sleep(0.1) if not interrupts._late else None
    while not (path.exists() and path.read_text()): time.sleep(0.01)
    return child
path = pathlib.Path(sys.argv[1])
other = interrupts.started(lambda: subprocess.Popen(["true"], start_new_session=True))
other.wait()
interrupts.ended(other)
interrupts.started(begin)
print("ready", flush=True)
work()
"""
    for moment in ("early", "late"):
        path = tmp_path / moment
        assert end(launch(code, str(path), moment), "SIGTERM") == (143, LINES["SIGTERM"])
        child = int(path.read_text())
        assert ends(child), "the child of a child lives on"
