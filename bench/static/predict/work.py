"""How much work a launch gives to each of its programs, from its arguments alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastcl.kernels.common.launch import Launch
from fastcl.kernels.contrastive import statistics

MASKED_COST = statistics.MASKED_COST.value


@dataclass(frozen=True)
class Feed:
    """How a warp-specialised kernel feeds its consumers.

    Attributes:
        size: bytes of a copy.
        together: all consumers take every tile; else each takes the next one.
        steps: copies that make up a tile.
        leads: the first consumer copies for the product `stages` - 1 turns later; else a warp of its own copies.
    """

    stages: int
    consumers: int
    size: int
    together: bool
    steps: int = 1
    leads: bool = False


@dataclass(frozen=True)
class Tiles:
    """Tiles of one kind: "plain", "masked" or, of a product's remainders, "low"; operations of one."""

    kind: str
    flops: float
    feed: Feed | None = None


@dataclass(frozen=True)
class Work:
    """The work of a launch.

    Attributes:
        tiles: the kinds of tiles; empty: the program runs once from start to end.
        programs: tiles of each kind for each program, in the order of launch.
        uniform: instead, programs that all do the same: how many, and their tiles of each kind (a mean).
        loop: whether a program has a loop over tiles; else it has one tile.
        turns: of the loops of a program without tiles.
        skipped: the programs return at once, because a flag on the device is not set.
    """

    tiles: tuple[Tiles, ...] = ()
    programs: tuple[tuple[float, ...], ...] = ()
    uniform: tuple[int, tuple[float, ...]] | None = None
    loop: bool = True
    turns: int = 1
    skipped: bool = False


def of_launch(launch: Launch, classes: int) -> Work:
    """The work of a recorded launch; rows are in so many classes of equal size."""
    name, a = launch.kernel.__name__, launch.arguments
    count = math.prod(launch.grid)
    if name.endswith("_online_kernel") or value(a.get("ONLINE")):
        return Work(uniform=(count, ()), skipped=True)
    if name.removesuffix("_kernel").removesuffix("_hopper") in ("forward", "backward"):
        return _tiled(launch, classes, name.startswith("forward"))
    if name == "wide_forward_hopper_kernel":
        return _wide_forward(launch, classes)
    if name == "weights_hopper_kernel":
        return _weights_by_hand(launch)
    if name == "masked_weights_kernel":
        return _masked_weights(launch, classes)
    if name == "pair_weights_kernel":
        return _pair_weights(launch, classes)
    if name == "product_kernel":
        return _product(launch, classes)
    return Work(uniform=(count, ()), turns=_turns(name, a))


def value(constant: Any) -> Any:
    """Unwrap a tl.constexpr."""
    return getattr(constant, "value", constant)


def tensors(arguments: Iterable[Any]) -> Iterable[Tensor]:
    """All tensors among a launch's arguments."""
    for one in arguments:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, tuple):
            yield from tensors(one)


def memory(launch: Launch) -> int:
    """Bytes of a launch's arguments, each read or written once; for a block of pairs, of the rows of its two sides."""
    pairs = launch.arguments.get("pairs")
    rows = math.inf if pairs is None else 2 * pairs.size
    sizes = {
        t.data_ptr() or id(t): t.numel() * t.element_size() * min(1, rows / max((1, *t.shape)))
        for t in tensors(launch.arguments.values())
    }
    return round(sum(sizes.values()))


