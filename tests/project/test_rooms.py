"""The rooms of the house: no circle of imports, one name for one file, no private name of another, short calls."""

import ast
from pathlib import Path

from test_structure import ROOT, complaints, imports, module_name, python_files

MOST_PARAMETERS = 12
MORE = {"row_stats": 13}  # fastcl.row_stats: rows and ids of both sides, and how all losses compare them
TWICE = {"__init__.py", "__main__.py", "triton.py", "two_models.py"}


def circles(sources: dict[str, str]) -> list[str]:
    """Circles of files that import each other as soon as they are imported; sources by path."""
    names = {module_name(Path(path)): path for path in sources}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = (m for m, _, at_once in imports(sources[path], Path(path)) if at_once)
        known = (next((part for part in (m, m.rpartition(".")[0]) if part in names), None) for m in found)
        graph[name] = {target for target in known if target and target != name}
    done: set[str] = set()
    circles = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circles.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return circles


def private_imports(text: str, path: Path) -> list[str]:
    return [
        f"{path}:{node.lineno}: imports {alias.name} of another file"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(("fastcl", "bench")))
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]


def long_calls(text: str, path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
            most = MORE.get(node.name, MOST_PARAMETERS)
            if count > most:
                found.append(f"{path}:{node.lineno}: {node.name} has {count} parameters, {most} are allowed")
    return found


def test_no_file_imports_itself_by_others():
    bad = {"fastcl/a.py": "from fastcl import b", "fastcl/b.py": "from .c import f", "fastcl/c.py": "import fastcl.a"}
    assert circles(bad) == ["fastcl.a -> fastcl.b -> fastcl.c -> fastcl.a"]
    assert not circles(bad | {"fastcl/c.py": "def f():\n    import fastcl.a"})
    files = {path.as_posix(): (ROOT / path).read_text(encoding="utf-8") for path in python_files("fastcl", "kernels")}
    assert len(files) > 100 and not (found := circles(files)), "\n".join(found)


def test_a_file_name_stands_for_one_thing():
    paths = [path for path in python_files("fastcl") if path.name not in TWICE]
    names = [path.name for path in paths]
    assert not (found := [str(path) for path in paths if names.count(path.name) > 1]), found


def test_nothing_private_is_imported():
    assert private_imports("from .forward import _counts", Path("kernels/gram/x.py"))
    assert private_imports("from fastcl.errors import shown, _words", Path("bench/x.py"))
    assert not private_imports("from fastcl import __version__\nfrom torch._C import _get", Path("fastcl/x.py"))
    assert not (found := complaints(private_imports, "fastcl", "kernels", "bench")), found


def test_calls_are_short():
    many = ", ".join(f"a{k}" for k in range(MOST_PARAMETERS))
    assert not long_calls(f"def f({many}): pass", Path("x.py"))
    assert long_calls(f"def f({many}, *, b): pass", Path("x.py"))
    assert not (found := complaints(long_calls, "fastcl", "bench", "kernels")), found
