"""The chat template of a tokenizer, against transformers: the same text, tokens and answers."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from golden_conversations import TOKENIZER, conversations
from transformers import AutoTokenizer

from ml_data.handlers import HANDLERS
from ml_data.instruction.conversation import Conversation, Message, RecordError
from ml_data.instruction.turns import IGNORED
from ml_data.templates import chat_template_format
from ml_data.tokenizer import load_tokenizer
from ml_models.flags import UsageError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
)


@pytest.fixture
def directory(tmp_path):
    """Return what makes a tokenizer's directory with a chat template."""

    def make(template: str | None, tokenizer: Path = TOKENIZER, **config) -> Path:
        path = tmp_path / "tokenizer"
        shutil.copytree(tokenizer, path)
        if template is not None:
            (path / "chat_template.jinja").write_bytes(template.encode(errors="surrogateescape"))
        file = path / "tokenizer_config.json"
        given = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**given, **config}))
        return path

    return make


def say(*texts: str, **options) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[n % 2], t) for n, t in enumerate(texts)), **options)


def openai(conversation: Conversation) -> list[dict]:
    system = conversation.system
    return ([{"role": "system", "content": system}] if system else []) + [
        {"role": message.role, "content": message.content} for message in conversation.messages
    ]


def pieces(path: Path, conversation: Conversation) -> list[str]:
    """Return question and answer of each turn, then the end, as text."""
    tokenizer = load_tokenizer(path)
    turns = chat_template_format(tokenizer).encode(conversation)
    ids = [ids for turn in turns.turns for ids in turn[:2]]
    return [tokenizer.decode(part, skip_special_tokens=False) for part in (*ids, turns.end)]


TEXTS = [
    ("Hello, how are you?", "I am well."),
    ("What is it?\n", "  spaces \n", "\n 你好", "\nnew line", "x", "y"),
    ("the day\u00a0", "🙂 é", "", "z"),
]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, MARKED], ids=["chatml", "llama2", "marked"])
@pytest.mark.parametrize("texts", TEXTS, ids=["one", "white space", "unicode"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tokens_are_those_of_apply_chat_template(directory, template, texts, system):
    path = directory(template)
    conversation = say(*texts, system=None if template is LLAMA2 else system)
    turns = chat_template_format(load_tokenizer(path)).encode(conversation)
    ids = [id_ for turn in turns.turns for id_ in (*turn.source, *turn.target)]
    hf = AutoTokenizer.from_pretrained(path)
    expected = hf.apply_chat_template(openai(conversation))
    assert hf.decode(ids) == hf.decode(expected["input_ids"])
    aligned = [*ids, *turns.end] == expected["input_ids"]
    assert aligned or texts is TEXTS[1]  # a line break at a seam: see the next test


def test_a_token_across_a_seam_is_cut_as_the_model_is_asked(directory):
    """The line break of the prompt and those that begin the answer share a token in the text."""
    path = directory(CHATML)
    tokenizer, hf = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    conversation = say("a", "\n\nb", "c", "d")
    turns = chat_template_format(tokenizer).encode(conversation).turns
    prompts = [
        hf.apply_chat_template(openai(conversation)[:number], add_generation_prompt=True)
        for number in (1, 3)
    ]
    whole = hf.apply_chat_template(openai(conversation))["input_ids"]
    assert whole[: len(prompts[0]["input_ids"])] != prompts[0]["input_ids"]  # there is such a token
    assert turns[0].source == prompts[0]["input_ids"]
    assert turns[0].target == hf.encode("\n\nb<|im_end|>\n", add_special_tokens=False)
    rest = [*turns[1].source, *turns[1].target]
    assert rest == whole[-len(rest) :]
    assert hf.decode(turns[1].target) == "d<|im_end|>\n"


def test_an_answer_in_the_middle_of_a_text_is_tokenized_as_there(directory, texts, tmp_path):
    """Llama's tokenizers begin a text, but not an answer in it, with a space."""
    llama = tmp_path / "llama"
    llama.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    lines = [word for text in texts for word in text.split("\n")[:400]]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(llama / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    path = directory(LLAMA2.replace("%} {{", "%}{{"), llama, **config)
    conversation = say("return", "the class", "the", "return self")
    turns = chat_template_format(load_tokenizer(path)).encode(conversation)
    ids = [id_ for turn in turns.turns for id_ in (*turn.source, *turn.target)]
    whole = AutoTokenizer.from_pretrained(path).apply_chat_template(openai(conversation))
    assert [*ids, *turns.end] == whole["input_ids"]


def test_answers_that_a_template_marks_are_the_mask_of_transformers(directory):
    path = directory(MARKED)
    conversation = say("a", "b c", "d", "e f", system="S")
    turns = chat_template_format(load_tokenizer(path)).encode(conversation)
    expected = AutoTokenizer.from_pretrained(path).apply_chat_template(
        openai(conversation), return_dict=True, return_assistant_tokens_mask=True
    )
    mask = [
        bit
        for turn in turns.turns
        for bit in (*(0 for _ in turn.source), *(1 for _ in turn.target))
    ]
    assert [*mask, *(0 for _ in turns.end)] == expected["assistant_masks"]
    assert sum(mask) > 4


PUBLISHED = ["gemma3", "llama3", "llama3_2", "phi3", "qwen2_5", "qwen3", "qwen3_training"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_give_their_text_and_whole_answers(asset, directory, name):
    path = directory((asset("chat-templates") / f"{name}.jinja").read_text(encoding="utf-8"))
    hf = AutoTokenizer.from_pretrained(path)
    for case in ("one", "turns", "system", "thoughts"):
        conversation = conversations()[case]
        parts = pieces(path, conversation)
        assert "".join(parts) == hf.apply_chat_template(openai(conversation), tokenize=False)
        answers = conversation.messages[1::2]
        for answer, target in zip(answers, parts[1::2], strict=True):
            said = answer.content.rpartition("</think>")[2].strip()
            assert said in target
            assert target.partition(said)[2].strip() in END_OF_ANSWER


END_OF_ANSWER = {"<end_of_turn>", "<|eot_id|>", "<|end|>", "<|end|>\n</s>", "<|im_end|>"}


FORGETFUL = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last or m.role == 'user' %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}",
)
"""As Qwen 3: only the last answer keeps its thoughts."""


def test_an_earlier_answer_without_its_thoughts_is_found(directory):
    parts = pieces(directory(FORGETFUL), say("a", "<think>x</think>b", "c", "<think>y</think>d"))
    assert parts[1::2] == ["b<|im_end|>\n", "<think>y</think>d<|im_end|>\n"]


THOUGHTLESS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
"""As DeepSeek R1: no answer keeps its thoughts."""


@pytest.mark.parametrize("role", ["assistant", "function"])
def test_a_template_that_drops_the_thoughts_of_the_last_answer_is_refused(directory, role):
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments }}"
    template = THOUGHTLESS.replace("<|im_end|>", calls + "{% endfor %}<|im_end|>")
    chat = chat_template_format(load_tokenizer(directory(template)))
    chat.encode(say("a", "<think>x</think>b", "c", "d"))
    last, call = "<think>y</think>d", {"name": "f", "arguments": {}}
    if role == "function":
        last = json.dumps({"content": last, "tool_calls": [call]})
    talked = (*say("a", "b").messages, Message("user", "c"), Message(role, last))
    with pytest.raises(RecordError, match="leaves out the thoughts of the last answer"):
        chat.encode(Conversation(talked))


