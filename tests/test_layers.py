from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "tools" / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layers"] = module
    spec.loader.exec_module(module)
    return module


def test_layers_are_those_that_lint_imports_enforces(layers: ModuleType) -> None:
    rows = layers.read_layers(ROOT / "pyproject.toml")
    assert rows[-1] == ["ml-kernels"]
    assert rows[0] == ["ml-train", "ml-eval"]
    on_disk = {path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml")}
    assert {name for row in rows for name in row} == on_disk


def test_a_package_may_bring_only_lower_rows(layers: ModuleType) -> None:
    rows = [["top", "sibling"], ["middle"], ["bottom"]]
    assert layers.below("top", rows) == {"middle", "bottom"}
    assert layers.below("middle", rows) == {"bottom"}
    assert layers.below("bottom", rows) == set()


def test_a_package_that_brings_its_sibling_fails(
    layers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layers, "DIST", tmp_path)
    monkeypatch.setattr(layers, "install", lambda *_: {"top", "sibling", "bottom"})
    row = layers.check("top", {"bottom"}, every_case=False)
    assert not row.passed
    assert "brings sibling" in row.verdict


def test_an_unknown_package_is_refused_with_the_known_ones(
    layers: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        layers.main(["ml-kernel"])
    assert stop.value.code == 2
    assert "no package ml-kernel; there are ml-kernels" in capsys.readouterr().err


def test_the_table_is_aligned(layers: ModuleType) -> None:
    rows = [
        layers.Row("ml-kernels", "", 3.2, "4 passed", True),
        layers.Row("ml-models", "ml-kernels", 12.9, "5 passed", True),
    ]
    assert layers.table(rows).splitlines() == [
        "package     brings      seconds  result",
        "ml-kernels  -           3        4 passed",
        "ml-models   ml-kernels  13       5 passed",
    ]
