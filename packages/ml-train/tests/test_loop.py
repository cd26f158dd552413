"""The loop of a run with real signals: when it stops, and what the next start makes up for."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import threading
from collections import Counter

import pytest
import torch
from token_files import describe, write_corpus
from training_job import LAYOUTS, UNTIED

from ml_models import flags
from ml_parallel.platform import Device
from ml_parallel.testing import RankFailedError, run_ranks
from ml_parallel.topology import Topology
from ml_train.config import PretrainConfig, check_world
from ml_train.settings import LearningRate
from ml_train.signals import StopRequest

FLAGS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --vocab-size 131 "
    "--ffn-hidden-size 160 --max-position-embeddings 64 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --seq-length 32 --global-batch-size 8 --train-iters 4 --lr 1e-3 "
    "--split 60,40,0"
)
ENDLESS = 50_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    prefix = write_corpus(tmp_path_factory.mktemp("data") / "text", [13] * 10)
    return describe(prefix, vocab_size=UNTIED.vocab_size)


def train(words, topology, signal_after=None):
    """Run the loop on this rank, with a SIGTERM to the last rank once it has done that step."""
    from ml_train.loop import Trainer

    config = flags.parse(PretrainConfig, words, prog="test")
    world_size = torch.distributed.get_world_size()
    config = check_world(dataclasses.replace(config, parallel=topology), world_size)
    trainer = Trainer(config, Device(type="cpu", index=0))
    over = threading.Event()

    def interrupt():
        while trainer.progress.iteration < signal_after:
            if over.wait(0.001):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest() as stop:
        stop.defer()
        if signal_after is not None and torch.distributed.get_rank() == world_size - 1:
            threading.Thread(target=interrupt).start()
        trainer.run(stop)
        over.set()
    return trainer.progress.iteration


def run(corpus, save, layout, *more, signal_after=None):
    """Return the last step of a run of these flags, and its file of metrics so far."""
    world_size, topology = LAYOUTS.get(layout, (1, Topology()))
    words = [*FLAGS.split(), "--data-path", corpus, "--save", str(save), "--load", str(save), *more]
    ranks = run_ranks(train, world_size, words, topology, signal_after, timeout=60)
    lines = (save / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return ranks[0], Counter((e["kind"], e["iteration"]) for e in entries if e["kind"] != "run")


def evaluate(interval, iters):
    return "--eval-interval", str(interval), "--eval-iters", str(iters)


def entries_of(save, kind):
    entries = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == kind]


def losses(save):
    entries = entries_of(save, "step") + entries_of(save, "evaluation")
    return {(entry["kind"], entry["iteration"]): entry["loss"] for entry in entries}


@pytest.mark.parametrize("layout", ["single", "tp2 sp", "pp2 vpp dp2 dist overlap"])
def test_an_interrupted_evaluation_is_made_up_for_by_the_next_start(corpus, tmp_path, layout):
    # Without a look at the signal it would take hours, and the time of run_ranks be over.
    iteration, entries = run(corpus, tmp_path, layout, *evaluate(2, ENDLESS), signal_after=2)
    assert iteration == 2
    assert entries == {("step", 1): 1, ("step", 2): 1}
    assert (tmp_path / "iter_0000002").is_dir()

    iteration, entries = run(corpus, tmp_path, layout, *evaluate(2, 1))
    assert iteration == 4
    steps = {("step", number): 1 for number in range(1, 5)}
    assert entries == {**steps, ("evaluation", 2): 1, ("evaluation", 4): 1}
    # The loss is that of the weights at that step, as in a run that nothing stopped.
    _, whole = run(corpus, tmp_path / "whole", layout, *evaluate(2, 1))
    assert whole == entries
    assert losses(tmp_path) == losses(tmp_path / "whole")


@pytest.mark.parametrize("interval", [4, 1000])
def test_an_evaluation_stopped_at_the_last_step_is_made_up_for_once(corpus, tmp_path, interval):
    run(corpus, tmp_path, "single", *evaluate(interval, ENDLESS), signal_after=4)
    assert ("evaluation", 4) not in losses(tmp_path)
    for _ in range(2):
        iteration, entries = run(corpus, tmp_path, "single", *evaluate(interval, 1))
        assert iteration == 4
        assert entries[("evaluation", 4)] == 1


@pytest.mark.parametrize(("interval", "after"), [(1000, [4]), (3, [3, 4]), (2, [2, 4])])
def test_an_evaluation_follows_the_last_step_once(corpus, tmp_path, interval, after):
    run(corpus, tmp_path, "single", *evaluate(interval, 1))
    assert [entry["iteration"] for entry in entries_of(tmp_path, "evaluation")] == after


def test_a_finished_run_says_that_there_is_nothing_to_do(corpus, tmp_path, capfd):
    run(corpus, tmp_path, "single", *evaluate(1000, 1))
    assert "nothing to do" not in capfd.readouterr().out
    for last in (4, 2):
        run(corpus, tmp_path, "single", *evaluate(1000, 1), "--train-iters", str(last))
        said = f"nothing to do: {tmp_path} is at step 4 of {last}\n"
        assert capfd.readouterr().out == said


def test_a_stopped_run_says_what_the_next_start_can_load(corpus, tmp_path, capfd):
    run(corpus, tmp_path, "single", *evaluate(2, ENDLESS), signal_after=2)
    assert f"after step 2; resume with --load {tmp_path}" in capfd.readouterr().out
    # Stopped once more, before any step, with nothing new to save.
    run(corpus, tmp_path, "single", *evaluate(2, ENDLESS), signal_after=2)
    out = capfd.readouterr().out
    assert f"after step 2; resume with --load {tmp_path}" in out
    assert "saved" not in out
    # A run that has no --save loses its steps, and does not point to where it began.
    words = [*FLAGS.split(), "--data-path", corpus, "--load", str(tmp_path)]
    run_ranks(train, 1, [*words, *evaluate(3, ENDLESS)], Topology(), 3, timeout=60)
    assert "after step 3; nothing was saved: --save is not given" in capfd.readouterr().out


def test_test_data_is_evaluated_once_after_the_last_step(corpus, capfd):
    words = [*FLAGS.replace("--split 60,40,0", "").split(), *evaluate(4, 2)]
    words += ["--train-data-path", corpus, "--valid-data-path", corpus]
    run_ranks(train, 1, words, Topology(), timeout=60)
    assert "test loss" not in capfd.readouterr().out
    run_ranks(train, 1, [*words, "--test-data-path", corpus], Topology(), timeout=60)
    printed = capfd.readouterr().out
    found = re.findall(r"(validation|test) loss at iteration 4 \| lm loss value: (\S+)", printed)
    assert [name for name, _ in found] == ["validation", "test"]
    assert found[0][1] == found[1][1]  # the same corpus, here


def test_a_stopped_run_does_not_evaluate_the_test_data(corpus, tmp_path, capfd):
    words = [*FLAGS.replace("--split 60,40,0", "").split(), *evaluate(100, 2)]
    words += ["--train-data-path", corpus, "--valid-data-path", corpus]
    words += ["--test-data-path", corpus, "--save", str(tmp_path)]
    run_ranks(train, 1, words, Topology(), 2, timeout=60)
    assert "test loss" not in capfd.readouterr().out


# Steps that are skipped


def test_a_skipped_step_uses_up_nothing_of_the_schedule(corpus, tmp_path):
    schedule = ["--lr-warmup-iters", "3", "--lr-decay-iters", "8"]
    overflow = ["--fp16", "--initial-loss-scale", "1048576", "--hysteresis", "1"]
    for last in ("3", "8"):  # resumed after skipped steps
        run(corpus, tmp_path, "single", *schedule, *overflow, "--train-iters", last)
    from ml_train.schedule import learning_rate

    config = LearningRate(lr=1e-3, lr_warmup_iters=3, lr_decay_iters=8)
    updates = 0
    steps = entries_of(tmp_path, "step")
    for step in steps:
        assert step["learning_rate"] == learning_rate(config, updates=updates, train_iters=8)
        updates += 1 - step["skipped_iterations"]
    assert steps[0]["skipped_iterations"] == 1
    assert 3 < updates < 8


def test_giving_up_removes_no_older_checkpoint(corpus, tmp_path):
    run(corpus, tmp_path, "single", "--train-iters", "2")
    diverge = ["--lr", "1e30", "--max-skipped-iterations", "2", "--keep-last", "1"]
    for _ in range(2):  # the second time it begins with weights that make no finite loss
        with pytest.raises(RankFailedError, match="2 steps in a row were skipped"):
            run(corpus, tmp_path, "single", *diverge, "--train-iters", "9")
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [
        "iter_0000002",
        "iter_0000005",
        "iter_0000007",
    ]
