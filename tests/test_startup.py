"""What starting up costs, and which flags exist: importing is free of side effects, help is light.

After a change of flags that is meant:

    UPDATE_FLAGS=1 hatch run test tests/test_startup.py     # rewrites tests/flags; commit that too
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ROOT / "tests" / "flags"
PROJECTS = [
    tomllib.loads(path.read_text())["project"]
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
]
PACKAGES = [project["name"].replace("-", "_") for project in PROJECTS]
PROGRAMS = {name: target for p in PROJECTS for name, target in p.get("scripts", {}).items()}


def python(script: str, *argv: str) -> str:
    """Run a script in a fresh interpreter; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *argv],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORTS = """
import importlib, pkgutil, sys

def modules(name):  # the back ends of devices that are not here cannot be imported
    yield name
    for found in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        if {"npu", "cuda", "__main__"}.isdisjoint(found.name.split(".")):
            yield found.name

for name in [module for name in sys.argv[1:] for module in modules(name)]:
    importlib.import_module(name)
print(*sys.modules)
"""

SIDE_EFFECTS = """
import warnings
warnings.simplefilter("ignore")  # megatron-core misses Apex
import torch, torch.distributed, megatron.core, transformers
from inspect import getattr_static

owners = [torch, torch.cuda, torch.distributed, torch.Tensor, torch.nn.Module, torch.nn.functional]
before = [{name: getattr_static(owner, name) for name in dir(owner)} for owner in owners]
IMPORTS
print("---")
for owner, old in zip(owners, before):
    for name, value in old.items():
        if getattr_static(owner, name) is not value and not isinstance(value, (int, type(None))):
            print(owner.__name__, name)
if torch.distributed.is_initialized():
    print("process group")
if torch.cuda.is_initialized():
    print("CUDA")
""".replace("IMPORTS", IMPORTS)


def imported_with(*names: str) -> set[str]:
    """Return all modules that every module of the packages `names` brings along."""
    return set(python(IMPORTS, *names).split())


def side_effects(*names: str) -> list[str]:
    """Return what importing every module of the packages changed or initialised in torch."""
    return python(SIDE_EFFECTS, *names).partition("---\n")[2].splitlines()


@pytest.mark.parametrize(
    ("names", "unwanted"),
    [
        (["ml_convert", "ml_models.families"], {"megatron", "torch", "transformers"}),
        (["ml_data", "ml_kernels"], {"megatron"}),
    ],
)
def test_modules_for_laptops_import_no_engine(names: list[str], unwanted: set[str]) -> None:
    assert unwanted & imported_with(*names) == set()


def test_importing_the_packages_imports_no_megatron() -> None:
    shown = python(f"import sys, {', '.join(PACKAGES)}\nprint(*sys.modules)")
    assert "megatron" not in shown.split()


@pytest.mark.slow
def test_importing_every_module_patches_and_initialises_nothing() -> None:
    assert side_effects(*PACKAGES) == []


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module below a package, to be filled with something forbidden."""
    deep = tmp_path / "ml_fake" / "deep"
    deep.mkdir(parents=True)
    (deep.parent / "__init__.py").touch()
    (deep / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return deep / "module.py"


def test_a_planted_import_is_found(fake: Path) -> None:
    fake.write_text("import wave")
    assert "wave" in imported_with("ml_fake")
    assert "wave" not in imported_with("ml_models.families")


@pytest.mark.slow
def test_planted_side_effects_are_found(fake: Path) -> None:
    fake.write_text(
        "import torch\n"
        "torch.cuda.current_device = lambda: 0\n"
        "torch.Tensor.cuda = lambda self: self\n"
        "store = torch.distributed.HashStore()\n"
        "torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
    )
    expected = {"torch.cuda current_device", "Tensor cuda", "process group"}
    assert expected <= set(side_effects("ml_fake"))


HELP = """
import contextlib, io, json, sys
from importlib import import_module

def run(*argv):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = import_module(sys.argv[1]).main(list(argv))
    assert code == 0, (argv, code)
    return shown.getvalue()

helps = {"": run("--help")}
commands = helps[""].partition("\\ncommands:\\n")[2].partition("\\n\\n")[0].splitlines()
helps |= {name: run(name, "--help") for name in (line.split()[0] for line in commands)}
print(json.dumps([helps, [m for m in ("torch", "megatron", "transformers") if m in sys.modules]]))
"""


@functools.cache
def show_help(program: str) -> tuple[dict[str, str], list[str]]:
    """Return the help of a program's commands, and the heavy modules that showing it imported."""
    helps, heavy = json.loads(python(HELP, PROGRAMS[program].partition(":")[0]))
    return helps, heavy


def flag_names(text: str) -> list[str]:
    """Return the flags that a help text explains."""
    invocations = re.findall(r"^  (-.*?)(?:  |$)", text, re.MULTILINE)
    return sorted({flag for line in invocations for flag in re.findall(r"--[\w-]+", line)})


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_nothing_heavy(program: str) -> None:
    _, heavy = show_help(program)
    assert heavy == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_change_only_on_purpose(program: str) -> None:
    flags = {
        f"{program}-{command}.txt" if command else f"{program}.txt": flag_names(text)
        for command, text in show_help(program)[0].items()
    }
    files = {name: "\n".join(names) + "\n" for name, names in flags.items() if names}
    known = {path.name: path for path in FLAGS.glob(f"{program}*.txt")}
    if os.environ.get("UPDATE_FLAGS"):
        for path in known.values():
            path.unlink()
        for name, text in files.items():
            FLAGS.mkdir(exist_ok=True)
            (FLAGS / name).write_text(text)
        return
    assert {name: path.read_text() for name, path in known.items()} == files, "see the top of file"


def test_flag_names_are_those_explained_not_those_mentioned() -> None:
    text = (
        "usage: x [--y]\n\nopts:\n  -h, --help  show --this\n  --a INT, --b-c {x}\n          --d\n"
    )
    assert flag_names(text) == ["--a", "--b-c", "--help"]
