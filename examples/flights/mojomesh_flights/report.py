"""The page: `reports/demo.html` from `reports/demo.json`, in one file, without a script or a network."""

from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mojomesh_flights.evidence import Evidence
from mojomesh_flights.pictures import color_of, draw_all


def write_report(evidence: Evidence, folder: Path) -> Path:
    """Write `demo.json` and `demo.html` into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(evidence.model_dump_json(indent=1) + "\n", encoding="utf-8")
    page = folder / "demo.html"
    page.write_text(render(evidence), encoding="utf-8")
    return page


def render(evidence: Evidence) -> str:
    """The page as text."""
    environment = Environment(loader=PackageLoader("mojomesh_flights", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(day=_day, date=_date, moment=_moment, count=_count, short=_short)
    pictures = {name: Markup(svg) for name, svg in draw_all(evidence).items()}
    return environment.get_template("report.html.j2").render(evidence=evidence, pictures=pictures, color_of=color_of)


def _day(time: datetime) -> str:
    return f"{time.day} {time:%b}"


def _date(time: datetime) -> str:
    return f"{time.day} {time:%B %Y}"


def _moment(time: datetime) -> str:
    return f"{time.day} {time:%b %Y, %H:%M} UTC"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _short(digest: str) -> str:
    return f"{digest[:12]}…"
