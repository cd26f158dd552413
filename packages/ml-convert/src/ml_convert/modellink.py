"""ModelLink's own command lines, `convert_ckpt.py ...`, in our spelling.

    --loader llama2_hf | megatron | mg_mcore | ...             the reference's two modules,
    --saver megatron | mg_mcore | mixtral                      or since September 2024
    --load-model-type hf | mg   --save-model-type hf | mg      these, with --use-mcore-models,
                                                               --load-from-legacy, --save-to-legacy

What a checkpoint says about itself is not asked for: flags about it are dropped. A result of
`--save-model-type hf` goes, as its users expect, to `mg2hf` or `mg2hg` within `--save-dir`, which
is the original Hugging Face directory and lends its config.json and tokenizer.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ml_convert.errors import ConversionError

_CHOICES = ("loader", "saver", "load-model-type", "save-model-type")
_MARKS = {*_CHOICES, "use-mcore-models", "load-from-legacy", "save-to-legacy"}
# What a checkpoint says, or what only the other program needs; with the number of values.
_DROPPED = {
    "add-dense-bias": 0,
    "add-qkv-bias": 0,
    "ai-framework": 1,
    "embed-layernorm": 0,
    "first-k-dense-replace": 1,
    "geglu": 0,
    "input-embeds-norm": 0,
    "load-from-legacy": 0,
    "load-hf-from-config": 0,
    "max-queue-size": 1,
    "megatron-path": 1,
    "model-type-hf": 1,
    "multi-head-latent-attention": 0,
    "no-checking": 0,
    "post-norm": 0,
    "qk-layernorm": 0,
    "save-to-legacy": 0,
    "spec": 2,
    "tokenizer-model": 1,
    "use-mcore-models": 0,
    "vocab-file": 1,
    "w-pack": 1,
}
# What is found out from the files when the result is not cut.
_CUTS = (
    "target-tensor-parallel-size",
    "target-pipeline-parallel-size",
    "target-expert-parallel-size",
    "expert-model-parallel-size",
    "num-layer-list",
    "num-layers-per-virtual-pipeline-stage",
    "make-vocab-size-divisible-by",
    "moe-grouped-gemm",
)
_LEGACY_SAVERS = ("megatron", "mixtral")
_LEGACY_LOADERS = ("megatron", "mixtral_mg")
_SWITCHES = ("moe-grouped-gemm",)


@dataclass(frozen=True)
class Translation:
    """A command line in our spelling."""

    words: list[str]
    """The flags."""
    dropped: tuple[str, ...]
    """Flags that have no place in it."""
    origin: str | None = None
    """The original Hugging Face model that a result of its format takes its config.json from."""

    def __str__(self) -> str:
        return f"ml-convert {shlex.join(self.words)}"

    def check_origin(self) -> None:
        """Check that the original Hugging Face model is there, as ModelLink needs it.

        Raises:
            ConversionError: It is not.
        """
        if self.origin is not None and not Path(self.origin, "config.json").is_file():
            raise ConversionError(
                f"--save-dir {self.origin}: holds no config.json. As with ModelLink, --save-dir "
                "is the directory of the original Hugging Face model, whose config.json and "
                "tokenizer the result takes (it goes to a directory in it, mg2hf or mg2hg); or "
                "name that model with --hf-cfg-dir. Without it: ml-convert --save-format hf "
                "--load-dir ... --save-dir ... writes a config.json from the checkpoint alone"
            )


@dataclass
class _Given:
    """Flags by name without dashes, each with its values, in order."""

    flags: dict[str, list[str]] = field(default_factory=dict)

    def value(self, name: str) -> str | None:
        """Return the one value of a flag, None if it is not given."""
        if name not in self.flags:
            return None
        if len(self.flags[name]) != 1:
            raise ConversionError(f"--{name}: needs one value")
        return self.flags[name][0]


def translate(argv: Sequence[str]) -> Translation | None:
    """Translate a command line of ModelLink; None if it is not one.

    Raises:
        ConversionError: It asks for what does not exist here, or lacks what it needs.
    """
    if not any(word.split("=")[0].removeprefix("--") in _MARKS for word in argv):
        return None
    given = _parse(argv)
    _refuse(given)
    read, write, origin = _load_format(given), _save_format(given), None
    words = ["--load-format", read] if read == "hf" else []
    words += ["--save-format", write]
    kept = {n: v for n, v in given.flags.items() if n not in (*_DROPPED, *_CHOICES, "model-type")}
    dropped = [name for name in given.flags if name in _DROPPED]
    if write == "hf":
        dropped += [name for name in kept if name in _CUTS]
        kept = {name: values for name, values in kept.items() if name not in _CUTS}
        origin = _hugging_face_directory(given, kept)
        words += ["--hf-config", origin]
    else:
        kept.setdefault("make-vocab-size-divisible-by", ["1"])
        kept.setdefault("pad-vocab", ["last-row"])
        if write == "mcore":
            latest = "model-type" not in given.flags
            kept.setdefault("mla-names", ["mindspeed" if latest else "modellink"])
    for name, values in kept.items():
        words += [f"--{name}", *values]
    return Translation(words, tuple(f"--{name}" for name in dropped), origin)


def _parse(argv: Sequence[str]) -> _Given:
    given = _Given()
    for name, values in _flags(argv):
        if name in given.flags:
            raise ConversionError(f"--{name}: is given twice")
        most = 0 if name in _SWITCHES else _DROPPED.get(name, len(values))
        if len(values) > most:
            raise ConversionError(f"--{name}: unexpected argument {values[most]!r}")
        given.flags[name] = values
    return given


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Split a command line into flags and the words that follow each."""
    name, values = "", list[str]()
    for word in argv:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name:
            yield name, values
        elif values:
            break
        name, equals, value = word.removeprefix("--").partition("=")
        values = [value] if equals else []
    if not name:
        raise ConversionError(f"unexpected argument {values[0]!r}")
    yield name, values


