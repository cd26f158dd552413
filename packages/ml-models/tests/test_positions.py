"""Rotary tables are transformers' own for every way of stretching, and are made once."""

from __future__ import annotations

import pytest
import torch
from attention_layer import architecture
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ml_models.positions import Rotary, frequencies

ORIGINAL = 32
CPU = torch.device("cpu")
FACTOR = {"rope_scaling_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SHORT, LONG = (1.0, 1.5), (3.0, 5.0)
STRETCHED = [
    ({"type": "linear"}, {"factor": 4.0}),
    ({"type": "dynamic"}, {"factor": 4.0}),
    (
        {"type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    ({"type": "yarn"}, {"factor": 4.0}),
    ({"type": "yarn", "truncate": False}, {"factor": 4.0, "truncate": False}),
    ({"type": "yarn", "attention_factor": 0.9}, {"factor": 4.0, "attention_factor": 0.9}),
    (
        {"type": "yarn", "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.5, "mscale_all_dim": 2.0},
        {"factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.5, "mscale_all_dim": 2.0},
    ),
    (
        {"type": "longrope", "short_factors": SHORT, "long_factors": LONG},
        {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG},
    ),
    (
        {
            "type": "longrope",
            "short_factors": SHORT,
            "long_factors": LONG,
            "attention_factor": 1.25,
        },
        {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.25},
    ),
]


def stretched(**options):
    names = {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
    fields = {names.get(key, f"rope_scaling_{key}"): value for key, value in options.items()}
    # Partial: half of a head of 8 channels turns, two pairs.
    return architecture(rotary_percent=0.5, **FACTOR, **fields)


@pytest.mark.parametrize(("ours", "theirs"), STRETCHED)
@pytest.mark.parametrize("length", [7, ORIGINAL, ORIGINAL + 1, 100])
def test_frequencies_are_those_of_transformers(ours, theirs, length):
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=ORIGINAL if ours["type"] == "dynamic" else 64,
        rope_parameters={
            "rope_type": ours["type"],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": ORIGINAL,
            **theirs,
        },
    )
    inverse, scale = ROPE_INIT_FUNCTIONS[ours["type"]](config, CPU, seq_len=length)
    found = frequencies(stretched(**ours), length)
    torch.testing.assert_close(found.inverse, inverse, rtol=2e-7, atol=0)
    assert found.scale == pytest.approx(scale, rel=1e-12)


def angles_of(rotary, layer, length, tokens=None):
    """Read the angles of the last tokens off what a vector (1, 0) per pair becomes."""
    x = torch.zeros(tokens or length, 1, 1, 8)
    x[..., 0] = 1
    turned = rotary.turn(x, layer, length)
    return torch.atan2(turned[:, 0, 0, 4], turned[:, 0, 0, 0])


def test_later_tokens_of_a_sequence_stand_at_later_positions():
    rotary = Rotary(architecture())
    whole = angles_of(rotary, 0, 9)
    torch.testing.assert_close(whole[:4], torch.arange(4.0))
    assert torch.equal(angles_of(rotary, 0, 9, tokens=2), whole[-2:])


@pytest.fixture
def made(monkeypatch):
    """The numbers of positions of the tables that are made, in order."""
    import ml_kernels

    lengths = []
    original = ml_kernels.rotary_angles

    def counting(frequencies, positions, **options):
        lengths.append(len(positions))
        return original(frequencies, positions, **options)

    monkeypatch.setattr(ml_kernels, "rotary_angles", counting)
    return lengths


def test_layers_share_a_table_that_grows_in_few_steps(made):
    arch = architecture(
        num_layers=4, sliding_window=3, window_attn_skip_freq=(2,), rotary_base_local=50.0
    )
    rotary = Rotary(arch)
    for length in range(5, 40):
        for layer in range(4):
            angles_of(rotary, layer, length, tokens=1)
    assert made == [5, 5, 10, 10, 20, 20, 40, 40]


def test_a_table_that_depends_on_the_length_is_made_for_each(made):
    rotary = Rotary(stretched(type="longrope", short_factors=SHORT, long_factors=LONG))

    def second_pair(length):
        x = torch.zeros(length, 1, 1, 8)
        x[..., 1] = 1
        turned = rotary.turn(x, 0, length)[5, 0, 0]
        return float(torch.atan2(turned[3], turned[1])) / 5

    plain = 10000.0**-0.5
    assert second_pair(ORIGINAL) == pytest.approx(plain / SHORT[1], rel=1e-4)
    assert second_pair(ORIGINAL + 1) == pytest.approx(plain / LONG[1], rel=1e-4)
    assert second_pair(ORIGINAL) == pytest.approx(plain / SHORT[1], rel=1e-4)
    assert made == [ORIGINAL, ORIGINAL + 1, ORIGINAL]


def test_longrope_needs_a_factor_for_each_pair():
    arch = stretched(type="longrope", short_factors=(1.0,), long_factors=LONG)
    with pytest.raises(ValueError, match=r"--rope-scaling-short-factors: 1 numbers, must be 2"):
        frequencies(arch, 5)
