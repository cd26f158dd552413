"""Transposed, interleaved and stacked tensors are read and written as a slow oracle says."""

import numpy as np
import pytest

from ml_convert import plan as plans
from ml_convert.execute import copy, gather
from ml_convert.files import Buffers, Files
from ml_convert.layout import Layout, Place, Rectangle, Stored, check_complete
from ml_convert.plan import Band, Checkpoint, Plan
from ml_convert.tensor import DTYPES, Extent
from ml_convert.verify import check_content
from ml_models.weights import Parameter

EXPERTS, ROWS, COLUMNS = 3, 24, 10


def parameter(name, *shape):
    return Parameter(name=name, shape=shape, split=None, init="normal")


def checkpoint(path, shapes, rectangles, dtype="bfloat16"):
    """Tensors one after another in a file."""
    stored, extents, offset = [], [], 32
    for name, shape in shapes.items():
        first = next(p for p, found in rectangles.items() if found[0].tensor == len(stored))
        stored.append(Stored(path.name, name, shape, first))
        extents.append(Extent(path, offset, DTYPES[dtype], shape))
        offset += extents[-1].nbytes
    return Checkpoint(
        layout=Layout(tensors=tuple(stored), rectangles=rectangles), extents=tuple(extents)
    )


def plain(path, tables):
    """Every parameter in a tensor of its own."""
    rectangles, shapes = {}, {}
    for number, table in enumerate(tables):
        rows, columns = (*table.shape, 1)[:2]
        rectangles[table.name] = (Rectangle(number, 0, 0, 0, rows, columns),)
        shapes[f"{table.name}.plain"] = table.shape
    return checkpoint(path, shapes, rectangles)


def stacked(path, *, step, transposed):
    """Experts in one tensor, `step` blocks of rows interleaved."""
    groups = ROWS // step
    view = (EXPERTS, COLUMNS, groups, step) if transposed else (EXPERTS, groups, step, COLUMNS)
    rectangles = {}
    for expert in range(EXPERTS):
        found = []
        for block in range(step):
            start = (expert, 0, 0, block) if transposed else (expert, 0, block, 0)
            place = Place(view, start, *((2, 1) if transposed else (1, 3)))
            found.append(Rectangle(0, 0, block * groups, 0, groups, COLUMNS, place))
        rectangles[f"w{expert}"] = tuple(found)
    shape = (EXPERTS, COLUMNS, ROWS) if transposed else (EXPERTS, ROWS, COLUMNS)
    return checkpoint(path, {"stack": shape}, rectangles)


