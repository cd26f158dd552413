from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ml_models import flags
from ml_models.flags import UsageError, parse
from ml_models.hints import Text


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model.

    Not part of the title.
    """

    num_layers: int
    """Number of layers."""
    hidden_size: int = 64
    """Width of the residual stream,
    in 100% of the layers."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    swiglu: bool = False
    add_bias_linear: bool = field(default=True, metadata={"off": "--disable-bias-linear"})
    """Biases in linear layers."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_layers:
            raise ValueError(f"hidden_size ({self.hidden_size}) is no multiple of num_layers")


@dataclass(frozen=True, kw_only=True)
class Layout:
    num_layer_list: tuple[int, ...] | None = None
    overlap: bool = field(default=False, metadata={"aliases": ("--cp-send-recv-overlap",)})
    expert_model_parallel_size: int = field(
        default=1, metadata={"aliases": ("--target-expert-parallel-size",)}
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run."""

    model: Model
    layout: Layout = field(default_factory=lambda: Layout(expert_model_parallel_size=2))
    lr: float = 1e-5
    """Learning rate."""
    data_path: tuple[str, ...] = ()
    weights: tuple[float, ...] = (0.5, 0.5)
    load: Path | None = None
    name: str | None = None


def test_the_source_of_a_config_is_read_for_its_help_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> str:
        raise AssertionError("reading and parsing it takes longer than all else")

    monkeypatch.setattr(inspect, "getsource", refuse)
    flags._docs.cache_clear()
    assert run("--lr", "2").lr == 2
    with pytest.raises(AssertionError, match="longer than all else"):
        run("--help")


def run(*argv: str) -> Run:
    return parse(Run, ["--num-layers", "2", *argv], prog="ml-train pretrain")


def test_fields_of_nested_configs_are_flags() -> None:
    assert run("--hidden-size", "8", "--lr", "1e-4") == Run(
        model=Model(num_layers=2, hidden_size=8), lr=1e-4
    )


@pytest.mark.parametrize("words", [["4", "5", "6"], ["4,5,6"], ["4,5", "6"], ["4, 5 6"]])
def test_lists_take_spaces_commas_or_both(words: list[str]) -> None:
    assert run("--num-layer-list", *words).layout.num_layer_list == (4, 5, 6)


def test_lists_of_text_and_numbers() -> None:
    result = run("--data-path", "a b", "c,d", "--weights", "1e-1", "2", "--name", "x,y")
    assert (result.data_path, result.weights) == (("a b", "c", "d"), (0.1, 2.0))
    assert result.name == "x,y"


def test_texts_keep_commas_and_may_be_given_one_by_one() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Texts:
        prompt: tuple[Text, ...] = ()

    words = ["--prompt", "a, b", "c", "--prompt", "d"]
    assert parse(Texts, words, prog="x") == Texts(prompt=(Text("a, b"), Text("c"), Text("d")))


def test_switches_have_positive_negative_and_old_names() -> None:
    assert run("--swiglu").model.swiglu
    assert not run("--swiglu", "--no-swiglu").model.swiglu
    assert not run("--disable-bias-linear").model.add_bias_linear
    assert not run("--no-add-bias-linear").model.add_bias_linear
    assert run("--disable-bias-linear", "--add-bias-linear").model.add_bias_linear


def test_aliases_name_the_same_field() -> None:
    assert run("--target-expert-parallel-size", "4").layout.expert_model_parallel_size == 4
    assert run("--cp-send-recv-overlap").layout.overlap
    assert not run("--overlap", "--no-cp-send-recv-overlap").layout.overlap


def test_the_default_of_an_outer_field_is_the_default_of_its_flags() -> None:
    assert run("--overlap").layout == Layout(overlap=True, expert_model_parallel_size=2)


def test_paths_expand_home() -> None:
    assert run("--load", "~/x").load == Path.home() / "x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-layer", "3"], r"unknown flag --num-layer; did you mean --num-layers\?"),
        (["--num_layers=3"], r"unknown flag --num_layers; did you mean --num-layers\?"),
        (["--zzz"], r"unknown flag --zzz$"),
        (["stray"], r"unexpected argument 'stray'"),
        (["--hidden-size", "x"], r"--hidden-size: 'x' is not an integer"),
        (["--hidden-size"], r"--hidden-size: expected one argument"),
        (["--target-expert-parallel-size", "x"], r"--target-expert-parallel-size: 'x'"),
        (["--lr", "nan"], r"--lr: 'nan' is not a number"),
        (["--load", ""], r"--load: '' is not a path"),
        (["--num-layer-list", "4,,4"], r"--num-layer-list: '' is not an integer"),
        (
            ["--normalization", "RMS"],
            r"--normalization: 'RMS' is not one of RMSNorm, LayerNorm; did you mean RMSNorm\?",
        ),
        (["--num-layers", "5"], r"hidden_size \(64\) is no multiple of num_layers"),
    ],
)
def test_mistakes_name_the_flag_and_what_is_valid(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(*argv)


def test_required_flags_are_named() -> None:
    with pytest.raises(UsageError, match=r"^missing --num-layers$"):
        parse(Run, [], prog="ml-train pretrain")


def test_help_shows_groups_documentation_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Run, ["--help"], prog="ml-train pretrain")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "One run" in shown
    assert "Model: --num-layers INT Number of layers. (required)" in shown
    assert "stream, in 100% of the layers. (default: 64)" in shown
    assert "--normalization {RMSNorm,LayerNorm}" in shown
    assert "--no-add-bias-linear, --disable-bias-linear Biases in linear layers. (default: on)" in (
        shown
    )
    assert "--num-layer-list INT [INT ...]" in shown
    assert "--weights FLOAT [FLOAT ...] (default: 0.5 0.5)" in shown
    assert "--target-expert-parallel-size INT (default: 2)" in shown
    assert "--lr FLOAT Learning rate. (default: 1e-05)" in shown


def test_inherited_fields_keep_their_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Deep(Model):
        depth: int = 3
        """How deep."""

    with pytest.raises(SystemExit):
        parse(Deep, ["--help"], prog="x")
    shown = capsys.readouterr().out
    assert "Number of layers." in shown
    assert "How deep." in shown


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Run, ["--version"], prog="ml-models something")
    assert capsys.readouterr().out.startswith("ml-models 1.")


def test_a_type_that_no_flag_can_have_is_our_mistake() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong:
        table: dict[str, int]

    with pytest.raises(TypeError, match="no flag can be a dict"):
        parse(Wrong, [], prog="x")


def test_help_imports_neither_torch_nor_yaml_and_is_quick() -> None:
    # 100 flags, as many as a training command has
    script = """
import dataclasses, sys, time
from ml_models.flags import parse
fields = [(f"flag_{i}", int, dataclasses.field(default=i)) for i in range(100)]
Config = dataclasses.make_dataclass("Config", fields, frozen=True, kw_only=True)
try:
    parse(Config, ["--help"], prog="x")
except SystemExit:
    pass
heavy = {"torch", "yaml", "numpy", "megatron", "importlib.metadata"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else time.process_time() > 0.5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--flag-99 INT" in done.stdout
