"""Contrastive losses as functions and as modules, and the table of objectives behind both."""

from fastcl.losses.modules import CLIPLoss, DCLLoss, NSCLLoss, NTXentLoss, SupConLoss

__all__ = ["CLIPLoss", "DCLLoss", "NSCLLoss", "NTXentLoss", "SupConLoss"]
