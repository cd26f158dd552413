from __future__ import annotations

import hashlib
import random
from itertools import pairwise

import numpy as np

from ml_data.pretraining.duplicates import SeenTexts, digests


def test_a_digest_is_blake2b_of_the_text():
    assert digests(["é", ""]).tolist() == [
        hashlib.blake2b(text.encode(), digest_size=16).digest().rstrip(b"\0") for text in ("é", "")
    ]


def test_each_text_is_new_once_whatever_the_order_and_the_batches():
    chosen = random.Random(1)
    texts = [f"text {chosen.randrange(2000)}" for _ in range(5000)]
    seen, already = SeenTexts(), set()
    while texts:
        batch = [texts.pop() for _ in range(min(len(texts), chosen.randrange(1, 200)))]
        expected = []
        for text in batch:
            expected.append(text not in already)
            already.add(text)
        assert seen.add(digests(batch)).tolist() == expected


def test_digests_that_end_with_zeros_are_told_apart():
    ends = [b"0123456789abcde\0", b"0123456789abcd\0\0", b"0123456789abc\0\0\0"]
    seen = SeenTexts()
    assert seen.add(np.array(ends, "S16")).all()
    assert not seen.add(np.array(ends, "S16")).any()


def test_nothing_is_new_in_nothing():
    assert SeenTexts().add(digests([])).tolist() == []


def test_a_text_takes_16_bytes():
    seen = SeenTexts()
    for start in range(0, 30_000, 100):
        seen.add(digests([f"{start + n}" for n in range(100)]))
    runs = [len(run) for run in seen._runs]
    assert sum(run.nbytes for run in seen._runs) == 30_000 * 16
    assert all(longer >= 2 * shorter for longer, shorter in pairwise(runs))
