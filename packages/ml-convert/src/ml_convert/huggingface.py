"""Hugging Face model directories: config.json, one or more weight files, and a tokenizer.

    config.json
    model.safetensors                         or several files and an index of what is in which:
    model-00001-of-00003.safetensors, ...     model.safetensors.index.json
    tokenizer.json, ...                       copied as they are

Weights in `pytorch_model.bin` files are read, too. No code of a model is ever executed.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ml_convert import ptfile, safetensors_file
from ml_convert.binding import bind
from ml_convert.errors import ConversionError
from ml_convert.files import is_file_name
from ml_convert.layout import Layout, Place, Rectangle, Rectangles, Stored, stored_tensors
from ml_convert.pickles import TensorPickle
from ml_convert.source import Source
from ml_convert.tensor import Extent
from ml_models import registry
from ml_models.architecture import Architecture
from ml_models.families.family import Family, HfTensor, Piece
from ml_models.families.rules import Same
from ml_models.weights import EMBEDDING, OUTPUT_LAYER
from ml_parallel.manifest import MANIFEST, CheckpointError, read_manifest, sha256

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MOST_LAYERS = 100_000
_WEIGHTS = (INDEX, SINGLE, "pytorch_model.bin.index.json", "pytorch_model.bin")


def layout(family: Family, arch: Architecture, files: Mapping[str, str]) -> Layout:
    """Describe how a Hugging Face model stores its weights.

    Args:
        family: Its family.
        arch: Its description.
        files: File of each tensor by name, which may lack the family's optional prefix. If
            embeddings are tied and the output layer is there all the same, it counts as a copy.
    """
    tensors = family.tensors(arch)
    index = {name: number for number, name in enumerate(tensors)}
    rectangles, tables = Rectangles(), []
    holds: dict[str, str] = {}
    for piece in family.pieces(arch):
        rectangle = _rectangle(index[piece.hf_name], piece, tensors[piece.hf_name])
        rectangles.add(piece.name, rectangle)
        holds.setdefault(piece.hf_name, piece.name)
        if piece.name == EMBEDDING:
            tables.append(rectangle)
    found = stored_tensors()
    for full_name, hf in tensors.items():
        name = _stored_name(family, full_name, files)
        found.append(Stored(files.get(name, ""), name, hf.shape, holds[full_name]))
    copy = output_layer(family)
    if copy in files and not arch.untie_embeddings_and_output_weights:
        (original,) = tables
        stored = found[original.tensor]
        found.append(stored._replace(file=files[copy], name=copy, copy_of=original.tensor))
        rectangles.add(EMBEDDING, original._replace(tensor=len(found) - 1))
    return Layout(tensors=found, rectangles=rectangles)


def _stored_name(family: Family, name: str, files: Mapping[str, str]) -> str:
    """Give the name of a tensor in these files: some leave out the first part of all names."""
    short = name.removeprefix(family.optional_prefix)
    return short if name not in files and short in files else name


def _rectangle(tensor: int, piece: Piece, hf: HfTensor) -> Rectangle:
    """Turn a piece of a family into a rectangle; see `HfTensor.view` for the axes of its place."""
    part, (entries, *axes) = piece.part, hf.view
    columns = axes[0] if hf.transposed else axes[-1]
    if entries == part.step == 1 and not hf.transposed:
        return Rectangle(tensor, part.first, piece.row, 0, part.rows, columns)
    row, step = divmod(part.first, part.step)
    start = (part.entry or 0, 0, row, step) if hf.transposed else (part.entry or 0, row, step, 0)
    row_axis, column_axis = (2, 1) if hf.transposed else (1, 3)
    place = Place(hf.view, start, row_axis, column_axis)
    return Rectangle(tensor, 0, piece.row, 0, part.rows, columns, place)


def output_layer(family: Family) -> str:
    """Return the name of the output layer, whether or not the model has one of its own."""
    (rule,) = (rule for rule in family.rules if f"{rule.module}.weight" == OUTPUT_LAYER)
    assert isinstance(rule, Same)
    return f"{rule.hf_module}.weight"


# Reading


def is_hugging_face(path: Path) -> bool:
    """Tell whether a directory looks like a Hugging Face model."""
    return any((path / name).exists() for name in (CONFIG, *_WEIGHTS))


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ConversionError: It is missing or no JSON object.
    """
    return read_json(directory / CONFIG)


def family(name: str) -> Family:
    """Find a family by the name that was given on the command line.

    Raises:
        ConversionError: It is unknown.
    """
    try:
        return registry.family(name)
    except ValueError as error:
        raise ConversionError(f"--model-type-hf {name}: {error}") from None


