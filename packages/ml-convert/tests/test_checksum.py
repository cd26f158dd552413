"""Checksums of pieces in any order equal zlib's checksum of the whole."""

import itertools
import random
import zlib

import pytest

from ml_convert.checksum import Piece, combine, crc32, crc_of_pieces


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 4096, 100_001])
def test_checksums_are_those_of_zlib(length):
    content = random.Random(length).randbytes(length)
    assert crc32(content) == zlib.crc32(content)
    half = length // 2
    assert crc32(memoryview(content)[half:], crc32(content[:half])) == zlib.crc32(content)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_in_any_order_give_the_checksum_of_the_whole(seed):
    numbers = random.Random(seed)
    content = numbers.randbytes(numbers.randrange(1, 100_000))
    cuts = sorted({0, len(content), *(numbers.randrange(len(content)) for _ in range(20))})
    pieces = [
        Piece(start, end - start, zlib.crc32(content[start:end]))
        for start, end in itertools.pairwise(cuts)
    ]
    numbers.shuffle(pieces)
    assert crc_of_pieces(pieces, len(content)) == zlib.crc32(content)


def test_what_no_piece_covers_counts_as_zeros():
    content = bytes(5) + b"abc" + bytes(3_000_000) + b"d" + bytes(7)
    pieces = [Piece(5, 3, zlib.crc32(b"abc")), Piece(3_000_008, 1, zlib.crc32(b"d"))]
    assert crc_of_pieces(pieces, len(content)) == zlib.crc32(content)
    assert crc_of_pieces([], 10) == zlib.crc32(bytes(10))


def test_nothing_added_changes_nothing():
    assert combine(1234, 0, 0) == 1234
    assert crc_of_pieces([], 0) == 0


def test_pieces_that_overlap_or_reach_beyond_the_end_are_refused():
    with pytest.raises(ValueError, match="byte 4 was written twice"):
        crc_of_pieces([Piece(0, 5, 1), Piece(4, 2, 1)], 10)
    with pytest.raises(ValueError, match="written twice"):
        crc_of_pieces([Piece(0, 11, 1)], 10)
