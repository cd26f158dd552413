"""One proof for every family: the converted model computes what the published one does.

A `Case` is a tiny random model with every switch of its family. A test module lists its cases and
has three tests, which all are one call:

    @pytest.mark.parametrize(("case", "layout"), every_layout(CASES))
    def test_logits_are_those_of_the_published_model(case, layout, tmp_path_factory):
        check_logits(case, layout, tmp_path_factory)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_weights_and_config_come_back(case, tmp_path_factory):
        check_round_trip(case, tmp_path_factory)

    @pytest.mark.parametrize(("case", "layout"), every_layout(CASES[:1]))
    def test_gradients_are_those_of_the_published_model(case, layout, tmp_path_factory):
        check_gradients(case, layout, tmp_path_factory)

Shapes: `B` batch, `S` sequence, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import safetensors.torch
import torch

from ml_convert import Request, convert
from ml_models.architecture import Architecture
from ml_models.dropout import Dropout
from ml_models.families.family import Family
from ml_models.registry import family_for
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology
from ml_train.config import (
    Adam,
    CheckpointConfig,
    PretrainConfig,
    Training,
    Vocabulary,
    check_world,
)
from ml_train.launch import LaunchConfig
from ml_train.settings import DataConfig, LearningRate, LogConfig

BATCH, SEQUENCE, VOCABULARY = 2, 144, 301
TOKENS = torch.randint(
    0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(4)
)  # the last one is a label only
LAYOUTS = {
    "single": Topology(),
    "tp2": Topology(tensor_model_parallel_size=2),
    "tp2sp": Topology(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": Topology(pipeline_model_parallel_size=2),
    "ep2": Topology(expert_model_parallel_size=2),
}
_NOT_COMPARED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A tiny model whose vocabulary is VOCABULARY."""

    name: str
    """Unique in the test suite."""
    config: Any
    """A configuration of transformers, or with `reference` the content of config.json."""
    reference: Callable[[Mapping[str, Any]], torch.nn.Module] | None = None
    """Builds the published model from config.json: its parameters have the published names, and
    it computes logits `(B, S, V)` from tokens `(B, S)`. None: transformers has a class."""
    layouts: tuple[str, ...] = ("single", "tp2", "pp2")
    """Those of LAYOUTS it is tested in."""
    not_written: tuple[str, ...] = ()
    """Keys of the configuration that say nothing about the model, and change on the way."""
    randomize: Callable[[str, torch.Tensor], bool] = lambda _name, _tensor: False
    """Fills a tensor by name in place and tells whether it did; other parameters become normal."""

    def __str__(self) -> str:
        return self.name


class Saved(NamedTuple):
    """A case on disk, and what the published model computes with it for TOKENS."""

    path: Path
    gradients: Path
    """A directory like a model's, whose weights are the gradients of the loss."""
    logits: torch.Tensor
    """`(B, S, V)`."""
    loss: float
    config: dict[str, Any]
    family: Family


def every_layout(cases: Iterable[Case]) -> list[Any]:
    """List the arguments `(case, layout)` of a test."""
    return [
        pytest.param(case, layout, id=f"{case}-{layout}")
        for case in cases
        for layout in case.layouts
    ]


def check_logits(case: Case, layout: str, folders: pytest.TempPathFactory) -> None:
    """Convert to Megatron-Core, compute in a layout, and compare with the published model."""
    saved = save(case, folders)
    parts = _run(saved, layout, folders, _logits)
    # Ranks of one replica have the same logits or none; replicas have samples of their own.
    samples = {first: logits for first, logits in parts if logits is not None}
    found = numpy.concatenate([samples[first] for first in sorted(samples)])
    expected = saved.logits.numpy()
    assert expected.std() > 0.3  # else agreement would mean little
    assert found.shape == expected.shape
    numpy.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * abs(expected).max())


