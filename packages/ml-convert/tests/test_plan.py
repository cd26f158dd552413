"""A plan is made only of complete layouts, and cuts every parameter into small bands."""

from dataclasses import replace
from pathlib import Path

import pytest

from ml_convert import ConversionError
from ml_convert.layout import Layout, Rectangle, Stored
from ml_convert.plan import BAND_BYTES, Band, Checkpoint, overlapping, plan
from ml_convert.ranks import layout
from ml_convert.tensor import DTYPES, Extent
from ml_models.architecture import Architecture
from ml_models.weights import parameters

ARCH = Architecture(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    vocab_size=100_000,
    max_position_embeddings=8,
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
)


def cut(tp, *, dtypes=()):
    found = layout(
        ARCH, ((range(2),),), tensor_parallel_size=tp, padded_vocab_size=100_000 + 96 * tp
    )
    extents = []
    for stored in found.tensors:
        dtype = DTYPES[dict(dtypes).get(stored.name, "bfloat16")]
        extents.append(Extent(Path(stored.file), 0, dtype, stored.shape))
    return Checkpoint(layout=found, extents=tuple(extents))


def without(checkpoint, name):
    """Lose the last rectangle of a parameter."""
    rectangles = dict(checkpoint.layout.rectangles)
    rectangles[name] = rectangles[name][:-1]
    return replace(checkpoint, layout=replace(checkpoint.layout, rectangles=rectangles))


def test_bands_are_small_and_cover_every_parameter_once():
    proven = plan(ARCH, cut(1), cut(2))
    rows = {}
    for band in proven.bands():
        assert band.rows * band.columns * 2 <= BAND_BYTES
        assert band.row == rows.get(band.parameter, 0)  # in order, without gaps
        rows[band.parameter] = band.row + band.rows
    assert rows == {p.name: p.shape[0] for p in parameters(ARCH)}
    sizes = (band.rows * band.columns * 2 for band in proven.bands())
    assert proven.nbytes == sum(sizes) > 12 << 20


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_hole_on_either_side_is_found_before_anything_is_copied(side):
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    sides = {"source": cut(2), "target": cut(2)}
    plan(ARCH, **sides)
    sides[side] = without(sides[side], name)
    with pytest.raises(ConversionError, match=rf"{name}: .*(missing|there twice)"):
        plan(ARCH, **sides)


def test_parts_of_a_parameter_in_different_dtypes_are_refused():
    mixed = cut(2, dtypes={"model.decoder.final_layernorm.weight": "float32"})
    assert mixed.dtypes["decoder.final_layernorm.weight"].name == "float32"
    extents = list(mixed.extents)
    extents[-1] = extents[-1]._replace(dtype=DTYPES["bfloat16"])
    with pytest.raises(ConversionError, match=r"mp_rank_01/.*final_layernorm.weight is bfloat16"):
        _ = replace(mixed, extents=tuple(extents)).dtypes


def test_only_the_rows_that_a_band_shares_are_listed():
    rectangles = (Rectangle(0, 0, 0, 0, 10, 4), Rectangle(1, 0, 10, 0, 5, 4))
    found = list(overlapping(rectangles, Band("w", 8, 4, 4)))
    assert [(r.tensor, *part) for r, *part in found] == [(0, 8, 2, 0, 4), (1, 10, 2, 0, 4)]
    columns = list(overlapping(rectangles, Band("w", 0, 4, 2, 3)))
    assert [(r.tensor, *part) for r, *part in columns] == [(0, 0, 4, 3, 1)]
    assert list(overlapping(rectangles, Band("w", 15, 4, 4))) == []


def test_a_layout_of_another_model_is_refused():
    other = Layout(
        tensors=(Stored("f", "w", (4, 4), "w"),), rectangles={"w": (Rectangle(0, 0, 0, 0, 4, 4),)}
    )
    checkpoint = Checkpoint(
        layout=other, extents=(Extent(Path("f"), 0, DTYPES["float32"], (4, 4)),)
    )
    with pytest.raises(ConversionError, match="is not stored by the layout, or is no parameter"):
        plan(ARCH, cut(1), checkpoint)
