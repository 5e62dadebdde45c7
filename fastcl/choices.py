"""The values of string arguments: as types, and as tuples for checks and messages."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Backend: TypeAlias = Literal["auto", "triton", "chunked", "dense"]
UsedBackend: TypeAlias = Literal["triton", "chunked", "dense", "none"]  # "none": nothing has run yet
Precision: TypeAlias = Literal["fp16", "bf16", "fp32"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Relation: TypeAlias = Literal["view", "peer", "other"]
DataPart: TypeAlias = Literal["all", "train", "test"]
ObjectiveName: TypeAlias = Literal[
    "ntxent", "dcl", "nscl", "nscl_with_positive", "supcon", "supcon_in", "supcon_negatives"
]
Entries: TypeAlias = Literal["free", "symmetric", "tied"]  # of a similarity matrix: see fastcl.theory.descent
Equal: TypeAlias = Literal["epochs", "steps"]  # in all cells of a sweep

BACKENDS: tuple[Backend, ...] = get_args(Backend)
ENTRIES: tuple[Entries, ...] = get_args(Entries)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
DATA_PARTS: tuple[DataPart, ...] = get_args(DataPart)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
EQUAL: tuple[Equal, ...] = get_args(Equal)
