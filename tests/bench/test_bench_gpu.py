"""The one command for a GPU, on steps that take no GPU: what is run, what becomes of it, what is written."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch

from bench.gpu import predicted, repeat, workload
from bench.gpu import run as gpu
from bench.gpu.plan import PARTS, Step, plan

ROOT = Path(__file__).resolve().parents[2]


def code(text: str) -> tuple[str, str]:
    return "-c", text


def run(tmp_path: Path, monkeypatch, *steps: Step, minutes: float = 8) -> tuple[int, list[dict]]:
    monkeypatch.setattr(gpu, "plan", lambda out, part, rehearse: list(steps))
    status = gpu.main(["--out", str(tmp_path), "--rehearse", "--minutes", str(minutes), "--parts", "losses"])
    return status, json.loads((tmp_path / "gpu.json").read_text())["steps"]


def test_a_failing_step_is_told_and_the_next_one_runs(tmp_path, monkeypatch):
    steps = (
        Step("first", code("print('seen'); import sys; sys.exit(3)"), 60),
        Step("second", code("import os; print(os.environ['TRITON_INTERPRET'], os.environ['X'])"), 60, {"X": "own"}),
        Step("third", ("--version",), 60, tool="no-such-tool"),
    )
    status, found = run(tmp_path, monkeypatch, *steps)
    assert status == 1
    assert [(s["status"], s["exit_code"], s["reason"]) for s in found] == [
        ("failed", 3, "exit status 3"), ("ok", 0, None),
        ("not run", None, "no-such-tool is neither on PATH nor under CUDA_HOME"),
    ]  # fmt: skip
    assert (tmp_path / "second.log").read_text() == "1 own\n" and found[2]["command"] == "no-such-tool --version"
    text = (tmp_path / "gpu.md").read_text()
    assert "## first\n\n```\nseen\n```" in text and "| second | ok |" in text and "## second" not in text


def test_what_could_not_run_is_no_failure(tmp_path, monkeypatch):
    steps = Step("a", code(""), 60), Step("b", (), 60, tool="no-such-tool")
    assert run(tmp_path, monkeypatch, *steps)[0] == 0


def test_a_step_that_takes_too_long_is_interrupted_and_keeps_its_log(tmp_path, monkeypatch):
    slow = """if True:
        import time
        try:
            print("begun", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("wrote what it had")
    """
    status, found = run(tmp_path, monkeypatch, Step("slow", code(slow), 3), Step("next", code(""), 60))
    assert status == 1 and [s["status"] for s in found] == ["timed out", "ok"]
    assert found[0]["reason"] == "more than 3 s" and found[0]["seconds"] < 30
    assert (tmp_path / "slow.log").read_text() == "begun\nwrote what it had\n"


def test_a_step_that_ignores_the_interrupt_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    status, found = run(tmp_path, monkeypatch, Step("slow", code(stubborn), 3))
    assert (status, found[0]["status"], found[0]["exit_code"]) == (1, "timed out", -9)
    assert (tmp_path / "slow.log").read_text() == "1\n"


def test_an_interrupted_step_is_recorded(tmp_path, monkeypatch, capsys):
    pressed = "import os, signal, time; print(1, flush=True); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    status, found = run(tmp_path, monkeypatch, Step("a", code(""), 60), Step("b", code(pressed), 60), Step("c", (), 60))
    assert status == 130 and [(s["step"], s["status"]) for s in found] == [("a", "ok"), ("b", "interrupted")]
    assert found[1]["exit_code"] != 0 and found[1]["seconds"] < 30
    assert "| b | interrupted |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert capsys.readouterr().err == "interrupted; the files hold the steps up to this one\n"


def test_a_second_interrupt_kills_the_step(tmp_path, monkeypatch):
    twice = """if True:
        import os, signal, time
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getppid(), signal.SIGINT))
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
        time.sleep(60)
    """
    status, found = run(tmp_path, monkeypatch, Step("stubborn", code(twice), 60))
    assert status == 130 and found[0]["status"] == "interrupted" and found[0]["exit_code"] == -9
    assert found[0]["seconds"] < gpu.GRACE


def test_a_log_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "a.log").symlink_to(tmp_path / "mine")
    assert run(tmp_path, monkeypatch, Step("a", code("print(1)"), 60))[0] == 0
    assert (tmp_path / "mine").read_text() == "precious" and (tmp_path / "a.log").read_text() == "1\n"


def test_a_step_ends_by_its_place_in_the_timetable(tmp_path, monkeypatch):
    clock, takes, limits = 0.0, {"quick": 10, "slow": 95, "late": 0}, {}

    def run_step(step, out, limit, environment):
        nonlocal clock
        clock += takes[step.name]
        limits[step.name] = limit
        return gpu.Outcome(step.name, "", "ok", None, 0, takes[step.name], limit)

    monkeypatch.setattr(gpu, "perf_counter", lambda: clock)
    monkeypatch.setattr(gpu, "run_step", run_step)
    # Shares of 8 minutes, of which there are 4: what the first leaves goes to the second, which overruns.
    run(tmp_path, monkeypatch, Step("quick", (), 100), Step("slow", (), 60), Step("late", (), 20), minutes=4)
    assert limits == {"quick": 50, "slow": 80 - 10, "late": 90 - 105}


@pytest.mark.parametrize("limit", [-1.0, 0.0])
def test_a_step_without_time_does_not_run(tmp_path, limit):
    outcome = gpu.run_step(Step("late", code(""), 60), tmp_path, limit, {})
    assert (outcome.status, outcome.reason, outcome.exit_code) == ("timed out", "no time was left", None)
    assert not (tmp_path / "late.log").exists()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_make_no_timetable_are_refused(tmp_path, capsys, minutes):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "x"), "--rehearse", "--minutes", minutes])
    assert "--minutes: must be positive and finite" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_on_a_card_nothing_is_interpreted_and_an_older_report_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda device: {"device": device.type, "versions": {}, "date": ""})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "gpu.json").write_text("old")
    seen = []

    def run_step(step, out, limit, environment):
        seen.append((json.loads((out / "gpu.json").read_text())["steps"], environment.get("TRITON_INTERPRET")))
        return gpu.Outcome(step.name, "", "timed out", "no time was left", None, 0, limit)

    monkeypatch.setattr(gpu, "run_step", run_step)
    monkeypatch.setattr(gpu, "plan", lambda *_: [Step("only", (), 60)])
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert seen == [([], None)]


def test_measured_times_stand_beside_predicted_ones(tmp_path, monkeypatch):
    def timed(provider: str, n: int, ms: float | None) -> dict:
        case = {"objective": "ntxent", "n": n, "d": 128, "precision": "fp16", "pass": "both"}
        return case | {"provider": provider, "gpu_ms": ms}

    model = [timed("", n, None) | {"predicted_ms": 2.0, "triton": "3.8.0"} for n in (512, 4096, 65536)]
    measured = [
        timed("fastcl fp16", 512, 2.5), timed("fastcl fp16", 4096, 3.0), timed("fastcl fp16", 65536, 1.5),
        timed("plain PyTorch", 512, 9.0), timed("fastcl fp16", 1024, 9.0), timed("fastcl fp16", 512, None),
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(predicted, "committed", lambda arch: model if arch == 90 else [])
    assert predicted.section(tmp_path) == ""
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "losses.json").write_text(json.dumps(measured))
    text = predicted.section(tmp_path)
    assert text.count("ntxent") == 3 and "Triton 3.8.0" in text
    for words in (
        "| 512 | both | 2 | 2.5 | 1.25 |  |", "| 4,096 | both | 2 | 3 | 1.50 | slower than predicted |",
        "| 65,536 | both | 2 | 1.5 | 0.75 | faster than predicted |",
    ):  # fmt: skip
        assert words in text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert predicted.section(tmp_path) == ""


def test_by_default_the_losses_alone_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "plan", lambda out, part, rehearse: asked.append((part, rehearse)) or [])
    for arguments in ([], ["--parts", "training", "losses", "training"]):
        assert gpu.main(["--out", str(tmp_path), "--rehearse", *arguments]) == 0
    assert asked == [("losses", True), ("training", True), ("losses", True)]


def test_paths_of_the_machine_stay_out_of_the_report(tmp_path, monkeypatch):
    steps = Step("bad", code(f"import sys; print({str(tmp_path)!r}, {str(ROOT)!r}, sys.prefix); sys.exit(1)"), 60)
    found = run(tmp_path, monkeypatch, steps)[1]
    text = (tmp_path / "gpu.md").read_text()
    assert "DIR . PREFIX" in text.replace("./.venv", "PREFIX")
    assert str(tmp_path) not in text and str(tmp_path) not in found[0]["command"]


def test_a_part_is_planned_under_eight_minutes(tmp_path):
    for part in PARTS:
        assert sum(step.seconds for step in plan(tmp_path, part, False)) <= 8 * 60 - gpu.GRACE, part


def test_a_rehearsal_has_the_same_steps_and_every_command_is_known(tmp_path, capsys):
    real, tiny = ([s for part in PARTS for s in plan(tmp_path, part, rehearse)] for rehearse in (False, True))
    assert [s.name for s in real] == [s.name for s in tiny] and len({s.name for s in real}) == len(real)
    assert [s.environment for s in real] == [s.environment for s in tiny]
    assert [s.tool for s in real] == [s.tool for s in tiny]
    for step in real:
        if step.tool is None and step.command[1] != "pytest":
            options = {part for part in step.command[2:] if part.startswith("--")}
            name = step.command[1]
            package = importlib.util.find_spec(name).submodule_search_locations is not None
            with pytest.raises(SystemExit):
                importlib.import_module(f"{name}.run" if package else name).main(["--help"])
            known = capsys.readouterr().out
            assert options and all(option in known for option in options), step
    (tests,) = (step for step in real if step.name == "tests")
    assert tests.command[tests.command.index("-m", 1) + 1] == "gpu" and "tests/rowstats/test_gpu.py" in tests.command


def test_a_tool_is_found_below_the_folder_of_cuda(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert gpu.find_tool("compute-sanitizer") is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.find_tool("compute-sanitizer") == str(program)


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "torch finds no CUDA device; --rehearse runs without one" in capsys.readouterr().err


def fake_cases(monkeypatch, forward) -> None:
    z = torch.ones(3).requires_grad_()
    made = [workload.Case("sum fp32", lambda: forward(z), z)]
    for module in (workload, repeat):
        monkeypatch.setattr(module, "cases", lambda scale, device: iter(made))


def test_bits_that_differ_between_runs_are_found(monkeypatch, tmp_path):
    counted = iter(range(100))
    fake_cases(monkeypatch, lambda z: z.sum() * (1 + 2**-20 * next(counted)))
    other = subprocess.CompletedProcess([], 0, json.dumps({"sum fp32": "another"}))
    monkeypatch.setattr(repeat.subprocess, "run", lambda *args, **options: other)
    assert repeat.main(["--scale", "tiny", "--out", str(tmp_path)]) == 1
    found = {r["check"]: r["passed"] for r in json.loads((tmp_path / "repeat.json").read_text())}
    assert found["two runs"] is found["two processes"] is False
    assert "| sum fp32 | two runs | FAILED |" in (tmp_path / "repeat.md").read_text()


def test_the_same_bits_pass_and_their_digests_can_be_printed(monkeypatch, tmp_path, capsys):
    fake_cases(monkeypatch, lambda z: (z * z).sum())
    assert repeat.main(["--scale", "tiny"]) == 0
    printed = capsys.readouterr().out
    other = subprocess.CompletedProcess([], 0, f"a warning\n{printed}")
    monkeypatch.setattr(repeat.subprocess, "run", lambda *args, **options: other)
    assert repeat.main(["--scale", "tiny", "--out", str(tmp_path)]) == 0
    found = {r["check"]: r["passed"] for r in json.loads((tmp_path / "repeat.json").read_text())}
    assert found["two runs"] is found["two processes"] is True


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (float("nan"), 1)])
def test_the_workload_fails_where_a_gradient_is_not_finite(monkeypatch, capsys, value, status):
    fake_cases(monkeypatch, lambda z: (z * value).sum())
    assert workload.main(["--scale", "tiny"]) == status
    assert ("NOT FINITE" in capsys.readouterr().out) == status
