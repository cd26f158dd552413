"""Checkpoints: whole or absent, bit for bit, and readable in any layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import resource
import shutil
import signal

import pytest
import torch
from checkpoint_job import (
    edit,
    resumed,
    train,
    without_optimizer,
    write_two_checkpoints,
)
from training_job import LAYOUTS, UNTIED, Job, Rank, assemble

from ml_models.dropout import Dropout
from ml_models.flags import UsageError
from ml_parallel.checkpoint import MANIFEST, TRACKER
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology
from ml_train.config import CheckpointConfig

TIED = dataclasses.replace(UNTIED, untie_embeddings_and_output_weights=False)
DROPOUT = Dropout(attention_dropout=0.1, hidden_dropout=0.1)


def assembled(results, index, job):
    tp_size = job.topology.tensor_model_parallel_size
    kinds = ("main", "exp_avg", "exp_avg_sq")
    return {
        kind: assemble([result[index][kind] for result in results], job.arch, tp_size)
        for kind in kinds
    }


def assert_equal(found, expected):
    for kind, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[kind][name], tensor), (kind, name)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("dp2 dist", torch.float32),
        ("dp2", torch.float32),
        ("tp2 pp2 sp", torch.bfloat16),
        ("dp4 dist 2 instances", torch.bfloat16),
        ("pp2 vpp dp2 dist overlap", torch.bfloat16),
        ("dp2", torch.float16),
    ],
)
def test_a_resumed_run_continues_bit_for_bit_with_dropout(tmp_path, layout, dtype):
    world_size, topology = LAYOUTS[layout]
    job = Job(topology=topology, dtype=dtype, dropout=DROPOUT)
    golden = run_ranks(train, world_size, job, 6)
    first = run_ranks(train, world_size, job, 6, tmp_path, None, 3)
    second = run_ranks(train, world_size, job, 6, tmp_path, 3)
    assert first[0][0] + second[0][0] == golden[0][0]
    assert_equal(assembled(second, 2, job), assembled(golden, 2, job))


PAIRS = [
    ("tp2 dp2 sp dist", "dp2"),
    ("dp2", "tp2 pp2 sp"),
    ("pp2 vpp dp2 dist overlap", "tp2"),
    ("dp4 dist overlap", "pp2 list"),
    ("dp4 dist 2 instances", "dp2 dist"),
]


@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(("written", "read"), PAIRS)
def test_another_layout_reads_the_same_tensors_and_follows_the_same_curve(
    tmp_path, written, read, arch
):
    jobs = {name: Job(topology=LAYOUTS[name][1], arch=arch) for name in (written, read)}
    saved = run_ranks(train, LAYOUTS[written][0], jobs[written], 6, tmp_path, None, 3)
    loaded = run_ranks(train, LAYOUTS[read][0], jobs[read], 6, tmp_path, 3)
    golden = run_ranks(train, 1, Job(arch=arch), 6)[0][0]
    assert_equal(assembled(loaded, 1, jobs[read]), assembled(saved, 2, jobs[written]))
    assert saved[0][0] + loaded[0][0] == pytest.approx(golden, rel=1e-4)


def test_a_half_precision_checkpoint_resumes_in_float32_from_the_main_weights(tmp_path):
    half = Job(topology=LAYOUTS["dp2 dist"][1], dtype=torch.bfloat16)
    saved = run_ranks(train, 2, half, 3, tmp_path, None, 3)
    loaded = run_ranks(train, 1, Job(), 4, tmp_path, 3)
    assert_equal(assembled(loaded, 1, Job()), assembled(saved, 2, half))


def test_the_files_are_megatrons(tmp_path):
    job = Job(topology=LAYOUTS["tp2 pp2 sp"][1], dtype=torch.bfloat16)
    run_ranks(train, 4, job, 2, tmp_path, None, 2)
    assert (tmp_path / TRACKER).read_text() == "2"
    folder = tmp_path / "iter_0000002"
    names = sorted(path.name for path in folder.iterdir())
    ranks = [f"mp_rank_{tp:02d}_{pp:03d}" for tp in (0, 1) for pp in (0, 1)]
    assert names == sorted([MANIFEST, *ranks])
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(folder / "mp_rank_01_001" / "model_optim_rng.pt", weights_only=True)
    assert content["checkpoint_version"] == 3.0
    assert content["iteration"] == 2
    assert content["args"].num_query_groups == 2
    assert content["args"].padded_vocab_size == 144
    model = content["model"]
    assert model["decoder.layers.1.mlp.linear_fc1.weight"].shape == (160, 64)
    assert model["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (64, 64)
    assert model["output_layer.weight"].shape == (72, 64)
    assert model["output_layer.weight"].dtype == torch.bfloat16
    assert "embedding.word_embeddings.weight" not in model
    manifest = json.loads((folder / MANIFEST).read_text())
    assert "tensor_model_parallel_size" in json.dumps(manifest)


def test_no_file_is_larger_than_its_tensors(tmp_path):
    """torch.save writes the whole buffer that a view belongs to, if one lets it."""
    run_ranks(train, 2, Job(topology=LAYOUTS["dp2 dist"][1]), 1, tmp_path, None, 1)
    for path in tmp_path.rglob("*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, weights_only=True)
        tensors = list(_tensors(content))
        assert path.stat().st_size < sum(t.nbytes for t in tensors) * 1.1 + 30_000


def _tensors(content):
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)


def load_only(job, root):
    from ml_train import checkpoint

    rank = Rank(job)
    try:
        return checkpoint.load(root, rank.state), None
    except UsageError as error:
        return None, str(error)


@pytest.fixture
def two_checkpoints(tmp_path):
    return write_two_checkpoints(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(two_checkpoints, damage):
    job, root = two_checkpoints
    victim = next((root / "iter_0000004").rglob("optimizer_shard_001.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flip" else content[:-100])
    (progress, _), other = run_ranks(load_only, 2, job, root)
    assert progress.iteration == 2
    assert other[0] == progress


def test_when_all_checkpoints_are_damaged_the_run_stops(two_checkpoints):
    job, root = two_checkpoints
    for path in root.rglob("model_optim_rng.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    for progress, message in run_ranks(load_only, 2, job, root):
        assert progress is None
        assert "no checkpoint is intact" in message
        assert "model_optim_rng.pt" in message


def test_a_checkpoint_of_another_model_is_refused(two_checkpoints):
    _, root = two_checkpoints
    other = dataclasses.replace(UNTIED, num_layers=2, num_query_groups=4)
    ((progress, message),) = run_ranks(load_only, 1, Job(arch=other), root)
    assert progress is None
    assert "--num-layers is 4 there, 2 here" in message
    assert "--num-query-groups is 2 there, 4 here" in message


def test_a_pickle_that_would_run_code_is_refused(two_checkpoints, tmp_path):
    job, root = two_checkpoints

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    folder = root / "iter_0000009" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save({"args": Evil()}, folder / "model_optim_rng.pt")
    (root / TRACKER).write_text("9")
    for progress, message in run_ranks(load_only, 2, job, root):
        assert progress is None
        assert "not readable" in message
    assert not (tmp_path / "owned").exists()


# Which checkpoint a run begins with


def test_a_run_that_began_elsewhere_continues_from_its_own_checkpoints(tmp_path):
    job = Job()
    load, save = tmp_path / "converted", tmp_path / "run"
    run_ranks(train, 1, job, 1, load, None, 1)
    without_optimizer(load)
    ((first, _, said),) = run_ranks(resumed, 1, job, CheckpointConfig(load=load, save=save))
    assert first == 0
    assert said == [f"{load}/iter_0000001 holds weights only: starting from step 0"]
    ((_, _, saved),) = run_ranks(train, 1, job, 3, save, None, 3)
    ((again, tensors, said),) = run_ranks(resumed, 1, job, CheckpointConfig(load=load, save=save))
    assert again == 3
    assert_equal_shards(tensors, saved)
    assert said == [f"--save {save} holds checkpoints: continuing from them, not from --load"]
    shutil.rmtree(load)
    assert run_ranks(resumed, 1, job, CheckpointConfig(load=load, save=save))[0][0] == 3


def assert_equal_shards(found, expected):
    for kind, shards in expected.items():
        for (name, *_, theirs), (*_, ours) in zip(shards, found[kind], strict=True):
            assert (ours == theirs).all(), (kind, name)


def test_fine_tuning_takes_the_weights_and_begins_anew(two_checkpoints, tmp_path):
    _, root = two_checkpoints
    ((first, plain, _),) = run_ranks(resumed, 1, Job(), CheckpointConfig(load=root))
    ((tuned, tensors, _),) = run_ranks(
        resumed, 1, Job(), CheckpointConfig(load=root, save=tmp_path / "run", finetune=True)
    )
    ((cold, without, _),) = run_ranks(
        resumed, 1, Job(), CheckpointConfig(load=root, load_optim=False)
    )
    assert (first, tuned, cold) == (4, 0, 4)
    for begun in (tensors, without):
        assert_equal_shards({"main": begun["main"]}, {"main": plain["main"]})
        assert not any(moment.any() for *_, moment in begun["exp_avg"])
    assert any(moment.any() for *_, moment in plain["exp_avg"])


def test_any_step_can_be_chosen(two_checkpoints):
    _, root = two_checkpoints
    assert run_ranks(resumed, 1, Job(), CheckpointConfig(load=root, ckpt_step=2))[0][0] == 2
    victim = next((root / "iter_0000002").rglob("*.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    ((found, _, said),) = run_ranks(resumed, 1, Job(), CheckpointConfig(load=root, ckpt_step=2))
    assert found is None
    assert said[0].startswith(f"--ckpt-step 2: {victim} is torn")


# Incomplete ones


def test_a_checkpoint_of_ours_without_its_manifest_is_torn(two_checkpoints):
    job, root = two_checkpoints
    newest = root / "iter_0000004"
    (newest / MANIFEST).unlink()
    for path in newest.rglob("optimizer_shard_*.pt"):
        path.unlink()  # what is left looks like weights to begin with
    for found, _, said in run_ranks(resumed, 2, job, CheckpointConfig(load=root)):
        assert found == 2
        assert said in (
            [],
            [f"skipped a damaged checkpoint: {newest}: {newest / MANIFEST} is missing"],
        )


def rename_norms(content):
    norm = "decoder.layers.0.input_layernorm.weight"
    content["model"]["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"] = content[
        "model"
    ].pop(norm)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            rename_norms,
            "norms have Transformer Engine's names; rewrite it with ml-convert --load-dir",
        ),
        (
            lambda content: content["model"].pop("decoder.layers.3.mlp.linear_fc2.weight"),
            "/mp_rank_00/model_optim_rng.pt: holds no decoder.layers.3.mlp.linear_fc2.weight",
        ),
    ],
    ids=["Transformer Engine", "missing tensor"],
)
def test_a_checkpoint_without_a_tensor_names_file_and_tensor(tmp_path, damage, message):
    job = Job(topology=LAYOUTS["pp2"][1])
    run_ranks(train, 1, Job(), 1, tmp_path, None, 1)
    without_optimizer(tmp_path)
    edit(tmp_path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt", damage)
    for found, _, said in run_ranks(resumed, 2, job, CheckpointConfig(load=tmp_path)):
        assert found is None
        assert message in said[0]


def test_a_lost_optimizer_shard_is_named(tmp_path):
    job = Job(topology=LAYOUTS["dp2 dist"][1])
    run_ranks(train, 2, job, 1, tmp_path, None, 1)
    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    (folder.parent / MANIFEST).unlink()
    edit(
        folder / "model_optim_rng.pt", lambda content: delattr(content["args"], "ml_train_version")
    )
    (folder / "optimizer_shard_001.pt").unlink()
    ((found, _, said),) = run_ranks(resumed, 1, Job(), CheckpointConfig(load=tmp_path))
    assert found is None
    assert re.match(rf"{folder}: .*optimizer_shard_\*\.pt .*[a-z]\.weight", said[0]), said


def test_a_model_of_no_known_family_is_not_called_one(tmp_path):
    arch = dataclasses.replace(UNTIED, normalization="LayerNorm", swiglu=False)
    families = []
    for number, job in enumerate((Job(), Job(arch=arch))):
        run_ranks(train, 1, job, 1, tmp_path / str(number), None, 1)
        path = tmp_path / str(number) / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
        edit(path, lambda content: families.append(content["args"].model_family))
    assert families == ["llama", None]


# A full disk


def save_with_small_disk(job, root, limited_rank, limits):
    """Return what is said when files may be so large."""
    from ml_train import checkpoint
    from ml_train.state import Progress

    rank = Rank(job)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    messages = []
    for limit in limits:
        if torch.distributed.get_rank() == limited_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="cannot write the checkpoint") as caught:
            checkpoint.save(root, rank.state, Progress(iteration=9), keep=None)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("limited_rank", [0, 1])
def test_a_full_disk_on_one_rank_fails_all_and_leaves_the_last_checkpoint(
    two_checkpoints, limited_rank
):
    job, root = two_checkpoints
    before = sorted(str(path) for path in root.rglob("*"))
    # The first byte, and what torch.save writes at once, in the middle and at the end.
    limits = (0, 1_000, 40_000, 60_000, 100_000)
    for messages in run_ranks(save_with_small_disk, 2, job, root, limited_rank, limits):
        for message in messages:
            assert f"rank {limited_rank}" in message
            assert re.search(r"iter_0000009\.tmp-.*/mp_rank_00/\w+\.pt$", message), message
    assert sorted(str(path) for path in root.rglob("*")) == before


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    def many(job):
        from ml_train import checkpoint
        from ml_train.state import Progress

        rank = Rank(job)
        for iteration in (1, 2, 3):
            checkpoint.save(tmp_path, rank.state, Progress(iteration=iteration), keep=2)

    run_ranks(many, 2, Job(topology=Topology()))
    names = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert names == ["iter_0000002", "iter_0000003"]
