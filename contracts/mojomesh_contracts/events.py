"""Every event of the mesh, the topic it travels on and the field that orders it.

Within a major version (`...v1`) a field may be added with a default, never removed, renamed or given a new meaning or unit.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import sha1
from typing import Any, ClassVar, Literal, Protocol
from uuid import UUID, uuid5

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from mojomesh_contracts.topics import Topic

FeatureValue = StrictBool | StrictInt | StrictFloat | StrictStr | None
"""One value of a feature; None is missing."""


def derived_id(event_id: UUID, cause: str) -> str:
    """Id of an event caused by another, the same on every replay: what `Event.derive_id` gives, as text, at a third of its cost."""
    digest = sha1(event_id.bytes + cause.encode(), usedforsecurity=False).hexdigest()
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:32]}"


class Frozen(BaseModel):
    """A value that never changes; unknown fields are ignored, so that newer producers may add some."""

    # NaN and infinities travel as the strings that Pydantic reads back, never as null, which means missing.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings", protected_namespaces=())


class Event(Frozen):
    """A fact: it happened, it is immutable."""

    topic: ClassVar[Topic]
    keyed_by: ClassVar[str]  # the field that names the entity whose events must stay in order

    event_id: UUID

    @property
    def partition_key(self) -> str:
        return str(getattr(self, self.keyed_by))

    @property
    def partition(self) -> int | None:
        """The partition it belongs to; None: its key decides, as every Kafka client places it."""
        return None

    def derive_id(self, cause: str) -> UUID:
        """Id of an event caused by this one: the same on every replay, so a repeat is known."""
        return uuid5(self.event_id, cause)


class EventReceived(Event):
    """Something was true of an entity at a time. Produced by clients; read by ingest."""

    topic: ClassVar[Topic] = Topic("events.received.v1", partitions=12, max_bytes=2**20)
    keyed_by: ClassVar[str] = "entity_id"

    feature_set: str = Field(min_length=1, max_length=63)
    entity_id: str = Field(min_length=1, max_length=512)
    event_time: AwareDatetime = Field(description="When it was true, never arrival time; not later than now + 5 minutes")
    values: dict[str, FeatureValue] = Field(description="The full vector; an absent feature is missing")
    reported_at: AwareDatetime | None = Field(default=None, description="When its source knew it; by default when the mesh did")
    vectors: dict[str, list[StrictFloat | StrictInt]] = Field(default={}, description="By feature of type `vector(n)`")


class Arrival(Protocol):
    """What an `EventReceived` says, be it that or what a faster reader makes of the same record."""

    @property
    def event_id(self) -> UUID: ...
    @property
    def feature_set(self) -> str: ...
    @property
    def entity_id(self) -> str: ...
    @property
    def event_time(self) -> datetime: ...
    @property
    def values(self) -> dict[str, FeatureValue]: ...
    @property
    def reported_at(self) -> datetime | None: ...
    @property
    def vectors(self) -> Mapping[str, list[float]]: ...


class RowKey(Frozen):
    """Which feature row: of rows with one event_time the later (created_at, seq) wins."""

    feature_set: str
    entity_id: str
    event_time: AwareDatetime
    created_at: AwareDatetime = Field(description="When the mesh knew it, by the database's clock")
    seq: int = Field(description="Breaks ties of created_at")


class FeaturesWritten(Event):
    """An event is stored as a feature row. Produced by ingest, again on every redelivery; read by features."""

    topic: ClassVar[Topic] = Topic("features.written.v1", partitions=12)
    keyed_by: ClassVar[str] = "entity_id"

    feature_set: str
    entity_id: str
    event_time: AwareDatetime
    reported_at: AwareDatetime
    created_at: AwareDatetime
    seq: int
    values: dict[str, FeatureValue]


class EventParked(Event):
    """An event that its shard did not take when it came; it waits in that shard's own partition. Produced and read by ingest."""

    topic: ClassVar[Topic] = Topic("events.parked.v1", partitions=12, retention=timedelta(days=90), max_bytes=2 * 2**20)
    keyed_by: ClassVar[str] = "shard"

    shard: int = Field(ge=0, description="Its place among the shards, from 0")
    event: EventReceived

    @property
    def partition(self) -> int:
        return self.shard % self.topic.partitions


