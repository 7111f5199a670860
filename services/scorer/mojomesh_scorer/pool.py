"""The worker processes: started, replaced when they die, told all at once."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.events import Challenger, Frozen, WorkerSwap
from mojomesh_scorer.control import (
    Asking,
    Command,
    Commit,
    Committed,
    Count,
    Counted,
    Discard,
    Done,
    Drain,
    Drained,
    Load,
    Loaded,
    OpenDoors,
    Surround,
    open_asking,
)
from mojomesh_scorer.errors import LoadFailed, ProbeFailed, WorkerLost
from mojomesh_scorer.metrics import FOLDER_VARIABLE, forget_gauges
from mojomesh_scorer.settings import Settings

ANSWER_S = 60.0  # a worker that takes longer to answer is killed and replaced
STOP_S = 20.0  # and so is one that takes longer to drain
SHORT_LIFE_S = 1.0  # one that dies younger, or before it was up, is replaced after a wait, longer each time
MAX_WAIT_S = 10.0
SPARE_S = 0.1  # how often the spare process is looked after
NO_SLOT = -1

AnyReply = TypeVar("AnyReply", bound=Frozen)
T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """A version that every worker must serve, and the verified folder to load it from."""

    model: str
    version: int
    digest: str
    folder: Path


@dataclass(frozen=True)
class Beside:
    """The versions that every worker must serve beside a model's champion, each with its buckets."""

    model: str
    versions: tuple[tuple[Served, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Switched:
    """A worker's switch to a version, and how many requests were in flight there on the one before."""

    worker: WorkerSwap
    in_flight: int


@dataclass(frozen=True)
class Ports:
    """The ports that workers share. Bound here without listening: the numbers stay ours and no connection comes to the supervisor."""

    http: socket.socket
    grpc: socket.socket

    @property
    def numbers(self) -> tuple[int, int]:
        return self.http.getsockname()[1], self.grpc.getsockname()[1]


class Worker:
    """One worker process as the supervisor sees it."""

    def __init__(self, process: asyncio.subprocess.Process, asking: Asking) -> None:
        self.slot = NO_SLOT
        self.process = process
        self.open = False
        self.serving: dict[str, Served] = {}
        self.beside: dict[str, Beside] = {}
        self._staged: dict[Served, float] = {}  # and in how many seconds it was loaded
        self._asking = asking

    async def load(self, served: Served) -> Loaded:
        """Stage a version.

        Raises:
            LoadFailed: The worker says why it cannot.
            WorkerLost: It died over it, or of something else meanwhile.
        """
        command = Load(model=served.model, version=served.version, digest=served.digest, folder=served.folder)
        began = time.perf_counter()
        loaded = await self._ask(command, Loaded)
        self._staged[served] = time.perf_counter() - began
        return loaded

    async def commit(self, served: Served) -> Switched:
        """Let a version serve, loaded now if it was not staged."""
        if served not in self._staged:
            await self.load(served)
        began = time.perf_counter()
        committed = await self._ask(Commit(model=served.model, digest=served.digest), Committed)
        commit_s = time.perf_counter() - began
        self.serving[served.model] = served
        load_s = self._staged.pop(served)
        return Switched(WorkerSwap(slot=self.slot, load_s=load_s, commit_s=commit_s), committed.in_flight)

    async def surround(self, beside: Beside) -> None:
        """Let versions score beside a champion, loaded now if they were not staged."""
        for served, _ in beside.versions:
            if served not in self._staged:
                await self.load(served)
        challengers = [
            Challenger(version=served.version, bundle_digest=served.digest, buckets=list(buckets)) for served, buckets in beside.versions
        ]
        await self._ask(Surround(model=beside.model, challengers=challengers), Done)
        self.beside[beside.model] = beside
        for served, _ in beside.versions:
            del self._staged[served]

    async def discard(self, served: Served) -> None:
        """Forget a version that is staged."""
        self._staged.pop(served, None)
        await self._ask(Discard(model=served.model, digest=served.digest), Done)

    async def drain(self, model: str, timeout_s: float) -> bool:
        """Whether the requests on the version before ended in time."""
        return (await self._ask(Drain(model=model, timeout_s=timeout_s), Drained)).in_time

    async def open_doors(self) -> None:
        """Let it listen and consume."""
        await self._ask(OpenDoors(slot=self.slot), Done)
        self.open = True

    async def count(self) -> Counted:
        """What it answered since its start."""
        return await self._ask(Count(), Counted)

    async def end(self) -> None:
        """Make sure that it is gone."""
        self._asking.close()
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    async def _ask(self, command: Command, reply: type[AnyReply]) -> AnyReply:
        try:
            return await self._asking.ask(command, reply, ANSWER_S)
        except WorkerLost:
            with suppress(ProcessLookupError):
                self.process.kill()  # if it only hangs; its keeper replaces it
            raise


class Pool:
    """Keeps one worker in every slot, each serving all that must be served."""

    def __init__(self, settings: Settings, ports: Ports, metrics: Path) -> None:
        self.served: dict[str, Served] = {}
        self.beside: dict[str, Beside] = {}
        self.members: list[Worker] = []
        self._settings = settings
        self._ports = ports
        self._metrics = metrics
        self._spare: Worker | None = None
        self._one_holder = asyncio.Lock()
        self._doors = asyncio.Event()
        self._some_member = asyncio.Event()
        self._stopping = False

    async def prepare(self, served: Served) -> list[Loaded]:
        """Stage a version in every worker; when one cannot, in none.

        Raises:
            LoadFailed: A worker says why it cannot.
            WorkerLost: One died over it, or of something else meanwhile.
        """
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._some_member.wait()
        except TimeoutError:
            raise WorkerLost("no worker is up") from None
        try:
            # One after the other: while one loads, the others have the cores.
            return [await worker.load(served) for worker in list(self.members)]
        except (LoadFailed, WorkerLost):
            holding = [*self.members, *([self._spare] if self._spare else [])]
            await self._of_all([worker.discard(served) for worker in holding])
            raise

    async def commit(self, served: Served) -> list[Switched]:
        """Let a version serve in every worker.

        A worker lost meanwhile is no obstacle: its replacement comes up with this version.
        """
        self.served[served.model] = served
        return await self._of_all([worker.commit(served) for worker in self.members])

    async def surround(self, beside: Beside) -> None:
        """Let versions score beside a model's champion in every worker, and in every later one."""
        self.beside[beside.model] = beside
        await self._of_all([worker.surround(beside) for worker in self.members])

    async def drain(self, model: str, timeout_s: float) -> bool:
        """Whether all requests on the version before ended in time."""
        return all(await self._of_all([worker.drain(model, timeout_s) for worker in self.members]))

    async def counts(self) -> dict[int, Counted]:
        """What the workers answered, by process id."""
        workers = list(self.members)
        counts = await asyncio.gather(*(worker.count() for worker in workers), return_exceptions=True)
        return {worker.process.pid: count for worker, count in zip(workers, counts, strict=True) if isinstance(count, Counted)}

    def open_doors(self) -> None:
        """Let the workers listen, these and every later one."""
        self._doors.set()

    async def ping(self) -> None:
        """Be well while at least one worker listens.

        Raises:
            TransientError: None does.
        """
        if not any(worker.open for worker in self.members):
            raise TransientError(f"none of {self._settings.workers} workers is up")

    async def up(self) -> None:
        """Wait until every slot has a worker."""
        while len(self.members) < self._settings.workers:
            await asyncio.sleep(0.02)

    async def keep(self, slot: int) -> None:
        """Keep a worker in a slot until the pool stops."""
        wait_s = 0.0
        while not self._stopping:
            lived_s = await self._life_of_a_worker(slot)
            # A replacement comes at once; only one that dies young again and again must not take a core.
            wait_s = min(MAX_WAIT_S, wait_s * 2 + 0.1) if lived_s < SHORT_LIFE_S else 0.0
            if wait_s > 0.1:
                await asyncio.sleep(wait_s)

    async def _life_of_a_worker(self, slot: int) -> float:
        """Start a worker and see to its end; returns for how many seconds it was up."""
        try:
            worker = self._take_spare() or await self._start()
        except OSError as error:  # the machine has no process or no memory for it just now
            log.error("worker_not_started", slot=slot, reason=str(error))
            return 0.0
        worker.slot = slot
        up = time.monotonic()
        try:
            await self._bring_up(worker)
            up = time.monotonic()
            await worker.process.wait()
            reason = f"exit code {worker.process.returncode}"
        except (LoadFailed, WorkerLost) as error:
            reason = str(error)
            up = time.monotonic()
        finally:
            self._remove(worker)
            await self._end(worker)
        if not self._stopping:
            log.error("worker_lost", slot=slot, pid=worker.process.pid, reason=reason)
        return time.monotonic() - up

    async def keep_spare(self) -> None:
        """Keep one process more, with all models loaded and its doors closed; the next worker that is lost is replaced by it."""
        try:
            while not self._stopping:
                await asyncio.sleep(SPARE_S)
                n_ready = sum(worker.open or not self._doors.is_set() for worker in self.members)
                if n_ready < self._settings.workers:
                    continue  # those that serve come first
                if (spare := self._spare) is not None and spare.process.returncode is None and self._serves_all(spare):
                    continue
                try:
                    async with self._holding_spare() as spare:
                        await self._catch_up(spare)
                    log.info("spare_up", pid=spare.process.pid)
                except (LoadFailed, WorkerLost, OSError) as error:
                    log.error("spare_lost", reason=str(error))
                    await asyncio.sleep(MAX_WAIT_S)
        finally:
            if (spare := self._take_spare()) is not None:
                await self._end(spare)

    async def prove(self, served: Served) -> None:
        """Load a version in the spare process, which a bomb, a crash or a hang in it may harm as it likes: it is thrown away then.

        Raises:
            ProbeFailed: The version cannot be loaded, or the process does not survive it.
        """
        try:
            try:
                await self._load_in_spare(served)
            except WorkerLost as error:
                # It may have died of something else; a bundle that kills workers kills them again.
                log.warning("worker_lost_in_probe", model=served.model, reason=str(error))
                await self._load_in_spare(served)
        except (LoadFailed, WorkerLost) as error:
            raise ProbeFailed(f"the probe ended: {error}") from None

    async def _load_in_spare(self, served: Served) -> None:
        async with self._holding_spare() as spare:
            await spare.load(served)

    @asynccontextmanager
    async def _holding_spare(self) -> AsyncIterator[Worker]:
        """The spare process, started if there is none, which nobody else uses or takes meanwhile; its end if anything goes wrong."""
        async with self._one_holder:
            spare = self._take_spare()
            if spare is not None and spare.process.returncode is not None:
                await self._end(spare)
                spare = None
            spare = spare or await self._start()
            try:
                yield spare
            except BaseException:
                await self._end(spare)
                raise
            self._spare = spare

    def _take_spare(self) -> Worker | None:
        spare, self._spare = self._spare, None
        return spare

    async def stop(self) -> None:
        """Let the workers drain, and go."""
        self._stopping = True
        for worker in self.members:
            with suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*(worker.process.wait() for worker in self.members))

    async def _end(self, worker: Worker) -> None:
        await worker.end()
        forget_gauges(self._metrics, worker.process.pid)

    async def _start(self) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "mojomesh_scorer.worker"),
                *(str(number) for number in (theirs.fileno(), *self._ports.numbers, os.getpid())),
                pass_fds=[theirs.fileno()],
                env={**os.environ, FOLDER_VARIABLE: str(self._metrics)},
            )
        return Worker(process, await open_asking(ours))

    def _serves_all(self, worker: Worker) -> bool:
        return worker.serving == self.served and worker.beside == self.beside

    async def _catch_up(self, worker: Worker) -> None:
        while not self._serves_all(worker):
            for served in list(self.served.values()):
                if worker.serving.get(served.model) != served:
                    await worker.commit(served)
            for beside in list(self.beside.values()):
                if worker.beside.get(beside.model) != beside:
                    await worker.surround(beside)

    async def _bring_up(self, worker: Worker) -> None:
        await self._catch_up(worker)
        # No await since the check: from here on every swap reaches it.
        self.members.append(worker)
        self._some_member.set()
        log.info("worker_up", slot=worker.slot, pid=worker.process.pid)
        await self._doors.wait()
        await worker.open_doors()

    def _remove(self, worker: Worker) -> None:
        if worker in self.members:
            self.members.remove(worker)
        if not self.members:
            self._some_member.clear()

    async def _of_all(self, answers: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        outcomes = await asyncio.gather(*answers, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerLost):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


def reserve_port(host: str, port: int) -> socket.socket:
    """A port for several processes of ours, bound and not listening; 0 takes a free one.

    Raises:
        OSError: Somebody else has it, or another scorer.
    """
    with socket.socket() as alone:  # without SO_REUSEPORT: two scorers would share the port, and each get half of the other's requests
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind((host, port))
    shared = socket.socket()
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    shared.bind((host, port))
    return shared


@asynccontextmanager
async def open_pool(settings: Settings, metrics: Path) -> AsyncIterator[Pool]:
    """A pool with every worker up, its doors still closed.

    Raises:
        WorkerLost: The workers do not come up; the log says why.
    """
    with reserve_port(settings.host, settings.data_port) as http, reserve_port(settings.host, settings.grpc_port) as grpc:
        pool = Pool(settings, Ports(http, grpc), metrics)
        async with asyncio.TaskGroup() as keepers:
            tasks = [keepers.create_task(pool.keep(slot)) for slot in range(settings.workers)]
            tasks.append(keepers.create_task(pool.keep_spare()))
            try:
                async with asyncio.timeout(ANSWER_S):
                    await pool.up()
                yield pool
            except TimeoutError:
                raise WorkerLost(f"{len(pool.members)} of {settings.workers} workers came up within {ANSWER_S:g} s") from None
            finally:
                await pool.stop()
                for task in tasks:
                    task.cancel()
