"""`PREFIX_packed.json`: what the files of instruction or preference data beside it are.

Tokens and labels say nothing about the tokenizer and template that made them. With it a training
run can refuse another tokenizer, and anybody can see what became of the input.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from ml_data.description import TokenizerInfo, check_size, known, read_description
from ml_models.flags import UsageError

Kind = Literal["instruction", "preference"]
_FIRST: dict[Kind, str] = {"instruction": "input_ids", "preference": "chosen_input_ids"}
"""A column that every dataset of a kind has."""


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

    kind: Kind
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


def kind_of(column: str) -> Kind:
    """Return what a sample is that has a column of this name."""
    return "preference" if column.startswith(("chosen_", "rejected_")) else "instruction"


def check_prefix(prefix: str | Path, kind: Kind) -> None:
    """Check that no samples of the other kind lie at a prefix: both have the same description.

    Raises:
        UsageError: there are some.
    """
    for other, column in _FIRST.items():
        path = Path(f"{prefix}_packed_{column}_document.idx")
        if other != kind and path.exists():
            raise UsageError(
                f"--output-prefix {prefix}: {other} data are there ({path.name}), which {kind} "
                "data cannot lie beside; choose another prefix, or remove them"
            )


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
