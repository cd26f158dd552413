"""LoRA adapters of the PEFT library.

    adapter_config.json          rank, alpha, what else was trained
    adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...

In Megatron query, key and value are one linear layer, with one A. Where PEFT's modules have
different A, or some have none, the adapter of that layer is stacked: A one above the other, and B
with zeros where a row has nothing to do with an A. That is the same adapter, of a higher rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ml_convert import huggingface, ptfile, safetensors_file
from ml_convert.errors import ConversionError
from ml_convert.files import Files
from ml_convert.layout import Layout, Place, Rectangle, Stored
from ml_convert.lora import Adapter, Settings, check_fits
from ml_convert.lora_table import names, parameters_of
from ml_convert.pickles import TensorPickle
from ml_convert.plan import Checkpoint
from ml_convert.tensor import ZEROS, Dtype, Extent
from ml_models.architecture import Architecture
from ml_models.families.family import Family, Piece
from ml_models.weights import Parameter, parameters

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_FILES = (WEIGHTS, "adapter_model.bin")
_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])(?:\.default)?\.weight"
)
_PLAIN = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
}
"""What keys have to be, if they are there and not null: these are what is added to plain LoRA."""
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq")


def is_peft(path: Path) -> bool:
    """Tell whether a directory looks like an adapter of PEFT."""
    return any((path / name).is_file() for name in (CONFIG, *_FILES))


class _Group(NamedTuple):
    """The modules of Hugging Face that are one weight of Megatron."""

    weight: Parameter
    pieces: tuple[Piece, ...]
    modules: tuple[str, ...]
    """In the order of the weight's rows."""


def open_adapter(directory: Path, family: Family, arch: Architecture, given: Settings) -> Adapter:
    """Open an adapter.

    Args:
        directory: Holds adapter_config.json and adapter_model.safetensors, or .bin.
        family: The family of the model it belongs to.
        arch: The model.
        given: What the command line says.

    Raises:
        ConversionError: It is incomplete, does not fit the model, or is no plain LoRA.
    """
    config = huggingface.read_json(directory / CONFIG)
    settings = given.agreeing_with(_settings(config, directory), directory / CONFIG)
    path, found = _read(directory)
    groups = [g for g in _groups(family, arch) if any(name in found for name in g.modules)]
    _check_known(groups, found, path)
    building = _Building(path, found, groups)
    settings.check_rank(building.module_rank, path)
    _check_modules(given, found, path)
    scale = settings.scale(building.module_rank, directory / CONFIG)
    if config.get("use_rslora"):
        scale *= building.module_rank**0.5
    weights = tuple(group.weight for group in groups)
    return Adapter(
        path=directory,
        rank=building.rank,
        scale=scale,
        weights=weights,
        table=parameters_of(weights, building.rank),
        checkpoint=building.checkpoint(),
    )


