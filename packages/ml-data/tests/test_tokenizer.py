from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from ml_data.tokenizer import load_tokenizer
from ml_models.flags import UsageError


def edit_json(path: Path, **changes: object) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def split_bpe(directory: Path) -> None:
    """Replace a tokenizer.json by the files of GPT-2's class."""
    path = directory / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    path.unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>"}
    edit_json(directory / "tokenizer_config.json", **config)


@pytest.fixture
def own_bpe(bpe, tmp_path) -> Path:
    return shutil.copytree(bpe, tmp_path / "bpe")


@pytest.fixture
def own_sentencepiece(sentencepiece_model, tmp_path) -> Path:
    return shutil.copytree(sentencepiece_model, tmp_path / "sentencepiece")


def sentencepiece_ids(directory: Path, texts: list[str]) -> list[list[int]]:
    model = str(directory / "tokenizer.model")
    return sentencepiece.SentencePieceProcessor(model_file=model).encode(texts, out_type=int)


def transformers_tokenizer(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def test_a_tokenizer_json_gives_the_ids_of_tokenizers_and_of_transformers(bpe, texts):
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.kind == "tokenizers"
    reference = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    ids = tokenizer.encode_batch(texts)
    assert ids == [reference.encode(text).ids for text in texts]
    assert ids == transformers_tokenizer(bpe)(texts)["input_ids"]
    assert tokenizer.vocab_size == 2000
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad) == (0, 1, 2)


def test_deepseek_gives_the_ids_of_transformers(asset, texts):
    directory = asset("tokenizer-deepseek")
    tokenizer = load_tokenizer(directory)
    theirs = transformers_tokenizer(directory)
    chapters = json.loads((asset("text-chinese") / "documents.json").read_text())[:20]
    special = "a".join(tokenizer.special_tokens)
    odd = ["", "\x00\x1b\x85\ufeff\ufffd", " " * 50 + "\u3000\u2028", "👩\u200d👩 e\u0301", special]
    documents = [*texts, *chapters, *odd]
    ids = tokenizer.encode_batch(documents)
    assert ids == theirs(documents)["input_ids"]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (129280, 0, 1)
    assert [tokenizer.decode(own) for own in ids] == [
        *documents[:-1],
        theirs.decode(ids[-1], skip_special_tokens=True),
    ]


def test_special_tokens_are_shown_or_left_out(bpe, own_bpe):
    split_bpe(own_bpe)
    for directory, kind in ((bpe, "tokenizers"), (own_bpe, "transformers")):
        tokenizer = load_tokenizer(directory)
        assert tokenizer.kind == kind
        assert dict(tokenizer.special_tokens) == {"<s>": 0, "</s>": 1, "<pad>": 2}
        assert [tokenizer.token_id(token) for token in ("<s>", "<pad>", "nothing")] == [0, 2, None]
        (ids,) = tokenizer.encode_batch(["def</s>x"], add_special_tokens=False)
        assert 1 in ids
        assert tokenizer.decode([0, *ids]) == "defx"
        assert tokenizer.decode([0, *ids], skip_special_tokens=False) == "<s>def</s>x"


def test_surrogates_become_characters_or_the_replacement_character(
    bpe, sentencepiece_model, own_bpe
):
    split_bpe(own_bpe)
    slow = load_tokenizer(sentencepiece_model, use_fast=False)
    for tokenizer in (*map(load_tokenizer, (bpe, own_bpe, sentencepiece_model)), slow):
        broken, whole = tokenizer.encode_batch(["a\ud83d\ude42\ud800b", "a🙂\ufffdb"])
        assert broken == whole


def test_what_a_tokenizer_json_adds_around_a_text_can_be_left_out(own_bpe):
    template = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    backend = tokenizers.Tokenizer.from_file(str(own_bpe / "tokenizer.json"))
    backend.post_processor = template
    backend.save(str(own_bpe / "tokenizer.json"))
    tokenizer = load_tokenizer(own_bpe)
    (plain,) = tokenizer.encode_batch(["def"], add_special_tokens=False)
    assert tokenizer.encode_batch(["def"]) == [[0, *plain]]
    assert tokenizer.decode([0, *plain, 1]) == "def"


