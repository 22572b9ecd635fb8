"""The teacher, lighter: its size on the published topology, and maps computed only where read."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from dgiqa_stream.errors import ModelError  # noqa: E402
from distill.models.teacher import Dgiqa, TeacherSpec, TransformerCnnBridge  # noqa: E402
from quant.low_rank.config import LowRankConfig, load_low_rank_recipe  # noqa: E402
from quant.low_rank.factorize import factorize_  # noqa: E402
from quant.low_rank.plan import planned_ranks, planned_size  # noqa: E402
from quant.low_rank.positions import (  # noqa: E402
    DGIQA_REDUCTIONS,
    ReadPositions,
    read_positions_only_,
)

LIGHT = Path(__file__).parents[2] / "configs" / "quant" / "dgiqa-light.toml"
SMALL = TeacherSpec("mobilenetv2", (16, 16, 32, 32), 4, 64)


def bridge(cin: int, cout: int) -> TransformerCnnBridge:
    """A drawn bridge whose BatchNorm does something."""
    torch.manual_seed(cin)
    made = TransformerCnnBridge(cin, cout).eval()
    made.norm.running_var.uniform_(0.5, 2)
    made.norm.running_mean.normal_()
    return made


def reduced(x, size: int):
    """As the teacher brings its maps to one size."""
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("cin", "cout", "side", "reduction"), [(96, 64, 56, 8), (192, 128, 28, 4)])
def test_only_what_is_read_is_computed_bit_for_bit(layout, batch, cin, cout, side, reduction):
    """The published early bridges, computed in part, reduce to the very bits of the whole map: in
    either layout (Swin's maps are channels last), for one crop and several.
    """
    whole = bridge(cin, cout)
    x = torch.randn(batch, cin, side, side).to(memory_format=layout)
    want = reduced(whole(x), side // reduction)
    part = ReadPositions(whole, reduction)
    seen = part(x)
    assert seen.shape[2:] == (2 * side // reduction,) * 2
    assert torch.equal(reduced(seen, side // reduction), want)


@pytest.mark.parametrize("reduction", [4, 8, 12, 16])
def test_the_positions_are_those_that_are_read(reduction):
    """Where every sum is exact (whole numbers, an open gate) the bits agree on any machine, for any
    reduction.
    """
    whole = TransformerCnnBridge(4, 16).eval()
    with torch.no_grad():
        for conv in (whole.conv1, whole.conv2):
            conv.weight.copy_(torch.randint(-3, 4, conv.weight.shape))
            conv.bias.copy_(torch.randint(-3, 4, conv.bias.shape))
        whole.attention[2].bias.fill_(1e6)
    x = torch.randint(-4, 5, (2, 4, 3 * reduction, 2 * reduction)).float()
    size = (3, 2)
    maps = [
        F.interpolate(y, size=size, mode="bilinear", align_corners=False)
        for y in (whole(x), ReadPositions(whole, reduction)(x))
    ]
    assert torch.equal(*maps)
    assert len(maps[0].unique()) > 20


def test_maps_that_cells_do_not_tile_are_computed_whole():
    """A side that the reduction does not divide, and training, give the bridge's whole map."""
    whole = bridge(8, 16)
    part = ReadPositions(whole, 8)
    x = torch.randn(2, 8, 20, 24)
    assert torch.equal(part(x), whole(x))
    x = torch.randn(2, 8, 16, 16)
    part.train()
    assert part(x).shape == (2, 16, 16, 16)


def test_a_teacher_scores_the_same():
    """With early bridges computed in part a DGIQA gives the same features and score (to float32's
    rounding: at these small widths kernels may add in another order) and keeps its keys.
    """
    torch.manual_seed(2)
    teacher = Dgiqa(SMALL).eval()
    crops = torch.randn(2, 2, 3, 224, 224)
    with torch.no_grad():
        before = teacher.describe(*crops)
        keys = list(teacher.state_dict())
        # MobileNetV2's maps have strides 4, 8, 16 and 32, as Swin's
        assert read_positions_only_(teacher) is teacher
        after = teacher.describe(*crops)
    assert all(isinstance(teacher.get_submodule(n), ReadPositions) for n in DGIQA_REDUCTIONS)
    assert (before.fused - after.fused).abs().max() < 1e-5
    assert (before.score - after.score).abs().max() < 1e-6
    assert sorted(teacher.state_dict()) == sorted(keys)


def test_what_is_no_bridge_is_refused():
    """Another module, a missing name and a reduction that reads everything are clear errors."""
    teacher = Dgiqa(SMALL).eval()
    with pytest.raises(ModelError, match="no such bridge"):
        read_positions_only_(teacher, {"tcb1": 8, "tcb9": 4})
    with pytest.raises(ModelError, match="lacks conv1"):
        read_positions_only_(teacher, {"fc": 8})
    with pytest.raises(ModelError, match="4 must divide"):
        read_positions_only_(teacher, {"tcb3": 2})
    assert not any(isinstance(m, ReadPositions) for m in teacher.modules())


def test_a_factored_bridge_is_computed_in_part_too():
    """A bridge whose 3x3 convolution is three layers gives the same numbers, to rounding."""
    whole = bridge(32, 64)
    x = torch.randn(2, 32, 32, 32)
    config = LowRankConfig(choice="fixed", rank=16, include=("conv2",), reestimate_batchnorm=False)
    assert list(factorize_(whole, config, [(x,)]).ranks) == ["conv2"]
    want = reduced(whole(x), 4)
    found = reduced(ReadPositions(whole, 8)(x), 4)
    assert (found - want).abs().max() < 1e-5


def test_the_light_teacher_is_small_enough_as_published():
    """On the published topology (102.88 million parameters) the shipped plan leaves at most 72.6
    million, in the layers that it names, and both pyramids are whole.
    """
    pytest.importorskip("timm")
    with torch.device("meta"):
        teacher = Dgiqa(TeacherSpec())
    config = load_low_rank_recipe(LIGHT).low_rank
    before, after = planned_size(teacher, config)
    assert round(before / 1e4) == 10288
    assert after <= 72_600_000
    ranks = planned_ranks(teacher, config)
    assert {"dilated_stack.0", "dilated_stack.3", "refinement_attention.fc_spatial.0"} <= set(ranks)
    assert len([n for n in ranks if n.split(".")[-1] in "qkv"]) == 6
    assert not any("backbone" in name for name in ranks)


def test_a_plan_is_what_factoring_gives():
    """Planned ranks and size are those of the changed model, on a small DGIQA."""
    torch.manual_seed(1)
    teacher = Dgiqa(SMALL).eval()
    config = LowRankConfig(
        choice="fixed", rank=12, include=("*attention*", "dilated_stack.*", "tcb4.conv2")
    )
    ranks, (before, after) = planned_ranks(teacher, config), planned_size(teacher, config)
    assert type(teacher.refinement_attention.multihead_attn_spatial) is nn.MultiheadAttention
    report = factorize_(teacher, config, [tuple(torch.randn(2, 4, 3, 64, 64))])
    assert report.ranks == ranks
    assert (report.num_parameters_before, report.num_parameters_after) == (before, after)
    assert after == sum(p.numel() for p in teacher.parameters())
    assert report.num_batchnorms > 2


def test_a_search_has_no_plan():
    """Only fixed ranks are known without data; anything else is refused."""
    with pytest.raises(ValueError, match="only fixed ranks"):
        planned_ranks(nn.Sequential(nn.Linear(4, 4)), LowRankConfig())
