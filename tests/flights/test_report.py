import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from mojomesh_contracts.bundles import Cause, FoldResult
from mojomesh_contracts.events import DriftDetected, Metrics
from mojomesh_flights import evidence as said
from mojomesh_flights.report import render, write_report

MAY = datetime(2013, 5, 1, tzinfo=UTC)
JUNE = datetime(2013, 6, 1, tzinfo=UTC)


def make_metrics(auc: float) -> Metrics:
    return Metrics(n_rows=9_000, auc=auc, logloss=0.5, calibration_error=0.03, lift=auc - 0.5)


def make_version(number: int, serves_from: datetime) -> said.VersionEvidence:
    alert = None
    if number > 1:
        alert = DriftDetected(
            event_id=uuid4(),
            model="flight-delay",
            version=number - 1,
            feature="weather.temp",
            measure="psi",
            value=6.5,
            threshold=5.5,
            windows=5,
            window_from=serves_from - timedelta(days=5),
            window_to=serves_from - timedelta(days=1),
        )
    fold = FoldResult(
        fold=0,
        train_from=MAY - timedelta(days=120),
        train_to=serves_from - timedelta(days=11),
        test_from=serves_from - timedelta(days=10),
        test_to=serves_from,
        n_train=90_000,
        n_test=9_000,
        metrics=make_metrics(0.7),
        h2o_job="$0301$_abc",
        block_run="4",
        seconds=8.0,
    )
    return said.VersionEvidence(
        version=number,
        state="champion",
        refused_for=[],
        cause=Cause(kind="drift" if alert else "requested", event_id=alert.event_id if alert else uuid4(), reason="because <it> was time"),
        alert=alert,
        held_s=40.0,
        run_id=str(uuid4()),
        fold_runner="mage",
        pipeline_run=str(number),
        n_rows=100_000,
        train_from=fold.train_from,
        train_to=serves_from,
        folds=[fold],
        metrics=make_metrics(0.7),
        naive=make_metrics(0.5),
        comparison=None,
        parity=0.0,
        bundle_digest="ab" * 32,
        snapshot_digest="cd" * 32,
        promoted_at=MAY,
        serves_from=serves_from,
        certificate=None,
    )


def make_period(starts_at: datetime, version: int | None) -> said.Period:
    return said.Period(
        starts_at=starts_at,
        version=version,
        n_flights=6_000,
        late=0.2,
        served_auc=0.72,
        frozen_auc=0.7,
        served_logloss=0.5,
        frozen_logloss=0.52,
    )


def make_evidence(*, failed: int = 0, stored: int = 9) -> said.Evidence:
    receipt = {
        "prediction_id": str(uuid4()),
        "entity_id": "UA1",
        "scores": [0.7, 0.3],
        "rows": [
            {"feature_set": "weather", "entity_id": "EWR", "event_time": "2013-06-02T10:00:00Z", "created_at": "2026-01-01T10:00:00Z"}
        ],
    }
    bins = [said.CalibrationBin(mean_score=share / 10, share_late=share / 10, n_flights=600) for share in range(10)]
    columns = {"weather.temp": 6.0, "score": 0.2}
    return said.Evidence(
        mojomesh="0.1.0",
        made_at=JUNE,
        machine={"cores": "2"},
        phases=[said.PhaseTime(name="train a first model", seconds=40.0)],
        seconds=400.0,
        replayed=said.Replayed(
            first_event=MAY,
            last_event=JUNE,
            pace=4_000,
            history_pace=12_000,
            http_rate=60,
            http_rate_at_swaps=300,
            held_s=40,
            waited_s=0,
            drift=True,
        ),
        facts=said.Facts(
            published=10,
            sent_bad_on_purpose=1,
            stored={"flights": stored},
            dead_letters=[said.DeadLetter(value="<script>alert(1)</script>", reason="not JSON")],
        ),
        balanced=stored == 9,
        versions=[make_version(1, MAY), make_version(2, JUNE)],
        out_of_time=said.OutOfTime(n_flights=6_000, served=make_metrics(0.72), naive=make_metrics(0.5)),
        comparison=said.Comparison(
            n_flights=6_000,
            served_auc=0.72,
            frozen_auc=0.7,
            auc_gain_low=0.01,
            auc_gain_high=0.03,
            served_logloss=0.5,
            frozen_logloss=0.52,
        ),
        by_month=[make_period(JUNE, None)],
        by_week=[make_period(MAY, 1), make_period(JUNE, 2)],
        calibration=[said.Calibration(which="served", error=0.01, bins=bins), said.Calibration(which="frozen", error=0.02, bins=bins)],
        drift=[
            said.DriftWindow(version=1, window_from=MAY, window_to=JUNE, psi=columns, psi_threshold={"weather.temp": 5.5, "score": 0.25}),
        ],
        http=said.HttpLog(
            requests=2_000,
            failed=failed,
            failed_by_status={"429": failed} if failed else {},
            by_door={"native": 2_000},
            p50_ms=3,
            p99_ms=9,
            without_receipt=0,
            other_version=0,
            other_score=0,
            during_swaps=1_200,
            failed_during_swaps=failed,
        ),
        swaps=[
            said.Swap(
                version=2,
                seconds=2.0,
                margin_s=1.0,
                requests=1_200,
                failed=failed,
                by_version={1: 600, 2: 600},
                old_after_drain=0,
                p50_ms=3,
                p99_ms=9,
                max_ms=12,
                answers=[said.Answer(after_s=-1, latency_ms=3, version=1), said.Answer(after_s=1, latency_ms=3, version=2)],
            )
        ],
        recomputed=[said.Recomputed(version=1, predictions=6_000, max_difference=0.0)],
        lookups=said.Lookups(compared=6_000, different=0),
        lineage=said.Lineage(receipt=receipt, version=2, came_true=False, arrival=JUNE),
    )


def test_the_page_needs_nothing_but_itself() -> None:
    page = render(make_evidence())

    assert page.count("<svg") == 5
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert not re.search(r"url\((?!#)", page)


def test_the_page_is_drawn_from_the_json_beside_it(tmp_path: Path) -> None:
    evidence = make_evidence()

    page = write_report(evidence, tmp_path)

    kept = said.Evidence.model_validate_json(page.with_suffix(".json").read_text())
    assert kept == evidence
    assert render(kept) == page.read_text()


def test_the_page_says_so_when_something_was_wrong() -> None:
    well, badly = render(make_evidence()), render(make_evidence(failed=7, stored=8))

    assert ("Nobody noticed the swaps" in well, "Nobody noticed the swaps" in badly) == (True, False)
    assert ("not balanced" in well, "not balanced" in badly) == (False, True)
    assert "7 of 1,200" in badly
    assert "of the whole run's 2,000, 7 did (7 with 429)." in badly
