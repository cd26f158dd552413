"""Asking whether a converted model computes what the original computes.

The models are built and run by `ml_eval.compare_logits`, in a process of its own: that needs torch,
Megatron-Core and transformers, which nothing else here does.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from ml_convert.errors import ConversionError, VerificationError
from ml_convert.request import Request
from ml_convert.source import Source

_NEEDED = ("torch", "transformers", "megatron", "ml_eval")


def check_possible(request: Request, source: Source) -> None:
    """Check that there are two models to compare, and what it takes to run them.

    Raises:
        ConversionError: It is not possible.
    """
    if source.is_hugging_face == (request.save_format == "hf"):
        raise ConversionError(
            "--verify logits compares a model of transformers with ours: either --load-dir or "
            "--save-dir has to be a Hugging Face model, and the other one not"
        )
    if source.adapter is not None or (source.merged is not None and request.save_format != "hf"):
        raise ConversionError("--verify logits: not with --lora-load, unless --save-format is hf")
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConversionError(
            f"--verify logits: needs {', '.join(missing)}; install ml-eval and transformers"
        )


def check(request: Request, source: Source, result: Path) -> str:
    """Compare the logits of a result with those of its source; returns what was found.

    Raises:
        VerificationError: They differ, or one of the models cannot be run.
    """
    ours, theirs = request, result
    if request.save_format != "hf":
        theirs = source.path
        ours = Request(
            load_dir=result,
            load_format=request.save_format,
            save_dir=result,
            save_format="hf",
            strict_pickle=request.strict_pickle,
        )
    content = {"ours": asdict(replace(ours, verify="none")), "theirs": str(theirs)}
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "ml_eval.compare_logits"],
        input=json.dumps(content, default=str),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise VerificationError(f"--verify logits: {said[-1]}")
    return done.stdout.strip().splitlines()[-1]
