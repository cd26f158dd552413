from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ml_convert import Request
from ml_convert.input import open_source
from ml_eval.config import Sampling
from ml_eval.decode import Token, generate
from ml_eval.engine import Engine, load
from ml_parallel.testing import run_ranks

EOS = [0, *range(15, 300, 60)]
GREEDY = Sampling()
SAMPLED = Sampling(do_sample=True, temperature=1.1, top_k=40, top_p=0.9, seed=7)
RANDOM = torch.Generator().manual_seed(5)
PROMPTS = [
    torch.randint(1, 300, (length,), generator=RANDOM).tolist() for length in (3, 9, 3, 1, 30)
]


def on_ranks(ranks: int, directory: Path, work: Callable[[Engine], Any]) -> Any:
    """Load a model on so many ranks and return what `work` does with it, the same on each."""

    def job() -> Any:
        request = Request(load_dir=directory, save_dir=directory, save_format="hf")
        return work(load(open_source(request), device="cpu"))

    first, *others = run_ranks(job, ranks, timeout=60)
    assert all(other == first for other in others)
    return first


def continuations(tokens: Sequence[Token]) -> list[list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for token in tokens:
        found[token.prompt].append(token.id)
    return [found[number] for number in range(len(found))]


def reference(directory: Path, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Return what transformers adds to each prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    found = []
    for number, prompt in enumerate(prompts):
        if options.get("do_sample"):
            torch.manual_seed(SAMPLED.seed + number)
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=24, **options)
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_tokens_are_those_of_transformers(save_model, tied: bool) -> None:
    directory = save_model(tie_word_embeddings=tied)
    expected = reference(directory, PROMPTS, do_sample=False, eos_token_id=EOS)
    assert min(map(len, expected)) < 24 == max(map(len, expected))  # eos comes up, and does not

    def work(engine: Engine) -> list[list[list[int]]]:
        options = {"sampling": GREEDY, "max_new_tokens": 24, "eos_ids": frozenset(EOS)}
        together = continuations(list(generate(engine, PROMPTS, **options)))
        alone = [continuations(list(generate(engine, [p], **options)))[0] for p in PROMPTS]
        return [together, alone]

    for ranks in (1, 2):
        assert on_ranks(ranks, directory, work) == [expected, expected]


def test_sampled_tokens_are_those_of_transformers_with_the_same_seed(llama: Path) -> None:
    expected = reference(
        llama, PROMPTS, do_sample=True, temperature=1.1, top_k=40, top_p=0.9, eos_token_id=0
    )

    def work(engine: Engine) -> list[list[int]]:
        options = {"sampling": SAMPLED, "max_new_tokens": 24, "eos_ids": frozenset({0})}
        return continuations(list(generate(engine, PROMPTS, **options)))

    for ranks in (1, 2):
        assert on_ranks(ranks, llama, work) == expected


def test_the_repetition_penalty_counts_prompt_and_new_tokens_as_in_transformers(
    llama: Path,
) -> None:
    options = {"do_sample": False, "repetition_penalty": 1.5, "eos_token_id": 0}
    expected = reference(llama, PROMPTS, **options)

    def work(engine: Engine) -> list[list[int]]:
        sampling = Sampling(repetition_penalty=1.5)
        tokens = generate(
            engine, PROMPTS, sampling=sampling, max_new_tokens=24, eos_ids=frozenset({0})
        )
        return continuations(list(tokens))

    assert on_ranks(1, llama, work) == expected


def test_every_token_is_computed_once(llama: Path) -> None:
    def work(engine: Engine) -> list[int]:
        computed: list[int] = []
        engine._module.register_forward_pre_hook(
            lambda _module, arguments: computed.append(arguments[0].numel())
        )
        list(generate(engine, [PROMPTS[4]], sampling=GREEDY, max_new_tokens=10))
        return computed

    assert on_ranks(1, llama, work) == [30, *[1] * 9]  # nobody needs what follows the last token


def test_tokens_come_one_by_one_and_closing_ends_the_work(llama: Path) -> None:
    def work(engine: Engine) -> int:
        steps: list[None] = []
        engine._module.register_forward_pre_hook(lambda *_: steps.append(None))
        tokens = generate(engine, PROMPTS, sampling=GREEDY, max_new_tokens=24)
        next(tokens)
        tokens.close()
        return len(steps)

    assert on_ranks(1, llama, work) == 1


def test_padding_of_the_vocabulary_is_never_chosen(llama: Path) -> None:
    def work(engine: Engine) -> list[list[int]]:
        options = {"sampling": GREEDY, "max_new_tokens": 20}
        before = continuations(list(generate(engine, PROMPTS, **options)))
        weight = engine._module.output_layer.weight
        assert weight.shape[0] > engine.vocab_size
        weight[engine.vocab_size :] = torch.randn(len(weight) - engine.vocab_size, 64) * 100
        after = continuations(list(generate(engine, PROMPTS, **options)))
        return [before, after]

    before, after = on_ranks(1, llama, work)
    assert before == after


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"max_new_tokens": 5}, [5, 5]),
        ({"max_new_tokens": 5, "max_length": 12}, [5, 3]),
        ({"max_new_tokens": 500}, [96 - 3, 96 - 9]),  # what the model is made for
        ({"max_new_tokens": 500, "max_length": 1000}, [96 - 3, 96 - 9]),
    ],
)
def test_a_text_ends_at_the_first_limit(llama: Path, options: Any, lengths: list[int]) -> None:
    def work(engine: Engine) -> list[Token]:
        return list(generate(engine, PROMPTS[:2], sampling=GREEDY, **options))

    tokens = on_ranks(1, llama, work)
    assert [len(ids) for ids in continuations(tokens)] == lengths
    finishes = [token.finish for token in tokens if token.prompt == 0]
    assert finishes == [None] * (lengths[0] - 1) + ["length"]


@pytest.mark.parametrize("prompt", [[], [1] * 96])
def test_prompts_that_cannot_be_continued_are_refused(llama: Path, prompt: list[int]) -> None:
    def work(engine: Engine) -> None:
        with pytest.raises(ValueError, match=f"prompt 1 has {len(prompt)} tokens, not 1 to 95"):
            list(generate(engine, [[1], prompt], sampling=GREEDY, max_new_tokens=1))

    on_ranks(1, llama, work)
