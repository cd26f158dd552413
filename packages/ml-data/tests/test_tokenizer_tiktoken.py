"""Files of tiktoken ranks give the ids of tiktoken."""

from __future__ import annotations

import base64
import json
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str

from ml_data.tokenizer import Tokenizer, load_tokenizer
from ml_models.flags import UsageError

# As each model's own code has them; those of OpenAI in the form of tiktoken 0.14.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN36 = QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p", r"[^\s\p{L}\p{M}\p")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CAMEL = [rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"]
REST = [r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = "|".join([*(word + SHORT for word in CAMEL), r"\p{N}{1,3}", *REST])


@dataclass(frozen=True, kw_only=True)
class Original:
    """What the code of a model says."""

    asset: str
    pattern: str
    vocab_size: int
    ids: tuple[int | None, int, int]
    """Of bos, eod and pad."""
    some: dict[str, int]
    """Special tokens."""
    nfc: bool = False


ORIGINALS = [
    Original(
        asset="tokenizer-llama3",
        pattern=CL100K,
        vocab_size=128256,
        ids=(128000, 128001, 128004),
        some={"<|eot_id|>": 128009, "<|end_header_id|>": 128007, "<|python_tag|>": 128010}
        | {"<|reserved_special_token_0|>": 128002, "<|reserved_special_token_245|>": 128255},
    ),
    Original(
        asset="tokenizer-llama4",
        pattern=O200K,
        vocab_size=202048,
        ids=(200000, 200001, 200018),
        some={"<|eot|>": 200008, "<|patch|>": 200092, "<|reasoning_thinking_start|>": 201142}
        | {"<|text_post_train_reserved_special_token_68|>": 200079}
        | {"<|vision_reserved_special_token_1047|>": 201133}
        | {"<|reserved_special_token_903|>": 202047},
    ),
    Original(
        asset="tokenizer-qwen",
        pattern=QWEN,
        vocab_size=151851,
        ids=(None, 151643, 151643),
        some={"<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_204|>": 151850},
        nfc=True,
    ),
    Original(
        asset="tokenizer-qwen3.6",
        pattern=QWEN36,
        vocab_size=248077,
        ids=(None, 248044, 248044),
        some={"<|im_end|>": 248046, "<think>": 248068, "<|audio_pad|>": 248076},
        nfc=True,
    ),
    Original(
        asset="tokenizer-gpt2-ranks",
        pattern=r50k_pat_str,
        vocab_size=50257,
        ids=(None, 50256, 50256),
        some={"<|endoftext|>": 50256},
    ),
]

ODD = [
    "",
    "'s'S'\u017f'LL'll'Ve 'd don't DON'T",
    "1234567 ١٢٣٤ Ⅷ½",
    "\x00\x01\x1b[0m\x7f\x85\u00a0 \u2028\u3000\n\r\n \r\t \n",
    "👩\u200d👩\u200d👧 e\u0301 \u202eabc ﬁ ǅ",
    "a\ud800b \ud83d\ude00 \udfff",
    "Größe, naïveté; π ≈ 3.14159 🙂",
    "北京是中国的首都。\n春眠不觉晓\u3000处处闻啼鸟。",
]
RUNS = [
    f"{a}{c * n}{b}" for c in " \n\t-=/a0" for n in range(1, 130) for a, b in (("", ""), ("x", "y"))
]


def characters() -> Iterator[str]:
    """Yield texts in which each of the most used code points stands in every position.

    All of Unicode in this way takes a minute for a tokenizer, and gave no difference.
    """
    letters = range(0x3400, 0xD800, 16)  # Chinese and Korean, all of one class
    points = [*range(0x3400), *letters, *range(0xE000, 0x10800), *range(0x1D000, 0x1FB00)]
    for start in range(0, len(points), 1000):
        some = map(chr, points[start : start + 1000])
        yield "".join(f"the{c}the 1{c}2'{c} {c} \n{c}{c}." for c in some)


@pytest.fixture(scope="module", params=ORIGINALS, ids=lambda original: original.asset)
def loaded(request, asset) -> tuple[Original, Tokenizer, tiktoken.Encoding]:
    original = request.param
    directory = asset(original.asset)
    tokenizer = load_tokenizer(directory)
    (file,) = directory.iterdir()
    encoding = tiktoken.Encoding(
        original.asset,
        pat_str=original.pattern,
        mergeable_ranks=load_tiktoken_bpe(str(file)),
        special_tokens=dict(tokenizer.special_tokens),
    )
    return original, tokenizer, encoding


def test_ranks_give_the_ids_of_tiktoken(loaded, asset, texts):
    original, tokenizer, encoding = loaded
    chapters = json.loads((asset("text-chinese") / "documents.json").read_text())
    specials = "a".join(tokenizer.special_tokens)
    documents = [*texts, *ODD, *RUNS, *chapters[:20], *characters(), specials]
    if original.nfc:
        documents = [unicodedata.normalize("NFC", text) for text in documents]
    expected = encoding.encode_batch(documents, allowed_special="all", num_threads=1)
    ids = tokenizer.encode_batch(documents, add_special_tokens=False)
    wrong = [
        n for n, (ours, theirs) in enumerate(zip(ids, expected, strict=True)) if ours != theirs
    ]
    assert not [documents[n] for n in wrong]
    assert [tokenizer.decode(own) for own in ids[: len(texts)]] == documents[: len(texts)]


def test_special_tokens_and_roles_are_those_of_the_model(loaded):
    original, tokenizer, _ = loaded
    assert tokenizer.kind == "tiktoken"
    assert tokenizer.vocab_size == original.vocab_size
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad) == original.ids
    assert tokenizer.special_tokens.items() >= original.some.items()
    assert {token: tokenizer.token_id(token) for token in original.some} == original.some
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    (plain,) = tokenizer.encode_batch(["a"], add_special_tokens=False)
    assert tokenizer.encode_batch(["a"]) == [[*begin, *plain]]
    marked = [*begin, *plain, tokenizer.eod]
    assert tokenizer.decode(marked) == "a"
    assert tokenizer.decode(marked, skip_special_tokens=False).endswith("a" + last(tokenizer))


