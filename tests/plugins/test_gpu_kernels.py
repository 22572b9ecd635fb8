"""plugins.torch_gpu.kernels: the same bytes as torch's operations, and what runs without them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

# ruff: noqa: E402 - what follows needs torch and Triton
import interpreted_kernels

from dgiqa_stream.types import HdrTags
from plugins.torch_gpu import views
from plugins.torch_gpu.devices import why_no_cuda
from plugins.torch_gpu.planes import TorchPlanes
from plugins.torch_gpu.views import cut_views, why_no_kernels

CASES = [f"{a}, {b}" for a in interpreted_kernels.LAYOUTS for b in interpreted_kernels.SIZES]


@pytest.fixture(scope="module")
def interpreted():
    """What the helper found, in a process in which Triton interprets."""
    script = Path(interpreted_kernels.__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kernels_give_the_bytes_of_torch_and_of_the_cpu(interpreted, case):
    """Three views of two pictures of unlike matrices and ranges, from rows that lie apart: the
    kernels are used, and differ from torch's operations in no byte; from the CPU's preprocess in
    none of 8 bits, and of deeper samples by one step at most, where OpenCV's float sums tie.
    """
    found, is_deep = interpreted[case], case.split(", ")[0] in interpreted_kernels.BITS
    assert (found["num_kernel_calls"], found["from_torch"]) == (3, 0)
    assert found["from_cpu"] <= is_deep


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("capability", [75, 90])
def test_kernels_compile_without_a_gpu(capability, bits, tmp_path):
    """Triton and its assembler take the kernels for Turing and for Hopper, of NV12 and of P010, no
    register spilt, and float32 steps of P010 stay apart, as each is rounded.
    """
    script = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plugins.torch_gpu import kernels
pointers = {{"surfaces": "*i64", "tables": "*i32", "out": "*u8"}}
pointers["matrices"] = "*i32" if {bits} == 8 else "*fp32"
whole = dict(LUMA_STEP=1, CHROMA_STEP=1, IS_WHOLE=True, KIND=1, NUM=128, BITS={bits})
halved = dict(FIRST=1, STEP=2, DOWN=1, ACROSS=2, NUM=128, IS_DEEP={bits} > 8)  # 1080p's chroma
smoothed = dict(FIRST=0, STEP=1, NUM=128, IS_DEEP={bits} > 8)
for kernel, given in (
    (kernels.view_kernel, whole), (kernels.halve_kernel, halved), (kernels.smooth_kernel, smoothed)
):
    if kernel is not kernels.view_kernel and {bits} > 8:
        pointers["out"] = "*u16"
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={{n: "constexpr" if n in given else pointers.get(n, "i32") for n in names}},
        constexprs={{(names.index(n),): v for n, v in given.items()}},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", {capability}, 32), options={{"enable_fp_fusion": False}}
    )
    assert "fma.rn.f32" not in made.asm["ptx"]
    assert made.asm["cubin"][:4] == b"\\x7fELF"
    assert ".local" not in made.asm["ptx"]
print("compiled")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    if done.returncode and "ptxas" in done.stderr.splitlines()[-1]:
        pytest.skip("this Triton brings no assembler")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "compiled\n"


def pictures(num=1, *, size=(60, 90)):
    """4:2:0 noise."""
    generator = torch.Generator().manual_seed(0)
    shapes = (size, *[tuple(n // 2 for n in size)] * 2)
    return [
        TorchPlanes(
            tuple(torch.randint(0, 256, s, dtype=torch.uint8, generator=generator) for s in shapes)
        )
        for _ in range(num)
    ]


def test_a_kernel_that_does_not_compile_is_told_once(monkeypatch, caplog):
    """For a size that the compiler refuses, torch's operations cut the same views, again and again,
    and one warning names the size and the reason.
    """
    from triton.runtime.errors import OutOfResources

    from plugins.torch_gpu import kernels

    def refuses(*_):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(kernels, "cut", refuses)
    monkeypatch.setattr(views, "_told", set())
    wanted = cut_views(pictures(2), interpreted_kernels.VIEWS, by_kernels=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = cut_views(pictures(2), interpreted_kernels.VIEWS, by_kernels=True)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (line,) = caplog.messages
    assert line.startswith("views of 90x60 pixels are cut by torch's operations: out of resource")


def test_hdr_pictures_are_left_to_torch(monkeypatch):
    """HDR and samples that lie differently apart never reach a kernel."""
    from plugins.torch_gpu import kernels

    def never(*_):
        raise AssertionError("was called")

    monkeypatch.setattr(kernels, "cut", never)
    samples = torch.full((60, 90), 500, dtype=torch.uint16)
    bright = TorchPlanes((samples,), bit_depth=10, hdr=HdrTags("pq"))
    assert kernels.why_not([bright]) == "HDR pictures"
    assert cut_views([bright], interpreted_kernels.VIEWS, by_kernels=True)["whole"].any()
    apart = torch.zeros((60, 180), dtype=torch.uint8)[:, ::2]
    mixed = [TorchPlanes((apart,)), TorchPlanes((apart.contiguous(),))]
    assert kernels.why_not(mixed) == "samples that lie differently apart"
    cut_views(mixed, interpreted_kernels.VIEWS, by_kernels=True)


def test_no_device_is_asked_in_vain(caplog):
    """A CPU has no kernels; a CUDA device that fails at the first try is told, not raised."""
    assert why_no_kernels(torch.device("cpu")) == "kernels are for CUDA devices"
    assert not caplog.messages
    if why_no_cuda():
        with caplog.at_level(logging.WARNING):
            assert why_no_kernels(torch.device("cuda", 15))
        assert "cuda:15 are cut by torch's operations" in caplog.messages[0]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NV12", "P010"])
@pytest.mark.parametrize("size", [(1080, 1920), (271, 481), (2160, 3840)])
def test_on_the_gpu_kernels_give_the_same_bytes(size, layout):
    """NV12 and P010 of three sizes on a CUDA device, two matrices: not one byte apart from torch's
    own operations there.
    """
    if reason := why_no_cuda():
        if os.environ.get("FAIL_WITHOUT_GPU") == "1":
            pytest.fail(f"FAIL_WITHOUT_GPU=1: {reason}")
        pytest.skip(reason)
    device = torch.device("cuda", 0)
    assert why_no_kernels(device) == ""
    made = [interpreted_kernels.picture(layout, *size, seed, 0).to(device) for seed in (0, 1)]
    specs = [
        interpreted_kernels.ViewSpec("whole", "whole", 224, 224),
        interpreted_kernels.ViewSpec("fragments", "fragments", 160, 160, rows=4, columns=4),
    ]
    found, wanted = (cut_views(made, specs, by_kernels=is_so) for is_so in (True, False))
    for name in wanted:
        assert torch.equal(found[name], wanted[name])
