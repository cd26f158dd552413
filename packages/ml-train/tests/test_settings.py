"""The flags of data, learning rate and log say what is wrong with them before any work starts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ml_models import flags
from ml_train.settings import Blend, DataConfig, IgnoredFlags, LearningRate, LogConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run."""

    data: DataConfig
    learning_rate: LearningRate
    log: LogConfig


def parse(*argv: str) -> Run:
    return flags.parse(Run, [*argv], prog="ml-train test")


def refused(*argv: str) -> str:
    with pytest.raises(flags.UsageError) as caught:
        parse(*argv)
    return str(caught.value)


def test_importing_them_loads_neither_torch_nor_numpy() -> None:
    script = "import sys, ml_train.settings; sys.exit(str({'torch', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_the_flags_have_megatrons_names() -> None:
    run = parse(
        *("--data-path", "0.3", "a", "0.7", "b", "--split", "90,10", "--data-cache-path", "cache"),
        *("--eod-mask-loss", "--lr", "1e-4", "--lr-decay-style", "cosine", "--min-lr", "1e-5"),
        *("--lr-decay-iters", "90", "--lr-warmup-fraction", "0.1", "--log-interval", "5"),
        *("--log-throughput", "--tensorboard-dir", "tb"),
    )
    assert run.data.split == (90.0, 10.0)
    assert run.data.eod_mask_loss
    assert run.learning_rate.warmup_iters(100) == 9.0
    assert run.log == LogConfig(log_interval=5, log_throughput=True, tensorboard_dir=Path("tb"))


def test_one_prefix_is_one_corpus_for_all_splits() -> None:
    data = DataConfig(data_path=("a",))
    assert data.blends == (Blend(("a",), None),) * 3
    assert data.shares == (0.969, 0.03, 0.001)


def test_prefixes_follow_their_weights() -> None:
    data = DataConfig(data_path=("3", "a", "7", "b"))
    assert data.blends[0] == Blend(("a", "b"), (3.0, 7.0))


def test_several_prefixes_need_no_weights() -> None:
    assert DataConfig(data_path=("a", "b", "c")).blends[0] == Blend(("a", "b", "c"), None)


def test_each_split_can_have_corpora_of_its_own() -> None:
    data = DataConfig(train_data_path=("a", "b"), test_data_path=("1", "b"))
    assert data.blends == (Blend(("a", "b"), None), None, Blend(("b",), (1.0,)))
    assert data.prefixes == ("a", "b")
    assert data.shares == (1.0, 1.0, 1.0)


def test_missing_shares_are_zero() -> None:
    assert DataConfig(data_path=("a",), split=(2.0,)).shares == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("words", ["0.3 a b", "a 0.3", "0.3", "a 0.3 b 0.7", "0.3 0.7 a b"])
def test_weights_without_their_prefixes_are_refused(words: str) -> None:
    message = refused("--lr", "1", "--data-path", *words.split())
    assert message == (
        f"--data-path {words}: give each prefix after its weight (0.3 A 0.7 B), or prefixes only"
    )


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan"])
def test_weights_are_positive_numbers(weight: str) -> None:
    message = refused("--lr", "1", f"--data-path={weight},a,1,b")
    assert message == f"--data-path {weight} a 1 b: weight {weight} must be greater than 0"


@pytest.mark.parametrize(
    ("flags_", "message"),
    [
        ("", "missing --data-path (or --train-data-path): what to train on"),
        ("--valid-data-path a", "missing --data-path (or --train-data-path): what to train on"),
        (
            "--data-path a --train-data-path b",
            "--data-path excludes --train-data-path and its kin: give one of them",
        ),
        ("--data-path a --split 0,0,0", "--split 0,0,0: the first share, that of training, must"),
        ("--data-path a --split 90,-1", "--split 90,-1: a share must be at least 0"),
        ("--data-path a --split inf", "--split inf: a share must be at least 0"),
        ("--data-path a --split 1,1,1,1", "--split 1,1,1,1: give one to three numbers"),
        ("--data-path a --split 90;10", "--split: '90;10' is not a number"),
        (
            "--data-path a --variable-seq-lengths",
            "--variable-seq-lengths needs --is-instruction-dataset: samples of pre-training data "
            "are all --seq-length long",
        ),
        (
            "--data-path a --is-instruction-dataset --eod-mask-loss",
            "--eod-mask-loss is for pre-training data: --is-instruction-dataset says itself what "
            "the loss sees",
        ),
    ],
)
def test_impossible_data_is_refused(flags_: str, message: str) -> None:
    assert refused("--lr", "1", *flags_.split()).startswith(message)


