"""A pytest plugin: of a parametrized test, only the first case runs.

`hatch run layers` uses it. That a package stands on its own shows in every test, not in every case
of it; `hatch run test` runs them all.
"""

from __future__ import annotations

from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out all cases of a test after the first."""
    first: dict[str, Any] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    kept = set(map(id, first.values()))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = first.values()
