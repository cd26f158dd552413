"""Config files: a YAML file as the flags it writes down, each with the line it stands on.

YAML nodes are read, not values: they keep `1e-5`, `0123` and `on` as written (the flag's type
decides what they mean) and know their line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ml_models.commands import UsageError

if TYPE_CHECKING:
    import yaml


class Entry(NamedTuple):
    """One key of a config file with its value."""

    where: str
    """File and line, for messages."""
    key: str
    """Name of the flag, as written."""
    items: tuple[str, ...] | None
    """The value, or the values of a list; None for null."""


def entries(path: Path, is_flag: Callable[[str], bool]) -> Iterator[Entry]:
    """Yield what a file says, in order; a table that is no flag only groups.

    Raises:
        UsageError: the file cannot be read, or is not a table of keys and values.
    """
    import yaml  # 70 ms which only runs with a config file pay

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if isinstance(root, yaml.MappingNode):
        yield from _entries(root, path, is_flag)
    elif root is not None:
        raise UsageError(f"--config {path}: not a table of flags (`num_layers: 2`)")


def _entries(
    table: yaml.MappingNode, path: Path, is_flag: Callable[[str], bool]
) -> Iterator[Entry]:
    from yaml import MappingNode

    for key, node in table.value:
        where = f"{path}:{key.start_mark.line + 1}"
        if isinstance(node, MappingNode) and not is_flag(str(key.value)):
            yield from _entries(node, path, is_flag)
        else:
            yield Entry(where, str(key.value), _items(node, f"{where}: {key.value}"))


def _items(node: yaml.Node, name: str) -> tuple[str, ...] | None:
    from yaml import ScalarNode, SequenceNode

    if node.tag == "tag:yaml.org,2002:null":
        return None
    items = node.value if isinstance(node, SequenceNode) else [node]
    if not all(isinstance(item, ScalarNode) for item in items):
        raise UsageError(f"{name}: expected a value or a list of values, not a table")
    return tuple(item.value for item in items)
