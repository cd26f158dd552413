from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ml_convert import Request, convert
from ml_convert.input import open_source
from ml_eval.engine import Engine, load
from ml_models.flags import UsageError
from ml_parallel.testing import run_ranks

IDS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def on_ranks(ranks: int, directory: Path, work: Callable[[Engine], Any], **options: Any) -> Any:
    """Load a model on so many ranks and return what `work` does with it, the same on each."""

    def job() -> Any:
        request = Request(load_dir=directory, save_dir=directory, save_format="hf")
        return work(load(open_source(request), device="cpu", **options))

    first, *others = run_ranks(job, ranks, timeout=60)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
    return first


def full_logits(engine: Engine) -> torch.Tensor:
    return engine.logits(IDS)


def expected_logits(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers(save_model, tied: bool) -> None:
    directory = save_model(tie_word_embeddings=tied)
    expected = expected_logits(directory)
    for ranks in (1, 2):
        logits = on_ranks(ranks, directory, full_logits)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("tied", "tensor", "layout"),
    [
        (True, 1, {"target_pipeline_parallel_size": 3}),
        (True, 2, {"num_layer_list": (2, 1), "target_pipeline_parallel_size": 2}),
        (False, 2, {"target_pipeline_parallel_size": 1}),
    ],
)
def test_megatron_checkpoints_of_every_layout_give_the_same_logits(
    save_model, tmp_path, tied: bool, tensor: int, layout: dict[str, Any]
) -> None:
    directory = save_model(tie_word_embeddings=tied)
    convert(
        Request(
            load_dir=directory,
            save_dir=tmp_path / "megatron",
            save_format="mcore",
            target_tensor_parallel_size=tensor,
            make_vocab_size_divisible_by=8,
            **layout,
        )
    )
    for ranks in (1, 2):
        expected = on_ranks(ranks, directory, full_logits)
        assert torch.equal(on_ranks(ranks, tmp_path / "megatron", full_logits), expected)


def test_logits_with_a_cache_are_those_without(llama: Path) -> None:
    def work(engine: Engine) -> tuple[list[torch.Tensor], torch.Tensor]:
        cache = engine.cache(batch_size=2, length=20)
        parts = IDS.split([5, 4, 1, 1, 9], dim=1)  # a prompt in two parts, two tokens, a longer one
        return [engine.next_logits(part, cache) for part in parts], engine.logits(IDS)

    for ranks in (1, 2):
        found, full = on_ranks(ranks, llama, work)
        for logits, last in zip(found, (4, 8, 9, 10, 19), strict=True):
            torch.testing.assert_close(logits, full[:, last], rtol=0, atol=1e-4)


def test_the_cache_is_what_later_tokens_see(llama: Path) -> None:
    def work(engine: Engine) -> tuple[torch.Tensor, torch.Tensor]:
        logits = []
        for spoil in (False, True):
            cache = engine.cache(batch_size=2, length=20)
            engine.next_logits(IDS[:, :-1], cache)
            if spoil:
                with torch.inference_mode():
                    cache.key_value_memory_dict[2][1][3] = 0.0  # the fourth token's, in layer 2
            logits.append(engine.next_logits(IDS[:, -1:], cache))
        return logits[0], logits[1]

    intact, spoiled = on_ranks(1, llama, work)
    assert (intact - spoiled).abs().max() > 1e-2


def test_the_model_computes_in_the_stored_or_the_given_type(save_model) -> None:
    directory = save_model(dtype=torch.bfloat16)

    def dtype(engine: Engine) -> torch.dtype:
        return engine.logits(IDS).dtype

    assert on_ranks(1, directory, dtype) == torch.bfloat16
    assert on_ranks(1, directory, dtype, dtype=torch.float16) == torch.float16
    logits = on_ranks(1, directory, full_logits, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(IDS).logits, rtol=0, atol=1e-4)


def test_an_engine_can_follow_another_one(llama: Path) -> None:
    def work(engine: Engine) -> torch.Tensor:
        before = engine.logits(IDS)
        engine.close()
        request = Request(load_dir=llama, save_dir=llama, save_format="hf")
        again = load(open_source(request), device="cpu").logits(IDS)
        assert torch.equal(again, before)
        return again

    on_ranks(1, llama, work)


@pytest.mark.parametrize(
    ("ranks", "wanted", "message"),
    [
        (1, 2, r"--tensor-model-parallel-size 2: 1 process was started; start 2 with torchrun"),
        (2, 1, r"--tensor-model-parallel-size 1: 2 processes were started; start 1 with torchrun"),
        (3, None, r"--tensor-model-parallel-size 3: must divide .* \(valid for this model: 1, 2"),
    ],
)
def test_models_are_cut_over_all_processes_or_not_at_all(
    llama: Path, ranks: int, wanted: int | None, message: str
) -> None:
    def job() -> None:
        torch.distributed.barrier()  # else a rank may be gone before another one has found it
        request = Request(load_dir=llama, save_dir=llama, save_format="hf")
        with pytest.raises(UsageError, match=message):
            load(open_source(request), device="cpu", tensor_model_parallel_size=wanted)

    run_ranks(job, ranks, timeout=60)
