"""ModelLink's command lines, as its shell scripts and documents have them, mean what they meant."""

import json

import megatron_files as files
import numpy as np
import pytest

from ml_convert.cli import main
from ml_convert.errors import ConversionError
from ml_convert.modellink import translate

OLD = "--model-type GPT --load-dir in --save-dir out"
CUT = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 4"
PADDED = "--make-vocab-size-divisible-by 1 --pad-vocab last-row"
CORE = f"{PADDED} --mla-names modellink"
EXPORT = "--save-format hf --hf-config out --load-dir in --save-dir out/"


# One form of each row of the reference's matrix (modellink.md 3.1), in both of its spellings.
@pytest.mark.parametrize(
    ("old", "new"),
    [
        # HF to Legacy, with layer list and interleaving
        (
            f"{OLD} --loader llama2_hf --saver megatron {CUT} --num-layer-list 6,8,8,10 "
            "--tokenizer-model in/tokenizer.json --w-pack True --params-dtype bf16",
            f"--load-format hf --save-format legacy --load-dir in --save-dir out {CUT} "
            f"--num-layer-list 6,8,8,10 --params-dtype bf16 {PADDED}",
        ),
        (
            f"{OLD} --loader chatglm3_hf --saver megatron --add-qkv-bias --add-dense-bias "
            "--num-layers-per-virtual-pipeline-stage 2 --tokenizer-model None --embed-layernorm",
            "--load-format hf --save-format legacy --load-dir in --save-dir out "
            f"--num-layers-per-virtual-pipeline-stage 2 {PADDED}",
        ),
        (
            f"{OLD} --load-model-type hf --save-model-type mg {CUT} --model-type-hf llama2",
            f"--load-format hf --save-format legacy --load-dir in --save-dir out {CUT} {PADDED}",
        ),
        (
            f"{OLD} --loader hf_mcore --saver mg_mcore {CUT} --model-type-hf qwen --add-qkv-bias",
            f"--load-format hf --save-format legacy --load-dir in --save-dir out {CUT} {PADDED}",
        ),
        # HF to Core
        (
            f"{OLD} --loader hf_mcore --saver mg_mcore --use-mcore-models --model-type-hf mixtral "
            "--target-expert-parallel-size 2 --tokenizer-model in/tokenizer.model",
            "--load-format hf --save-format mcore --load-dir in --save-dir out "
            f"--target-expert-parallel-size 2 {CORE}",
        ),
        (
            f"{OLD} --use-mcore-models --load-model-type hf --save-model-type mg "
            "--expert-model-parallel-size 2 --moe-grouped-gemm --num-layer-list 1,3 "
            "--spec modellink.tasks.models.spec.deepseek_spec layer_spec",
            "--load-format hf --save-format mcore --load-dir in --save-dir out "
            f"--expert-model-parallel-size 2 --moe-grouped-gemm --num-layer-list 1,3 {CORE}",
        ),
        # its second version
        (
            "--load-model-type hf --save-model-type mg --load-dir in --save-dir out "
            "--model-type-hf qwen3-moe --target-tensor-parallel-size 2",
            "--load-format hf --save-format mcore --load-dir in --save-dir out "
            f"--target-tensor-parallel-size 2 {PADDED} --mla-names mindspeed",
        ),
        # Legacy and Core to HF
        (
            f"{OLD} --loader megatron --saver megatron --save-model-type save_huggingface_llama "
            "--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1 --w-pack True",
            f"{EXPORT}mg2hg",
        ),
        (
            f"{OLD} --loader megatron --saver megatron --save-model-type huggingface_bloom {CUT} "
            "--num-layer-list 1,3 --num-layers-per-virtual-pipeline-stage 1 --embed-layernorm",
            f"{EXPORT}mg2hg",
        ),
        (
            f"{OLD} --loader megatron --saver megatron --save-model-type save_huggingface_llama "
            "--lora-load lora --lora-r 16 --lora-alpha 32 "
            "--lora-target-modules query_key_value dense",
            f"{EXPORT}mg2hg --lora-load lora --lora-r 16 --lora-alpha 32 "
            "--lora-target-modules query_key_value dense",
        ),
        (
            f"{OLD} --use-mcore-models --model-type-hf llama2 --save-model-type huggingface "
            "--loader mg_mcore --saver mg_mcore --params-dtype bf16",
            f"{EXPORT}mg2hf --params-dtype bf16",
        ),
        (
            f"{OLD} --load-model-type mg --save-model-type hf --load-from-legacy",
            f"{EXPORT}mg2hf",
        ),
        (
            "--load-model-type mg --save-model-type hf --load-dir in --save-dir out "
            "--hf-cfg-dir origin --model-type-hf qwen25",
            "--save-format hf --hf-config origin --load-dir in --save-dir out/mg2hf",
        ),
        # Legacy to Core and back, and each to itself
        (
            f"{OLD} --loader megatron --saver mg_mcore {CUT} --megatron-path m --no-checking",
            f"--save-format mcore --load-dir in --save-dir out {CUT} {CORE}",
        ),
        (
            f"{OLD} --load-model-type mg --save-model-type mg --load-from-legacy "
            f"--use-mcore-models {CUT}",
            f"--save-format mcore --load-dir in --save-dir out {CUT} {CORE}",
        ),
        (
            f"{OLD} --loader mg_mcore --saver megatron {CUT} --max-queue-size 10",
            f"--save-format legacy --load-dir in --save-dir out {CUT} {PADDED}",
        ),
        (
            f"{OLD} --load-model-type mg --save-model-type mg --use-mcore-models "
            f"--save-to-legacy {CUT}",
            f"--save-format legacy --load-dir in --save-dir out {CUT} {PADDED}",
        ),
        (
            f"{OLD} --loader megatron --saver megatron {CUT} --lora-load lora",
            f"--save-format legacy --load-dir in --save-dir out {CUT} --lora-load lora {PADDED}",
        ),
        (
            f"{OLD} --loader mixtral_mg --saver mixtral {CUT}",
            f"--save-format legacy --load-dir in --save-dir out {CUT} {PADDED}",
        ),
        (
            f"{OLD} --loader mg_mcore --saver mg_mcore --use-mcore-models "
            "--target-expert-parallel-size=4 --make-vocab-size-divisible-by=64",
            "--save-format mcore --load-dir in --save-dir out --target-expert-parallel-size 4 "
            "--make-vocab-size-divisible-by 64 --pad-vocab last-row --mla-names modellink",
        ),
    ],
)
def test_each_form_is_translated(old, new):
    found = translate(old.split())
    assert sorted(found.words) == sorted(new.split())


