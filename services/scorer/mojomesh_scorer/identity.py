"""Ids of predictions."""

import itertools
import os
import time


class PredictionIds:
    """Makes version 7 UUIDs: the first 48 bits are milliseconds, so ids sort by time.

    One source's ids share 26 random bits and count up from 48 more, as the standard allows: cheaper than randomness for each.

    Source: RFC 9562, sections 5.7 and 6.2.
    """

    def __init__(self) -> None:
        random = int.from_bytes(os.urandom(10), "big")
        self._after_time = f"7{random >> 68:03x}-{0x8000 | (random >> 54 & 0x3FFF):04x}-"
        self._counted = itertools.count(random & 0x7FFF_FFFF_FFFF)  # half of the 48 bits' range: it will not run over
        self._time_ms = 0
        self._front = ""

    def take(self, n: int) -> list[str]:
        """`n` ids of now."""
        time_ms = time.time_ns() // 1_000_000
        if time_ms != self._time_ms:
            self._time_ms, time_hex = time_ms, f"{time_ms:012x}"
            self._front = f"{time_hex[:8]}-{time_hex[8:]}-{self._after_time}"
        front = self._front
        return [f"{front}{count:012x}" for count in itertools.islice(self._counted, n)]