@pytest.mark.parametrize(
    ("flags_", "message"),
    [
        ("--lr 0", "--lr 0: must be greater than 0"),
        ("--lr inf", "--lr inf: must be greater than 0"),
        ("--lr 1e-4 --min-lr 1e-3", "--min-lr 0.001: must be from 0 to --lr 0.0001"),
        ("--lr 1 --lr-warmup-init 2", "--lr-warmup-init 2: must be from 0 to --lr 1"),
        ("--lr 1 --lr-warmup-iters -1", "--lr-warmup-iters -1: must be at least 0"),
        ("--lr 1 --lr-decay-iters 0", "--lr-decay-iters 0: must be at least 1"),
        ("--lr 1 --lr-warmup-fraction 1", "--lr-warmup-fraction 1: must be at least 0 and less"),
        (
            "--lr 1 --lr-warmup-fraction 0.1 --lr-warmup-iters 5",
            "--lr-warmup-fraction and --lr-warmup-iters exclude each other",
        ),
        ("--lr 1 --lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
        ("--lr 1 --lr-wsd-decay-iters 0", "--lr-wsd-decay-iters 0: must be at least 1"),
        (
            "--lr 1 --lr-wsd-decay-iters 2",
            "--lr-wsd-decay-iters 2: means nothing without --lr-decay-style WSD",
        ),
        ("--lr 1 --log-interval 0", "--log-interval 0: must be at least 1"),
    ],
)
def test_impossible_rates_and_intervals_are_refused(flags_: str, message: str) -> None:
    assert refused("--data-path", "a", *flags_.split()).startswith(message)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (LearningRate(lr=1, lr_warmup_iters=10), "--lr-warmup-iters 10: must be less than "
         "--train-iters 10"),
        (LearningRate(lr=1, lr_warmup_iters=5, lr_decay_iters=4), "--lr-warmup-iters 5: must be "
         "less than --lr-decay-iters 4"),
        (
            LearningRate(lr=1, lr_decay_style="WSD", lr_wsd_decay_iters=8, lr_warmup_iters=3),
            "--lr-wsd-decay-iters 8: must be at most --train-iters 10 minus the warm-up, 7",
        ),
    ],
)  # fmt: skip
def test_a_schedule_must_fit_the_run(schedule: LearningRate, message: str) -> None:
    with pytest.raises(ValueError, match="iters") as caught:
        schedule.check(train_iters=10)
    assert str(caught.value) == message


def test_a_schedule_that_fits_is_accepted() -> None:
    LearningRate(lr=1, lr_warmup_iters=9).check(train_iters=10)
    wsd = LearningRate(lr=1, lr_decay_style="WSD", lr_wsd_decay_iters=7, lr_warmup_iters=3)
    wsd.check(train_iters=10)


def test_switches_of_modellink_that_need_no_answer_are_named_as_ignored() -> None:
    given = {"use_flash_attn": True, "use_mcore_models": True, "use_fused_swiglu": False}
    assert IgnoredFlags(**given).given == ("--use-mcore-models", "--use-flash-attn")


@pytest.mark.parametrize(
    ("flags_", "message"),
    [
        ("--metrics-file {here}", "--metrics-file {here}: is a directory; name a file"),
        (
            "--metrics-file {here}/file/deep/m",
            "--metrics-file {here}/file/deep/m: {here}/file is not a directory; name another place",
        ),
        (
            "--tensorboard-dir {here}/file",
            "--tensorboard-dir {here}/file: {here}/file is not a directory; name another place",
        ),
    ],
)
def test_outputs_that_something_else_is_in_the_place_of_are_refused(
    tmp_path: Path, flags_: str, message: str
) -> None:
    (tmp_path / "file").touch()
    words = flags_.format(here=tmp_path).split()
    assert refused("--data-path", "a", "--lr", "1", *words) == message.format(here=tmp_path)
    parse("--data-path", "a", "--lr", "1", "--metrics-file", f"{tmp_path}/file")
    parse("--data-path", "a", "--lr", "1", "--tensorboard-dir", f"{tmp_path}/new/directory")


def test_metrics_lie_with_the_checkpoints_unless_placed() -> None:
    assert LogConfig().metrics_path(None) is None
    assert LogConfig().metrics_path(Path("out")) == Path("out/metrics.jsonl")
    assert LogConfig(metrics_file=Path("m")).metrics_path(Path("out")) == Path("m")
