"""Norms of rows that a program holds whole. Shapes: `R` rows, `H` their width."""

import triton
from triton import language as tl


@triton.jit
def forward(
    x, residual, weight, bias, out, total, mean, inverse, rows, width,
    EPS: tl.constexpr, CENTRED: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0)
    if residual is not None:
        other = tl.load(residual + place, mask=inside, other=0.0)
        value = (value.to(WIDE) + other.to(WIDE)).to(x.dtype.element_ty)
        tl.store(total + place, value, mask=inside)
    value = value.to(WIDE)
    if CENTRED:
        middle = tl.sum(value, axis=1) / width
        tl.store(mean + row, middle, mask=row < rows)
        value = tl.where(inside, value - middle[:, None], 0.0)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(WIDE)
    by = tl.rsqrt(tl.sum(value * value, axis=1) / width + EPS)
    tl.store(inverse + row, by, mask=row < rows)
    value = value * by[:, None]
    if OFFSET:
        factor += 1.0
    elif not CENTRED:  # Llama rounds here, Gemma at the end
        value = value.to(out.dtype.element_ty).to(WIDE)
    value = value * factor[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=column < width, other=0.0).to(WIDE)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    gradient, more, x, weight, mean, inverse, of_x, of_weight, of_bias, rows, width,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(WIDE)
    if OFFSET:
        factor += 1.0
    sum_of_weight = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
    sum_of_bias = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        upstream = tl.load(gradient + place, mask=inside, other=0.0).to(WIDE)
        value = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
        by = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        if CENTRED:
            value -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
            value = tl.where(inside, value, 0.0)
            sum_of_bias += upstream
        value *= by
        if OFFSET or CENTRED:
            sum_of_weight += upstream * value
        else:  # it was rounded before it met the weight
            sum_of_weight += upstream * value.to(x.dtype.element_ty).to(WIDE)
        upstream *= factor[None, :]
        found = upstream - value * (tl.sum(upstream * value, axis=1) / width)[:, None]
        if CENTRED:
            found -= (tl.sum(upstream, axis=1) / width)[:, None]
        found *= by
        if more is not None:
            found += tl.load(more + place, mask=inside, other=0.0).to(WIDE)
        tl.store(of_x + place, found.to(of_x.dtype.element_ty), mask=inside)
    part = tl.program_id(0) * width + column
    tl.store(of_weight + part, tl.sum(sum_of_weight, axis=0), mask=column < width)
    if of_bias is not None:
        tl.store(of_bias + part, tl.sum(sum_of_bias, axis=0), mask=column < width)
