"""Pictures of simulations. matplotlib is in the extra `bench` and imported only here, when asked for."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scheduler.replay.run import Replayed

MAX_PANELS = 2
LEAST_WAIT_S = 1e-3  # shorter waits are drawn as this: the axis is logarithmic
CLASSES_PER_DOUBLING = 2  # of size, for the line of medians


class PlotError(Exception):
    """No picture can be made. The text is one line."""


def require_matplotlib() -> Any:
    """`matplotlib.figure`, which draws without a display. Raises PlotError where it is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        raise PlotError("--plot needs matplotlib: pip install 'octavo[bench]'") from None
    return matplotlib.figure


def plot_waiting(path: Path, title: str, runs: Sequence[Replayed]) -> None:
    """Waiting against the size of every request, the first two policies side by side on equal axes.

    The format follows the file's suffix (png, svg, pdf). Raises PlotError.
    """
    shown = runs[:MAX_PANELS]
    figure = require_matplotlib().Figure(figsize=(6.0 * len(shown), 4.5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for panel, replayed in zip(panels, shown, strict=True):
        _draw(panel, replayed)
    panels[0].set_ylabel("waiting: seconds longer than on an empty machine")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise PlotError(f"cannot write {path}: {error}") from None


def _draw(panel: Any, replayed: Replayed) -> None:
    waits_s = [max(wait_s, LEAST_WAIT_S) for wait_s in replayed.waits_s]
    panel.set(xscale="log", yscale="log", xlabel="request size: tokens in and out")
    # Rasterised: a vector file with every request in it would be megabytes.
    panel.scatter(replayed.sizes, waits_s, s=4, alpha=0.2, linewidths=0, rasterized=True)
    sizes, medians = median_by_size(replayed.sizes, waits_s)
    panel.plot(sizes, medians, color="black", label="median")
    mean_s = sum(replayed.waits_s) / len(replayed.waits_s)
    panel.set_title(f"{replayed.report.policy}: mean wait {mean_s:.2f} s")
    panel.legend(loc="upper left")


def median_by_size(sizes: Sequence[int], waits_s: Sequence[float]) -> tuple[list[float], list[float]]:
    """(size, median wait) of each class of size; classes are geometric."""
    classes: dict[int, list[float]] = {}
    for size, wait_s in zip(sizes, waits_s, strict=True):
        classes.setdefault(math.floor(math.log2(size) * CLASSES_PER_DOUBLING), []).append(wait_s)
    return (
        [2.0 ** ((number + 0.5) / CLASSES_PER_DOUBLING) for number in sorted(classes)],
        [median(classes[number]) for number in sorted(classes)],
    )
