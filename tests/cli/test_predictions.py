"""What `score`, `replay`, `why`, `drift`, `quality`, `quarantine` and `store seal` say, on services that answer as the real ones do."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mojomesh_chassis.errors import PermanentError
from mojomesh_cli.main import app
from mojomesh_cli.scoring import NotTheSame, read_values

COLUMNS: dict[str, str] = {"carrier": "category", "distance": "number", "weather.fog": "boolean"}
PREDICTION_ID = "0197a0ee-6a3c-7f58-9f6c-4f0b0e6f9d3a"
KEY = {
    "feature_set": "flights",
    "entity_id": "UA 1545/EWR",
    "event_time": "2013-03-01T12:00:00+00:00",
    "created_at": "2026-03-01T12:00:00.123456+00:00",
    "seq": 7,
}
PREDICTION = {
    "prediction_id": PREDICTION_ID,
    "model": "delay",
    "version": 2,
    "bundle_digest": "ab" * 32,
    "entity_id": "UA 1545/EWR",
    "event_time": KEY["event_time"],
    "made_at": KEY["created_at"],
    "inputs": [0.1 + 0.2, None],
    "scores": [0.1 + 0.2, 0.7],
    "rows": [KEY],
    "forgotten_at": None,
}
MANIFEST = {
    "definition": {"name": "delay"},
    "snapshot_time": "2026-02-01T00:00:00Z",
    "snapshot_digest": "cd" * 32,
    "n_rows": 123456,
    "train_from": "2013-01-01T00:00:00Z",
    "train_to": "2013-02-01T00:00:00Z",
    "algorithm": "gbm",
    "folds": [{"fold": 0, "test_from": "2013-01-15T00:00:00Z", "test_to": "2013-01-30T00:00:00Z", "h2o_job": "$03job"}],
}
VERSION = {
    "state": "champion",
    "registered_at": "2026-02-01T00:05:00Z",
    "cause": {"kind": "drift", "reason": "weather.temp psi 1.2", "event_id": "5f3c"},
    "metrics": {"auc": 0.71, "n_rows": 5000},
    "manifest": MANIFEST,
}
WINDOW = {
    "promotion": 2,
    "number": 0,
    "version": 2,
    "window_from": "2013-03-01T12:00:00+00:00",
    "window_to": "2013-03-09T12:00:00+00:00",
    "columns": {
        "distance": {"psi": 0.01, "kl": 0.01, "psi_threshold": 0.25, "kl_threshold": 0.5},
        "weather.temp": {"psi": 1.25, "kl": 0.3, "psi_threshold": 0.25, "kl_threshold": 0.5},
    },
}
ALERT = {
    "event_id": "5f3c",
    "feature": "weather.temp",
    "measure": "psi",
    "value": 1.25,
    "threshold": 0.25,
    "windows": 3,
    "window_to": WINDOW["window_to"],
    "version": 2,
}

Answers = dict[str, Any]


class Services(BaseHTTPRequestHandler):
    """Answers by path; what was asked is kept."""

    answers: Answers
    asked: list[tuple[str, Any]]

    def _answer(self, body: Any) -> None:
        self.asked.append((self.path, body))
        found = self.answers.get(self.path.split("?")[0])
        status = 404 if found is None else 200
        content = json.dumps({"error": {"type": "NotFound", "message": f"no {self.path}"}} if found is None else found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(json.loads(body) if body else None)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def services() -> Iterator[type[Services]]:
    class Own(Services):
        answers: Answers = {}  # noqa: RUF012
        asked: list[tuple[str, Any]] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    Own.port = server.server_address[1]  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield Own
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(services: type[Services], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    url = f"http://127.0.0.1:{services.port}"  # type: ignore[attr-defined]
    for name in ("INGEST", "FEATURES", "REGISTRY", "SCORER", "SCORER_ADMIN"):
        monkeypatch.setenv(f"MOJOMESH_{name}_URL", url)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return invoke


def test_why_shows_the_whole_lineage(run: Callable[..., Result], services: type[Services]) -> None:
    row_path = "/v1/features/flights/UA%201545%2FEWR"
    services.answers |= {
        f"/v1/predictions/{PREDICTION_ID}": PREDICTION,
        "/v1/models/delay/versions/2": VERSION,
        "/v1/snapshots:erasures": {"erasures": ["2026-04-01T00:00:00+00:00"]},
        row_path: KEY | {"values": {"carrier": "UA", "distance": 1400}},
    }

    shown = run("why", PREDICTION_ID).stdout

    for part in (
        PREDICTION_ID,
        "version 2",
        "ab" * 32,
        "signature",
        "cd" * 32,
        "123,456 rows",
        "weather.temp psi 1.2",
        "$03job",
        "UA 1545/EWR",
        "affected: facts in it were erased at 2026-04-01",
    ):
        assert part in shown
    assert ("/v1/snapshots:erasures", {"model": {"name": "delay"}, "snapshot_time": MANIFEST["snapshot_time"]}) in services.asked
    assert "carrier UA, distance 1400" in shown
    (asked,) = [path for path, _ in services.asked if path.startswith(row_path)]
    assert "snapshot_time=2026-03-01T12%3A00%3A00.123456%2B00%3A00" in asked
    assert json.loads(run("why", PREDICTION_ID, "--json").stdout)["prediction"] == PREDICTION


@pytest.mark.parametrize("command", ["why", "replay"])
def test_an_emptied_receipt_says_so(command: str, run: Callable[..., Result], services: type[Services]) -> None:
    services.answers |= {f"/v1/predictions/{PREDICTION_ID}": PREDICTION | {"forgotten_at": "2026-04-01T00:00:00+00:00"}}

    assert "was emptied at 2026-04-01" in str(run(command, PREDICTION_ID).exception)


def test_replay_says_whether_the_scores_are_the_same_to_the_last_bit(run: Callable[..., Result], services: type[Services]) -> None:
    services.answers |= {f"/v1/predictions/{PREDICTION_ID}": PREDICTION, "/admin/replay": {"scores": [0.1 + 0.2, 0.7]}}

    same = run("replay", PREDICTION_ID)
    services.answers["/admin/replay"] = {"scores": [0.3, 0.7]}
    other = run("replay", PREDICTION_ID)

    assert same.exit_code == 0
    assert "The same to the last bit" in same.stdout
    assert services.asked[1] == ("/admin/replay", {"bundle_digest": "ab" * 32, "inputs": [0.1 + 0.2, None]})
    assert isinstance(other.exception, NotTheSame)


def test_drift_names_what_is_over_its_threshold(run: Callable[..., Result], services: type[Services]) -> None:
    services.answers |= {"/v1/drift/delay": {"model": "delay", "windows": [WINDOW], "alerts": [ALERT]}}

    shown = run("drift", "delay").stdout

    assert "weather.temp psi 1.250 of 0.25" in shown
    assert "alert 5f3c" in shown
    services.answers["/v1/drift/delay"] = {"model": "delay", "windows": [], "alerts": []}
    assert "No window of delay is full yet" in run("drift", "delay").stdout


@pytest.mark.parametrize("values", [("--values", "carrier=UA", "distance=1400"), ("carrier=UA", "distance=1400")])
def test_values_are_scored_with_their_types(run: Callable[..., Result], services: type[Services], values: tuple[str, ...]) -> None:
    columns = [{"name": name, "type": kind} for name, kind in COLUMNS.items()]
    answer = {"score": 0.25, "scores": {"0": 0.75, "1": 0.25}, "version": 2, "prediction_id": PREDICTION_ID}
    services.answers |= {"/v1/models": [{"model": "delay", "columns": columns}], "/v1/models/delay:score": answer}

    shown = run("score", "delay", *values).stdout

    assert "0.250000" in shown and f"mojomesh why {PREDICTION_ID}" in shown
    run("score", "delay", "--entity", "UA1545", "--at", "2013-03-01T12:00:00")
    bodies = [body for path, body in services.asked if path == "/v1/models/delay:score"]
    assert bodies == [
        {"values": {"carrier": "UA", "distance": 1400.0}},
        {"entity_id": "UA1545", "event_time": "2013-03-01T12:00:00+00:00"},
    ]
    assert isinstance(run("score", "delay").exception, PermanentError)


def test_values_are_read_by_the_columns_types() -> None:
    pairs = ["carrier=7", "distance=-1.5e3", "weather.fog=true"]

    assert read_values(pairs, COLUMNS) == {"carrier": "7", "distance": -1500.0, "weather.fog": True}
    assert read_values(["distance="], COLUMNS) == {"distance": None}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("carrier", "'carrier' is not column=value"),
        ("carier=UA", "no column 'carier'; it has carrier, distance, weather.fog"),
        ("distance=far", "'distance' is a number, which 'far' is not"),
        ("distance=nan", "'distance' is a number, which 'nan' is not"),
        ("weather.fog=7", "'weather.fog' is a boolean, which '7' is not"),
    ],
)
def test_a_wrong_value_is_told(pair: str, words: str) -> None:
    with pytest.raises(PermanentError, match=words):
        read_values([pair], COLUMNS)


def test_sealing_says_what_is_new(run: Callable[..., Result], services: type[Services]) -> None:
    sealed = [{"feature_set": "flights", "path": "segments/flights/0-0000000000000000.parquet", "n_rows": 123456}]
    services.answers |= {"/v1/segments:seal": {"segments": sealed}}
    assert "123,456  segments/flights/0-0000000000000000.parquet" in run("store", "seal").stdout
    assert json.loads(run("store", "seal", "--json").stdout) == sealed

    services.answers |= {"/v1/segments:seal": {"segments": []}}
    assert "Everything is sealed." in run("store", "seal").stdout


def test_quality_shows_what_was_not_as_expected(run: Callable[..., Result], services: type[Services]) -> None:
    window = {"window_to": "2026-04-01T00:15:00+00:00", "n_rows": 1234, "n_held": 2, "breaches": [{"reason": "5 rows came in"}]}
    services.answers |= {"/v1/quality/flights": {"windows": [window]}}

    shown = run("quality", "flights").stdout

    assert "1,234" in shown and "5 rows came in" in shown
    services.answers |= {"/v1/quality/flights": {"windows": []}}
    assert "No window of 'flights' is over yet" in run("quality", "flights").stdout


def test_quarantine_lists_and_lets_go_until_nothing_is_left(run: Callable[..., Result], services: type[Services]) -> None:
    event_id = PREDICTION_ID
    held = KEY | {"event_id": event_id, "held_at": KEY["created_at"], "problems": {"distance": "is 9000, expected at most 3000"}}
    services.answers |= {"/v1/quarantine": {"events": [held]}, "/v1/quarantine:release": {"released": []}}

    assert "'distance' is 9000, expected at most 3000" in run("quarantine", "list", "--feature-set", "flights").stdout
    assert "0 released" in run("quarantine", "release", event_id).stdout
    assert services.asked[-1] == ("/v1/quarantine:release", {"event_ids": [event_id], "feature_set": None})
    assert isinstance(run("quarantine", "release").exception, PermanentError)
