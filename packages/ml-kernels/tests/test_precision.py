"""A float32 buffer that is its own bfloat16 copy: every bit of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from live_memory import peak_bytes

from ml_kernels import adamw, join_float32, precision, split_float32

CORNERS = [
    (0x00000000, 0x0000),  # zeros keep their sign
    (0x80000000, 0x8000),
    (0x00000001, 0x0000),  # denormals
    (0x807FFFFF, 0x8080),
    (0x3F800000, 0x3F80),
    (0x3F807FFF, 0x3F80),  # below a tie
    (0x3F808000, 0x3F81),  # ties go away from zero: to even would be 3F80 ...
    (0x3F818000, 0x3F82),  # ... and here too 3F82
    (0xBF808000, 0xBF81),
    (0x3F808001, 0x3F81),
    (0x7F7FFFFF, 0x7F80),  # the largest number becomes infinity, as in every rounding
    (0x7F800000, 0x7F80),  # infinities
    (0xFF800000, 0xFF80),
    (0x7FC00000, 0x7FC0),  # the NaN that arithmetic makes
    (0xFFC00000, 0xFFC0),
    (0x7F800001, 0x7F80),  # others may stop being NaN, as the module says
    (0x7FFFFFFF, 0x8000),
    (0xFFFFFFFF, 0x0000),
]
SIZES = [0, 1, 2, 3, 17, 4095, 4096, 4097, 8192, 8193, 12289, 100_003]


def every_kind_of_bits(size, seed=0):
    """Random patterns, a third of them at or beside a tie; the corners come first."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, size, dtype=np.uint64)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x7FFF + np.arange(len(bits[::3]), dtype=np.uint64) % 3
    corners = np.array([corner for corner, _ in CORNERS], dtype=np.uint64)[:size]
    bits[: len(corners)] = corners
    return bits.astype(np.uint32)


def as_float32(bits):
    return torch.from_numpy(bits.copy().view(np.float32))


def bits_of(tensor):
    kinds = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
    whole, unsigned = kinds[tensor.element_size()]
    return tensor.view(whole).numpy().view(unsigned)


@pytest.mark.parametrize("size", SIZES)
def test_the_join_gives_every_bit_back(size):
    bits = every_kind_of_bits(size)
    buffer = as_float32(bits)
    for _ in range(2):
        split_float32(buffer)
        assert size < 2 or not np.array_equal(bits_of(buffer), bits)
        join_float32(buffer)
        assert np.array_equal(bits_of(buffer), bits)


@pytest.mark.parametrize("size", SIZES)
def test_weights_and_residual_are_the_halves_of_the_bits_plus_a_half(size):
    bits = every_kind_of_bits(size)
    weights, residual = split_float32(as_float32(bits))
    shifted = bits.astype(np.uint64) + 0x8000
    assert np.array_equal(bits_of(weights), (shifted >> 16 & 0xFFFF).astype(np.uint16))
    assert np.array_equal(bits_of(residual), (shifted & 0xFFFF).astype(np.uint16))


def test_known_numbers_are_rounded_as_documented():
    weights, _ = split_float32(as_float32(np.array([b for b, _ in CORNERS], dtype=np.uint32)))
    assert [hex(b) for b in bits_of(weights)] == [hex(b) for _, b in CORNERS]


def test_weights_differ_from_torchs_rounding_in_exact_ties_only():
    bits = every_kind_of_bits(300_000)
    buffer = as_float32(bits)
    numbers = ~torch.isnan(buffer).numpy()
    nearest_even = bits_of(buffer.to(torch.bfloat16)).copy()
    weights, _ = split_float32(buffer)
    differ = bits_of(weights) != nearest_even
    ties_to_odd = (bits & 0x1FFFF) == 0x08000
    assert ties_to_odd[numbers].sum() > 10_000
    assert np.array_equal(differ[numbers], ties_to_odd[numbers])


