"""What the static gate takes from Triton's cache is what it would find anew."""

import json

import pytest
from static_gate import WITNESSES, gate

from bench.static.compile import obstacle

if reason := obstacle():
    pytest.skip(f"bench.static: {reason}", allow_module_level=True)


def test_a_kernel_that_another_program_left_in_the_cache_is_judged_by_the_words_of_ptxas_too(tmp_path):
    found = []
    for _ in range(2):
        arguments = ("--cases", f"{WITNESSES}:serialised", "--arch", "sm_90", "--json", str(tmp_path / "records.json"))
        done = gate(*arguments, TRITON_CACHE_DIR=str(tmp_path / "cache"))
        assert done.returncode == 1, done.stderr
        found += json.loads((tmp_path / "records.json").read_text())
        logs = list((tmp_path / "cache").rglob("ptxas.log"))
        assert len(logs) == 1
        for path in (*logs, *(tmp_path / "cache").rglob("facts-*.json")):
            path.unlink()
    assert found[0] == found[1] and found[0]["messages"]


def test_facts_in_the_cache_are_those_of_this_code(tmp_path):
    out = tmp_path / "records.json"

    def registers() -> int:
        arguments = ("--cases", f"{WITNESSES}:serialised", "--arch", "sm_90", "--json", str(out))
        gate(*arguments, TRITON_CACHE_DIR=str(tmp_path / "cache"))
        return json.loads(out.read_text())[0]["registers"]

    first = registers()
    (facts,) = (tmp_path / "cache").rglob("facts-*.json")
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"registers": 7}))
    assert registers() == 7
    facts.rename(facts.with_name("facts-of-other-code.json"))
    assert registers() == first
