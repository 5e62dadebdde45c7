"""The differentiable operators, registered with torch.library so that torch.compile keeps them whole.

Autograd is registered at the operators' own key: an outer autograd.Function would fail `torch.library.opcheck`.
"""

from fastcl.operators import chunked, fused, twin

__all__ = ["chunked", "fused", "twin"]
