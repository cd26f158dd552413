"""How fast each pair of channels turns: the frequency tables of rotary position embeddings.

A table is a vector of inverse wavelengths and a factor for sine and cosine. The plain one is
`base ** (-2i / dim)`; the others stretch it so that a model reads more positions than it was
trained on. All are computed as Hugging Face's `modeling_rope_utils` computes them, in float32, so
that the numbers are equal and not merely close.

Shapes: `S` positions, `R` rotated channels (`dim` here), `R / 2` pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ml_kernels.checks import check_finite, check_integer, check_tensor, require


class RotaryFrequencies(NamedTuple):
    """One frequency table."""

    inverse: torch.Tensor
    """`(R / 2,)` float32: the angle, in radians, by which a pair turns from one position to the
    next."""

    scale: float
    """Multiplies sine and cosine: the `scale` of `rotary_embedding`."""


def rotary_frequencies(dim: int, base: float = 10000.0) -> RotaryFrequencies:
    """Return the plain table (Su et al. 2021, arXiv:2104.09864).

    Args:
        dim: Rotated channels of a head; even.
        base: The wavelength, over 2 pi, that the slowest pair approaches; `rope_theta`.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: A number of channels or positions is no int.
    """
    _check("rotary_frequencies", dim, base)
    return RotaryFrequencies(_plain(dim, base), 1.0)


def linear_frequencies(dim: int, base: float = 10000.0, *, factor: float) -> RotaryFrequencies:
    """Return the table for positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595).

    Args:
        dim: Rotated channels of a head; even.
        base: See `rotary_frequencies`.
        factor: How many times more positions; at least 1.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: A number of channels or positions is no int.
    """
    _check("linear_frequencies", dim, base, factor)
    return RotaryFrequencies(_plain(dim, base) / factor, 1.0)


def dynamic_ntk_frequencies(
    dim: int,
    base: float = 10000.0,
    *,
    factor: float,
    seq_length: int,
    original_max_position_embeddings: int,
) -> RotaryFrequencies:
    """Return the table whose base grows with the sequence (NTK-aware, "dynamic").

    Args:
        dim: Rotated channels of a head; even, above 2.
        base: See `rotary_frequencies`.
        factor: Strength of the stretch; at least 1.
        seq_length: Positions in use; up to `original_max_position_embeddings` the table is the
            plain one.
        original_max_position_embeddings: Positions the model was trained on.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: A number of channels or positions is no int.
    """
    name, original = "dynamic_ntk_frequencies", original_max_position_embeddings
    _check(name, dim, base, factor, original)
    require(dim > 2, name, "dim", dim, "must be above 2, the exponent is dim / (dim - 2)")
    check_integer(name, "seq_length", seq_length)
    require(seq_length > 0, name, "seq_length", seq_length, "must be positive")
    length = max(seq_length, original)
    stretch = (factor * length / original) - (factor - 1)
    return RotaryFrequencies(_plain(dim, base * stretch ** (dim / (dim - 2))), 1.0)


def llama3_frequencies(
    dim: int,
    base: float = 500000.0,
    *,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position_embeddings: int = 8192,
) -> RotaryFrequencies:
    """Return the table of Llama 3.1 (Dubey et al. 2024, arXiv:2407.21783): slow pairs only slower.

    Args:
        dim: Rotated channels of a head; even.
        base: See `rotary_frequencies`.
        factor: By how much the slow pairs are slowed down; at least 1.
        low_freq_factor: Pairs that turn fewer times than this within the original length are slow.
        high_freq_factor: Pairs that turn more often than this are left alone. Those between are
            interpolated.
        original_max_position_embeddings: Positions the model was trained on.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: A number of channels or positions is no int.
    """
    name, original = "llama3_frequencies", original_max_position_embeddings
    _check(name, dim, base, factor, original)
    check_finite(name, low_freq_factor=low_freq_factor, high_freq_factor=high_freq_factor)
    require(low_freq_factor > 0, name, "low_freq_factor", low_freq_factor, "must be positive")
    if high_freq_factor <= low_freq_factor:
        raise ValueError(
            f"{name}: high_freq_factor {high_freq_factor}: must be above low_freq_factor "
            f"({low_freq_factor})"
        )
    plain = _plain(dim, base)
    wavelength = 2 * math.pi / plain
    mix = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - mix) * plain / factor + mix * plain
    slow, fast = wavelength > original / low_freq_factor, wavelength < original / high_freq_factor
    inverse = torch.where(slow, plain / factor, torch.where(fast, plain, between))
    return RotaryFrequencies(inverse, 1.0)


def yarn_frequencies(
    dim: int,
    base: float = 10000.0,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float = 1.0,
    mscale_all_dim: float = 0.0,
    attention_factor: float | None = None,
    truncate: bool = True,
) -> RotaryFrequencies:
    """Return the table of YaRN, "NTK by parts" (Peng et al. 2023, arXiv:2309.00071).

    Args:
        dim: Rotated channels of a head; even.
        base: See `rotary_frequencies`.
        factor: How many times more positions; at least 1.
        original_max_position_embeddings: Positions the model was trained on.
        beta_fast: Pairs that turn at least this often within the original length stay as they are.
        beta_slow: Pairs that turn at most this often are slowed down by `factor`.
        mscale: The scale is `yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)`,
            DeepSeek's rule. (Hugging Face ignores `mscale` when `mscale_all_dim` is 0: give 1.)
        mscale_all_dim: See `mscale`.
        attention_factor: The scale itself, instead of that rule.
        truncate: Round the ends of the ramp between both kinds to whole pairs (gpt-oss does not).

    Raises:
        ValueError: An argument is out of its range.
        TypeError: A number of channels or positions is no int.
    """
    name, original = "yarn_frequencies", original_max_position_embeddings
    _check(name, dim, base, factor, original)
    check_finite(name, beta_fast=beta_fast, beta_slow=beta_slow)
    require(beta_slow > 0, name, "beta_slow", beta_slow, "must be positive")
    if beta_fast <= beta_slow:
        raise ValueError(f"{name}: beta_fast {beta_fast}: must be above beta_slow ({beta_slow})")
    powers = _powers(dim, base)
    interpolated, extrapolated = 1.0 / (factor * powers), 1.0 / powers
    low, high = (_pair_that_turns(n, dim, base, original) for n in (beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    kept = 1 - _ramp(max(low, 0), min(high, dim - 1), dim // 2)
    inverse = interpolated * (1 - kept) + extrapolated * kept
    for argument, value in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
        require(0 <= value < math.inf, name, argument, value, "must be at least 0, and finite")
    if attention_factor is None:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    check_finite(name, attention_factor=attention_factor)
    return RotaryFrequencies(inverse, attention_factor)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return how much YaRN strengthens attention; 1 where nothing is stretched.

    With multi-head latent attention the softmax scale gets its square, at `mscale_all_dim`.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_angles(
    frequencies: torch.Tensor, positions: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Return the angles of positions, for `rotary_embedding`.

    Args:
        frequencies: `(R / 2,)` float32: `RotaryFrequencies.inverse`, on the device of `positions`.
        positions: `(S,)`, integers or floating point.
        interleaved: Place the angles for pairs `(2i, 2i + 1)` instead of `(i, i + R/2)`.

    Returns:
        `(S, 1, 1, R)` float32 in radians, both channels of a pair alike.

    Raises:
        ValueError: An argument is not a vector, or they are on different devices.
        TypeError: An argument is no tensor.
    """
    for argument, given in (("frequencies", frequencies), ("positions", positions)):
        check_tensor("rotary_angles", argument, given)
        require(given.dim() == 1, "rotary_angles", argument, tuple(given.shape), "must be a vector")
    if frequencies.device != positions.device:
        raise ValueError(
            f"rotary_angles: frequencies is on {frequencies.device}: must be on "
            f"{positions.device} like positions"
        )
    angles = torch.outer(positions.float(), frequencies.float())  # (S, R / 2)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles[:, None, None]


