"""Bundles in the object store: written once, addressed by digest, signed as a whole, vetted before anything loads them."""

import asyncio
import hashlib
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cryptography.exceptions import InvalidSignature
from model_signing import hashing, signing, verifying
from pydantic import ValidationError

from mojomesh_chassis.errors import BadBundle
from mojomesh_chassis.objects import Objects
from mojomesh_contracts.bundles import (
    BASELINE_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MOJO_FILE,
    SCHEMA_FILE,
    SIGNATURE_FILE,
    SIGNED_FILES,
    Baseline,
    BundleSchema,
    Golden,
    Manifest,
)

ALGORITHMS = frozenset({"gbm", "drf", "glm", "xgboost", "isolationforest", "stackedensemble", "deeplearning"})
"""What is served, each shown to score as H2O's cluster does: tests/scorer/test_parity.py."""
CATEGORIES = frozenset({"Binomial", "Multinomial", "Regression", "AnomalyDetection"})
ENCODINGS = frozenset({"AUTO", "Enum", "SortByResponse"})
MAX_MOJO_BYTES = 512 * 2**20  # unpacked
MAX_MOJO_FILES = 200_000  # a tree of a GBM is two files
MAX_RATIO = 200  # deflate reaches 1,000 on zeros; a MOJO stays below 20
MAX_COLUMNS = 100_000  # genmodel allocates arrays of the sizes that model.ini names


@dataclass(frozen=True)
class Bundle:
    """A bundle in a local folder, its signature verified and its archive vetted."""

    folder: Path
    digest: str
    schema: BundleSchema
    baseline: Baseline
    golden: Golden
    manifest: Manifest

    @property
    def mojo_path(self) -> Path:
        return self.folder / MOJO_FILE


def digest_of(folder: Path) -> str:
    """SHA-256, hex, over the names and contents of everything but the signature, which differs from run to run.

    Raises:
        BadBundle: A file is missing.
    """
    total = hashlib.sha256()
    for name in SIGNED_FILES:
        path = folder / name
        if not path.is_file():
            raise BadBundle(f"the bundle has no {name}")
        with path.open("rb") as file:
            total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def sign_bundle(folder: Path, private_key: Path) -> None:
    """Write the signature (OpenSSF model signing, elliptic-curve key in PEM) over every other file in `folder`."""
    hashed = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE_FILE], ignore_git_paths=False)
    signing.Config().set_hashing_config(hashed).use_elliptic_key_signer(private_key=private_key).sign(folder, folder / SIGNATURE_FILE)


def verify_bundle(folder: Path, public_key: Path) -> Bundle:
    """Check everything that can be checked without running the model.

    Raises:
        BadBundle: A file is missing, extra, changed, malformed or dangerous, or the signature is not by this key.
    """
    expected = {*SIGNED_FILES, SIGNATURE_FILE}
    if extra := {path.name for path in folder.iterdir()} - expected:
        raise BadBundle(f"the bundle has files it should not: {', '.join(sorted(extra))}")
    digest = digest_of(folder)
    if not (folder / SIGNATURE_FILE).is_file():
        raise BadBundle("the bundle has no signature")
    hashed = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE_FILE], ignore_git_paths=False)
    try:
        verifying.Config().set_hashing_config(hashed).use_elliptic_key_verifier(public_key=public_key).verify(
            folder, folder / SIGNATURE_FILE
        )
    except (ValueError, KeyError, TypeError, InvalidSignature) as error:
        raise BadBundle(f"the signature does not hold for {public_key.name}: {error or type(error).__name__}") from error
    vet_mojo(folder / MOJO_FILE)
    try:
        return Bundle(
            folder,
            digest,
            BundleSchema.model_validate_json((folder / SCHEMA_FILE).read_bytes()),
            Baseline.model_validate_json((folder / BASELINE_FILE).read_bytes()),
            Golden.model_validate_json((folder / GOLDEN_FILE).read_bytes()),
            Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes()),
        )
    except ValidationError as error:
        raise BadBundle(f"{error.title} of the bundle cannot be read: {error.errors()[0]['loc']} {error.errors()[0]['msg']}") from error


