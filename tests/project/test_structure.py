"""The shape of the code: size of files and functions, direction of imports, docstrings, no paths of one machine.

Each rule is a function from source text to a list of complaints; the tests apply it to the project and prove on a
small bad source that it can fail.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each layer may import beside itself, and with it whatever those may import. "fastcl" is fastcl/__init__.py.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "choices": set(),
    "interrupts": set(),
    "kernels": set(),
    "io": {"errors", "interrupts"},
    "checks": {"errors", "choices"},
    "facts": set(),
    "exchange": {"errors", "facts"},
    "theory": {"errors", "choices"},
    "micro": {"errors"},
    "dispatch": {"checks", "choices"},
    "rowstats": {"dispatch", "kernels", "exchange"},
    "losses": {"rowstats"},
    "similarity": {"rowstats", "theory"},
    "metrics": {"errors"},
    "evaluation": {"metrics", "checks", "io"},
    "config": {"errors", "io"},
    "data": {"config", "kernels"},
    "adapters": {"losses"},
    "public": {"adapters", "losses", "similarity", "micro"},
    "fastcl": {"public", "interrupts"},
    "train": {"fastcl", "data", "metrics", "io"},
    "zoo": {"train"},
    "report": {"theory", "evaluation"},
    "sweep": {"train", "report"},
    "paper": {"report", "config"},
    "cli": {"zoo", "sweep", "paper"},
    "__main__": {"cli"},
}
# What the public names may load: torch and the standard library are enough for it.
BARE = {
    "fastcl",
    "public",
    "losses",
    "similarity",
    "rowstats",
    "dispatch",
    "checks",
    "choices",
    "errors",
    "exchange",
    "facts",
    "interrupts",
    "theory",
    "micro",
}
EXTRAS = ("numpy", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "PIL", "tensorboard", "safetensors", "tqdm")


def python_files(*folders: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def complaints(rule: Callable[[str, Path], list[str]], *folders: str) -> str:
    found = []
    for path in python_files(*folders):
        try:
            found += rule((ROOT / path).read_text(encoding="utf-8"), path)
        except SyntaxError as error:
            found.append(f"{path}:{error.lineno}: {error.msg}")
    return "\n".join(found)


def too_long(text: str, path: Path) -> list[str]:
    lines = len(text.splitlines())
    found = [f"{path}: {lines} lines, 299 are allowed"] if lines >= 300 else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length >= 60:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, 59 are allowed")
    return found


def layer_of(module: str) -> str:
    """`fastcl.data.plan` -> `data`, `fastcl` -> `fastcl`."""
    return (module.split(".") + ["fastcl"])[1]


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join((("fastcl",) if parts[0] == "kernels" else ()) + parts).removesuffix(".__init__")


def imports(text: str, path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether it is imported as soon as the file is); not what only a type checker reads."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children = node.orelse
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")
            package = package if path.name == "__init__.py" else package[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join(base + ([node.module] if node.module else []))
            yield from ((f"{source}.{alias.name}", node.lineno, at_once) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno, at_once
        at_once = at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from visit(child, at_once)

    yield from visit(ast.parse(text), True)


def reachable(layer: str) -> set[str]:
    below = LAYERS[layer]
    return below.union(*(reachable(lower) for lower in below))


def wrong_way(text: str, path: Path) -> list[str]:
    ours = path.parts[0] in ("fastcl", "kernels")
    layer, found = layer_of(module_name(path)), []
    if ours and layer not in LAYERS:
        return [f"{path}: {layer} has no place in LAYERS"]
    for module, line, _ in imports(text, path):
        root = module.split(".")[0]
        if root == "kernels" or (ours and root in ("bench", "tests")):
            found.append(f"{path}:{line}: imports {module}, which an installed fastcl does not bring")
        elif ours and root == "fastcl":
            target = layer_of(module) if layer_of(module) in LAYERS else "fastcl"  # a name of fastcl/__init__.py
            if target != layer and target not in reachable(layer):
                found.append(f"{path}:{line}: layer {layer} imports {module} of layer {target}")
    return found


def heavy_imports(text: str, path: Path) -> list[str]:
    """What the bare package would need beyond torch as soon as it is imported."""
    layer = layer_of(module_name(path))
    allowed = set(sys.stdlib_module_names) | {"torch", "fastcl"}
    if layer != "kernels" and layer not in BARE:
        return []
    if layer == "kernels" or "/triton" in path.as_posix():
        allowed.add("triton")
    return [
        f"{path}:{line}: imports {module} at its top level"
        for module, line, at_once in imports(text, path)
        if at_once and module.split(".")[0] not in allowed
    ]


def undocumented(text: str, path: Path) -> list[str]:
    def visit(body: list[ast.stmt], owner: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any(name.split(".")[-1] in ("overload", "setter") for name in decorators):
                continue
            if not ast.get_docstring(node):
                yield f"{path}:{node.lineno}: {owner}{node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{node.name}.")

    return list(visit(ast.parse(text).body, ""))


def machine_paths(text: str, path: Path) -> list[str]:
    pattern = re.compile(r"(?<![\w.~$}])/(?:work|root|home|Users|mnt)/")
    return [f"{path}:{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


def test_files_and_functions_are_short():
    path = Path("fastcl/x.py")
    assert not too_long("x = 1\n" * 299, path) and too_long("x = 1\n" * 300, path)
    body = "    x = 1\n"
    assert not too_long("def f():\n" + body * 58, path) and too_long("def f():\n" + body * 59, path)
    assert too_long("class A:\n    async def f(self):\n" + ("    " + body) * 59, path)
    assert not (found := complaints(too_long, "fastcl", "kernels", "bench", "tests")), found


def test_imports_go_one_way():
    bad = {
        "fastcl/data/plan.py": ["from fastcl.train import loop", "from ..losses import f", "from fastcl import losses"],
        "fastcl/metrics/probe.py": ["import fastcl.similarity", "def f():\n    from ..similarity import cka"],
        "fastcl/similarity/__init__.py": ["from ..metrics import probe", "import fastcl"],
        "fastcl/rowstats/api.py": ["from ..losses import functional", "from fastcl import row_stats"],
        "fastcl/surplus/__init__.py": [""],
        "fastcl/errors.py": ["import importlib\nimportlib.import_module('fastcl.data')"],
        "fastcl/train/loop.py": ["from fastcl.report import html", "from bench import losses"],
        "fastcl/rowstats/triton/forward.py": ["from kernels.contrastive import normalize"],
        "kernels/gram/tiles.py": ["from fastcl.errors import FastclError", "from ...rowstats import f"],
        "bench/losses/run.py": ["import kernels.contrastive"],
    }
    for name, sources in bad.items():
        for source in sources:
            assert len(wrong_way(source, Path(name))) == 1, (name, source)
    good = {
        "fastcl/data/plan.py": "from fastcl.errors import FastclError\nfrom . import philox\nfrom .philox import x",
        "fastcl/losses/modules.py": "from . import functional, objectives\nfrom ..rowstats import row_stats",
        "fastcl/cli/main.py": "import fastcl\nfrom ..train import loop\nfrom fastcl.kernels.gram import tiles",
        "fastcl/rowstats/order.py": "if TYPE_CHECKING:\n    from fastcl.losses import NTXentLoss",
        "kernels/gram/tiles.py": "from . import launch\nfrom ..contrastive.normalize import normalize_rows",
    }
    for name, source in good.items():
        assert not wrong_way(source, Path(name)), name
    assert not (found := complaints(wrong_way, "fastcl", "kernels", "bench", "tests")), found


def test_the_bare_package_names_nothing_beyond_torch_at_its_top_level():
    for source in ("import numpy as np", "try:\n    from timm import x\nexcept ImportError: pass", "import triton"):
        assert len(heavy_imports(source, Path("fastcl/similarity/cka.py"))) == 1, source
    assert heavy_imports("import numpy", Path("kernels/gram/tiles.py"))
    assert not heavy_imports("import math, torch.nn\nfrom fastcl import errors", Path("fastcl/losses/modules.py"))
    assert not heavy_imports("def f():\n    import numpy", Path("fastcl/losses/modules.py"))
    assert not heavy_imports("import numpy", Path("fastcl/data/plan.py"))
    assert not (found := complaints(heavy_imports, "fastcl", "kernels")), found


def test_the_bare_package_imports_with_torch_alone():
    names = ["fastcl"] + [f"fastcl.{layer}" for layer in sorted(BARE - {"fastcl"})]
    code = f"import sys; sys.modules.update(dict.fromkeys({(*EXTRAS, 'triton')!r}))\nimport fastcl.public\n"
    code += f"print([name for name in sys.modules if name.startswith('fastcl.')])\nimport {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ast.literal_eval(done.stdout)
    assert len(loaded) <= 40 and "fastcl.losses" in loaded
    assert not {"fastcl.adapters", "fastcl.similarity", "fastcl.rowstats.sharded"} & set(loaded)


def test_every_public_name_is_documented():
    path = Path("fastcl/x.py")
    assert undocumented("def f(): pass", path) and undocumented("class A: pass", path)
    assert undocumented('class A:\n    """Doc."""\n    @property\n    def x(self): return 1', path)
    assert not undocumented('class A:\n    """Doc."""\n    def __len__(self): return 1\n    def _x(self): pass', path)
    assert not undocumented("def _f(): pass\nclass _A:\n    def x(self): pass", path)
    assert not undocumented('@overload\ndef f(x: int): ...\ndef f(x):\n    """Doc."""', path)
    assert not (found := complaints(undocumented, "fastcl")), found


def test_no_path_of_one_machine_is_written_down(source_files):
    text_suffixes = {"", ".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".csv", ".html", ".svg"}
    found = []
    for path in source_files:
        if path.suffix in text_suffixes:
            found += machine_paths((ROOT / path).read_text(encoding="utf-8", errors="replace"), path)
    assert not found, "\n".join(found)
    for folder in ("work", "root", "home", "Users", "mnt"):
        assert machine_paths(f'DATA = "/{folder}/me/data"', Path("x.py")), folder
    assert not machine_paths("see https://example.org/home/page and ../work/x and runs/root/y", Path("x.md"))


@pytest.mark.parametrize(
    "first",
    ("", "import torch", "import fastcl.public", "import fastcl.similarity", "from fastcl import theory, losses"),
)
def test_public_names_come_whatever_was_imported_before(first):
    code = f"""{first}
import fastcl
assert "ntxent_loss" in vars(fastcl) or {first!r} != "import torch"
assert fastcl.ntxent_loss is fastcl.losses.functional.ntxent_loss and "ntxent_loss" in vars(fastcl)
assert set(fastcl.__all__) <= set(dir(fastcl)) and "OBJECTIVES" in fastcl.__all__
from fastcl import *
assert OBJECTIVES is fastcl.OBJECTIVES and not hasattr(fastcl, "nothing")
assert twin_stats is fastcl.similarity.two_models.twin_stats and micro_step is fastcl.micro.micro_step
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", (["--help"], ["train", "--help"], ["config", "--preset", "digits"]))
def test_help_waits_for_no_library(arguments):
    code = f"import sys; from fastcl.cli.main import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
    code += f"print([m for m in ('torch', 'triton', *{EXTRAS}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