def _check(name: str, dim: int, base: float, factor: float = 1.0, original_length: int = 1) -> None:
    check_integer(name, "dim", dim)
    check_integer(name, "original_max_position_embeddings", original_length)
    check_finite(name, base=base, factor=factor)
    require(dim > 0 and dim % 2 == 0, name, "dim", dim, "must be even and positive")
    require(base > 1, name, "base", base, "must be above 1")
    require(factor >= 1, name, "factor", factor, "must be at least 1")
    require(
        original_length > 0,
        name,
        "original_max_position_embeddings",
        original_length,
        "must be positive",
    )


def _powers(dim: int, base: float) -> torch.Tensor:
    """Return `base ** (2i / dim)`, `(dim / 2,)` float32."""
    return base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _plain(dim: int, base: float) -> torch.Tensor:
    return 1.0 / _powers(dim, base)


def _pair_that_turns(times: float, dim: int, base: float, length: int) -> float:
    """Return the index, a fraction, of the pair that turns so often within `length` positions."""
    return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))


def _ramp(low: float, high: float, count: int) -> torch.Tensor:
    """Return `count` numbers that rise from 0 at index `low` to 1 at index `high`."""
    width = high - low or 0.001  # both ends at one pair: a step
    return ((torch.arange(count, dtype=torch.float32) - low) / width).clamp(0, 1)
