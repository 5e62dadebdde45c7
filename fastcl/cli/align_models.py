"""`fastcl align --models`: all similarities of models by name on the images of a data set, or of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcl.cli.align import check_for_layers, check_outputs, conclude
from fastcl.cli.layer_similarity import layer_cka_record, layer_lines, matrix_lines
from fastcl.cli.similarity_table import BY_RANKS, RANK_LABEL, Wanted, similarity_table
from fastcl.data import load
from fastcl.errors import FastclError, shown
from fastcl.similarity import SIMILARITIES
from fastcl.zoo.encoders import Encoder, load_encoder
from fastcl.zoo.images import Images, features_of, layers_of
from fastcl.zoo.names import ModelName, parse_models


def align_models(args: Any, wanted: Wanted) -> None:
    """The command with --models; args are its parsed arguments. The files are written before anything is printed.

    Raises:
        FastclError: arguments that do not go together, an unknown model, weights or images that cannot be read, an
            output that cannot be written or would replace an input.
    """
    names = _checked(args, wanted)
    inputs = [name.weights for name in names if name.weights is not None]
    kind, _, where = args.data.partition(":")
    inputs += [Path(where)] if where and kind != "torchvision" else []
    check_outputs(inputs, args.json, args.out)
    data = load(args.data, seed=args.seed, root=args.root)
    images = Images.chosen(data, args.part, args.samples, args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = [load_encoder(name, args.seed, args.pretrained, device) for name in names]
    about = {"data": shown(data.name), "part": args.part, "seed": args.seed, "pretrained": args.pretrained}
    if args.layers is not None:
        record = _layers(encoders, images, args.layers, device)
        conclude(about | record, layer_lines(record, drawn=args.out is not None), args.json, args.out)
        return
    features = features_of(encoders, images, device)
    lines = [f"{len(images)} images of {about['data']}, {_told(names, args.pretrained, args.seed)}"]
    pairs = []
    for a, b in combinations(features, 2):
        record, table = similarity_table(features[a], features[b], wanted)
        pairs.append({"a": a, "b": b} | record)
        if len(features) == 2 or wanted.permutations is not None or wanted.bootstrap is not None:
            lines += [_heading(a, b, features), *table]
    lines += _matrices(list(features), pairs) if len(features) > 2 else []
    widths = {name: x.shape[1] for name, x in features.items()}
    conclude(about | {"samples": len(images), "widths": widths, "pairs": pairs}, lines, args.json)


def _checked(args: Any, wanted: Wanted) -> list[ModelName]:
    if args.a is not None:
        raise FastclError(f"--models and --data compare models, so there is no place for the file {shown(args.a)}")
    if args.models is None or args.data is None:
        raise FastclError("--models needs --data SOURCE" if args.data is None else "--data needs --models A,B")
    names = parse_models(args.models)
    if args.layers is not None:
        check_for_layers(wanted)
        if len(names) != 2:
            raise FastclError(f"--layers compares two models, got {len(names)}")
    elif args.out is not None:
        raise FastclError("--out draws layers; add --layers")
    return names


def _layers(encoders: Sequence[Encoder], images: Images, layers: str, device: torch.device) -> dict[str, Any]:
    first, second = encoders
    patterns = [pattern.strip() for pattern in layers.split(",") if pattern.strip()]
    return layer_cka_record(first.name, second.name, layers_of(first, second, images, patterns, device))


def _told(names: Sequence[ModelName], pretrained: bool, seed: int) -> str:
    own = sum(name.weights is not None for name in names)
    others = "pretrained" if pretrained else f"random (seed {seed})"
    parts = [f"{own} from files"] * (own > 0) + [f"{len(names) - own} {others}"] * (own < len(names))
    return f"weights: {', '.join(parts)}"


def _heading(a: str, b: str, features: Mapping[str, Tensor]) -> str:
    return f"{shown(a)} {tuple(features[a].shape)} against {shown(b)} {tuple(features[b].shape)}"


def _matrices(names: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One matrix of all models for each similarity, and what is undefined."""
    lines = []
    labels = {name: measure.label for name, measure in SIMILARITIES.items()} | {BY_RANKS: RANK_LABEL}
    for measure, label in labels.items():
        if measure not in pairs[0]["measures"]:
            continue
        values = {(pair["a"], pair["b"]): pair["measures"][measure] for pair in pairs}
        table = [[values.get((a, b), values.get((b, a))) if a != b else 1.0 for b in names] for a in names]
        lines += [label, *matrix_lines([shown(name) for name in names], [shown(name) for name in names], table)]
    for pair in pairs:
        for why in dict.fromkeys(why for name, why in pair["undefined"].items() if name in labels):
            lines.append(f"  {shown(pair['a'])}, {shown(pair['b'])}: {why}")
    return lines