def test_the_published_template_of_deepseek_r1_is_refused_for_thoughts(asset, directory):
    path = asset("chat-templates") / "deepseek_r1_distill.jinja"
    chat = chat_template_format(load_tokenizer(directory(path.read_text(encoding="utf-8"))))
    chat.encode(conversations()["turns"])
    with pytest.raises(RecordError, match="leaves out the thoughts of the last answer"):
        chat.encode(conversations()["thoughts"])


def test_a_question_that_repeats_an_answer_with_its_thoughts_is_no_part_of_it(directory):
    answer = "<think>x</think>b"
    parts = pieces(directory(FORGETFUL), say("a", answer, answer, "d", answer, answer))
    assert parts[1::2] == ["b<|im_end|>\n", "d<|im_end|>\n", f"{answer}<|im_end|>\n"]


def test_what_asks_may_begin_an_answer_that_is_written_without_it(directory):
    """As DeepSeek R1: the prompt opens thoughts which the conversation leaves out."""
    template = LLAMA2 + "{% if add_generation_prompt %}<think>\n{% endif %}"
    parts = pieces(directory(template), say("a", "b", "c", "d"))
    assert parts[:4] == ["<s>[INST] a [/INST] ", "b </s>", "[INST] c [/INST] ", "d </s>"]


def test_an_eos_after_the_last_answer_only_is_no_obstacle(directory):
    """As Phi 3."""
    template = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    parts = pieces(directory(template), say("a", "b", "c", "d"))
    assert parts[1::2] == ["b<|im_end|>\n", "d<|im_end|>\n</s>"]


