"""The picture shows what it should; looked at where that can be told from colours."""

from __future__ import annotations

import io
import math

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from some_steps import make_step

from ml_train import curve
from ml_train.history import Evaluation, History, Start


def history(*, starts: tuple[int, ...] = (0,), evaluated: bool = True) -> History:
    steps = [
        make_step(i, loss=10.0 * math.exp(-i / 40), learning_rate=i * 1e-5) for i in range(1, 101)
    ]
    evaluation = Evaluation(iteration=60, loss=3.0, perplexity=20.0)
    return History(
        starts=tuple(Start(iteration=start, facts={}) for start in starts),
        steps=tuple(steps),
        evaluations=(evaluation,) if evaluated else (),
    )


def shows(picture: bytes, colour: str) -> bool:
    """Tell whether some pixel has exactly this colour."""
    pixels = imread(io.BytesIO(picture), format="png")  # (height, width, RGBA), from 0 to 1
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    return bool((abs(pixels[:, :, :3] - to_rgb(colour)) < 0.5 / 255).all(axis=2).any())


def test_parts_of_a_resumed_run_have_their_own_colours() -> None:
    first, second = curve._PARTS[:2]
    whole, resumed = (curve.draw(history(starts=starts)) for starts in ((0,), (0, 50)))
    assert shows(whole, first)
    assert not shows(whole, second)
    assert shows(resumed, first)
    assert shows(resumed, second)


def test_the_entropy_is_a_line_if_it_is_known() -> None:
    assert not shows(curve.draw(history()), curve._ENTROPY)
    assert shows(curve.draw(history(), unigram_entropy=6.5), curve._ENTROPY)


def test_steps_without_a_loss_leave_a_gap_and_no_error() -> None:
    lost = history(evaluated=False)
    steps = tuple(make_step(i, loss=math.nan) for i in range(1, 4))
    assert curve.draw(History(starts=lost.starts, steps=steps, evaluations=()))


def test_smoothing_keeps_a_constant_and_skips_what_is_no_number() -> None:
    assert curve.smooth([3.0, 3.0, math.nan, 3.0], 4) == pytest.approx([3.0] * 4)
    assert curve.smooth([1.0, 2.0], 1) == [1.0, 2.0]
    assert math.isnan(curve.smooth([math.nan], 2)[0])


def test_smoothing_follows_a_step_over_its_window_and_faster_at_the_beginning() -> None:
    late = curve.smooth([1.0] * 100 + [2.0] * 4, 4)
    assert late[-4:] == pytest.approx([2.0 - 0.75**n for n in (1, 2, 3, 4)])
    assert curve.smooth([1.0, 2.0, 3.0], 4) == [1.0, 2.0, 3.0]
