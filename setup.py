"""What no static table can say: the packages under kernels/, and README as the package's long description.

kernels/ is mapped into the package: kernels/<family> is imported as fastcl.kernels.<family>. It has no __init__.py and
is never installed under its own name: a package called ``kernels`` belongs to another project.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def unlinked(link: re.Match[str]) -> str:
    """A link to a file of the checkout, which leads nowhere from an index: a figure is left out, a file named."""
    figure, text, target = link.groups()
    if not (ROOT / target).exists():
        return link[0]  # of the web, or no link but code
    return "" if figure else f"`{target}`" if text == target else f"{text}: `{target}`"


families = find_packages("kernels")
readme = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", unlinked, (ROOT / "README.md").read_text(encoding="utf-8"))

setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    packages=find_packages(include=["fastcl", "fastcl.*"]) + [f"fastcl.kernels.{family}" for family in families],
    package_dir={f"fastcl.kernels.{family}": f"kernels/{family.replace('.', '/')}" for family in families},
)
