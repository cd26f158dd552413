"""What a run finds out of the checkpoint it goes on from: other flags, model or format."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from checkpoint_job import edit, resumed, train, without_optimizer, write_two_checkpoints
from training_job import LAYOUTS, UNTIED, Job, Rank

from ml_models.flags import UsageError
from ml_parallel.checkpoint import TRACKER
from ml_parallel.manifest import read_manifest, write_manifest
from ml_parallel.testing import run_ranks
from ml_train.config import Adam, CheckpointConfig


@pytest.fixture
def two_checkpoints(tmp_path):
    return write_two_checkpoints(tmp_path)


# Other flags than before


def remembering(root, **changes):
    """Write the manifest of the newest checkpoint anew, as another version would have."""
    directory = root / f"iter_{int((root / TRACKER).read_text()):07d}"
    manifest = read_manifest(directory)
    metadata = {name: value for name, value in manifest.metadata.items() if name != "run"}
    write_manifest(directory, manifest.iteration, manifest.files, {**metadata, **changes})


def test_a_run_that_goes_on_with_other_flags_says_which(two_checkpoints):
    _, root = two_checkpoints
    resume = CheckpointConfig(load=root)
    assert run_ranks(resumed, 1, Job(), resume)[0][::2] == (4, [])
    other = Job(optimizer=Adam(weight_decay=0.2, adam_beta2=0.95))
    said = (
        "the run goes on with other flags than it had: --weight-decay was 0.1 and is 0.2; "
        "--adam-beta2 was 0.999 and is 0.95"
    )
    assert run_ranks(resumed, 1, other, resume)[0][::2] == (4, [said])
    tuned = CheckpointConfig(load=root, finetune=True)
    assert run_ranks(resumed, 1, other, tuned)[0][::2] == (0, [])  # it is another run


def test_checkpoints_that_remember_less_are_read(two_checkpoints):
    _, root = two_checkpoints
    other = Job(optimizer=Adam(weight_decay=0.2))
    remembering(root)
    assert run_ranks(resumed, 1, other, CheckpointConfig(load=root))[0][::2] == (4, [])
    remembering(root, global_batch_size=4)
    said = "the run goes on with other flags than it had: --global-batch-size was 4 and is 8"
    assert run_ranks(resumed, 1, other, CheckpointConfig(load=root))[0][::2] == (4, [said])


# In another precision than before


def weights_after(job, root):
    """Return the weights of this rank after loading, whole or its part of them, as float32."""
    from ml_train import checkpoint

    rank = Rank(job)
    checkpoint.load(root, rank.state)
    tensors = (named for chunk in rank.state.chunks for named in chunk.tensors())
    return {name: tensor.detach().float() for name, tensor in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_rank_goes_on_with_the_same_weights_in_another_precision(dtype, tmp_path):
    topology = LAYOUTS["dp2 dist"][1]
    run_ranks(train, 2, Job(topology=topology, dtype=torch.bfloat16), 2, tmp_path, None, 2)
    first, second = run_ranks(weights_after, 2, Job(topology=topology, dtype=dtype), tmp_path)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


# Before anything is built


def checked(flags, model):
    from ml_train import checkpoint

    try:
        checkpoint.check(flags, model)
    except UsageError as error:
        return str(error)
    return None


def test_a_checkpoint_of_another_model_is_found_before_one_is_built(two_checkpoints):
    _, root = two_checkpoints
    other = dataclasses.replace(UNTIED, num_layers=2)
    for step, name in ((None, "iter_0000004"), (2, "iter_0000002")):
        flags = CheckpointConfig(load=root, ckpt_step=step)
        assert run_ranks(checked, 2, flags, UNTIED) == [None, None]
        message = f"{root / name}: it is of another model: --num-layers is 4 there, 2 here"
        assert run_ranks(checked, 2, flags, other) == [message, message]
    assert run_ranks(checked, 1, CheckpointConfig(), other) == [None]


def test_a_damaged_checkpoint_is_left_to_what_finds_the_one_before(two_checkpoints):
    _, root = two_checkpoints
    victim = root / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt"
    victim.write_bytes(victim.read_bytes()[:-100])
    assert run_ranks(checked, 1, CheckpointConfig(load=root), UNTIED) == [None]


def in_legacy(content):
    content["model"] = {"language_model": {"embedding": {}}}


def in_torch_dist(folder):
    """Leave of a checkpoint what makes megatron-core's other format known."""
    shutil.rmtree(folder)
    (folder.parent / ".metadata").touch()


@pytest.mark.parametrize(
    ("rewrite", "found"),
    [
        (lambda folder: edit(folder / "model_optim_rng.pt", in_legacy), "is of the format legacy"),
        (in_torch_dist, "is of the format torch_dist"),
    ],
)
def test_a_checkpoint_of_another_format_says_how_to_rewrite_it(tmp_path, rewrite, found):
    run_ranks(train, 1, Job(), 1, tmp_path, None, 1)
    without_optimizer(tmp_path)
    directory, flags = tmp_path / "iter_0000001", CheckpointConfig(load=tmp_path)
    rewrite(directory / "mp_rank_00")
    message = (
        f"{directory}: {found}; rewrite it with ml-convert --load-dir {tmp_path} --save-dir "
        "DIRECTORY --save-format mcore, and load that"
    )
    assert run_ranks(checked, 2, flags, UNTIED) == [message, message]
    assert run_ranks(resumed, 1, Job(), flags)[0][2] == [message]