def _settings(config: Mapping[str, Any], directory: Path) -> Settings:
    """Read adapter_config.json, refusing what is more than LoRA."""
    path = directory / CONFIG
    if config.get("peft_type", "LORA") != "LORA":
        raise ConversionError(f"{path}: peft_type is {config['peft_type']!r}; LORA is supported")
    for key, plain in _PLAIN.items():
        value = config.get(key)
        if value is not None and value not in plain:
            raise ConversionError(f"{path}: {key} is {value!r}, which is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_WEIGHTS):
        raise ConversionError(
            f"{path}: init_lora_weights is {start!r}, which changes the base weights, too; save "
            "the adapter with PEFT's path_initial_model_for_weight_conversion first"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    for key, value in (("r", rank), ("lora_alpha", alpha)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConversionError(f"{path}: {key} is {value!r}, not a number above 0")
    return Settings(rank=int(rank), alpha=alpha)  # type: ignore[arg-type]


def _read(directory: Path) -> tuple[Path, dict[str, dict[str, Extent]]]:
    """Find A and B of each module of Hugging Face."""
    path = next((directory / name for name in _FILES if (directory / name).is_file()), None)
    if path is None:
        raise ConversionError(f"{directory}: holds none of {', '.join(_FILES)}")
    found: dict[str, dict[str, Extent]] = {}
    for name, extent in _tensors(path).items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(extent.shape) != 2:
            raise ConversionError(
                f"{path}: {name} of shape {list(extent.shape)} is not supported; an adapter has "
                "lora_A and lora_B of linear layers, and nothing else"
            )
        found.setdefault(match["module"], {})[match["which"]] = extent
    for module, pair in found.items():
        if len(pair) < 2:
            raise ConversionError(f"{path}: {module} has no lora_{'B' if 'A' in pair else 'A'}")
    if not found:
        raise ConversionError(f"{path}: holds no LoRA adapter (lora_A, lora_B)")
    return path, found


def _tensors(path: Path) -> Mapping[str, Extent]:
    if path.suffix == ".safetensors":
        return safetensors_file.read(path)
    saved = ptfile.read(path)
    if not isinstance(saved.value, dict):
        raise ConversionError(f"{path}: holds no state dict")
    values = ((name, value) for name, value in saved.value.items())
    return {name: saved.extent(v) for name, v in values if isinstance(v, TensorPickle)}


def _groups(family: Family, arch: Architecture) -> Iterator[_Group]:
    """List the weights that adapters can belong to, and the modules of Hugging Face they are."""
    table = {parameter.name: parameter for parameter in parameters(arch)}
    pieces: dict[str, list[Piece]] = {}
    holds: dict[str, set[str]] = {}
    for piece in family.pieces(arch):
        holds.setdefault(piece.hf_name, set()).add(piece.name)
        pieces.setdefault(piece.name, []).append(piece)
    for name, found in pieces.items():
        hf_names = dict.fromkeys(piece.hf_name for piece in found)
        is_matrix = len(table[name].shape) == 2 and not name.startswith("embedding.")
        is_alone = all(holds[hf_name] == {name} for hf_name in hf_names)
        if is_matrix and is_alone and all(hf_name.endswith(".weight") for hf_name in hf_names):
            modules = tuple(hf_name.removesuffix(".weight") for hf_name in hf_names)
            yield _Group(table[name], tuple(found), modules)


def _check_known(groups: Sequence[_Group], found: Mapping[str, object], path: Path) -> None:
    known = {module for group in groups for module in group.modules}
    unknown = sorted(found.keys() - known)
    if unknown:
        raise ConversionError(
            f"{path}: {unknown[0]} is no linear layer of this model that can have an adapter"
        )


def _check_modules(given: Settings, found: Mapping[str, object], path: Path) -> None:
    """Check --lora-target-modules, which may be names of Hugging Face here."""
    if given.modules is not None:
        said = {name.rpartition(".")[2] for name in given.modules}
        there = {module.rpartition(".")[2] for module in found}
        if said != there:
            raise ConversionError(
                f"{path}: is an adapter of {', '.join(sorted(there))}, but "
                f"--lora-target-modules are {', '.join(sorted(said))}"
            )


class _Building:
    """The adapter as Megatron would have it, over the tensors that are there."""

    def __init__(
        self, path: Path, found: Mapping[str, Mapping[str, Extent]], groups: Sequence[_Group]
    ) -> None:
        self._path, self._found, self._groups = path, found, groups
        for group in groups:
            self._check(group)
        ranks = {pair["A"].shape[0] for pair in found.values()}
        if len(ranks) > 1:
            listed = ", ".join(map(str, sorted(ranks)))
            raise ConversionError(f"{path}: its modules have different ranks ({listed})")
        (self.module_rank,) = ranks
        """Rank of each module's A."""
        with Files() as files:
            self._shared = {g.weight.name: self._share_a(g, files) for g in groups}
        blocks = (1 if self._shared[g.weight.name] else len(self._present(g)) for g in groups)
        self.rank = self.module_rank * max(blocks)
        """Rank of the whole: as high as that of the weight with the most different A."""
        self._tensors: list[Stored] = []
        self._extents: list[Extent] = []
        self._rectangles: dict[str, list[Rectangle]] = {}

    def checkpoint(self) -> Checkpoint:
        """Describe where the parts of all A and B are."""
        for group in self._groups:
            self._add_group(group)
        rectangles = {name: tuple(found) for name, found in self._rectangles.items()}
        layout = Layout(tensors=tuple(self._tensors), rectangles=rectangles)
        return Checkpoint(layout=layout, extents=tuple(self._extents))

    def _present(self, group: _Group) -> tuple[str, ...]:
        return tuple(module for module in group.modules if module in self._found)

    def _check(self, group: _Group) -> None:
        """Check the shapes of a weight's adapters."""
        rows: dict[str, int] = {}
        for piece in group.pieces:
            module = piece.hf_name.removesuffix(".weight")
            rows[module] = rows.get(module, 0) + piece.part.rows
        for module in self._present(group):
            pair = self._found[module]
            part = Parameter(
                name=module,
                shape=(rows[module], *group.weight.shape[1:]),
                split=None,
                init="normal",
            )
            check_fits(part, {n: pair[w].shape for n, w in _named(module)}, self._path)

    def _share_a(self, group: _Group, files: Files) -> bool:
        """Tell whether all modules of a weight are there, and have the same A."""
        present = self._present(group)
        if len(present) < len(group.modules):
            return False
        first = _content(self._found[present[0]]["A"], files)
        others = (_content(self._found[module]["A"], files) for module in present[1:])
        return all(np.array_equal(first, other) for other in others)

    def _add_group(self, group: _Group) -> None:
        (a, b), present = names(group.weight.name), self._present(group)
        shared, rank, columns = self._shared[group.weight.name], self.module_rank, 0
        dtype = self._found[present[0]]["A"].dtype
        columns = group.weight.shape[1]
        first = len(self._tensors)
        blocks = {}
        for number, module in enumerate(present):
            blocks[module] = 0 if shared else number * rank
            copy_of = first if shared and number else None
            index = self._add(f"{module}.lora_A", self._found[module]["A"], a, copy_of)
            part = Rectangle(index, 0, blocks[module], 0, rank, columns)
            self._rectangles.setdefault(a, []).append(part)
        used = rank if shared else rank * len(present)
        self._add_zeros(a, Rectangle(0, 0, used, 0, self.rank - used, columns), dtype)
        dtype = self._found[present[0]]["B"].dtype
        tensors = {m: self._add(f"{m}.lora_B", self._found[m]["B"], b, None) for m in present}
        for piece in group.pieces:
            self._add_rows(b, piece, tensors, blocks, dtype)

    def _add_rows(
        self,
        b: str,
        piece: Piece,
        tensors: Mapping[str, int],
        blocks: Mapping[str, int],
        dtype: Dtype,
    ) -> None:
        """Add some rows of B, with zeros beside the module's own block."""
        module = piece.hf_name.removesuffix(".weight")
        whole = Rectangle(0, 0, piece.row, 0, piece.part.rows, self.rank)
        if module not in tensors:
            self._add_zeros(b, whole, dtype)
            return
        index, start = tensors[module], blocks[module]
        end = start + self.module_rank
        part = _rows(index, piece, self.module_rank, self._tensors[index].shape[0])
        self._rectangles.setdefault(b, []).append(part._replace(parameter_column=start))
        self._add_zeros(b, whole._replace(columns=start), dtype)
        self._add_zeros(b, whole._replace(parameter_column=end, columns=self.rank - end), dtype)

    def _add(self, name: str, extent: Extent, parameter: str, copy_of: int | None) -> int:
        file = extent.path.name
        self._tensors.append(Stored(file, name, extent.shape, parameter, 0, copy_of))
        self._extents.append(extent)
        return len(self._tensors) - 1

    def _add_zeros(self, parameter: str, part: Rectangle, dtype: Dtype) -> None:
        """Say that a part of a parameter is zeros, if there is such a part."""
        if part.rows and part.columns:
            extent = Extent(ZEROS, 0, dtype, (part.rows, part.columns))
            index = self._add("zeros", extent, parameter, None)
            self._rectangles.setdefault(parameter, []).append(part._replace(tensor=index))


def _named(module: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{module}.lora_{which}", which) for which in "AB")


def _content(extent: Extent, files: Files) -> np.ndarray:
    data = np.empty(extent.nbytes, np.uint8)
    files.read(extent.path, extent.offset, data)
    return data


def _rows(index: int, piece: Piece, columns: int, rows: int) -> Rectangle:
    """Tell which rows of a module's tensor are rows of the weight's."""
    part = piece.part
    if part.step == 1:
        return Rectangle(index, part.first, piece.row, 0, part.rows, columns)
    start, step = divmod(part.first, part.step)
    place = Place((rows // part.step, part.step, columns), (start, step, 0), 0, 2)
    return Rectangle(index, 0, piece.row, 0, part.rows, columns, place)


# Writing


def layout(family: Family, arch: Architecture, weights: Sequence[str], rank: int) -> Layout:
    """Describe how PEFT stores an adapter of these weights.

    Raises:
        ConversionError: Some weight is no linear layer of its own in Hugging Face's model.
    """
    groups = {group.weight.name: group for group in _groups(family, arch)}
    odd = [name for name in weights if name not in groups]
    if odd:
        raise ConversionError(
            f"{odd[0]}: is no linear layer of its own in the Hugging Face model of family "
            f"{family.name}, so PEFT has no adapter of it"
        )
    tensors: list[Stored] = []
    rectangles: dict[str, list[Rectangle]] = {}
    for weight in weights:
        group, (a, b) = groups[weight], names(weight)
        columns, first = group.weight.shape[1], len(tensors)
        rows = dict.fromkeys(group.modules, 0)
        for piece in group.pieces:
            rows[piece.hf_name.removesuffix(".weight")] += piece.part.rows
        index_of = {}
        for number, module in enumerate(group.modules):
            shape = (rank, columns)
            copy_of = first if number else None
            tensors.append(Stored(WEIGHTS, _written(module, "A"), shape, a, 0, copy_of))
            part = Rectangle(len(tensors) - 1, 0, 0, 0, rank, columns)
            rectangles.setdefault(a, []).append(part)
        for module in group.modules:
            index_of[module] = len(tensors)
            shape = (rows[module], rank)
            tensors.append(Stored(WEIGHTS, _written(module, "B"), shape, b))
        for piece in group.pieces:
            module = piece.hf_name.removesuffix(".weight")
            part = _rows(index_of[module], piece, rank, rows[module])
            rectangles.setdefault(b, []).append(part)
    return Layout(
        tensors=tuple(tensors),
        rectangles={name: tuple(found) for name, found in rectangles.items()},
    )


def _written(module: str, which: str) -> str:
    return f"{_PREFIX}{module}.lora_{which}.weight"


class Config(NamedTuple):
    """adapter_config.json, to be written."""

    content: Mapping[str, object]

    def write(self, root: Path) -> None:
        """Write it."""
        (root / CONFIG).write_text(json.dumps(self.content, indent=2, sort_keys=True) + "\n")


def config(family: Family, arch: Architecture, adapter: Adapter, *, base: str) -> Config:
    """Describe an adapter for PEFT.

    Args:
        family: The family of its model.
        arch: The model.
        adapter: The adapter.
        base: Name or directory of the model.
    """
    weights = {weight.name for weight in adapter.weights}
    groups = list(_groups(family, arch))
    adapted = [m for group in groups if group.weight.name in weights for m in group.modules]
    others = [m for group in groups if group.weight.name not in weights for m in group.modules]
    short = sorted({module.rpartition(".")[2] for module in adapted})
    ambiguous = any(module.rpartition(".")[2] in short for module in others)
    transposed = any(
        rule.transposed for group in groups if group.weight.name in weights
        for rule in (family.rule(group.weight),)
    )  # fmt: skip
    return Config(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "lora_dropout": 0.0,
            "target_modules": adapted if ambiguous else short,
            "bias": "none",
            "fan_in_fan_out": transposed,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_dora": False,
            "use_rslora": False,
        }
    )
