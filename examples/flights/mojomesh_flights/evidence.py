"""What `reports/demo.json` says. Every number is measured in the run it belongs to; the page is drawn from this and nothing else."""

from datetime import datetime
from typing import Any, Literal

from mojomesh_contracts.bundles import Cause, ChampionComparison, FoldResult
from mojomesh_contracts.events import DriftDetected, Frozen, Metrics, ModelDeployed


class PhaseTime(Frozen):
    """How long one part of the demo took."""

    name: str
    seconds: float


class Replayed(Frozen):
    """What was told, and how."""

    first_event: datetime
    last_event: datetime
    pace: int
    history_pace: int
    http_rate: float
    http_rate_at_swaps: float
    held_s: float
    waited_s: float
    drift: bool


class DeadLetter(Frozen):
    """A fact that the mesh could not take, and why."""

    value: str
    reason: str


class Facts(Frozen):
    """Where every published fact is now."""

    published: int
    sent_bad_on_purpose: int
    stored: dict[str, int]
    dead_letters: list[DeadLetter]

    @property
    def balanced(self) -> bool:
        """Nothing was lost and nothing counted twice."""
        return self.published == sum(self.stored.values()) + len(self.dead_letters)


class VersionEvidence(Frozen):
    """One version: why it was asked for, what its training gave, when it served."""

    version: int
    state: str
    refused_for: list[str]
    cause: Cause
    alert: DriftDetected | None
    held_s: float
    run_id: str
    fold_runner: str
    pipeline_run: str | None
    n_rows: int
    train_from: datetime
    train_to: datetime
    folds: list[FoldResult]
    metrics: Metrics
    naive: Metrics
    comparison: ChampionComparison | None
    parity: float
    bundle_digest: str
    snapshot_digest: str
    promoted_at: datetime | None
    serves_from: datetime | None
    """Event time of the first flight that it scored."""
    certificate: ModelDeployed | None


class Answer(Frozen):
    """One HTTP request near a swap, in seconds from the first that the new version answered."""

    after_s: float
    latency_ms: float
    version: int | None


class Swap(Frozen):
    """What HTTP clients saw while one version took over from another, by their own log.

    From `margin_s` before its promotion to `margin_s` after the last lease on the old version was given back.
    """

    version: int
    seconds: float
    margin_s: float
    requests: int
    failed: int
    by_version: dict[int, int]
    old_after_drain: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    answers: list[Answer]


class HttpLog(Frozen):
    """The whole client log against the receipts of the mesh, joined on prediction id."""

    requests: int
    failed: int
    failed_by_status: dict[str, int]
    by_door: dict[str, int]
    p50_ms: float
    p99_ms: float
    without_receipt: int
    other_version: int
    other_score: int
    during_swaps: int
    failed_during_swaps: int


class Recomputed(Frozen):
    """All scores of one version, computed again by H2O from its MOJO and the inputs in the receipts."""

    version: int
    predictions: int
    max_difference: float


class Lookups(Frozen):
    """The features that the mesh looked up, against the same computed from the files by plain SQL."""

    compared: int
    different: int


class Period(Frozen):
    """Flights whose label became known in one stretch of time: what served, and what the first version would have said."""

    starts_at: datetime
    version: int | None
    n_flights: int
    late: float
    served_auc: float
    frozen_auc: float
    served_logloss: float
    frozen_logloss: float


class Comparison(Frozen):
    """What really served against the first version frozen, on the same flights: those after the first retraining."""

    n_flights: int
    served_auc: float
    frozen_auc: float
    auc_gain_low: float
    auc_gain_high: float
    served_logloss: float
    frozen_logloss: float


class CalibrationBin(Frozen):
    """A tenth of the predictions, by score."""

    mean_score: float
    share_late: float
    n_flights: int


class Calibration(Frozen):
    """How far the scores can be taken at their word."""

    which: Literal["served", "frozen"]
    error: float
    bins: list[CalibrationBin]


class OutOfTime(Frozen):
    """Live predictions of what served, made before the outcome was known, against the naive model: the share of late flights so far."""

    n_flights: int
    served: Metrics
    naive: Metrics


class DriftWindow(Frozen):
    """One window of live data against the baseline of the version that served, by column."""

    version: int
    window_from: datetime
    window_to: datetime
    psi: dict[str, float]
    psi_threshold: dict[str, float]


class Lineage(Frozen):
    """One prediction and everything it goes back to."""

    receipt: dict[str, Any]
    version: int
    came_true: bool
    arrival: datetime


class Evidence(Frozen):
    """The whole of `reports/demo.json`."""

    mojomesh: str
    made_at: datetime
    machine: dict[str, str]
    phases: list[PhaseTime]
    seconds: float
    replayed: Replayed
    facts: Facts
    balanced: bool
    versions: list[VersionEvidence]
    out_of_time: OutOfTime
    comparison: Comparison | None
    by_month: list[Period]
    by_week: list[Period]
    calibration: list[Calibration]
    drift: list[DriftWindow]
    http: HttpLog
    swaps: list[Swap]
    recomputed: list[Recomputed]
    lookups: Lookups
    lineage: Lineage
