from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from ml_data.cli import main
from ml_data.pretraining import encoding, fast
from ml_data.pretraining.fast import FastBackendError, FastEncoder, make_encoder_for
from ml_data.reading import read_chunks
from ml_data.tokenizer import load_tokenizer

pytest.importorskip("gigatoken")


def run(source: Path, prefix: Path, tokenizer: Path, *flags: str) -> int:
    where = ["--input", str(source), "--output-prefix", str(prefix), "--workers", "2"]
    return main(["pretrain", *where, "--tokenizer-name-or-path", str(tokenizer), *flags])


def flat(encoder, texts: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(texts)
    remaining = ids.tolist()
    return [[remaining.pop(0) for _ in range(length)] for length in lengths]


@pytest.fixture
def wrong(monkeypatch):
    """A gigatoken that knows another tokenizer: its merges are in another order."""
    from gigatoken import gigatoken_rs

    real = gigatoken_rs.load_hf_json

    def load(content):
        description = json.loads(content)
        description["model"]["merges"].reverse()
        return real(json.dumps(description))

    monkeypatch.setattr(gigatoken_rs, "load_hf_json", load)


def test_the_ids_are_those_of_the_tokenizer(bpe, texts):
    tokenizer = load_tokenizer(bpe)
    encoder = make_encoder_for(tokenizer, "auto", texts)
    assert encoder.fast is not None
    assert encoder.reason == "it gives the tokenizer's ids for a sample of the input"
    assert flat(encoder, texts[-3:]) == tokenizer.encode_batch(texts[-3:])
    assert encoder.encode([])[0].tolist() == []


@pytest.mark.parametrize("name", ["deepseek", "llama3", "qwen", "gpt2-ranks", "mistral"])
def test_real_tokenizers_are_encoded_right_or_not_at_all(asset, texts, name):
    tokenizer = load_tokenizer(asset(f"tokenizer-{name}"))
    encoder = make_encoder_for(tokenizer, "auto", texts)
    assert encoder.fast is not None or "gigatoken" in encoder.reason
    assert encoder.fast is not None or name == "mistral"
    ids, lengths = encoder.encode(texts)
    expected = tokenizer.encode_batch(texts)
    assert lengths.tolist() == [len(document) for document in expected]
    assert ids.tolist() == [id_ for document in expected for id_ in document]


def test_characters_that_only_one_of_them_knows_are_encoded_by_the_tokenizer(asset):
    tokenizer = load_tokenizer(asset("tokenizer-deepseek"))
    ours = FastEncoder(tokenizer)
    new = [0x1FAEA, 0x20C1, 0x18DAF, 0x323B0, 0x10FFFF]  # of Unicode 17, but for the last
    batch = ["a", *(f"x{chr(code)}(y {chr(code)}b1{chr(code)}2" for code in new), "北京"]
    assert flat(ours, batch) == tokenizer.encode_batch(batch)


def test_what_goes_around_a_text_is_the_tokenizers(bpe, texts, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    encoder = make_encoder_for(tokenizer, "gigatoken", texts)
    batch = ["One </s> two", "", "a"]
    assert flat(encoder, batch) == [
        [0, 0, *backend.encode(text, add_special_tokens=False).ids, 1] for text in batch
    ]


def test_a_tokenizer_that_gigatoken_cannot_load_is_encoded_by_its_own_library(tmp_path, texts):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    encoder = make_encoder_for(tokenizer, "auto", texts)
    assert encoder.fast is None
    assert encoder.reason.startswith("gigatoken cannot load the tokenizer (")
    assert flat(encoder, ["a b a"]) == [[0, 1, 0]]
    with pytest.raises(FastBackendError, match="gigatoken cannot load the tokenizer"):
        make_encoder_for(tokenizer, "gigatoken", texts)


def test_a_tokenizer_of_another_library_is_encoded_by_it(sentencepiece_model, texts):
    tokenizer = load_tokenizer(sentencepiece_model, use_fast=False)
    encoder = make_encoder_for(tokenizer, "auto", texts)
    assert encoder.reason == "gigatoken does not read tokenizers of sentencepiece"


@pytest.mark.usefixtures("wrong")
def test_other_ids_for_a_sample_end_its_use(bpe, texts):
    tokenizer = load_tokenizer(bpe)
    encoder = make_encoder_for(tokenizer, "auto", texts)
    assert encoder.fast is None
    assert encoder.reason.startswith("gigatoken gives other ids than the tokenizer for '")
    with pytest.raises(FastBackendError, match="gigatoken gives other ids"):
        make_encoder_for(tokenizer, "gigatoken", texts)


@pytest.mark.usefixtures("wrong")
def test_other_ids_for_a_piece_of_the_texts_are_noticed(bpe, texts):
    tokenizer = load_tokenizer(bpe)
    encoder = fast.Encoder(tokenizer=tokenizer, fast=FastEncoder(tokenizer), reason="")
    with pytest.raises(FastBackendError, match="gigatoken gives other ids"):
        encoder.encode(texts)


def test_without_gigatoken_the_extra_is_named(bpe, texts, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken.gigatoken_rs", None)
    encoder = make_encoder_for(load_tokenizer(bpe), "auto", texts)
    assert encoder.reason == "gigatoken is not installed (pip install 'ml-data[fast]')"


# The whole command.


@pytest.mark.parametrize("flags", [(), ("--append-eod", "--split-sentences", "--deduplicate")])
def test_the_files_are_the_same_with_any_backend(bpe, jsonl, tmp_path, flags, caplog):
    caplog.set_level("INFO")
    written = {}
    for backend in ("tokenizers", "gigatoken", "auto"):
        out = tmp_path / backend
        assert run(jsonl, out / "data", bpe, "--tokenizer-backend", backend, *flags) == 0
        written[backend] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(written["tokenizers"]) == 3
    assert written["gigatoken"] == written["tokenizers"] == written["auto"]
    chosen = [text for text in caplog.messages if text.startswith("encoding with")]
    assert [text.split()[2] for text in chosen] == ["gigatoken:", "gigatoken:"]


def test_what_it_cannot_do_is_an_error_when_it_was_asked_for(
    sentencepiece_model, jsonl, tmp_path, capsys
):
    flags = ("--tokenizer-not-use-fast", "--tokenizer-backend", "gigatoken")
    assert run(jsonl, tmp_path / "data", sentencepiece_model, *flags) == 2
    error = capsys.readouterr().err
    assert "--tokenizer-backend gigatoken: gigatoken does not read tokenizers of" in error
    assert error.count("\n") == 1


def test_a_difference_in_the_middle_begins_the_run_again(bpe, jsonl, tmp_path, caplog, monkeypatch):
    """The workers are copies of this process's modules, so this one plays them itself."""
    assert run(jsonl, tmp_path / "right", bpe, "--tokenizer-backend", "tokenizers") == 0
    attempts = []

    def map_here(make, arguments, items, **_):
        attempts.append(arguments[0].backend)
        function = make(*arguments)
        for number, item in enumerate(items):
            if arguments[0].backend == "auto" and number == 1:
                raise FastBackendError("gigatoken gives other ids than the tokenizer for 'x'")
            yield function(item)

    monkeypatch.setattr("ml_data.pretrain.map_ordered", map_here)
    lines = jsonl.read_text().splitlines(keepends=True)
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text("".join(lines[number::2]))
    source = ["--input", str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")]
    assert run(jsonl, tmp_path / "again", bpe, *source) == 0
    assert attempts == ["auto", "tokenizers"]
    assert "for 'x': beginning again with the tokenizer's own library" in caplog.text
    sizes = [(tmp_path / f"{n}_text_document.bin").stat().st_size for n in ("right", "again")]
    assert sizes[0] == sizes[1]


def test_the_sample_is_taken_from_what_can_be_read(bpe, tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text('{\n{"text": "good"}\n{"title": "other"}\n')
    config = encoding.Encoding(tokenizer=encoding.TokenizerConfig(tokenizer_name_or_path=str(bpe)))
    assert encoding.sample_texts(next(iter(read_chunks(source))), config) == ["good"]


def test_the_sample_is_small():
    sample = fast.beginning(["x" * 10**6] * 9)
    assert [len(text) for text in sample] == [fast._SAMPLE_CHARACTERS // 4] * 4
    assert fast.beginning(["a", "b"]) == ["a", "b"]
