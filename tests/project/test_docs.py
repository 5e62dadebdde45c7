"""README and docs can be followed: their code runs, what they name exists, their links lead somewhere.

Each rule is a function from a text to a list of complaints; the tests apply it to every page and prove on a small bad
text that it can fail. `make docs` builds the site itself.
"""

import importlib
import importlib.util
import pkgutil
import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_structure import ROOT

from fastcl import OBJECTIVES, Objective
from fastcl.cli.main import main
from fastcl.errors import FastclError
from fastcl.train import load_config

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), ROOT / "kernels" / "README.md", *(ROOT / "docs").rglob("*.md"))
)
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`]+)`")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language, each with the line of the page that its first line is on."""
    for found in _FENCE.finditer(text):
        if found[2] == language:
            yield text.count("\n", 0, found.start(3)) + 1, found[3]


def prose(text: str) -> str:
    return _FENCE.sub("", text)


def run_blocks(text: str, page: str) -> None:
    """Run the Python blocks of a page in one namespace; errors have the page's line numbers."""
    namespace = {"__name__": "page"}
    for line, source in blocks(text, "python"):
        exec(compile("\n" * (line - 1) + source, page, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in text_of(page)])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a page may write into runs/
    strict = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            run_blocks(text_of(page), page)
        finally:
            torch.use_deterministic_algorithms(strict)


def test_a_block_that_fails_is_found():
    text = "a\n```python\nx = 1\n```\nb\n```sh\nnot python\n```\n```python\n\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run_blocks(text, "page")
    assert caught.traceback[-1].lineno == 10  # from 0


def shell_lines(text: str) -> Iterator[list[str]]:
    """The commands of the shell blocks, as lists of words; comments are left out."""
    for _, source in blocks(text, "sh"):
        yield from filter(None, (shlex.split(line, comments=True) for line in source.splitlines()))


def help_of(capsys, *command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    said = capsys.readouterr()
    return said.out if not ended.value.code else ""


def wrong_commands(text: str, capsys) -> list[str]:
    """Commands of fastcl, targets of make and modules of Python that a page names and that are not there."""
    found = []
    targets = re.findall(r"^(\w+):(?!=)", text_of("Makefile"), re.MULTILINE)
    commands = [*shell_lines(text), *(span.split() for span in _SPAN.findall(prose(text)))]
    for words in commands:
        name, *rest = words or [""]
        if name == "fastcl" and rest and rest[0].islower():
            known = help_of(capsys, rest[0])
            options = [word.partition("=")[0] for word in rest[1:] if word.startswith("--")]
            if not known:
                found.append(f"{' '.join(words)}: no such command")
            found += [f"{' '.join(words)}: no option {o}" for o in options if known and not re.search(rf"{o}\b", known)]
        elif name == "make":
            found += [f"{' '.join(words)}: no target {word}" for word in rest[:1] if word not in targets]
        elif name == "python" and rest[:1] == ["-m"] and rest[1].startswith("bench."):
            if importlib.util.find_spec(rest[1]) is None:
                found.append(f"{' '.join(words)}: no module {rest[1]}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page, capsys):
    assert not (found := wrong_commands(text_of(page), capsys)), "\n".join(found)


def test_a_wrong_command_is_found(capsys):
    text = "```sh\nfastcl demo --oot x  # --out\nmake demmo\nmake test\n```\n`fastcl trian`, `python -m bench.lossses`"
    assert [line.partition(": ")[2] for line in wrong_commands(text, capsys)] == [
        "no option --oot", "no target demmo", "no such command", "no module bench.lossses"
    ]  # fmt: skip


def wrong_configs(text: str, folder: Path) -> list[str]:
    """TOML blocks and `--set` items that the trainer refuses."""
    configs: list[tuple[Path, list[str]]] = []
    for number, (_, source) in enumerate(blocks(text, "toml")):
        configs.append((folder / f"{number}.toml", []))
        configs[-1][0].write_text(source, encoding="utf-8")
    for words in shell_lines(text):
        if words[:2] == ["fastcl", "train"]:
            configs.append((ROOT / words[2], [value for key, value in pairwise(words) if key == "--set"]))
    found = []
    for path, overrides in configs:
        try:
            load_config(path, overrides)
        except FastclError as error:
            found.append(f"{path.name} {overrides}: {error}")
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if "```toml" in text_of(page) or "--set" in text_of(page)])
def test_configurations_are_read(page, tmp_path):
    assert not (found := wrong_configs(text_of(page), tmp_path)), "\n".join(found)


def test_a_wrong_configuration_is_found(tmp_path):
    text = '```toml\n[data]\nsauce = "x"\n```\n```sh\nfastcl train examples/omniglot.toml --set train.epoch=3\n```\n'
    sauce, epoch = wrong_configs(text, tmp_path)
    assert "data.sauce" in sauce and "train.epoch" in epoch


