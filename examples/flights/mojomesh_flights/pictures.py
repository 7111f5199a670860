"""The report's pictures: each shows one thing, as SVG that takes the page's own fonts."""

import io
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import dates as mdates
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mojomesh_flights.evidence import Calibration, DriftWindow, Evidence, Period, Swap, VersionEvidence

INK, QUIET, LINE, PAPER = "#1c2127", "#667079", "#d8dde1", "#ffffff"
ALERT = "#c8442b"
VERSIONS = ("#7d8590", "#0f6e84", "#b4651a", "#6a4c93", "#2f7d4f", "#a83a5b")
WIDTH = 9.6

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "grid.color": "#edf0f2",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
}


def color_of(version: int) -> str:
    """The same colour for a version in every picture and on the page."""
    return VERSIONS[(version - 1) % len(VERSIONS)]


def draw_all(evidence: Evidence) -> dict[str, str]:
    """Every picture of the page by name, as inline SVG."""
    n_fold_rows = sum(len(version.folds) + 1 for version in evidence.versions)
    drawn = {
        "quality": _svg("quality", 3.5, lambda figure: _quality(figure, evidence.by_week, evidence.versions)),
        "folds": _svg("folds", 0.7 + 0.29 * n_fold_rows, lambda figure: _folds(figure, evidence.versions)),
        "drift": _svg("drift", 4.6, lambda figure: _drift(figure, evidence.drift, evidence.versions)),
        "calibration": _svg("calibration", 3.9, lambda figure: _calibration(figure, evidence.calibration)),
    }
    if evidence.swaps:
        drawn["swaps"] = _svg("swaps", 3.3, lambda figure: _swaps(figure, evidence.swaps))
    return drawn


def _svg(name: str, height: float, draw: Callable[[Figure], None]) -> str:
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'<svg (.*?)width="[^"]*"', r'<svg \1width="100%"', re.sub(r' height="[\d.]+pt"', "", svg, count=1), count=1, flags=re.S)


def _quality(figure: Figure, weeks: Sequence[Period], versions: Sequence[VersionEvidence]) -> None:
    """Weekly AUC of what served, coloured by version, above the first version's on the same flights."""
    axes = figure.subplots()
    middle = {week.starts_at: _x(week.starts_at) + 3.5 for week in weeks}
    starts = sorted(middle)
    merged = [_merged([week for week in weeks if week.starts_at == start]) for start in starts]
    frozen = [frozen for _, frozen in merged]
    served = [served for served, _ in merged]
    x = [middle[start] for start in starts]
    better = [a >= b for a, b in zip(served, frozen, strict=True)]
    axes.fill_between(x, frozen, served, where=better, color="#0f6e84", alpha=0.10, lw=0, interpolate=True)
    axes.plot(x, frozen, color=color_of(1), lw=1.6, ls=(0, (4, 2)))
    axes.plot(x, served, color=LINE, lw=1.2)
    for week in weeks:
        if week.version is not None:
            axes.plot(middle[week.starts_at], week.served_auc, "o", ms=5, color=color_of(week.version))
    _mark_versions(axes, versions)
    if x:
        axes.annotate(
            "first version, frozen", (x[-1], frozen[-1]), xytext=(6, -8), textcoords="offset points", color=color_of(1), fontsize=9.5
        )
        axes.annotate("what served", (x[-1], served[-1]), xytext=(6, 2), textcoords="offset points", fontsize=9.5)
        axes.set_xlim(x[0] - 6, x[-1] + 32)
    axes.set_ylabel("AUC, week by week")
    _months(axes)


def _merged(weeks: Sequence[Period]) -> tuple[float, float]:
    n = sum(week.n_flights for week in weeks)
    return sum(week.served_auc * week.n_flights for week in weeks) / n, sum(week.frozen_auc * week.n_flights for week in weeks) / n


