"""Training on instruction data: the same samples, losses and weights in every layout and form."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from token_files import made_up, write_corpus, write_rows
from training_job import LAYOUTS, UNTIED

from ml_data.instruction.sample_info import read_sample_info
from ml_data.instruction.turns import IGNORED
from ml_models import flags
from ml_models.flags import UsageError
from ml_parallel.platform import Device
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology
from ml_train.config import PretrainConfig, check_world
from ml_train.instructions import (
    check_instructions,
    describe_instructions,
    find_unusable,
    open_instructions,
    split_documents,
)
from ml_train.settings import DataConfig
from ml_train.signals import StopRequest

S = 32
LENGTHS = (5, 31, 12, 9, 33, 3, 20, 17, 8, 28, 11, 6, 25, 14, 7, 19)
ROWS = ((33,), (31,), (28, 3), (25, 6), (20, 12), (19, 11), (17, 14), (5, 7, 8, 9))
"""The same samples in rows of at most 33."""
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --swiglu "
    "--ffn-hidden-size 160 --max-position-embeddings 64 --normalization RMSNorm "
    "--disable-bias-linear --untie-embeddings-and-output-weights"
)
PLAIN, VARIABLE = [], ["--variable-seq-lengths"]


def samples(lengths=LENGTHS):
    """Return samples by length: each token follows from the one before, the first are asked."""
    found = {}
    for number, length in enumerate(lengths):
        ids = [(31 * number + 7 * place) % UNTIED.vocab_size for place in range(length)]
        asked = 1 + length // 3
        found[length] = (ids, [IGNORED] * asked + ids[asked:])
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prefixes of the same samples, each on its own and packed."""
    folder = tmp_path_factory.mktemp("data")
    by_length = samples()
    alone = write_rows(folder / "alone", [[sample] for sample in by_length.values()])
    packed = write_rows(folder / "packed", [[by_length[n] for n in row] for row in ROWS])
    return {"alone": alone, "packed": packed}


def words(prefix, batch, steps, *more):
    return [
        *MODEL.split(),
        *f"--vocab-size {UNTIED.vocab_size} --make-vocab-size-divisible-by 8 --lr 1e-3".split(),
        *f"--seq-length {S} --global-batch-size {batch} --train-iters {steps}".split(),
        *f"--split 1 --is-instruction-dataset --data-path {prefix}".split(),
        *more,
    ]


def train(argv, topology):
    """Train on this rank; return what the steps report, and the first moments by their names."""
    from ml_parallel.optimizer import optimizer_shards
    from ml_train import loop

    config = flags.parse(PretrainConfig, argv, prog="test")
    world_size = torch.distributed.get_world_size()
    config = check_world(dataclasses.replace(config, parallel=topology), world_size)
    trainer = loop.Trainer(config, Device(type="cpu", index=0))
    results = []
    step = loop.train_step

    def keeping(*args, **options):
        results.append(step(*args, **options))
        return results[-1]

    loop.train_step = keeping
    with StopRequest() as stop:
        stop.defer()
        trainer.run(stop)
    names = trainer.built.state.global_names()
    moments = {
        names[id(shard.parameter)]: shard.state["exp_avg"].clone().numpy()
        for shard in optimizer_shards(trainer.built.optimizer)
    }
    return results, moments


def run(argv, layout=None):
    """Return the results of the steps, and the moments on rank 0."""
    world_size, topology = LAYOUTS[layout] if layout else (1, Topology())
    ranks = run_ranks(train, world_size, argv, topology, timeout=100)
    assert all(steps == ranks[0][0] for steps, _ in ranks)
    return ranks[0]


def close(found, wanted, tolerance):
    for step, other in zip(found, wanted, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=tolerance)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)


# Packed, padded, variable


def one_step(prefix, batch, *more):
    """Train on all samples at once: from the same weights, whatever form they have."""
    return run(words(prefix, batch, 1, *more))


@pytest.fixture(scope="module")
def alone(data):
    """One sample at a time, never padded: what every form is compared with."""
    return one_step(data["alone"], 16, *VARIABLE)


