"""The files of `ml-train pretrain`: refused early, named when full, and never lost."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from token_files import describe, write_corpus

from ml_train.cli import main

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 "
    "--max-position-embeddings 64 --make-vocab-size-divisible-by 8 --seq-length 16 --lr 1e-3 "
    "--split 1 --device cpu"
)
COMMAND = (sys.executable, "-m", "ml_train", "pretrain")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    prefix = write_corpus(tmp_path_factory.mktemp("data") / "text", [40] * 20)
    return describe(prefix, vocab_size=800)


def words(corpus, *more):
    return [*FLAGS.split(), "--data-path", corpus, *map(str, more)]


def run(words, **more):
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=300, env=ENVIRONMENT, **more
    )


def small_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))


def steps(path):
    entries = map(json.loads, Path(path).read_text().splitlines())
    return [entry["iteration"] for entry in entries if entry["kind"] == "step"]


@pytest.mark.parametrize("where", ["--metrics-file", "--tensorboard-dir"])
def test_a_run_survives_that_the_disk_of_its_metrics_is_full(corpus, tmp_path, where):
    path = tmp_path / "metrics"
    flags = words(corpus, where, path, "--train-iters", "200", "--log-interval", "200")
    process = run(flags, preexec_fn=small_disk)
    assert process.returncode == 0
    assert re.fullmatch(
        f"ml-train pretrain: {path}(/events.out.tfevents.*)?: File too large; the run goes on "
        "without this output\n",
        process.stderr,
    )
    assert "iteration      200/     200" in process.stdout


def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(corpus, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    more = ("--save", "/proc/nope", "--metrics-file", metrics, "--train-iters", "5")
    process = run(words(corpus, *more))
    assert process.returncode == 2
    assert process.stderr == (
        "ml-train pretrain: --save /proc/nope: cannot be written to (No such file or directory: "
        "/proc/nope); name another directory\n"
    )
    assert not metrics.exists()


def test_a_second_run_in_the_same_directory_is_refused(corpus, tmp_path):
    flags = words(corpus, "--save", tmp_path, "--load", tmp_path, "--train-iters", "100000")
    with subprocess.Popen(
        [*COMMAND, *flags], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as first:
        assert "iteration" in first.stdout.readline()
        second = run(flags)
        first.terminate()
        rest = first.communicate(timeout=60)[0]
    assert second.returncode == 2
    assert re.fullmatch(
        rf"ml-train pretrain: --save {tmp_path}: another run writes its checkpoints there "
        rf"\(process {first.pid} on .*\); name another directory\n",
        second.stderr,
    )
    assert first.returncode == 0, rest
    (saved,) = tmp_path.glob("iter_*")
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, int(saved.name[5:]) + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        saved.name,
        "latest_checkpointed_iteration.txt",
        "metrics.jsonl",
    ]


@pytest.mark.slow
def test_the_same_command_again_continues_what_began_with_other_weights(corpus, tmp_path):
    load, save, metrics = tmp_path / "weights", tmp_path / "run", tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "step", "iteration": 1}\n')  # of another run
    first = run(words(corpus, "--save", load, "--train-iters", "1", "--metrics-file", metrics))
    assert first.returncode == 0, first.stderr
    assert first.stderr == (
        f"ml-train pretrain: {metrics} held the metrics of another run, which are in {metrics}.1 "
        "now\n"
    )
    ignored = (
        *("--distributed-backend", "nccl", "--no-load-rng", "--no-masked-softmax-fusion"),
        "--use-flash-attn",
    )
    flags = words(corpus, "--load", load, "--finetune", "--save", save, *ignored)
    note = f"ml-train pretrain: ignored, as it has no meaning here: {' '.join(ignored)}\n"
    note = note.replace(" nccl", ",").replace("-rng", "-rng,").replace("-fusion", "-fusion,")
    begun = run([*flags, "--train-iters", "2", "--lr-decay-iters", "4"])
    assert (begun.returncode, begun.stderr) == (0, note)
    assert steps(save / "metrics.jsonl") == [1, 2]
    continued = run([*flags, "--train-iters", "4", "--lr-decay-iters", "4"])
    assert (continued.returncode, continued.stderr) == (
        0,
        f"{note}ml-train pretrain: --save {save} holds checkpoints: continuing from them, not "
        "from --load\n",
    )
    assert steps(save / "metrics.jsonl") == [1, 2, 3, 4]


@pytest.fixture
def checkpoints(tmp_path):
    for name in ("iter_0000002", "iter_0000004"):
        (tmp_path / "run" / name).mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--load {run} --ckpt-step 3",
            "--ckpt-step 3: --load {run} holds iter_0000002, iter_0000004",
        ),
        ("--ckpt-step 2", "--ckpt-step needs --load, the checkpoints to read"),
        ("--finetune", "--finetune needs --load, the checkpoints to read"),
        ("--no-load-optim", "--no-load-optim needs --load, the checkpoints to read"),
        (
            "--load {run} --save {run}/../run --finetune",
            "--finetune begins a new run from --load {run}: --save must name another directory",
        ),
        (
            "--load {run} --save {run} --ckpt-step 2",
            "--ckpt-step 2 would begin there each time the command is run, and --load {run} would "
            "lose what came after: --save must name another directory",
        ),
        (
            "--tokenizer-model nowhere --tokenizer-type Llama2Tokenizer",
            "tokenizer nowhere: no such file or directory (what has a name on a hub: download it)",
        ),
    ],
)
def test_checkpoints_that_cannot_be_chosen_are_refused_with_one_line(
    corpus, checkpoints, capsys, flags, message
):
    more = flags.format(run=checkpoints).split()
    assert main(["pretrain", *words(corpus, "--train-iters", "9", *more)]) == 2
    assert capsys.readouterr().err == f"ml-train pretrain: {message.format(run=checkpoints)}\n"
