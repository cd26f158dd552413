"""Every registered family: its config.json both ways, where its weights go, its published sizes.

configs/<family>.json holds config.json files as they were published, but tiny; together they use
every switch of the family.
"""

import json
import math
from pathlib import Path

import pytest
from piece_copies import check_both_directions

from ml_models import registry
from ml_models.weights import parameters

FOLDER = Path(__file__).parent / "configs"
CONFIGS = {
    f"{path.stem}: {name}": (path.stem, config)
    for path in sorted(FOLDER.glob("*.json"))
    for name, config in json.loads(path.read_text()).items()
}
SIZES = {
    f"{name}: {size.name}": (registry.family(name), size)
    for name in registry.names()
    for size in registry.family(name).sizes
}
# What is written anew, whatever was read.
NEW = {"dtype", "torch_dtype", "use_cache", "architectures"}


@pytest.fixture(params=CONFIGS)
def published(request):
    """A family and a config.json of it."""
    name, config = CONFIGS[request.param]
    return registry.family(name), config


def assert_agree(given, written):
    """Check that what both say is the same; `rope_scaling` has more than one spelling."""
    common = given.keys() & written.keys() - NEW
    differ = {key for key in common if written[key] != given[key]}
    if "rope_scaling" in differ and given["rope_scaling"]:
        assert_agree(given["rope_scaling"], written["rope_scaling"])
        differ.discard("rope_scaling")
    assert {key: written[key] for key in differ} == {key: given[key] for key in differ}


def test_every_family_has_a_config_and_sizes():
    assert set(registry.names()) == {name for name, _ in CONFIGS.values()}
    assert set(registry.names()) == {family.name for family, _ in SIZES.values()}


def test_names_and_model_types_belong_to_one_family():
    families = [registry.family(name) for name in registry.names()]
    for kind in ("model_types", "architectures", "aliases"):
        found = [item for family in families for item in getattr(family, kind)]
        assert len(found) == len(set(found)), kind
    assert len(SIZES) == len({size.name for _, size in SIZES.values()})


def test_a_config_is_recognised(published):
    family, config = published
    assert registry.family_for(config) is family
    assert registry.family_for({"architectures": config["architectures"]}) is family


def test_a_config_is_written_as_it_was_read(published):
    family, config = published
    arch = family.from_hf(config)
    written = family.to_hf(arch, "bfloat16")
    assert family.from_hf(written) == arch
    assert registry.family_for(written) is family
    assert_agree(config, written)
    assert written["architectures"][0] in family.architectures


def test_weights_fill_both_sides_completely_and_reverse_each_other(published):
    family, config = published
    check_both_directions(family, family.from_hf(config))


@pytest.mark.parametrize("name", SIZES)
def test_a_published_size_has_the_published_number_of_parameters(name):
    family, size = SIZES[name]
    table = parameters(family.size(size))
    assert sum(math.prod(parameter.shape) for parameter in table) == size.parameters


@pytest.mark.parametrize("name", SIZES)
def test_a_published_size_can_be_written_as_a_config(name):
    family, size = SIZES[name]
    written = family.to_hf(family.size(size), "bfloat16")
    assert_agree(size.config, written)
