"""The benchmarks of compression: their floors, what they keep, and the teachers they take apart."""

from __future__ import annotations

import argparse
import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from torch import nn  # noqa: E402


def test_a_floor_is_met_at_its_own_value(script):
    """The bound itself is met, a hair beyond it is not, in either direction."""
    compression = script("compression")
    found = compression.floors(
        ("faster", 2.0, ">=", 2.0),
        ("slow", 1.999, ">=", 2.0),
        ("small", 0.3, "<=", 0.3),
        ("large", 0.301, "<=", 0.3),
    )
    assert [f["met"] for f in found] == [True, False, True, False]
    assert found[1] == {"name": "slow", "found": 1.999, "floor": ">= 2", "met": False}


def test_a_part_that_is_not_asked_for_stays(script, tmp_path, monkeypatch):
    """A run of one part leaves the others in the file as they were, each with its own command."""
    compression = script("compression")
    output = tmp_path / "compression.json"
    output.write_text(json.dumps({"crop": {"command": "of another day"}, "gone": 1}))
    monkeypatch.setitem(compression.MEASURED, "frame", lambda arguments: {"found": 7})
    compression.main(["--parts", "frame", "-o", str(output)])
    found = json.loads(output.read_text())
    assert found["crop"] == {"command": "of another day"}
    assert found["frame"]["found"] == 7
    assert found["frame"]["command"].startswith("python benchmarks/compression.py")
    assert "gone" not in found
    assert found["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("words", "missing"),
    [(["--teacher", "student"], "--packs"), (["--packs", "packs"], "--teacher")],
)
def test_what_a_part_needs_is_asked_for_first(
    script, tmp_path, monkeypatch, capsys, words, missing
):
    """A word that is missing for one part is told by name before any part is measured."""
    compression, measured = script("compression"), []
    for part in compression.PARTS:
        monkeypatch.setitem(compression.MEASURED, part, measured.append)
    with pytest.raises(SystemExit):
        compression.main([*words, "-o", str(tmp_path / "compression.json")])
    assert f"{missing} is needed for" in capsys.readouterr().err
    assert measured == []


def test_cpu_seconds_are_those_of_one_call(script):
    """Twice the work in each call is twice the CPU, whatever the wall clock says."""
    import time

    def busy(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    compression = script("compression")
    assert compression.cpu_seconds(lambda: busy(0.1), times=2) == pytest.approx(0.1, rel=0.2)


class TwoInputs(nn.Module):
    """A convolution, a linear layer, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 8, stride=8)
        self.linear = nn.Linear(64, 64)

    def forward(self, picture, depth):
        """(B, 3, H, W) each to (B,)."""
        seen, near = (self.conv(x).flatten(2).transpose(1, 2) for x in (picture, depth))
        seen = self.linear(seen)
        return (seen @ near.transpose(1, 2)).mean((1, 2))


def test_the_crops_int8_has_int8_weights_alone(script, tmp_path):
    """Convolutions and linear layers get int8 weights and a third of the bytes; the product of two
    activations stays in float; times are told against the first model.
    """
    crop = script("_teacher_crop")
    torch.manual_seed(1)
    paths = {name: tmp_path / f"{name}.onnx" for name in ("float", "int8")}
    crop.export(TwoInputs().eval(), paths["float"])
    crop.quantise(paths["float"], paths["int8"])
    graph = onnx.load(paths["int8"]).graph
    stored = {t.name: t for t in graph.initializer if len(t.dims) > 1}
    assert stored
    assert {t.data_type for t in stored.values()} == {onnx.TensorProto.INT8}
    makers = {name: node for node in graph.node for name in node.output}
    products = [n for n in graph.node if n.op_type == "MatMul"]
    free = [n for n in products if not any(set(makers[x].input) & set(stored) for x in n.input)]
    assert len(free) == 1
    after = [n.op_type for n in graph.node if free[0].output[0] in n.input]
    assert after == ["ReduceMean"]
    found = crop.timed(paths, rounds=2, threads=1)
    assert found["float"]["times_faster"] == 1.0
    assert found["int8"]["median_ms"] > 0


@pytest.fixture
def small_teacher():
    """A narrow teacher on MobileNetV2, its BatchNorms moved off their start."""
    from distill.models.teacher import Dgiqa, TeacherSpec

    torch.manual_seed(3)
    made = Dgiqa(TeacherSpec("mobilenetv2", (8, 8, 16, 16), 4, 32)).eval()
    for name, buffer in made.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return made


@torch.no_grad()
def test_a_teacher_on_kept_maps_scores_as_it_is(script, small_teacher):
    """With its pyramids' maps given, and early bridges computed where they are read, a teacher says
    what it says of the pictures themselves: to 1e-5, float32 sums in another order.
    """
    from distill.models.backbones import pyramid_maps

    factored, maps = script("factored_teacher"), script("_teacher_maps")
    pictures = torch.randn(2, 2, 3, 224, 224)
    wanted = small_teacher(*pictures)
    rows = [
        torch.cat([m.flatten(1) for m in pyramid_maps(net, x)], 1).numpy()
        for net, x in zip(
            (small_teacher.backbone, small_teacher.depth_backbone), pictures, strict=True
        )
    ]
    made = factored.on_kept_maps(copy.deepcopy(small_teacher))
    seen = maps.Maps(*rows, np.zeros(2))
    torch.testing.assert_close(made(*seen.rows(np.arange(2))), wanted, atol=1e-5, rtol=0)


def test_factoring_tells_what_it_loses(script, small_teacher):
    """A factored teacher stays nearer to the whole one at a higher rank, with fewer weights;
    each names the rank of the published width, and an interval that holds its loss.
    """
    from quant.low_rank.config import LowRankConfig

    factored, maps = script("factored_teacher"), script("_teacher_maps")
    made = factored.on_kept_maps(small_teacher)
    rng = np.random.default_rng(1)
    width = sum(int(np.prod(s)) for s in made.backbone.shapes)
    kept = maps.Maps(*rng.random((2, 96, width), np.float32).astype(np.float16), rng.random(96))
    was = factored.scores_of(made, kept)
    arguments = argparse.Namespace(tuning_steps=0, batch=8, published_backbone="mobilenetv2")
    found = [
        factored.factored(
            made, was, LowRankConfig(choice="fixed", rank=rank, multiple=1, smallest_saving=0.05,
                                     include=("dilated_stack.*",), reestimate_batchnorm=False),
            kept, kept, arguments,
        )
        for rank in (24, 1)
    ]  # fmt: skip
    assert [f["published_rank"] for f in found] == [480, 20]
    assert found[0]["factored"]["srcc_with_whole"] > 0.5
    assert found[1]["factored"]["srcc_with_whole"] < found[0]["factored"]["srcc_with_whole"]
    assert found[1]["head_parameters"][1] < found[1]["head_parameters"][0]
    low, high = (found[0]["factored"]["srcc_difference"][end] for end in ("low", "high"))
    assert low <= found[0]["factored"]["srcc_difference"]["value"] <= high