def test_a_template_that_ends_no_answer_teaches_eos(directory):
    """As GLM-4."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    path = directory(template)
    assert pieces(path, say("a", "b", "c", "d"))[-1] == "</s>"
    tokenizer = load_tokenizer(path)
    chat = chat_template_format(tokenizer)
    turns = chat.encode(say("a", "b", "c", "d")).turns
    assert [turn.source_label for turn in turns] == [IGNORED, tokenizer.eod]
    assert chat.eos == tokenizer.eod
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="--hf-chat-template with a template that ends no answer"):
        chat_template_format(load_tokenizer(path))


def test_a_template_that_ends_answers_leaves_labels_alone(directory):
    turns = chat_template_format(load_tokenizer(directory(CHATML))).encode(say("a", "b", "c", "d"))
    assert [turn.source_label for turn in turns.turns] == [IGNORED, IGNORED]
    assert turns.end == ()


def test_a_template_that_numbers_from_the_end_is_an_error_not_a_wrong_mask(directory):
    template = (
        "{% for m in messages %}[{{ messages | length - loop.index }}]{{ m.content }}{% endfor %}"
    )
    chat = chat_template_format(load_tokenizer(directory(template)))
    with pytest.raises(RecordError, match="answers cannot be told"):
        chat.encode(say("a", "b", "c", "d"))


@pytest.mark.parametrize("texts", [("a", "b"), ("a", "b", "c", "d", "e", "f")])
def test_no_answer_is_ever_empty(directory, texts):
    for part in itertools.islice(pieces(directory(CHATML), say(*texts)), 1, None, 2):
        assert part.endswith("<|im_end|>\n")
        assert len(part) > len("<|im_end|>\n")


def test_shapes_of_conversations_do_not_fill_the_memory(directory, monkeypatch):
    monkeypatch.setattr("ml_data.templates.hugging_face._SHAPES", 3)
    chat = chat_template_format(load_tokenizer(directory(CHATML)))
    for turns in range(1, 9):
        chat.encode(say(*["a", "b"] * turns))
        assert 1 <= len(chat.forms) <= 3


def test_marks_that_are_not_one_an_answer_are_an_error(directory):
    two = "{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
    none = "{% endgeneration %}<|im_end|>"
    for text, count in ((two, 2), (none, 0)):
        template = MARKED.replace("<|im_end|>{% endgeneration %}", text)
        if text is none:
            template = template.replace("{{ m.content }}{% end", "{% end").replace(
                none, none + "{{ m.content }}"
            )
        path = directory(template)
        chat = chat_template_format(load_tokenizer(path))
        with pytest.raises(RecordError, match=f"marks {count} texts as generated, of 1 answers"):
            chat.encode(say("a", "b"))
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (CHATML, conversations()["tools"], "leaves out calls, tools"),
        (
            LLAMA2.replace("{{ m.content }} {{", "{{"),
            say("a", "b"),
            "leaves out what the assistant",
        ),
        ("{{ raise_exception('no!') }}", say("a", "b"), "the chat template refuses: no!"),
        (
            "{{ messages[9].role.x }}",
            say("a", "b"),
            "fails: list object has no element 9",
        ),
        ("{{ messages.clear() }}", say("a", "b"), "the chat template fails"),
        ("{{ ''.__class__.__mro__ }}", say("a", "b"), "the chat template fails: access to attr"),
    ],
    ids=["tools", "answers", "refuses", "undefined", "writes", "escapes"],
)
def test_what_a_template_cannot_write_is_refused(directory, template, conversation, message):
    chat = chat_template_format(load_tokenizer(directory(template)))
    with pytest.raises(RecordError, match=message):
        chat.encode(conversation)


def test_templates_have_the_functions_of_transformers(directory):
    template = CHATML + "{{ {'é': [1]} | tojson }}{{ strftime_now('%Y') | length }}{% break %}"
    template = template.replace(
        "{% break %}", "{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}"
    )
    assert "".join(pieces(directory(template), say("a", "b"))).endswith('{"é": [1]}41')


def test_tools_reach_the_template_as_transformers_gives_them(directory):
    template = (
        "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    conversation = conversations()["tools"]
    text = "".join(pieces(directory(template), conversation))
    functions = [{"type": "function", "function": f} for f in json.loads(conversation.tools)]
    assert text.startswith(json.dumps(functions, ensure_ascii=False))
    call = {
        "id": "call00001",
        "type": "function",
        "function": json.loads(conversation.messages[1].content),
    }
    assert f"<assistant>{json.dumps(call, ensure_ascii=False)}</>" in text
    assert '<tool>{"temperature": 3}</>' in text


PARALLEL = [
    {"role": "user", "content": "Paris and Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
            for city in ("Paris", "Rome")
        ],
    },
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "Rain in Paris, sun in Rome."},
]
WEATHER = [
    {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
]


def parallel() -> Conversation:
    handler = HANDLERS["OpenAIInstructionHandler"]
    (conversation,) = handler.convert({"messages": PARALLEL, "tools": WEATHER}, handler.columns)
    return conversation


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_several_calls_and_answers_are_those_of_apply_chat_template(asset, directory, name):
    path = directory((asset("chat-templates") / f"{name}.jinja").read_text(encoding="utf-8"))
    turns = chat_template_format(load_tokenizer(path)).encode(parallel())
    ids = [id_ for turn in turns.turns for id_ in (*turn.source, *turn.target)]
    hf = AutoTokenizer.from_pretrained(path)
    expected = hf.apply_chat_template(PARALLEL, tools=WEATHER)["input_ids"]
    assert hf.decode([*ids, *turns.end]).count("</tool_response>") == 2
    assert [*ids, *turns.end] == expected


def test_every_call_has_an_identifier_of_its_own_which_its_answer_names(directory):
    template = (
        "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.id }}={{ c.function | tojson }}{% endfor %}"
        "{{ ':' ~ m.tool_call_id if m.tool_call_id }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text = "".join(pieces(directory(template), parallel()))
    assert 'call00001={"name": "weather", "arguments": {"city": "Paris"}}' in text
    assert 'call00002={"name": "weather", "arguments": {"city": "Rome"}}' in text
    assert "<tool>rain:call00001</><tool>sun:call00002</>" in text


def test_a_template_that_leaves_out_a_second_answer_is_refused(directory):
    template = (
        "{{ tools | tojson }}{% for m in messages %}"
        "{% if loop.first or loop.previtem.role != m.role %}"
        "{{ m.role }}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c | tojson }}"
        "{% endfor %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    chat = chat_template_format(load_tokenizer(directory(template)))
    with pytest.raises(RecordError, match="leaves out what the observation says"):
        chat.encode(parallel())


def test_a_template_that_wants_arguments_as_text_gets_text(directory):
    """As DeepSeek R1, which also wants no content where there are calls."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is none %}{% for c in m.tool_calls %}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% else %}{{ m.content }}"
        "{% endif %}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    conversation = Conversation(conversations()["tools"].messages)
    assert pieces(directory(template), conversation)[1] == (
        'get_weather {"city": "北京", "unit": "C"}</>'
    )


