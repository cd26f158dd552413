"""Copy weights piece by piece in numpy, as a family says, with a check that nothing is left out."""

import numpy as np

from ml_models.weights import parameters


def rows_of(piece, tensor, hf):
    """Return the rows of a piece as a view `(rows, columns)` of a Hugging Face tensor."""
    part = piece.part
    view = hf.reshape(tensor.view)[part.entry or 0]
    if tensor.transposed:
        view = view.transpose(1, 2, 0)
    start = part.first // part.step
    return view[start : start + part.rows, part.first % part.step]


def random_tensors(tensors):
    numbers = np.random.default_rng(0)
    return {name: numbers.standard_normal(tensor.shape) for name, tensor in tensors.items()}


def forward(family, arch, hf):
    """Copy the pieces from left to right."""
    found = {p.name: np.full(p.shape, np.nan) for p in parameters(arch)}
    tensors = family.tensors(arch)
    for piece in family.pieces(arch):
        target = found[piece.name][piece.row : piece.row + piece.part.rows]
        rows = rows_of(piece, tensors[piece.hf_name], hf[piece.hf_name])
        assert np.isnan(target).all(), piece
        target[:] = rows.reshape(target.shape)
    return found


def backward(family, arch, core):
    """Copy the same pieces from right to left."""
    tensors = family.tensors(arch)
    found = {name: np.full(tensor.shape, np.nan) for name, tensor in tensors.items()}
    for piece in family.pieces(arch):
        rows = core[piece.name][piece.row : piece.row + piece.part.rows]
        target = rows_of(piece, tensors[piece.hf_name], found[piece.hf_name])
        assert np.isnan(target).all(), piece
        target[:] = rows.reshape(target.shape)
    return found


def check_both_directions(family, arch):
    """Check that the pieces fill both sides, once, and reverse each other."""
    hf = random_tensors(family.tensors(arch))
    core = forward(family, arch, hf)
    assert not any(np.isnan(tensor).any() for tensor in core.values())
    back = backward(family, arch, core)
    for name, tensor in hf.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
