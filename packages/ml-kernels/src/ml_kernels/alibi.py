"""Attention with linear biases (ALiBi): a penalty on every score that grows with the distance.

The row form `slope * j` and the square form `slope * (j - i)` differ by a constant in each row of
scores: softmax gives the same weights, the log-sum-exp differs. In low precision the square form is
the better one: its small numbers stand where the weights are large.

Shapes: `N` heads, `Sq`, `Sk` query and key lengths. Query `i` stands at position `i + Sk - Sq`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ml_kernels.checks import check_floating, check_integer, require

AlibiForm = Literal["row", "square"]


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Return the slopes `(N,)` float32 of Press et al. 2022 (arXiv:2108.12409).

    For `N` a power of two they are `2 ** (-8 n / N)`, n = 1 to N. Otherwise those of the power of
    two below, then every other one of twice that number, as in the authors' code.

    Raises:
        ValueError: `num_heads` is not positive.
        TypeError: It is no int.
    """
    check_integer("alibi_slopes", "num_heads", num_heads)
    require(num_heads > 0, "alibi_slopes", "num_heads", num_heads, "must be positive")
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * n / power) for n in range(1, power + 1)]
    between = [2.0 ** (-4.0 * n / power) for n in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes + between, dtype=torch.float32)


def alibi_bias(
    slopes: torch.Tensor, queries: int, keys: int, *, form: AlibiForm, fill_neg_inf: bool = False
) -> torch.Tensor:
    """Return what ALiBi adds to the scores.

    Args:
        slopes: `(N,)`, any floating dtype.
        queries: `Sq`.
        keys: `Sk`.
        form: "row": `slope * j`. "square": `slope * (j - i)`, with `i` counted so that the last
            query stands at the last key.
        fill_neg_inf: Put -inf where a key comes after its query.

    Returns:
        `(N, 1, Sk)` for "row", `(N, Sq, Sk)` for "square"; float32, or float64 for float64 slopes.

    Raises:
        ValueError: The slopes are no vector, `form` is unknown, or `fill_neg_inf` is asked of the
            row form, which has no rows to fill.
        TypeError: The slopes are not floating point.
    """
    operator = "alibi_bias"
    check_floating(operator, "slopes", slopes)
    require(slopes.dim() == 1, operator, "slopes", tuple(slopes.shape), "must be (heads,)")
    require(form in ("row", "square"), operator, "form", repr(form), "must be 'row' or 'square'")
    require(
        form == "square" or not fill_neg_inf, operator, "fill_neg_inf", True, "needs form='square'"
    )
    dtype = torch.promote_types(slopes.dtype, torch.float32)
    steep = slopes.to(dtype)[:, None, None]
    key = torch.arange(keys, dtype=dtype, device=slopes.device)
    if form == "row":
        return steep * key
    query = torch.arange(keys - queries, keys, dtype=dtype, device=slopes.device)
    distance = key - query[:, None]  # (Sq, Sk)
    bias = steep * distance
    return bias.masked_fill_(distance > 0, float("-inf")) if fill_neg_inf else bias