def test_truncation_and_padding_of_a_tokenizer_json_do_not_touch_documents(own_bpe, texts):
    backend = tokenizers.Tokenizer.from_file(str(own_bpe / "tokenizer.json"))
    backend.enable_truncation(8)
    backend.enable_padding()
    backend.save(str(own_bpe / "tokenizer.json"))
    batch = load_tokenizer(own_bpe).encode_batch([texts[0], "a"])
    assert len(batch[0]) > 8
    assert len(batch[1]) == 1


def test_sentencepiece_ids_are_those_of_sentencepiece(sentencepiece_model, texts):
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.kind == "sentencepiece"
    expected = sentencepiece_ids(sentencepiece_model, texts)
    assert tokenizer.encode_batch(texts, add_special_tokens=False) == expected
    assert tokenizer.encode_batch(texts) == [[1, *ids] for ids in expected]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (1500, 1, 2)
    assert tokenizer.pad == tokenizer.eod


def test_mistral_ids_are_those_of_sentencepiece_on_indented_code(asset, texts):
    directory = asset("tokenizer-mistral")
    code = [*texts, "def f():\n    if x:\n        return  1\n\treturn 2"]
    tokenizer = load_tokenizer(directory, "SentencePieceTokenizer")
    assert tokenizer.encode_batch(code) == sentencepiece_ids(directory, code)
    assert tokenizer.vocab_size == 32000