def unknown_names(text: str) -> list[str]:
    """Names of the package, in backticks or as a reference of the API, that nothing has."""
    named = [span for span in _SPAN.findall(prose(text)) if re.fullmatch(r"fastcl(\.\w+)+", span)]
    return [name for name in (*named, *re.findall(r"^::: (\S+)", text, re.MULTILINE)) if not _exists(name)]


def _exists(name: str) -> bool:
    found, *parts = importlib.import_module("fastcl"), *name.split(".")[1:]
    for at, part in enumerate(parts, 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(name.split(".")[:at]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # which names what once was
def test_names_of_the_package_exist(page):
    assert not (found := unknown_names(text_of(page))), found


def test_an_unknown_name_is_found():
    assert unknown_names("`fastcl.rsa` `fastcl.rsaa` `fastcl.data.load`\n::: fastcl.data.loads\n") == [
        "fastcl.rsaa", "fastcl.data.loads"
    ]  # fmt: skip


def undocumented(text: str, packages: Sequence[str]) -> list[str]:
    """Public names of the packages that a text refers to under no name."""
    documented = [_named(name) for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)]
    public = {f"{name}.{one}": _named(f"{name}.{one}") for name in packages for one in _named(name).__all__}
    return [name for name, thing in public.items() if not any(thing is known for known in documented)]


def _named(name: str) -> Any:
    return pkgutil.resolve_name(name)


_WITH_ALL = ("data", "metrics", "paper", "report", "similarity", "theory", "train")
PUBLIC = ("fastcl", *(f"fastcl.{name}" for name in _WITH_ALL))


def test_the_pages_of_the_api_have_every_public_name():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    assert undocumented(text, PUBLIC) == []
    assert undocumented(text.replace("::: fastcl.OBJECTIVES\n", ""), PUBLIC) == ["fastcl.OBJECTIVES"]


def slug(heading: str) -> str:
    """The anchor that MkDocs (and, for plain headings, a forge) gives a heading."""
    plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def broken_links(text: str, page: str) -> list[str]:
    """Relative links to files or anchors that are not there."""
    found = []
    for target in _LINK.findall(prose(text)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        where = (ROOT / page).parent / path if path else ROOT / page
        if not where.exists():
            found.append(f"{target}: no such file")
        elif anchor:
            other = prose(text if not path else where.read_text(encoding="utf-8"))
            if anchor not in map(slug, re.findall(r"^#+ (.+)$", other, re.MULTILINE)):
                found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert not (found := broken_links(text_of(page), page)), "\n".join(found)


def test_a_broken_link_is_found():
    text = "# A `b`, c\n[x](#a-b-c) [x](#a) [x](losses.md) [x](lossses.md) [x](losses.md#no) ![x](https://a.b/c)\n"
    assert broken_links(text, "docs/training.md") == [
        "#a: no such heading", "lossses.md: no such file", "losses.md#no: no such heading"
    ]  # fmt: skip


def test_links_of_the_checkout_become_those_of_the_site():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for page, link, wanted in (
        ("losses.md", "[k](../kernels/README.md#range)", "[k](kernels.md#range)"),
        ("contributing.md", "[kernels/README.md](kernels/README.md)", "[kernels/README.md](kernels.md)"),
        ("api/losses.md", "[l](../losses.md)", "[l](../losses.md)"),
        ("api/losses.md", "[c](../../CONTRIBUTING.md)", "[c](../contributing.md)"),
        ("training.md", "![a](../bench/results/omniglot/alignment.svg)", "![a](bench/results/omniglot/alignment.svg)"),
        ("bench/results/cpu/losses.md", "![l](losses.svg)", "![l](losses.svg)"),
        ("data.md", "[r](../fastcl/data/plan.py)", "r (`fastcl/data/plan.py`)"),
        ("training.md", "[examples/digits.toml](../examples/digits.toml)", "`examples/digits.toml`"),
        ("training.md", "[`examples/`](../examples/)", "`examples`"),
        ("losses.md", "[g](gone.md) [w](https://a.b/c) [h](#h)", "[g](gone.md) [w](https://a.b/c) [h](#h)"),
    ):
        assert hooks.linked(link, page) == wanted
    paths = [path for path, _ in hooks.from_elsewhere()]
    assert {"kernels.md", "contributing.md", "bench/results/cpu/losses.svg"} <= set(paths)


def test_the_table_of_objectives_is_that_of_the_code():
    row = re.compile(r"^\| `(\w+)` \| ([\w, ]+) \| ([\w, ]+) \| (inside|outside)", re.MULTILINE)
    assert {
        name: Objective(tuple(denominator.split(", ")), tuple(positives.split(", ")), place == "inside")
        for name, denominator, positives, place in row.findall(text_of("docs/losses.md"))
    } == OBJECTIVES


def test_the_command_of_ci_is_the_one_that_readme_gives():
    assert "\nmake test" in text_of(".ci/run") and "\nmake test" in text_of("README.md")
