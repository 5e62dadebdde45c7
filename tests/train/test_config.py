"""Configs as files and on the command line: encodings, hostile values, values of every wrong type for every key."""

import dataclasses
import datetime
import logging
import math
import typing

import pytest
import timm
import torch
from tiny_run import TABLES, tiny_config

from fastcl import FastclError
from fastcl.train import Config, load_config, parse_config
from fastcl.train.models import make_optimizer
from fastcl.train.network import build_network


@pytest.fixture
def loaded(tmp_path):
    """Function from the bytes of a file and overrides to the config."""
    path = tmp_path / "c.toml"

    def load(content=b"", *overrides):
        path.write_bytes(content)
        return load_config(path, list(overrides))

    return load


def test_files_are_utf_8_with_or_without_a_mark_whatever_the_locale(loaded, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    text = '[data]\nsource = "folder:caf\u00e9"\n'
    for mark in (b"", b"\xef\xbb\xbf"):
        assert loaded(mark + text.encode()).data.source == "folder:caf\u00e9"


@pytest.mark.parametrize("content, message", (
    ("[data]".encode("utf-16"), "is not UTF-8, as TOML must be"),
    (b"[data]\nsource = 'caf\xe9'", "is not UTF-8, as TOML must be"),
    (b"a = " + b"9" * 5000, "an integer has too many digits"), (b"a = " + b"[" * 100_000, "nested too deeply"),
    (b"a = " + b"{a=" * 100_000, "nested too deeply"), (b"[a", "is not valid TOML"),
    (b"[train]\nepochs = 0x" + b"f" * 5000, "train.epochs must fit in 64 bits, got an integer of 20000 bits"),
    (b"[optim]\nlr = 0x" + b"f" * 5000, "optim.lr must be finite"),
    (b"[model]\noptions.a = 0x" + b"f" * 5000, "model.options.a must fit in 64 bits"),
    (b"data = 0x" + b"f" * 5000, "data must be a table, got a int too large to show"),
    (b"model.options." + b".".join([b"a"] * 2000) + b" = 1", "nested more than 8 levels"),
    (b"[data]\nroot = 2024-01-01", "data.root must be a string or \"none\", got the date 2024-01-01"),
    (b"[data]\nroot = 12:30:00", "got the time 12:30:00"),
    (b"[model]\noptions = { x = 2024-01-01 }", "model.options.x must be a string, .*got the date 2024-01-01"),
    (b"[model]\noptions = { x = [nan] }", "model.options.x.0 must be finite, got nan"),
    (b"[train]\nmodels = 'dcl'", r'train.models must be a list such as \["first", "second"\], got \'dcl\''),
    (b"[train]\nmodels = [1]", r"train.models\[0\] must be a string, got 1"),
    (b"[views]\nscale = 0.5", r"views.scale must be a list of 2 such as \[0.5, 1.0\], got 0.5"),
    (b'["a\\nb"]', "unknown key 'a.nb'"),
))  # fmt: skip
def test_a_file_that_cannot_be_is_one_error(loaded, content, message):
    with pytest.raises(FastclError, match=message):
        loaded(content)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 300)):
        with pytest.raises(FastclError, match="cannot read config .*(directory|too long)"):
            load_config(path)


def test_bare_strings_where_a_key_takes_one(loaded):
    config = loaded(b"", "data.root=2024-01-01", "data.source=12", "train.device=true", "optim.name = 5e3 ")
    assert (config.data.root, config.data.source) == ("2024-01-01", "12")
    assert (config.train.device, config.optim.name) == ("true", "5e3")
    assert loaded(b"", 'data.root="a b"', "data.root=none").data.root is None
    assert loaded(b"", 'train.models=[\n"dcl",\n"ce"]').train.models == ("dcl", "ce")
    assert loaded(b"", "model.options.drop_rate=0.5").model.options == {"drop_rate": 0.5}


@pytest.mark.parametrize("item, message", (
    ("train.epochs=3\ntrain.seed=5", "--set takes one table.key=value, got .*repeat --set"),
    ("train.epochs=3\n[optim]\nlr=5", "--set takes one table.key=value, got .*repeat --set"),
    ("data.source=folder:a\nb", "without line breaks"), ("data.root=a\rb", "without line breaks"),
    ("train.epochs=" + "9" * 5000, "--set 'train.epochs=9*.: an integer has too many digits"),
    ("model.options=" + "[" * 5000, "nested too deeply"), ("train.models=dcl", "train.models must be a list"),
    ("train.epochs.x=3", "train.epochs must be an integer, got {'x': 3}"), ("=3", "--set takes"), ("train.=1", "--set"),
    ("epochs=3", r"got 'epochs=3'; did you mean 'train.epochs=...'\?$"), ("epoch=3", "got 'epoch=3'$"),
    ("name=x", "did you mean 'model.name=...' or 'optim.name=...'"), ("preset=cifar", "'views.preset=...'"),
))  # fmt: skip
def test_overrides_drop_nothing(loaded, item, message):
    with pytest.raises(FastclError, match=message):
        loaded(b"", item)


