from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ml_eval.config import Sampling
from ml_eval.sampling import choose, probabilities, repetition_penalty, top_k, top_p
from ml_models.flags import UsageError


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    rows = torch.randn(5, 50) * 3
    rows[0] = rows[0].round()  # with ties
    rows[1] = 0.0  # nothing but ties
    rows[2, 7] = 100.0  # one token has all of the probability
    return rows


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(1))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("k", [1, 3, 49, 50, 1000])
def test_top_k_is_that_of_transformers(logits, ids, k: int) -> None:
    assert torch.equal(top_k(logits, k), TopKLogitsWarper(k)(ids, logits))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.95, 0.9999])
def test_top_p_is_that_of_transformers(logits, ids, p: float) -> None:
    assert torch.equal(top_p(logits, p), TopPLogitsWarper(p)(ids, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.2, 10.0])
def test_the_repetition_penalty_is_that_of_transformers(logits, ids, penalty: float) -> None:
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(repetition_penalty(logits, ids, penalty), expected)
    assert not torch.equal(expected, logits)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("k", [5, 0])
@pytest.mark.parametrize("p", [0.8, 1.0])
def test_the_distribution_is_that_of_transformers(logits, ids, temperature, k, p) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(k)] if k else []
    warpers += [TopPLogitsWarper(p)] if p < 1 else []
    expected = torch.softmax(warpers(ids, logits), dim=-1)
    sampling = Sampling(do_sample=True, temperature=temperature, top_k=k, top_p=p)
    assert torch.equal(probabilities(logits, sampling), expected)


def test_off_means_off(logits, ids) -> None:
    assert top_k(logits, 0) is logits
    assert top_p(logits, 1.0) is logits
    assert repetition_penalty(logits, ids, 1.0) is logits


def test_greedy_takes_the_most_likely_token_after_the_penalty() -> None:
    logits, ids = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[1]])
    assert choose(logits, ids, Sampling(), generators(0)).tolist() == [1]
    penalised = Sampling(repetition_penalty=2.0)
    assert choose(logits, ids, penalised, generators(0)).tolist() == [2]


def test_tokens_are_drawn_with_their_probability(logits) -> None:
    sampling = Sampling(do_sample=True, temperature=1.0, top_k=8, top_p=0.9)
    row, draws = logits[3:4], 1500
    expected = probabilities(row, sampling)[0]
    (generator,) = generators(0)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    tokens = torch.cat([choose(row, ids, sampling, [generator]) for _ in range(draws)])
    found = torch.bincount(tokens, minlength=50) / draws
    assert (found[expected == 0] == 0).all()
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() <= 4 * spread).all()


def test_a_text_does_not_depend_on_what_it_is_batched_with(logits) -> None:
    sampling = Sampling(do_sample=True, temperature=2.0)
    ids = torch.zeros(5, 1, dtype=torch.int64)
    together = choose(logits, ids, sampling, generators(3, 4, 5, 6, 7))
    alone = choose(logits[3:4], ids[3:4], sampling, generators(6))
    assert together[3] == alone[0]
    assert together.tolist() != choose(logits, ids, sampling, generators(8, 9, 10, 11, 12)).tolist()


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_choose_no_token(logits, ids, value, do_sample: bool) -> None:
    sampling, sources = Sampling(do_sample=do_sample), generators(*range(5))
    logits[2, 3] = -torch.inf  # a token that cannot be chosen; the others can
    choose(logits, ids, sampling, sources)
    logits[2, 3] = value
    with pytest.raises(UsageError, match="nan or infinite logits"):
        choose(logits, ids, sampling, sources)


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = torch.tensor([[10.0, 10.0625]], dtype=torch.bfloat16)  # neighbours in bfloat16
    penalised = Sampling(repetition_penalty=1.004)  # 10.022
    assert choose(logits, torch.tensor([[1]]), penalised, generators(0)).tolist() == [1]
