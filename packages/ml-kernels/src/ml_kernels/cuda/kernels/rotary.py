"""Rotations of pairs of channels. Shapes: see `ml_kernels.cuda.rotary`."""

import triton
from triton import language as tl


@triton.jit
def rotate(
    x, out, angles, size_b, size_n, pairs, passed,
    x_a, x_b, x_n, x_d, out_a, out_b, out_n, out_d, angle_a, angle_b, angle_n, angle_d,
    SCALE: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARDS: tl.constexpr, SHARED: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, PASSED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    a = (tl.program_id(0) // size_b).to(tl.int64)
    b = (tl.program_id(0) % size_b).to(tl.int64)
    x += a * x_a + b * x_b
    out += a * out_a + b * out_b
    angles += a * angle_a + b * angle_b
    pair = tl.arange(0, PAIRS)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    apart = 1 if INTERLEAVED else pairs
    if SHARED:
        angle = tl.load(angles + pair * step * angle_d, mask=pair < pairs, other=0.0)[None, :]
    for first in range(0, size_n, HEADS):
        head = (first + tl.arange(0, HEADS))[:, None].to(tl.int64)
        inside = (head < size_n) & (pair < pairs)[None, :]
        if not SHARED:
            angle = tl.load(
                angles + head * angle_n + (pair * step * angle_d)[None, :], mask=inside, other=0.0
            )
        # Rounded to the dtype of the heads, as Hugging Face's tables are.
        cos = (tl.cos(angle) * SCALE).to(x.dtype.element_ty).to(WIDE)
        sin = (tl.sin(angle) * SCALE).to(x.dtype.element_ty).to(WIDE)
        if BACKWARDS:
            sin = -sin
        place = x + head * x_n + (pair * step * x_d)[None, :]
        one = tl.load(place, mask=inside, other=0.0).to(WIDE)
        other = tl.load(place + apart * x_d, mask=inside, other=0.0).to(WIDE)
        place = out + head * out_n + (pair * step * out_d)[None, :]
        dtype = out.dtype.element_ty
        tl.store(place, (one * cos - other * sin).to(dtype), mask=inside)
        tl.store(place + apart * out_d, (other * cos + one * sin).to(dtype), mask=inside)
        if PASSED > 0:
            rest = tl.arange(0, PASSED)
            inside = (head < size_n) & (rest < passed)[None, :]
            rest = (2 * pairs + rest)[None, :]
            value = tl.load(x + head * x_n + rest * x_d, mask=inside)
            tl.store(out + head * out_n + rest * out_d, value, mask=inside)
