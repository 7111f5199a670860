"""Asking services: an answer is a document, a refusal is told in the service's own words with what to do next."""

from typing import Any

import httpx

from mojomesh_chassis.errors import MeshError


class CallFailed(MeshError):
    """A service refused a call or did not answer; the text says why and what to do."""

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__(message)
        self.status = status


def call(client: httpx.Client, method: str, path: str, **given: Any) -> Any:
    """The JSON answer of a service; `given` goes to httpx.

    Raises:
        CallFailed: It refused, or nobody answers.
    """
    try:
        answer = client.request(method, path, **given)
    except httpx.TransportError as error:
        raise CallFailed(
            f"nobody answers at {client.base_url}: {error or type(error).__name__}. Look with `mojomesh status`, start with `mojomesh up`."
        ) from error
    if answer.is_success:
        return answer.json()
    raise CallFailed(_refusal(answer), answer.status_code)


def _refusal(answer: httpx.Response) -> str:
    said = answer.json() if answer.headers.get("content-type", "").startswith("application/json") else {}
    message = said.get("error", {}).get("message") or f"{answer.request.url} answered {answer.status_code}"
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        message += ". `mojomesh` takes it from the state folder or from MOJOMESH_TOKEN."
    elif answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        message += ". `mojomesh logs` shows why; then try again."
    return str(message)