@pytest.mark.parametrize(
    ("form", "batch", "more"),
    [
        ("alone", 16, [*PLAIN, "--micro-batch-size", "4"]),
        ("alone", 16, [*VARIABLE, "--micro-batch-size", "4"]),
        ("packed", 8, PLAIN),
        ("packed", 8, VARIABLE),
        ("packed", 8, [*PLAIN, "--micro-batch-size", "4"]),
        ("packed", 8, [*VARIABLE, "--micro-batch-size", "2"]),
    ],
)
def test_every_form_of_the_same_samples_has_the_same_loss_and_gradients(
    data, alone, form, batch, more
):
    steps, moments = one_step(data[form], batch, *more)
    close(steps, alone[0], 1e-5)
    assert set(moments) == set(alone[1])
    for name, wanted in alone[1].items():
        worst = np.abs(moments[name] - wanted).max() / np.abs(wanted).max()
        assert worst < 1e-5, f"{name}: {worst:.1e}"


def test_samples_that_saw_each_other_would_have_another_loss(data, alone, monkeypatch):
    """What the test above would not miss: a row that is one sequence."""
    from ml_train import step

    def as_one(ends, _positions):
        from ml_models.packing import PackedSequences

        return PackedSequences((0, ends[-1]), torch.arange(ends[-1]))

    monkeypatch.setattr(step, "PackedSequences", as_one)
    steps, _ = one_step(data["packed"], 8)
    (step,), (wanted,) = steps, alone[0]
    assert abs(step.loss / wanted.loss - 1) > 1e-4
    assert abs(step.grad_norm / wanted.grad_norm - 1) > 1e-2


def mean_loss_by_hand(argv):
    """Return the mean loss of the answers' tokens under the initial weights, in plain torch."""
    from ml_train.loop import Trainer

    config = check_world(flags.parse(PretrainConfig, argv, prog="test"), 1)
    (model,) = Trainer(config, Device(type="cpu", index=0)).built.chunks
    losses = []
    with torch.no_grad():
        for ids, labels in samples().values():
            tokens = torch.tensor([ids])
            logits = model(tokens, torch.arange(len(ids))[None], None)  # (1, S, V)
            of_each = logits[0, :, : UNTIED.vocab_size].log_softmax(-1)
            for place, label in enumerate(labels[1:]):
                if label != IGNORED:
                    losses.append(-float(of_each[place, label]))
    return sum(losses) / len(losses)


def test_the_loss_is_the_mean_over_the_tokens_of_answers(data, alone):
    (expected,) = run_ranks(mean_loss_by_hand, 1, words(data["alone"], 16, 1))
    assert alone[0][0].loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "more", "layout"),
    [
        ("alone", VARIABLE, "tp2 sp"),
        ("alone", VARIABLE, "pp2 vpp dp2 dist overlap"),
        ("packed", PLAIN, "pp2 vpp"),
        ("packed", PLAIN, "tp2 dp2 sp dist"),
        ("packed", VARIABLE, "tp2 pp2 sp"),
    ],
)
def test_every_layout_trains_alike(data, single, form, more, layout):
    steps, _ = run(words(data[form], 8, 2, *more, "--micro-batch-size", "2"), layout)
    close(steps, single[form], 1e-5)
    filled = [step.filled if more == VARIABLE else 1.0 for step in single[form]]
    assert [step.filled for step in steps] == pytest.approx(filled)


@pytest.fixture(scope="module")
def single(data):
    """The steps of both forms on one rank."""
    more = (*VARIABLE, "--micro-batch-size", "2")
    return {form: run(words(prefix, 8, 2, *more))[0] for form, prefix in data.items()}


