"""Which layers have a sliding window, in every spelling of config.json."""

import pytest

from ml_models.architecture import Architecture
from ml_models.families.windows import Windows

FULL, WINDOW = "full_attention", "sliding_attention"
ENTRY = Windows(64, every=3, every_key="sliding_window_pattern")


def windows(layers=6, **config):
    """Read a config.json, and give the window of each layer."""
    fields = ENTRY.read({"num_hidden_layers": layers, **config})
    return arch(layers, **fields).windows


def arch(layers, **fields):
    return Architecture(
        num_layers=layers,
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=64,
        vocab_size=8,
        **fields,
    )


def test_every_third_layer_has_none_unless_the_file_says_otherwise():
    assert windows() == (64, 64, None, 64, 64, None)
    assert windows(sliding_window=8) == (8, 8, None, 8, 8, None)
    assert windows(sliding_window_pattern=2) == (64, None, 64, None, 64, None)
    assert windows(3, layer_types=[FULL, WINDOW, WINDOW]) == (None, 64, 64)
    assert windows(2) == (64, 64)
    assert windows(1, layer_types=[FULL], sliding_window=None) == (None,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sliding_window": None}, "sliding_window has no length"),
        ({"sliding_window": "long"}, "sliding_window must be a whole number"),
        ({"layer_types": [FULL]}, r"each of num_hidden_layers 6, not \['full_attention'\]"),
        ({"layer_types": ["chunked"] * 6}, r"must be sliding_attention or full_attention"),
        ({"layer_types": WINDOW}, "layer_types must be"),
    ],
)
def test_layers_that_contradict_the_model_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        windows(**config)


@pytest.mark.parametrize(
    ("pattern", "types", "every"),
    [
        ((2,), [WINDOW, FULL, WINDOW, FULL], 2),
        ((0, 0, 1, 1), [FULL, FULL, WINDOW, WINDOW], None),
        (None, [WINDOW] * 4, None),
    ],
)
def test_layers_are_listed_and_counted_where_a_number_can_say_it(pattern, types, every):
    written = ENTRY.write(arch(4, sliding_window=8, window_attn_skip_freq=pattern))
    expected = {"sliding_window": 8, "layer_types": types}
    assert written == expected | ({"sliding_window_pattern": every} if every else {})


def test_a_model_without_windows_lists_layers_without():
    assert ENTRY.write(arch(2)) == {"sliding_window": None, "layer_types": [FULL, FULL]}
