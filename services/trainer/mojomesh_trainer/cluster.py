"""H2O over its REST interface. Used under Mage too, so it needs nothing but Python.

H2O's own client keeps one connection a process and waits for a job without end. This asks the same endpoints over a session of its
own, waits within a deadline, and names every key itself, so that a run can be cleared away.
"""

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import ProxyHandler, Request, build_opener

POLL_S = 0.1
LIST_TRIES = 10
REQUEST_TIMEOUT_S = 60.0
ColumnType = Literal["Numeric", "Enum", "String"]


class H2OFailed(RuntimeError):
    """H2O refused or failed a job; its text is H2O's own reason."""


class H2OUnreachable(RuntimeError):
    """H2O does not answer, or a job did not end within its deadline."""


class Stopped(RuntimeError):
    """The caller no longer wants the result."""


@dataclass(frozen=True)
class Trained:
    """A model in the cluster."""

    key: str
    job: str
    algorithm: str
    classes: list[str] | None
    """In the order of the scores; None for a number."""


class Cluster:
    """One connection to an H2O cluster, for one piece of work; not shared between threads."""

    def __init__(self, url: str, deadline: float, stopped: Callable[[], bool]) -> None:
        self._url = url.rstrip("/")
        self._deadline = deadline
        self._stopped = stopped
        self._opener = build_opener(ProxyHandler({}))
        self._keys: list[str] = []
        self.session = ""

    def ask(self, endpoint: str, data: dict[str, Any] | None = None, *, body: dict[str, Any] | None = None) -> Any:
        """One request, as in `GET /3/Cloud`; `data` is sent as a form (or in the address of a GET), `body` as JSON."""
        return json.loads(self._read(endpoint, data, body))

    def _read(self, endpoint: str, data: dict[str, Any] | None = None, body: dict[str, Any] | None = None) -> bytes:
        with self._open(endpoint, data, body) as answer:
            content: bytes = answer.read()
            return content

    def _save(self, endpoint: str, target: Path) -> None:
        with self._open(endpoint) as answer, target.open("wb") as file:
            shutil.copyfileobj(answer, file)

    @contextmanager
    def _open(self, endpoint: str, data: dict[str, Any] | None = None, body: dict[str, Any] | None = None) -> Iterator[Any]:
        method, path = endpoint.split(" ", 1)
        form = urlencode({name: _as_h2o(value) for name, value in (data or {}).items() if value is not None})
        content, kind = (json.dumps(body).encode(), "application/json") if body else (form.encode(), "application/x-www-form-urlencoded")
        address = f"{self._url}{path}?{form}" if method == "GET" and form else self._url + path
        request = Request(address, content if method == "POST" else None, {"Content-Type": kind}, method=method)
        try:
            with self._opener.open(request, timeout=REQUEST_TIMEOUT_S) as answer:
                yield answer
        except HTTPError as error:
            with error:
                raise H2OFailed(_reason(error.read())) from error
        except (OSError, HTTPException) as error:
            raise H2OUnreachable(f"H2O at {self._url} does not answer: {error}") from error

    def import_parquet(self, path: str, key: str, types: dict[str, ColumnType]) -> None:
        """Have the cluster read a Parquet file into the frame `key`, with these column types.

        Nobody else may read the same file meanwhile: H2O names a source by its path, and two readers pull it away from each other.
        """
        sources = self.ask("GET /3/ImportFiles", {"path": path})
        names = [f'"{name}"' for name in sources["destination_frames"]]
        setup = self.ask("POST /3/ParseSetup", {"source_frames": names}) if names and not sources["fails"] else {}
        if not setup.get("column_names"):
            raise H2OFailed(f"H2O cannot read {path}")
        column_types = [types.get(name, given) for name, given in zip(setup["column_names"], setup["column_types"], strict=True)]
        request = {
            "source_frames": names,
            "destination_frame": self._made(key),
            "parse_type": setup["parse_type"],
            "separator": setup["separator"],
            "check_header": setup["check_header"],
            "number_columns": setup["number_columns"],
            "chunk_size": setup["chunk_size"],
            "single_quotes": setup["single_quotes"],
            "column_names": [f'"{name}"' for name in setup["column_names"]],
            "column_types": [f'"{name}"' for name in column_types],
            "delete_on_done": True,
        }
        self.wait(self.ask("POST /3/Parse", request)["job"]["key"]["name"])

    def is_there(self, frame: str) -> bool:
        """Whether the cluster has that frame."""
        try:
            self.ask(f"GET /3/Frames/{quote(frame)}/light")
        except H2OFailed:
            return False
        return True

    def assign(self, key: str, expression: str) -> None:
        """Keep what a Rapids expression gives as the frame `key`."""
        self.ask("POST /99/Rapids", {"ast": f"(assign {self._made(key)} {expression})", "session_id": self.session})

    def n_rows(self, frame: str) -> int:
        return int(self.ask(f"GET /3/Frames/{quote(frame)}/light")["frames"][0]["rows"])

    def train(self, algorithm: str, params: dict[str, Any], frame: str, inputs: Sequence[str], key: str) -> Trained:
        """Train on `frame`, whose response is `label`; columns that are not `inputs` are ignored."""
        present = [column["label"] for column in self.ask(f"GET /3/Frames/{quote(frame)}/light")["frames"][0]["columns"]]
        ignored = [name for name in present if name not in inputs and name != "label"]
        if algorithm == "automl":
            return self._train_automl(params, frame, ignored, key)
        request = {
            **params,
            "training_frame": frame,
            "response_column": "label",
            "ignored_columns": [f'"{name}"' for name in ignored],
            "model_id": key,
        }
        self._made(key)
        started = self.ask(f"POST /3/ModelBuilders/{algorithm}", request)
        job = started["job"]["key"]["name"]
        self.wait(job)
        return self._trained(key, job)

    def _train_automl(self, params: dict[str, Any], frame: str, ignored: list[str], key: str) -> Trained:
        """AutoML bounded by the number of models, never by seconds: the same data must give the same leader."""
        params = {"max_models": 10, "exclude_algos": ["DeepLearning"], **params}
        sorting = {"sort_metric": params.pop("sort_metric")} if "sort_metric" in params else {}
        criteria = {name: params.pop(name) for name in ("max_models", "seed") if name in params}
        control = {name: params.pop(name) for name in ("nfolds", "balance_classes") if name in params}
        body: dict[str, Any] = {
            "input_spec": {
                "training_frame": frame,
                "response_column": {"column_name": "label"},
                "ignored_columns": ignored,
                **sorting,
            },
            "build_control": {"project_name": key, "stopping_criteria": {"max_runtime_secs": 0, **criteria}, **control},
            "build_models": params,
        }
        job = self.ask("POST /99/AutoMLBuilder", body=body)["job"]
        self.wait(job["key"]["name"])
        state = self.ask(f"GET /99/AutoML/{quote(job['dest']['name'], safe='')}")
        leaders = [model["name"] for model in state["leaderboard"]["models"]]
        if not leaders:
            raise H2OFailed("AutoML trained no model")
        # It names what it makes itself, with a mark of its own in each name.
        mark = leaders[0][leaders[0].index("AutoML_") :]
        self._keys += [job["dest"]["name"], *(name for name in self._names() if mark in name)]
        return self._trained(leaders[0], job["key"]["name"])

    def _trained(self, key: str, job: str) -> Trained:
        output = self.ask(f"GET /3/Models/{quote(key)}")["models"][0]
        domains = output["output"]["domains"]
        names = output["output"]["names"]
        return Trained(key, job, output["algo"], domains[names.index("label")] if "label" in names else None)

    def predict(self, model: str, frame: str, key: str) -> None:
        """Score `frame` into the frame `key`."""
        request = {"predictions_frame": self._made(key)}
        started = self.ask(f"POST /4/Predictions/models/{quote(model)}/frames/{quote(frame)}", request)
        self.wait(started["key"]["name"])

    def read_columns(self, frame: str) -> dict[str, list[str]]:
        """The cells of a small frame as text, by column."""
        text = self._read("GET /3/DownloadDataset", {"frame_id": frame}).decode()
        header, *rows = csv.reader(io.StringIO(text))
        return {name: [row[place] for row in rows] for place, name in enumerate(header)}

    def download_mojo(self, model: str, target: Path) -> None:
        self._save(f"GET /3/Models/{quote(model)}/mojo", target)

    def download_genmodel(self, target: Path) -> None:
        """The cluster's own h2o-genmodel.jar: what scores its MOJOs, in exactly its version."""
        self._save("GET /3/h2o-genmodel.jar", target)

    def version(self) -> dict[str, str]:
        cloud = self.ask("GET /3/Cloud")
        cores = sum(int(node["num_cpus"]) for node in cloud["nodes"])
        return {"h2o": cloud["version"], "h2o_nodes": str(cloud["cloud_size"]), "h2o_cores": str(cores)}

    def job(self, key: str) -> dict[str, Any]:
        job: dict[str, Any] = self.ask(f"GET /3/Jobs/{quote(key)}")["jobs"][0]
        return job

    def wait(self, job: str) -> None:
        """Wait for a job, within the deadline; a job that is given up is cancelled."""
        while True:
            found = self.job(job)
            if found["status"] == "DONE":
                return
            if found["status"] in ("FAILED", "CANCELLED"):
                raise H2OFailed(found["exception"] or f"H2O's job {job} was {found['status'].lower()}")
            if self._stopped() or time.monotonic() > self._deadline:
                self.ask(f"POST /3/Jobs/{quote(job)}/cancel")
                if self._stopped():
                    raise Stopped(f"H2O's job {job} is no longer wanted")
                raise H2OUnreachable(f"H2O's job {job} did not end in time")
            time.sleep(POLL_S)

    @contextmanager
    def removing(self) -> Iterator[None]:
        """Remove every frame and model that was made within, at the end."""
        kept = len(self._keys)
        try:
            yield
        finally:
            while len(self._keys) > kept:
                self._remove(self._keys.pop())

    def remove_all(self, prefix: str) -> None:
        """Remove every frame and model whose key starts with `prefix`, whoever made them."""
        for name in self._names():
            if name.startswith(prefix):
                self._remove(name)

    def _names(self) -> list[str]:
        """The names of all frames and models in the cluster."""
        frames, models = self._listed("GET /3/Frames")["frames"], self._listed("GET /3/Models")["models"]
        return [frame["frame_id"]["name"] for frame in frames] + [model["model_id"]["name"] for model in models]

    def _remove(self, name: str) -> None:
        self.ask(f"DELETE /3/DKV/{quote(name, safe='')}")

    def _listed(self, endpoint: str) -> Any:
        """A list of all there is; it fails when anything, of any run, is removed while H2O makes it."""
        for _ in range(LIST_TRIES - 1):
            try:
                return self.ask(endpoint)
            except H2OFailed:
                time.sleep(POLL_S)
        return self.ask(endpoint)

    def _made(self, key: str) -> str:
        self._keys.append(key)
        return key


