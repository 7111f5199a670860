"""What a person sees while the demo runs: a small live page on a terminal, plain lines anywhere else."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 10.0
N_NOTES = 12

Numbers = Callable[[], dict[str, str]]


@dataclass
class Phase:
    """One part of the demo, timed."""

    name: str
    started_at: float
    seconds: float | None = None


@dataclass
class Progress:
    """Phases as they pass, the numbers of the moment, and what has happened so far."""

    console: Console = field(default_factory=Console)
    phases: list[Phase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    share: float = 0.0  # of the year
    numbers: Numbers = dict
    _started_at: float = field(default_factory=time.monotonic)

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
        self.notes.append(f"{self._elapsed()}  {text}")
        self._say(text)

    async def run(self) -> None:
        """Show it until cancelled."""
        if not self.console.is_terminal:
            while True:
                await asyncio.sleep(LINE_EVERY_S)
                if numbers := self.numbers():
                    self._say("  ".join(f"{name} {value}" for name, value in numbers.items()))
        with Live(get_renderable=self._page, console=self.console, refresh_per_second=4, transient=False) as live:
            try:
                while True:
                    await asyncio.sleep(0.25)
                    live.refresh()
            finally:
                live.refresh()

    def _say(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{self._elapsed()}  {text}", highlight=False, soft_wrap=True)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._started_at)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _page(self) -> RenderableType:
        phases = Table.grid(padding=(0, 2))
        for phase in self.phases:
            done = phase.seconds is not None
            seconds = phase.seconds if phase.seconds is not None else time.monotonic() - phase.started_at
            phases.add_row("[green]✓[/]" if done else "[cyan]▸[/]", phase.name, f"[dim]{seconds:.0f} s[/]")
        numbers = Table.grid(padding=(0, 2))
        for name, value in self.numbers().items():
            numbers.add_row(f"[dim]{name}[/]", value)
        bar = ProgressBar(total=1.0, completed=self.share, width=56)
        notes = Text("\n".join(self.notes[-N_NOTES:]))
        return Group("", phases, "", Padding(bar, (0, 0, 0, 0)), numbers, "", notes)
