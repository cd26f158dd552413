"""What a trainer reads of instruction and preference files, against loops over plain lists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_files import Sample, made_up, write_column, write_rows

from ml_data.instruction.turns import IGNORED
from ml_data.training import (
    PreferenceDataset,
    Row,
    RunSamples,
    chosen_then_rejected,
    in_one_row,
    instruction_dataset,
    labelled,
    padded,
    padded_length,
)
from ml_data.training.rows import positions
from ml_models.flags import UsageError

S = 8


def expected(row: list[Sample], seq_length: int) -> list[tuple[int, int, int]]:
    """Return (token, next token or IGNORED, place in the sequence) of a row, by a plain loop."""
    found = []
    for ids, labels in row:
        found += [(ids[i], labels[i + 1], i) for i in range(len(ids) - 1)]
    return found[:seq_length]


def triples(row: Row) -> list[tuple[int, int, int]]:
    places = positions(row.lengths)
    return [*zip(row.tokens.tolist(), row.labels.tolist(), places.tolist(), strict=True)]


def labelled_rows(count: int, seed: int, *, packed: bool) -> list[list[Sample]]:
    """Return random rows; some samples are short, long, empty or without a label."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        lengths = generator.integers(0, 14, generator.integers(1, 4) if packed else 1)
        learned = generator.random() < 0.6
        row = []
        for ids, _ in made_up(lengths.tolist(), first=int(generator.integers(100))):
            kept = generator.random(len(ids)) < (0.2 if learned else 0.0)
            row.append((ids, [i if k else IGNORED for i, k in zip(ids, kept, strict=True)]))
        rows.append(row)
    return rows


# Rows


def test_importing_it_loads_no_torch() -> None:
    script = (
        "import sys, ml_data.training;"
        "sys.exit(str({'torch', 'transformers', 'tokenizers', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_a_label_is_that_of_the_next_token(tmp_path: Path) -> None:
    prefix = write_rows(tmp_path / "a", [[([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8])]])
    row = instruction_dataset(prefix, seq_length=S)[0]
    assert row.tokens.tolist() == [5, 6, 7]
    assert row.labels.tolist() == [IGNORED, 7, 8]
    assert row.lengths.tolist() == [3]


@pytest.mark.parametrize("seq_length", [1, 5, 8, 12, 50])
def test_samples_are_read_whole_or_cut(tmp_path: Path, seq_length: int) -> None:
    rows = labelled_rows(60, 1, packed=False)
    dataset = instruction_dataset(write_rows(tmp_path / "a", rows), seq_length=seq_length)
    assert [triples(dataset[n]) for n in range(60)] == [expected(row, seq_length) for row in rows]
    assert dataset.cut == sum(len(row[0][0]) - 1 > seq_length for row in rows)
    assert dataset.longest == max(len(row[0][0]) - 1 for row in rows)
    assert not dataset.packed


def test_packed_rows_are_read_as_their_samples_are(tmp_path: Path) -> None:
    rows = labelled_rows(60, 2, packed=True)
    dataset = instruction_dataset(write_rows(tmp_path / "a", rows), seq_length=60)
    assert dataset.packed
    assert [triples(dataset[n]) for n in range(60)] == [expected(row, 60) for row in rows]


def test_packed_rows_longer_than_the_sequence_are_refused(tmp_path: Path) -> None:
    prefix = write_rows(tmp_path / "a", [made_up([5, 5]), made_up([3, 3])])
    assert instruction_dataset(prefix, seq_length=8).longest == 8
    with pytest.raises(UsageError) as caught:
        instruction_dataset(prefix, seq_length=7)
    assert str(caught.value) == (
        f"--seq-length 7: {prefix} has packed rows of up to 8 tokens, which cannot be cut: give "
        "at least 8, or prepare the data with --seq-length 7"
    )


@pytest.mark.parametrize("block", [1, 16, 1 << 22])
@pytest.mark.parametrize("packed", [False, True])
def test_samples_without_a_label_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, block: int
) -> None:
    monkeypatch.setattr(labelled, "_BLOCK", block)
    rows = labelled_rows(200, 3, packed=packed)
    prefix = write_rows(tmp_path / "a", rows)
    for seq_length in (60,) if packed else (1, 4, 60):
        dataset = instruction_dataset(prefix, seq_length=seq_length)
        blind = [
            number
            for number, row in enumerate(rows)
            if all(label == IGNORED for _, label, _ in expected(row, seq_length))
        ]
        assert 0 < len(blind) < 200
        assert dataset.without_label().tolist() == blind


