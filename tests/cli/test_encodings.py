"""No text is read or written in whatever encoding the locale has: every such call names its own."""

import ast
import re
from pathlib import Path

from test_structure import complaints

# Whose `open` gives bytes unless a mode with a t asks for text.
_BINARY = {"Image", "bz2", "gzip", "lzma", "os", "tarfile", "zipfile"}
_WRAPPERS = {"TextIOWrapper", "FileHandler", "RotatingFileHandler", "loadtxt", "savetxt", "genfromtxt"}


def _is_text(node: ast.Call) -> bool:
    """Whether a call reads or writes text and would take an encoding."""
    name = ast.unparse(node.func)
    owner, _, last = name.rpartition(".")
    values = [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
    words = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    modes = [word for word in words if re.fullmatch(r"[rwax][bt+U]*", word)]
    if any(k.arg in ("text", "universal_newlines") and ast.unparse(k.value) == "True" for k in node.keywords):
        return True
    if last in ("read_text", "write_text"):
        return len(node.args) <= (last == "write_text")  # else the encoding is given by its place
    if last in ("popen", "getoutput", "getstatusoutput") or last in _WRAPPERS:
        return True
    if last.endswith("TemporaryFile"):
        return any("b" not in mode for mode in modes)
    if last not in ("open", "fdopen"):
        return False
    if owner in _BINARY and last == "open":
        return any("t" in mode for mode in modes)
    if owner and last == "open" and not modes:
        return not node.args and not node.keywords  # a path's; with another argument it is somebody else's
    return not any("b" in mode for mode in modes)


def without_encoding(text: str, path: Path) -> list[str]:
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return [
        f"{path}:{node.lineno}: {ast.unparse(node.func)} names no encoding"
        for node in calls
        if _is_text(node) and all(k.arg != "encoding" for k in node.keywords)
    ]


def test_every_text_is_read_and_written_in_a_named_encoding():
    path = Path("fastcl/x.py")
    bad = (
        "open(p)", "open(p, 'w')", "open(p, mode='a')", "io.open(p, 'r+')", "p.open()", "p.open('x')", "open(p, m)",
        "os.fdopen(1, 'w')", "p.read_text()", "p.write_text(t)", "p.write_text(t, newline='')", "gzip.open(p, 'rt')",
        "tempfile.TemporaryFile('w+')", "NamedTemporaryFile(mode='w')", "subprocess.run(c, text=True)",
        "Popen(c, universal_newlines=True, **more)", "subprocess.getoutput(c)", "io.TextIOWrapper(b)",
        "logging.FileHandler(p)", "np.savetxt(p, x)",
    )  # fmt: skip
    for source in bad:
        assert len(without_encoding(source, path)) == 1, source
    good = (
        "open(p, 'rb')", "open(p, 'w', encoding='utf-8')", "open(p, mode='xb')", "p.open('wb')", "os.open(p, flags)",
        "p.open('x', encoding='utf-8')", "store.open(i)", "Image.open(p)", "tarfile.open(p, 'r')", "gzip.open(p, 'r')",
        "p.read_text('utf-8')", "p.write_text(t, encoding='utf-8')", "tempfile.NamedTemporaryFile(suffix='.x')",
        "subprocess.run(c)", "subprocess.run(c, text=True, encoding='utf-8')", "opened(p)",
    )  # fmt: skip
    for source in good:
        assert not without_encoding(source, path), source
    assert not (found := complaints(without_encoding, "fastcl", "kernels", "bench")), found
