"""The file of an evaluation: what goes in comes back, and what is not one is refused."""

import json

import pytest
import torch

from fastcl import FastclError
from fastcl.evaluation import ProbeSettings, evaluate
from fastcl.evaluation.comparison import accuracy_rows, remarks
from fastcl.evaluation.record import ModelRecord, read_record, write_record


@pytest.fixture(scope="module")
def found():
    """Of 12 rows; label 5 is not among the training rows."""
    x, y = torch.arange(24.0).reshape(12, 2).sin(), torch.arange(12) % 3
    return evaluate(x, y, x, torch.cat([y[:11], torch.tensor([5])]), settings=ProbeSettings(k=(2,), repeats=1))


def test_a_record_comes_back(found, tmp_path):
    path = tmp_path / "new" / "evaluation.json"
    assert read_record(path) is None
    models = {"a": ModelRecord("digest", found, {"ncc": {}}, 3), "b": ModelRecord("other", found)}
    write_record(path, models)
    assert read_record(path) == models and found.few_shot[0].test.interval is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: tree.update(version=2), "is not an evaluation that this version can read; remove it"),
        (lambda tree: tree.update(models=[1]), "is not an evaluation"),
        (lambda tree: tree["models"].update(a=3), "models.a must be a table, got 3"),
        (lambda tree: tree["models"]["a"].update(epoch="x"), "models.a.epoch must be .*, got 'x'"),
        (lambda tree: tree["models"]["a"]["evaluation"].pop("classes"), "a.evaluation.classes is not what .* got None"),
        (lambda tree: tree["models"]["a"]["evaluation"]["ncc"].update(test=True), "evaluation.ncc.test is not what"),
        (lambda tree: tree["models"]["a"]["evaluation"]["knn"][0].update(vote="all"), r"knn\[0\].vote .*'all'"),
        (lambda tree: tree["models"]["a"]["evaluation"]["linear"]["sweep"][0].pop(), r"linear.sweep\[0\] is not what"),
        (lambda tree: tree["models"]["a"]["evaluation"]["few_shot"][0].update(test=None), r"few_shot\[0\].test is not"),
    ],
)
def test_what_is_no_evaluation_is_refused(change, message, found, tmp_path):
    path = tmp_path / "evaluation.json"
    write_record(path, {"a": ModelRecord("digest", found)})
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(FastclError, match=message) as error:
        read_record(path)
    assert str(path) in str(error.value)


def test_rows_have_a_place_for_every_model_and_setting(found):
    x, y = torch.arange(24.0).reshape(12, 2).sin(), torch.arange(12) % 3
    other = evaluate(x, y, x, y, probes=("knn",), settings=ProbeSettings(k=(2, 3)))
    rows = {name: cells for name, *cells in accuracy_rows({"a": found, "b": other}, "test")}
    assert rows["linear probe"] == [f"{found.linear.test:.4f}", "–"]
    assert rows["3 nearest, weighted"] == ["–", f"{other.knn[3].test:.4f}"] and all(len(c) == 2 for c in rows.values())
    assert [name for name, *_ in accuracy_rows({"b": other}, "train", ["knn"])][0] == "2 nearest, majority"
    assert accuracy_rows({"a": found}, "train", ["linear"])[1] == ["  its penalty", f"{found.linear.penalty:g}"]
    assert any("1 of 12 test rows have labels that no training row has (5)" in line for line in remarks({"a": found}))
