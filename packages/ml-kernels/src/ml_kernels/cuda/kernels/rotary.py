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
    pair = tl.arange(0, PAIRS).to(tl.int64)
    near = pair * 2 if INTERLEAVED else pair
    far = near + 1 if INTERLEAVED else near + pairs
    if SHARED:
        angle = tl.load(angles + near * angle_d, mask=pair < pairs, other=0.0)[None, :]
    for first in range(0, size_n, HEADS):
        head = (first + tl.arange(0, HEADS))[:, None].to(tl.int64)
        inside = (head < size_n) & (pair < pairs)[None, :]
        if not SHARED:
            angle = tl.load(
                angles + head * angle_n + (near * angle_d)[None, :], mask=inside, other=0.0
            )
        # Rounded to the dtype of the heads, as Hugging Face's tables are.
        cos = (tl.cos(angle) * SCALE).to(x.dtype.element_ty).to(WIDE)
        sin = (tl.sin(angle) * SCALE).to(x.dtype.element_ty).to(WIDE)
        if BACKWARDS:
            sin = -sin
        row = x + head * x_n
        one = tl.load(row + (near * x_d)[None, :], mask=inside, other=0.0).to(WIDE)
        other = tl.load(row + (far * x_d)[None, :], mask=inside, other=0.0).to(WIDE)
        row = out + head * out_n
        one, other = one * cos - other * sin, other * cos + one * sin
        tl.store(row + (near * out_d)[None, :], one.to(out.dtype.element_ty), mask=inside)
        tl.store(row + (far * out_d)[None, :], other.to(out.dtype.element_ty), mask=inside)
        if PASSED > 0:
            rest = tl.arange(0, PASSED).to(tl.int64)
            inside = (head < size_n) & (rest < passed)[None, :]
            rest = (2 * pairs + rest)[None, :]
            value = tl.load(x + head * x_n + rest * x_d, mask=inside)
            tl.store(out + head * out_n + rest * out_d, value, mask=inside)
