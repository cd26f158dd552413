"""`PREFIX_packed.json`: what the files of instruction or preference data beside it are.

Tokens and labels say nothing about the tokenizer and template that made them. With it a training
run can refuse another tokenizer, and anybody can see what became of the input.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from ml_data.typed import check_types
from ml_models.flags import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One of the datasets."""

    bin_bytes: int
    """Size of the `.bin`."""
    bin_sha256: str
    """Hash of the `.bin`."""
    idx_sha256: str
    """Hash of the `.idx`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """Instruction or preference data on disk."""

    kind: Literal["instruction", "preference"]
    """What a sample is."""
    tokenizer: str
    """Path of the tokenizer."""
    tokenizer_kind: str
    """Library that encoded."""
    tokenizer_identity: str
    """Equal for tokenizers that give the same ids."""
    vocab_size: int
    """One more than the largest id the tokenizer can give."""
    bos: int | None
    """Id of the token that begins a text."""
    eod: int | None
    """Id of the token that ends a text."""
    pad: int | None
    """Id of the padding token."""
    template: str
    """`--prompt-type`, `hf-chat-template`, or the handler that writes conversations itself."""
    handlers: tuple[str, ...]
    """Handler of each dataset of the input."""
    append_eod: bool
    """Whether the token that ends a text ends every sample."""
    seq_length: int | None
    """The most tokens of a sample, and of a row if `packed`."""
    packed: bool
    """Whether a document is a row of several samples, each a sequence of it."""
    samples: int
    """Samples written; a preference is one."""
    rows: int
    """Documents written."""
    cut: int
    """Samples of the input that lost something to `seq_length`."""
    tokens: int
    """Tokens written: of a preference, those of both sides."""
    learned_tokens: int
    """Those of them that the loss sees."""
    longest: int
    """Tokens of the longest sample (side of a preference)."""
    records: int
    """Records read."""
    skipped: dict[str, int]
    """Records left out, by reason."""
    failed: int
    """Records that were not what their format says."""
    files: dict[str, FileInfo]
    """By the part of the name after `PREFIX_packed_`, before `_document`."""
    created_by: str
    """Program and version."""


def info_path(prefix: str | Path) -> Path:
    """Return the path of the description of the data at `prefix` (`--output-prefix`)."""
    return Path(f"{prefix}_packed.json")


def to_json(info: SampleInfo) -> str:
    """Return the content of a description."""
    return json.dumps(dataclasses.asdict(info), indent=2) + "\n"


def read_sample_info(prefix: str | Path) -> SampleInfo | None:
    """Return what is known of the data at `prefix`, or None if nothing lies beside it.

    Raises:
        UsageError: the file is damaged, or of another run than a `.bin` beside it.
    """
    path = info_path(prefix)
    if not path.exists():
        return None
    try:
        info = _from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{path}: not the description of samples ({error})") from error
    for name, file in info.files.items():
        tokens = Path(f"{prefix}_packed_{name}_document.bin")
        if tokens.exists() and tokens.stat().st_size != file.bin_bytes:
            raise UsageError(
                f"{path}: not of the same run as {tokens}: "
                f"describes {file.bin_bytes} bytes, not {tokens.stat().st_size}"
            )
    return info


def _from_json(values: dict[str, Any]) -> SampleInfo:
    names = {field.name for field in dataclasses.fields(SampleInfo)}
    known = {name: value for name, value in values.items() if name in names}
    files = {name: FileInfo(**file) for name, file in known["files"].items()}
    info = SampleInfo(**{**known, "files": files, "handlers": tuple(known["handlers"])})
    check_types(info)
    return info
