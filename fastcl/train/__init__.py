"""The lockstep trainer."""

from fastcl.train.config import Config
from fastcl.train.lockstep import Lockstep
from fastcl.train.tables import load_config, parse_config

__all__ = ["Config", "Lockstep", "load_config", "parse_config"]