def test_a_step_says_how_much_of_the_sequence_it_computed(data, alone):
    rows = [min(S, -(-(length - 1) // 8) * 8) for length in LENGTHS]
    assert alone[0][0].filled == pytest.approx(sum(rows) / (S * len(rows)))
    assert alone[0][0].keys == pytest.approx(sum(n * n for n in rows) / sum(rows))
    (plain,), _ = one_step(data["alone"], 16)
    assert (plain.filled, plain.keys) == (1, S)


def test_keys_of_the_other_samples_of_a_row_are_not_counted(data):
    sequences = [n - 1 for row in ROWS for n in row]
    padding = [S - sum(row) + len(row) for row in ROWS]  # none is longer than the samples
    pairs = sum(n * n for n in (*sequences, *padding))
    (step,), _ = one_step(data["packed"], 8)
    assert (step.filled, step.keys) == (1, pairs / (S * len(ROWS)))


@pytest.mark.parametrize("form", ["alone", "packed"])
def test_an_evaluation_is_the_mean_over_the_tokens_of_all_its_batches(data, capfd, form):
    found = []
    for batch, count in ((8, 1), (4, 2)):  # the same samples
        more = f"--split 50,50,0 --eval-interval 1 --eval-iters {count} --lr 1e-12".split()
        run(words(data[form], batch, 1, *more), "dp2")
        (line,) = (line for line in capfd.readouterr().out.splitlines() if "validation" in line)
        found.append(float(line.partition("value: ")[2].split()[0]))
    assert found[0] == pytest.approx(found[1], abs=2e-6)


# Order


def test_a_run_that_is_resumed_with_other_ranks_goes_on_with_the_same_samples(data, tmp_path):
    saved = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2"]
    argv = words(data["alone"], 8, 5, "--micro-batch-size", "2")
    whole, moments = run(argv)
    (first,) = run_ranks(stop_after, 1, [*argv, *saved], 2)
    for layout in ("dp2 dist", None):
        rest, found = run([*argv, "--load", str(tmp_path)], layout)
        close(first + rest, whole, 1e-5)
    for name, moment in moments.items():  # on the same ranks, to the bit
        np.testing.assert_array_equal(found[name], moment)


def stop_after(argv, last):
    """Train, be asked to stop in that step, and return the steps."""
    import os
    import signal

    from ml_train import loop

    step, done = loop.train_step, []

    def counting(*args, **options):
        done.append(step(*args, **options))
        if len(done) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return done[-1]

    loop.train_step = counting
    config = check_world(flags.parse(PretrainConfig, argv, prog="test"), 1)
    with StopRequest() as stop:
        stop.defer()
        loop.Trainer(config, Device(type="cpu", index=0)).run(stop)
    return done


def read(config, ranks, micro, consumed=0):
    """Return the first token of each sample of a step of 8, on every rank."""
    from ml_train.batches import TokenBatches
    from ml_train.instruction_samples import build_instructions

    def work():
        datasets = build_instructions(config, seq_length=S, multiple=8, seed=3, samples=(32, 0, 0))
        batches = TokenBatches(
            datasets.train,
            micro_batch_size=micro,
            data_parallel_rank=torch.distributed.get_rank(),
            data_parallel_size=ranks,
            vocab_size=1000,
            device=torch.device("cpu"),
        )
        step = batches.step(consumed, 8 // (ranks * micro))
        return [token for batch in step for token in batch["tokens"][:, 0].tolist()]

    return run_ranks(work, ranks)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 2), (4, 1)])
def test_a_global_batch_is_the_same_samples_for_every_layout(tmp_path, ranks, micro):
    prefix = write_rows(tmp_path / "a", [[sample] for sample in made_up([9] * 20)])
    other = write_rows(tmp_path / "b", [[sample] for sample in made_up([9] * 5, first=500)])
    blend = DataConfig(
        data_path=("0.5", prefix, "0.5", other), split=(1.0,), is_instruction_dataset=True
    )
    for consumed in (0, 8, 24):
        (expected,) = read(blend, 1, 1, consumed)
        found = read(blend, ranks, micro, consumed)
        assert sorted(token for rank in found for token in rank) == sorted(expected)
    whole = [token for consumed in (0, 8, 16, 24) for token in read(blend, 1, 1, consumed)[0]]
    assert sum(token >= 500 for token in whole) == 16


def test_splits_are_of_other_documents_as_those_of_pretraining_data(tmp_path):
    prefix = write_rows(tmp_path / "a", [[sample] for sample in made_up([9] * 11)])
    given = config(prefix, split=(80.0, 10.0, 10.0))
    datasets = open_instructions(given, S)
    splits = split_documents(given, datasets, {prefix: np.array([2])}, (1, 1, 1))
    assert [split.documents[0].tolist() for split in splits] == [
        [0, 1, 3, 4, 5, 6, 7, 8],
        [9],
        [10],
    ]


# What is wrong


def config(prefix, **more):
    return DataConfig(data_path=(str(prefix),), is_instruction_dataset=True, **more)


def test_samples_without_a_label_are_left_out_and_counted(tmp_path, caplog):
    blind = ([1, 2, 3, 4], [IGNORED] * 4)
    late = ([*range(50)], [IGNORED] * 40 + [*range(10)])
    prefix = write_rows(tmp_path / "a", [[blind], *([s] for s in made_up([6, 60])), [late]])
    with caplog.at_level(logging.WARNING):
        unusable = find_unusable(open_instructions(config(prefix), S))
    assert unusable[prefix].tolist() == [0, 3]
    assert caplog.messages == [
        f"{prefix}: of 4 samples, with --seq-length 32, 2 have no label within it and are left out",
        f"{prefix}: of 4 samples, with --seq-length 32, 2 are longer and are cut",
    ]


def test_a_run_without_any_label_is_refused_on_every_rank(tmp_path):
    prefix = write_rows(tmp_path / "a", [[([1, 2, 3, 4], [IGNORED] * 4)]] * 3)

    def work():
        from ml_train.instruction_samples import build_instructions

        with pytest.raises(UsageError) as caught:
            build_instructions(
                config(prefix, split=(1.0,)), seq_length=S, multiple=8, seed=3, samples=(8, 0, 0)
            )
        return str(caught.value)

    messages = run_ranks(work, 2)
    assert (
        messages
        == [
            f"{prefix}: has 3 samples for training (--split), and none with a label within "
            "--seq-length 32: give more samples, another split, or a longer --seq-length"
        ]
        * 2
    )


def test_a_split_without_samples_is_found_before_any_label_is_read(data):
    def check(samples, split):
        config = DataConfig(data_path=(data["alone"],), is_instruction_dataset=True, split=split)
        check_instructions(config, S, samples)

    check((8, 0, 0), (999, 1, 0))
    check((8, 2, 0), (90, 10, 0))
    with pytest.raises(UsageError, match=r"has 0 samples for validation \(--split\)"):
        check((8, 2, 0), (999, 1, 0))


def test_a_node_with_other_files_is_refused_on_every_rank(data, monkeypatch):
    from ml_train import instruction_samples

    fingerprints = instruction_samples._fingerprints

    def of_another(datasets):
        found = fingerprints(datasets)
        return found if torch.distributed.get_rank() == 0 else dict.fromkeys(found, "another")

    monkeypatch.setattr(instruction_samples, "_fingerprints", of_another)

    def work():
        with pytest.raises(UsageError, match="it is not what it is on the first node"):
            instruction_samples.build_instructions(
                config(data["alone"]), seq_length=S, multiple=8, seed=3, samples=(8, 0, 0)
            )

    run_ranks(work, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alone_packed", "alone_packed names one of several files: give {folder}/alone"),
        (
            "alone_packed_labels_document",
            "alone_packed_labels_document names one of several files: give {folder}/alone",
        ),
        ("text", "text is pre-training data: leave the flag out"),
        ("pairs", "pairs is preference data, which ml-train pretrain does not train on"),
        ("nothing", "no dataset {folder}/nothing_packed_input_ids_document: "),
    ],
)
def test_a_prefix_of_something_else_is_explained(tmp_path, name, message):
    rows = [[sample] for sample in made_up([6, 7])]
    write_rows(tmp_path / "alone", rows)
    write_rows(tmp_path / "pairs", rows, "chosen_")
    write_corpus(tmp_path / "text", [5])
    with pytest.raises(UsageError) as caught:
        open_instructions(config(tmp_path / name), S)
    assert message.format(folder=tmp_path) in str(caught.value)


