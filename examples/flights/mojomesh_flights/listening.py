"""What the mesh says on Kafka while the demo runs, taken down as any client could."""

import asyncio
import json
import time
from array import array
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, GroupLoadInProgressError

from mojomesh_contracts.events import (
    DriftDetected,
    Event,
    EventReceived,
    FeaturesWritten,
    FoldTrained,
    ModelDeployed,
    ModelPromoted,
    ModelReady,
    PredictionsMade,
)

COORDINATOR_PATIENCE_S = 10.0
SAMPLE_EVERY = 500  # predictions of which one is kept whole, with the rows it used


@dataclass
class Predictions:
    """Every prediction made, column by column; the inputs are encoded as their version's schema says."""

    ids: list[str] = field(default_factory=list)
    entity_ids: list[str | None] = field(default_factory=list)
    by_kafka: "array[int]" = field(default_factory=lambda: array("b"))
    event_ms: "array[int]" = field(default_factory=lambda: array("q"))
    made_ms: "array[int]" = field(default_factory=lambda: array("q"))
    versions: "array[int]" = field(default_factory=lambda: array("i"))
    scores: "array[float]" = field(default_factory=lambda: array("d"))
    inputs: "array[float]" = field(default_factory=lambda: array("d"))

    n_requested: int = 0  # of them asked for over Kafka

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, version: int, prediction: dict[str, Any]) -> None:
        self.ids.append(prediction["prediction_id"])
        self.entity_ids.append(prediction["entity_id"])
        by_kafka = prediction.get("request_id") is not None
        self.by_kafka.append(by_kafka)
        self.n_requested += by_kafka
        self.event_ms.append(_epoch_ms(prediction["event_time"]))
        self.made_ms.append(_epoch_ms(prediction["made_at"]))
        self.versions.append(version)
        self.scores.append(prediction["scores"][-1])
        self.inputs.extend([float("nan") if value is None else value for value in prediction["inputs"]])


class Listener:
    """Reads what is said from the beginning of each topic; a prediction that comes twice is taken once."""

    def __init__(self, kafka: str, model: str) -> None:
        self._kafka, self._model = kafka, model
        self._known: set[str] = set()
        self.predictions = Predictions()
        self.samples: list[dict[str, Any]] = []
        self.alerts: list[DriftDetected] = []
        self.folds: list[FoldTrained] = []
        self.ready: list[ModelReady] = []
        self.promoted: list[ModelPromoted] = []
        self.deployed: list[ModelDeployed] = []
        self._kept: dict[str, tuple[type[Event], list[Any]]] = {
            event.topic.name: (event, kept)
            for event, kept in (
                (DriftDetected, self.alerts),
                (FoldTrained, self.folds),
                (ModelReady, self.ready),
                (ModelPromoted, self.promoted),
                (ModelDeployed, self.deployed),
            )
        }

    async def run(self) -> None:
        """Until cancelled."""
        consumer = AIOKafkaConsumer(
            PredictionsMade.topic.name,
            *self._kept,
            bootstrap_servers=self._kafka,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            max_poll_records=200,
        )
        await consumer.start()
        try:
            async for record in consumer:
                self._take(record.topic, record.value)
        finally:
            await consumer.stop()

    def _take(self, topic: str, value: bytes) -> None:
        if topic in self._kept:
            event, kept = self._kept[topic]
            said = event.model_validate_json(value)
            if said.model == self._model and said.event_id not in {known.event_id for known in kept}:  # type: ignore[attr-defined]
                kept.append(said)
            return
        block = json.loads(value)
        if block["model"] != self._model:
            return
        for prediction in block["predictions"]:
            if prediction["prediction_id"] not in self._known:
                self._known.add(prediction["prediction_id"])
                if len(self._known) % SAMPLE_EVERY == 0:
                    self.samples.append({**prediction, "version": block["version"]})
                self.predictions.add(block["version"], prediction)


class Offsets:
    """How far the mesh has come with what was published."""

    STEPS = (("ingest", EventReceived), ("features", FeaturesWritten))
    """Which service consumes what on the way of a fact to the online features."""

    def __init__(self, kafka: str) -> None:
        self._admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        self._consumer = AIOKafkaConsumer(bootstrap_servers=kafka)

    async def __aenter__(self) -> "Offsets":
        await self._admin.start()
        await self._consumer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._admin.close()
        await self._consumer.stop()

    async def lag(self, service: str, event: type[Event]) -> int:
        """Records that `service` has not handled yet."""
        return await self._behind(f"{service}.{event.topic.name}", await self._ends(event.topic.name, event.topic.partitions))

    async def stored(self) -> None:
        """Return when every fact published before the call is a feature row that an online read finds."""
        for service, event in self.STEPS:
            ends = await self._ends(event.topic.name, event.topic.partitions)
            while await self._behind(f"{service}.{event.topic.name}", ends):
                await asyncio.sleep(0.05)

    async def dead_letters(self, event: type[Event]) -> list[dict[str, str]]:
        """Every dead letter of a topic: what it was and why it died."""
        topic = event.topic.dead_letters
        ends = await self._ends(topic.name, topic.partitions)
        self._consumer.assign(list(ends))
        await self._consumer.seek_to_beginning()
        letters: list[dict[str, str]] = []
        while len(letters) < sum(ends.values()):
            for records in (await self._consumer.getmany(timeout_ms=1000)).values():
                for record in records:
                    headers = {name: value.decode(errors="replace") for name, value in record.headers}
                    letters.append({"value": (record.value or b"").decode(errors="replace"), **headers})
        return letters

    async def _ends(self, topic: str, partitions: int) -> dict[TopicPartition, int]:
        ends: dict[TopicPartition, int] = await self._consumer.end_offsets([TopicPartition(topic, number) for number in range(partitions)])
        return ends

    async def _behind(self, group: str, ends: dict[TopicPartition, int]) -> int:
        committed = await self._committed(group)
        return sum(max(0, end - max(0, committed[partition].offset if partition in committed else 0)) for partition, end in ends.items())

    async def _committed(self, group: str) -> dict[TopicPartition, Any]:
        deadline = time.monotonic() + COORDINATOR_PATIENCE_S
        while True:
            try:
                committed: dict[TopicPartition, Any] = await self._admin.list_consumer_group_offsets(group)
            except (GroupCoordinatorNotAvailableError, GroupLoadInProgressError):  # a broker that has just started
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
            else:
                return committed


def _epoch_ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)
