"""Make all tables and figures of README and docs from the results under bench/results/ and docs/reproduction/; none is
typed by hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bench.harness import figures
from bench.harness.command import ROOT, Parser
from bench.harness.records import read, write_file
from bench.readme_tables import TABLES
from bench.reproduction import rows
from bench.scaling import report as scaling
from bench.theory import report as theory

RESULTS = ROOT / "bench" / "results"
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/losses.md",
    "docs/reproduction/index.md",
    "docs/scaling.md",
    "docs/theory.md",
    "docs/training.md",
    "kernels/README.md",
)

_BLOCK = re.compile(r"(<!-- table: (?P<name>\S+) -->\n)(?:(?!<!-- table).)*?(<!-- end -->)", re.DOTALL)
_DESCRIPTION = f"""\
Write what stands in {", ".join(PAGES)} between
"<!-- table: NAME -->" and "<!-- end -->" anew, from the results under bench/results/ and docs/reproduction/, and draw
the figures there.
Results of bench.gpu are expected in bench/results/gpu; what is not there is "not measured".
Tables: {", ".join(TABLES)}.
"""


def rendered(text: str, results: Path, page: str) -> str:
    """The text of a page with every table made from the results.

    Raises:
        ValueError: a mark without an end, or an unknown table; the message names the page.
    """
    marks, found = len(re.findall("<!-- (?:table: |end)", text)), _BLOCK.findall(text)
    if marks != 2 * len(found):
        raise ValueError(f"{page} has {marks} marks, but {len(found)} tables with a beginning and an end")
    if unknown := {name for _, name, _ in found} - set(TABLES):
        raise ValueError(f"{page} has tables that nobody makes: {', '.join(sorted(unknown))}")
    return _BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block['name']](results).strip()}\n\n{block[3]}", text)


def draw(results: Path) -> None:
    """Draw every figure of the results into the folder of its records."""
    for name, figure in (("losses", figures.losses), ("similarity", figures.similarity)):
        for file in sorted(results.rglob(f"{name}.json")):
            figure(read(file), file.parent)
    for file in sorted(results.rglob("metrics.jsonl")):
        figures.of_run(file.parent)
    if records := theory.read(results):
        theory.draw(records, results / "theory")
    if (results / "static").is_dir():
        scaling.draw(results)
    if found := rows.committed(results):
        from bench.reproduction import pictures  # imported here: needs matplotlib

        pictures.draw(found, rows.folder_of(results))


def main(argv: list[str] | None = None) -> int:
    """Write the pages and the figures, or with --check print which pages would change; return the exit status."""
    parser = Parser("readme", [_DESCRIPTION])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a table is old")
    args = parser.parse_args(argv)
    before = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    after = {page: rendered(text, RESULTS, page) for page, text in before.items()}
    old = [page for page in PAGES if before[page] != after[page]]
    if args.check:
        if old:
            print(f"out of date: {', '.join(old)}; run python -m bench.readme", file=sys.stderr)
        return int(bool(old))
    for page in old:
        write_file(ROOT / page, after[page])
    draw(RESULTS)
    print(f"as the results have it: {', '.join(PAGES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
