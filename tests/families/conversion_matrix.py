"""Every family through ml-convert, in every direction and layout, with the real files.

A family's first model in packages/ml-models/tests/configs makes a tour of all directions for each
layout; its other models, which use its other switches, each pass once through all formats:

    hf -> mcore -> mcore -> legacy -> legacy -> mcore -> torch_dist -> legacy -> torch_dist -> mcore
       -> hf -> legacy -> hf

Where a tour comes by `hf`, every tensor must be bit for bit what it was in the beginning, and
config.json must describe the same model. Nothing is verified on the way, so that an error shows.

That a tour ends where it began does not say that the ranks on the way hold what Megatron expects
(a swap that is done twice cannot be seen). packages/ml-convert/tests/test_directions.py compares
them with tensors cut by hand, and tests/families the logits of the models.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ml_convert import ConversionError, Request, convert
from ml_models import registry
from ml_models.architecture import Architecture
from ml_models.families.family import Family
from ml_models.weights import parameters

CONFIGS = Path(__file__).parents[2] / "packages" / "ml-models" / "tests" / "configs"
MEMORY = Path("/dev/shm")
"""Where nothing waits for a disk: each of thousands of files is synced."""

Flags = Mapping[str, Any]
Edge = tuple[str, str]
"""Formats of the source and of the target."""
Step = tuple[str, str, Flags]
"""Format to write, the name of its layout ("" if it has none), and the flags for it."""

HAS_NO_NAME = re.compile(r"the Megatron-Legacy format has no name for \S+?\.(\w+)(\.weight)?; use")
SHARED_GROUP = "a query group on two ranks"
SHARES_GROUPS = re.compile(r"must divide --num-query-groups \d+ with --save-format legacy")


def layouts(arch: Architecture) -> dict[str, Flags]:
    """List the layouts of a model by letter."""
    two = {"target_pipeline_parallel_size": 2}
    found: dict[str, Flags] = {
        "T": {"target_tensor_parallel_size": 2, **two},
        "V": {"num_layers_per_virtual_pipeline_stage": 1, **two},
        "L": {"num_layer_list": (arch.num_layers - 1, 1), "make_vocab_size_divisible_by": 1, **two},
    }
    if arch.num_experts:
        found["E"] = {"target_expert_parallel_size": 2, "target_tensor_parallel_size": 2}
    return found


def dialects(arch: Architecture) -> dict[str, Flags]:
    """List what else the tensors of Megatron-Core may be called, by abbreviation."""
    engine = {"transformer_impl": "transformer_engine", "target_tensor_parallel_size": 2}
    found: dict[str, Flags] = {"TE": engine}
    if arch.num_experts:
        experts = {"moe_grouped_gemm": True, "target_expert_parallel_size": 2}
        found["TE grouped"] = {**engine, **experts}
        if not arch.add_bias_linear:
            found["grouped"] = experts
    if arch.multi_latent_attention:
        for names in ("mindspeed", "modellink"):
            found[names] = {"mla_names": names, "target_tensor_parallel_size": 2}
    return found


@dataclass
class Proof:
    """What held of a family."""

    directions: dict[Edge, set[str]] = field(default_factory=dict)
    """Layouts of each direction that were proved; of the target, or of the source if the target
    has none."""
    dialects: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Why Megatron-Legacy cannot hold the model, by layout."""
    models: int = 0
    """How many models were converted."""

    def add(self, edges: list[tuple[Edge, str]]) -> None:
        """Note what was proved."""
        for edge, layout in edges:
            self.directions.setdefault(edge, set()).add(layout)


