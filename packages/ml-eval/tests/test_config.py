from __future__ import annotations

from pathlib import Path

import pytest

from ml_eval.config import Ending, GenerateConfig, Model, Prompts, Sampling
from ml_models.flags import UsageError, parse


def read(*argv: str) -> GenerateConfig:
    flags = argv if "--load" in argv else ("--load-dir", "model", *argv)
    return parse(GenerateConfig, [*flags], prog="ml-eval generate")


def test_defaults_are_those_of_modellink() -> None:
    config = read("--prompt", "a")
    assert config == GenerateConfig(
        prompts=Prompts(prompt=("a",)),
        model=Model(load_dir=Path("model")),
        sampling=Sampling(do_sample=False, temperature=0.7, top_k=50, top_p=0.95),
        ending=Ending(max_new_tokens=128),
    )
    assert config.model.tokenizer == Path("model")


def test_prompts_and_stop_texts_keep_their_commas() -> None:
    config = read("--prompt", "a, b", "c", "--stop", ",", "\n\n")
    assert config.prompts.prompt == ("a, b", "c")
    assert config.ending.stop == (",", "\n\n")


def test_other_names_of_the_flags() -> None:
    model = read("--load", "m", "--ckpt-step", "3", "--tokenizer-model", "t", "--prompt", "a").model
    assert model == Model(load_dir=Path("m"), iteration=3, tokenizer_name_or_path=Path("t"))
    assert read("--prompt", "a", "--do-sample").sampling.do_sample
    assert not read("--prompt", "a", "--do-sample", "--greedy").sampling.do_sample


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "0"], r"--temperature 0\.0: must be greater than 0 \(or give --greedy"),
        (["--top-k", "-1"], "--top-k -1: must be at least 0"),
        (["--top-p", "1.5"], r"--top-p 1\.5: must be from 0 to 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0.0: must be greater than 0"),
        (["--seed", "-1"], "--seed -1: must be from 0 to"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--max-length", "0"], "--max-length 0: must be at least 1"),
        (["--iteration", "-1"], "--iteration -1: must be at least 0"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0: must be at least"),
        (["--stop", ""], "--stop and --add-eos-token: cannot be empty"),
        (["--prompt-file", "p"], "give either --prompt or --prompt-file"),
        (["--params-dtype", "fp8"], "'fp8' is not one of fp32, fp16, bf16"),
        (["--device", "tpu"], "'tpu' is not one of npu, cuda, cpu, auto"),
    ],
)
def test_impossible_values_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read("--prompt", "a", *argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), []),
        (("--repetition-penalty", "1.2"), []),
        (("--temperature", "0.5", "--top-k", "5"), ["--temperature", "--top-k"]),
        (("--seed", "1", "--top-p", "0.5"), ["--top-p", "--seed"]),
        (("--do-sample", "--temperature", "0.5"), []),
        (("--do-sample", "--temperature", "0.5", "--greedy"), ["--temperature"]),
    ],
)
def test_flags_of_drawing_tokens_need_do_sample(argv, expected: list[str]) -> None:
    assert read("--prompt", "a", *argv).sampling.without_effect == expected


def test_something_to_continue_is_needed() -> None:
    with pytest.raises(UsageError, match="give either --prompt or --prompt-file"):
        read()
