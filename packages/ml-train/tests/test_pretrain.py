"""`ml-train pretrain` as a user runs it: real processes, real signals, real files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from pretrain_job import (
    assert_one_line,
    copied,
    flags,
    predictable_corpus,
    run,
    started,
    steps,
    wait_for_step,
    weights,
)

from ml_train.cli import main


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return predictable_corpus(tmp_path_factory.mktemp("data"))


# Training


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Return a finished run on two ranks, and where it wrote."""
    root = tmp_path_factory.mktemp("trained")
    words = flags(
        corpus,
        nproc_per_node=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        train_iters=20,
        eval_interval=10,
        eval_iters=2,
        save=root / "checkpoints",
        save_interval=5,
        keep_last=2,
        tensorboard_dir=root / "tensorboard",
        log_throughput=True,
    )
    nowhere = root / "current directory"
    nowhere.mkdir()
    for module in ("rich", "torch", "yaml"):
        (nowhere / f"{module}.py").write_text("raise ImportError('found in the current directory')")
    return run(words, cwd=nowhere), root


def test_it_learns_and_reports_megatrons_line_for_every_step(trained):
    process, root = trained
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if re.match(r" ?iteration ", line)]
    assert len(lines) == 20
    for field in (
        "consumed samples",
        "elapsed time per iteration (ms)",
        "learning rate",
        "global batch size",
        "lm loss",
        "loss scale",
        "grad norm",
        "number of skipped iterations",
        "number of nan iterations",
    ):
        assert all(f"{field}: " in line for line in lines), field
    losses = [step["loss"] for step in steps(root / "checkpoints" / "metrics.jsonl")]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5


def test_no_rank_imports_from_the_current_directory(trained):
    assert trained[0].returncode == 0, trained[0].stderr
    assert "current directory" not in trained[0].stderr


def test_every_step_says_how_fast_it_was(trained):
    _, root = trained
    for step in steps(root / "checkpoints" / "metrics.jsonl"):
        tokens = step["global_batch_size"] * 32
        expected = tokens / (2 * step["elapsed_seconds"])
        assert step["tokens_per_second_per_device"] == pytest.approx(expected)
        assert 0 < step["mfu"] < 1


def test_it_evaluates_and_writes_tensorboard_scalars(trained):
    process, root = trained
    entries = [
        json.loads(line)
        for line in (root / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    ]
    evaluations = [entry for entry in entries if entry["kind"] == "evaluation"]
    assert [entry["iteration"] for entry in evaluations] == [10, 20]
    assert evaluations[1]["loss"] < evaluations[0]["loss"]
    (events,) = (root / "tensorboard").iterdir()
    assert b"lm loss" in events.read_bytes()
    assert "validation" in process.stdout


def test_it_keeps_the_newest_checkpoints(trained):
    _, root = trained
    names = sorted(path.name for path in (root / "checkpoints").glob("iter_*"))
    assert names == ["iter_0000015", "iter_0000020"]


RESUMABLE = {"attention_dropout": 0.1, "hidden_dropout": 0.1, "train_iters": 40, "bf16": True}


@pytest.mark.slow
def test_a_run_that_signals_stop_twice_ends_bit_for_bit_like_one_left_alone(corpus, tmp_path):
    layout = {"nproc_per_node": 2, "use_distributed_optimizer": True, **RESUMABLE}
    golden, stopped = tmp_path / "golden", tmp_path / "stopped"
    assert run(flags(corpus, save=golden, **layout)).returncode == 0
    words = flags(corpus, save=stopped, load=stopped, **layout)
    for number, step in ((signal.SIGTERM, 5), (signal.SIGINT, 15)):
        with started(words) as process:
            wait_for_step(process, step)
            process.send_signal(number)
            rest, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert f"stopped by {number.name}" in rest
        done = len(steps(stopped / "metrics.jsonl"))
        assert step <= done < 40
        assert (stopped / "latest_checkpointed_iteration.txt").read_text() == str(done)
    assert run(words).returncode == 0
    columns = ("iteration", "loss", "grad_norm", "learning_rate", "consumed_samples")
    curves = [
        [[step[name] for name in columns] for step in steps(root / "metrics.jsonl")]
        for root in (golden, stopped)
    ]
    assert curves[0] == curves[1]
    final = [weights(root / "iter_0000040") for root in (golden, stopped)]
    assert final[0].keys() == final[1].keys()
    assert all(torch.equal(tensor, final[1][name]) for name, tensor in final[0].items())


@pytest.mark.slow
def test_it_resumes_in_another_layout(trained, corpus, tmp_path):
    save = copied(trained[1] / "checkpoints", tmp_path)
    layout = {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}
    process = run(flags(corpus, save=save, load=save, train_iters=22, **layout))
    assert process.returncode == 0, process.stderr
    assert [step["iteration"] for step in steps(save / "metrics.jsonl")] == [*range(1, 23)]
    assert (save / "iter_0000022" / "mp_rank_00_001").is_dir()


@pytest.mark.slow
def test_it_runs_under_torchrun(corpus, tmp_path):
    words = flags(corpus, train_iters=2, metrics_file=tmp_path / "metrics.jsonl")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "ml_train", "pretrain", *words],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert len(steps(tmp_path / "metrics.jsonl")) == 2


