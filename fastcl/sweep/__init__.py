"""Sweeps: a run for every combination of settings and seeds, and what they measured side by side."""

from fastcl.sweep.long_table import write_table
from fastcl.sweep.outcomes import load_sweep
from fastcl.sweep.sweep_page import write_sweep_report
from fastcl.sweep.sweeping import plan_sweep, run_sweep

__all__ = ["load_sweep", "plan_sweep", "run_sweep", "write_sweep_report", "write_table"]
