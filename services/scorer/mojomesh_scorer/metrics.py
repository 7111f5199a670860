"""One page of metrics for all processes of the scorer, dead workers' counts included."""

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Tells prometheus_client in a worker to keep its values in files of this folder; must be set before it is imported."""


class _Merged(Collector):
    """The supervisor's metrics and the workers' sums; families of one name get one header, samples say whose they are."""

    def __init__(self, folder: Path) -> None:
        self._workers = CollectorRegistry()
        MultiProcessCollector(self._workers, path=str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for part, registry in (("supervisor", REGISTRY), ("workers", self._workers)):
            for family in registry.collect():
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += [sample._replace(labels={**sample.labels, "part": part}) for sample in family.samples]
        yield from families.values()


def merged_metrics(folder: Path) -> bytes:
    """Everything in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Merged(folder))
    return generate_latest(registry)


def forget_gauges(folder: Path, pid: int) -> None:
    """Drop a dead worker's gauges; what it counted stays."""
    for file in folder.glob(f"gauge_*_{pid}.db"):
        file.unlink(missing_ok=True)
