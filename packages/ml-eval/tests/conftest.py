"""Tiny random Llama models, as transformers writes them, with a tokenizer of a few texts."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers

from ml_parallel import platform

platform.import_engine()  # before the modules under test, as it silences megatron-core
transformers.utils.logging.disable_progress_bar()

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "北京是中国的首都。春眠不觉晓,处处闻啼鸟。" * 2,
    "Größe, naïveté, façade; π ≈ 3.14159, 🙂👩‍👩‍👧 and 🇨🇳.",
]
VOCABULARY = 300
EOS = "</s>"


def write_tokenizer(directory: Path, vocab_size: int = VOCABULARY) -> None:
    """Write a byte-level BPE tokenizer; its first token ends texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def random_llama(**changes: object) -> transformers.LlamaForCausalLM:
    """Make a Llama with grouped-query attention, whose logits are far enough apart to compare."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY + 3,  # not a multiple of anything: padding is needed
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        pad_token_id=0,
        **{"max_position_embeddings": 96, "eos_token_id": 0, **changes},
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """What the tokenizer was trained on."""
    return TEXTS


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[..., None]:
    """Write the tokenizer into a directory; the size of its vocabulary can be given."""
    return write_tokenizer


@pytest.fixture
def sentencepiece_model(tmp_path, texts) -> Path:
    """A model as Llama 2's, to which all but English letters are bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:1]),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    return tmp_path


@pytest.fixture(scope="session")
def save_model(tmp_path_factory) -> Callable[..., Path]:
    """Write a random model and its tokenizer, once for each config; returns their directory."""

    @functools.cache
    def save(dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        directory = tmp_path_factory.mktemp("llama")
        random_llama(**changes).to(dtype).save_pretrained(directory)
        write_tokenizer(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def llama(save_model) -> Path:
    """The directory of a model whose output layer has weights of its own."""
    return save_model(tie_word_embeddings=False)
