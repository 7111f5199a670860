"""How long requests took, in buckets that workers count and the supervisor compares."""

from collections.abc import Iterable, Sequence

import numpy as np

BOUNDS_S: tuple[float, ...] = tuple(round(scale * 10**power, 9) for power in range(-5, 1) for scale in (1, 1.5, 2, 3, 5, 7))
"""Upper bounds of the latency buckets, 10 µs to 7 s."""


def added(counts: Iterable[Sequence[int]]) -> list[int]:
    """Requests by bucket, of all workers."""
    return [int(n) for n in np.sum([[0] * (len(BOUNDS_S) + 1), *counts], axis=0)]


def p99_ms(counts: Sequence[int], earlier: Sequence[int] | None = None) -> float | None:
    """Upper bound of the bucket in which the 99th of 100 requests lies, in milliseconds, of those since `earlier`; None without any.

    Slower ones than the last bound count as of it.
    """
    since = np.array(counts) - (0 if earlier is None else np.array(earlier))
    n = int(since.sum())
    if n <= 0:  # none, or a worker was replaced meanwhile and counts anew
        return None
    place = int(np.searchsorted(np.cumsum(since), 0.99 * n))
    return 1000.0 * BOUNDS_S[min(place, len(BOUNDS_S) - 1)]