def test_everything_stays_in_the_same_storage():
    whole = torch.zeros(300)
    buffer = whole[100:200]
    buffer.copy_(torch.linspace(-3, 3, 100))
    before = buffer.clone()
    weights, residual = split_float32(buffer)
    assert (weights.dtype, residual.dtype) == (torch.bfloat16, torch.int16)
    assert weights.is_contiguous()
    assert residual.is_contiguous()
    assert weights.data_ptr() == buffer.data_ptr()
    assert residual.data_ptr() == buffer.data_ptr() + 200
    assert not whole[:100].any()
    assert not whole[200:].any()
    weights[0] = 1  # the model's weights are the buffer's: what is loaded into them arrives
    join_float32(buffer)
    assert abs(float(buffer[0]) - 1) < 2**-8
    assert torch.equal(buffer[1:], before[1:])


def test_one_number_of_any_stride_is_contiguous():
    buffer = torch.tensor([1.7, 2.6])[::2]
    assert float(split_float32(buffer)[0]) == float(torch.tensor(1.7, dtype=torch.bfloat16))
    join_float32(buffer)
    assert float(buffer) == float(torch.tensor(1.7))


def test_a_parameter_that_requires_a_gradient_can_be_split():
    buffer = torch.nn.Parameter(torch.linspace(-3, 3, 100))
    weights, residual = split_float32(buffer)
    assert not weights.requires_grad
    assert not residual.requires_grad
    join_float32(buffer)
    assert torch.equal(buffer.detach(), torch.linspace(-3, 3, 100))


def test_no_more_than_the_residual_is_copied():
    buffer = torch.zeros(100_000)
    first = 2 * precision._FIRST_PIECE
    assert peak_bytes(lambda: split_float32(buffer)) <= 200_000 + first
    assert peak_bytes(lambda: join_float32(buffer)) <= 200_000 + first


def round_half_away(numbers):
    """To bfloat16, by arithmetic: the halves of the spacing of bfloat16 numbers go outwards."""
    exact = numbers.double()
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    return (exact.sign() * torch.floor(exact.abs() / spacing + 0.5) * spacing).to(torch.bfloat16)


def train(steps, weights_of, update):
    """Train a small regression whose model has bfloat16 weights and float32 main parameters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 16, generator=generator).bfloat16()
    y = torch.randn(32, 8, generator=generator).bfloat16()
    averages, squares = torch.zeros(128), torch.zeros(128)
    for step in range(1, steps + 1):
        weights = weights_of().detach().requires_grad_()
        (x @ weights.view(16, 8) - y).float().pow(2).mean().backward()
        update(weights.grad.float(), averages, squares, step)


def test_steps_with_a_shared_storage_are_those_with_two_copies_bit_for_bit():
    start = torch.randn(128, generator=torch.Generator().manual_seed(1))
    plain, shared = start.clone(), start.clone()

    def step_of(main, grad, averages, squares, step):
        # A power of two as learning rate: updates that hit ties are not rare.
        options = {"step": step, "lr": 2.0**-7, "weight_decay": 0.0}
        adamw([main], [grad], [averages], [squares], **options, backend="reference")

    history = []

    def update_plain(*given):
        step_of(plain, *given)
        history.append(plain.clone())

    train(20, lambda: round_half_away(plain), update_plain)
    weights = split_float32(shared)[0]

    def update_shared(*given):
        join_float32(shared)
        step_of(shared, *given)
        assert torch.equal(shared, history.pop(0))
        split_float32(shared)

    train(20, lambda: weights, update_shared)
    join_float32(shared)
    assert torch.equal(shared, plain)
    assert not torch.equal(shared, start)
    assert history == []


@pytest.mark.parametrize("function", [split_float32, join_float32])
def test_wrong_buffers_are_named(function, monkeypatch):
    with pytest.raises(TypeError, match=f"{function.__name__}: buffer is torch.bfloat16: must be"):
        function(torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=rf"{function.__name__}: buffer \(2, 2\) .*: must be \(N,"):
        function(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"buffer \(4,\) of strides \(2,\)"):
        function(torch.zeros(8)[::2])
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(ValueError, match="byte order big: must be little"):
        function(torch.zeros(4))