def test_a_config_file_gives_the_flags_and_the_command_line_wins(corpus, tmp_path):
    words = flags(corpus, train_iters=None, lr=None)
    (tmp_path / "run.yaml").write_text("training:\n  train_iters: 9\nlearning_rate:\n  lr: 1e-3\n")
    metrics = tmp_path / "metrics.jsonl"
    words += ["--config", str(tmp_path / "run.yaml"), "--train-iters", "1"]
    process = run([*words, "--metrics-file", str(metrics)])
    assert process.returncode == 0, process.stderr
    (step,) = steps(metrics)
    assert step["train_iters"] == 1
    assert step["learning_rate"] == pytest.approx(1e-3)


# Checkpoints that cannot be used


def test_a_checkpoint_of_another_model_is_refused(trained, corpus):
    process = run(flags(corpus, load=trained[1] / "checkpoints", num_layers=3))
    assert process.returncode == 2
    assert_one_line(process.stderr, "it is of another model", "--num-layers is 2 there, 3 here")


def test_a_tampered_checkpoint_is_reported_and_the_one_before_is_used(trained, corpus, tmp_path):
    save = copied(trained[1] / "checkpoints", tmp_path)
    victim = save / "iter_0000020" / "mp_rank_01" / "model_optim_rng.pt"
    content = bytearray(victim.read_bytes())
    content[-200] ^= 255
    victim.write_bytes(content)
    process = run(flags(corpus, save=save, load=save, train_iters=20))
    assert process.returncode == 0, process.stderr
    assert_one_line(process.stderr, "skipped a damaged checkpoint", "iter_0000020")
    assert [step["iteration"] for step in steps(save / "metrics.jsonl")] == [*range(1, 21)]
    assert " iteration       16/" in process.stdout
    assert " iteration       15/" not in process.stdout


