"""Bands are gathered from and scattered to rows, columns and copies."""

import zlib

import numpy as np
import pytest

from ml_convert import ConversionError
from ml_convert.checksum import crc_of_pieces
from ml_convert.execute import check_copies, copy, gather, scatter
from ml_convert.files import Buffers, Files
from ml_convert.layout import Layout, Rectangle, Stored
from ml_convert.plan import Band, Checkpoint, Plan, overlapping
from ml_convert.tensor import DTYPES, Extent
from ml_models.weights import Parameter

WORDS = np.arange(48, dtype=np.uint16).reshape(8, 6)
TABLE = (Parameter(name="w", shape=(8, 6), split=None, init="normal"),)


def checkpoint(path, tensors, rectangles, dtype="bfloat16"):
    """Tensors one after another in a file; `tensors` is (shape, padding, copy_of) of each."""
    stored, extents, offset = [], [], 16
    for number, (shape, padding, copy_of) in enumerate(tensors):
        stored.append(Stored(path.name, f"t{number}", shape, "w", padding, copy_of))
        extents.append(Extent(path, offset, DTYPES[dtype], shape))
        offset += extents[-1].nbytes + 8
    layout = Layout(tensors=tuple(stored), rectangles={"w": tuple(rectangles)})
    return Checkpoint(layout=layout, extents=tuple(extents))


def rows(path):
    """The rows of w in two tensors, interleaved in blocks of two, and all of it again."""
    return checkpoint(
        path,
        [((4, 6), 0, None), ((4, 6), 0, None), ((8, 6), 0, 0)],
        [
            Rectangle(0, 0, 0, 0, 2, 6),
            Rectangle(1, 0, 2, 0, 2, 6),
            Rectangle(0, 2, 4, 0, 2, 6),
            Rectangle(1, 2, 6, 0, 2, 6),
            Rectangle(2, 0, 0, 0, 8, 6),
        ],
    )


def columns(path, dtype="bfloat16"):
    """The columns of w in two tensors, the second with a row of padding."""
    return checkpoint(
        path,
        [((8, 2), 0, None), ((9, 4), 1, None)],
        [Rectangle(0, 0, 0, 0, 8, 2), Rectangle(1, 0, 0, 2, 8, 4)],
        dtype,
    )


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    first, second = WORDS.reshape(2, 2, 2, 6).swapaxes(0, 1).reshape(2, 4, 6)
    gap = bytes(8)
    path.write_bytes(bytes(16) + first.tobytes() + gap + second.tobytes() + gap + WORDS.tobytes())
    return rows(path)


@pytest.mark.parametrize("band", [(0, 8), (1, 1), (3, 4), (5, 2)])
def test_any_band_is_gathered_from_where_its_rows_are(source, band):
    start, count = band
    with Files() as files:
        data = gather(source, Band("w", start, count, 6), files, Buffers())
        np.testing.assert_array_equal(data.view(np.uint16), WORDS[start : start + count])
        check_copies(source, Band("w", start, count, 6), data, files, Buffers())


def test_a_copy_that_differs_in_the_band_is_named(source):
    path = source.extents[2].path
    content = bytearray(path.read_bytes())
    content[source.extents[2].offset + 5 * 12] ^= 1
    path.write_bytes(content)
    with Files() as files:
        for start, differs in ((0, False), (4, True)):
            band = Band("w", start, 4, 6)
            data = gather(source, band, files, Buffers())
            if not differs:
                check_copies(source, band, data, files, Buffers())
                continue
            with pytest.raises(ConversionError, match=r"source: t2 should repeat t0 of .*source"):
                check_copies(source, band, data, files, Buffers())


def test_columns_are_written_to_their_tensors(tmp_path):
    target = columns(tmp_path / "target")
    with Files() as files:
        files.create(tmp_path / "target", 200)
        band = Band("w", 2, 3, 6)
        places = overlapping(target.layout.rectangles["w"], band)
        written = scatter(target, band, places, WORDS[2:5].view(np.uint8), files, Buffers())
        found = [(tensor, offset, part.tolist()) for tensor, offset, part in written]
        assert found == [(0, 8, WORDS[2:5, :2].tolist()), (1, 16, WORDS[2:5, 2:].tolist())]
        back = gather(target, band, files, Buffers())
    np.testing.assert_array_equal(back.view(np.uint16), WORDS[2:5])


def test_parts_of_rows_are_put_together_in_the_same_memory(tmp_path):
    target, buffers, band = columns(tmp_path / "target"), Buffers(), Band("w", 0, 8, 6)
    places = [*overlapping(target.layout.rectangles["w"], band)][1:]
    with Files() as files:
        files.create(tmp_path / "target", 200)
        ((_, _, first),) = scatter(target, band, places, WORDS.view(np.uint8), files, buffers)
        ((_, _, second),) = scatter(target, band, places, WORDS.view(np.uint8), files, buffers)
    assert np.shares_memory(first, second)
    assert not np.shares_memory(first, WORDS)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_copy_holds_all_elements_and_knows_the_checksums(tmp_path, source, workers):
    path = tmp_path / "target"
    target = columns(path)
    done = []
    with Files() as files:
        files.create(path, 200)
        copied = copy(
            Plan(table=TABLE, source=source, target=target),
            files,
            workers=workers,
            advance=done.append,
            checksums=True,
        )
    content = path.read_bytes()
    expected = [WORDS[:, :2].tobytes(), np.pad(WORDS[:, 2:], [(0, 1), (0, 0)]).tobytes()]
    for index, (extent, data) in enumerate(zip(target.extents, expected, strict=True)):
        assert content[extent.offset : extent.offset + extent.nbytes] == data
        assert crc_of_pieces(copied.written[index].pieces, extent.nbytes) == zlib.crc32(data)
    assert sum(done) == WORDS.nbytes


def test_a_copy_to_another_dtype_casts_on_the_way(tmp_path, source):
    path = tmp_path / "target"
    target = columns(path, "float32")
    with Files() as files:
        files.create(path, 400)
        work = Plan(table=TABLE, source=source, target=target)
        copy(work, files, workers=1, advance=lambda _: None, checksums=False)
        data = gather(target, Band("w", 0, 8, 6), files, Buffers())
    np.testing.assert_array_equal(data.view(np.uint32), WORDS.astype(np.uint32) << 16)
