"""The lockstep trainer."""

from fastcl.config.settings import Config
from fastcl.config.tables import load_config, parse_config
from fastcl.train.trainer import Lockstep

__all__ = ["Config", "Lockstep", "load_config", "parse_config"]
