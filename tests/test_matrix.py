"""Every family comes back bit for bit, whatever formats and layouts it went through.

What is proved here is the table in packages/ml-convert/README.md (tests/test_readme.py writes it).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conversion_matrix import CONFIGS, Tour, expected, prove

from ml_models import registry


@pytest.mark.parametrize("name", registry.names())
def test_every_direction_and_layout_keeps_every_bit(name: str) -> None:
    assert prove(name).directions == expected(name)


def test_what_a_format_cannot_hold_is_refused() -> None:
    refused = {name for name in registry.names() if prove(name).refused}
    assert {"deepseek_v3", "gemma", "gpt_oss", "qwen3"} <= refused
    assert {"baichuan", "bloom", "chatglm", "gpt2", "llama", "mixtral"}.isdisjoint(refused)


@pytest.fixture
def tour(tmp_path: Path) -> Tour:
    config = json.loads((CONFIGS / "llama.json").read_text())["llama"]
    return Tour(tmp_path, config)


def test_one_wrong_bit_is_noticed(tour: Tour) -> None:
    tour.check(tour.start)
    path = tour.start / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(AssertionError):
        tour.check(tour.start)


def test_a_config_of_another_model_is_noticed(tour: Tour) -> None:
    path = tour.start / "config.json"
    path.write_text(path.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(AssertionError):
        tour.check(tour.start)
