"""The losses against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from distill.losses import falls_loss, ladder_loss, plcc_loss, score_loss  # noqa: E402

LOGITS = torch.tensor([-2.0, -0.3, 0.0, 1.7, 4.0])


def test_score_loss_is_zero_at_the_mos():
    """Where sigmoid of the logits is the MOS, the loss is 0 to float32's rounding."""
    assert score_loss(LOGITS, torch.sigmoid(LOGITS)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shift", [-1.0, -0.05, 0.05, 1.0])
def test_score_loss_is_smallest_at_the_mos(shift):
    """Any common error of the logits costs something, and the gradient points back."""
    logits = (LOGITS + shift).requires_grad_()
    loss = score_loss(logits, torch.sigmoid(LOGITS))
    loss.backward()
    assert loss.item() > 0
    assert (torch.sign(logits.grad) == math.copysign(1, shift)).all()


def test_score_loss_is_the_kullback_leibler_divergence():
    """For MOS 0.25 against a predicted 0.5 it is log 2 minus the entropy of 0.25."""
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    loss = score_loss(torch.zeros(3), torch.full((3,), 0.25))
    assert loss.item() == pytest.approx(math.log(2) - entropy, abs=1e-6)


@pytest.mark.parametrize("mos", [0.0, 1.0])
def test_score_loss_is_finite_at_the_ends_of_the_scale(mos):
    """A MOS of exactly 0 or 1 gives finite losses and gradients, near 0 for a confident logit."""
    logits = torch.tensor([40.0 * (2 * mos - 1), 0.0]).requires_grad_()
    losses = [score_loss(logits[i : i + 1], torch.tensor([mos])) for i in range(2)]
    sum(losses).backward()
    assert losses[0].item() == pytest.approx(0, abs=1e-4)
    assert losses[1].item() == pytest.approx(math.log(2), abs=1e-4)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("gain", "expected"), [(3.0, 0.0), (0.01, 0.0), (-2.0, 1.0)])
def test_plcc_loss_of_a_line(gain, expected):
    """A rising line costs 0, a falling one 1, whatever its slope and offset."""
    mos = torch.tensor([0.1, 0.25, 0.4, 0.9])
    assert plcc_loss(gain * mos + 5, mos).item() == pytest.approx(expected, abs=1e-5)


def test_plcc_loss_of_unrelated_scores():
    """Scores without linear relation to MOS cost one half."""
    scores = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert plcc_loss(scores, torch.tensor([1.0, 1.0, -1.0, -1.0])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("constant", ["scores", "mos"])
def test_plcc_loss_of_a_constant_is_finite(constant):
    """One value for all pictures gives no NaN, neither in the loss nor in its gradient."""
    rising = torch.tensor([0.1, 0.5, 0.9])
    flat = torch.full((3,), 0.4)
    scores = (flat if constant == "scores" else rising).clone().requires_grad_()
    loss = plcc_loss(scores, flat if constant == "mos" else rising)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


LEVELS = torch.tensor([[0, 2, 3], [1, 4, 6]])


@pytest.mark.parametrize(("step", "holds"), [(0.21, True), (0.2, True), (0.15, False)])
def test_ladder_loss_is_zero_where_the_margins_hold(step, holds):
    """Logits that fall by the margin at each level cost nothing, a smaller fall costs something."""
    loss = ladder_loss(1.0 - step * LEVELS, LEVELS, 0.2).item()
    assert loss == pytest.approx(0, abs=1e-6) if holds else loss > 0.01


def test_ladder_loss_of_equal_logits():
    """All logits equal: the mean over pairs of the margin times their distance in levels."""
    distances = [2, 3, 1, 3, 5, 2]
    expected = 0.2 * sum(distances) / len(distances)
    assert ladder_loss(torch.zeros(2, 3), LEVELS, 0.2).item() == pytest.approx(expected)


def test_ladder_loss_pushes_the_worse_picture_down():
    """A gradient step raises the better picture's logit and lowers the worse one's equally."""
    logits = torch.zeros(1, 2, requires_grad=True)
    ladder_loss(logits, torch.tensor([[1, 3]]), 0.2).backward()
    better, worse = logits.grad[0].tolist()
    assert better < 0 < worse
    assert better == pytest.approx(-worse)


def test_ladder_loss_does_not_compare_groups():
    """A group far above another costs nothing: contents are not ranked among each other."""
    logits = -0.3 * LEVELS + torch.tensor([[0.0], [100.0]])
    assert ladder_loss(logits, LEVELS, 0.2).item() == pytest.approx(0, abs=1e-6)


def test_ladder_loss_ignores_equal_levels():
    """Pictures of one level may have any order; without a pair the loss is 0, not NaN."""
    logits = torch.tensor([[3.0, -3.0]], requires_grad=True)
    loss = ladder_loss(logits, torch.tensor([[2, 2]]), 0.2)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_falls_are_shares_of_the_clean_quality():
    """Zero where every picture has the clean one's quality times its pseudo-MOS, above otherwise;
    a picture of confidence 0 counts nothing, and the clean picture's logit gets no gradient.
    """
    clean = torch.tensor([[0.8], [0.5]])
    share = torch.tensor([[1.0, 0.75, 0.25], [1.0, 0.5, 0.1]])
    logits = torch.logit(clean * share).requires_grad_()
    trust = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    assert abs(falls_loss(logits, share, trust).item()) < 1e-6
    ignored = share.clone()
    ignored[1, 2] = 0.9
    assert abs(falls_loss(logits, ignored, trust).item()) < 1e-6
    wrong = share.clone()
    wrong[0, 1] = 0.5
    loss = falls_loss(logits, wrong, trust)
    # one of three pictures that count should have 0.4 and has 0.6
    expected = (0.4 * np.log(0.4 / 0.6) + 0.6 * np.log(0.6 / 0.4)) / 3
    assert abs(loss.item() - expected) < 1e-5
    loss.backward()
    assert (logits.grad[:, 0] == 0).all()
    assert logits.grad[0, 1] > 0