def last(tokenizer: Tokenizer) -> str:
    return next(name for name, id_ in tokenizer.special_tokens.items() if id_ == tokenizer.eod)


def test_qwen_normalizes_its_text(asset):
    tokenizer = load_tokenizer(asset("tokenizer-qwen"))
    apart, together = tokenizer.encode_batch(["Cafe\u0301", "Café"])
    assert apart == together


def test_tekken_gives_the_ids_of_tiktoken_after_its_special_tokens(asset, texts):
    path = asset("tokenizer-tekken") / "tekken.json"
    described = json.loads(path.read_text())
    count = described["config"]["default_num_special_tokens"]
    size = described["config"]["default_vocab_size"]
    vocabulary = described["vocab"][: size - count]
    encoding = tiktoken.Encoding(
        "tekken",
        pat_str="|".join([*CAMEL, r"\p{N}", *REST]),
        mergeable_ranks={base64.b64decode(t["token_bytes"]): t["rank"] for t in vocabulary},
        special_tokens={},
    )
    tokenizer = load_tokenizer(path.parent)
    chapters = json.loads((asset("text-chinese") / "documents.json").read_text())
    documents = [*texts, *ODD, *RUNS, *chapters[:10], *characters()]
    expected = encoding.encode_ordinary_batch(documents, num_threads=1)
    ids = tokenizer.encode_batch(documents)
    assert ids == [[1, *(count + id_ for id_ in own)] for own in expected]
    assert tokenizer.kind == "tiktoken"
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (131072, 1, 2, 11)
    some = {"[INST]": 3, "[/INST]": 4, "[TOOL_CALLS]": 9, "<SPECIAL_999>": 999}
    assert {token: tokenizer.token_id(token) for token in some} == some
    assert [tokenizer.decode(own) for own in ids[: len(texts)]] == texts


def test_the_files_beside_ranks_may_name_other_tokens(asset, tmp_path):
    directory = shutil.copytree(asset("tokenizer-llama3"), tmp_path / "llama")
    before = load_tokenizer(directory)
    config = {
        "eos_token": "<|eot_id|>",
        "add_bos_token": False,
        "added_tokens_decoder": {"128002": {"content": "<|mine|>"}},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    after = load_tokenizer(directory)
    assert (before.eod, after.eod) == (128001, 128009)
    assert after.identity != before.identity
    (ids,) = after.encode_batch(["<|mine|>"])
    assert ids == [128002] == [after.token_id("<|mine|>")]
    assert after.token_id("<|reserved_special_token_0|>") is None


def test_ranks_are_found_by_their_content_whatever_their_name(asset, tmp_path):
    (file,) = asset("tokenizer-gpt2-ranks").iterdir()
    named = Path(shutil.copy(file, tmp_path / "tokenizer.model"))
    expected = load_tokenizer(file).encode_batch(["def f"])
    assert load_tokenizer(named).encode_batch(["def f"]) == expected
    assert load_tokenizer(tmp_path, "TikTokenizer").encode_batch(["def f"]) == expected
    named.write_bytes(b"\x0a\x0e a sentencepiece model")
    with pytest.raises(UsageError, match=r"needs a file of tiktoken ranks there; .* is not one"):
        load_tokenizer(tmp_path, "TikTokenizer")
    shutil.copy(file, named)
    with pytest.raises(UsageError, match=r"Llama2Tokenizer needs a .* is a list of tiktoken ranks"):
        load_tokenizer(tmp_path, "Llama2Tokenizer")


def test_ranks_of_an_unknown_or_damaged_file_are_refused(tmp_path):
    ranks = tmp_path / "my.tiktoken"
    ranks.write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UsageError, match="unknown model \\(known: Llama 3, Llama 4, Qwen"):
        load_tokenizer(tmp_path)
    tekken = tmp_path / "tekken.json"
    config = {"default_vocab_size": 3, "default_num_special_tokens": 2, "pattern": "("}
    token = {"rank": 0, "token_bytes": "YQ=="}
    for content in (
        '{"config": {"default_vocab_size": 1}}',
        '{"config": "default_vocab_size"',
        json.dumps({"config": config, "vocab": [token]}),
        json.dumps({"config": config, "vocab": [{**token, "rank": "0"}]}),
        json.dumps({"config": config, "vocab": [{**token, "token_bytes": 1}]}),
    ):
        tekken.write_text(content)
        with pytest.raises(UsageError, match=r"tekken\.json: not a tekken\.json"):
            load_tokenizer(tekken)
