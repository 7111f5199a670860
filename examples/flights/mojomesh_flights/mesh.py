"""What the demo asks of the services over HTTP."""

import asyncio
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import yaml

from mojomesh_chassis.settings import MeshSettings
from mojomesh_chassis.telemetry import asking
from mojomesh_contracts.events import DriftDetected
from mojomesh_flights.errors import DemoFailed
from mojomesh_flights.listening import Listener
from mojomesh_flights.load import MODEL

DEFINITIONS = Path(__file__).parents[1]
TRAINING_TIMEOUT_S = 300.0
POLL_S = 0.25

Json = dict[str, Any]


class Mesh:
    """The mesh as one client sees it."""

    def __init__(self, settings: MeshSettings, listener: Listener) -> None:
        self._settings, self._listener = settings, listener
        self._http = asking(settings, timeout_s=60)

    async def __aenter__(self) -> "Mesh":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def apply(self, *, drift: bool) -> None:
        """Declare the flights' feature sets and model; with `drift` off, the model is never retrained by itself."""
        documents = [
            document for path in sorted(DEFINITIONS.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        ]
        for document in documents:
            if document["kind"] == "Model":
                document["drift"]["enabled"] = drift
        await self._asked(self._http.put(f"{self._settings.registry_url}/v1/definitions", json=documents))

    async def train(self, reason: str) -> int:
        """Ask for a first version; returns it when it serves.

        Raises:
            DemoFailed: Training failed, or the gate refused the version.
        """
        event = await self._asked(self._http.post(f"{self._settings.registry_url}/v1/models/{MODEL}:train", json={"reason": reason}))
        version, outcome = await self._trained(UUID(event["event_id"]))
        if version is None:
            raise DemoFailed(f"there is no first version: {outcome}")
        return version

    async def retrained(self, alert: DriftDetected) -> tuple[int | None, str]:
        """Wait for what an alert leads to: the version that serves since (None if the old one goes on), and what happened, in words."""
        return await self._trained(alert.event_id)

    async def version(self, version: int) -> Json:
        """A version with its manifest and lineage."""
        return await self._get(f"{self._settings.registry_url}/v1/models/{MODEL}/versions/{version}")

    async def versions(self) -> list[Json]:
        """Every version in short, oldest first."""
        model = await self._get(f"{self._settings.registry_url}/v1/models/{MODEL}")
        return sorted(model["versions"], key=lambda version: int(version["version"]))

    async def drift(self) -> Json:
        """The windows of drift, by column."""
        return await self._get(f"{self._settings.features_url}/v1/drift/{MODEL}?limit=10000")

    async def stored(self) -> dict[str, int]:
        """Feature rows by feature set."""
        counted = await self._get(f"{self._settings.features_url}/v1/features")
        return {str(name): int(n) for name, n in counted["rows"].items()}

    async def prediction(self, prediction_id: str) -> Json:
        """The receipt of a prediction."""
        return await self._get(f"{self._settings.features_url}/v1/predictions/{prediction_id}")

    async def _trained(self, cause: UUID) -> tuple[int | None, str]:
        deadline = time.monotonic() + TRAINING_TIMEOUT_S
        while time.monotonic() < deadline:
            for version in await self.versions():
                if version["cause"]["event_id"] == str(cause):
                    if version["reasons"]:
                        return None, f"the gate refused version {version['version']}: {'; '.join(version['reasons'])}"
                    return await self._deployed(version["version"], deadline)
            if (failure := await self._failure(cause)) is not None:
                return None, f"training failed: {failure}"
            await asyncio.sleep(POLL_S)
        raise DemoFailed(f"the run caused by {cause} gave no version within {TRAINING_TIMEOUT_S:.0f} s; see `mojomesh logs trainer`")

    async def _deployed(self, version: int, deadline: float) -> tuple[int, str]:
        while time.monotonic() < deadline:
            for certificate in self._listener.deployed:
                if certificate.version == version:
                    if not certificate.succeeded:
                        raise DemoFailed(f"version {version} was promoted, but scorer went on with the old one: {certificate.reason}")
                    return version, f"version {version} serves"
            await asyncio.sleep(POLL_S)
        raise DemoFailed(f"version {version} is the champion, but scorer does not serve it; see `mojomesh logs scorer`")

    async def _failure(self, cause: UUID) -> str | None:
        runs = await self._get(f"{self._settings.trainer_url}/v1/runs?model={MODEL}")
        for run in runs["runs"]:
            if run["cause"]["event_id"] == str(cause) and run["state"] in ("failed", "skipped"):
                return str(run["reason"])
        return None

    async def _get(self, url: str) -> Json:
        return await self._asked(self._http.get(url))

    async def _asked(self, call: Any) -> Json:
        try:
            response: httpx.Response = await call
        except httpx.TransportError as error:
            raise DemoFailed(f"a service does not answer: {error!r}; see `mojomesh status`") from error
        if response.is_error:
            raise DemoFailed(f"{response.request.method} {response.request.url} answered {response.status_code}: {response.text[:500]}")
        answer: Json = response.json()
        return answer
