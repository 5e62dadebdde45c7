"""The lockstep trainer."""

from fastcl.train.config import Config, load_config, parse_config
from fastcl.train.lockstep import Lockstep

__all__ = ["Config", "Lockstep", "load_config", "parse_config"]
