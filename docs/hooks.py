"""What MkDocs cannot do by itself: pages and figures from elsewhere in the repository, links to them, formulas.

Every text has one source. CONTRIBUTING.md, CHANGELOG.md and kernels/README.md stay where they are, and the figures and
tables of bench/results/ stay beside their records; all of them become files of the site. Links in the sources are those
of the repository, so that they work in a checkout too. Formulas become MathML, which browsers draw without a script.
"""

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS, RESULTS = "docs/", "bench/results/"
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "kernels/README.md": "kernels.md"}
SOURCES = {page: source for source, page in PAGES.items()}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def from_elsewhere() -> Iterator[tuple[str, Path]]:
    """(path in the site, file) of all that is not below docs/."""
    yield from ((page, ROOT / source) for source, page in PAGES.items())
    for file in sorted((ROOT / RESULTS).rglob("*")):
        if file.suffix in (".md", ".svg"):
            yield file.relative_to(ROOT).as_posix(), file


def site_path(source: str) -> str | None:
    """Where a file of the repository is in the site; None where it is not."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith(RESULTS) and source.endswith((".md", ".svg")):
        return source
    return source.removeprefix(DOCS) if source.startswith(DOCS) else None


def linked(text: str, page: str) -> str:
    """A page's text with the links of the repository turned into those of the site; other files are only named."""
    source = SOURCES.get(page, page if page.startswith(RESULTS) else DOCS + page)

    def replace(link: re.Match[str]) -> str:
        figure, label, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        where = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not path or ":" in path or not (ROOT / where).exists():
            return link[0]  # within the page, of the web, code, or a broken link, which MkDocs reports
        found = site_path(where)
        if found is None:
            return f"`{where}`" if label.strip("`").rstrip("/") == where else f"{label} (`{where}`)"
        return f"{figure}[{label}]({posixpath.relpath(found, posixpath.dirname(page) or '.')}{hash_sign}{anchor})"

    return _LINK.sub(replace, text)


def on_files(files, config):
    """Add the files from elsewhere."""
    from mkdocs.structure.files import File

    for path, file in from_elsewhere():
        files.append(File.generated(config, path, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the links."""
    return linked(markdown, page.file.src_uri)


def on_page_content(content, page, config, files):
    """Formulas to MathML."""
    from latex2mathml.converter import convert

    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline")

    return _FORMULA.sub(formula, content)
