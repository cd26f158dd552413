"""A stand-in for NVIDIA's driver: kernels are compiled for an H100 and started nowhere.

Run as a program it calls every operator that has a Triton kernel, forward and backward, in each
dtype, and prints how many bits at a time each kernel made reads and writes at most.
"""

from __future__ import annotations

import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

WIDTH = re.compile(r"(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)")


class _Utilities:
    def load_binary(self, *_):
        return 1, 2, 64, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    def __init__(self, *_):
        pass

    def __call__(self, *_):
        pass


class Hopper:
    utils = _Utilities()
    launcher_cls = _Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def operators(dtype):
    """Yield a call of each operator on tensors as a model has them."""
    from ml_kernels.cuda import activation, linear_loss, loss, norm, rotary

    def leaf(*shape):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    x, weight, target = leaf(64, 4096), leaf(4096), torch.zeros(64, dtype=torch.int64)
    yield norm.rms_norm(x, weight, 1e-6, False)
    yield sum(norm.add_rms_norm(x, x, weight, 1e-6, True))
    yield norm.layer_norm(x, weight, weight, 1e-6)
    yield activation.swiglu(x, None)
    yield activation.geglu(x, weight, "tanh")
    yield activation.gelu(x, weight, "none")
    yield rotary.rotary_embedding(leaf(64, 1, 32, 128), torch.zeros(64, 1, 1, 96), False, 1.0)
    yield loss.cross_entropy(x, target, -100, None)
    given = (target, None, "sum", -100, None)
    yield linear_loss.linear_cross_entropy(leaf(64, 32), leaf(4096, 32), *given)


def main():
    driver.set_active(Hopper())
    rows = set()
    run = JITFunction.run

    def recorded(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        assert kernel.asm["cubin"]
        widest = {"ld": 0, "st": 0}
        for way, vector, bits in WIDTH.findall(kernel.asm["ptx"]):
            widest[way] = max(widest[way], int(vector or 1) * int(bits))
        name = f"{self.__module__.rpartition('.')[2]}.{self.__name__}"
        rows.add((name, str(dtype).removeprefix("torch."), *widest.values()))
        return kernel

    JITFunction.run = recorded
    for dtype in (torch.bfloat16, torch.float32):
        for out in operators(dtype):
            out.backward(torch.empty_like(out))
    sys.stdout.writelines(" ".join(map(str, row)) + "\n" for row in sorted(rows))


if __name__ == "__main__":
    main()
