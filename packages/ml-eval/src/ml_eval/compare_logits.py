"""Compare a checkpoint, run by our model, with a Hugging Face model, run by transformers.

    python -m ml_eval.compare_logits < request.json

is what `ml-convert --verify logits` runs; the request on the standard input is that of ml_convert
that opens the checkpoint (`ours`), and the directory of the Hugging Face model (`theirs`). Of both
models the first layers compute some random tokens in float32, on the CPU. Where one of them stores
its weights in a narrower dtype, as `--params-dtype` asks for, their rounding is allowed for.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ml_convert.errors import ConversionError, VerificationError
from ml_convert.huggingface import CONFIG, open_model, read_json
from ml_convert.input import open_source
from ml_convert.request import Request
from ml_convert.source import Source
from ml_models.architecture import Architecture
from ml_models.registry import family_for

LAYERS = 4
TOKENS = 128
TOLERANCE = 1e-4
"""Largest difference that float32 explains, of the largest logit."""
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}
"""Largest relative change of a weight that is rounded to a dtype."""

_PER_LAYER = ("moe_layer_freq", "window_attn_skip_freq", "no_rope_freq")
"""Fields of an architecture that may list the layers; other lists may be as long by chance."""

_PATHS = ("load_dir", "save_dir", "hf_config", "lora_load")


def main() -> int:
    """Compare; returns the exit code, 1 if the models differ."""
    content = json.load(sys.stdin)
    try:
        sys.stdout.write(compare(_request(content["ours"]), Path(content["theirs"])) + "\n")
    except (VerificationError, ConversionError, ValueError, OSError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    return 0


def _request(content: dict[str, Any]) -> Request:
    """Read a request from JSON, which knows neither paths nor tuples."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in content.items()
        if value is not None
    }
    return Request(**values | {name: Path(values[name]) for name in _PATHS if name in values})


def compare(ours: Request, theirs: Path) -> str:
    """Compare two models; returns what was found.

    Raises:
        VerificationError: They do not compute the same.
    """
    source, config = open_source(ours), read_json(theirs / CONFIG)
    layers = min(LAYERS, source.arch.num_layers)
    count = min(TOKENS, source.arch.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(source.arch.vocab_size, size=(1, count))
    expected = _their_logits(theirs, config, layers, tokens)[..., : source.arch.vocab_size]
    found = _our_logits(source, layers, tokens)
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    tolerance, why = _tolerance(source, theirs, layers)
    result = (
        f"logits of {count} tokens after {layers} layers differ by {difference:.2g}, the largest "
        f"is {largest:.2g}, {tolerance:.2g} of it is allowed{why}"
    )
    if not difference <= tolerance * largest:  # NaN is no success
        raise VerificationError(f"{ours.load_dir}: {result}, compared with {theirs}")
    return result


def _tolerance(source: Source, theirs: Path, layers: int) -> tuple[float, str]:
    """Return how much of the largest logit may differ, and why if weights were rounded.

    Every attention, every MLP and the output layer adds at most the rounding of its weights; as
    roundings of many weights cancel out, most models stay below a fifth of that.
    """
    ours, other = source.checkpoint.dtypes, open_model(theirs, model_type=None).checkpoint.dtypes
    names = {
        dtype.name
        for name, dtype in ours.items()
        for dtype in (dtype, other.get(name, dtype))
        if other.get(name, dtype) != ours[name]
    }
    narrow = max(names & ROUNDING.keys(), key=ROUNDING.__getitem__, default=None)
    if narrow is None:
        return TOLERANCE, ""
    return TOLERANCE + (2 * layers + 1) * ROUNDING[narrow], f", as weights were rounded to {narrow}"


def _first_layers(arch: Architecture, layers: int) -> Architecture:
    """Describe a model of the first layers only."""
    lists: dict[str, Any] = {
        name: getattr(arch, name)[:layers]
        for name in _PER_LAYER
        if len(getattr(arch, name) or ()) == arch.num_layers
    }
    return replace(arch, num_layers=layers, **lists)


def _our_logits(source: Source, layers: int, tokens: np.ndarray) -> np.ndarray:
    from ml_parallel import platform

    platform.import_engine()  # first, as it silences what megatron-core says when imported
    import torch

    from ml_eval.engine import load

    shortened = replace(source, arch=_first_layers(source.arch, layers))
    engine = load(shortened, device="cpu", dtype=torch.float32)
    logits = engine.logits(torch.from_numpy(tokens)).float().numpy()
    engine.close()
    return logits


def _their_logits(
    directory: Path, config: Mapping[str, Any], layers: int, tokens: np.ndarray
) -> np.ndarray:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as scratch:
        shortened = _shortened(directory, config, layers, Path(scratch))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            shortened, dtype=torch.float32, trust_remote_code=False, attn_implementation="eager"
        )
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens), use_cache=False).logits
    return np.asarray(logits.float().numpy())


def _shortened(directory: Path, config: Mapping[str, Any], layers: int, scratch: Path) -> Path:
    """Link a model's files under a config.json that says it has fewer layers."""
    family = family_for(config)
    arch = family.from_hf(config)
    if layers < arch.num_layers:
        whole = family.to_hf(arch, "float32")
        short = family.to_hf(_first_layers(arch, layers), "float32")
        config = {**config} | {
            key: value for key, value in short.items() if value != whole.get(key)
        }
    for path in directory.iterdir():
        if path.is_file() and path.name != CONFIG:
            (scratch / path.name).symlink_to(path.resolve())
    (scratch / CONFIG).write_text(json.dumps(config))
    return scratch


if __name__ == "__main__":
    sys.exit(main())