def check_gradients(case: Case, layout: str, folders: pytest.TempPathFactory) -> None:
    """Compare the loss, and its gradient for each weight, with those of the published model."""
    saved = save(case, folders)
    for loss, found, expected in _run(saved, layout, folders, _loss_and_gradients):
        assert loss == pytest.approx(saved.loss, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            tolerance = 2e-4 * abs(expected[name]).max()
            numpy.testing.assert_allclose(
                gradient, expected[name], rtol=1e-4, atol=tolerance, err_msg=name
            )


def check_round_trip(case: Case, folders: pytest.TempPathFactory) -> None:
    """Convert to Megatron-Core cut both ways, and back: no bit changes, and config.json agrees."""
    saved = save(case, folders)
    folder = folders.mktemp(f"{case}-round-trip")
    experts = 2 if "ep2" in case.layouts else 1
    topology = Topology(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=experts,
    )
    _to_megatron(saved.path, folder / "mcore", topology)
    convert(Request(load_dir=folder / "mcore", save_dir=folder / "hf", save_format="hf"))
    expected, found = tensors_of(saved.path), tensors_of(folder / "hf")
    ignored = {name for name in expected if saved.family.ignores(name)}
    assert found.keys() == expected.keys() - ignored
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name
    _check_config(case, saved, folder / "hf")


# The published model


def save(case: Case, folders: pytest.TempPathFactory) -> Saved:
    """Make the model of a case, once in a session."""
    if case.name not in _saved:
        _saved[case.name] = _save(case, folders.mktemp(case.name))
    return _saved[case.name]


_saved: dict[str, Saved] = {}


def _save(case: Case, folder: Path) -> Saved:
    torch.manual_seed(0)
    model = _build(case)
    _fill(case, model)
    _write(case, model, folder / "weights")
    output = model(TOKENS[:, :-1])
    logits = output if case.reference else output.logits  # (B, S, V)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
    _write(case, model, folder / "gradients")
    config = json.loads((folder / "weights" / "config.json").read_text())
    return Saved(
        path=folder / "weights",
        gradients=folder / "gradients",
        logits=logits.detach(),
        loss=float(loss.detach()),
        config=config,
        family=family_for(config),
    )


def _build(case: Case) -> torch.nn.Module:
    if case.reference:
        return case.reference(case.config).eval()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(case.config, attn_implementation="eager")
    return model.float().eval()


@torch.no_grad()
def _fill(case: Case, model: torch.nn.Module) -> None:
    """Give every parameter values that matter: norms differ from one, biases from zero."""
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():  # buffers, too
        if not case.randomize(name, tensor) and name in parameters:
            noise = torch.randn_like(tensor) * 0.2
            tensor.copy_(noise if tensor.dim() > 1 else tensor + noise)


def _write(case: Case, model: torch.nn.Module, folder: Path) -> None:
    if not case.reference:
        model.save_pretrained(folder)
        return
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(case.config))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a Hugging Face model."""
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(path).items()
    }


# Its config.json


def _check_config(case: Case, saved: Saved, written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    assert saved.family.from_hf(config) == saved.family.from_hf(saved.config)
    assert family_for(config) is saved.family
    if case.reference:
        theirs: Mapping[str, Any] = saved.config
    else:
        config, theirs = _load_quietly(written), _load_quietly(saved.path)
    names = theirs.keys() & config.keys() - {*_NOT_COMPARED, *_SPECIAL_TOKENS, *case.not_written}
    differ = {name for name in names if not _agree(config[name], theirs[name])}
    assert {n: config[n] for n in differ} == {n: theirs[n] for n in differ}


def _agree(ours: Any, theirs: Any) -> bool:
    """Compare; what only we spell out of rotary positions is what transformers assumes."""
    if not isinstance(theirs, Mapping):
        return bool(ours == theirs)
    return all(key == "type" or ours.get(key) == value for key, value in theirs.items())


def _load_quietly(path: Path) -> dict[str, Any]:
    """Load a model with transformers, which must not warn, and return its configuration."""
    from transformers import AutoModelForCausalLM

    with _recorded_warnings() as messages, warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(path)
    assert messages == []
    return model.config.to_dict()


@contextlib.contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    messages: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Recorder(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


# Ours


def _to_megatron(source: Path, target: Path, topology: Topology) -> None:
    experts = topology.expert_model_parallel_size
    convert(
        Request(
            load_dir=source,
            save_dir=target,
            save_format="mcore",
            target_tensor_parallel_size=topology.tensor_model_parallel_size,
            target_pipeline_parallel_size=topology.pipeline_model_parallel_size,
            **({"target_expert_parallel_size": experts} if experts > 1 else {}),
        )
    )


def _run(
    saved: Saved, layout: str, folders: pytest.TempPathFactory, function: Callable[..., Any]
) -> list[Any]:
    """Call a function of (weights, gradients, config) on each rank of a layout."""
    topology, folder = LAYOUTS[layout], folders.mktemp("megatron")
    _to_megatron(saved.path, folder / "weights", topology)
    if function is _loss_and_gradients:
        _to_megatron(saved.gradients, folder / "gradients", topology)
    world_size = topology.model_parallel_size * topology.expert_model_parallel_size
    model = saved.family.from_hf(saved.config)
    longest = max(model.max_position_embeddings, SEQUENCE)  # may be more than it was made for
    model = replace(model, max_position_embeddings=longest)
    config = pretrain_config(model, topology, length=SEQUENCE, samples=BATCH)
    config = check_world(config, world_size)
    return run_ranks(function, world_size, folder / "weights", folder / "gradients", config)


def pretrain_config(
    model: Architecture, topology: Topology, *, length: int, samples: int
) -> PretrainConfig:
    """Return the flags of a run whose global batch is some samples of a length, one at a time."""
    return PretrainConfig(
        model=model,
        parallel=topology,
        dropout=Dropout(),
        training=Training(train_iters=1, seq_length=length, global_batch_size=samples),
        vocabulary=Vocabulary(make_vocab_size_divisible_by=16),
        data=DataConfig(data_path=("TOKENS",)),
        optimizer=Adam(),
        learning_rate=LearningRate(lr=1e-3),
        checkpoint=CheckpointConfig(),
        log=LogConfig(),
        launch=LaunchConfig(),
    )


def _load(weights: Path, built: Any) -> None:
    from ml_parallel import checkpoint
    from ml_train.restore import restore

    restore(checkpoint.latest(weights, print), built.state)


def _micro_batches(built: Any) -> tuple[int, list[dict[str, torch.Tensor]]]:
    """Return the number of this replica's first sample, and its samples."""
    count = built.shape.num_microbatches
    first = built.place.dp_rank * count
    shared = {
        "loss_mask": torch.ones(1, SEQUENCE),
        "position_ids": torch.arange(SEQUENCE)[None],
    }
    rows = TOKENS[first : first + count]
    return first, [{"tokens": row[None, :-1], "labels": row[None, 1:], **shared} for row in rows]