def describe(
    directory: Path, config: Mapping[str, object], model_type: str | None
) -> tuple[Family, Architecture]:
    """Find the family of a config.json, unless it is given, and translate it.

    Raises:
        ConversionError: The family is unknown, or cannot represent the model.
    """
    for name in ("num_hidden_layers", "num_layers", "n_layer"):  # lists of this length are made
        value = config.get(name)
        if isinstance(value, int) and value > _MOST_LAYERS:
            raise ConversionError(f"{directory / CONFIG}: {name} {value} does not fit any model")
    try:
        found = family(model_type) if model_type else registry.family_for(config)
        return found, found.from_hf(config)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"{directory}: {error}") from None


def open_model(directory: Path, *, model_type: str | None, hashes: bool = False) -> Source:
    """Open a model.

    Args:
        directory: Holds config.json.
        model_type: Its family; None to look at config.json.
        hashes: Check the weights against the manifest of ml-convert, if there is one.

    Raises:
        ConversionError: It is damaged, incomplete, or of a kind that is not supported.
    """
    config = read_config(directory)
    known, arch = describe(directory, config, model_type)
    found = _read_weights(directory)
    for tensors in found.values():
        for name in [name for name in tensors if known.ignores(name)]:
            del tensors[name]
    files = {name: file for file, tensors in found.items() for name in tensors}
    _check_sizes(directory, arch, [e for tensors in found.values() for e in tensors.values()])
    if hashes:
        _check_hashes(directory, set(files.values()))
    if arch.untie_embeddings_and_output_weights and output_layer(known) not in files:
        raise ConversionError(
            f"{directory}: has no {output_layer(known)}, though its {CONFIG} does not say "
            "tie_word_embeddings: true"
        )
    return Source(
        path=directory,
        arch=arch,
        family=known,
        checkpoint=bind(layout(known, arch, files), found, directory),
        config=config,
        is_hugging_face=True,
    )


def _check_sizes(directory: Path, arch: Architecture, extents: Collection[Extent]) -> None:
    """Check config.json for sizes that ask for more parameters than there can be.

    The list of all parameters would be as long.
    """
    elements = sum(math.prod(extent.shape) for extent in extents)
    for name, size, most in (
        ("vocabulary", arch.vocab_size, elements),
        ("number of layers", arch.num_layers, len(extents)),
        ("number of experts", arch.num_layers * (arch.num_experts or 1), elements),
    ):
        if not 0 < size <= most:
            raise ConversionError(
                f"{directory / CONFIG}: its {name} does not fit {len(extents)} tensors with "
                f"{elements:,} elements"
            )


def _check_hashes(directory: Path, files: Collection[str]) -> None:
    """Check weights against the manifest that ml-convert wrote beside them, if it did."""
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        raise ConversionError(f"{error}; if it was changed on purpose, remove it") from None
    for entry in manifest.files if manifest is not None else ():
        if entry.path.name in files and sha256(entry.path) != entry.sha256:
            raise ConversionError(
                f"{entry.path} is damaged: its sha256 is not that in {MANIFEST}; if it was "
                f"changed on purpose, remove {MANIFEST}"
            )


def _read_weights(directory: Path) -> dict[str, dict[str, Extent]]:
    """Find all tensors by file and name."""
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return (
                _read_indexed(directory, name)
                if name.endswith(".json")
                else {name: _read_file(directory / name)}
            )
    raise ConversionError(f"{directory}: holds none of {', '.join(_WEIGHTS)}")


def _read_indexed(directory: Path, index: str) -> dict[str, dict[str, Extent]]:
    """Read the files of an index, and check that it and they name the same tensors."""
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(f"{directory / index}: has no weight_map")
    names: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not is_file_name(file):
            shown = reprlib.repr(file)
            raise ConversionError(f"{directory / index}: {shown} is no name of a file beside it")
        names.setdefault(file, set()).add(name)
    found = {}
    for file, expected in names.items():
        if not (directory / file).is_file():
            raise ConversionError(f"{directory / file}: missing, though {index} lists it")
        found[file] = _read_file(directory / file)
        odd = sorted(expected ^ found[file].keys())
        if odd:
            where = "is not in it" if odd[0] in expected else f"is not listed in {index}"
            raise ConversionError(f"{directory / file}: {odd[0]} {where}")
    return found


def _read_file(path: Path) -> dict[str, Extent]:
    if path.suffix == ".safetensors":
        return safetensors_file.read(path)
    saved = ptfile.read(path)
    if not isinstance(saved.value, dict):
        raise ConversionError(f"{path}: holds no state dict")
    return {
        name: saved.extent(value)
        for name, value in saved.value.items()
        if isinstance(value, TensorPickle)
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConversionError: The file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConversionError(f"{path}: missing") from None
    except IsADirectoryError:
        raise ConversionError(f"{path}: is a directory, not a file") from None
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds no JSON object")
    return content
