"""The picture of a run: its loss, and below it the learning rate."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_train.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED, _GRID = "#1f2933", "#6b7785", "#e4e7eb"
_PARTS = ("#1f6feb", "#0f9d76", "#8250df", "#c2660c")
_ENTROPY, _VALIDATION = "#b42318", "#1f2933"
_SIZE_INCHES = (9.0, 5.2)
_DOTS_PER_INCH = 160


def draw(history: History, *, unigram_entropy: float | None = None) -> bytes:
    """Return the picture as PNG.

    Args:
        history: The run.
        unigram_entropy: Of the text, in nats a token; drawn as a line if given.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    margins = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout=margins)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_loss(loss, history)
    if unigram_entropy is not None:
        _draw_entropy(loss, unigram_entropy, history.last_loss())
    _draw_rate(rate, history)
    for axes in (loss, rate):
        _dress(axes)
        for start in history.starts[1:]:
            axes.axvline(start.iteration, color=_MUTED, linestyle=(0, (1, 2)), linewidth=1.2)
    for start in history.starts[1:]:
        _note(loss, start.iteration, f"stopped after step {start.iteration}, resumed")
    loss.legend(loc="upper right", bbox_to_anchor=(1.0, 0.9), frameon=False, labelcolor=_INK)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def smooth(values: Sequence[float], window: float) -> list[float]:
    """Return the running mean of values, without those that are NaN.

    It is exponential, over about `window` values, at the beginning over fewer: there the loss falls
    so fast that an older value says little.
    """
    mean = math.nan
    means = []
    for count, value in enumerate(values, start=1):
        share = 1.0 / max(1.0, min(window, count / 5))
        if math.isfinite(value):
            mean = value if math.isnan(mean) else mean + share * (value - mean)
        means.append(mean)
    return means


def _draw_loss(axes: Axes, history: History) -> None:
    losses = [step.loss for step in history.steps]
    means = smooth(losses, window=len(losses) / 25)
    ends = [*(start.iteration for start in history.starts[1:]), history.steps[-1].iteration]
    for number, (start, end) in enumerate(zip(history.starts, ends, strict=True)):
        first = max(start.iteration, 1)  # joined to the part before
        indices = [i for i, step in enumerate(history.steps) if first <= step.iteration <= end]
        steps = [history.steps[i].iteration for i in indices]
        colour = _PARTS[number % len(_PARTS)]
        label = "training" if len(ends) == 1 else f"training, part {number + 1}"
        axes.plot(steps, [losses[i] for i in indices], color=colour, alpha=0.28, linewidth=1.0)
        axes.plot(steps, [means[i] for i in indices], color=colour, linewidth=2.0, label=label)
    if history.evaluations:
        axes.plot(
            [evaluation.iteration for evaluation in history.evaluations],
            [evaluation.loss for evaluation in history.evaluations],
            "o",
            color=_VALIDATION,
            markersize=6.5,
            markerfacecolor="white",
            markeredgewidth=1.8,
            label="validation",
            zorder=4,
        )
    axes.set_ylabel("loss (nats per token)")


def _draw_entropy(axes: Axes, entropy: float, loss: float) -> None:
    """Draw the line, with its name on the side where the run does not end."""
    above = not loss > entropy
    axes.axhline(entropy, color=_ENTROPY, linestyle=(0, (5, 3)), linewidth=1.4)
    axes.annotate(
        f"unigram entropy of the text, {entropy:.2f}",
        (1.0, entropy),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 5 if above else -5),
        textcoords="offset points",
        horizontalalignment="right",
        verticalalignment="bottom" if above else "top",
        color=_ENTROPY,
    )


def _draw_rate(axes: Axes, history: History) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = [step.iteration for step in history.steps]
    axes.plot(steps, [step.learning_rate for step in history.steps], color=_MUTED, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")
    axes.set_xlabel("step")
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")


def _note(axes: Axes, iteration: int, text: str) -> None:
    axes.annotate(
        text,
        (iteration, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(6, -6),
        textcoords="offset points",
        verticalalignment="top",
        color=_MUTED,
    )


def _dress(axes: Any) -> None:
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.tick_params(colors=_MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_INK)
