"""The quickstart: everything it leaves behind, what it has to reach, and how it fails."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.image import imread

from ml_train.history import Evaluation, History, Start
from ml_train.throughput import StepMetrics

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "tools" / "quickstart.py"
STEP = [field.name for field in dataclasses.fields(StepMetrics)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run it; returns its directory and what it printed."""
    output = tmp_path_factory.mktemp("quickstart") / "run"
    done = subprocess.run(
        [sys.executable, QUICKSTART, "--output", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return output, done.stdout


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_has_every_step_once(run: tuple[Path, str]) -> None:
    output, printed = run
    lines = (output / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["iteration"] for e in entries if e["kind"] == "step"] == list(range(1, 321))
    first, second = (e["iteration"] for e in entries if e["kind"] == "run")
    assert first == 0
    assert 160 <= second < 320
    assert f"stopped by SIGTERM after step {second}" in printed


@pytest.mark.slow
def test_every_command_is_shown_as_a_shell_reads_it(run: tuple[Path, str]) -> None:
    output, printed = run
    commands = (output / "commands.txt").read_text().strip().split("\n\n")
    starts = [" ".join(command.split()[:2]) for command in commands]
    assert starts[1:4] == ["ml-data pretrain", "ml-train pretrain", "ml-train pretrain"]
    assert starts[4][:10] == "ml-convert"
    assert starts[6:] == ["ml-eval generate", "ml-train report"]
    for command in commands:
        assert f"$ {command}\n" in printed


@pytest.mark.slow
def test_the_model_is_a_hugging_face_model(run: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run[0] / "huggingface")
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == 32000
    assert (run[0] / "huggingface" / "tokenizer.model").is_file()
    logits, loss = (run[0] / "check.txt").read_text().splitlines()
    assert float(re.findall(r"off by (\S+)", logits)[0]) <= 1e-4
    theirs, ours = re.findall(r"(\S+) in ", loss)
    assert abs(float(theirs) - float(ours)) <= 0.02


@pytest.mark.slow
def test_the_report_shows_the_run(run: tuple[Path, str]) -> None:
    report = run[0] / "report"
    pixels = imread(report / "loss.png")
    assert pixels[..., :3].std() > 0.02  # not blank
    page = (report / "index.html").read_text()
    sample = (run[0] / "sample.txt").read_text()
    assert len(sample.split()) > 4
    # The text is the documentation inside this Python: its size differs from release to release.
    corpus = json.loads((run[0] / "data" / "python-docs_text_document.json").read_text())
    tokens, entropy = f"{corpus['tokens']:,}", f"{corpus['unigram_entropy']:.3f}"
    for expected in ("11,143,424", "327,680", tokens, entropy, "MFU", "ml-convert --load-dir"):
        assert expected in page, expected
    assert "Done in" in run[1]


@pytest.mark.slow
def test_it_learns_more_than_how_often_each_token_comes(run: tuple[Path, str]) -> None:
    entries = map(json.loads, (run[0] / "checkpoints" / "metrics.jsonl").read_text().splitlines())
    *_, loss = (entry["loss"] for entry in entries if entry["kind"] == "evaluation")
    corpus = json.loads((run[0] / "data" / "python-docs_text_document.json").read_text())
    assert loss < corpus["unigram_entropy"] - 0.5


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("assets", "shell"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_another_model_is_not_taken_for_the_trained_one(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    exported = tmp_path / "huggingface"
    shutil.copytree(run[0] / "huggingface", exported)
    weights = load_file(exported / "model.safetensors")
    name = "model.layers.2.self_attn.q_proj.weight"
    weights[name] = weights[name] + 0.01 * torch.randn(weights[name].shape).to(weights[name].dtype)
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    commands = (run[0] / "commands.txt").read_text().split("\n\n")
    (command,) = (command for command in commands if "check_export.py" in command)
    _, script, _, *flags = shlex.split(command.replace("\\\n", ""))
    words = [sys.executable, script, str(exported), *flags]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(r"logits: NOT EQUAL, .* \(allowed: 1e-04\)", done.stdout)


def history(
    losses: list[float], *, starts: tuple[int, ...] = (0, 2), final: float = 1.0
) -> History:
    """A run of these losses, and of a validation loss at its end."""
    steps = [
        StepMetrics(**{**dict.fromkeys(STEP, 1), "iteration": i, "loss": loss, "train_iters": 4})
        for i, loss in enumerate(losses, start=1)
    ]
    return History(
        starts=tuple(Start(iteration=start, facts={}) for start in starts),
        steps=tuple(steps),
        evaluations=(Evaluation(iteration=4, loss=final, perplexity=math.exp(final)),),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"final": 1.51}, r"the validation loss ended at 1\.510, above 1\.500"),
        ({"final": math.nan}, "the validation loss ended at nan"),
        ({"losses": [9.0, 8.0, 7.0]}, r"the steps of the run are \[1, 2, 3\], not 1 to 4 once"),
        ({"starts": (0,)}, r"after steps \[0\]: it was not resumed once"),
        ({"starts": (0, 4)}, "it was not resumed once"),
    ],
)
def test_a_run_that_is_not_what_it_should_be_fails(
    quickstart: ModuleType, given: dict[str, Any], message: str
) -> None:
    good = {"losses": [9.0, 8.0, 7.0, 6.0]}
    corpus = argparse.Namespace(unigram_entropy=2.0)
    quickstart.check(history(**good), corpus)
    with pytest.raises(quickstart.QuickstartError, match=message):
        quickstart.check(history(**good | given), corpus)


def test_only_its_own_output_is_replaced(quickstart: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(quickstart.QuickstartError, match="holds something else"):
        quickstart.claim(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    own = tmp_path / "own"
    quickstart.claim(own)
    (own / "old").touch()
    quickstart.claim(own)
    assert [path.name for path in own.iterdir()] == [quickstart.MARKER]


@pytest.mark.usefixtures("quickstart")
def test_a_command_is_wrapped_so_that_a_shell_reads_the_same_words() -> None:
    words = ["printf", "%s|", "--title", "it's a $HOME", "--empty", "", *["--flag"] * 30, "中 文"]
    line = sys.modules["shell"].wrap(words)
    assert line.count("\n") > 1
    assert max(map(len, line.splitlines())) <= 96 + len(" \\")
    shown = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert shown == "".join(f"{word}|" for word in words[2:])


def test_output_is_kept_and_shown_with_errors_after_it(
    quickstart: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    shell = quickstart.Shell(quickstart.console, tmp_path / "log")
    code = "import sys; print('x', end=''); sys.stdout.flush(); print('why', file=sys.stderr)"
    shell.run("python", "-c", code, keep=tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "x"
    shown = capfdbinary.readouterr()
    assert shown.out.endswith(b"x")
    assert shown.err == b"why\n"


def test_a_command_that_fails_ends_the_run(quickstart: ModuleType, tmp_path: Path) -> None:
    shell = quickstart.Shell(quickstart.console, tmp_path / "log")
    with pytest.raises(quickstart.CommandError, match=r"`python -c \.\.\.` .* exit code 3"):
        shell.run("python", "-c", "raise SystemExit(3)")
