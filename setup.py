"""Maps the checkout's kernels/ folder into the package: kernels/<family> is imported as fastcl.kernels.<family>.

kernels/ itself has no __init__.py and is never installed under its own name: a package called ``kernels`` belongs to
another project.
"""

from setuptools import find_packages, setup

families = find_packages("kernels")

setup(
    packages=find_packages(include=["fastcl", "fastcl.*"]) + [f"fastcl.kernels.{family}" for family in families],
    package_dir={f"fastcl.kernels.{family}": f"kernels/{family.replace('.', '/')}" for family in families},
)