WRONG = (True, -1, 10**18, 1.5, math.nan, -math.inf, "", "x", "\udce9", [], [1], ["x"], [[]], {}, {"a": 1}, None,
         datetime.date(2024, 1, 1), datetime.time(1), 1 << 70)  # fmt: skip


@pytest.mark.parametrize("section", TABLES)
def test_every_value_for_every_key_is_taken_or_refused_by_name(section):
    for key in dataclasses.fields(typing.get_type_hints(Config)[section]):
        refused = 0
        for value in WRONG:
            tables = {name: dict(table) for name, table in TABLES.items()}
            tables[section][key.name] = value
            try:
                parse_config(tables)
            except FastclError as error:
                refused += 1
                assert f"{section}." in str(error) and key.name in str(error), (key.name, value)
                assert str(error).encode("utf-8", "backslashreplace")
        assert refused >= 10, key.name


@pytest.mark.parametrize(
    "changes, message",
    (
        (dict(train__temperature=1e-40), r"train.temperature must be a positive number \(1e-30 to 1e\+30\), got 1e-40"),
        (dict(model__hidden=1 << 30), "model.hidden must be at most 1048576, got 1073741824"),
    ),
)
def test_ranges(changes, message):
    with pytest.raises(FastclError, match=message):
        tiny_config(**changes)


class _Offline(FileNotFoundError):
    """As the hub's LocalEntryNotFoundError: an OSError that is no answer to a path of ours."""


@pytest.mark.parametrize("changes, error, message", (
    (dict(options={"pretrained": True}), _Offline("no connection\nat all"), "or settings: no connection. Without"),
    (dict(name="hf-hub:timm/resnet18", options={}), _Offline("no connection"), "plain model name and load weights"),
    (dict(name="hf_hub:timm/resnet18", options={}), _Offline("no network."), r"no network\. Without a network, use"),
    (dict(options={"checkpoint_path": "absent"}), FileNotFoundError(), "the weights or settings: FileNotFoundError"),
    (dict(options={"odd": 1}), ZeroDivisionError("division by zero"), "cannot create 'resnet18' .*: division by zero"),
))  # fmt: skip
def test_whatever_timm_raises_is_one_error(changes, error, message, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    model = dataclasses.replace(tiny_config().model, **changes)
    with pytest.raises(FastclError, match=message):
        build_network(model, 1, 8, 0)


def test_models_that_cannot_be():
    model = tiny_config().model
    for options, message in (
        ({"num_classes": 3}, "model.options.num_classes is set from the data"), ({"in_chans": 3}, "in_chans"),
        ({**model.options, "features_only": True}, "must return one vector per image, got a list"),
    ):  # fmt: skip
        with pytest.raises(FastclError, match=message):
            build_network(dataclasses.replace(model, options=options, cifar_stem=False), 1, 32, 0)
    with pytest.raises(FastclError, match="not enough memory for model.hidden = 1048576"):
        build_network(dataclasses.replace(model, hidden=1 << 20, projection=1 << 40), 1, 8, 0)


def test_without_momentum_sgd_is_plain_gradient_descent():
    network = build_network(tiny_config().model, 1, 8, 0)
    optim = dataclasses.replace(tiny_config().optim, name="sgd", momentum=0.0, lr=0.5, weight_decay=0.0)
    optimizer = make_optimizer(network, optim)
    weight = network.projector[0].weight
    before, gradient = weight.detach().clone(), torch.ones_like(weight)
    for step in (1, 2):
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weight.detach(), before - 0.5 * step)


def test_the_hub_does_not_count_its_tries(monkeypatch, caplog):
    def fetch(*_, **__):
        for name in ("huggingface_hub.utils._http", "timm.models._hub"):
            logging.getLogger(name).warning("Retrying in 1s [Retry 1/5].")
        raise _Offline("no connection")

    monkeypatch.setattr("timm.create_model", fetch)
    with pytest.raises(FastclError, match="no connection"):
        build_network(dataclasses.replace(tiny_config().model, name="hf-hub:timm/resnet18"), 1, 8, 0)
    assert "Retrying" not in caplog.text


def test_toml_and_overrides(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[views]\npreset = "cifar"\n[train]\nmodels = ["ce"]\n')
    config = load_config(path, ["train.epochs=7", "data.source=folder:/a b", "views.size=40", "data.classes=none"])
    assert config.train.epochs == 7 and config.data.source == "folder:/a b" and config.data.classes is None
    assert config.views.size == 40 and config.views.mean == (0.4914, 0.4822, 0.4465)
    for text, message in (("epochs=3", "table.key=value"), ("train.epochs", "table.key=value"), ("trian.a=1", "trian")):
        with pytest.raises(FastclError, match=message):
            load_config(path, [text])
    path.write_text("[train\n")
    with pytest.raises(FastclError, match="not valid TOML"):
        load_config(path)
    with pytest.raises(FastclError, match="cannot read config"):
        load_config(tmp_path / "absent.toml")
