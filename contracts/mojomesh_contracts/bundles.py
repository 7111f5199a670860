"""What a bundle holds: the files that make a model version, beside `model.mojo.zip` and `signature`."""

from typing import Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field

from mojomesh_contracts.definitions import Model
from mojomesh_contracts.events import FeatureValue, Frozen, Metrics
from mojomesh_contracts.storable import Time

MOJO_FILE = "model.mojo.zip"
SCHEMA_FILE = "schema.json"
BASELINE_FILE = "baseline.json"
GOLDEN_FILE = "golden.json"
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "signature"
SIGNED_FILES = (MOJO_FILE, SCHEMA_FILE, BASELINE_FILE, GOLDEN_FILE, MANIFEST_FILE)


class Column(Frozen):
    """One input of the MOJO. A category's levels are in the order in which the MOJO numbers them."""

    name: str
    feature_set: str
    feature: str
    type: Literal["number", "category", "boolean"]
    levels: list[str] | None = None


class BundleSchema(Frozen):
    """schema.json: the MOJO's inputs in scoring order, and what its outputs are."""

    columns: list[Column]
    label: str
    classes: list[str] | None = Field(description="In the order of the scores; None for regression")


class Bins(Frozen):
    """How often training data fell into each bin of one column.

    A number: `edges` are the inner deciles; bin i holds values in (edges[i-1], edges[i]]; then one bin for missing.
    A category: one bin a level of `levels`, then one for all others, then one for missing.
    """

    column: str = Field(description="A column's name, or `score`")
    edges: list[float] | None = None
    levels: list[str] | None = None
    counts: list[int]
    psi_p99: float = Field(description="99th percentile of PSI of the training data's own windows against these bins")
    kl_p99: float


class Baseline(Frozen):
    """baseline.json: what live data is measured against."""

    window: int = Field(description="Rows a window of the percentiles")
    bins: list[Bins]


class GoldenRow(Frozen):
    """One encoded row (None is missing) and the scores H2O gave it."""

    inputs: list[float | None]
    scores: list[float]


class Golden(Frozen):
    """golden.json: rows that every load of the bundle must score as written, within `tolerance`."""

    tolerance: float
    rows: list[GoldenRow]


class SnapshotQuery(Frozen):
    """What a snapshot is made of: the same query at the same time gives the same rows for ever."""

    model: Model
    snapshot_time: Time


class SnapshotTaken(Frozen):
    """A snapshot as features answers it: Parquet in the object store, one row per entity and event_time with a known label.

    Columns: `entity_id`, `event_time` and `label_time` (event_time of the outcome), both epoch milliseconds, UTC; `label`
    (a binary label is 0 or 1); then the model's columns under `definitions.column_name`, booleans as 0 or 1. Sorted by
    (event_time, entity_id).
    """

    path: str = Field(description="Key in the object store")
    digest: str = Field(description="SHA-256 of the rows, hex")
    n_rows: int
    snapshot_time: AwareDatetime
    columns: list[Column] = Field(description="Inputs in order; levels are filled in by training")
    erasures: list[AwareDatetime] = Field(default=[], description="When facts were erased that were known at `snapshot_time`")


class FoldPlan(Frozen):
    """One walk-forward window, cut on the time a label became known. Train on [train_from, train_to), test on [test_from, test_to)."""

    fold: int
    train_from: AwareDatetime
    train_to: AwareDatetime
    test_from: AwareDatetime
    test_to: AwareDatetime


class FoldResult(FoldPlan):
    """What training one fold gave."""

    n_train: int
    n_test: int
    metrics: Metrics
    champion_metrics: Metrics | None = Field(
        default=None, description="The champion's, on those test rows whose labels became known after its snapshot"
    )
    challenger_metrics: Metrics | None = Field(default=None, description="This fold's model's, on the same rows")
    h2o_job: str
    block_run: str | None = None
    seconds: float


class Cause(Frozen):
    """Why a run was started."""

    kind: Literal["requested", "drift"]
    event_id: UUID = Field(description="The training.requested or drift.detected event")
    reason: str


class ChampionComparison(Frozen):
    """New version against champion, on test rows whose labels became known after the champion's snapshot."""

    champion_version: int
    champion_digest: str
    champion: Metrics
    challenger: Metrics


class Manifest(Frozen):
    """manifest.json: where the model comes from."""

    model: str
    run_id: UUID
    cause: Cause
    definition: Model
    snapshot_time: AwareDatetime
    snapshot_digest: str
    snapshot_path: str
    erasures: list[AwareDatetime] = Field(default=[], description="When facts were erased from what was known at `snapshot_time`")
    n_rows: int
    train_from: AwareDatetime
    train_to: AwareDatetime = Field(description="When the last training label became known")
    folds: list[FoldResult]
    metrics: Metrics = Field(description="Over the test rows of all folds together")
    naive: Metrics = Field(description="The naive model's, on the same rows")
    parity: float = Field(description="Greatest difference between MOJO and in-cluster scores on the last fold's rows")
    parent_digest: str | None = Field(default=None, description="The champion when the run started")
    comparison: ChampionComparison | None = None
    fold_runner: Literal["mage", "local"]
    pipeline_run: str | None = Field(default=None, description="Mage's pipeline run")
    algorithm: str = Field(description="What H2O trained, as in `gbm`")
    params: dict[str, Any]
    seed: int
    pins: dict[str, str] = Field(description="Versions of what the result depends on, as in h2o and java")
    created_at: AwareDatetime
    example: dict[str, FeatureValue] = Field(default={}, description="One row by column name, for people who try the model")
