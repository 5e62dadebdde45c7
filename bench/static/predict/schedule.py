"""The programs of a launch over the multiprocessors: each takes the next program when one of its own ends."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def uniform(programs: int, work: float, per: Sequence[float], fixed: float, multiprocessors: int) -> float:
    """Cycles until the last of equal programs ends; arguments as `finish`."""
    busiest = -(-programs // multiprocessors)
    rounds, rest = divmod(busiest, len(per))

    def together(count: int) -> float:
        return fixed + count * per[count - 1] * work if count else 0.0

    return rounds * together(len(per)) + together(rest)


def finish(work: Sequence[float], per: Sequence[float], fixed: Sequence[float], multiprocessors: int) -> float:
    """Cycles until the last program ends.

    Args:
        work: tiles of each program, in the order of launch.
        per: cycles of a multiprocessor for a tile with 1, 2, ... resident programs; as many as fit.
        fixed: cycles of each program beyond its tiles, in which the others go on.
    """
    waiting = iter(zip(work, fixed, strict=True))
    resident: list[list[list[float]]] = [[] for _ in range(multiprocessors)]  # [tiles left, fixed cycles left]
    since = [0.0] * multiprocessors
    for _ in per:
        for one in resident:
            if (program := next(waiting, None)) is not None:
                one.append([*program])

    def slowness(k: int) -> float:
        """Cycles of one of the resident programs for a tile."""
        return len(resident[k]) * per[len(resident[k]) - 1]

    def due(k: int) -> float:
        return since[k] + min(left + tiles * slowness(k) for tiles, left in resident[k])

    heap = [(due(k), k) for k in range(multiprocessors) if resident[k]]
    heapq.heapify(heap)
    end = 0.0
    while heap:
        end, k = heapq.heappop(heap)
        pace = slowness(k)
        for one in resident[k]:
            passed = end - since[k]
            waited = min(passed, one[1])
            one[1] -= waited
            one[0] -= (passed - waited) / pace
        since[k] = end
        going = [one for one in resident[k] if one[0] > 1e-9 or one[1] > 1e-6]
        for _ in range(len(resident[k]) - len(going)):
            if (program := next(waiting, None)) is not None:
                going.append([*program])
        resident[k] = going
        if going:
            heapq.heappush(heap, (due(k), k))
    return end