def _refuse(given: _Given) -> None:
    if given.value("model-type") not in (None, "GPT"):
        raise ConversionError(f"--model-type {given.value('model-type')}: only GPT is converted")
    if "noop-layers" in given.flags:
        raise ConversionError("--noop-layers: layers that do nothing are not supported")
    if "save-dir" not in given.flags or "load-dir" not in given.flags:
        raise ConversionError("--load-dir and --save-dir are needed")


def _load_format(given: _Given) -> str:
    """Return hf, or mg: which of Megatron's formats it is shows in the files."""
    kind = given.value("load-model-type")
    if kind is not None:
        if kind not in ("hf", "mg"):
            raise ConversionError(f"--load-model-type {kind}: valid are hf, mg")
        return kind
    loader = given.value("loader")
    if loader is None:
        raise ConversionError("--loader or --load-model-type is needed")
    if loader == "hf_mcore" or loader.endswith("_hf"):
        return "hf"
    if loader in (*_LEGACY_LOADERS, "mg_mcore"):
        return "mg"
    raise ConversionError(f"--loader {loader}: is unknown")


def _save_format(given: _Given) -> str:
    kind, saver = given.value("save-model-type"), given.value("saver")
    if kind is not None and (kind == "hf" or "huggingface" in kind):
        return "hf"
    if kind not in (None, "mg", "megatron"):
        raise ConversionError(f"--save-model-type {kind}: valid are hf, mg, huggingface, ...")
    if saver not in (None, *_LEGACY_SAVERS, "mg_mcore"):
        raise ConversionError(f"--saver {saver}: is unknown")
    if saver is None and kind is None:
        raise ConversionError("--saver or --save-model-type is needed")
    return "mcore" if _writes_core(given) else "legacy"


def _writes_core(given: _Given) -> bool:
    """Tell which implementation the result is for, when it is one of Megatron's.

    The saver of the reference says it. What came later writes for the legacy implementation without
    --use-mcore-models; its second version, which asks for no --model-type, for no other than the
    new one.
    """
    saver = given.value("saver")
    if saver in _LEGACY_SAVERS or "save-to-legacy" in given.flags:
        return False
    if "use-mcore-models" in given.flags or "model-type" not in given.flags:
        return True
    return saver == "mg_mcore" and given.value("loader") in _LEGACY_LOADERS


def _hugging_face_directory(given: _Given, kept: dict[str, list[str]]) -> str:
    """Return the original directory, and change --save-dir to the one within it to write to."""
    save_dir = given.value("save-dir") or ""
    origin = given.value("hf-config") or given.value("hf-cfg-dir") or save_dir
    for name in ("hf-config", "hf-cfg-dir"):
        kept.pop(name, None)
    name = "mg2hg" if given.value("saver") in _LEGACY_SAVERS else "mg2hf"
    kept["save-dir"] = [str(PurePath(save_dir, name))]
    return origin