def vet_mojo(path: Path) -> str:
    """The algorithm of a MOJO archive that is safe to load: genmodel trusts what the archive says of itself.

    Raises:
        BadBundle: Not a MOJO, or too many or too large files, paths that lead out, links, or an algorithm we do not serve.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for problem in _archive_problems(archive.infolist()):
                raise BadBundle(f"{path.name}: {problem}")
            info = archive.read("model.ini").decode()
    except (zipfile.BadZipFile, zlib.error, RuntimeError, KeyError, UnicodeDecodeError, EOFError, OSError) as error:
        # RuntimeError is what zipfile raises of a file that is encrypted, or packed in a way that it does not know.
        raise BadBundle(f"{path.name} is not a MOJO (POJOs are not served): {error}") from error
    fields = {key.strip(): value.strip() for key, mark, value in (line.partition("=") for line in info.splitlines()) if mark}
    for reason in _not_served(fields):
        raise BadBundle(f"{path.name}: {reason}")
    for name in ("n_columns", "n_features", "n_classes", "n_domains"):
        if not fields.get(name, "").isdigit() or int(fields[name]) > MAX_COLUMNS:
            raise BadBundle(f"{path.name}: {name} is {fields.get(name, 'missing')!r}, must be a number up to {MAX_COLUMNS}")
    return fields["algo"]


def _not_served(fields: Mapping[str, str]) -> Iterator[str]:
    for what, found, served in (
        ("algorithm", fields.get("algo", ""), ALGORITHMS),
        ("model category", fields.get("category", ""), CATEGORIES),
        ("categorical encoding", fields.get("_genmodel_encoding", "AUTO"), ENCODINGS),
    ):
        if found not in served:
            yield f"{what} '{found}' is not served; served are {', '.join(sorted(served))}"
    if fields.get("offset_column", "null") != "null":
        # genmodel would take every offset for zero and say nothing.
        yield f"it was trained with the offset column '{fields['offset_column']}', which no request carries"


def _archive_problems(entries: list[zipfile.ZipInfo]) -> Iterator[str]:
    if len(entries) > MAX_MOJO_FILES:
        yield f"holds {len(entries)} files, at most {MAX_MOJO_FILES} are allowed"
    unpacked, packed = sum(entry.file_size for entry in entries), sum(entry.compress_size for entry in entries)
    if unpacked > MAX_MOJO_BYTES:
        yield f"unpacks to {unpacked} bytes, at most {MAX_MOJO_BYTES} are allowed"
    if unpacked > MAX_RATIO * max(packed, 4096):
        yield f"unpacks to {unpacked / max(packed, 1):.0f} times its size, at most {MAX_RATIO} times is allowed"
    if len({entry.filename for entry in entries}) < len(entries):
        yield "holds two files of one name"
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        if entry.filename.startswith("/") or ".." in parts or "\\" in entry.filename:
            yield f"a path leads out of it: {entry.filename!r}"
        if stat.S_ISLNK(entry.external_attr >> 16):
            yield f"holds a link: {entry.filename!r}"


async def publish_bundle(objects: Objects, folder: Path) -> str:
    """Store a signed bundle under its digest, the signature last; storing it again changes nothing. Returns the digest."""
    digest = digest_of(folder)
    for name in (*SIGNED_FILES, SIGNATURE_FILE):
        await objects.put(f"bundles/{digest}/{name}", folder / name)
    return digest


async def fetch_bundle(objects: Objects, digest: str, folder: Path, public_key: Path) -> Bundle:
    """Bring the bundle of `digest` into `folder/<digest>` and verify it; one that lies there already is verified again.

    Raises:
        NotFound: The object store has no such bundle.
        BadBundle: It is not what the digest names, or `verify_bundle` refuses it.
    """
    target = folder / digest
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        arriving = Path(tempfile.mkdtemp(dir=folder, prefix=".arriving-"))
        try:
            for name in (*SIGNED_FILES, SIGNATURE_FILE):
                (arriving / name).write_bytes(await objects.get(f"bundles/{digest}/{name}"))
            if (found := digest_of(arriving)) != digest:
                raise BadBundle(f"the object store holds another bundle under {digest}: its digest is {found}")
            await asyncio.to_thread(verify_bundle, arriving, public_key)
            if not target.is_dir():
                arriving.rename(target)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
    return await asyncio.to_thread(verify_bundle, target, public_key)