@contextmanager
def open_cluster(url: str, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> Iterator[Cluster]:
    """Begin a session with H2O; whatever is waited for must end within `timeout_s` from now.

    Raises:
        H2OUnreachable: Nobody answers there.
        H2OFailed: It is another version than the one whose MOJOs the mesh scores.
    """
    cluster = Cluster(url, time.monotonic() + timeout_s, stopped)
    found, wanted = cluster.version()["h2o"], version_of("h2o")
    if found != wanted:
        raise H2OFailed(f"H2O at {url} is version {found}; the mesh needs exactly {wanted}")
    cluster.session = cluster.ask("POST /4/sessions")["session_key"]
    try:
        yield cluster
    finally:
        cluster.ask(f"DELETE /4/sessions/{cluster.session}")


def _as_h2o(value: Any) -> str:
    """A parameter as H2O reads it from a form: lists in brackets, texts in them in quotes."""
    return "[" + ",".join(_as_h2o(item) for item in value) + "]" if isinstance(value, list) else str(value)


def _reason(content: bytes) -> str:
    """What is wrong, in H2O's words, from the body of its refusal."""
    try:
        answer = json.loads(content)
    except ValueError:
        return content.decode(errors="replace")[:2_000]
    faults = [f"{fault['field_name']}: {fault['message']}" for fault in answer.get("messages") or [] if fault["message_type"] == "ERRR"]
    return "; ".join(faults) or str(answer.get("exception_msg") or answer.get("msg") or answer)[:2_000]
