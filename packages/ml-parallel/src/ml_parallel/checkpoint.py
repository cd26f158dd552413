"""Checkpoint directories of Megatron: their names, and writing them whole or not at all.

A checkpoint is written under a temporary name, synced, renamed, and only then does the tracker
file move to it. A kill, a full disk or a power cut at any moment leaves the last checkpoint as it
was; what is left of the unfinished one is removed by the next `begin`. A manifest goes with it
(`ml_parallel.manifest`), so a file that was torn, changed or lost later is found and named.

    <root>/latest_checkpointed_iteration.txt       the tracker: "10", or "release"
    <root>/iter_0000010/manifest.json
    <root>/iter_0000010/mp_rank_00_001/model_optim_rng.pt
    <root>/iter_0000020.tmp-<host>-<pid>/          being written, or left over by a dead writer

One process calls `begin` and `commit`; every rank may write files in between and `record` them:

    temporary = begin(root, 10)
    torch.save(state, temporary / "mp_rank_00" / MODEL_FILE)
    commit(temporary, [record(temporary / "mp_rank_00" / MODEL_FILE)], tensor_model_parallel_size=1)
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_parallel import durable
from ml_parallel.manifest import (
    MANIFEST,
    MODEL_FILE,
    CheckpointError,
    FileEntry,
    Iteration,
    Manifest,
    read_manifest,
    record,
    verify,
    write_manifest,
)

__all__ = [
    "LOCK",
    "MANIFEST",
    "MODEL_FILE",
    "TRACKER",
    "CheckpointError",
    "FileEntry",
    "Iteration",
    "Manifest",
    "begin",
    "candidates",
    "claimed",
    "commit",
    "discard",
    "iteration_directory",
    "latest",
    "prune",
    "rank_directory",
    "read_manifest",
    "read_tracker",
    "record",
    "verify",
]

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"

LOCK = "writer.lock"

_FINAL = re.compile(r"iter_([0-9]{7,})|release")


# Names


def rank_directory(
    *, tp_rank: int, pp_rank: int, pp_size: int, ep_rank: int = 0, ep_size: int = 1
) -> str:
    """Return the directory of a model-parallel rank, such as "mp_rank_00" or "mp_rank_00_001"."""
    name = f"mp_rank_{tp_rank:02d}"
    if pp_size > 1:
        name += f"_{pp_rank:03d}"
    if ep_size > 1:
        name += f"_{ep_rank:03d}"
    return name


def iteration_directory(iteration: Iteration) -> str:
    """Return "iter_0000010" for 10, and "release" for "release"."""
    if iteration == "release":
        return "release"
    if not isinstance(iteration, int) or iteration < 0:
        raise ValueError(f'an iteration is a number from 0 up or "release", not {iteration!r}')
    return f"iter_{iteration:07d}"


def _iteration_of(name: str) -> Iteration | None:
    match = _FINAL.fullmatch(name)
    if match is None:
        return None
    return int(match[1]) if match[1] else "release"


# Writing


@contextlib.contextmanager
def claimed(root: Path) -> Iterator[None]:
    """Create `root`, and let no other process that asks write checkpoints there meanwhile.

    Raises:
        CheckpointError: Another process does.
        OSError: Nothing can be written there.
    """
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(durable.locked(root / LOCK))
        except BlockingIOError as error:
            raise CheckpointError(
                f"{root}: another run writes its checkpoints there ({error.strerror})"
            ) from None
        yield


def begin(root: Path, iteration: Iteration) -> Path:
    """Create and return the temporary directory of a new checkpoint.

    What dead writers left in `root` is removed first, and what this process left of the same
    iteration.
    """
    root.mkdir(parents=True, exist_ok=True)
    name = iteration_directory(iteration)
    for path in root.iterdir():
        if _is_left_over(path, rewritten=name):
            logger.info("removing %s, left over by an interrupted writer", path)
            _remove(path)
    temporary = durable.temporary_path(root / name)
    temporary.mkdir()
    return temporary


def commit(
    temporary: Path, files: Iterable[FileEntry], *, scratch: Collection[str] = (), **metadata: Any
) -> Path:
    """Turn a temporary directory into the latest checkpoint; return its final name.

    A checkpoint that already has that name is replaced.

    Args:
        temporary: What `begin` returned.
        files: The `record` of every file in it, of all ranks.
        scratch: Names of files that are no part of it: they go when nothing can fail any more.
        metadata: JSON values to keep in the manifest.

    Raises:
        CheckpointError: The files in the directory are not those recorded.
        OSError: The disk is full, or similar. What was the latest checkpoint before still is.
    """
    final = temporary.with_name(_final_name(temporary))
    iteration = _iteration_of(final.name)
    assert iteration is not None
    write_manifest(temporary, iteration, files, metadata, scratch=scratch)
    with durable.prepared(final.with_name(TRACKER), str(iteration).encode()):
        for name in scratch:
            (temporary / name).unlink()
        replaced = durable.publish(temporary, final)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def discard(temporary: Path) -> None:
    """Remove a temporary directory that will not be committed, as when the disk is full."""
    _final_name(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def prune(root: Path, keep: int) -> list[Path]:
    """Remove the oldest iterations of `root`, keeping the newest `keep`; return those removed.

    The tracker's target and "release" always stay. What is newer than the target stays, too, but
    does not count as kept, for the run has passed it over; nor does a checkpoint with torn files.
    """
    if keep < 1:
        raise ValueError(f"at least 1 checkpoint has to stay, not {keep}")
    iterations = [path for path in sorted(_checkpoints(root), key=_step) if path.name != "release"]
    tracked = _tracked(root)
    passed_over = iterations[iterations.index(tracked) + 1 :] if tracked in iterations else []
    whole = [path for path in iterations if path not in passed_over and _is_whole(path)]
    removed = []
    for path in iterations[: iterations.index(whole[-keep])] if len(whole) > keep else []:
        if path != tracked:
            nameless = durable.temporary_path(path, kind="old")
            path.rename(nameless)  # a kill during the removal leaves nothing that looks complete
            shutil.rmtree(nameless)
            removed.append(path)
    return removed


def _final_name(temporary: Path) -> str:
    made = durable.temporary(temporary)
    if made is None or not _FINAL.fullmatch(made.name):
        raise CheckpointError(f"{temporary} is not a directory made by begin()")
    return made.name


# Reading


def candidates(root: Path) -> list[Path]:
    """Return the checkpoints of `root` in the order to try: the tracker's, then newest first.

    The tracker's target is listed even if it does not exist, so that its loss is noticed.
    """
    found = sorted(_checkpoints(root), key=_step, reverse=True)
    tracked = _tracked(root)
    return found if tracked is None else [tracked, *(path for path in found if path != tracked)]


def latest(
    root: Path,
    on_skip: Callable[[Path, str], None],
    *,
    hashes: bool = True,
    check_unlisted: Callable[[Path], None] = lambda _: None,
) -> Path | None:
    """Return the first of `candidates` that verifies, or None.

    Args:
        root: Directory of checkpoints.
        on_skip: Called with each path passed over and why: a damaged checkpoint or tracker.
        hashes: Read every file, rather than look at sizes only.
        check_unlisted: Called with a checkpoint that has no manifest; CheckpointError skips it.
    """
    try:
        read_tracker(root)
    except CheckpointError as error:
        on_skip(root / TRACKER, str(error))
    for path in candidates(root):
        try:
            if not verify(path, hashes=hashes):
                check_unlisted(path)
                logger.warning("%s has no %s: its content is not verified", path, MANIFEST)
            return path
        except (CheckpointError, OSError) as error:
            on_skip(path, str(error))
    return None


def read_tracker(root: Path) -> Iteration | None:
    """Return the iteration that the tracker file names, or None without such a file.

    Raises:
        CheckpointError: It holds something else.
    """
    path = root / TRACKER
    try:
        text = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    if text == "release":
        return "release"
    if not re.fullmatch("[0-9]{1,18}", text):
        raise CheckpointError(f'{path} holds {text[:40]!r}, neither an iteration nor "release"')
    return int(text)


def _checkpoints(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and _FINAL.fullmatch(path.name)]


def _step(path: Path) -> int:
    """Sort key: "release" before all iterations."""
    iteration = _iteration_of(path.name)
    return iteration if isinstance(iteration, int) else -1


def _tracked(root: Path) -> Path | None:
    try:
        iteration = read_tracker(root)
    except CheckpointError:
        return None
    return None if iteration is None else root / iteration_directory(iteration)


def _is_whole(path: Path) -> bool:
    try:
        verify(path, hashes=False)
    except CheckpointError:
        return False
    return True


# Left-overs


def _is_left_over(path: Path, *, rewritten: str) -> bool:
    """Tell whether `path` is of a dead writer, or ours under the name `rewritten`."""
    made = durable.temporary(path)
    if made is None or not (made.name == TRACKER or _FINAL.fullmatch(made.name)):
        return False
    if made.is_ours:
        return made.name == rewritten
    return durable.is_left_over(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
