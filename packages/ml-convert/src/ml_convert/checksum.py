"""CRC-32 of a file that is written in pieces, in any order.

The checksum of two pieces in a row follows from the checksums of both and the length of the second
(the arithmetic is that of polynomials over GF(2), as in zlib's crc32_combine), so no piece has to
be read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from zlib_ng import zlib_ng

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31  # the polynomial 1; coefficients are stored in reversed order
_ZEROS = bytes(1 << 20)


class Piece(NamedTuple):
    """A piece that was written: where, how long, and its CRC-32."""

    offset: int
    length: int
    crc: int


def crc32(content: bytes | memoryview, start: int = 0) -> int:
    """Return the CRC-32 of what came before, which is `start`, and this content.

    zlib-ng takes an eighth of the time of the zlib that most Pythons are built with.
    """
    return zlib_ng.crc32(content, start)


def crc_of_pieces(pieces: Iterable[Piece], length: int) -> int:
    """Return the CRC-32 of `length` bytes made of these pieces; what no piece covers is zeros.

    Raises:
        ValueError: Pieces overlap or reach beyond the end.
    """
    crc, end = 0, 0
    for piece in (*sorted(pieces), Piece(length, 0, 0)):
        if piece.offset < end:
            raise ValueError(f"byte {piece.offset} was written twice")
        crc = combine(crc, _crc_of_zeros(piece.offset - end), piece.offset - end)
        crc = combine(crc, piece.crc, piece.length)
        end = piece.offset + piece.length
    return crc


def combine(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two pieces in a row; `length` is that of the second in bytes."""
    return _multiply(_shift(length), first) ^ second if length else first


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """Return x to the power of 8 * length, modulo the polynomial."""
    power, square, exponent = _ONE, _ONE >> 1, 8 * length
    while exponent:
        if exponent & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        exponent >>= 1
    return power


def _crc_of_zeros(length: int) -> int:
    crc = 0
    while length > 0:
        crc = crc32(_ZEROS[:length], crc)
        length -= len(_ZEROS)
    return crc
