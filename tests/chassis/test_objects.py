"""The object store keeps its promises in a folder and in S3."""

from pathlib import Path

import pytest

from mojomesh_chassis.errors import NotFound
from mojomesh_chassis.objects import Objects, open_objects


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return open_objects((tmp_path / "objects").as_uri() if request.param == "folder" else request.getfixturevalue("s3"))


async def test_what_is_put_can_be_read_listed_and_deleted(objects: Objects, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"of a file")

    await objects.ping()
    await objects.put("bundles/b", b"second")
    await objects.put("bundles/a", file)
    await objects.put("bundles/b", b"third")
    await objects.put("others/c", b"")

    assert [await objects.get(key) for key in ("bundles/a", "bundles/b", "others/c")] == [b"of a file", b"third", b""]
    assert (await objects.fetch("bundles/a", tmp_path)).read_bytes() == b"of a file"
    assert await objects.list("bundles") == ["bundles/a", "bundles/b"]
    await objects.delete("bundles/a")
    assert [await objects.exists(key) for key in ("bundles/a", "bundles/b")] == [False, True]
    await objects.delete("bundles/a")


async def test_what_was_created_is_never_replaced(objects: Objects, tmp_path: Path) -> None:
    """Two sealers may write one segment: the first counts."""
    file = tmp_path / "file"
    file.write_bytes(b"second")

    assert await objects.create("segments/a", b"first")
    assert not await objects.create("segments/a", b"second")
    assert not await objects.create("segments/a", file)
    assert await objects.get("segments/a") == b"first"
    assert await objects.create("segments/b", file)
    assert await objects.get("segments/b") == b"second"


async def test_what_is_not_there_is_not_found(objects: Objects, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no object 'a'"):
        await objects.get("a")
    with pytest.raises(NotFound, match="no object 'a'"):
        await objects.fetch("a", tmp_path)
    assert not await objects.exists("a")