def test_our_own_command_lines_are_left_alone():
    words = "--load-dir in --save-dir out --save-format hf --model-type-hf llama --lora-load x"
    assert translate(words.split()) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model-type BERT --loader megatron --saver megatron", "--model-type BERT: only GPT"),
        ("--loader nemo --saver megatron", "--loader nemo: is unknown"),
        ("--loader megatron --saver nemo", "--saver nemo: is unknown"),
        ("--loader megatron", "--saver or --save-model-type is needed"),
        ("--saver megatron", "--loader or --load-model-type is needed"),
        ("--load-model-type optim --save-model-type mg", "--load-model-type optim: valid are hf"),
        ("--load-model-type hf --save-model-type x", "--save-model-type x: valid are hf, mg"),
        ("--load-model-type hf --save-model-type mg --noop-layers 0", "--noop-layers: layers that"),
        ("--loader megatron --loader megatron --saver megatron", "--loader: is given twice"),
        ("--loader --saver megatron", "--loader: needs one value"),
        ("--loader megatron --saver megatron --no-checking x", "unexpected argument 'x'"),
        ("x --loader megatron --saver megatron", "unexpected argument 'x'"),
        ("--loader megatron --saver megatron --w-pack True x", "--w-pack: unexpected argument 'x'"),
        ("--loader hf_mcore --saver mg_mcore --moe-grouped-gemm x", "--moe-grouped-gemm: unexp"),
    ],
)
def test_what_means_nothing_is_refused(words, message):
    with pytest.raises(ConversionError, match=message):
        translate([*words.split(), "--load-dir=in", "--save-dir=out"])


def test_directories_are_needed():
    with pytest.raises(ConversionError, match="--load-dir and --save-dir are needed"):
        translate(["--loader", "megatron", "--saver", "megatron", "--save-dir", "out"])


def test_an_old_command_line_works_and_shows_the_new_one(tmp_path, oracle, capsys):
    model = files.Model(files.DENSE)
    origin = model.write(tmp_path / "hf", oracle.write_safetensors)
    (origin / "tokenizer.json").write_text("{}")
    words = f"--model-type GPT --loader llama2_hf --saver megatron --load-dir {origin} "
    words += f"--save-dir {tmp_path}/mg --target-tensor-parallel-size 2 "
    words += f"--tokenizer-model {origin}/tokenizer.json"
    assert main(words.split()) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("ml-convert: this is now written ml-convert --load-format hf --save-f")
    assert second == "ml-convert: --tokenizer-model: not needed, the checkpoint says it"
    expected = files.cut(model, tp=2, padded=50, style="legacy", fill="last-row")
    files.assert_same(files.read(tmp_path / "mg" / "release"), expected)

    words = f"--model-type GPT --loader megatron --saver megatron --load-dir {tmp_path}/mg "
    words += f"--save-model-type save_huggingface_llama --save-dir {origin}"
    assert main(words.split()) == 0
    result = origin / "mg2hg"
    assert (result / "tokenizer.json").exists()
    assert json.loads((result / "config.json").read_text()).items() >= model.config.items()
    for name, tensor in oracle.read_model(result).items():
        np.testing.assert_array_equal(tensor, model.tensors[name], err_msg=name)


def test_an_export_needs_the_original_model_and_says_where(tmp_path, capsys):
    words = f"--load-model-type mg --save-model-type hf --load-dir {tmp_path} --save-dir "
    assert main([*words.split(), str(tmp_path / "new")]) == 2
    _, line = capsys.readouterr().err.splitlines()
    assert f"--save-dir {tmp_path}/new: holds no config.json. As with ModelLink" in line
    assert "--hf-cfg-dir" in line


def test_a_mistake_in_an_old_command_line_is_one_line(capsys):
    words = "--loader megatron --saver nemo --load-dir in --save-dir out"
    assert main(words.split()) == 2
    assert capsys.readouterr().err == "ml-convert: --saver nemo: is unknown\n"
