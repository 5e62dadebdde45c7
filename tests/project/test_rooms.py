"""The rooms of the house: no circle of imports, one name for one file, no private name of another, short calls, nothing
said twice."""

import ast
from collections.abc import Iterator
from pathlib import Path

from test_structure import ROOT, complaints, imports, module_name, python_files

MOST_PARAMETERS = 12
MORE = {"row_stats": 13}  # fastcl.row_stats: rows and ids of both sides, and how all losses compare them
MOST_REPEATED = 6  # lines of one function that stand in another
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


def chained(text: str, path: Path) -> list[str]:
    """`a and b and c` in a kernel, which Triton 3.3 cannot parse."""
    return [
        f"{path}:{node.lineno}: Triton 3.3 wants parentheses: {ast.unparse(node)}"
        for kernel in ast.walk(ast.parse(text))
        if isinstance(kernel, ast.FunctionDef) and "triton.jit" in map(ast.unparse, kernel.decorator_list)
        for node in ast.walk(kernel)
        if isinstance(node, ast.BoolOp) and len(node.values) > 2
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


def bodies(text: str) -> Iterator[tuple[str, list[str]]]:
    """Names of the functions that lie in no other, and their statements as lines, without comments and docstrings."""

    def outermost(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            else:
                yield from outermost(child)

    for function in outermost(ast.parse(text)):
        statements = function.body[ast.get_docstring(function) is not None :]
        yield function.name, [line.strip() for one in statements for line in ast.unparse(one).splitlines()]


def repetitions(sources: dict[str, str], most: int = MOST_REPEATED) -> list[str]:
    """Functions with more than `most` lines in a row that stand in another one, too; sources by path."""
    seen: dict[tuple[str, ...], str] = {}
    found: dict[str, None] = {}
    for path, text in sources.items():
        for name, lines in bodies(text):
            place = f"{path}: {name}"
            for k in range(len(lines) - most):
                first = seen.setdefault(tuple(lines[k : k + most + 1]), place)
                if first != place:
                    found.setdefault(f"{place} repeats {first}")
    return list(found)


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


def test_no_function_says_what_another_one_says():
    text = 'def f(x):\n    """Doc."""\n' + "".join(f"    x = g(x, {k})\n" for k in range(MOST_REPEATED + 1))
    other = text.replace("def f", "class A:\n  def h").replace("Doc", "Other doc").replace("    x", "    # why\n    x")
    assert repetitions({"a.py": text, "b.py": other}) == ["b.py: h repeats a.py: f"]
    assert not repetitions({"a.py": text, "b.py": other}, MOST_REPEATED + 1)
    assert not repetitions({"a.py": text, "b.py": text.replace("x, 3", "x, 33")})
    paths = python_files("fastcl", "kernels", "bench")
    found = repetitions({path.as_posix(): (ROOT / path).read_text(encoding="utf-8") for path in paths})
    assert not found, "\n".join(found)


def test_kernels_parse_on_the_oldest_triton():
    kernel = "@triton.jit\ndef f(a, b, c):\n    return a and b and c"
    assert chained(kernel, Path("kernels/x.py")) and not chained(kernel.replace("a and b", "(a and b)"), Path("x.py"))
    assert not (found := complaints(chained, "kernels")), found
