"""A trunk of their own for the fragments: its layers, and a student that has one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from dgiqa_stream.errors import ModelError  # noqa: E402
from distill.models.fragment_trunk import FragmentTrunk, folded  # noqa: E402
from distill.models.student import (  # noqa: E402
    Deployed,
    Student,
    load_student,
    load_trunk,
    quantised_points,
)
from distill.models.trunks import NormConv2d, SlimTrunk  # noqa: E402

SLIM = [16] * 18
WIDTHS = (8, 16, 24, 32)
VIEWS = (torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8),) * 2


def student() -> Student:
    """One whose fragments pass a trunk of their own, and whose head is wider than most."""
    torch.manual_seed(1)
    return Student(
        trunk=SlimTrunk(SLIM), fragment_trunk=FragmentTrunk(WIDTHS), head_width=96
    ).eval()


def test_maps_are_halved_four_times():
    """Features are the means of maps a quarter, an eighth and a sixteenth as large, as wide as was
    asked.
    """
    trunk, seen = FragmentTrunk(WIDTHS), {}
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, y, n=name: seen.update({n: y.shape[1:]}))
    assert trunk(torch.randn(1, 3, 160, 96)).shape == (1, trunk.num_features) == (1, 72)
    sizes = {name: tuple(shape) for name, shape in seen.items()}
    assert sizes["stem"] == (8, 80, 48)
    assert sizes["to_quarter"] == sizes["at_quarter.second"] == (16, 40, 24)
    assert sizes["to_eighth"] == sizes["at_eighth.second"] == (24, 20, 12)
    assert sizes["to_sixteenth"] == (32, 10, 6)
    with pytest.raises(ValueError, match="3 widths"):
        FragmentTrunk((8, 16, 24))


def test_folding_changes_nothing():
    """Without its BatchNorms, whose statistics were of real batches, it says the same to float32's
    rounding; and there are none left.
    """
    torch.manual_seed(2)
    trunk = FragmentTrunk(WIDTHS, normalised=True)
    assert sum(isinstance(m, NormConv2d) for m in trunk.modules()) == 8
    for conv in (m for m in trunk.modules() if isinstance(m, NormConv2d)):
        nn.init.uniform_(conv.norm.weight, 0.5, 2.0)
        nn.init.uniform_(conv.norm.bias, -1.0, 1.0)
    trunk.train()
    for _ in range(20):
        trunk(torch.randn(4, 3, 64, 64))
    pictures = torch.randn(4, 3, 64, 64)
    plain = folded(trunk.eval())
    assert not any(isinstance(m, nn.BatchNorm2d | NormConv2d) for m in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(pictures), trunk(pictures), rtol=1e-4, atol=1e-5)


def test_only_the_whole_view_passes_the_trunk():
    """Fragments change what their own trunk says, and the trunk sees nothing of them."""
    made = student()
    assert made.num_whole_features == made.trunk.num_shared_features + 480
    assert made.hidden.in_features == made.num_whole_features + 72
    calls = []
    made.trunk.stem.register_forward_hook(lambda *_: calls.append(1))
    other = torch.zeros_like(VIEWS[1])
    with torch.no_grad():
        one, two = made.features(*VIEWS), made.features(VIEWS[0], other)
    assert len(calls) == 2  # one for each call, not for each view
    cut = made.num_whole_features
    assert torch.equal(one[:, :cut], two[:, :cut])
    assert not torch.isclose(one[:, cut:], two[:, cut:]).all(1).any()


def test_its_file_says_what_it_is(tmp_path):
    """Weights alone tell the widths of the fragment trunk and of the head; a student's trunk is
    found in them, and a damaged file is refused.
    """
    made = student()
    torch.save(made.state_dict(), tmp_path / "best.pt")
    loaded = load_student(tmp_path / "best.pt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(*VIEWS), made(*VIEWS))
        torch.testing.assert_close(Deployed(loaded)(*VIEWS)[:, 0], made(*VIEWS))
    assert loaded.fragment_trunk.widths == WIDTHS
    assert torch.equal(load_trunk(tmp_path / "best.pt").stem.weight, made.trunk.stem.weight)
    broken = made.state_dict()
    del broken["fragment_trunk.to_eighth.weight"]
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(ModelError, match=r"broken\.pt does not hold a student's weights"):
        load_student(tmp_path / "broken.pt")


def test_every_convolution_of_it_is_rounded():
    """INT8 rounds what each convolution and each sum gives."""
    made = student()
    points = quantised_points(made)
    convs = {m for m in made.modules() if isinstance(m, nn.Conv2d)}
    assert {m for _, m, kind in points if kind != "add"} == convs
    named = dict(made.named_modules())
    assert all(named[name] is module for name, module, _ in points)
    own = [(name, kind) for name, _, kind in points if name.startswith("fragment_trunk.")]
    assert [name for name, kind in own if kind == "add"] == [
        "fragment_trunk.at_quarter",
        "fragment_trunk.at_eighth",
    ]
    assert [name for name, kind in own if kind == "linear"] == [
        "fragment_trunk.at_quarter.second",
        "fragment_trunk.at_eighth.second",
    ]