# Flags that are refused before any work starts


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_layers": None}, ["missing --num-layers"]),
        ({"lr": None, "train_iters": None}, ["missing --train-iters, --lr"]),
        ({"lr": "fast"}, ["--lr", "fast"]),
        ({"hidden_size": 30}, ["--hidden-size 30", "nearest: 28 or 32"]),
        ({"tensor_model_parallel_size": 3}, ["--tensor-model-parallel-size 3", "valid"]),
        ({"pipeline_model_parallel_size": 2}, ["--pipeline-model-parallel-size 2", "1"]),
        (
            {"pipeline_model_parallel_size": 3, "nproc_per_node": 3},
            ["--pipeline-model-parallel-size 3", "--num-layers 2", "valid: 1, 2"],
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layer_list": "2,1", "nproc_per_node": 2},
            ["--num-layer-list 2,1", "--num-layers 2"],
        ),
        ({"global_batch_size": 7}, ["--global-batch-size 7", "nearest: 6 or 8"]),
        ({"seq_length": 65}, ["--seq-length 65", "--max-position-embeddings 64"]),
        ({"bf16": True, "fp16": True}, ["--bf16 and --fp16"]),
        ({"vocab_size": 50}, ["--vocab-size 50", "97 tokens"]),
        ({"padded_vocab_size": 90}, ["--padded-vocab-size 90", "97"]),
        ({"save_interval": 5}, ["--save-interval needs --save"]),
        ({"load": "no/checkpoints"}, ["--load no/checkpoints: holds no checkpoint"]),
        ({"seed": -1}, ["--seed -1", "4294967295"]),
        ({"eval_iters": 2, "split": "1"}, ["--eval-iters 2", "no validation data"]),
        (
            {"data_path": None, "train_data_path": "x", "valid_data_path": "x"},
            ["--valid-data-path needs --eval-iters"],
        ),
        (
            {"data_path": None, "train_data_path": "x", "test_data_path": "x"},
            ["--test-data-path needs --eval-iters"],
        ),
        ({"hysteresis": 0}, ["--hysteresis 0: must be at least 1"]),
        ({"weight_decay": "inf"}, ["--weight-decay"]),
        ({"context_parallel_size": 2, "nproc_per_node": 2}, ["--context-parallel-size 2"]),
        (
            {"expert_model_parallel_size": 2, "nproc_per_node": 2},
            ["--expert-model-parallel-size 2", "no experts"],
        ),
        (
            {"num_experts": 6, "expert_model_parallel_size": 4, "nproc_per_node": 4},
            ["--expert-model-parallel-size 4", "--num-experts 6", "valid: 1, 2, 3, 6"],
        ),
        (
            {"num_experts": 4, "expert_model_parallel_size": 4, "nproc_per_node": 2},
            ["--expert-model-parallel-size 4", "2 data and context parallel ranks", "1 or 2"],
        ),
        (
            {"num_experts": 4, "tensor_model_parallel_size": 2, "nproc_per_node": 2},
            ["--tensor-model-parallel-size 2", "--num-experts 4", "--sequence-parallel"],
        ),
        ({"device": "npu"}, ["--device npu cannot be used", "torch_npu"]),
        ({"data_path": "nowhere/text_document"}, ["nowhere/text_document"]),
        ({"seq_lenght": 3}, ["unknown flag --seq-lenght", "did you mean --seq-length?"]),
        ({"lr_warmup_iters": 8}, ["--lr-warmup-iters 8", "--train-iters 8"]),
        ({"tokenizer_name_or_path": "no/tokenizer"}, ["no/tokenizer"]),
        ({"moe_router_topk": 2}, ["--moe-router-topk 2: means nothing without --num-experts"]),
        (
            {"tokenizer_type": "Llama2Tokenizer"},
            ["--tokenizer-type Llama2Tokenizer: means nothing without --tokenizer-name-or-path"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_flag_is_refused_with_one_line(corpus, capsys, changes, parts):
    assert main(["pretrain", *flags(corpus, **changes)]) == 2
    errors = capsys.readouterr().err
    assert_one_line(errors, *parts)


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"split": "9999,1,0", "eval_iters": 1}, ["0 documents for validation", "--split 9999,1"]),
        ({"data_cache_path": __file__}, [f"--data-cache-path {__file__}: ", "not a directory"]),
    ],
)
def test_wrong_data_are_found_before_a_rank_starts(
    corpus, capsys, monkeypatch, nproc, changes, parts
):
    for begin in ("_rank", "launch"):
        monkeypatch.delattr(f"ml_train.pretrain.{begin}")
    assert main(["pretrain", *flags(corpus, nproc_per_node=nproc, **changes)]) == 2
    assert_one_line(capsys.readouterr().err, *parts)


@pytest.mark.parametrize(
    ("environment", "changes", "parts"),
    [
        ({"WORLD_SIZE": "x"}, {}, ["WORLD_SIZE=x in the environment: must be an integer"]),
        ({"RANK": "3", "WORLD_SIZE": "2"}, {}, ["RANK=3", "from 0 to 1 with WORLD_SIZE=2"]),
        ({"WORLD_SIZE": "3"}, {"nproc_per_node": 2}, ["--nproc-per-node 2", "WORLD_SIZE=3"]),
    ],
)
def test_a_launcher_that_cannot_be_right_is_one_line(
    corpus, capsys, monkeypatch, environment, changes, parts
):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    assert main(["pretrain", *flags(corpus, **changes)]) == 2
    assert_one_line(capsys.readouterr().err, *parts)


def test_a_new_run_does_not_overwrite_an_older_one(trained, corpus, capsys):
    _, root = trained
    save = root / "checkpoints"
    assert main(["pretrain", *flags(corpus, save=save)]) == 2
    assert_one_line(capsys.readouterr().err, f"--save {save}", f"--load {save}")


def test_the_batch_of_the_checkpoint_is_kept_on_other_ranks(trained, corpus):
    from ml_models.flags import parse
    from ml_train.config import PretrainConfig, check_world

    _, root = trained
    words = flags(corpus, load=root / "checkpoints", global_batch_size=None)
    for world_size in (1, 2, 4):
        config = check_world(parse(PretrainConfig, words, prog="test"), world_size)
        assert config.training.global_batch_size == 8


def test_a_port_in_use_is_named(corpus, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["pretrain", *flags(corpus, nproc_per_node=2, master_port=port)]) == 2
    assert_one_line(capsys.readouterr().err, f"--master-port {port}")
