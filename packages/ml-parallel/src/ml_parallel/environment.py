"""What a launcher tells a rank in its environment, checked: torch waits for what makes no sense.

Nothing here needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping


def rank_and_world_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return RANK and WORLD_SIZE.

    Raises:
        ValueError: They, or LOCAL_RANK, are no numbers of ranks.
    """
    world_size = _number(environment, "WORLD_SIZE", at_least=1)
    rank = _number(environment, "RANK")
    if rank >= world_size:
        raise ValueError(
            f"RANK={rank} in the environment: must be from 0 to {world_size - 1} with "
            f"WORLD_SIZE={world_size}"
        )
    if "LOCAL_RANK" in environment:
        _number(environment, "LOCAL_RANK")
    return rank, world_size


def master_port(environment: Mapping[str, str] = os.environ) -> int:
    """Return MASTER_PORT.

    Raises:
        ValueError: It is no port.
    """
    port = _number(environment, "MASTER_PORT", at_least=1)
    if port > 65535:
        raise ValueError(f"MASTER_PORT={port} in the environment: must be from 1 to 65535")
    return port


def _number(environment: Mapping[str, str], name: str, *, at_least: int = 0) -> int:
    text = environment[name]
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number < at_least:
        raise ValueError(
            f"{name}={text} in the environment: must be an integer of at least {at_least}"
        )
    return number
