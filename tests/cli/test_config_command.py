"""Configs explain themselves: help and the printed TOML show one meaning of every key, and what is printed loads."""

import dataclasses
import os
import subprocess
import sys

import pytest
import tomllib
from test_structure import EXTRAS, ROOT

from fastcl.cli.main import main
from fastcl.config.keys import key, keys_of
from fastcl.config.settings import Config, tables_of
from fastcl.config.tables import load_config
from fastcl.config.written import DEMO, commented, listing, preset_file, preset_names, toml

KEYS = [(table, one) for table, kind in tables_of().items() for one in keys_of(kind)]


def words(text):
    """Without line breaks, margins and the marks of comments."""
    return " ".join(word for word in text.split() if word != "#")


def test_every_key_has_a_meaning_of_one_line():
    assert len(KEYS) == sum(len(dataclasses.fields(kind)) for kind in tables_of().values()) > 40
    for table, one in KEYS:
        assert 5 < len(one.meaning) < 100 and one.meaning.isascii() and one.meaning.isprintable(), (table, one)
    for kind in tables_of().values():
        assert kind.__doc__

    @dataclasses.dataclass
    class Silent:
        size: int = 3

    with pytest.raises(KeyError, match="meaning"):
        keys_of(Silent)


def test_types_and_defaults_are_those_of_the_fields():
    @dataclasses.dataclass
    class Table:
        a: str | None = key(None, "a")
        b: tuple[float, float] = key((0.5, 1.0), "b")
        c: tuple[str, ...] = key((), "c")
        d: dict[str, int] = key({"x": 1}, "d")

    assert [(one.form, one.default) for one in keys_of(Table)] == [
        ('string or "none"', None), ("list of 2 numbers", (0.5, 1.0)), ("list of strings", ()), ("table", {"x": 1})
    ]  # fmt: skip
    assert Table().d is not Table().d


def test_help_lists_every_key_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert listing() in text and max(map(len, text.splitlines())) <= 120
    said = words(text)
    for table, one in KEYS:
        assert f"{one.name} = {toml(one.default)} {one.meaning} ({one.form})" in said, (table, one)
    assert all(f"[{table}]" in said for table in tables_of()) and "preset = NAME start from a known recipe" in said


@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_what_is_printed_loads_as_it_is(preset, tmp_path, capsys):
    assert main(["config", *([] if preset is None else ["--preset", preset])]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    wanted = Config()
    if preset is not None:
        with preset_file(preset) as source:
            wanted = load_config(source)
        assert wanted != Config()
    assert load_config(path) == wanted
    assert text.isascii() and max(map(len, text.splitlines())) <= 120
    tables = tomllib.loads(text)
    said = words(text)
    for table, one in KEYS:
        assert one.name in tables[table] and f"{one.meaning} ({one.form}" in said, (table, one)
        changed = getattr(getattr(wanted, table), one.name) != one.default
        assert changed == (f"{one.meaning} ({one.form}, default {toml(one.default)})" in said), (table, one)


def test_the_demo_and_the_examples_are_presets(capsys):
    assert DEMO in preset_names() and {"omniglot", "cifar10"} <= set(preset_names())
    assert commented("omniglot").startswith("# All objectives and controls on 200 characters of Omniglot")
    assert main(["config", "--preset", "omnigloT"]) == 1
    assert capsys.readouterr().err == "error: --preset: unknown preset 'omnigloT'; did you mean 'omniglot'?\n"
    assert main(["config", "--preset", "../keys"]) == 1


@pytest.mark.parametrize("value", (
    'a "b" \\ \n\t caf\u00e9 \U0001f600', 1e-6, 4 / 3, -1e300, 10**18, True, False, [], ["a", ["b", 1]], {},
    {"a b": {"c": [1.5, "x"]}, "d": {}, "": "none"},
))  # fmt: skip
def test_values_are_read_back(value):
    assert tomllib.loads(f"value = {toml(value)}") == {"value": value}


def test_the_keys_are_shown_without_the_extra_packages():
    code = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r})); from fastcl.cli.main import main; main()"
    for arguments, said in ((["train", "--help"], "[optim]"), (["config", "--preset", "cifar10"], "lr = 1.2")):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stderr
