from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from ml_convert import Request, convert
from ml_data.tokenizer import load_tokenizer
from ml_eval.cli import main
from ml_parallel.testing import run_ranks

PROMPTS = ["The quick, brown", "北京"]


class Recorder(io.StringIO):
    """Remembers what had been written at each flush, and can press Ctrl-C at one of them."""

    def __init__(self, ctrl_c_at: int | None) -> None:
        super().__init__()
        self.flushed: list[str] = []
        self.ctrl_c_at = ctrl_c_at

    def flush(self) -> None:
        self.flushed.append(self.getvalue())
        if len(self.flushed) == self.ctrl_c_at:
            os.kill(os.getpid(), signal.SIGINT)


def run(
    ranks: int, *argv: str | Path, ctrl_c_at: int | None = None
) -> list[tuple[int, list[str], str]]:
    """Run the command on ranks; returns exit code, growing output and messages of each."""

    def job() -> tuple[int, list[str], str]:
        logging.getLogger().handlers.clear()  # pytest's
        out, err = Recorder(ctrl_c_at), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["generate", "--device", "cpu", *map(str, argv)])
        return code, [*out.flushed, out.getvalue()], err.getvalue()

    return run_ranks(job, ranks, timeout=120)


def reference(directory: Path, prompt: str, max_new_tokens: int) -> str:
    """Return how transformers continues a prompt."""
    tokenizer = load_tokenizer(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    (ids,) = tokenizer.encode_batch([prompt])
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(out[0].tolist()).removeprefix(prompt)


def test_the_program_continues_texts_as_transformers_does(llama: Path) -> None:
    flags = ["--load-dir", str(llama), "--prompt", *PROMPTS, "--max-new-tokens", "20"]
    done = subprocess.run(
        [sys.executable, "-m", "ml_eval", "generate", "--device", "cpu", *flags],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    first, second = (reference(llama, prompt, 20) for prompt in PROMPTS)
    expected = f"==> 1/2: {PROMPTS[0]} <==\n{first}\n\n==> 2/2: {PROMPTS[1]} <==\n{second}\n"
    assert (done.returncode, done.stdout) == (0, expected)
    loaded, mode, elapsed = done.stderr.splitlines()
    assert re.fullmatch(r"loaded .* in [\d.]+ s", loaded)
    assert mode == "greedy"
    assert re.fullmatch(r"Elapsed: [\d.]+s, \d+ tokens, [\d.]+ tokens/s", elapsed)


def test_ctrl_c_ends_the_program_quietly(llama: Path) -> None:
    flags = ("--load-dir", llama, "--prompt", PROMPTS[0], "--max-new-tokens", "90")
    ((code, shown, err),) = run(1, *flags, ctrl_c_at=5)
    assert (code, shown[-1]) == (130, shown[4] + "\n")
    assert "Elapsed" not in err


def test_a_reader_that_has_enough_ends_the_program_quietly(llama: Path) -> None:
    def job() -> tuple[int, str]:
        logging.getLogger().handlers.clear()
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        flags = ["--load-dir", str(llama), "--prompt", "The"]
        err = io.StringIO()
        out = open(1, "w", closefd=False)  # noqa: SIM115
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["generate", "--device", "cpu", *flags])
        return code, err.getvalue()

    ((code, err),) = run_ranks(job, 1)
    assert code == 141
    assert err.splitlines()[1:] == ["greedy"]


def test_the_text_of_one_prompt_stands_alone_and_grows(llama: Path) -> None:
    flags = ("--load-dir", llama, "--prompt", PROMPTS[0], "--max-new-tokens", "20")
    ((code, shown, err),) = run(1, *flags)
    assert (code, shown[-1]) == (0, reference(llama, PROMPTS[0], 20) + "\n")
    assert len(set(shown)) > 10
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    assert err.count("\n") == 3


def test_only_one_rank_shows_the_text(llama: Path) -> None:
    flags = ("--load-dir", llama, "--prompt", *PROMPTS, "--max-new-tokens", "20")
    ((_, alone, _),) = run(1, *flags)
    (code, shown, _), *others = run(2, *flags, "--tensor-model-parallel-size", "2")
    assert (code, shown[-1]) == (0, alone[-1])
    assert others == [(0, [""], "")]


def test_sampling_depends_on_the_seed(llama: Path) -> None:
    flags = ("--load-dir", llama, "--prompt", "The", "The", "--max-new-tokens", "20", "--do-sample")
    ((_, first, err),) = run(1, *flags, "--seed", "1", "--temperature", "2", "--top-k", "0")
    ((_, again, _),) = run(1, *flags, "--seed", "1", "--temperature", "2", "--top-k", "0")
    ((_, other, _),) = run(1, *flags, "--seed", "9", "--temperature", "2", "--top-k", "0")
    assert first[-1] == again[-1] != other[-1]
    assert "sampling at temperature 2, top-k 0, top-p 0.95, seed 1\n" in err
    one, two = first[-1].split("==> 2/2: The <==\n")
    assert one.removeprefix("==> 1/2: The <==\n").strip() != two.strip()


def test_a_megatron_checkpoint_needs_a_tokenizer_and_gives_the_same_text(
    llama: Path, tmp_path: Path, capsys
) -> None:
    convert(
        Request(
            load_dir=llama,
            save_dir=tmp_path / "megatron",
            save_format="mcore",
            target_tensor_parallel_size=2,
        )
    )
    flags = ("--load", tmp_path / "megatron", "--prompt", "The", "--max-new-tokens", "20")
    assert main(["generate", *map(str, flags)]) == 2
    assert capsys.readouterr().err.endswith("give --tokenizer-name-or-path\n")
    ((code, shown, _),) = run(1, *flags, "--tokenizer-name-or-path", llama)
    assert (code, shown[-1]) == (0, reference(llama, "The", 20) + "\n")


def test_a_megatron_checkpoint_that_was_changed_is_refused(
    llama: Path, tmp_path: Path, capsys
) -> None:
    convert(Request(load_dir=llama, save_dir=tmp_path, save_format="mcore"))
    path = tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # of a weight: nothing else would notice
    path.write_bytes(content)
    flags = ("--load", tmp_path, "--prompt", "The", "--tokenizer-name-or-path", llama)
    assert main(["generate", *map(str, flags)]) == 2
    assert re.fullmatch(
        f"ml-eval generate: {path} is damaged: its sha256 .*\n", capsys.readouterr().err
    )


def empty(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "config.json").unlink()


def unsupported(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


def scaled(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_scaling"] = {"rope_type": "axial", "factor": 4.0}
    (path / "config.json").write_text(json.dumps(config))


def torn(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1])


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (None, ["--load-dir", "missing"], "--load-dir missing: no such directory"),
        (empty, [], "--load-dir .*: holds neither a Hugging Face model .* nor Megatron"),
        (unsupported, [], "model_type 'mamba' .* belongs to no known family"),
        (scaled, [], "rotary positions of type 'axial' are not supported"),
        (torn, [], r"model.safetensors: torn"),
        (None, ["--tokenizer-model", "missing"], "tokenizer missing: no such file or directory"),
        (None, ["--prompt", "x z " * 50], "leave no room for another one"),
        (None, ["--add-eos-token", "xz"], "--add-eos-token 'xz': is not a single token"),
        (None, ["--iteration", "5"], "--iteration 5: --load-dir .* is one checkpoint; leave"),
        (None, ["--prompt", "b", "--seed", f"{2**63 - 1}"],
         r"--seed 9223372036854775807: must be from 0 to 2\*\*63 - 2 with 2 prompts"),
        (None, ["--true-vocab-size", "5"], "--true-vocab-size 5: .* says 303"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    save_model, tmp_path, capsys, damage: Callable[[Path], None], flags: list[str], message: str
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for path in save_model(tie_word_embeddings=False).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    if damage is not None:
        damage(directory)
    argv = ["--load-dir", str(directory), "--prompt", "a", *flags]
    assert main(["generate", *argv]) == 2
    err = capsys.readouterr().err
    assert re.match(f"ml-eval generate: .*{message}", err)
    assert err.count("\n") == 1


def test_prompts_may_have_the_last_seeds(llama: Path) -> None:
    flags = ("--load-dir", llama, "--prompt", "a", "b", "--max-new-tokens", "2")
    ((code, _, _),) = run(1, *flags, "--do-sample", "--seed", str(2**63 - 2))
    assert code == 0


def test_a_tokenizer_may_have_tokens_that_the_model_has_not(llama: Path, tmp_path, capsys) -> None:
    larger = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))  # ids 0 to 299
    larger.add_special_tokens([f"<image_{id_}>" for id_ in range(300, 304)])
    larger.save(str(tmp_path / "tokenizer.json"))
    flags = ("--load-dir", llama, "--tokenizer-name-or-path", tmp_path, "--max-new-tokens", "20")
    ((code, shown, err),) = run(1, *flags, "--prompt", "The")
    assert (code, shown[-1]) == (0, reference(llama, "The", 20) + "\n")
    assert err.startswith(f"tokenizer {tmp_path}/tokenizer.json: has ids up to 303, and those of ")
    assert main(["generate", *map(str, flags), "--prompt", "The <image_303>"]) == 2
    expected = "its token '<image_303>' has the id 303, and those of the model end at 302"
    assert expected in capsys.readouterr().err


def test_flags_that_change_nothing_are_named(llama: Path) -> None:
    flags = ("--load-dir", llama, "--prompt", "The", "--max-new-tokens", "2", "--top-k", "5")
    ((code, _, err),) = run(1, *flags, "--temperature", "0.5")
    first, *_, mode, _ = err.splitlines()
    assert (code, mode) == (0, "greedy")
    assert first == "without --do-sample these flags change nothing: --temperature, --top-k"
    ((_, _, err),) = run(1, *flags, "--do-sample")
    assert "change nothing" not in err


def test_text_that_the_output_cannot_encode_is_escaped(llama: Path) -> None:
    def job() -> tuple[int, bytes]:
        written = io.BytesIO()
        out = io.TextIOWrapper(written, encoding="latin-1")
        flags = ["--load-dir", str(llama), "--prompt", "北京", "é", "--max-new-tokens", "20"]
        with contextlib.redirect_stdout(out):
            code = main(["generate", "--device", "cpu", *flags])
        return code, written.getvalue()

    ((code, shown),) = run_ranks(job, 1)
    assert code == 0
    first, second = shown.split(b"\n\n==> 2/2: \xe9 <==\n")
    assert first.startswith(rb"==> 1/2: \u5317\u4eac <==")
    texts = (reference(llama, "北京", 20), reference(llama, "é", 20) + "\n")
    expected = [text.encode("latin-1", "backslashreplace") for text in texts]
    assert [first.split(b"\n", 1)[1], second] == expected


def test_an_environment_that_says_half_is_one_line(llama: Path) -> None:
    def job() -> tuple[int, str]:
        torch.distributed.destroy_process_group()
        os.environ.pop("MASTER_ADDR", None)
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            code = main(["generate", "--device", "cpu", "--load-dir", str(llama), "--prompt", "a"])
        return code, err.getvalue()

    ((code, err),) = run_ranks(job, 1)
    assert code == 2
    assert re.fullmatch("ml-eval generate: RANK is set, .* set all that torchrun sets.*\n", err)


@pytest.mark.parametrize("mode", ["--greedy", "--do-sample"])
def test_a_model_that_has_diverged_is_one_line(llama: Path, tmp_path: Path, mode: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.lm_head.weight.data[5] = torch.nan
    model.save_pretrained(tmp_path)
    flags = ("--load-dir", tmp_path, "--tokenizer-name-or-path", llama, "--prompt", "The", mode)
    ((code, shown, err),) = run(1, *flags)
    assert (code, shown[-1]) == (2, "\n")
    _, _, message = err.splitlines()
    assert message.startswith("ml-eval generate: the model computes nan or infinite logits")
