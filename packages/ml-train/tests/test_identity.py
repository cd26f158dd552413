"""The flags by which a run is known: to its other ranks, and in its checkpoints."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

from ml_models.flags import UsageError, parse
from ml_parallel import testing
from ml_train.config import PretrainConfig, check_world
from ml_train.identity import differences, of_command, of_run
from ml_train.pretrain import _check_same_flags

FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64 "
    "--vocab-size 100 --train-iters 8 --seq-length 32 --data-path x --lr 1e-3"
)


def config(more: str = "") -> PretrainConfig:
    flags = parse(PretrainConfig, [*FLAGS.split(), *more.split()], prog="test")
    return check_world(flags, 1)


def changed(of, more: str, before: str = "") -> list[str]:
    found = differences(of(config(before)), of(config(more)))
    return [f"{flag} {old} -> {new}" for flag, old, new in found]


def test_every_flag_of_model_and_training_has_to_be_the_same_on_all_ranks() -> None:
    assert changed(of_command, "--lr 2e-3 --seed 5 --num-attention-heads 8 --split 1,1") == [
        "--num-attention-heads 4 -> 8",
        "--num-query-groups 4 -> 8",
        "--kv-channels 16 -> 8",
        "--seed 1234 -> 5",
        "--split 969.0 30.0 1.0 -> 1.0 1.0",
        "--lr 0.001 -> 0.002",
    ]
    assert changed(of_command, "--save a --bf16") == ["--bf16 off -> on", "--save not given -> a"]


def test_a_node_may_have_its_own_place_log_and_tokenizer() -> None:
    own = "--node-rank 1 --nnodes 2 --master-addr there --metrics-file m --log-interval 9"
    assert changed(of_command, f"{own} --distributed-backend nccl") == []
    assert changed(of_command, "--tokenizer-name-or-path here") == []


def test_the_rest_of_a_run_follows_from_schedule_data_and_optimizer() -> None:
    assert changed(of_run, "--lr 2e-3 --clip-grad 2 --data-path y --hidden-dropout 0.1") == [
        "--data-path x -> y",
        "--hidden-dropout 0.0 -> 0.1",
        "--clip-grad 1.0 -> 2.0",
        "--lr 0.001 -> 0.002",
    ]
    assert changed(of_run, "--micro-batch-size 1 --data-cache-path c --save s --eval-iters 9") == []


def test_the_length_of_a_run_counts_where_something_follows_from_it() -> None:
    longer = "--train-iters 9"
    decay = "--lr-decay-iters (by default --train-iters) 8 -> 9"
    assert changed(of_run, longer) == [decay]
    assert changed(of_run, f"{longer} --lr-decay-iters 8") == []
    constant = "--lr-decay-style constant"
    assert changed(of_run, f"{longer} {constant}", before=constant) == []
    fraction = f"{constant} --lr-warmup-fraction 0.1"
    assert changed(of_run, f"{longer} {fraction}", before=fraction) == [decay]
    instructions = f"{constant} --is-instruction-dataset"
    assert changed(of_run, f"{longer} {instructions}", before=instructions) == [
        "--train-iters 8 -> 9"
    ]


def test_flags_that_only_one_of_them_knows_are_not_compared() -> None:
    assert differences({"lr": 1.0, "gone": 2}, {"lr": 1.0, "new": 3}) == []


def started(configs: list[PretrainConfig]) -> str:
    import torch

    try:
        _check_same_flags(configs[torch.distributed.get_rank()])
    except UsageError as error:
        return str(error)
    return "all alike"


def test_ranks_that_were_started_with_other_flags_are_refused_everywhere() -> None:
    one, other = config(), config("--lr 2e-3 --seed 5")
    same = dataclasses.replace(one)
    assert testing.run_ranks(started, 2, [one, same]) == ["all alike"] * 2
    first, second = testing.run_ranks(started, 2, [one, other])
    assert first == second
    assert first.startswith("rank 1 (on ")
    assert first.endswith(
        "): --seed 5 instead of 1234; --lr 0.002 instead of 0.001; give the same command on every "
        "node"
    )


def test_it_needs_no_torch() -> None:
    script = "import sys, ml_train.identity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
