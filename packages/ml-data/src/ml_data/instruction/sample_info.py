"""`PREFIX_packed.json`: what the files of instruction or preference data beside it are.

Tokens and labels say nothing about the tokenizer and template that made them. With it a training
run can refuse another tokenizer, and anybody can see what became of the input.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from ml_data.description import TokenizerInfo, check_size, known, read_description


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
class SampleInfo(TokenizerInfo):
    """Instruction or preference data on disk."""

    kind: Literal["instruction", "preference"]
    """What a sample is."""
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


def read_sample_info(prefix: str | Path) -> SampleInfo | None:
    """Return what is known of the data at `prefix`, or None if nothing lies beside it.

    Raises:
        UsageError: the file is damaged, or of another run than a `.bin` beside it.
    """
    path = info_path(prefix)
    info = read_description(path, _from_values, "samples")
    for name, file in info.files.items() if info is not None else ():
        check_size(path, Path(f"{prefix}_packed_{name}_document.bin"), file.bin_bytes)
    return info


def _from_values(values: dict[str, Any]) -> SampleInfo:
    given = known(SampleInfo, values)
    files = {name: FileInfo(**file) for name, file in given["files"].items()}
    return SampleInfo(**{**given, "files": files, "handlers": tuple(given["handlers"])})