def test_a_template_in_the_config_and_one_for_tools_by_name(directory):
    templates = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + CHATML},
    ]
    path = directory(None, chat_template=templates)
    tools = json.dumps([{"name": "f", "description": "F.", "parameters": {}}])
    assert pieces(path, say("a", "b"))[0].startswith("<|im_start|>")
    assert pieces(path, say("a", "b", tools=tools))[0].startswith('[{"type": "function"')


@pytest.mark.parametrize(
    ("template", "config", "message"),
    [
        (None, {}, "--hf-chat-template: .* comes with no chat template .*--prompt-type"),
        ("{% if %}", {}, "chat_template.jinja: the chat template is not Jinja"),
        (None, {"chat_template": "{{"}, "tokenizer_config.json: the chat template is not Jinja"),
        (None, {"chat_template": [{"name": "rag", "template": ""}]}, "named default, only rag"),
        (None, {"chat_template": [{"name": "default"}]}, "a list of objects with name and temp"),
        ("\udcff", {}, r"chat_template.jinja: not UTF-8"),
    ],
    ids=["none", "file", "config", "names", "entry", "bytes"],
)
def test_a_tokenizer_without_a_usable_template_is_told_what_to_do(
    directory, template, config, message
):
    path = directory(template, **config)
    with pytest.raises(UsageError, match=message):
        chat_template_format(load_tokenizer(path))


def test_special_tokens_are_seen_where_the_tokenizer_reads_them_as_text(
    directory, sentencepiece_model
):
    path = directory(LLAMA2, sentencepiece_model, bos_token="<s>", eos_token="</s>")
    tokenizer = load_tokenizer(path)
    (turn,) = chat_template_format(tokenizer).encode(say("a", "b")).turns
    assert turn.source[0] == tokenizer.bos
    assert turn.target[-1] == tokenizer.eod
    assert tokenizer.bos not in turn.source[1:]


def test_the_date_in_a_template_can_be_fixed(directory, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    path = directory(dated)
    tokenizer = load_tokenizer(path)
    turns = chat_template_format(tokenizer).encode(say("a", "b"))
    assert tokenizer.decode(turns.turns[0].source).startswith("02 Jan 1970")
