"""Ids of predictions."""

import secrets
import time
from uuid import UUID


def new_prediction_ids(n: int) -> list[UUID]:
    """`n` version 7 UUIDs of now: the first 48 bits are milliseconds, so ids sort by time.

    Source: RFC 9562, section 5.7.
    """
    front = (time.time_ns() // 1_000_000) << 80 | 0x7 << 76
    ids = []
    for _ in range(n):
        random = secrets.randbits(74)
        ids.append(UUID(int=front | (random >> 62) << 64 | 0b10 << 62 | random & ((1 << 62) - 1)))
    return ids