class DefinitionApplied(Event):
    """A definition is in force from now on. Produced by registry; read by every service from the beginning."""

    topic: ClassVar[Topic] = Topic("definitions.applied.v1", partitions=1, compacted=True)
    keyed_by: ClassVar[str] = "definition_id"

    definition_id: str = Field(description="Kind and name, as in `FeatureSet/flights`")
    version: int = Field(ge=1)
    definition: dict[str, Any] = Field(description="The YAML document as applied; `definitions.parse_definition` reads it")


class TrainingRequested(Event):
    """Somebody asked for a new version of a model. Produced by registry, by hand; read by trainer."""

    topic: ClassVar[Topic] = Topic("training.requested.v1", partitions=3)
    keyed_by: ClassVar[str] = "model"

    model: str
    reason: str = Field(description="Why, in words; kept in the manifest's cause")
    requested_at: AwareDatetime
    snapshot_time: AwareDatetime | None = Field(default=None, description="By default when the run starts")


class Metrics(Frozen):
    """How good predictions are, on `n_rows` labelled rows. What does not apply to the label's type is None."""

    n_rows: int
    auc: float | None = None
    logloss: float | None = None
    calibration_error: float | None = Field(default=None, description="Expected calibration error over ten equal-count bins")
    lift: float | None = Field(default=None, description="AUC over the naive model's (share of positives; 0.5), or RMSE saved")
    rmse: float | None = None
    mae: float | None = None


class FoldTrained(Event):
    """One window of a walk-forward validation is done. Produced by trainer; read by registry, for the lineage."""

    topic: ClassVar[Topic] = Topic("folds.trained.v1", partitions=3)
    keyed_by: ClassVar[str] = "run_id"

    run_id: UUID
    model: str
    fold: int = Field(ge=0)
    train_from: AwareDatetime
    train_to: AwareDatetime
    test_from: AwareDatetime
    test_to: AwareDatetime
    n_train: int
    n_test: int
    metrics: Metrics
    h2o_job: str = Field(description="Key of the H2O job that trained it")
    block_run: str | None = Field(default=None, description="Mage's block run; None when trained in the process")
    seconds: float


class ModelReady(Event):
    """A trained and signed bundle lies in the object store. Produced by trainer; read by registry."""

    topic: ClassVar[Topic] = Topic("models.ready.v1", partitions=3)
    keyed_by: ClassVar[str] = "model"

    model: str
    run_id: UUID
    bundle_digest: str = Field(description="SHA-256, hex; the bundle lies under `bundles/<digest>/`")


class ModelPromoted(Event):
    """A version is the champion from now on. Produced by registry; read by scorer and features from the beginning."""

    topic: ClassVar[Topic] = Topic("models.promoted.v1", partitions=1, compacted=True)
    keyed_by: ClassVar[str] = "model"

    model: str
    version: int = Field(ge=1)
    bundle_digest: str
    promotion: int = Field(ge=1, description="Counts the promotions of the model: a lower one is stale")
    promoted_at: AwareDatetime
    cause: str = Field(description="gate, hand or rollback")
    caused_by: UUID = Field(description="The models.ready event or the request that led to it")


class Challenger(Frozen):
    """A version that scores beside the champion: the entities of its buckets; or as a shadow, without buckets, what the champion scores."""

    version: int = Field(ge=1)
    bundle_digest: str
    buckets: list[int] = Field(description="Of the 1000 that `traffic.bucket_of` gives entities; empty for a shadow")


