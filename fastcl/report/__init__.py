"""The report of a run: figures and tables in one self-contained HTML file."""

from fastcl.report.html import write_report

__all__ = ["write_report"]
