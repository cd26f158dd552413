"""Activations. Shapes: `R` rows, `F` the width of the result: half of that of `x` if gated."""

import triton
from triton import language as tl


@triton.jit
def _share(x, KIND: tl.constexpr):
    """Return what `x` is multiplied by, in (0, 1), and its derivative."""
    if KIND == "none":  # the normal distribution and its density
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "tanh":  # (1 + tanh(u)) / 2 is the logistic function of 2 u
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        slope = share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        share = 1.0 / (1.0 + tl.exp(-x))
        slope = share * (1.0 - share)
    return share, slope


@triton.jit
def forward(
    x, bias, out, rows, width, blocks, KIND: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Neighbours in memory are neighbours in time.
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    stride = 2 * width if GATED else width
    place = row[:, None] * stride + column[None, :]
    gate = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
    if bias is not None:
        gate += tl.load(bias + column, mask=column < width, other=0.0).to(WIDE)[None, :]
    share, _ = _share(gate, KIND)
    value = gate * share
    if GATED:
        up = tl.load(x + place + width, mask=inside, other=0.0).to(WIDE)
        if bias is not None:
            more = tl.load(bias + width + column, mask=column < width, other=0.0)
            up += more.to(WIDE)[None, :]
        value *= up
    place = row[:, None] * width + column[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    gradient, x, bias, of_x, of_bias, rows, width, size, blocks,
    KIND: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    stride = 2 * width if GATED else width
    sum_of_gate = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
    sum_of_up = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
    for first in range(program * ROWS, rows, size * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * stride + column[None, :]
        upstream = tl.load(
            gradient + row[:, None] * width + column[None, :], mask=inside, other=0.0
        ).to(WIDE)
        gate = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
        if bias is not None:
            gate += tl.load(bias + column, mask=column < width, other=0.0).to(WIDE)[None, :]
        share, slope = _share(gate, KIND)
        if GATED:
            up = tl.load(x + place + width, mask=inside, other=0.0).to(WIDE)
            if bias is not None:
                more = tl.load(bias + width + column, mask=column < width, other=0.0)
                up += more.to(WIDE)[None, :]
            found = upstream * gate * share
            sum_of_up += found
            tl.store(of_x + place + width, found.to(of_x.dtype.element_ty), mask=inside)
            upstream *= up
        found = upstream * (share + gate * slope)
        sum_of_gate += found
        tl.store(of_x + place, found.to(of_x.dtype.element_ty), mask=inside)
    if of_bias is not None:
        part = of_bias + program * stride + column
        tl.store(part, tl.sum(sum_of_gate, axis=0), mask=column < width)
        if GATED:
            tl.store(part + width, tl.sum(sum_of_up, axis=0), mask=column < width)