class TrafficSet(Event):
    """Which versions score beside the champion from now on. Produced by registry; read by scorer from the beginning."""

    topic: ClassVar[Topic] = Topic("models.traffic.v1", partitions=1, compacted=True)
    keyed_by: ClassVar[str] = "model"

    model: str
    setting: int = Field(ge=1, description="Counts the settings of the model: a lower one is stale")
    set_at: AwareDatetime
    challengers: list[Challenger] = Field(description="All of them; every other bucket is the champion's")


class LeftOut(Frozen):
    """A version that a scorer does not let score beside the champion."""

    version: int
    reason: str


class TrafficFollowed(Event):
    """What one scorer replica made of a setting of the traffic. Produced by scorer; read by registry."""

    topic: ClassVar[Topic] = Topic("traffic.followed.v1", partitions=3)
    keyed_by: ClassVar[str] = "model"

    model: str
    setting: int = Field(description="Of `TrafficSet`")
    replica: str
    followed_at: AwareDatetime
    left_out: list[LeftOut] = Field(description="The entities of these versions stay with the champion")


class SwapPhase(Frozen):
    """One step of a swap and how long it took."""

    name: str
    seconds: float


ScoredBy = Literal["flat_trees", "genmodel"]


class WorkerSwap(Frozen):
    """A worker process's part in a swap."""

    slot: int
    load_s: float = Field(description="To load the version beside the old one, score its golden rows, and run it warm")
    commit_s: float = Field(description="From the order to switch to its confirmation")


class Latency(Frozen):
    """99th percentile of the time from a whole request to its answer inside the workers, in milliseconds; None without requests."""

    before_ms: float | None = Field(default=None, description="Since the workers' start")
    during_ms: float | None = Field(default=None, description="From the preparation to the last lease given back")
    after_ms: float | None = Field(default=None, description="In the half second that followed")


class ModelDeployed(Event):
    """The swap certificate of one scorer replica. Produced by scorer; read by registry."""

    topic: ClassVar[Topic] = Topic("models.deployed.v1", partitions=3)
    keyed_by: ClassVar[str] = "model"

    model: str
    version: int
    previous_version: int | None
    bundle_digest: str
    replica: str
    succeeded: bool
    reason: str | None = Field(default=None, description="Why the old model goes on serving, when it does")
    switched_at: AwareDatetime
    phases: list[SwapPhase]
    workers: int
    in_flight_at_switch: int = Field(description="Requests that were leased to the old version when the reference was switched")
    drained: bool = Field(description="Every lease on the old version was given back before the time-out")
    failed_requests: int = Field(description="Requests answered with a 5xx between prepare and drain")
    golden_rows: int
    max_golden_difference: float
    scored_by: ScoredBy | None = Field(
        default=None, description="What scores: the unpacked trees, or genmodel row by row; equal to the last bit"
    )
    per_worker: list[WorkerSwap] = []
    p99: Latency = Latency()


class ScoreRequested(Event):
    """Somebody wants a prediction on Kafka. Produced by clients; read by scorer."""

    topic: ClassVar[Topic] = Topic("scores.requested.v1", partitions=12, max_bytes=2**20)
    keyed_by: ClassVar[str] = "model_entity"

    model: str
    entity_id: str | None = None
    values: dict[str, FeatureValue] | None = Field(default=None, description="By column; absent: looked up by entity_id")
    event_time: AwareDatetime | None = Field(default=None, description="As of when; by default now")

    @property
    def model_entity(self) -> str:
        return f"{self.model}/{self.entity_id or self.event_id}"


class Prediction(Frozen):
    """The receipt of one prediction."""

    prediction_id: UUID = Field(description="uuid7, or derived from the event_id of the request on Kafka")
    entity_id: str | None
    event_time: AwareDatetime
    made_at: AwareDatetime
    inputs: list[float | None] = Field(description="The encoded row the MOJO saw, in schema order; None is missing (NaN)")
    scores: list[float] = Field(description="Class probabilities in the order of the schema's classes, or one number")
    rows: list[RowKey] = Field(default=[], description="The feature rows used, when looked up")
    request_id: UUID | None = Field(default=None, description="event_id of the scores.requested event, when it came by Kafka")