class Tour:
    """One model on its way through formats."""

    def __init__(self, directory: Path, config: Mapping[str, object]) -> None:
        """Write the model as Hugging Face files, of random bit patterns."""
        self.family = registry.family_for(config)
        self.arch = self.family.from_hf(config)
        self._directory = directory
        self._count = itertools.count()
        self._tensors = _random_tensors(self.family, self.arch)
        self.start = directory / "hf"
        self.start.mkdir()
        (self.start / "config.json").write_text(json.dumps(config))
        save_file(self._tensors, self.start / "model.safetensors")

    def convert(self, load_dir: Path, save_format: str, flags: Flags) -> Path:
        """Convert without looking back."""
        save_dir = self._directory / f"{next(self._count)}-{save_format}"
        convert(
            Request(
                load_dir=load_dir,
                save_dir=save_dir,
                save_format=save_format,  # type: ignore[arg-type]
                verify="none",
                workers=1,
                **({} if save_format in ("hf", "torch_dist") else flags),
            )
        )
        return save_dir

    def refusal(self, load_dir: Path, flags: Flags) -> str:
        """Tell why a model cannot be written as Megatron-Legacy; "" if it can."""
        message = ""
        try:
            self.convert(load_dir, "legacy", flags)
        except ConversionError as error:
            message = str(error)
        nameless = HAS_NO_NAME.search(message)
        assert nameless or not message or SHARES_GROUPS.search(message), message
        return nameless[1] if nameless else message and SHARED_GROUP

    def check(self, directory: Path) -> None:
        """Compare a Hugging Face model with the one in the beginning."""
        found: dict[str, np.ndarray] = {}
        for path in sorted(directory.glob("*.safetensors")):
            found |= load_file(path)
        assert found.keys() == self._tensors.keys()
        for name, tensor in self._tensors.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].shape == tensor.shape, name
            assert found[name].tobytes() == tensor.tobytes(), name
        config = json.loads((directory / "config.json").read_text())
        assert registry.family_for(config) is self.family
        assert self.family.from_hf(config) == self.arch

    def run(self, steps: list[Step]) -> list[tuple[Edge, str]]:
        """Go from format to format, each with the name of its layout; return what was proved."""
        here, path = self.start, ("hf", "")
        edges: list[tuple[Edge, str]] = []
        seen: list[str] = []
        for save_format, layout, flags in steps:
            seen.append(f"{save_format} {layout}".rstrip())
            try:
                here = self.convert(here, save_format, flags)
                if save_format == "hf":
                    self.check(here)
            except (AssertionError, ConversionError) as error:
                raise AssertionError(f"hf -> {' -> '.join(seen)}: {error}") from error
            edges.append(((path[0], save_format), layout or path[1]))
            path = (save_format, layout)
        assert path[0] == "hf"
        return edges


def _random_tensors(family: Family, arch: Architecture) -> dict[str, np.ndarray]:
    """Make bit patterns, infinities and NaNs included."""
    numbers = np.random.default_rng(0)
    float32 = {parameter.name for parameter in parameters(arch) if parameter.float32}
    wide = {piece.hf_name for piece in family.pieces(arch) if piece.name in float32}
    found = {}
    for name, tensor in family.tensors(arch).items():
        word, dtype = (np.uint32, np.float32) if name in wide else (np.uint16, np.float16)
        top = np.iinfo(word).max
        found[name] = numbers.integers(0, top, tensor.shape, word, endpoint=True).view(dtype)
    return found


# Families


@functools.cache
def prove(name: str) -> Proof:
    """Send the models of a family around."""
    proof = Proof()
    models = json.loads((CONFIGS / f"{name}.json").read_text()).values()
    for number, config in enumerate(models):
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
            tour = Tour(Path(directory), config)
            if number == 0:
                _prove_all_directions(tour, proof)
            else:
                _prove_all_formats(tour)
        proof.models += 1
    return proof


def _prove_all_directions(tour: Tour, proof: Proof) -> None:
    found = layouts(tour.arch)
    proof.refused = _refusals(tour, found)
    for steps in _tours(found, proof.refused):
        proof.add(tour.run(steps))
    proof.add(tour.run([_DIST, _DIST, _HF, _HF]))
    for name, flags in dialects(tour.arch).items():
        tour.run([("mcore", "", flags), ("mcore", "", {}), ("mcore", "", flags), _HF])
        proof.dialects.append(name)


