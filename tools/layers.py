"""Prove the layers: build all wheels, install each alone with the wheels it needs, run its tests.

    hatch run layers                 # every package; one case of every test that is not slow
    hatch run layers ml-kernels      # these packages only
    hatch run layers --all           # every case of every test

A fresh environment gets one package (with its `test` extra, if any) and pytest; pip's resolver adds
what the package declares and nothing else. So an undeclared import, or one from a package of the
same or a higher layer, fails here even where the workspace hides it. uv (hatch brings it) makes an
environment with torch in seconds, by links into its cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
_TWO_FILES = ("-n", "2", "--dist", "loadfile")  # of tests at a time


class Row(NamedTuple):
    """What happened to one package."""

    package: str
    installed: str
    """Packages of ours that came along."""
    seconds: float
    verdict: str
    """Last line of pytest, or what failed."""
    passed: bool


class LayerError(Exception):
    """A package does not stand on its own; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the packages named in `argv`, stop at the first that fails; return the exit code."""
    layers = read_layers(ROOT / "pyproject.toml")
    known = [name for row in reversed(layers) for name in row]
    parser = argparse.ArgumentParser(prog="layers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="one of " + ", ".join(known))
    parser.add_argument("--all", action="store_true", help="run every case of every test")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.packages) - set(known):
        parser.error(f"no package {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    try:
        build(known)
    except LayerError as error:
        print(error)
        return 1
    rows: list[Row] = []
    for name in arguments.packages or known:
        rows.append(check(name, below(name, layers), every_case=arguments.all))
        if not rows[-1].passed:
            break
    print("\n" + table(rows))
    if not arguments.all:
        print("Of every test that is not slow one case was run; --all runs them all.")
    return 0 if rows[-1].passed else 1


def read_layers(pyproject: Path) -> list[list[str]]:
    """Return the rows of packages, highest first, from the contract that lint-imports enforces."""
    contracts = tomllib.loads(pyproject.read_text())["tool"]["importlinter"]["contracts"]
    rows = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip().replace("_", "-") for name in row.split("|")] for row in rows]


def below(name: str, layers: Sequence[Sequence[str]]) -> set[str]:
    """Return the packages that `name` may bring along: those of the rows under its own."""
    row = next(index for index, names in enumerate(layers) if name in names)
    return {lower for names in layers[row + 1 :] for lower in names}


def build(names: Sequence[str]) -> None:
    """Build the wheel of every package into `dist/`, replacing older ones."""
    DIST.mkdir(exist_ok=True)
    for old in DIST.glob("ml_*.whl"):
        old.unlink()
    for name in names:
        print(f"build {name}", flush=True)
        _uv("build", "--quiet", "--wheel", "--out-dir", DIST, ROOT / "packages" / name)


def check(name: str, allowed: set[str], *, every_case: bool) -> Row:
    """Install `name` alone and run its tests there."""
    started = time.monotonic()
    environment = DIST / "environments" / name
    print(f"\n== {name}", flush=True)
    try:
        ours = install(name, environment) - {name}
        if ours - allowed:
            raise LayerError(f"brings {', '.join(sorted(ours - allowed))} of its layer or higher")
        verdict = run_tests(name, environment, every_case=every_case)
    except LayerError as error:
        return Row(name, "", time.monotonic() - started, str(error), passed=False)
    finally:
        shutil.rmtree(environment, ignore_errors=True)
    return Row(name, " ".join(sorted(ours)), time.monotonic() - started, verdict, passed=True)


def install(name: str, environment: Path) -> set[str]:
    """Make a fresh environment of `name`'s wheel and pytest; return the packages of ours in it."""
    project = _project(name)
    extra = "[test]" if "test" in project.get("optional-dependencies", {}) else ""
    python = environment / "bin" / "python"
    _uv("venv", "--quiet", "--clear", "--python", sys.executable, environment)
    ours = [path.name for path in (ROOT / "packages").iterdir()]
    refresh = [word for package in ours for word in ("--refresh-package", package)]
    pinned = f"{name}{extra}=={project['version']}"
    _uv("pip", "install", "--quiet", "--python", python, *refresh, pinned, "pytest", "pytest-xdist")
    installed = environment.glob("lib/*/site-packages/ml_*.dist-info")
    return {path.name.partition("-")[0].replace("_", "-") for path in installed} & set(ours)


def run_tests(name: str, environment: Path, *, every_case: bool) -> str:
    """Run the package's tests in its environment; return pytest's last line."""
    some = [] if every_case else ["-m", "not slow", "-p", "first_cases"]
    command = [
        str(environment / "bin" / "pytest"),
        "-q",
        *_TWO_FILES,
        f"packages/{name}/tests",
        *some,
    ]
    variables = os.environ | {"PYTHONPATH": str(ROOT / "tools")}  # first_cases.py
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True
    ) as tests:
        last = ""
        for line in tests.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    if tests.returncode:
        raise LayerError(f"tests failed: {last}")
    return last


def table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text."""
    head = ("package", "brings", "seconds", "result")
    cells = [head, *((r.package, r.installed or "-", f"{r.seconds:.0f}", r.verdict) for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _project(name: str) -> dict[str, Any]:
    text = (ROOT / "packages" / name / "pyproject.toml").read_text()
    project: dict[str, Any] = tomllib.loads(text)["project"]
    return project


def _uv(*words: str | Path) -> str:
    """Run uv with our wheels among its sources; return its output."""
    uv = os.environ.get("HATCH_UV") or shutil.which("uv")
    if uv is None:
        sys.exit("layers: uv is missing; start this as `hatch run layers`, hatch brings it")
    links = ",".join(filter(None, [os.environ.get("UV_FIND_LINKS"), str(DIST)]))
    variables = os.environ | {"UV_FIND_LINKS": links}
    done = subprocess.run([uv, *words], env=variables, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise LayerError(f"uv {' '.join(map(str, words[:2]))} failed, see above")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
