"""Which files `--input` names.

A directory is read with all that is in it. What is not read of it is named in a warning: nobody
finds out after the training that half of a corpus was in files of another kind.
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_data.reading.chunks import SUFFIXES, is_plain_text, require_packages, supported
from ml_models.flags import UsageError

logger = logging.getLogger(__name__)

_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json")
"""What `datasets` and LLaMA-Factory say about the files beside it."""
_ABOUT_STEMS = ("readme", "license")
"""Names, without their endings, of text that is about data where it lies beside data."""
_SHOWN = 5


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Return the files that `inputs` name: files, directories (sorted by path), glob patterns.

    A directory that `datasets` saved gives its files in their order; one of several splits, those
    of `train`. Hidden files are not read.

    Raises:
        UsageError: One of them names no file, or a file of a format that is not read, or one for
            which a package is missing.
    """
    files = [file for given in inputs for file in _files_of(given)]
    for file in files:
        require_packages(file)
    return files


def _files_of(given: str) -> list[Path]:
    if not given:  # Path("") is the working directory
        raise UsageError("--input '': names no file, directory or pattern")
    path = Path(given).expanduser()
    if path.is_dir():
        return _directory(given, path)
    if path.exists():
        return [_file(given, path)]
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    if not matches:
        raise UsageError(f"--input {given}: no such file or directory")
    entered = {parent for match in matches for parent in match.parents}
    files: list[Path] = []
    for match in matches:
        if not match.is_dir():
            files.append(_file(given, match))
        elif match not in entered:  # of `**` the files inside have matched themselves
            files += _directory(str(match), match)
    return files


def _file(given: str, path: Path) -> Path:
    if not path.name.lower().endswith(SUFFIXES):
        name = given if given == str(path) else f"{given}: {path}"
        raise UsageError(f"--input {name}: not a file that can be read ({supported()})")
    return path


def _directory(given: str, directory: Path) -> list[Path]:
    ignored: list[Path] = []
    found = list(_walk(directory, ignored, ()))
    data = {file.parent for file in found if not is_plain_text(file)}
    files: list[Path] = []
    for file in found:
        (ignored if data and _about(file, {directory, *data}) else files).append(file)
    if not files:
        raise UsageError(f"--input {given}: the directory holds no file to read ({supported()})")
    if ignored:
        names = ", ".join(str(path.relative_to(directory)) for path in sorted(ignored)[:_SHOWN])
        more = f" and {len(ignored) - _SHOWN:,} more" if len(ignored) > _SHOWN else ""
        logger.warning("--input %s: not read: %s%s", given, names, more)
    return files


def _walk(directory: Path, ignored: list[Path], above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files of a directory and those below it that are read; note the others."""
    above = (*above, directory.resolve())
    saved = _saved_dataset(directory, ignored)
    if saved is not None:
        yield from saved
        return
    entries = sorted(directory.iterdir())
    described = _descriptions(entries)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.resolve() not in above:  # a link to where it is itself
                yield from _walk(entry, ignored, above)
        elif entry.name not in described and _is_input(entry):
            yield entry
        else:
            ignored.append(entry)


def _is_input(path: Path) -> bool:
    readable = path.name.lower().endswith(SUFFIXES) and path.is_file()
    return readable and path.name not in _ABOUT_DATA


def _descriptions(entries: list[Path]) -> set[str]:
    """Return the names of the descriptions of datasets of tokens that we wrote."""
    datasets = [entry.stem for entry in entries if entry.suffix == ".idx"]
    packed = [name.rpartition("_packed_") for name in datasets]
    samples = {before + "_packed.json" for before, found, _ in packed if found}
    return {f"{name}.json" for name in datasets} | samples


def _about(file: Path, directories: set[Path]) -> bool:
    """Whether this file beside data is about it."""
    return (
        is_plain_text(file)
        and file.name.lower().split(".")[0] in _ABOUT_STEMS
        and file.parent in directories
    )


# Directories that `datasets` saved (`save_to_disk`).


def _saved_dataset(directory: Path, ignored: list[Path]) -> list[Path] | None:
    """Return the files of a saved dataset; None if the directory is something else."""
    splits = _described(directory / "dataset_dict.json", "splits")
    if splits is not None:
        return _train_split(directory, splits, ignored)
    names = _described(directory / "state.json", "_data_files")
    if names is None:
        return None
    if _described(directory / "state.json", "_indices_data_files"):
        raise UsageError(
            f"--input {directory}: a dataset saved with indices beside its rows; "
            "save it again with datasets 2 or later"
        )
    try:
        files = [directory / str(name["filename"]) for name in names]
    except (TypeError, KeyError) as error:
        raise UsageError(
            f"{directory / 'state.json'}: _data_files is not a list of files"
        ) from error
    for file in files:
        if not file.is_file():
            raise UsageError(f"--input {directory}: a saved dataset without its file {file.name}")
    return files


def _train_split(directory: Path, splits: list[Any], ignored: list[Path]) -> list[Path]:
    names = [str(split) for split in splits]
    if "train" not in names:
        raise UsageError(
            f"--input {directory}: a saved dataset with the splits {', '.join(names) or '(none)'} "
            f"and no train; give the directory of one of them"
        )
    ignored += [directory / name for name in names if name != "train"]
    files = _saved_dataset(directory / "train", ignored)
    if files is None:
        raise UsageError(f"--input {directory}: a saved dataset without its split train")
    return files


def _described(path: Path, key: str) -> list[Any] | None:
    """Return a list in a file that describes a saved dataset; None if it is not such a file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else None
