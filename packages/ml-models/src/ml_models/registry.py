"""Find the family of a model by name or by its `config.json`.

The families of this package are listed here. Other packages add theirs as entry points of the group
`ml_models.families`; these are looked at only when no family here answers.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping

from ml_models.architecture import Architecture
from ml_models.families.aquila import AQUILA
from ml_models.families.baichuan import BAICHUAN
from ml_models.families.bloom import BLOOM
from ml_models.families.chatglm import CHATGLM
from ml_models.families.deepseek_v2 import DEEPSEEK_V2
from ml_models.families.deepseek_v3 import DEEPSEEK_V3
from ml_models.families.family import Family
from ml_models.families.gemma import GEMMA
from ml_models.families.gemma2 import GEMMA2
from ml_models.families.gemma3 import GEMMA3
from ml_models.families.glm import GLM
from ml_models.families.glm4 import GLM4
from ml_models.families.gpt2 import GPT2
from ml_models.families.gpt_oss import GPT_OSS
from ml_models.families.grok1 import GROK1
from ml_models.families.internlm import INTERNLM
from ml_models.families.llama import LLAMA
from ml_models.families.mistral import MISTRAL
from ml_models.families.mixtral import MIXTRAL
from ml_models.families.phi3 import PHI3
from ml_models.families.qwen import QWEN
from ml_models.families.qwen2 import QWEN2
from ml_models.families.qwen3 import QWEN3
from ml_models.families.qwen3_moe import QWEN3_MOE
from ml_models.families.smollm3 import SMOLLM3

_FAMILIES = (
    LLAMA,
    MISTRAL,
    AQUILA,
    BAICHUAN,
    INTERNLM,
    QWEN,
    QWEN2,
    QWEN3,
    SMOLLM3,
    PHI3,
    CHATGLM,
    GLM,
    GLM4,
    BLOOM,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_OSS,
    GROK1,
    MIXTRAL,
    QWEN3_MOE,
)


GROUP = "ml_models.families"
"""Group of the entry points of families in other packages."""


def names() -> tuple[str, ...]:
    """List the families of this package by name."""
    return tuple(family.name for family in _FAMILIES)


def find(name: object) -> Family | None:
    """Find a family by its name or one of its aliases; None if there is none."""
    return next((found for found in _all() if name in (found.name, *found.aliases)), None)


def family(name: str) -> Family:
    """Find a family by its name or one of its aliases.

    Raises:
        ValueError: No family has this name; the message lists those that exist.
    """
    found = find(name)
    if found is not None:
        return found
    known = [alias for each in _all() for alias in (each.name, *each.aliases)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"model family {name!r} is unknown (known: {', '.join(known)}){hint}")


def family_of(arch: Architecture) -> Family | None:
    """Find the first family that can represent a model; None if there is none."""
    return next((found for found in _all() if found.represents(arch)), None)


def family_for(config: Mapping[str, object]) -> Family:
    """Find the family of a Hugging Face config.json, by `model_type`, else by `architectures`.

    Raises:
        ValueError: No family reads such a model.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures")
    listed = architectures if isinstance(architectures, (list, tuple)) else ()
    for found in _all():
        if model_type in found.model_types:
            return found
        if model_type is None and any(name in found.architectures for name in listed):
            return found
    known = ", ".join(model_type for found in _all() for model_type in found.model_types)
    raise ValueError(
        f"config.json: model_type {model_type!r} (architectures {list(listed)}) belongs to no "
        f"known family (known model types: {known})"
    )


def _all() -> Iterator[Family]:
    """Yield the families of this package, then those of others."""
    yield from _FAMILIES
    yield from installed()


@functools.cache
def installed() -> tuple[Family, ...]:
    """Load the families of other packages.

    Raises:
        ValueError: One is no family, or has a name that another one has.
    """
    from importlib.metadata import entry_points  # takes longer to import than all families

    taken = {name: "ml_models" for found in _FAMILIES for name in _identities(found)}
    loaded = []
    for point in sorted(entry_points(group=GROUP)):
        found = point.load()
        if not isinstance(found, Family):
            raise ValueError(f"entry point {point.name} of {GROUP}: {point.value} is no Family")
        for name in _identities(found):
            if name in taken:
                raise ValueError(
                    f"entry point {point.name} of {GROUP}: {point.value} says {name}, which is "
                    f"a name or model type of {taken[name]}"
                )
        taken |= dict.fromkeys(_identities(found), point.value)
        loaded.append(found)
    return tuple(loaded)


def _identities(found: Family) -> tuple[str, ...]:
    return (found.name, *found.aliases, *found.model_types)
