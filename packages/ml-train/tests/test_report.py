"""The report of a run that a real reporter wrote down: its numbers, its picture, its mistakes."""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path

import pytest
from token_files import describe, write_corpus

from ml_models import flags
from ml_parallel import platform
from ml_train.cli import main
from ml_train.config import PretrainConfig, check_world

platform.import_engine()

from ml_train.metrics import Reporter  # noqa: E402
from ml_train.state import Progress  # noqa: E402
from ml_train.step import StepResult  # noqa: E402

FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64 "
    "--vocab-size 100 --train-iters 8 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 "
    "--tensor-model-parallel-size 2 --untie-embeddings-and-output-weights --data-path x --lr 1e-3"
)
# Embedding and output 2 * 100 h, final norm 2 h; a layer: norms 4 h, attention 4 h^2 + 4 h, MLP
# 8 h^2 + 5 h.
PARAMETERS = 200 * 64 + 2 * 64 + 2 * (12 * 64**2 + 13 * 64)


def train(path: Path, first: int, last: int, more: str = "") -> None:
    """Report a run of two ranks from step `first` to `last`, and an evaluation after it."""
    argv = [*FLAGS.split(), *more.split(), "--metrics-file", str(path)]
    config = check_world(flags.parse(PretrainConfig, argv, prog="test"), 2)
    reporter = Reporter(
        config,
        platform.Device(type="cpu", index=0),
        active=True,
        world_size=2,
        padded_vocab_size=256,
        iteration=first - 1,
        stream=io.StringIO(),
    )
    with reporter:
        for iteration in range(first, last + 1):
            reporter.step(
                Progress(
                    iteration=iteration,
                    consumed_samples=8 * iteration,
                    consumed_tokens=256 * iteration,
                ),
                StepResult(9.0 - iteration, 1.0, True, False, filled=1.0, keys=32.0),
                learning_rate=1e-4 * iteration,
                loss_scale=1.0,
                elapsed_seconds=0.5,
            )
        reporter.evaluation(last, 1.25)


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metrics of a run that was resumed."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    train(path, 1, 5)
    train(path, 6, 8)
    return path


def report(*argv: object) -> int:
    return main(["report", *map(str, argv)])


def test_the_page_says_what_the_run_was(
    metrics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = describe(
        write_corpus(tmp_path / "corpus", [300, 700]),
        unigram_entropy=4.5,
        documents=2,
        tokens=1000,
    )
    sample = tmp_path / "a-sample.txt"
    sample.write_text("if a < b: return <pad> & 中文", encoding="utf-8")
    out = tmp_path / "deep" / "report"
    argv = ("--metrics-file", metrics, "--output", out, "--data-path", corpus)
    assert report(*argv, "--title", "<My> run", "--attach", sample) == 0
    assert capsys.readouterr().out == f"wrote {out / 'index.html'}\nwrote {out / 'loss.png'}\n"
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<title>&lt;My&gt; run</title>" in page
    assert "<My>" not in page
    text = html.unescape(re.sub(r"<[^>]*>", "|", page))
    for expected in (
        "8 steps on 2 devices (cpu)",
        "|training loss||4.500|",  # mean of 8, 7, ... 1
        "|validation loss||1.250||perplexity 3.5",
        "|below unigram entropy||3.250|",
        "|tokens||2,048||8 steps of 8 samples|",
        "|tokens/s/device||256||4.0 s in steps|",  # 8 * 32 / 2 ranks / 0.5 s
        f"|parameters||{PARAMETERS:,}|",
        "|layout||TP 2, DP 1|",
        "|stopped and resumed||after step 5|",
        "|epochs||2.05|",
        "|megatron-core||0.16.",
        "|a sample||if a < b: return <pad> & 中文|",
    ):
        assert expected in text, expected


def test_the_page_says_which_experts_there_are(tmp_path: Path) -> None:
    experts = (
        "--tensor-model-parallel-size 1 --expert-model-parallel-size 2 --disable-bias-linear "
        "--swiglu --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 "
        "--n-shared-experts 3 --moe-layer-freq 0,1 --ffn-hidden-size 96"
    )
    train(tmp_path / "metrics.jsonl", 1, 2, experts)
    assert report("--metrics-file", tmp_path / "metrics.jsonl", "--output", tmp_path) == 0
    text = html.unescape(re.sub(r"<[^>]*>", "|", (tmp_path / "index.html").read_text()))
    # As above without biases, but one MLP 96 wide and one layer of a router, 4 + 3 experts.
    common = 200 * 64 + 2 * 64 + 2 * (4 * 64**2 + 4 * 64) + 3 * 64 * 96 + 4 * 64
    for expected in (
        f"|parameters||{common + 7 * 3 * 64 * 16:,}|",
        f"|active per token||{common + 5 * 3 * 64 * 16:,}|",
        "|MLP||96 wide, SwiGLU|",
        "|experts||2 of 4 experts, 16 wide, SwiGLU, in 1 layer|",
        "|shared experts||48 wide|",
        "|layout||EP 2, DP 2|",
    ):
        assert expected in text, expected


def test_the_page_holds_the_picture(metrics: Path, tmp_path: Path) -> None:
    assert report("--metrics-file", metrics, "--output", tmp_path) == 0
    page, picture = (tmp_path / "index.html").read_text(), (tmp_path / "loss.png").read_bytes()
    (embedded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(embedded) == picture
    assert picture.startswith(b"\x89PNG")
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs other files"
    assert "unigram" not in page


def test_a_report_can_be_made_while_the_run_goes_on(metrics: Path, tmp_path: Path) -> None:
    lines = metrics.read_bytes().splitlines(keepends=True)
    running = tmp_path / "metrics.jsonl"
    running.write_bytes(b"".join(lines[:4]) + b'{"kind":')
    assert report("--metrics-file", running, "--output", tmp_path) == 0
    assert "8 steps, 3 done on 2 devices" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--metrics-file", "nowhere"), "--metrics-file nowhere: No such file or directory"),
        (("--data-path", "nowhere"), "--data-path nowhere: there is no nowhere.json, which"),
        (("--attach", "nowhere"), "--attach nowhere: No such file or directory"),
        (("--atach", "nowhere"), "--atach; did you mean --attach?"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    metrics: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    message: str,
) -> None:
    assert report("--metrics-file", metrics, "--output", tmp_path / "out", *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("ml-train report: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["file", "file/out"])
def test_a_directory_that_cannot_be_made_is_refused(
    metrics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert report("--metrics-file", metrics, "--output", tmp_path / output) == 2
    message = f"--output {tmp_path / output}: {file} is not a directory; name another place"
    assert capsys.readouterr().err == f"ml-train report: {message}\n"
