"""A family is added as packages/ml-models/README.md says: one file, and one line that names it."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conversion_matrix import Tour
from harness import VOCABULARY, Case, check_gradients, check_logits, check_round_trip, every_layout
from transformers import Starcoder2Config

from ml_models import registry
from ml_models.weights import parameters

README = Path(__file__).parents[1] / "packages" / "ml-models" / "README.md"
CONFIG = {
    "architectures": ["Starcoder2ForCausalLM"],
    "model_type": "starcoder2",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": 16,
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CASES = (
    Case(name="added", config=Starcoder2Config(**SIZES, sliding_window=40)),
    Case(
        name="added, untied, no biases",
        config=Starcoder2Config(**SIZES, use_bias=False, tie_word_embeddings=False),
    ),
)


def install(directory: Path, *, family: str, project: str) -> None:
    """Put a package where pip would: its modules, and the entry points beside them."""
    found = tomllib.loads(project)["project"]
    for value in found["entry-points"][registry.GROUP].values():
        path = directory / f"{value.partition(':')[0].replace('.', '/')}.py"
        path.parent.mkdir(parents=True)
        path.write_text(family)
    name, version = found["name"], found["version"]
    metadata = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in found["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


def readme(language: str, containing: str) -> str:
    """Return the block of the section about adding a family that contains a text."""
    section = README.read_text().partition("## Add a family in one file\n")[2].partition("\n## ")[0]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)
    (found,) = (block for block in blocks if containing in block)
    return str(found)


@contextmanager
def installed(directory: Path, *, family: str, project: str) -> Iterator[Path]:
    """Have a package where Python finds it."""
    install(directory, family=family, project=project)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        registry.installed.cache_clear()
        yield directory
    registry.installed.cache_clear()


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of the README's package."""
    with installed(
        tmp_path_factory.mktemp("site"),
        family=readme("python", "STARCODER2 = Family("),
        project=readme("toml", registry.GROUP),
    ) as directory:
        yield directory


def test_both_directions_of_a_conversion_find_it(added: Path, tmp_path: Path) -> None:
    tour = Tour(tmp_path, CONFIG)  # random bits, in the names that the family gives them
    for words in (
        f"--load-dir {tour.start} --save-dir mcore --save-format mcore "
        "--target-tensor-parallel-size 2 --num-layer-list 1,3 --target-pipeline-parallel-size 2",
        "--load-dir mcore --save-dir back --save-format hf",
    ):
        subprocess.run(
            [sys.executable, "-m", "ml_convert", *words.split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(added)},
            check=True,
        )
    tour.check(tmp_path / "back")


@pytest.mark.usefixtures("added")
def test_its_size_is_the_published_one() -> None:
    family = registry.family("starcoder2")
    (size,) = family.sizes
    table = parameters(family.size(size))
    assert sum(math.prod(parameter.shape) for parameter in table) == size.parameters
    written = family.to_hf(family.size(size), "bfloat16")
    assert registry.family_for(written) is family
    assert registry.family_of(family.size(size)) is family
    assert {key: written[key] for key in size.config} == size.config


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(("case", "layout"), every_layout(CASES))
def test_logits_are_those_of_transformers(
    case: Case, layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_logits(case, layout, tmp_path_factory)


@pytest.mark.usefixtures("added")
def test_gradients_are_those_of_transformers(tmp_path_factory: pytest.TempPathFactory) -> None:
    check_gradients(CASES[0], "single", tmp_path_factory)


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_config_come_back(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_round_trip(case, tmp_path_factory)


PROJECT = """
[project]
name = "{0}-families"
version = "1.0"
[project.entry-points."ml_models.families"]
{0} = "{0}.family:OTHER"
"""


def test_a_family_with_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    family = "from ml_models.families.llama import LLAMA as OTHER"
    with installed(tmp_path, family=family, project=PROJECT.format("again")):
        assert registry.family("llama2").name == "llama"  # nothing else was looked at
        with pytest.raises(ValueError, match=r"again of .*: again.family:OTHER says llama"):
            registry.family("nothing")


def test_what_is_no_family_is_refused(tmp_path: Path) -> None:
    with (
        installed(tmp_path, family="OTHER = {}", project=PROJECT.format("no")),
        pytest.raises(ValueError, match=r"no of .*: no.family:OTHER is no Family"),
    ):
        registry.family_for({"model_type": "nothing"})
