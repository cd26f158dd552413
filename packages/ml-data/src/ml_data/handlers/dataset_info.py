"""Datasets by name, from LLaMA-Factory's `dataset_info.json`.

| key of an entry | meaning |
|---|---|
| `file_name` | a file or directory, relative to the directory of `dataset_info.json` |
| `formatting` | `alpaca` (default), `sharegpt` or `openai` |
| `ranking` | true for preferences |
| `columns` | names of columns; where it is there, the optional ones it leaves out are not read |
| `tags` | names of roles and of keys of messages |
| `num_samples` | how many records of it are taken |
| `file_sha1` | not checked |
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_data import handlers
from ml_data.handlers.columns import Columns, map_tags
from ml_data.reading.record import shown
from ml_models.commands import did_you_mean
from ml_models.flags import UsageError

FILE = "dataset_info.json"

_HANDLERS = {
    ("alpaca", False): "AlpacaStyleInstructionHandler",
    ("alpaca", True): "AlpacaStylePairwiseHandler",
    ("sharegpt", False): "SharegptStyleInstructionHandler",
    ("sharegpt", True): "SharegptStylePairwiseHandler",
    ("openai", False): "OpenAIInstructionHandler",
    ("openai", True): "OpenAIPairwiseHandler",
}
_OPTIONAL = ("query", "history", "system", "tools")
_ON_A_HUB = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")
_KNOWN = ("file_name", "formatting", "ranking", "columns", "tags", "num_samples", "split")
_NOT_READ = ("file_sha1",)  # of LLaMA-Factory to 0.8, as ModelLink copied it
_UNREAD_COLUMNS = ("images", "videos", "audios", "kto_tag")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Files of one form."""

    input: tuple[str, ...]
    """Files, directories, patterns."""
    handler: str
    """Its name in `HANDLERS`."""
    columns: Columns
    max_samples: int | None = None
    """Records to take, the first ones."""

    def limited(self, records: int | None) -> Dataset:
        """Return it with at most so many records."""
        limits = [limit for limit in (self.max_samples, records) if limit is not None]
        return dataclasses.replace(self, max_samples=min(limits, default=None))


def datasets(names: Sequence[str], directory: str | None, *, pairwise: bool) -> list[Dataset]:
    """Return the datasets with `names` in the `dataset_info.json` of a directory.

    Raises:
        UsageError: one is not there, not on this machine, or of another kind.
    """
    if directory is None:
        raise UsageError(f"--dataset-dir: missing; it names the directory of {FILE}")
    root = Path(directory).expanduser()
    entries = _read(root / FILE)
    # ModelLink's scripts write `--input ./dataset/alpaca_en`: the last part is the name.
    return [_dataset(Path(name.strip()).name, entries, root, pairwise=pairwise) for name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--dataset-dir: cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not an object of datasets by name but {shown(content)}")
    return content


def _dataset(name: str, entries: dict[str, Any], root: Path, *, pairwise: bool) -> Dataset:
    path = root / FILE
    if name not in entries:
        hint = did_you_mean(name, entries)
        raise UsageError(f"--input {name}: no such dataset in {path}{hint}")
    entry, where = entries[name], f"{path}: {name}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: not an object but {shown(entry)}")
    _check_place(entry, where)
    _check_keys(entry, where)
    ranking = entry.get("ranking", False)
    if not isinstance(ranking, bool):
        raise UsageError(f"{where}: ranking {shown(ranking)}: must be true or false")
    if ranking != pairwise:
        right = "ml-data preference" if ranking else "ml-data instruct"
        raise UsageError(f"{where}: ranking is {str(ranking).lower()}: that is for {right}")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UsageError(f"{where}: formatting {shown(formatting)}: not alpaca, sharegpt, openai")
    handler = _HANDLERS[formatting, ranking]
    return Dataset(
        input=(str(root / entry["file_name"]),),
        handler=handler,
        columns=_columns(entry, handlers.HANDLERS[handler].columns, where),
        max_samples=_number(entry.get("num_samples"), where),
    )


def _check_place(entry: dict[str, Any], where: str) -> None:
    name = entry.get("file_name")
    if name == "":  # as a path it would be the directory of dataset_info.json
        raise UsageError(f'{where}: file_name "": must name a file or a directory')
    if isinstance(name, str):
        return
    place = next((key for key in _ON_A_HUB if key in entry), None)
    if place is not None:
        raise UsageError(
            f"{where}: {place} {shown(entry[place])}: nothing is downloaded and no script is run; "
            "download the files and name them in file_name"
        )
    raise UsageError(f"{where}: no file_name; it has {', '.join(entry) or 'nothing'}")


def _check_keys(entry: dict[str, Any], where: str) -> None:
    """Refuse what would change the data if it were read."""
    if entry.get("split", "train") != "train":
        raise UsageError(f"{where}: split {shown(entry['split'])}: files hold the split train only")
    for key in entry:
        if key in ("subset", "folder"):
            raise UsageError(f"{where}: {key} is of datasets on a hub; name its files in file_name")
        if key not in (*_KNOWN, *_NOT_READ, *_ON_A_HUB):
            raise UsageError(f"{where}: unknown key {key!r}{did_you_mean(key, _KNOWN)}")


def _columns(entry: dict[str, Any], defaults: Columns, where: str) -> Columns:
    tags = map_tags(defaults.tags, entry.get("tags", {}), where)
    columns = dataclasses.replace(defaults, tags=tags, named_by=f"columns in {FILE}")
    given = entry.get("columns")
    if given is None:
        return columns
    _check_columns(given, where)
    names = {key: name or None for key, name in given.items() if key not in _UNREAD_COLUMNS}
    changed: dict[str, Any] = {**dict.fromkeys(_OPTIONAL), **names, "mapped": frozenset(names)}
    return dataclasses.replace(columns, **changed)


def _check_columns(given: Any, where: str) -> None:
    if not isinstance(given, dict):
        raise UsageError(f"{where}: columns must be an object, not {shown(given)}")
    fields = {field.name for field in dataclasses.fields(Columns)} - {"tags", "mapped", "named_by"}
    for key, name in given.items():
        if key in _UNREAD_COLUMNS and name:
            raise UsageError(f"{where}: columns has {key}, which is not read: text only")
        if key not in (*fields, *_UNREAD_COLUMNS):
            raise UsageError(f"{where}: columns has no {key!r}{did_you_mean(key, fields)}")
        if not isinstance(name, str | None):
            raise UsageError(f"{where}: column {key} must be a name, not {shown(name)}")


def _number(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{where}: num_samples {shown(value)}: must be at least 1")
    return value
