from contextlib import ExitStack

import numpy as np
import pytest

from ml_data.instruction.mixing import Spool, gather, interleaved
from ml_data.instruction.ragged import Ragged


def order(sizes, strategy, probabilities=None, seed=0):
    pieces = list(interleaved(sizes, strategy, probabilities, seed))
    return [tuple(pair) for pair in np.concatenate(pieces).tolist()]


def one_at_a_time(sizes, strategy, probabilities, seed):
    """The rule of Hugging Face `datasets` 2.x to 5.x, a record at a time."""
    rng = np.random.default_rng(seed)
    position, ended, found = [0] * len(sizes), [False] * len(sizes), []
    over = any if strategy == "interleave_under" else all
    while True:
        for dataset in rng.choice(len(sizes), size=1000, p=probabilities).tolist():
            if over(ended):
                return found
            found.append((dataset, position[dataset]))
            position[dataset] += 1
            if position[dataset] == sizes[dataset]:
                ended[dataset] = True
                position[dataset] = 0


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
@pytest.mark.parametrize(
    ("sizes", "probabilities"),
    [
        ([5], [1.0]),
        ([3, 4], [0.5, 0.5]),
        ([1, 2000], [0.3, 0.7]),
        ([2000, 10, 300], [0.2, 0.3, 0.5]),
        ([1000, 1], [0.999, 0.001]),
    ],
    ids=["one", "two", "uneven", "three", "rare"],
)
def test_draws_are_those_of_hugging_face_datasets(strategy, sizes, probabilities):
    for seed in (0, 1234):
        expected = one_at_a_time(sizes, strategy, probabilities, seed)
        assert order(sizes, strategy, probabilities, seed) == expected


def test_without_probabilities_datasets_take_turns():
    assert order([2, 3], "interleave_under") == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert order([2, 3], "interleave_over") == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 2)]
    assert len(order([2500, 1], "interleave_over")) == 5000


def test_a_mixed_order_brings_all_samples_of_its_records(tmp_path):
    """Records of one sample, of none (they are not there) and of two."""
    with ExitStack() as stack:
        first = Spool(tmp_path, ["x"], stack)
        first.add({"x": Ragged.of([[1], [2, 2]])}, np.array([1, 0, 1]))
        first.add({"x": Ragged.of([[3, 3, 3]])}, np.array([1]))
        second = Spool(tmp_path, ["x"], stack)
        second.add({"x": Ragged.of([[7], [], [9, 9]])}, np.array([2, 1]))
        spooled = [first.finish(), second.finish()]
        assert [dataset.counts.tolist() for dataset in spooled] == [[1, 1, 1], [2, 1]]
        mixed = gather(spooled, np.array([[1, 0], [0, 2], [1, 1], [0, 0], [1, 0]]))["x"]
        assert mixed.lengths.tolist() == [1, 0, 3, 2, 1, 1, 0]
        assert mixed.tokens.tolist() == [7, 3, 3, 3, 9, 9, 1, 7]
    assert not list(tmp_path.iterdir())
