"""The frequency tables against those of transformers, and the rules of their scales."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import ml_kernels
from ml_kernels.frequencies import yarn_mscale

TABLES = {
    "linear": ml_kernels.linear_frequencies,
    "dynamic": ml_kernels.dynamic_ntk_frequencies,
    "llama3": ml_kernels.llama3_frequencies,
    "yarn": ml_kernels.yarn_frequencies,
}


def hugging_face(kind, dim, base, seq_length=None, positions=4096, **parameters):
    """Return the table that transformers computes for a model of these sizes."""
    config = LlamaConfig(
        head_dim=dim,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": kind, "rope_theta": base, **parameters},
    )
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, seq_len=seq_length)


def assert_equal(found, expected):
    assert found.inverse.dtype == torch.float32
    assert torch.equal(found.inverse, expected[0])
    assert found.scale == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize(("dim", "base"), [(128, 10000.0), (64, 500000.0), (2, 1e6), (80, 1e4)])
def test_the_plain_table_is_that_of_transformers(dim, base):
    assert_equal(ml_kernels.rotary_frequencies(dim, base), hugging_face("default", dim, base))


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("linear", {"factor": 4.0}),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            "llama3",
            {
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2048,
            },
        ),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 2048}),
        ("yarn", {"factor": 1.0, "original_max_position_embeddings": 2048}),
        (
            "yarn",  # DeepSeek-V2
            {
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 0.707,
                "mscale_all_dim": 0.5,
            },
        ),
        (
            "yarn",  # gpt-oss
            {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        ),
        (
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.8},
        ),
    ],
)
@pytest.mark.parametrize(("dim", "base"), [(128, 10000.0), (64, 150000.0), (6, 1000.0)])
def test_a_scaled_table_is_that_of_transformers(kind, parameters, dim, base):
    found = TABLES[kind](dim, base, **parameters)
    assert_equal(found, hugging_face(kind, dim, base, **parameters))


@pytest.mark.parametrize("seq_length", [100, 4096, 4097, 20000])
def test_the_dynamic_table_is_that_of_transformers(seq_length):
    found = ml_kernels.dynamic_ntk_frequencies(
        64, 10000.0, factor=2.0, seq_length=seq_length, original_max_position_embeddings=4096
    )
    assert_equal(found, hugging_face("dynamic", 64, 10000.0, seq_length, factor=2.0))
    plain = ml_kernels.rotary_frequencies(64).inverse
    assert torch.equal(found.inverse, plain) == (seq_length <= 4096)


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.integers(1, 96),
    base=st.floats(100.0, 1e7),
    factor=st.floats(1.0, 64.0),
    original=st.integers(64, 65536),
)
def test_every_table_lies_between_the_plain_one_and_the_interpolated_one(
    pairs, base, factor, original
):
    plain = ml_kernels.rotary_frequencies(2 * pairs, base).inverse
    tables = [
        ml_kernels.linear_frequencies(2 * pairs, base, factor=factor),
        ml_kernels.yarn_frequencies(
            2 * pairs, base, factor=factor, original_max_position_embeddings=original
        ),
        ml_kernels.llama3_frequencies(
            2 * pairs, base, factor=factor, original_max_position_embeddings=original
        ),
    ]
    for inverse, _ in tables:
        assert inverse.shape == (pairs,)
        assert (inverse <= plain * (1 + 1e-6)).all()
        assert (inverse >= plain / factor * (1 - 1e-6)).all()


def test_llama3_slows_down_slow_pairs_only():
    plain = ml_kernels.rotary_frequencies(128, 500000.0).inverse
    found = ml_kernels.llama3_frequencies(128).inverse
    turns = 8192 * plain / (2 * math.pi)
    assert torch.equal(found[turns > 4], plain[turns > 4])
    torch.testing.assert_close(found[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    share = (turns[between] - 1) / 3
    torch.testing.assert_close(found[between] / plain[between], (1 - share) / 8 + share)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "scale"),
    [
        (1.0, 0.0, 0.1 * math.log(40) + 1),
        (0.707, 0.0, 0.1 * 0.707 * math.log(40) + 1),
        (0.707, 0.707, 1.0),
        (0.0, 0.0, 1.0),
        (1.0, 0.5, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)),
    ],
)
def test_the_scale_of_yarn_is_the_ratio_of_two_mscales(mscale, mscale_all_dim, scale):
    found = ml_kernels.yarn_frequencies(
        64,
        factor=40.0,
        original_max_position_embeddings=4096,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    assert found.scale == pytest.approx(scale)


def test_nothing_is_strengthened_where_nothing_is_stretched():
    assert yarn_mscale(1.0, 0.7) == 1.0
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1.2608037)  # DeepSeek-V2


@pytest.mark.parametrize("interleaved", [False, True])
def test_both_channels_of_a_pair_get_the_angle_of_the_position(interleaved):
    frequencies = torch.tensor([1.0, 0.25])
    angles = ml_kernels.rotary_angles(frequencies, torch.tensor([0, 3, 8]), interleaved=interleaved)
    assert angles.shape == (3, 1, 1, 4)
    last = [8.0, 8.0, 2.0, 2.0] if interleaved else [8.0, 2.0, 8.0, 2.0]
    assert angles[0].tolist() == [[[0.0] * 4]]
    assert angles[2].tolist() == [[last]]


def test_angles_are_those_of_the_llama_of_transformers():
    config = LlamaConfig(head_dim=64, hidden_size=128, num_attention_heads=2)
    positions = torch.arange(5000)
    cos, sin = LlamaRotaryEmbedding(config)(torch.ones(1), positions[None])
    angles = ml_kernels.rotary_angles(ml_kernels.rotary_frequencies(64).inverse, positions)
    assert torch.equal(angles.cos()[:, 0, 0], cos[0])
    assert torch.equal(angles.sin()[:, 0, 0], sin[0])


def test_no_position_gives_no_angle():
    angles = ml_kernels.rotary_angles(torch.ones(4), torch.arange(0))
    assert angles.shape == (0, 1, 1, 8)


ORIGINAL = {"original_max_position_embeddings": 4096}
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (ml_kernels.rotary_frequencies, {"dim": 63}, "dim 63: must be even and positive"),
        (ml_kernels.rotary_frequencies, {"dim": 0}, "dim 0: must be even and positive"),
        (ml_kernels.rotary_frequencies, {"dim": 8, "base": 1.0}, "base 1.0: must be above 1"),
        (ml_kernels.linear_frequencies, {"dim": 8, "factor": 0.5}, "factor 0.5: must be at least"),
        (
            ml_kernels.dynamic_ntk_frequencies,
            {"dim": 2, "factor": 2.0, "seq_length": 9, **ORIGINAL},
            "dim 2: must be above 2",
        ),
        (
            ml_kernels.dynamic_ntk_frequencies,
            {"dim": 8, "factor": 2.0, "seq_length": 0, **ORIGINAL},
            "seq_length 0: must be positive",
        ),
        (
            ml_kernels.llama3_frequencies,
            {"dim": 8, "low_freq_factor": 4.0},
            r"high_freq_factor 4.0: must be above low_freq_factor \(4.0\)",
        ),
        (
            ml_kernels.llama3_frequencies,
            {"dim": 8, "low_freq_factor": 0.0},
            "low_freq_factor 0.0: must be positive",
        ),
        (
            ml_kernels.yarn_frequencies,
            {"dim": 8, "factor": 2.0, "original_max_position_embeddings": 0},
            "original_max_position_embeddings 0: must be positive",
        ),
        (
            ml_kernels.yarn_frequencies,
            {"dim": 8, "factor": 2.0, "beta_fast": 1.0, **ORIGINAL},
            r"beta_fast 1.0: must be above beta_slow \(1.0\)",
        ),
        (
            ml_kernels.yarn_frequencies,
            {"dim": 8, "factor": 2.0, "beta_slow": 0.0, **ORIGINAL},
            "beta_slow 0.0: must be positive",
        ),
        (ml_kernels.rotary_frequencies, {"dim": 8, "base": INF}, "base inf: must be finite"),
        (ml_kernels.linear_frequencies, {"dim": 8, "factor": NAN}, "factor nan: must be finite"),
        (
            ml_kernels.llama3_frequencies,
            {"dim": 8, "high_freq_factor": INF},
            "high_freq_factor inf: must be finite",
        ),
        *(
            (ml_kernels.yarn_frequencies, {"dim": 8, "factor": 2.0, **ORIGINAL, **wrong}, message)
            for wrong, message in (
                ({"beta_fast": INF}, "beta_fast inf: must be finite"),
                ({"mscale": NAN}, "mscale nan: must be at least 0, and finite"),
                ({"mscale_all_dim": -20.0}, "mscale_all_dim -20.0: must be at least 0"),
                ({"attention_factor": INF}, "attention_factor inf: must be finite"),
            )
        ),
    ],
)
def test_a_parameter_out_of_its_range_is_refused(function, given, message):
    with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
        function(**given)


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (ml_kernels.rotary_frequencies, {"dim": 8.0}, "dim 8.0"),
        (
            ml_kernels.dynamic_ntk_frequencies,
            {"dim": 8, "factor": 2.0, "seq_length": 9.0, **ORIGINAL},
            "seq_length 9.0",
        ),
        (
            ml_kernels.llama3_frequencies,
            {"dim": 8, "original_max_position_embeddings": 1e4},
            "original_max_position_embeddings 10000.0",
        ),
    ],
)
def test_a_number_of_channels_or_positions_is_an_int(function, given, message):
    with pytest.raises(TypeError, match=f"{function.__name__}: {message}: must be an int"):
        function(**given)


@pytest.mark.parametrize(
    ("frequencies", "positions", "message"),
    [
        (torch.ones(1, 4), torch.arange(3), r"frequencies \(1, 4\): must be a vector"),
        (torch.ones(4), torch.ones(3, 1), r"positions \(3, 1\): must be a vector"),
        (torch.ones(4), torch.arange(3, device="meta"), "frequencies is on cpu: must be on meta"),
    ],
)
def test_angles_need_two_vectors_on_one_device(frequencies, positions, message):
    with pytest.raises(ValueError, match=f"rotary_angles: {message}"):
        ml_kernels.rotary_angles(frequencies, positions)