def oracle(weights, *, step, transposed):
    """Stack matrices (experts, rows, columns) the slow way."""
    blocks = weights.reshape(EXPERTS, step, ROWS // step, COLUMNS)
    found = blocks.transpose(0, 2, 1, 3).reshape(EXPERTS, ROWS, COLUMNS)
    return found.transpose(0, 2, 1) if transposed else found


@pytest.fixture
def small_bands(monkeypatch):
    monkeypatch.setattr(plans, "BAND_BYTES", 70)
    monkeypatch.setattr(plans, "TILE_BYTES", 80)
    monkeypatch.setattr(plans, "_TILE_ROWS", 5)


def run(source, target, tables, size, workers=1):
    """Copy, verify, and return the bytes of the target."""
    check_complete(source.layout, tables)
    check_complete(target.layout, tables)
    work = Plan(table=tuple(tables), source=source, target=target)
    path, done = target.extents[0].path, []
    with Files() as files:
        files.create(path, size)
        copied = copy(work, files, workers=workers, advance=lambda _: None, checksums=True,
                       finished=lambda file, _: done.append(file))  # fmt: skip
        check_content(work, files, workers=workers, advance=lambda _: None)
    assert done == [path.name]
    assert len(copied.written) == len(target.extents)
    return path.read_bytes()


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_stacks_are_written_and_read_like_the_oracle(tmp_path, step, transposed, workers):
    numbers = np.random.default_rng(step)
    weights = numbers.integers(0, 1 << 16, (EXPERTS, ROWS, COLUMNS), np.uint16)
    tables = [parameter(f"w{n}", ROWS, COLUMNS) for n in range(EXPERTS)]
    (tmp_path / "plain").write_bytes(bytes(32) + weights.tobytes())
    options = {"step": step, "transposed": transposed}
    stack, size = stacked(tmp_path / "stack", **options), 32 + weights.nbytes
    content = run(plain(tmp_path / "plain", tables), stack, tables, size, workers)
    assert content == bytes(32) + oracle(weights, **options).tobytes()
    back = run(stack, plain(tmp_path / "back", tables), tables, size, workers)
    assert back == bytes(32) + weights.tobytes()
    other = stacked(tmp_path / "other", step=3 - step or 1, transposed=not transposed)
    content = run(stack, other, tables, size, workers)
    expected = oracle(weights, step=3 - step or 1, transposed=not transposed)
    assert content == bytes(32) + expected.tobytes()


@pytest.mark.usefixtures("small_bands")
def test_interleaved_biases_are_written_and_read(tmp_path):
    view = (2, 12, 2, 1)
    rectangles = {
        f"b{e}": tuple(
            Rectangle(0, 0, 12 * block, 0, 12, 1, Place(view, (e, 0, block, 0), 1, 3))
            for block in range(2)
        )
        for e in range(2)
    }
    tables = [parameter(f"b{n}", 24) for n in range(2)]
    weights = np.arange(48, dtype=np.uint16)
    (tmp_path / "plain").write_bytes(bytes(32) + weights.tobytes())
    stack = checkpoint(tmp_path / "stack", {"bias": (2, 24)}, rectangles)
    content = run(plain(tmp_path / "plain", tables), stack, tables, 128)
    expected = weights.reshape(2, 2, 12).transpose(0, 2, 1).tobytes()
    assert content == bytes(32) + expected
    assert run(stack, plain(tmp_path / "back", tables), tables, 128)[32:] == weights.tobytes()


HEADS, HEAD, HIDDEN = 16, 16, 384


def fused_qkv(path):
    """GPT-2's c_attn: (hidden, 3 * hidden), read as (3 * hidden, hidden) by head."""
    width = HEADS * HEAD
    view, found = (HIDDEN, 3 * width), []
    for head in range(HEADS):
        for kind in range(3):
            place = Place(view, (0, kind * width + head * HEAD), 1, 0)
            found.append(Rectangle(0, 0, (3 * head + kind) * HEAD, 0, HEAD, HIDDEN, place))
    return checkpoint(path, {"c_attn": view}, {"qkv": tuple(found)})


def test_lines_of_a_transposed_tensor_are_read_and_written_in_long_runs(tmp_path, monkeypatch):
    """Not head by head, nor band by band, which would be 32 or 170 bytes at a time."""
    monkeypatch.setattr(plans, "BAND_BYTES", 1 << 16)
    rows = 3 * HEADS * HEAD
    weights = np.random.default_rng(0).integers(0, 1 << 16, (rows, HIDDEN), np.uint16)
    (tmp_path / "plain").write_bytes(bytes(32) + weights.tobytes())
    calls = {"read": [], "write": []}
    for name, sizes in calls.items():
        inner = getattr(Files, name)

        def counted(files, path, offset, data, inner=inner, sizes=sizes):
            sizes.append(data.nbytes)
            inner(files, path, offset, data)

        monkeypatch.setattr(Files, name, counted)
    tables = [parameter("qkv", rows, HIDDEN)]
    fused = fused_qkv(tmp_path / "fused")
    content = run(plain(tmp_path / "plain", tables), fused, tables, 32 + weights.nbytes)
    by_kind = weights.reshape(HEADS, 3, HEAD, HIDDEN).transpose(1, 0, 2, 3).reshape(rows, HIDDEN)
    assert content[32:] == by_kind.T.tobytes()
    assert min(calls["write"]) >= 1024
    calls["read"].clear()
    assert run(fused, plain(tmp_path / "back", tables), tables, 32 + weights.nbytes)[32:] == (
        weights.tobytes()
    )
    assert min(calls["read"]) >= 512


def test_an_element_that_differs_is_named_in_the_tensors_own_shape(tmp_path):
    weights = np.zeros((EXPERTS, ROWS, COLUMNS), np.uint16)
    tables = [parameter(f"w{n}", ROWS, COLUMNS) for n in range(EXPERTS)]
    (tmp_path / "plain").write_bytes(bytes(32) + weights.tobytes())
    stack, size = stacked(tmp_path / "stack", step=2, transposed=True), 32 + weights.nbytes
    source = plain(tmp_path / "plain", tables)
    run(source, stack, tables, size)
    content = bytearray((tmp_path / "stack").read_bytes())
    content[32 + 2 * np.ravel_multi_index((1, 4, 7), (EXPERTS, COLUMNS, ROWS))] = 1
    (tmp_path / "stack").write_bytes(content)
    work = Plan(table=tuple(tables), source=source, target=stack)
    with (
        Files() as files,
        pytest.raises(ValueError, match=r"stack\[1, 4, 7\] differs from .*w1.plain\[15, 4\]"),
    ):
        check_content(work, files, workers=1, advance=lambda _: None)


def test_a_tile_of_a_row_is_gathered(tmp_path):
    weights = np.arange(EXPERTS * ROWS * COLUMNS, dtype=np.uint16).reshape(EXPERTS, ROWS, COLUMNS)
    (tmp_path / "s").write_bytes(bytes(32) + oracle(weights, step=2, transposed=True).tobytes())
    stack = stacked(tmp_path / "s", step=2, transposed=True)
    with Files() as files:
        for band in (Band("w1", 11, 3, 4, 5), Band("w2", 3, 1, 10, 0), Band("w0", 0, 24, 1, 9)):
            found = gather(stack, band, files, Buffers()).view(np.uint16)
            rows, columns = slice(band.row, band.row + band.rows), slice(band.column, None)
            expected = weights[int(band.parameter[1]), rows, columns][:, : band.columns]
            np.testing.assert_array_equal(found, expected)
