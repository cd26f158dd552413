"""What packages declare and how they are laid out, as far as no other tool checks it.

Each rule is a function from a repository to its violations; this repository has none, and planted
ones are found in small fake repositories.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = packages_distributions()


class Package:
    """A folder of `packages/` and what its pyproject.toml says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = root.name
        self.module = root.name.replace("-", "_")

    @cached_property
    def project(self) -> dict[str, Any]:
        return tomllib.loads((self.root / "pyproject.toml").read_text())["project"]

    @property
    def dependencies(self) -> dict[str, str]:
        """Requirement by distribution name."""
        return {_distribution(text): text for text in self.project.get("dependencies", [])}

    def extras(self, *names: str) -> set[str]:
        extras = self.project.get("optional-dependencies", {})
        return {_distribution(text) for name in names or extras for text in extras.get(name, [])}


def packages(root: Path) -> list[Package]:
    return [Package(path.parent) for path in sorted(root.glob("packages/*/pyproject.toml"))]


def _distribution(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def imported_modules(files: Iterable[Path]) -> dict[str, str]:
    """Return every top-level module imported anywhere in `files`, with a place where it is."""
    modules: dict[str, str] = {}
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                modules.setdefault(name.partition(".")[0], f"{file.name}:{node.lineno}")
    return modules


def dependency_violations(root: Path) -> Iterator[str]:
    """What `src` imports is declared, siblings exactly; tests may use the extra `test` too.

    Tests in a folder with the name of an extra may use that one: they run where it is installed.
    """
    siblings = {package.name for package in packages(root)}
    for package in packages(root):
        declared = set(package.dependencies)
        used = imported_modules((package.root / "src").rglob("*.py"))
        yield from _undeclared(package, used, declared | package.extras())
        tests = package.root / "tests"
        local = {path.stem for path in tests.rglob("*.py")}
        for folder, pattern in [(tests, "*.py"), *((path, "**/*.py") for path in tests.glob("*/"))]:
            imports = imported_modules(folder.glob(pattern))
            tested = {m: at for m, at in imports.items() if m not in local}
            allowed = declared | package.extras("test", folder.name) | {"pytest"}
            yield from _undeclared(package, tested, allowed)
        for name in sorted(declared & siblings):
            if name.replace("-", "_") not in used:
                yield f"{package.name} declares {name} but never imports it"


def _undeclared(package: Package, imports: dict[str, str], declared: set[str]) -> Iterator[str]:
    for module, place in imports.items():
        if module in sys.stdlib_module_names or module == package.module:
            continue
        owners = {_distribution(name) for name in DISTRIBUTIONS.get(module, [module])}
        if not owners & declared:
            yield f"{package.name} imports {module} ({place}) but does not declare it"


def layout_violations(root: Path) -> Iterator[str]:
    """Every package has the same skeleton, its own version, and pins that a minor release keeps."""
    versions = {package.name: str(package.project.get("version")) for package in packages(root)}
    for package in packages(root):
        yield from _project_violations(package)
        yield from _file_violations(package)
        if _text_of(package.root / "LICENSE") != _text_of(root / "LICENSE"):
            yield f"{package.name} ships another LICENSE than this repository's"
        yield from _pin_violations(package, versions)


def _project_violations(package: Package) -> Iterator[str]:
    name, project = package.name, package.project
    if project["name"] != name:
        yield f"{name} calls itself {project['name']}"
    if not re.fullmatch(r"\d+\.\d+\.\d+", project.get("version", "")):
        yield f"{name} has no static version"
    if "requires-python" not in project:
        yield f"{name} has no requires-python"


def _text_of(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _file_violations(package: Package) -> Iterator[str]:
    for file in ("README.md", "CHANGELOG.md", f"src/{package.module}/py.typed"):
        if not (package.root / file).is_file():
            yield f"{package.name} has no {file}"
    if not list(package.root.glob("tests/test_*.py")):
        yield f"{package.name} has no tests"
    changelog, version = package.root / "CHANGELOG.md", package.project.get("version")
    if changelog.is_file() and f"## {version}" not in changelog.read_text():
        yield f"{package.name}'s CHANGELOG.md has no section {version}"


def _pin_violations(package: Package, versions: dict[str, str]) -> Iterator[str]:
    for sibling in sorted(package.dependencies.keys() & versions.keys()):
        pin, major = package.dependencies[sibling], versions[sibling].partition(".")[0]
        if not re.fullmatch(rf"{sibling}~={major}\.\d+", pin):
            yield f"{package.name} pins {pin}, not like {sibling}~={major}.0"


def test_packages_declare_what_they_import() -> None:
    assert list(dependency_violations(ROOT)) == []


def test_packages_have_the_same_layout() -> None:
    assert list(layout_violations(ROOT)) == []


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A repository of two packages without violations."""
    for name, dependencies, source in (
        ("ml-low", '["numpy"]', "import numpy.linalg\nimport json"),
        ("ml-high", '["ml-low~=1.0", "pyyaml"]', "def f():\n    from ml_low import x\nimport yaml"),
    ):
        module = name.replace("-", "_")
        files = {
            "pyproject.toml": f'[project]\nname = "{name}"\nversion = "1.2.0"\n'
            f'requires-python = ">=3.10"\ndependencies = {dependencies}\n',
            "README.md": "",
            "CHANGELOG.md": "## 1.2.0",
            "LICENSE": "Use it.",
            f"src/{module}/py.typed": "",
            f"src/{module}/work.py": source,
            "tests/test_work.py": f"import pytest\nimport {module}",
        }
        for file, text in files.items():
            path = tmp_path / "packages" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (tmp_path / "LICENSE").write_text("Use it.")
    return tmp_path


def test_a_repository_without_violations_has_none(fake: Path) -> None:
    assert [*dependency_violations(fake), *layout_violations(fake)] == []


@pytest.mark.parametrize(
    ("file", "text", "violation"),
    [
        (
            "ml-low/src/ml_low/work.py",
            "import numpy\ndef f():\n    import ml_high.work",
            "ml-low imports ml_high (work.py:3) but does not declare it",
        ),
        (
            "ml-low/src/ml_low/deep/er.py",
            "from yaml import load",
            "ml-low imports yaml (er.py:1) but does not declare it",
        ),
        (
            "ml-low/tests/test_more.py",
            "import ml_high",
            "ml-low imports ml_high (test_more.py:1) but does not declare it",
        ),
        ("ml-high/src/ml_high/work.py", "", "ml-high declares ml-low but never imports it"),
    ],
)
def test_planted_imports_are_found(fake: Path, file: str, text: str, violation: str) -> None:
    path = fake / "packages" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert list(dependency_violations(fake)) == [violation]


def test_extras_declare_too_but_for_tests_only_test_and_that_of_their_folder(fake: Path) -> None:
    low = fake / "packages/ml-low"
    with (low / "pyproject.toml").open("a") as file:
        file.write('[project.optional-dependencies]\nnpu = ["torch-npu"]\ntest = ["PyYAML>=6"]\n')
    (low / "src/ml_low/work.py").write_text("import torch_npu")
    (low / "tests/test_work.py").write_text("import yaml")
    assert list(dependency_violations(fake)) == []
    (low / "tests/helper.py").touch()
    (low / "tests/npu").mkdir()
    (low / "tests/npu/stubs.py").touch()
    (low / "tests/npu/test_npu.py").write_text("import torch_npu\nimport yaml\nimport stubs")
    assert list(dependency_violations(fake)) == []
    (low / "tests/test_work.py").write_text("import torch_npu\nimport helper")
    assert len(list(dependency_violations(fake))) == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "violation"),
    [
        ("pyproject.toml", '"1.2.0"', '"1.2"', "ml-high has no static version"),
        ("pyproject.toml", "requires-python", "x", "ml-high has no requires-python"),
        ("pyproject.toml", '"ml-high"', '"ml-hi"', "ml-high calls itself ml-hi"),
        ("pyproject.toml", "~=1.0", "==1.2.0", "ml-high pins ml-low==1.2.0, not like ml-low~=1.0"),
        ("pyproject.toml", "~=1.0", "~=0.1", "ml-high pins ml-low~=0.1, not like ml-low~=1.0"),
        ("CHANGELOG.md", "1.2.0", "1.1.0", "ml-high's CHANGELOG.md has no section 1.2.0"),
        ("README.md", None, None, "ml-high has no README.md"),
        ("LICENSE", None, None, "ml-high ships another LICENSE than this repository's"),
        ("LICENSE", "Use", "Buy", "ml-high ships another LICENSE than this repository's"),
        ("src/ml_high/py.typed", None, None, "ml-high has no src/ml_high/py.typed"),
        ("tests/test_work.py", None, None, "ml-high has no tests"),
    ],
)
def test_planted_layouts_are_found(
    fake: Path, file: str, old: str | None, new: str | None, violation: str
) -> None:
    path = fake / "packages/ml-high" / file
    if old is None or new is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new))
    assert violation in list(layout_violations(fake))
