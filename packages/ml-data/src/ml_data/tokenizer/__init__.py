"""Tokenizers on disk, each with the ids of the library that defines them.

| on disk | with the ids of | encoded by |
|---|---|---|
| `tokenizer.json` | `tokenizers` | `tokenizers` |
| a sentencepiece model | `sentencepiece` | `tokenizers` if it can give the same, or itself |
| tiktoken ranks, `tekken.json` | `tiktoken` | `tokenizers` |
| Megatron-LM's vocabulary and merges | Megatron-LM | `tokenizers` |
| another Hugging Face directory | `transformers` | `transformers`; no code from there runs |

The spelling of a special token in a text is that token for `tokenizers`, `tiktoken` and
`transformers`; it is text like any other for `sentencepiece` and Megatron-LM. `token_id` finds
special tokens in all of them.

Importing this module imports none of these libraries. A new format is a subclass of
`protocol.Loaded` and a line in `loading.py`.
"""

from ml_data.tokenizer.config import TokenizerConfig
from ml_data.tokenizer.loading import TokenizerType, load_tokenizer
from ml_data.tokenizer.protocol import Tokenizer, required_eod

__all__ = ["Tokenizer", "TokenizerConfig", "TokenizerType", "load_tokenizer", "required_eod"]
