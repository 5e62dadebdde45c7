"""Contrastive losses: as functions, as modules, and the table of objectives that both read."""

from fastcl.losses.modules import CLIPLoss, DCLLoss, NSCLLoss, NTXentLoss, SupConLoss

__all__ = ["CLIPLoss", "DCLLoss", "NSCLLoss", "NTXentLoss", "SupConLoss"]