def _mark_versions(axes: Axes, versions: Sequence[VersionEvidence]) -> None:
    """A thin line where a version began to serve, and its name on top."""
    for version in versions:
        if version.serves_from is not None:
            at = _x(version.serves_from)
            axes.axvline(at, color=color_of(version.version), lw=1)
            axes.annotate(
                f"version {version.version}",
                (at, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                color=color_of(version.version),
                fontsize=9.5,
            )


def _folds(figure: Figure, versions: Sequence[VersionEvidence]) -> None:
    """Each fold a line: what it trained on, what it was tested on, and how well it did."""
    axes = figure.subplots()
    row, ticks, labels = 0, [], []
    for version in versions:
        for fold in version.folds:
            _bar(axes, row, fold.train_from, fold.train_to, color_of(version.version), 0.28)
            _bar(axes, row, fold.test_from, fold.test_to, color_of(version.version), 1.0)
            text = f"AUC {fold.metrics.auc:.3f}" if fold.metrics.auc is not None else ""
            axes.annotate(text, (_x(fold.test_to), row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
            ticks.append(row)
            labels.append(f"fold {fold.fold + 1}")
            row += 1
        _bar(axes, row, version.train_from, version.train_to, color_of(version.version), 0.55)
        ticks.append(row)
        labels.append(f"version {version.version}")
        row += 1
    axes.set_yticks(ticks, labels)
    for label, text in zip(axes.get_yticklabels(), labels, strict=True):
        label.set_color(INK if text.startswith("version") else QUIET)
        label.set_fontsize(9)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlim(axes.get_xlim()[0], axes.get_xlim()[1] + 14)
    _months(axes)


def _bar(axes: Axes, row: int, start: datetime, end: datetime, color: str, alpha: float) -> None:
    left, right = _x(start), _x(end)
    axes.barh(row, right - left, left=left, height=0.62, color=color, alpha=alpha, lw=0)


def _drift(figure: Figure, windows: Sequence[DriftWindow], versions: Sequence[VersionEvidence]) -> None:
    """PSI of each column as a multiple of its own threshold, window by window: over 1 is drift."""
    axes = figure.subplots()
    columns = sorted({name for window in windows for name in window.psi}, key=lambda name: _worst(windows, name))
    scale = LinearSegmentedColormap.from_list("drift", ["#f7f8f9", "#cfdfe4", "#f0c9a0", ALERT, "#6d1a10"])
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, *(_worst(windows, name) for name in columns)))
    for before, window in zip([None, *windows], windows, strict=False):
        # Windows are of predictions as they came, not quite in the order of time: each begins where the one before ended.
        follows = before is not None and before.version == window.version
        left, right = _x(before.window_to if before and follows else window.window_from), _x(window.window_to)
        for row, name in enumerate(columns):
            share = window.psi[name] / window.psi_threshold[name] if name in window.psi else np.nan
            axes.barh(row, right - left, left=left, height=0.86, color=scale(norm(share)), lw=0)
    axes.set_yticks(range(len(columns)), columns, fontsize=9)
    axes.grid(visible=False)
    for version in versions:
        if version.alert is not None and version.alert.feature in columns:
            at = _x(version.alert.window_to)
            axes.plot(at, columns.index(version.alert.feature), "o", ms=9, mfc="none", mec=INK, mew=1.6)
    _mark_versions(axes, versions)
    bar = figure.colorbar(mpl.cm.ScalarMappable(norm, scale), ax=axes, pad=0.01, aspect=32, ticks=[0, 0.5, 1, norm.vmax])
    bar.ax.set_yticklabels(["0", "½", "threshold", f"{norm.vmax:.1f} ×"], fontsize=9)
    bar.outline.set_visible(False)
    _months(axes)


def _worst(windows: Sequence[DriftWindow], name: str) -> float:
    return max(window.psi[name] / window.psi_threshold[name] for window in windows if name in window.psi)


def _calibration(figure: Figure, calibrations: Sequence[Calibration]) -> None:
    """Of the flights that were given a probability, how many were late."""
    axes = figure.subplots()
    most = max(max(tenth.mean_score, tenth.share_late) for found in calibrations for tenth in found.bins) * 1.06
    axes.plot([0, most], [0, most], color=LINE, lw=1.2)
    drawn = {"served": ("what served", "#0f6e84", "-"), "frozen": ("first version, frozen", color_of(1), (0, (4, 2)))}
    for found in calibrations:
        x, y = [tenth.mean_score for tenth in found.bins], [tenth.share_late for tenth in found.bins]
        label, color, style = drawn[found.which]
        axes.plot(x, y, marker="o", color=color, ms=5, lw=1.4, ls=style, label=f"{label}: off by {found.error:.3f}")
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="probability given", ylabel="share that was late", aspect="equal")
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    axes.set_anchor("W")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9.5)


def _swaps(figure: Figure, swaps: Sequence[Swap]) -> None:
    """Every request of the client around each swap, coloured by the version that answered."""
    panels = figure.subplots(1, len(swaps), sharey=True, squeeze=False)[0]
    for axes, swap in zip(panels, swaps, strict=True):
        for version in sorted({answer.version for answer in swap.answers if answer.version is not None}):
            mine = [answer for answer in swap.answers if answer.version == version]
            axes.scatter(
                [answer.after_s for answer in mine], [answer.latency_ms for answer in mine], s=5, lw=0, alpha=0.55, color=color_of(version)
            )
        failed = [answer for answer in swap.answers if answer.version is None]
        axes.scatter([answer.after_s for answer in failed], [answer.latency_ms for answer in failed], marker="x", s=24, color=ALERT)
        axes.axvline(0, color=INK, lw=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axes.set_title(f"to version {swap.version}: {swap.requests:,} requests, {swap.failed} failed", fontsize=9.5)
        axes.set_xlabel("seconds from the switch")
    panels[0].set_ylabel("latency, ms")
    served = sorted({answer.version for swap in swaps for answer in swap.answers if answer.version is not None})
    figure.legend(
        handles=[Patch(color=color_of(version), label=f"version {version}") for version in served],
        loc="outside lower center",
        ncols=6,
        fontsize=9.5,
    )


def _x(time: datetime) -> float:
    return float(mdates.date2num(time))  # type: ignore[no-untyped-call]


def _months(axes: Axes) -> None:
    axes.xaxis.set_major_locator(mdates.MonthLocator(tz=UTC))  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(mdates.DateFormatter("%b", tz=UTC))  # type: ignore[no-untyped-call]
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("left")