def _refusals(tour: Tour, found: Mapping[str, Flags]) -> dict[str, str]:
    """Find the layouts that Megatron-Legacy cannot have: it says so whatever is read."""
    reasons = {letter: tour.refusal(tour.start, flags) for letter, flags in found.items()}
    refused = {letter: reason for letter, reason in reasons.items() if reason}
    for save_format in ("mcore", "torch_dist") if refused else ():
        other = tour.convert(tour.start, save_format, {})
        for letter, reason in refused.items():
            assert tour.refusal(other, found[letter]) == reason
    return refused


_HF: Step = ("hf", "", {})
_DIST: Step = ("torch_dist", "", {})


def _tours(found: Mapping[str, Flags], not_legacy: Mapping[str, str]) -> Iterator[list[Step]]:
    """Give a tour for each layout: to another layout of the same format, and back."""
    letters = list(found)
    legacy = [letter for letter in letters if letter not in not_legacy]
    for letter in letters:
        at, then = (letter, found[letter]), letters[(letters.index(letter) + 1) % len(letters)]
        core, to_core = ("mcore", *at), ("mcore", then, found[then])
        if letter in not_legacy:
            yield [core, to_core, _DIST, core, _DIST, core, _HF]
            if legacy:
                yield [("legacy", legacy[0], found[legacy[0]]), core, _HF]
            continue
        then = legacy[(legacy.index(letter) + 1) % len(legacy)]
        old, to_old = ("legacy", *at), ("legacy", then, found[then])
        yield [core, to_core, old, to_old, core, _DIST, old, _DIST, core, _HF, old, _HF]


def _prove_all_formats(tour: Tour) -> None:
    found = layouts(tour.arch)
    last = list(found)[-1]
    steps: list[Step] = [("mcore", "T", found["T"])]
    if not tour.refusal(tour.start, found["V"]):
        steps.append(("legacy", "V", found["V"]))
    tour.run([*steps, _DIST, ("mcore", last, found[last]), _HF])


# The table

FORMATS = ("hf", "legacy", "mcore", "torch_dist")
DIRECTIONS = tuple(itertools.product(FORMATS[:3], FORMATS[:3]))


def expected(name: str) -> dict[Edge, set[str]]:
    """List what has to be proved of a family: all, but for what Megatron-Legacy cannot hold."""
    config = next(iter(json.loads((CONFIGS / f"{name}.json").read_text()).values()))
    letters = set(layouts(registry.family(name).from_hf(config)))
    in_legacy = letters - prove(name).refused.keys()
    held = {"hf": {""}, "torch_dist": {""}, "mcore": letters, "legacy": in_legacy}
    found = {}
    for source, target in itertools.product(FORMATS, FORMATS):
        if in_legacy or "legacy" not in (source, target):
            found[source, target] = held[source] if held[target] == {""} else held[target]
    return found


def table() -> str:
    """Show what was proved, as Markdown."""
    arrows = [f"{source} → {target}" for source, target in DIRECTIONS]
    columns = ["family", "models", *arrows, "→ torch_dist", "torch_dist →"]
    columns += ["other names", "not in legacy"]
    rows = [columns, *(_row(name, prove(name)) for name in registry.names())]
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([lines[0], "|---" * len(columns) + "|\n", *lines[1:]])


def _row(name: str, proof: Proof) -> list[str]:
    held = [_letters(proof, edge) for edge in DIRECTIONS]
    held += [_letters(proof, ("mcore", "torch_dist")), _letters(proof, ("torch_dist", "mcore"))]
    reasons = set(proof.refused.values())
    nameless = sorted(f"`{reason}`" for reason in reasons - {SHARED_GROUP})
    shared = [letter for letter, reason in proof.refused.items() if reason == SHARED_GROUP]
    why = ", ".join(nameless) or (f"{''.join(shared)}: {SHARED_GROUP}" if shared else "")
    return [name, str(proof.models), *held, ", ".join(proof.dialects), why]


def _letters(proof: Proof, edge: Edge) -> str:
    found = proof.directions.get(edge, set())
    return "".join(letter for letter in "TVLE" if letter in found) or ("✓" if found else "-")