class PredictionsMade(Event):
    """A block of predictions of one model version. Produced by scorer; read by features."""

    topic: ClassVar[Topic] = Topic("predictions.made.v1", partitions=12)
    keyed_by: ClassVar[str] = "model"

    model: str
    version: int
    bundle_digest: str
    replica: str
    predictions: list[Prediction]

    @property
    def partition_key(self) -> str:
        # The order of blocks does not matter, the load of one busy model should spread.
        return f"{self.model}/{self.event_id}"


class ShadowCompared(Event):
    """What a shadow made of rows that the champion answered, so far. Produced by scorer's workers; read by registry.

    Counts only ever grow: of the events of one `counter`, the one with the most rows has all the others in it.
    """

    topic: ClassVar[Topic] = Topic("models.shadowed.v1", partitions=3)
    keyed_by: ClassVar[str] = "model"

    model: str
    version: int = Field(description="Of the champion")
    shadow_version: int
    counter: UUID = Field(description="Of one worker's counting of this pair of versions")
    counted_at: AwareDatetime
    n_rows: int = Field(ge=1)
    n_dropped: int = Field(ge=0, description="Rows that the shadow had no time for, or whose columns it does not have")
    edges: list[float] = Field(description="Inner edges of the bins of the score (`drift.bin_of_number`)")
    counts: list[int] = Field(description="The champion's scores, by bin; the last one is for missing")
    shadow_counts: list[int]
    sum_of_differences: float = Field(description="Of the absolute differences of the scores")
    n_agreed: int | None = Field(description="Rows of which both find the same class the likeliest; None for a number")


class DriftDetected(Event):
    """Live data has left the model's baseline for several windows in a row. Produced by features; read by trainer."""

    topic: ClassVar[Topic] = Topic("drift.detected.v1", partitions=3)
    keyed_by: ClassVar[str] = "model"

    model: str
    version: int
    feature: str = Field(description="The column that drifted most, or `score`")
    measure: str = Field(description="psi or kl")
    value: float
    threshold: float
    windows: int = Field(description="How many windows in a row were over the threshold")
    window_from: AwareDatetime = Field(description="Event time of the first prediction of the last window")
    window_to: AwareDatetime


class QualityBreached(Event):
    """In one window a feature set's events were not as its definition expects. Produced by features; read by people and what wakes them."""

    topic: ClassVar[Topic] = Topic("quality.breached.v1", partitions=3)
    keyed_by: ClassVar[str] = "feature_set"

    feature_set: str
    expectation: str = Field(description="`values` (a range, or the categories there are), `missing`, `rows` or `freshness`")
    feature: str | None = Field(description="Of which something was expected; None: of the set as a whole")
    window_from: AwareDatetime = Field(description="By when the mesh knew the rows; not included")
    window_to: AwareDatetime = Field(description="Included")
    value: float = Field(description="Rows with such a value, share of missing ones, rows, or age of the newest event time in seconds")
    reason: str = Field(description="In words")
    n_rows: int = Field(description="Rows stored in the window")
    n_held: int = Field(description="Events held back in the window; `mojomesh quarantine` shows them")
    examples: list[UUID] = Field(description="event_id of a few of the rows or events")


EVENTS: tuple[type[Event], ...] = (
    EventReceived,
    EventParked,
    FeaturesWritten,
    DefinitionApplied,
    TrainingRequested,
    FoldTrained,
    ModelReady,
    ModelPromoted,
    TrafficSet,
    ModelDeployed,
    ScoreRequested,
    PredictionsMade,
    ShadowCompared,
    TrafficFollowed,
    DriftDetected,
    QualityBreached,
)
"""Every event there is; what creates topics, writes schemas and documents the mesh walks over this."""