@pytest.mark.parametrize(
    ("tokenizer_type", "config", "before", "after"),
    [
        (None, {}, [1], []),
        ("PretrainedFromHF", {"add_bos_token": False}, [], []),
        (None, {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ("SentencePieceTokenizer", {"add_bos_token": True, "add_eos_token": True}, [], []),
        ("GPTSentencePieceTokenizer", {}, [], []),
        ("Llama2Tokenizer", {"add_bos_token": False, "add_eos_token": True}, [1], []),
    ],
)
def test_type_and_config_say_what_goes_around_a_sentencepiece_text(
    own_sentencepiece, tokenizer_type, config, before, after
):
    edit_json(own_sentencepiece / "tokenizer_config.json", **config)
    tokenizer = load_tokenizer(own_sentencepiece, tokenizer_type)
    (plain,) = tokenizer.encode_batch(["def"], add_special_tokens=False)
    assert tokenizer.encode_batch(["def"]) == [[*before, *plain, *after]]


def test_tokens_added_beside_a_sentencepiece_model_count(own_sentencepiece):
    edit_json(own_sentencepiece / "added_tokens.json", **{"<pad>": 1500})
    added = {"1501": {"content": "<|end|>"}}
    config = {"added_tokens_decoder": added, "pad_token": "<pad>", "eos_token": "<|end|>"}
    edit_json(own_sentencepiece / "tokenizer_config.json", **config)
    tokenizer = load_tokenizer(own_sentencepiece / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.pad, tokenizer.eod) == (1502, 1500, 1501)
    (ids,) = tokenizer.encode_batch(["def  x"], add_special_tokens=False)
    assert tokenizer.decode([1, *ids, 1501]) == "def  x"


def test_a_role_whose_token_has_no_id_is_an_error(own_sentencepiece, asset, tmp_path):
    edit_json(own_sentencepiece / "special_tokens_map.json", pad_token="<pad>")
    with pytest.raises(UsageError, match="pad_token '<pad>' is none of its tokens; added_tokens"):
        load_tokenizer(own_sentencepiece)
    ranks = shutil.copytree(asset("tokenizer-gpt2-ranks"), tmp_path / "ranks")
    edit_json(ranks / "tokenizer_config.json", eos_token="<|eot|>", pad_token="!")
    with pytest.raises(UsageError, match=r"eos_token '<\|eot\|>' is none of its tokens"):
        load_tokenizer(ranks)
    edit_json(ranks / "added_tokens.json", **{"<|eot|>": 50257})
    tokenizer = load_tokenizer(ranks)
    assert (tokenizer.eod, tokenizer.pad, tokenizer.vocab_size) == (50257, 0, 50258)


def test_special_tokens_may_be_named_in_special_tokens_map(own_bpe):
    (own_bpe / "tokenizer_config.json").unlink()
    assert load_tokenizer(own_bpe).eod is None
    edit_json(own_bpe / "special_tokens_map.json", eos_token={"content": "</s>"})
    tokenizer = load_tokenizer(own_bpe)
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad) == (None, 1, 1)


def test_a_token_that_only_the_config_names_gets_the_id_transformers_gives_it(own_bpe):
    edit_json(own_bpe / "tokenizer_config.json", eos_token="<|new|>")
    tokenizer = load_tokenizer(own_bpe)
    assert tokenizer.kind == "transformers"
    assert (tokenizer.vocab_size, tokenizer.eod) == (2001, 2000)
    assert tokenizer.encode_batch(["def<|new|>"])[0][-1] == 2000
    assert tokenizer.decode(tokenizer.encode_batch(["def<|new|>"])[0]) == "def"


def test_a_directory_without_tokenizer_json_is_read_by_transformers(own_bpe, texts):
    split_bpe(own_bpe)
    tokenizer = load_tokenizer(own_bpe)
    assert tokenizer.kind == "transformers"
    assert tokenizer.encode_batch(texts) == transformers_tokenizer(own_bpe)(texts)["input_ids"]


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer", "BertTokenizer"])
def test_a_directory_without_a_vocabulary_is_refused(tmp_path, name):
    # transformers 5 makes an empty tokenizer of it: every text has no tokens.
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(UsageError, match=f"{name} needs one of .*tokenizer"):
        load_tokenizer(tmp_path)


def test_the_code_of_a_tokenizer_never_runs(tmp_path):
    proof = tmp_path / "it-ran"
    directory = tmp_path / "evil"
    directory.mkdir()
    (directory / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    edit_json(directory / "tokenizer_config.json", **config)
    with pytest.raises(UsageError, match="evil: transformers cannot load it"):
        load_tokenizer(directory)
    assert not proof.exists()


def test_identity_tells_tokenizers_with_other_ids_apart(own_bpe, own_sentencepiece):
    loaded = [
        load_tokenizer(own_bpe),
        load_tokenizer(own_sentencepiece),
        load_tokenizer(own_sentencepiece, "SentencePieceTokenizer"),
    ]
    assert len({tokenizer.identity for tokenizer in loaded}) == 3
    moved = shutil.move(own_bpe, own_bpe.with_name("moved"))
    assert load_tokenizer(moved).identity == loaded[0].identity


def test_mistakes_are_named(tmp_path, own_bpe, own_sentencepiece):
    def message(path: Path, tokenizer_type: str | None = None) -> str:
        with pytest.raises(UsageError) as caught:
            load_tokenizer(path, tokenizer_type)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such file or directory" in message(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds none of tokenizer.json, tokenizer.model" in message(empty)
    assert "needs a tokenizer.model" in message(own_bpe, "Llama2Tokenizer")
    (own_bpe / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: not valid JSON" in message(own_bpe)
    (own_bpe / "tokenizer_config.json").write_text("[]")
    assert "not a JSON object" in message(own_bpe)
    (own_bpe / "tokenizer_config.json").write_text("{}")
    for decoder in ([], {"a": {"content": "b"}}, {"1": "b"}, {"1": {}}):
        edit_json(own_bpe / "tokenizer_config.json", added_tokens_decoder=decoder)
        assert "is not tokens with their ids" in message(own_bpe)
    (own_bpe / "tokenizer.json").write_text("{}")
    assert "not a tokenizer.json" in message(own_bpe)
    model = own_sentencepiece / "tokenizer.model"
    for content in (b"", b"garbage" * 100, model.read_bytes()[:1000]):
        model.write_bytes(content)
        assert "not a sentencepiece model" in message(own_sentencepiece)
    model.write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    assert "tiktoken ranks of an unknown model" in message(own_sentencepiece)


def test_loading_a_tokenizer_imports_only_its_library(bpe, sentencepiece_model, asset):
    script = (
        "import sys; from ml_data.tokenizer import load_tokenizer; print(*sys.modules); "
        "load_tokenizer(sys.argv[1], use_fast=sys.argv[2] == 'fast'); print(*sys.modules)"
    )
    heavy = {"torch", "transformers", "megatron", "tokenizers", "sentencepiece", "tiktoken"}

    def imported(path: Path, how: str = "fast") -> list[set[str]]:
        command = [sys.executable, "-c", script, str(path), how]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [heavy & set(line.split()) for line in output.splitlines()]

    assert imported(bpe) == [set(), {"tokenizers"}]
    assert imported(sentencepiece_model) == [set(), {"sentencepiece", "tokenizers"}]
    assert imported(sentencepiece_model, "slow") == [set(), {"sentencepiece"}]
    assert imported(asset("tokenizer-gpt2-ranks")) == [set(), {"tokenizers"}]