def test_files_of_two_runs_are_not_read_together(tmp_path: Path) -> None:
    prefix = write_rows(tmp_path / "a", [made_up([5]), made_up([6])])
    write_column(prefix, "labels", [[[1] * 6], [[1] * 5]])
    with pytest.raises(UsageError, match=r"labels_document.idx: not of the same run"):
        instruction_dataset(prefix, seq_length=S)
    write_column(prefix, "labels", [[[1] * 5, [1] * 6]])
    with pytest.raises(UsageError, match="not of the same run"):
        instruction_dataset(prefix, seq_length=S)


def test_a_missing_or_torn_file_is_named(tmp_path: Path) -> None:
    prefix = write_rows(tmp_path / "a", [made_up([5])])
    labels = Path(f"{prefix}_packed_labels_document.bin")
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"a_packed_labels_document.bin: torn"):
        instruction_dataset(prefix, seq_length=S)
    labels.unlink()
    with pytest.raises(UsageError, match=r"labels_document.bin does not exist"):
        instruction_dataset(prefix, seq_length=S)


def test_the_fingerprint_follows_the_lengths(tmp_path: Path) -> None:
    names = {
        "a": [made_up([5]), made_up([6])],
        "again": [made_up([5]), made_up([6])],
        "order": [made_up([6]), made_up([5])],
        "packed": [made_up([5, 6])],
    }
    found = {
        name: instruction_dataset(write_rows(tmp_path / name, rows), seq_length=20).fingerprint()
        for name, rows in names.items()
    }
    assert found["a"] == found["again"]
    assert len({*found.values()}) == 3


# Preferences


def preferences(folder: Path, chosen: list[Sample], rejected: list[Sample]) -> str:
    for side, samples in (("chosen_", chosen), ("rejected_", rejected)):
        write_rows(folder / "p", [[sample] for sample in samples], side)
    return str(folder / "p")


def test_a_pair_is_both_answers_shifted_and_cut(tmp_path: Path) -> None:
    chosen, rejected = made_up([5, 12, 4]), made_up([7, 6, 30], first=100)
    dataset = PreferenceDataset(preferences(tmp_path, chosen, rejected), seq_length=S)
    assert len(dataset) == 3
    assert dataset.cut == 2
    assert dataset.longest == 29
    for number in range(3):
        pair = dataset[number]
        assert triples(pair.chosen) == expected([chosen[number]], S)
        assert triples(pair.rejected) == expected([rejected[number]], S)


def test_a_pair_needs_a_label_on_both_sides(tmp_path: Path) -> None:
    blind = ([1, 2, 3], [IGNORED] * 3)
    prefix = preferences(tmp_path, [*made_up([5, 5]), blind], [blind, *made_up([5, 5])])
    assert PreferenceDataset(prefix, seq_length=S).without_label().tolist() == [0, 2]


def test_a_batch_of_pairs_is_the_chosen_answers_then_the_rejected_ones(tmp_path: Path) -> None:
    chosen, rejected = made_up([5, 6]), made_up([7, 4], first=100)
    dataset = PreferenceDataset(preferences(tmp_path, chosen, rejected), seq_length=S)
    batch = padded(chosen_then_rejected([dataset[1], dataset[0]]), S, pad=9)
    assert batch["tokens"][:, 0].tolist() == [5, 0, 107, 100]
    assert batch["loss_mask"].sum(axis=1).tolist() == [4, 3, 2, 5]