def test_a_token_outside_of_the_vocabulary_names_the_data(tmp_path):
    prefix = write_rows(tmp_path / "a", [[sample] for sample in made_up([6, 7], first=995)])
    with pytest.raises(AssertionError, match=f"{prefix}: holds token 100"):
        read(config(prefix, split=(1.0,)), 1, 8)


def test_the_tokenizer_of_the_data_is_known_from_its_description(data):
    from pathlib import Path

    info = {
        "kind": "instruction", "tokenizer": "t", "tokenizer_kind": "tokenizers",
        "tokenizer_identity": "x", "vocab_size": 131, "bos": None, "eod": 5, "pad": None,
        "template": "default", "handlers": ["AlpacaStyleInstructionHandler"], "append_eod": False,
        "seq_length": None, "packed": False, "samples": 16, "rows": 16, "cut": 0, "tokens": 1,
        "learned_tokens": 1, "longest": 33, "records": 16, "skipped": {}, "failed": 0, "files": {},
        "created_by": "test",
    }  # fmt: skip
    path = Path(f"{data['alone']}_packed.json")
    path.write_text(json.dumps(info))
    (description,) = describe_instructions(config(data["alone"]))
    path.unlink()
    assert description.info is not None
    assert description.info.vocab_size == 131
    assert read_sample_info(data["alone"]) is None
