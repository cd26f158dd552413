"""Real text, small tokenizers trained on it, and large real ones where they can be downloaded."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

TOOL = Path(__file__).resolve().parents[3] / "tools" / "assets.py"
MODULES = ("ast", "argparse", "collections/__init__", "doctest", "inspect", "pydoc", "typing")
SPECIAL = ("<s>", "</s>", "<pad>")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents in which every indentation, many symbols and a few languages occur."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = [(library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    other = [
        "北京是中国的首都。\n春眠不觉晓\u3000处处闻啼鸟。",
        "Größe, naïveté, façade; π ≈ 3.14159 🙂",
        "a",
    ]
    return [*modules, *other]


@pytest.fixture(scope="session")
def bpe(texts, tmp_path_factory) -> Path:
    """A Hugging Face directory: byte-level BPE; its tokenizer.json adds nothing around a text."""
    directory = tmp_path_factory.mktemp("bpe")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    bos, eos, pad = SPECIAL
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos},
        "pad_token": pad,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def sentencepiece_model(texts, tmp_path_factory) -> Path:
    """A directory with a tokenizer.model as Llama 2's: BPE, byte fallback, runs of spaces."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_writer=model,
        vocab_size=1500,
        model_type="bpe",
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.99,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """Fetch an asset of tools/assets.py, or skip where it cannot be had."""
    if not TOOL.exists():
        pytest.skip("tools/assets.py is not here: only the package's own tests run")
    spec = importlib.util.spec_from_file_location("tools_assets", TOOL)
    module = sys.modules["tools_assets"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def fetch(name: str) -> Path:
        try:
            return module.fetch(name)
        except module.AssetError as error:
            pytest.skip(str(error))

    return fetch


@pytest.fixture
def jsonl(texts, tmp_path) -> Path:
    """The texts, one JSON object a line, with a second key."""
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text, "title": f"text {n}"}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path
