"""The skew monitor: what models were given online, computed again as training would have it."""

import asyncio
from collections import Counter as Tally
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

from prometheus_client import Counter, Gauge

from mojomesh_chassis.bundles import Bundle
from mojomesh_chassis.database import Database
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import MeshError
from mojomesh_chassis.health import Health
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.bundles import Column
from mojomesh_contracts.events import FeatureValue, ModelPromoted
from mojomesh_features import tables
from mojomesh_features.champions import ChampionBundles, Champions
from mojomesh_features.sealing import OUTAGES
from mojomesh_features.snapshots import Snapshots
from mojomesh_features.tables import LoggedVector
from mojomesh_store.online import microseconds
from mojomesh_store.vectors import Plan, plan_of

GRACE = timedelta(seconds=10)
"""How long what is known may be on its way to the online store, clocks that differ included."""
SAMPLE = 500
SAMPLE_SPAN = timedelta(seconds=1)

_VECTORS = Counter(
    "mojomesh_features_skew_vectors_total", "Logged online vectors computed again offline, by what came of it", ["model", "outcome"]
)
_RATE = Gauge("mojomesh_features_skew_mismatch_rate", "Share of the logged online vectors that training would have otherwise", ["model"])


class SkewMonitor:
    """Compares a sample of the vectors that champions scored by entity with what a snapshot has for the same entity, time and knowledge.

    A fact that became known within `grace` of a prediction may or may not have been seen by it, so a value is only held against the two
    of before and after that: equal to one of them is equal; different from both is a mismatch if they agree, and unsettled if not.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        database: Database,
        champions: Champions,
        bundles: ChampionBundles,
        definitions: Definitions,
        grace: timedelta = GRACE,
    ) -> None:
        self._snapshots = snapshots
        self._database = database
        self._champions = champions
        self._bundles = bundles
        self._definitions = definitions
        self._grace = grace
        self._seen: dict[str, int] = {}

    async def check(self) -> dict[str, Tally[str]]:
        """Compare the newest vectors of each model that were not compared before; how many of each outcome.

        A model whose vectors cannot be had now, either way, is left for the next time.
        """
        outcomes = {}
        for champion in self._champions.all:
            try:
                if (bundle := await self._bundles.of(champion)) and (sample := await self._sample(champion)):
                    outcomes[champion.model] = await self._compare(bundle, sample)
            except (MeshError, *OUTAGES) as error:
                log.warning("skew_not_measured", model=champion.model, reason=repr(error))
        return outcomes

    async def _sample(self, champion: ModelPromoted) -> list[LoggedVector]:
        async with self._database.begin() as db:
            after = self._seen.get(champion.model, 0)
            sample = await tables.vectors_to_compare(db, champion, after, self._grace, SAMPLE_SPAN, SAMPLE)
        if sample:
            self._seen[champion.model] = sample[-1].seq
        return sample

    async def _compare(self, bundle: Bundle, sample: Sequence[LoggedVector]) -> Tally[str]:
        model = bundle.manifest.definition
        plan = _as_served(plan_of(model, self._definitions))
        asked = [(vector.entity_id, microseconds(vector.event_time)) for vector in sample]
        made = [vector.made_at for vector in sample]
        before, after = await self._snapshots.vectors(plan, asked, [min(made) - self._grace, max(made) + self._grace])
        tally: Tally[str] = Tally(equal=0, mismatched=0, unsettled=0)
        for vector, *both in zip(sample, before, after, strict=True):
            cells = zip(bundle.schema.columns, vector.inputs, strict=True)
            differing = {column.name: of_cell(column, value, both) for column, value in cells}
            outcome = max(differing.values(), key=("equal", "unsettled", "mismatched").index)
            tally[outcome] += 1
            if outcome == "mismatched":
                columns = [name for name, found in differing.items() if found == outcome]
                log.warning("online_vector_mismatched", model=model.name, prediction_id=str(vector.prediction_id), columns=columns)
        for outcome, n in tally.items():
            _VECTORS.labels(model.name, outcome).inc(n)
        if settled := tally["equal"] + tally["mismatched"]:
            _RATE.labels(model.name).set(tally["mismatched"] / settled)
        return tally


def _as_served(plan: Plan) -> Plan:
    """The plan as online reads follow it: as known when they were made, and with rows that the model takes however old they are."""
    sources = plan.sources
    if plan.model.stale == "serve":
        sources = tuple(replace(source, max_age_us=None) for source in sources)
    return replace(plan, model=plan.model.model_copy(update={"known_at": "snapshot"}), sources=sources)


def of_cell(column: Column, logged: float | None, both: Sequence[Mapping[str, FeatureValue]]) -> str:
    """What comes of one logged input, by the vectors of before and after it."""
    wanted = [encoded(column, vector.get(column.name)) for vector in both]
    if logged in wanted:
        return "equal"
    return "mismatched" if wanted[0] == wanted[1] else "unsettled"


def encoded(column: Column, value: FeatureValue) -> float | None:
    """A value as a model is given it: a category's level by its number, a level that it does not know as missing."""
    if value is None:
        return None
    if column.type == "category":
        levels = column.levels or []
        return float(levels.index(str(value))) if value in levels else None
    return float(value)


@asynccontextmanager
async def watching_skew(monitor: SkewMonitor, every: timedelta, health: Health) -> AsyncIterator[None]:
    """Compare from time to time, beside the service. Should a bug end it, the service is not ready any more and says why."""
    async with health.beside("skew", _keep_comparing(monitor, every), "the skew monitor"):
        yield


async def _keep_comparing(monitor: SkewMonitor, every: timedelta) -> None:
    while True:
        await asyncio.sleep(every.total_seconds())
        await monitor.check()
