"""Channel equalisation: the same float function, even ranges."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from distill.models.student import Deployed  # noqa: E402
from quant.equalize import ChannelGroup, equalize_  # noqa: E402


@pytest.fixture
def deployed(student):
    """The student as exported; its own copy."""
    return Deployed(student).eval()


@pytest.fixture
def groups(deployed):
    """Its channel groups."""
    return [ChannelGroup(writers, readers) for writers, readers in deployed.channel_groups()]


def logits(deployed, tensors):
    """The logit of each picture: where the sigmoid hides nothing."""
    together = [torch.cat(views) for views in zip(*tensors, strict=True)]
    with torch.no_grad():
        return torch.logit(deployed(*together).double())


def channel_ranges(module, deployed, tensors):
    """The largest magnitude of each input channel of a layer, over all pictures."""
    seen = []
    handle = module.register_forward_pre_hook(
        lambda m, arguments: seen.append(arguments[0].abs().amax((0, 2, 3)))
    )
    logits(deployed, tensors)
    handle.remove()
    return torch.stack(seen).amax(0)


def test_the_float_function_stays(deployed, groups, tensors):
    """No logit moves by more than 1e-4 of the logits' spread, though weights changed a lot."""
    before, weight = logits(deployed, tensors), deployed.trunk.blocks[3].project.weight.clone()
    equalize_(deployed, groups, tensors)
    after = logits(deployed, tensors)
    assert (after - before).abs().max() < 1e-4 * (before.max() - before.min())
    change = (deployed.trunk.blocks[3].project.weight / weight).log().abs()
    assert change.max() > 0.1


def test_ranges_before_depthwise_layers_are_equal(deployed, groups, tensors):
    """Every channel that a depthwise convolution reads reaches the same maximum, within 0.1 %."""
    depthwise = [block.depthwise for block in deployed.trunk.blocks]
    before = [channel_ranges(m, deployed, tensors) for m in depthwise]
    equalize_(deployed, groups, tensors)
    spread = [r.max() / r.min() for r in before]
    assert max(spread) > 1.5  # there was something to even out
    for module in depthwise:
        ranges = channel_ranges(module, deployed, tensors)
        assert ranges.max() / ranges.min() < 1.001


def test_a_dead_channel_harms_nothing(deployed, groups, tensors):
    """A channel that is always zero keeps finite weights, and the function stays."""
    block = deployed.trunk.blocks[4]
    with torch.no_grad():
        block.expand.weight[7] = 0
        block.expand.bias[7] = -1
    before = logits(deployed, tensors)
    equalize_(deployed, groups, tensors)
    assert all(torch.isfinite(p).all() for p in deployed.parameters())
    assert (logits(deployed, tensors) - before).abs().max() < 1e-4 * before.std() * 10


def test_nothing_to_measure_on_is_refused(deployed, groups):
    """Without pictures there is an error, and no weight has changed."""
    before = [p.clone() for p in deployed.parameters()]
    with pytest.raises(ValueError, match="calibration set is empty"):
        equalize_(deployed, groups, [])
    assert all(torch.equal(a, b) for a, b in zip(before, deployed.parameters(), strict=True))
