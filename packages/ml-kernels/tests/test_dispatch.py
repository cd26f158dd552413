"""The table of implementations: complete, loadable, obeyed, and shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

import ml_kernels
from ml_kernels import BackendUnavailableError, dispatch
from ml_kernels.device import why_unavailable
from ml_kernels.dispatch import DEVICES, IMPLEMENTATIONS, WITHOUT, implementation, why_not

MISSING = [device for device in DEVICES if why_unavailable(device) is not None]


def test_every_operator_is_public_and_has_a_reference():
    assert set(dispatch.operators()) <= set(ml_kernels.__all__)
    assert all((operator, "reference") in IMPLEMENTATIONS for operator in dispatch.operators())


@pytest.mark.parametrize("device", DEVICES)
def test_every_operator_has_an_implementation_on_a_device_or_a_reason_why_not(device):
    for operator in dispatch.operators():
        assert ((operator, device) in IMPLEMENTATIONS) != ((operator, device) in WITHOUT)


def test_reasons_are_given_for_known_operators_and_devices_only():
    assert {device for _, device in WITHOUT} <= set(DEVICES)
    assert {operator for operator, _ in WITHOUT} <= set(dispatch.operators())


WITHOUT_TRITON = [t for t in IMPLEMENTATIONS.values() if t not in dispatch.OF_TRITON]
"""Entries that can be imported here; `hatch run triton:test` imports the others."""

# torch_npu is not here: an empty module stands in for it, since what is loaded only names it.
ON_NPU = """
import json, sys, types
import torch
torch_npu = sys.modules["torch_npu"] = types.ModuleType("torch_npu")
torch.utils.backend_registration._setup_privateuseone_for_python_backend("npu")
from torch._subclasses.fake_tensor import FakeTensorMode
import ml_kernels
from ml_kernels import dispatch

def name(function):
    return f"{function.__module__}:{function.__name__}"

def refusal(operator):
    try:
        return name(dispatch.implementation(operator, x, "cpu"))
    except ml_kernels.BackendUnavailableError as error:
        return str(error)

def npu_swiglu(x, dim):
    calls.append([x.device.type, list(x.shape), dim])
    return x[..., : x.shape[dim] // 2]

torch_npu.npu_swiglu, calls = npu_swiglu, []
with FakeTensorMode():
    x = torch.empty(3, 8, device="npu")
    out = ml_kernels.swiglu(x)
print(json.dumps({
    "loaded": {t: name(dispatch._load(t)) for t in sys.argv[1:]},
    "picked": {o: name(dispatch.implementation(o, x)) for o in dispatch.operators()},
    "refused": {o: refusal(o) for o in dispatch.operators()},
    "calls": calls,
    "result": [out.device.type, list(out.shape)],
}))
"""


@pytest.fixture(scope="module")
def on_npu():
    """What dispatch does with a tensor on a fake npu, found out in a process of its own."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no backends written in Python")
    command = [sys.executable, "-c", ON_NPU, *WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_entry_of_the_table_names_a_function(on_npu):
    assert on_npu["loaded"] == {target: target for target in WITHOUT_TRITON}


def test_a_tensor_on_an_npu_goes_to_the_npu_entry_of_every_operator(on_npu):
    assert on_npu["picked"] == {o: IMPLEMENTATIONS[o, "npu"] for o in dispatch.operators()}


def test_a_tensor_on_an_npu_is_refused_by_other_backends(on_npu):
    for operator, refusal in on_npu["refused"].items():
        here = (operator, "cpu") in IMPLEMENTATIONS
        assert ("the tensors are on npu" if here else "has no cpu implementation") in refusal


def test_a_public_function_reaches_torch_npu(on_npu):
    assert on_npu["calls"] == [["npu", [3, 8], -1]]
    assert on_npu["result"] == ["npu", [3, 4]]


def test_without_a_name_the_device_of_the_tensor_decides():
    x = torch.ones(2)
    assert implementation("rms_norm", x).__module__ == "ml_kernels.cpu.norm"
    assert implementation("rms_norm", x.to("meta")).__module__ == "ml_kernels.norm"
    assert implementation("moe_permute", x).__name__ == "moe_permute_reference"


def test_the_reference_runs_wherever_it_is_asked_for():
    assert why_not("rms_norm", "reference") is None
    found = implementation("rms_norm", torch.ones(2), "reference")
    assert found is implementation("rms_norm", torch.ones(2, device="meta"), "reference")


@pytest.mark.parametrize("operator", dispatch.operators())
def test_a_backend_asked_for_by_name_never_falls_back(operator):
    for device in DEVICES:
        if device == "cpu" and (operator, device) in IMPLEMENTATIONS:
            found = implementation(operator, torch.ones(2), device)
            assert f"{found.__module__}:{found.__name__}" == IMPLEMENTATIONS[operator, device]
            continue
        with pytest.raises(BackendUnavailableError, match=f"{operator}: backend='{device}': "):
            implementation(operator, torch.ones(2), device)


@pytest.mark.parametrize("device", MISSING)
def test_a_missing_device_says_why(device):
    reason = why_not("rms_norm", device)
    assert reason == why_unavailable(device)
    with pytest.raises(BackendUnavailableError) as raised:
        ml_kernels.rms_norm(torch.ones(2, 4), torch.ones(4), eps=1e-5, backend=device)
    assert str(raised.value) == f"rms_norm: backend='{device}': {reason}"


# Without Triton. A GPU is only claimed, which is enough to choose.


@pytest.fixture
def _without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "why_unavailable", lambda _: None)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)


