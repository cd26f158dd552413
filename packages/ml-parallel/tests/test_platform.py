"""Binding megatron-core to a device."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from ml_parallel import platform
from ml_parallel.platform import Device, EngineMismatchError, Patch, cpu, patches
from ml_parallel.testing import run_ranks


@pytest.fixture(scope="module", autouse=True)
def _engine():
    platform.import_engine()


def in_fresh_process(script):
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process


def test_every_patched_name_exists_and_has_a_reason():
    for patch in platform.active_patches("cpu"):
        patches._find(patch)
        assert len(patch.reason) > 10


def test_a_name_that_is_gone_is_reported_before_anything_is_replaced():
    kept = torch.cuda.synchronize
    gone = Patch(
        module="megatron.core.optimizer.optimizer",
        name="MegatronOptimizer.teleport",
        replace=lambda original: original,
        reason="a test needs a name that never existed",
    )
    synchronize = next(p for p in cpu.PATCHES if p.name == "synchronize")
    with pytest.raises(EngineMismatchError, match=r"MegatronOptimizer\.teleport is gone .* a test"):
        patches.apply([synchronize, gone])
    assert torch.cuda.synchronize is kept


def test_another_release_of_the_engine_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "version", lambda _name: "0.17.0")
    with pytest.raises(EngineMismatchError, match=r"0\.17\.0 is installed.*0\.16"):
        platform.import_engine()


def test_importing_the_package_replaces_nothing():
    in_fresh_process(
        "import torch; before = torch.cuda.synchronize, torch.zeros, torch.Tensor.type\n"
        "import ml_parallel.platform\n"
        "assert before == (torch.cuda.synchronize, torch.zeros, torch.Tensor.type)"
    )


def test_the_engine_is_imported_without_a_warning():
    process = in_fresh_process(
        "import warnings; warnings.simplefilter('always')\n"
        "from ml_parallel import platform; platform.activate('cpu')"
    )
    assert "Transformer Engine" not in process.stderr
    assert "Apex" not in process.stderr


def test_a_process_is_bound_to_one_device():
    in_fresh_process(
        "from ml_parallel import platform\n"
        "first = platform.activate('cpu')\n"
        "assert platform.activate('cpu') is first\n"
        "platform._active = platform.Device(type='cuda', index=0)\n"
        "try: platform.activate('cpu')\n"
        "except RuntimeError as error: assert 'bound to' in str(error)\n"
        "else: raise SystemExit('not refused')"
    )


def test_a_device_context_still_decides_where_tensors_are():
    in_fresh_process(
        "from ml_parallel import platform; platform.activate('cpu')\n"
        "import torch\n"
        "with torch.device('meta'):\n"
        "    made = [torch.zeros(2), torch.empty(2), torch.full((2,), 1.0), torch.arange(2)]\n"
        "assert [tensor.device.type for tensor in made] == ['meta'] * 4, made"
    )


def answers():
    """What megatron-core's CUDA calls get on a CPU rank."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed as seed

    tensor = torch.zeros(2, device="cuda", dtype=torch.bfloat16)
    assert tensor.device.type == "cpu"
    assert tensor.cuda(torch.cuda.current_device()) is tensor
    assert tensor.type() in ["torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    assert tensor.type() == "torch.BFloat16Tensor"
    assert tensor.type() != "torch.cuda.FloatTensor"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert tensor.type(torch.float32).dtype == torch.float32
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.current_stream().record_event(torch.cuda.Event()).wait()
    torch.cuda.synchronize()
    seed(7, tp_rank=0, ep_rank=0, etp_rank=0)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        assert not torch.equal(forked, torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())
    return True


def test_a_cpu_answers_the_cuda_calls():
    assert run_ranks(answers, 1) == [True]


def collectives():
    device = platform.activate("cpu")
    assert device.collectives == torch.distributed.get_backend() == "gloo"
    value = torch.full((1,), float(torch.distributed.get_rank()), device="cuda")
    torch.distributed.all_reduce(value)
    return float(value)


def test_ranks_reduce_over_gloo():
    assert run_ranks(collectives, 3) == [3.0] * 3


def test_a_process_alone_is_a_group_of_one():
    in_fresh_process(
        "import torch\n"
        "from ml_parallel import platform\n"
        "platform.initialize_process_group(platform.activate('cpu'))\n"
        "assert torch.distributed.get_world_size() == 1\n"
        "torch.distributed.barrier()\n"
        "torch.distributed.destroy_process_group()"
    )


def test_a_rank_that_nobody_answers_says_so_in_time(monkeypatch):
    where = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1 port 1: rank 0 did not answer within"):
        platform.initialize_process_group(Device(type="cpu", index=0), join_minutes=0.002)


def test_half_an_environment_of_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR, MASTER_PORT are not: set all that torchrun"):
        platform.initialize_process_group(Device(type="cpu", index=0))


@pytest.mark.parametrize(("name", "value"), [("RANK", "3"), ("RANK", "x"), ("MASTER_PORT", "x")])
def test_an_environment_that_makes_no_sense_is_refused_before_anybody_waits(
    monkeypatch, name, value
):
    where = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, text in {**where, name: value}.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"^{name}={value} in the environment: must be "):
        platform.initialize_process_group(Device(type="cpu", index=0), join_minutes=0.002)


def test_type_names_stay_usable_as_strings_and_keys():
    name = cpu.TypeName("torch.FloatTensor")
    assert {name: 1}["torch.FloatTensor"] == 1
    assert name == "torch.cuda.FloatTensor"
    assert name != "torch.cuda.HalfTensor"
    assert name != 3


def warned_when_bound_already():
    warnings.resetwarnings()
    warnings.simplefilter("error")
    platform.activate("cpu")
    warnings.warn("`torch.distributed.all_gather` is deprecated", FutureWarning, stacklevel=1)
    return "quiet"


def test_a_fork_of_a_bound_process_is_quiet_too():
    assert run_ranks(warned_when_bound_already, 1) == ["quiet"]


def uneven():
    """Gather and scatter parts of 3 and 0 rows, and what should come of it."""
    from megatron.core.tensor_parallel import mappings

    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    sizes = [3, 0]
    mine = torch.arange(sizes[rank] * 2.0).view(-1, 2) + 1
    gathered = mappings._gather_along_first_dim(mine, group, sizes)
    scattered = mappings._reduce_scatter_along_first_dim(gathered, group, sizes)
    nothing = mappings._gather_along_first_dim(mine[:0], group, [0, 0])
    return gathered.tolist(), scattered.tolist(), list(nothing.shape)


def test_gloo_exchanges_parts_of_different_sizes():
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    doubled = [[2 * x for x in row] for row in rows]
    assert run_ranks(uneven, 2) == [(rows, doubled, [0, 2]), (rows, [], [0, 2])]


def device_in_context():
    with torch.device("meta"):
        inside = torch.empty(2, device=torch.cuda.current_device()), torch.ones(2, device="cuda")
    return [str(tensor.device) for tensor in inside], str(torch.cuda.current_device())


def test_a_model_can_be_built_without_its_memory():
    assert run_ranks(device_in_context, 1) == [(["meta", "meta"], "cpu")]