def _turns(name: str, a: dict[str, Any]) -> int:
    """Turns of the loops of a row-wise kernel, in the mean over its programs."""
    if name == "prepare_kernel":
        constants = a["CONSTANTS"]
        labels = a["one"].labels_B
        return 1 if labels is None else -(-len(labels) // value(constants.CHUNK))
    if name == "weights_kernel":
        return -(-a["scale"].n // 512)
    if name == "layout_kernel":
        return value(a["STEPS"])
    if name == "finish_kernel":
        parts = [side.parts for side in (a["one"], a["two"]) if side is not None]
        blocks = max(part.n_blocks if part.streamed is not None else 0 for part in parts)
        return max(1, math.ceil(blocks / (2 if value(a["WAVE"].SYMMETRIC) else 1) / 16))
    return 1


def class_range(start: int, n: int, classes: int, align: int) -> tuple[int, int]:
    """Streamed rows that may share a class with resident ones, as `class_range` of the kernels computes it."""
    first = start // align * align
    last = min(first + align, n) - 1
    lo = -(-(first * classes // n) * n // classes) // align * align
    hi = -(-(last * classes // n + 1) * n // classes)
    return lo, -(-hi // align) * align


def _tiled(launch: Launch, classes: int, forward: bool) -> Work:
    a, t = launch.arguments, launch.arguments["TILE"]
    r, s, align, splits = value(t.BLOCK_R), value(t.BLOCK_S), value(t.ALIGN), launch.grid[1]
    n = a["s"].n
    symmetric = forward and value(a["SYMMETRIC"])
    first_block = a["parts"].first_block if forward else a["acc"].first_block
    folded, counts = value(a.get("FOLDED", False)), []
    for block in range(a["parts"].n_blocks if folded else launch.grid[0]):
        lo, hi = class_range((first_block + block) * r, a["r"].n, classes, align)
        plain = lo // s + (0 if symmetric else max(n // s * s - hi, 0) // s)
        counts.append((plain, (min(hi, -(-n // s) * s) - lo) // s))
    if forward:
        counts.reverse()
    takes = value(a.get("PLAIN", True)), value(a.get("MASKED", False))
    ring = a.get("RING")
    size = s * value(t.D) * a["s"].z.element_size()
    feed = ring and Feed(value(ring.STAGES), value(ring.CONSUMERS), size, not forward)
    base = (2 if forward else 4) * r * s * value(t.D)
    halves = value(t.SPLIT_PLAIN), value(t.SPLIT_MASKED)
    kinds = tuple(
        Tiles(kind, base * (3 if split else 1), feed)
        for kind, split, taken in zip(("plain", "masked"), halves, takes, strict=True)
        if taken
    )
    least = 4 if not forward and not takes[0] else 0  # coarse_share
    if folded:
        return Work(kinds, _folded(counts, launch.grid))

    def shared(count: tuple[int, int], split: int) -> tuple[int, ...]:
        if not forward and all(takes) and count[1] < splits:
            return _in_a_row(count, split, splits, 1)
        return tuple(_share(c, split, splits, least) for c, taken in zip(count, takes, strict=True) if taken)

    return Work(kinds, tuple(shared(count, k) for k in range(splits) for count in counts))


def _folded(counts: Sequence[tuple[int, int]], grid: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Plain and masked tiles of programs that share two blocks; counts: of the blocks, the last one first."""
    blocks, (pairs, both) = len(counts), grid
    programs = []
    for k in range(both):
        for pair in range(pairs):
            longer = _programs_of(blocks - 1 - pair, blocks, both)
            count, split, splits = counts[pair], k, longer
            if k >= longer:
                count, split, splits = counts[blocks - 1 - pair], k - longer, both - longer
            programs.append(_in_a_row(count, split, splits, MASKED_COST))
    return tuple(programs)


def _in_a_row(count: tuple[int, int], split: int, splits: int, cost: int) -> tuple[int, int]:
    """Plain and masked tiles of a program of a block whose masked tiles, each worth `cost` plain ones, come last."""
    ends = [(count[0] + cost * count[1]) * end // splits for end in (split, split + 1)]
    plain, masked = [min(end, count[0]) for end in ends], [max(end - count[0], 0) // cost for end in ends]
    return plain[1] - plain[0], masked[1] - masked[0]


def _programs_of(block: int, blocks: int, both: int) -> int:
    """Programs of a block of the later half, as `programs_of` of the kernels computes them."""
    whole = blocks + 2 * MASKED_COST - 1
    found = min((2 * both * (block + MASKED_COST) + whole) // (2 * whole), both - 1)
    return both if 2 * block == blocks - 1 else found


def _share(count: int, split: int, splits: int, least: int) -> int:
    """Tiles of a program, as the kernels share them."""
    if not least:
        return count * (split + 1) // splits - count * split // splits
    each = max(-(-count // splits), least)
    return min((split + 1) * each, count) - min(split * each, count)


def _by_columns(launch: Launch, resident: int, streamed: int) -> Tiles:
    """A tile of so many rows of a kernel that copies blocks of columns."""
    ring, columns, d = launch.arguments["RING"], launch.arguments["COLUMNS"], value(launch.arguments["TILE"].D)
    size, steps = 2 * value(columns.WIDTH) * (resident + streamed), value(columns.STEPS)
    feed = Feed(value(ring.STAGES), value(ring.CONSUMERS), size, True, steps, leads=True)
    return Tiles("plain", 2 * resident * streamed * d, feed)


def _wide_forward(launch: Launch, classes: int) -> Work:
    a, t = launch.arguments, launch.arguments["TILE"]
    r, s, align, splits = value(t.BLOCK_R), value(t.BLOCK_S), value(t.ALIGN), launch.grid[1]
    counts = []
    for block in reversed(range(launch.grid[0])):
        start, n = (a["parts"].first_block + block) * r, a["r"].n
        _, hi = class_range(start, n, classes, align)
        lo, _ = class_range(min(start + r, n) - 1, n, classes, align)
        behind = 0 if value(a["SYMMETRIC"]) else max(a["s"].n // align * align - hi, 0)
        counts.append(-(-lo // s) + -(-behind // s))
    programs = tuple((_share(count, k, splits, 0),) for k in range(splits) for count in counts)
    return Work((_by_columns(launch, r, s),), programs)


def _weights_by_hand(launch: Launch) -> Work:
    a, t, (blocks, splits) = launch.arguments, launch.arguments["TILE"], launch.grid
    r = value(t.BLOCK_R)
    tiles = -(-min(a["pairs"].size, a["r"].rows - a["pairs"].first_r) // r)
    programs = tuple((_share(tiles, k, splits, 0),) for k in range(splits) for _ in range(blocks))
    return Work((_by_columns(launch, value(t.BLOCK_S), r),), programs)


def _masked_weights(launch: Launch, classes: int) -> Work:
    a, t = launch.arguments, launch.arguments["TILE"]
    r, s, pairs, each = value(t.BLOCK_R), value(t.BLOCK_S), a["pairs"], value(a["TILES"])
    programs = []
    for chunk in range(launch.grid[1]):
        first = pairs.first_s + chunk * each * s
        last = min(first + each * s, pairs.first_s + a["n_tiles"] * s)
        for block in range(launch.grid[0]):
            lo, hi = class_range(pairs.first_r + block * r, a["r"].n, classes, value(t.ALIGN))
            programs.append((max(min(hi, last) - max(lo, first), 0) / s,))
    return Work((Tiles("masked", 2 * r * s * value(t.D)),), tuple(programs))


def _pair_weights(launch: Launch, classes: int) -> Work:
    a, t = launch.arguments, launch.arguments["TILE"]
    r, s = value(t.BLOCK_R), value(t.BLOCK_S)
    pairs, masked = a["pairs"], 0.0
    for block in range(launch.grid[0]):
        lo, hi = class_range(pairs.first_r + block * r, a["r"].n, classes, value(t.ALIGN))
        last = pairs.first_s + launch.grid[1] * s
        masked += max(min(hi, last) - max(lo, pairs.first_s), 0) / s
    share = masked / math.prod(launch.grid)
    base = 2 * r * s * value(t.D)
    kinds = (
        Tiles("plain", base * (3 if value(t.SPLIT_PLAIN) else 1)),
        Tiles("masked", base * (3 if value(t.SPLIT_MASKED) else 1)),
    )
    return Work(kinds, uniform=(math.prod(launch.grid), (1 - share, share)), loop=False)


def _product(launch: Launch, classes: int) -> Work:
    a, t = launch.arguments, launch.arguments["TILE"]
    m, k, d = value(t.BLOCK_M), value(t.BLOCK_K), value(t.BLOCK_D) + value(t.BLOCK_T)
    halves = [(a["one"], a["first"] or launch.grid[0])]
    if a["two"] is not None:
        halves.append((a["two"], launch.grid[0] - a["first"]))

    def mean(rows: Callable[[Any, int], float]) -> float:
        return sum(rows(half, blocks) * blocks for half, blocks in halves) / launch.grid[0]

    def shared(half: Any, blocks: int) -> float:
        """Summed rows in the class range of a block of output rows."""
        first, count = half.summed.first, half.summed.count
        starts = [half.gradient.first + block * m for block in range(blocks)]
        ranges = [class_range(start, half.gradient.n, classes, value(t.ALIGN)) for start in starts]
        return sum(max(min(hi - first, count) - max(lo - first, 0), 0) for lo, hi in ranges) / blocks

    every = mean(lambda half, _: half.summed.count)
    kinds, steps = [Tiles("plain", 2 * m * k * d)], [every / k]
    if value(t.SPLIT_MASKED):
        kinds.append(Tiles("low", 4 * m * k * d))
        steps.append((every if value(t.SPLIT_PLAIN) else mean(shared)) / k)
    return Work(tuple(kinds), uniform=(math.prod(launch.grid), tuple(steps)))
