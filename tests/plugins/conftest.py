"""Fixtures that the tests of the GPU path share; torch is loaded only where one is used."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from dgiqa_stream.manifest import load_model


@pytest.fixture(scope="session")
def model():
    """The shipped model in single precision."""
    return load_model("student-fp32")


@pytest.fixture
def opened(model):
    """Opens torch backends on the CPU; closes them at the end."""
    from plugins.torch_gpu import backend as torch_backend

    backends = []

    def opens(**settings):
        one = torch_backend.open_model(model, device="cpu", num_threads=1, **settings)
        backends.append(one)
        return one

    yield opens
    for one in backends:
        one.close()


@pytest.fixture
def nothing_is_lost_for_good():
    """What one test loses is whole again for the next."""
    from plugins.torch_gpu import devices

    yield
    devices._lost.clear()
    devices._in_use.clear()


@pytest.fixture
def cuda():
    """The device; skips, or fails, where there is none."""
    import torch

    from plugins.torch_gpu.devices import why_no_cuda

    if reason := why_no_cuda():
        if os.environ.get("FAIL_WITHOUT_GPU") == "1":
            pytest.fail(f"FAIL_WITHOUT_GPU=1: {reason}")
        pytest.skip(reason)
    return torch.device("cuda", 0)


@pytest.fixture
def decoded_by(monkeypatch):
    """``decoded_by(Decoder)``: every source that asks for ``cuda`` gets ``Decoder(0)``."""

    def use(decoder):
        module = ModuleType("twin_decoder")
        module.open_decoder = lambda device: decoder(0)
        monkeypatch.setitem(sys.modules, "twin_decoder", module)
        monkeypatch.setattr(
            "dgiqa_stream.sources._hardware.DECODERS", {"cuda": ("twin_decoder", "gpu")}
        )

    return use
