"""The static gate names what is wrong with a compiled kernel, lets a clean one pass, and finds the table clean.

Kernels are compiled in processes of their own: this one interprets them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from static_gate import WITNESSES, gate, run

from bench.gpu import tune
from bench.static import run as static
from bench.static.compile import Facts, Job, obstacle
from bench.static.jobs import StaticError, compile_all
from bench.static.report import FINDINGS, LIMITS, findings, launch_name, occupancy
from fastcl.kernels.common import launch

if reason := obstacle():
    pytest.skip(f"bench.static: {reason}", allow_module_level=True)

JOB = Job(".", "m", "some_kernel", {"x": "*fp16", "n": "i32"}, {}, ["x"], 90, 4, 3)


def names(record: dict) -> list[str]:
    return [finding["name"] for finding in record["findings"]]


@pytest.fixture(scope="module")
def witnesses(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict], Path]:
    """A run of the gate over the kernels with faults: the process, its records, the folder of its files."""
    folder = tmp_path_factory.mktemp("static")
    done = gate(
        "--cases", f"{WITNESSES}:cases", "--arch", "sm_80", "sm_90", "sm_100",
        "--json", str(folder / "records.json"), "--out", str(folder),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    return done, json.loads((folder / "records.json").read_text()), folder


def facts(**changes) -> Facts:
    clean = dict(
        registers=128, stack=0, local=0, shared=1024, tensor_memory=0, warps=4, dot=True,
        tensor={"HGMMA": 8, "HMMA": 0, "UTCMMA": 0}, register_operand=0, waits=2, broken=0, chained=6,
        messages=[], hazards=[], exponentials=32,
    )  # fmt: skip
    return Facts(**(clean | changes))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_each_witness_gives_the_finding_it_was_built_for_and_no_other(witnesses, arch):
    found = {r["cases"][0]: r for r in witnesses[1] if r["arch"] == arch}
    faults = ["spill", "shared", "tensor core", "compile"] + ["serialised"] * (arch == "sm_90")
    assert {case: names(r) for case, r in found.items()} == {"clean": []} | {fault: [fault] for fault in faults}
    clean = found["clean"]
    assert clean["exponentials_per_element"] == 1 and clean["programs_per_sm"] >= 2 and clean["stack"] == 0
    family = LIMITS[int(arch[3:])].tensor
    assert [name for name, count in clean["tensor"].items() if count] == [family]
    assert found["spill"]["stack"] >= 1000 and found["spill"]["local"] >= 500 and found["compile"]["registers"] is None
    assert found["shared"]["shared"] > LIMITS[int(arch[3:])].shared * 1024 and found["shared"]["programs_per_sm"] == 0


def test_serialised_wgmma_are_seen_in_the_code_as_well_as_in_the_words_of_ptxas(witnesses):
    hopper = {r["cases"][0]: r for r in witnesses[1] if r["arch"] == "sm_90"}
    serialised, clean = hopper["serialised"], hopper["clean"]
    assert serialised["broken"] == serialised["chained"] > 0 and serialised["waits"] == serialised["tensor"]["HGMMA"]
    assert "serialized" in serialised["messages"][0]
    assert clean["broken"] == 0 < clean["chained"] and clean["waits"] < clean["tensor"]["HGMMA"] / 2
    assert clean["register_operand"] == 4 and not clean["messages"]


def test_the_report_names_every_finding_and_goes_to_a_file_of_the_version(witnesses):
    done, records, folder = witnesses
    assert (folder / f"{records[0]['triton']}.md").read_text() == done.stdout
    assert f"{len(records)} launches, {sum(map(bool, map(names, records)))} with findings" in done.stdout
    lines = done.stdout.splitlines()
    for r in records:
        row = next(line for line in lines if line.startswith(f"| {launch_name(r)} | {r['cases'][0]} |"))
        assert row.endswith(f"| {', '.join(names(r)) or '-'} |")
        assert all(f"**{finding['name']}**: {finding['detail']}" in done.stdout for finding in r["findings"])


def test_arguments_are_specialised_as_at_run_time_and_equal_launches_are_one(tmp_path):
    done = gate("--cases", f"{WITNESSES}:kinds", "--arch", "sm_90", "--json", str(tmp_path / "records.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    (r,) = json.loads((tmp_path / "records.json").read_text())
    assert r["cases"] == ["every kind", "again"]
    pointers = "half *fp16 brain *bf16 single *fp32 double *fp64 ints *i32 longs *i64 bytes_ *i8 odd *fp32".split()
    assert r["signature"] == dict(zip(pointers[::2], pointers[1::2], strict=True)) | {
        "nothing": "constexpr", "one": "constexpr", "sixteen": "i32", "seventeen": "i32", "large": "i64",
        "real": "fp32", "flag": "u1", "bare": "constexpr", "sizes": "constexpr", "name": "constexpr",
        "rows": {"first": "*fp32", "second": "constexpr", "n": "i32"},
        "BLOCK": dict.fromkeys(("R", "EVEN", "nothing"), "constexpr"), "numbers": {"0": "constexpr", "1": "constexpr"},
    }  # fmt: skip
    assert r["constants"] == {
        "nothing": None, "one": 1, "bare": None, "sizes": [64, 128], "name": "fp16", "rows.second": None,
        "BLOCK.R": 64, "BLOCK.EVEN": True, "BLOCK.nothing": None, "numbers.0": 5, "numbers.1": 7,
    }  # fmt: skip
    assert r["divisible"] == "half brain single double ints longs bytes_ sixteen large rows.first rows.n".split()
    assert launch_name(r) == "arguments_kernel w4 s1 EVEN -nothing -bare -second"


@pytest.mark.parametrize(
    ("changes", "name", "detail"),
    [
        ({"stack": 8}, "spill", "8 bytes a thread, 0 instructions"),
        ({"local": 1}, "spill", "0 bytes a thread, 1 instructions"),
        ({"shared": 227 * 1024 + 1}, "shared", "232449 bytes, the limit is 232448"),
        ({"tensor_memory": 513}, "tensor memory", "513 columns, the limit is 512"),
        ({"tensor": {"HGMMA": 0, "HMMA": 64, "UTCMMA": 0}}, "tensor core", "no HGMMA; instead 64 HMMA"),
        ({"broken": 3}, "serialised", "2 waits, 8 HGMMA"),
        ({"messages": ["(C7510) Loss"]}, "serialised", "2 waits, 8 HGMMA; (C7510) Loss"),
        ({"hazards": ["0010 MOV", "0020 MOV"]}, "hazard", "0010 MOV; 0020 MOV"),
    ],
)
def test_every_fact_that_is_wrong_is_a_finding(changes, name, detail):
    assert not findings(JOB, facts())
    assert not findings(JOB, facts(shared=227 * 1024, broken=2, tensor_memory=512))
    (finding,) = findings(JOB, facts(**changes))
    assert (finding.name, finding.detail) == (name, detail) and name in FINDINGS


def test_a_kernel_without_a_product_needs_no_tensor_core():
    none = {"HGMMA": 0, "HMMA": 0, "UTCMMA": 0}
    assert not findings(JOB, facts(dot=False, tensor=none, chained=0))


def test_programs_per_multiprocessor_are_bounded_by_registers_memory_warps_and_tensor_memory():
    assert occupancy(facts(registers=128, warps=4), 90) == 4
    assert occupancy(facts(registers=129, warps=4), 90) == 3  # registers are handed out in eights
    assert occupancy(facts(registers=32, warps=4), 90) == 16 and occupancy(facts(registers=32, warps=4), 86) == 12
    assert occupancy(facts(registers=32, warps=1), 86) == 16 and occupancy(facts(registers=32, warps=1), 90) == 32
    assert occupancy(facts(registers=32, warps=8, shared=113 * 1024), 90) == 2
    assert occupancy(facts(registers=32, warps=8, shared=113 * 1024 + 1), 90) == 1
    assert occupancy(facts(registers=32, warps=4, tensor_memory=256), 100) == 2
    assert occupancy(facts(registers=255, warps=8), 90) == 1


def test_every_row_of_the_table_is_compiled():
    read = set()

    class Row(dict):
        def __getitem__(self, key):
            if key == "warps":  # of the row that was chosen
                read.add(tuple(self.values()))
            return super().__getitem__(key)

    rows = [Row(row) for row in launch._rows()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_rows", lambda: rows)
        launch.config.cache_clear()
        for sm in launch.ARCHITECTURES:
            assert [list(launches) for _, launches in static.load_cases(static.CASES)(sm)]
    launch.config.cache_clear()
    assert not [row for row in rows if tuple(row.values()) not in read]


def script(folder: Path, text: str) -> Path:
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_a_compiler_that_dies_is_a_result_and_the_next_job_gets_a_new_one(tmp_path):
    python = script(tmp_path, """echo '{"triton": "9.9"}'; read line; echo boom >&2; exit 3""")
    version, results = compile_all([JOB, JOB, JOB], str(python), 2)
    assert version == "9.9" and results == ["the compiler died (status 3): boom"] * 3
    assert [finding.name for finding in findings(JOB, results[0])] == ["compile"]


def test_the_newest_triton_is_installed_into_an_environment_and_compiles_there(tmp_path):
    (tmp_path / "bin").mkdir()
    log = tmp_path / "log"
    script(tmp_path / "bin", f'echo "$@" >> {log}; [ "$2" = pip ] && exit 0; exec {sys.executable} "$@"')
    done = gate("--cases", f"{WITNESSES}:kinds", "--arch", "sm_90", "--newest", str(tmp_path))
    assert done.returncode == 0, done.stderr
    install, compile_ = log.read_text().splitlines()
    assert install.startswith("-m pip install") and install.endswith("--upgrade triton")
    assert compile_ == "-m bench.static.compile"
    script(tmp_path / "bin", "exit 1")
    done = gate("--cases", f"{WITNESSES}:kinds", "--arch", "sm_90", "--newest", str(tmp_path))
    assert done.returncode == 2 and "pip could not install triton" in done.stderr


def test_an_old_triton_is_refused_by_its_version(tmp_path, monkeypatch, capsys):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("__version__ = '3.2.0'")
    old = script(tmp_path, f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    with pytest.raises(StaticError, match=r"Triton 3\.5 or newer is needed, .* this is 3\.2\.0$"):
        compile_all([JOB], str(old), 1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delattr(triton, "knobs")  # which came with Triton 3.4
    monkeypatch.setitem(sys.modules, "triton.knobs", None)
    assert static.main(["--arch", "sm_90"]) == 2
    assert f"Triton 3.5 or newer is needed, the first that tells what ptxas said; this is {triton.__version__}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(static, []), (static, ["--predict"]), (tune, ["--predict", "forward", "none", "128"])],
)
def test_kernels_are_not_interpreted(command, arguments, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--triton-python", "no-such-python"], "no-such-python is no program"),
        (["--arch", "sm_75"], "invalid choice: 'sm_75'"),
        (["--workers", "0"], "must be at least 1, got 0"),
        (["--only", "["], "--only: '[' is no regular expression: unterminated character set"),
        (["--cases", "json:nothing"], "--cases json:nothing: module 'json' has no attribute 'nothing'"),
        (["--cases", "nowhere:cases"], "No module named 'nowhere'"),
        (["--cases", "nowhere"], "--cases nowhere: "),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    try:
        status = static.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


def test_what_cannot_be_compiled_is_said_in_a_line(tmp_path):
    bare = script(tmp_path, f'exec {sys.executable} -S "$@"')
    refused = {
        ("kinds", "--triton-python", str(bare)): "cannot compile: ModuleNotFoundError: No module named 'triton'",
        ("kinds", "--triton-python", "echo"): "echo cannot compile: it said nothing",
        ("unfit", "--only", "constant"): "spills_kernel: constant BLOCK is 1j",
        ("unfit", "--only", "missing"): "missing 1 required positional argument: 'BLOCK'",
        ("unfit", "--only", "surplus"): "spills_kernel has no parameter SIZE",
        ("unfit", "--only", "nothing"): "no case has a launch to compile",
    }
    # One process for all: it takes seconds to start.
    calls = [["--arch", "sm_90", "--cases", f"{WITNESSES}:{cases}", *rest] for cases, *rest in refused]
    driver = (
        "import json, sys; from bench.static.run import main; print([main(call) for call in json.loads(sys.argv[1])])"
    )
    done = run("-c", driver, json.dumps(calls))
    assert done.stdout == f"{[2] * len(calls)}\n", done.stderr
    lines = done.stderr.splitlines()
    assert all(message in line for message, line in zip(refused.values(), lines, strict=True)), lines
