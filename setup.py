"""What no static table can say: README as the package's long description, and packages without an __init__.py.

fastcl/kernels is a link to the top-level folder kernels/, so that editors and type checkers find fastcl.kernels where
an installed package has it. kernels/ has no __init__.py and is never installed under its own name: a package called
``kernels`` belongs to another project.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent


def unlinked(link: re.Match[str]) -> str:
    """A link to a file of the checkout, which leads nowhere from an index: a figure is left out, a file named."""
    figure, text, target = link.groups()
    target = target.partition("#")[0]
    if not (ROOT / target).exists():
        return link[0]  # of the web, or no link but code
    return "" if figure else f"`{target}`" if text == target else f"{text}: `{target}`"


readme = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", unlinked, (ROOT / "README.md").read_text(encoding="utf-8"))

setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    packages=find_namespace_packages(include=["fastcl", "fastcl.*"]),
)
