"""The lockstep trainer."""

from fastcl.train.config import Config
from fastcl.train.tables import load_config, parse_config
from fastcl.train.trainer import Lockstep

__all__ = ["Config", "Lockstep", "load_config", "parse_config"]
