"""The launches of the table against committed facts about them: all are clean, and the facts are true."""

import json
import random
import sys
from pathlib import Path

import pytest
import triton
from static_gate import gate, run

from bench.static import known
from bench.static import run as static
from bench.static.compile import Facts, Job, obstacle

if reason := obstacle():
    pytest.skip(f"bench.static: {reason}", allow_module_level=True)

JOB = Job("", "kernels.some", "some_kernel", {"x": "*fp16", "n": "i32"}, {}, ["x"], 90, 4, 3)
FACTS = Facts(128, 0, 0, 1024, 0, 4, True, {"HGMMA": 8}, 0, 2, 0, 6, [], [], 32)


@pytest.mark.slow
def test_the_table_is_clean(tmp_path):
    done = gate("--gate", "--json", str(tmp_path / "records.json"))
    assert done.returncode == 0, done.stdout.partition("## Findings")[2] + done.stderr
    records = json.loads((tmp_path / "records.json").read_text())
    for arch in (80, 86, 89, 90, 100, 120):
        own = [r for r in records if r["arch"] == f"sm_{arch}"]
        assert len(own) > 20 and not any(r["findings"] for r in own)
        products = {r["kernel"] for r in own if r["dot"]}
        assert products >= {"forward_kernel", "backward_kernel", "pair_weights_kernel", "product_kernel", "twin_kernel"}


@pytest.mark.slow
def test_committed_facts_are_what_the_compiler_gives():
    committed = known.load(triton.__version__)
    if not committed:
        pytest.skip(f"no facts are committed for Triton {triton.__version__}")
    # Others with every change of a kernel, the same in every run.
    chosen = random.Random(min(committed)).sample(sorted(committed), 6)
    driver = """if True:
        import json, sys, triton
        from dataclasses import asdict
        from bench.static import known, run
        keys = {known.key(job, triton.__version__): job for job, _ in run.find(run.load_cases(run.CASES), known.GATED)}
        chosen = {name: keys[name] for name in sys.argv[1:]}
        found, _ = run.compiled(list(chosen.values()), sys.executable, 2)
        print(json.dumps([len(keys), {name: asdict(one) for name, one in zip(chosen, found, strict=True)}]))
    """
    done = run("-c", driver, *chosen)
    assert done.returncode == 0, done.stderr
    launches, found = json.loads(done.stdout)
    assert launches == len(committed)  # nothing is committed that is not in the table
    assert {name: Facts(**facts) for name, facts in found.items()} == {name: committed[name] for name in chosen}


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "some.py").write_text("from .other import TWO\ndef f(x):\n    return x * TWO\n")
    (tmp_path / "kernels" / "other.py").write_text("TWO = 2\n")
    return tmp_path


def key_in(root: Path, **changes) -> str:
    known.plain.cache_clear()
    known.code.cache_clear()
    return known.key(Job(**vars(JOB) | {"root": str(root)} | changes), "3.8.0")


@pytest.mark.parametrize(
    ("file", "text", "differs"),
    [
        (
            "some",
            '"""Doc."""\n\nfrom .other import TWO\n\n\ndef f(x):  # why\n    return x * TWO\n',
            False,
        ),
        ("some", "from .other import TWO\ndef f(x):\n    return TWO * x\n", True),
        ("other", "# two\nTWO = 2\n", False),
        ("other", "TWO = 3\n", True),
    ],
)
def test_a_launch_is_known_by_its_code_and_that_of_all_it_imports(root, file, text, differs):
    before = key_in(root)
    (root / "kernels" / f"{file}.py").write_text(text)
    assert (key_in(root) != before) == differs


def test_a_launch_is_known_by_its_arguments_and_compiler_not_by_its_folder(root):
    before = key_in(root)
    changes = {"warps": 8, "stages": 2, "arch": 80, "constants": {"BLOCK": 64}, "divisible": [], "kernel": "other"}
    others = {key_in(root, **{name: value}) for name, value in changes.items()}
    assert len(others | {before, known.key(JOB, "3.9.0")}) == len(changes) + 2
    moved = root / "moved"
    (root / "kernels").rename(moved.with_name("kept"))
    moved.mkdir()
    (root / "kept").rename(moved / "kernels")
    assert key_in(moved) == before


def test_only_what_is_not_committed_is_compiled(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(known, "RESULTS", tmp_path)
    jobs = [Job(**vars(JOB) | {"root": str(root), "warps": warps}) for warps in (1, 2, 4)]
    asked = []

    def compiled(jobs, python, workers):
        asked.extend(job.warps for job in jobs)
        return [FACTS if job.warps < 4 else "does not compile" for job in jobs], triton.__version__

    monkeypatch.setattr(static, "compiled", compiled)
    for expected in ([1, 2, 4], [4]):
        facts, version = static.changed(jobs, sys.executable, 1)
        assert (facts, asked) == ([FACTS, FACTS, "does not compile"], expected)
        assert f"{len(expected)} of 3 launches differ from those committed" in capsys.readouterr().err
        known.save(version, jobs, facts, "")
        asked.clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "--only", "ntxent"], "--gate has launches and a compiler of its own, so --only has no effect"),
        (["--gate", "--triton-python", "python3"], "so --triton-python has no effect"),
        (["--accept"], "--accept is for --gate"),
    ],
)
def test_what_the_gate_cannot_combine_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="2"):
        static.main(arguments)
    assert message in capsys.readouterr().err
