"""The cross entropy of rows of logits, and its gradient. Shapes: `R` rows, `V` vocabulary."""

import triton
from triton import language as tl


@triton.jit
def _seen(row, width, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Return the maximum of a row and the sum of its exponentials, relative to that."""
    column = tl.arange(0, COLUMNS)
    # The lowest number, not -inf: with that exp(x - m) is 0 where all of a block is -inf.
    lowest = -3.4028234663852886e38
    highest = tl.full((), lowest, dtype=WIDE)
    total = tl.full((), 0.0, dtype=WIDE)
    for first in range(0, width, COLUMNS):
        inside = first + column < width
        value = tl.load(row + first + column, mask=inside, other=-float("inf")).to(WIDE)
        more = tl.maximum(highest, tl.max(value, axis=0))
        total = total * tl.exp(highest - more) + tl.sum(tl.exp(value - more), axis=0)
        highest = more
    return highest, total


@triton.jit
def forward(
    logits, target, likelihood, highest, total, loss, width,
    IGNORE: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    m, t = _seen(logits + row * width, width, COLUMNS, WIDE)
    tl.store(highest + row, m)
    tl.store(total + row, t)
    # m - x[target] first: log(t) would be lost beside large logits.
    found = m - tl.load(likelihood + row).to(WIDE) + tl.log(t)
    tl.store(loss + row, tl.where(tl.load(target + row) == IGNORE, 0.0, found))


@triton.jit
def backward(
    logits, target, highest, total, upstream, gradient, width, blocks,
    IGNORE: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Neighbours in memory are neighbours in time.
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    where = tl.load(target + row)
    by = tl.where(where == IGNORE, 0.0, tl.load(upstream + row))
    value = tl.load(logits + row * width + column, mask=inside, other=0.0).to(WIDE)
    found = tl.exp(value - tl.load(highest + row)) * (by / tl.load(total + row))
    found -= tl.where(column == where, by, 0.0)
    tl.store(gradient + row * width + column, found.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def lose(
    logits, where, likelihood, factor, loss, width,
    DIFFERENTIATED: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.load(where + row)
    m, t = _seen(logits, width, COLUMNS, WIDE)
    tl.store(loss + row, m - tl.load(likelihood + row).to(WIDE) + tl.log(t))
    if DIFFERENTIATED:
        tl.debug_barrier()  # every thread has read before any writes
        by = tl.load(factor + row)
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = column < width
            value = tl.load(logits + column, mask=inside, other=0.0).to(WIDE)
            found = tl.exp(value - m) * (by / t)
            found -= tl.where(column == target, by, 0.0)
            tl.store(logits + column, found.to(logits.dtype.element_ty), mask=inside)
