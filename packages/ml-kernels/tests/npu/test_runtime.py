"""The Ascend runtime as the rest of the repository sees it, here that of the stand-in libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import npu_stubs
import torch
import torch_npu

import ml_kernels
from ml_kernels import device, dispatch
from ml_kernels.npu import runtime


def test_an_npu_is_there_and_is_chosen():
    assert runtime.why_unavailable() is None
    assert device.resolve("auto") == "npu"
    assert all(dispatch.why_not(name, "npu") is None for name in dispatch.operators())


def test_available_shows_it(capsys):
    ml_kernels.available()
    assert "no npu" not in capsys.readouterr().out


def test_cuda_calls_are_answered_by_the_npu():
    # In a process of its own: the adapter replaces functions of torch for good.
    script = """
import npu_stubs
npu_stubs.load()
import torch
from ml_kernels.npu.runtime import answer_cuda_calls
answer_cuda_calls()
assert torch.cuda.current_device() == 0
assert torch.cuda.is_available()
assert torch.cuda.device_count() == 1
torch.cuda.synchronize()
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    assert torch.cuda.current_stream() == stream
assert torch.ones(2, device="cuda").device == torch.device("npu", 0)
store = torch.distributed.HashStore()
torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
assert torch.distributed.get_backend() == "hccl"
"""
    here = Path(npu_stubs.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_stand_ins_answer_everything_that_the_wheel_links_against():
    # Loading succeeded; the lazily looked-up names are there too.
    names = npu_stubs.wanted_names()
    assert {"aclrtGetDeviceCount", "aclrtSetDeviceSatMode", "HcclGetCommName"} <= set(names)
    assert not any(name.startswith("aclnn") for name in names)
    assert torch_npu.npu.device_count() == 1
    assert torch.npu.current_device() == 0
