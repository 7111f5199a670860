"""What a virtual machine is not given: `steal` of proc_stat(5), CPU time that something here was ready to use while the host ran others."""

import time
from dataclasses import dataclass, field

import psutil

CALM = 0.01
"""Below this, a measurement says something about what was measured."""


def _now() -> tuple[float, float]:
    return psutil.cpu_times().steal, time.perf_counter() * (psutil.cpu_count() or 1)


@dataclass
class Steal:
    """Counts from when it is made."""

    _began: tuple[float, float] = field(default_factory=_now)

    @property
    def share(self) -> float:
        """Of all that the cores could have done."""
        (stolen, there), (stolen_before, there_before) = _now(), self._began
        return (stolen - stolen_before) / (there - there_before)