def on_cuda():
    with FakeTensorMode():
        return torch.empty(2, 4, device="cuda")


OF_TRITON = [
    operator
    for operator in dispatch.operators()
    if IMPLEMENTATIONS.get((operator, "cuda")) in dispatch.OF_TRITON
]


def test_what_imports_triton_is_known_to_need_it():
    folder = Path(dispatch.__file__).parent / "cuda"
    named = {target.partition(":")[0].rpartition(".")[2] for target in dispatch.OF_TRITON}
    imports = {f.stem for f in folder.glob("*.py") if "cuda.kernels" in f.read_text()}
    assert imports == named - {"softmax"}  # which torch compiles


@pytest.mark.usefixtures("_without_triton")
@pytest.mark.parametrize("operator", OF_TRITON)
def test_what_is_of_triton_needs_it_where_it_is_named(operator):
    assert why_not(operator, "cuda") == "the package triton is not installed"
    refusal = f"{operator}: backend='cuda': the package triton is not installed"
    with pytest.raises(BackendUnavailableError, match=refusal):
        implementation(operator, on_cuda(), "cuda")
    chosen = implementation(operator, on_cuda())
    assert f"{chosen.__module__}:{chosen.__name__}" == IMPLEMENTATIONS[operator, "reference"]


@pytest.mark.usefixtures("_without_triton")
def test_a_missing_package_is_shown(capsys):
    ml_kernels.available()
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines[1 : len(dispatch.operators()) + 1]}
    column = DEVICES.index("cuda")
    assert [operator for operator in cells if cells[operator][column] == "no"] == OF_TRITON
    for operator in OF_TRITON:
        assert f"reference for {operator} on cuda: the package triton is not installed" in lines


def test_with_triton_nothing_is_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "why_unavailable", lambda _: None)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert all(why_not(operator, "cuda") is None for operator in OF_TRITON)
    chosen = implementation("scaled_masked_softmax", on_cuda())
    assert chosen.__module__ == "ml_kernels.cuda.softmax"
    assert why_not("moe_permute", "cuda") is None


# In a model that its owner compiles.

SCRIPT = """
import warnings
warnings.simplefilter("error")
# Of torch, which makes one itself.
warnings.filterwarnings("ignore", "<class 'torch.autograd.function.Function'> should not be")
import torch
import ml_kernels as k

x, w = torch.randn(4, 2, 32, requires_grad=True), torch.ones(32, requires_grad=True)
angles, target = torch.randn(4, 1, 1, 8), torch.arange(8).view(4, 2)

def model(x):
    normed = k.rms_norm(x, w, eps=1e-5)
    normed = k.layer_norm(normed, w, None, eps=1e-5, backend="cpu")
    normed, more = k.add_rms_norm(normed, x, w, eps=1e-5)
    heads = k.rotary_embedding(normed.unflatten(-1, (4, 8)), angles)
    out = k.flash_attention(heads, heads, heads, layout="SBND", causal=True).flatten(2)
    wide = torch.cat((out + more, k.gelu(out)), -1)
    wide = k.swiglu(wide) + k.geglu(wide) + k.scaled_masked_softmax(out[None], None)[0]
    loss = k.cross_entropy(wide, target).mean()
    loss = loss + k.cross_entropy(out, target, backend="reference").sum()
    return loss + k.linear_cross_entropy(wide, torch.ones(40, 32), target)

compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
found = torch.autograd.grad(compiled, (x, w))
plain = model(x)
expected = torch.autograd.grad(plain, (x, w))
torch.testing.assert_close((compiled, *found), (plain, *expected))
"""


@pytest.mark.slow
def test_operators_are_a_part_of_a_graph_from_their_first_use_on():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_operators_and_backends_are_named_with_the_known_ones():
    assert "no operator 'tea'; there are adamw, add_rms_norm" in str(why_not("tea", "cpu"))
    assert "no backend 'tpu'; there are reference, cpu, cuda, npu" in str(why_not("gelu", "tpu"))
    assert "moe_permute has no cpu implementation (" in str(why_not("moe_permute", "cpu"))
    with pytest.raises(BackendUnavailableError, match="there is no backend 'tpu'"):
        implementation("gelu", torch.ones(2), "tpu")


def test_available_prints_every_operator_and_every_reason(capsys):
    ml_kernels.available()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["operator", *DEVICES]
    rows = {line.split()[0]: line.split()[1:] for line in lines[: len(dispatch.operators())]}
    assert list(rows) == dispatch.operators()
    for operator, cells in rows.items():
        for device, cell in zip(DEVICES, cells, strict=True):
            if (operator, device) in WITHOUT:
                assert cell == "reference"
            else:
                assert cell == ("no" if device in MISSING else "yes")
    notes = lines[len(rows) :]
    assert [note for note in notes if note.startswith("no ")] == [
        f"no {device}: {why_unavailable(device)}" for device in MISSING
    ]
    assert len(notes) == len(MISSING) + len(WITHOUT)
