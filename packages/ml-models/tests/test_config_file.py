from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ml_models.config_file import Entry, entries
from ml_models.flags import UsageError, parse
from ml_models.hints import Text


@dataclass(frozen=True, kw_only=True)
class Model:
    num_layers: int
    hidden_size: int = 64
    swiglu: bool = False
    add_bias_linear: bool = field(default=True, metadata={"off": "--disable-bias-linear"})


@dataclass(frozen=True, kw_only=True)
class Layout:
    num_layer_list: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Model
    layout: Layout
    lr: float = 1e-5
    data_path: tuple[str, ...] = ()
    weights: tuple[float, ...] = (0.5, 0.5)
    load: Path | None = None
    name: str | None = None
    prompt: tuple[Text, ...] = ()


def run(*argv: str) -> Run:
    return parse(Run, ["--num-layers", "2", *argv], prog="ml-train pretrain")


def test_entries_keep_text_and_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: 1e-5\nb: {c: [on, 0123], d: null}\ne: 'null'\n")
    assert list(entries(file, lambda key: key != "b")) == [
        Entry(f"{file}:1", "a", ("1e-5",)),
        Entry(f"{file}:2", "c", ("on", "0123")),
        Entry(f"{file}:2", "d", None),
        Entry(f"{file}:3", "e", ("null",)),
    ]


def test_a_list_of_texts_keeps_their_commas(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text('prompt: ["a, b", "--c"]\n')
    assert run("--config", str(file)).prompt == ("a, b", "--c")


def test_a_config_file_is_flags_in_tables(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n  num_layers: 4\n  swiglu: true\n  disable_bias_linear: yes\n"
        "anything:\n  at all:\n    num-layer-list: [1, 3]\n"
        "lr: 1e-3\nname: 0123\ndata_path: [a, b]\nweights: 1 2\nload: null\nhidden_size:\n"
    )
    assert parse(Run, ["--config", str(file)], prog="ml-train") == Run(
        model=Model(num_layers=4, swiglu=True, add_bias_linear=False),
        layout=Layout(num_layer_list=(1, 3)),
        lr=1e-3,
        name="0123",
        data_path=("a", "b"),
        weights=(1.0, 2.0),
    )


def test_switches_of_a_file_can_be_turned_off(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("swiglu: false\ndisable_bias_linear: false\n")
    result = run("--config", str(file))
    assert not result.model.swiglu
    assert result.model.add_bias_linear
    assert run("--config", str(file), "--swiglu").model.swiglu


def test_later_files_win_and_flags_win_over_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("num_layers: 4\nhidden_size: 16\nlr: 1")
    second.write_text("hidden_size: 32\nlr: 2")
    argv = ["--lr", "3", "--config", str(first), "--config", str(second)]
    result = parse(Run, argv, prog="ml-train")
    assert result == Run(model=Model(num_layers=4, hidden_size=32), layout=Layout(), lr=3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_layers: 2\nhiden_size: 3", r"run.yaml:2: unknown flag --hiden-size; .*--hidden-size"),
        ("model:\n  hidden_size: x", r"run.yaml:2: --hidden-size: 'x' is not an integer"),
        ("swiglu: maybe", r"run.yaml:1: swiglu: 'maybe' is neither true nor false"),
        ("lr: {peak: 1}", r"run.yaml:1: lr: expected a value or a list of values, not a table"),
        ("lr: 1\nmore:\n  lr: 2", r"run.yaml:3: lr is given twice"),
        ("help: true", r"run.yaml:1: unknown flag --help"),
        ("- 1", r"run.yaml: not a table"),
        ("a: [", r"run.yaml: not YAML"),
    ],
)
def test_mistakes_in_a_file_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        run("--config", str(tmp_path / "run.yaml"))


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert run("--config", str(tmp_path / "run.yaml")) == run()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .*none.yaml: No such file"):
        run("--config", str(tmp_path / "none.yaml"))
