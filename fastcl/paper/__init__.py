"""What arXiv 2510.08852 has published, and how far a run is from it."""

from fastcl.paper.beside import Comparison, Row, compare
from fastcl.paper.published import Curve, Target, targets

__all__ = ["Comparison", "Curve", "Row", "Target", "compare", "targets"]
