"""What a person sees while the demo runs: a small live page on a terminal, plain lines anywhere else."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 10.0
N_NOTES = 12


@dataclass
class Phase:
    """One part of the demo, timed."""

    name: str
    started_at: float
    seconds: float | None = None


@dataclass
class Progress:
    """Phases as they pass, the numbers of the moment, and what has happened so far."""

    console: Console = field(default_factory=lambda: Console(highlight=False))
    phases: list[Phase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    share: Callable[[], float] = lambda: 0.0  # of the year that has passed
    numbers: Callable[[], dict[str, str]] = dict
    started_at: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started_at

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        phase = Phase(name, time.monotonic())
        self.phases.append(phase)
        self._say(f"{name} …")
        try:
            yield
        finally:
            phase.seconds = time.monotonic() - phase.started_at

    def note(self, text: str) -> None:
        """Something happened that is worth a line."""
        self.notes.append(f"{_clock(self.seconds)}  {text}")
        self._say(text)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show it for as long as the block lasts."""
        if self.console.is_terminal:
            with Live(get_renderable=self._page, console=self.console, refresh_per_second=4):
                yield
            return
        ended = threading.Event()
        lines = threading.Thread(target=self._lines, args=(ended,), daemon=True)
        lines.start()
        try:
            yield
        finally:
            ended.set()
            lines.join()

    def _lines(self, ended: threading.Event) -> None:
        while not ended.wait(LINE_EVERY_S):
            if numbers := self.numbers():
                self._say(", ".join(f"{name} {value}" for name, value in numbers.items()))

    def _say(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{_clock(self.seconds)}  {text}", markup=False, soft_wrap=True)

    def _page(self) -> RenderableType:
        phases = Table.grid(padding=(0, 2))
        for phase in self.phases:
            seconds = phase.seconds if phase.seconds is not None else time.monotonic() - phase.started_at
            phases.add_row("[cyan]▸[/]" if phase.seconds is None else "[green]✓[/]", phase.name, f"[dim]{seconds:.0f} s[/]")
        numbers = Table.grid(padding=(0, 2))
        for name, value in self.numbers().items():
            numbers.add_row(f"[dim]{name}[/]", value)
        return Group(
            "", phases, "", ProgressBar(total=1.0, completed=self.share(), width=56), numbers, "", Text("\n".join(self.notes[-N_NOTES:]))
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
