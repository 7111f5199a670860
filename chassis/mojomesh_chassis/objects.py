"""The object store: a local folder or S3, by URL."""

import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlparse

import obstore
from obstore.exceptions import AlreadyExistsError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from mojomesh_chassis.errors import NotFound


class Objects:
    """Immutable files under keys such as `bundles/<digest>/manifest.json`."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        parsed = urlparse(url)
        self._folder = Path(unquote(parsed.path)) if parsed.scheme == "file" else None
        self._store: ObjectStore = LocalStore(self._folder, mkdir=True) if self._folder else from_url(url)

    def path_of(self, key: str) -> str:
        """Where H2O and DuckDB read or write the object themselves: a path, or an `s3://` address."""
        if self._folder is None:
            return f"{self._url}/{key}"
        path = self._folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    async def put(self, key: str, content: bytes | Path) -> None:
        """Store bytes, or the file at a path."""
        await obstore.put_async(self._store, key, content)

    async def create(self, key: str, content: bytes | Path) -> bool:
        """Store bytes, or the file at a path, unless there is something under `key`; whether they were stored.

        In a folder a file is not copied where it can be linked: it must not change afterwards. Else it takes as much memory.
        """
        try:
            if self._folder is not None and isinstance(content, Path):
                with suppress(OSError):  # on another file system; or it exists, as the store will say
                    os.link(content, self.path_of(key))
                    return True
            await obstore.put_async(self._store, key, content, mode="create")
        except AlreadyExistsError:
            return False
        return True

    async def fetch(self, key: str, folder: Path) -> Path:
        """A file on this machine with the object's bytes: the object itself if the store is a folder, else a copy in `folder`.

        Raises:
            NotFound: There is none under `key`.
        """
        if self._folder is not None:
            if not (path := self._folder / key).exists():
                raise self._missing(key)
            return path
        copy = folder / key.replace("/", "-")
        try:
            found = await obstore.get_async(self._store, key)
            with copy.open("wb") as file:
                async for chunk in found:
                    file.write(chunk)
        except (NotFoundError, FileNotFoundError):
            raise self._missing(key) from None
        return copy

    async def get(self, key: str) -> bytes:
        """The object's bytes.

        Raises:
            NotFound: There is none under `key`.
        """
        try:
            return bytes(await (await obstore.get_async(self._store, key)).bytes_async())
        except (NotFoundError, FileNotFoundError):
            raise self._missing(key) from None

    async def exists(self, key: str) -> bool:
        try:
            await obstore.head_async(self._store, key)
        except (NotFoundError, FileNotFoundError):
            return False
        return True

    async def delete(self, key: str) -> None:
        """Remove an object; nothing, if there is none."""
        with suppress(NotFoundError, FileNotFoundError):
            await obstore.delete_async(self._store, key)

    async def list(self, prefix: str) -> list[str]:
        """The keys under a folder, sorted."""
        return sorted([meta["path"] async for batch in obstore.list(self._store, prefix) for meta in batch])

    async def ping(self) -> None:
        """List nothing."""
        await self.list("ping")

    def _missing(self, key: str) -> NotFound:
        return NotFound(f"no object '{key}' in {self._url}")


def open_objects(url: str) -> Objects:
    """The object store at `file:///folder` or `s3://bucket/prefix` (credentials as AWS's tools read them)."""
    return Objects(url)
