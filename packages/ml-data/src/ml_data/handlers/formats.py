"""How the handlers that take no template write conversations, as ModelLink did."""

from __future__ import annotations

from ml_data.instruction.conversation import Conversation, pairs
from ml_data.instruction.turns import Turn, Turns
from ml_data.tokenizer import Tokenizer, required_eod
from ml_models.flags import UsageError

_SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request. Please note that you need "
    "to think through your response logically and step by step."
)
_USER, _ASSISTANT = 195, 196


class InstructionText:
    r"""One text, `### Instruction:\n...\n### Response:\n...\n` for each turn, encoded as a whole.

    The loss sees the last answer. Where the tokenizer joins the end of the prompt with the begin of
    the answer, the token that holds both belongs to the answer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos = tokenizer.eod

    def encode(self, conversation: Conversation) -> Turns:
        """Return the tokens of a conversation, as one turn."""
        turns = pairs(conversation.messages)
        text = f"\n{conversation.system or _SYSTEM}\n"
        for asked, said in turns:
            prompt = f"{text}### Instruction:\n{asked.content}\n### Response:\n"
            text = f"{prompt}{said.content}\n"
        before, whole = self._tokenizer.encode_batch([prompt, text])
        begin = _common(before, whole)
        return Turns((Turn(whole[:begin], whole[begin:], learned=turns[-1][1].learned),))


def _common(left: list[int], right: list[int]) -> int:
    same = (number for number, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(same, min(len(left), len(right)))


class MarkedTurns:
    """Baichuan's form: token 195 begins a question, 196 its answer; EOS follows the last one.

    The label of a 195 is EOS: before it, an answer has ended.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size <= _ASSISTANT:
            raise UsageError(f"tokenizer {tokenizer.path}: has no tokens {_USER} and {_ASSISTANT}")
        self._tokenizer = tokenizer
        self.eos = required_eod(tokenizer, "--handler-name MOSSMultiTurnHandler")

    def encode(self, conversation: Conversation) -> Turns:
        """Return the tokens of a conversation."""
        texts = [message.content for message in conversation.messages]
        ids = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        turns = [
            Turn([_USER, *asked, _ASSISTANT], said, message.learned, self.eos)
            for asked, said, message in zip(
                ids[::2], ids[1::2], conversation.messages[1::2], strict=True
            )
        ]
        return Turns(tuple(turns), (self.eos,))