def _logits(weights: Path, _: Path, config: PretrainConfig) -> tuple[int, numpy.ndarray | None]:
    """Return this replica's first sample and its logits on the last stage, None on the others."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather

    from ml_train.build import build

    def forward(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
        batch = next(batches)
        output = model(batch["tokens"], batch["position_ids"], None)
        return output, lambda logits, **_: gather(logits)

    built = build(config)
    _load(weights, built)
    first, batches = _micro_batches(built)
    with torch.no_grad():
        logits = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=built.chunks[0],
            num_microbatches=len(batches),
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not logits:
        return first, None
    return first, torch.cat(logits)[..., : config.model.vocab_size].numpy()


def _loss_and_gradients(
    weights: Path, gradients: Path, config: PretrainConfig
) -> tuple[float, dict[str, numpy.ndarray], dict[str, numpy.ndarray]]:
    """Return the loss, our gradient of each of this rank's weights, and the published one."""
    from ml_train.build import build
    from ml_train.step import _reduce, _run_schedule, mean_loss

    built = build(config)
    # A gradient is laid out like its weight, and so are those of the published model.
    _load(gradients, built)
    expected = {name: tensor.detach().clone().numpy() for name, tensor in _parameters(built)}
    _load(weights, built)
    _, batches = _micro_batches(built)
    reports = _run_schedule(built.chunks, [iter(batches)], built.shape, forward_only=False)
    loss = mean_loss([_reduce(reports, built.shape, False)])
    found = {name: tensor.main_grad.clone().numpy() for name, tensor in _parameters(built)}
    return loss, found, expected


def _parameters(built: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (chunk.global_name(name), tensor)
        for chunk in built.state.chunks
        for name, tensor in chunk.module.named_parameters()
    ]