def test_sides_of_two_runs_are_not_read_together(tmp_path: Path) -> None:
    prefix = preferences(tmp_path, made_up([5, 5]), made_up([5]))
    with pytest.raises(UsageError, match="has 2 chosen and 1 rejected answers"):
        PreferenceDataset(prefix, seq_length=S)


# Batches


@pytest.mark.parametrize(
    ("lengths", "multiple", "at_most", "wanted"),
    [([3, 9], 8, 64, 16), ([8], 8, 64, 8), ([60], 8, 62, 62), ([1], 12, 64, 12)],
)
def test_a_batch_is_as_long_as_its_longest_sample(
    lengths: list[int], multiple: int, at_most: int, wanted: int
) -> None:
    assert padded_length(lengths, multiple=multiple, at_most=at_most) == wanted


def rows_of(tmp_path: Path, lengths: list[int]) -> list[Row]:
    prefix = write_rows(tmp_path / "b", [[sample] for sample in made_up(lengths, first=1000)])
    dataset = instruction_dataset(prefix, seq_length=S)
    return [dataset[number] for number in range(len(lengths))]


def test_rows_are_padded_beside_each_other(tmp_path: Path) -> None:
    batch = padded(rows_of(tmp_path, [4, 20]), S, pad=7)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "tokens": ((2, S), "int64"),
        "labels": ((2, S), "int64"),
        "loss_mask": ((2, S), "float32"),
        "position_ids": ((2, S), "int64"),
    }
    assert batch["tokens"].tolist() == [[1000, 1001, 1002, *[7] * 5], [*range(1004, 1012)]]
    assert batch["labels"][0].tolist() == [IGNORED, 1002, 1003, *[IGNORED] * 5]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, *[0] * 5], [0, *[1] * 7]]
    assert batch["position_ids"].tolist() == [[*range(S)]] * 2


def test_rows_are_put_one_after_the_other_with_padding_as_sequences_of_its_own(
    tmp_path: Path,
) -> None:
    rows = [*rows_of(tmp_path, [4, 20]), Row(*(np.arange(5),) * 2, np.array([2, 3]))]
    batch = in_one_row(rows, 35, pad=7)
    filled = [1000, 1001, 1002, *range(1004, 1012), *range(5)]
    assert batch["tokens"].tolist() == [filled + [7] * 19]
    assert batch["sequence_ends"].tolist() == [0, 3, 11, 13, 16, 24, 32, 35]
    assert batch["position_ids"][0, :17].tolist() == [0, 1, 2, *range(8), 0, 1, 0, 1, 2, 0]
    assert batch["position_ids"].max() == 7  # of a sample: padding needs no place of its own
    assert batch["loss_mask"].sum() == 2 + 7 + 5


def test_long_padding_is_several_sequences() -> None:
    row = Row(*(np.arange(900),) * 2, np.array([900]))
    batch = in_one_row([row], 1500, pad=7)
    assert batch["sequence_ends"].tolist() == [0, 900, 900 + 256, 900 + 512, 1500]


def test_a_row_that_is_full_has_no_padding(tmp_path: Path) -> None:
    batch = in_one_row(rows_of(tmp_path, [4, 20]), 11, pad=7)
    assert batch["sequence_ends"].tolist() == [0, 3, 11]


# Runs


def test_a_run_reads_the_documents_it_is_given(tmp_path: Path) -> None:
    lengths = [5] * 20
    first = write_rows(tmp_path / "a", [[s] for s in made_up(lengths)])
    second = write_rows(tmp_path / "b", [[s] for s in made_up(lengths, first=1000)])
    datasets = [instruction_dataset(prefix, seq_length=S) for prefix in (first, second)]
    kept = [np.array([3, 4, 9]), np.arange(20)]
    run = RunSamples(datasets, kept, (1.0, 3.0), samples=40, seed=2)
    assert len(run) == 40
    begins = [int(run[position].tokens[0]) for position in range(40)]
    assert {begin // 5 for begin in begins if begin < 1000} == {3, 4, 9}
    assert sum(begin < 1000 for begin in begins) == 10
    sources = [run.source(position) for position in range(40)]
    assert sources == [first if begin < 1000 else second for begin in begins]
