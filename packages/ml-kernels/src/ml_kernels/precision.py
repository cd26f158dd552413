"""A float32 buffer that is its own bfloat16 copy: mixed precision without a second copy.

The upper 16 bits of a float32 are a bfloat16. `split_float32` gathers the upper halves of a buffer
of N numbers in its first 2 N bytes, as the model's weights, and the lower halves behind them;
before the optimizer's step `join_float32` puts them back. One buffer of 4 bytes a weight takes the
place of two of 2 and 4 (ModelLink's --reuse-fp32-param).

To round rather than truncate, 0x8000 is added to the 32 bits before the split and taken away after
the join. That is addition modulo 2^32, so that the join is exact for every pattern of bits. The
weights equal `buffer.to(torch.bfloat16)` but for exact ties, which go away from zero rather than to
even, and for NaN whose bits no arithmetic makes: 0x7f800001 to 0x7f807fff become infinity, and from
0x7fff8000 on they become zero.

Shapes: `N` numbers in a flat buffer.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import torch

from ml_kernels.checks import require

_HALF = 0x8000  # of the last bit that is kept
_FIRST_PIECE = 4096


def split_float32(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn float32 numbers into bfloat16 weights and what the rounding left, in place.

    Until `join_float32` the buffer holds no numbers; the caller keeps track of that. For a moment
    2 bytes a number are needed besides.

    Args:
        buffer: `(N,)` float32, contiguous.

    Returns:
        Weights `(N,)` bfloat16 and residual `(N,)` int16, views of the storage of `buffer`.

    Raises:
        TypeError: The buffer is not float32.
        ValueError: It is not flat and contiguous, or the machine is big-endian.
    """
    words, size = _words("split_float32", buffer)
    words.view(torch.int32).add_(_HALF)
    lower = words[::2].clone()
    for start, stop in _pieces(size):
        _move(words[2 * start + 1 : 2 * stop : 2], words[start:stop])
    words[size:] = lower
    return words[:size].view(torch.bfloat16), words[size:]


def join_float32(buffer: torch.Tensor) -> None:
    """Undo `split_float32`, bit for bit, in place. Its weights and residual are no more.

    Args:
        buffer: `(N,)` float32, contiguous, as it was given to `split_float32`.

    Raises:
        TypeError: The buffer is not float32.
        ValueError: It is not flat and contiguous, or the machine is big-endian.
    """
    words, size = _words("join_float32", buffer)
    lower = words[size:].clone()
    for start, stop in reversed(_pieces(size)):
        _move(words[start:stop], words[2 * start + 1 : 2 * stop : 2])
    words[::2] = lower
    words.view(torch.int32).sub_(_HALF)


def _words(operator: str, buffer: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the `2 N` halves of the buffer, lower half first, and N."""
    if buffer.dtype != torch.float32:
        raise TypeError(f"{operator}: buffer is {buffer.dtype}: must be torch.float32")
    require(
        buffer.dim() == 1 and buffer.is_contiguous(),
        operator,
        "buffer",
        f"{tuple(buffer.shape)} of strides {buffer.stride()}",
        "must be (N,), contiguous: its storage is divided",
    )
    require(sys.byteorder == "little", operator, "byte order", sys.byteorder, "must be little")
    # One number, or none, is contiguous whatever its stride; a view as another dtype wants 1.
    flat = buffer.detach().as_strided(buffer.shape, (1,))
    return flat.view(torch.int16), buffer.numel()


def _pieces(size: int) -> list[tuple[int, int]]:
    """Cut `[0, size)` so that a piece that starts at i > 0 ends before 2 i.

    Then the places i and 2 i + 1 of its numbers do not overlap, and can be copied at once.
    """
    bounds = [0]
    while bounds[-1] < size:
        bounds.append(min(size, max(_FIRST_PIECE, 2 * bounds[-1])))
    return list(pairwise(bounds))


def _move(source: torch.Tensor, target: torch.Tensor) -> None:
    # Only the first piece overlaps with where it goes.
    target.copy_(source.clone() if len(source) <= _FIRST_PIECE else source)
