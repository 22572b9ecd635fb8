"""Training against semantic noise: which pairs match, what the noise is, and what it teaches."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from distill.models.qfm import (  # noqa: E402
    NO_PARTNER,
    ChannelGate,
    PseudoLabels,
    QfmRegulariser,
    contrast_loss,
    expand,
    insensitivity_loss,
    match_pairs,
    pseudo_labels,
    semantic_noise,
    sensitivity,
)


def test_the_known_partners_are_found():
    """Of pictures of similar quality the most different one matches; a lone quality has none."""
    semantics = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.1], [-0.1, 1.0], [-1.0, 0.0]])
    quality = torch.tensor([0.50, 0.52, 0.53, 0.51, 0.90])
    # picture 4 is the most different from 0, but its quality is not similar
    assert match_pairs(semantics, quality, tolerance=0.05).tolist() == [2, 2, 0, 0, NO_PARTNER]


def test_matching_does_not_depend_on_the_length_of_vectors():
    """Scaling each picture's semantics by its own positive factor changes no partner."""
    generator = torch.Generator().manual_seed(1)
    semantics, quality = torch.randn(20, 8, generator=generator), torch.rand(20)
    factor = 0.1 + torch.rand(20, 1, generator=generator)
    found = match_pairs(semantics, quality, tolerance=0.2)
    assert torch.equal(found, match_pairs(semantics * factor, quality, tolerance=0.2))


def test_noise_is_as_long_as_the_features_and_leads_to_the_partner():
    """For f = (3, 4) and a partner (3, 9) the noise is (0, 5); without a partner it is zero."""
    features = torch.tensor([[3.0, 4.0], [3.0, 9.0], [7.0, 7.0]])
    noise = semantic_noise(features, torch.tensor([1, NO_PARTNER, NO_PARTNER]))
    torch.testing.assert_close(noise, torch.tensor([[0.0, 5.0], [0.0, 0.0], [0.0, 0.0]]))


def test_equal_features_give_no_noise():
    """A partner with the very same features leads nowhere, and nothing becomes NaN."""
    assert semantic_noise(torch.ones(2, 4), torch.tensor([1, 0])).eq(0).all()


def test_insensitive_features_have_no_loss():
    """A head that reads only channels without noise has insensitivity loss 0; the mean is over the
    pictures with a partner alone.
    """
    features = torch.tensor([[1.0, 2.0], [1.0, -2.0]])  # they differ in the second channel
    matched = torch.tensor([True, True])
    noisy = features + semantic_noise(features, torch.tensor([1, 0]))
    assert insensitivity_loss(features[:, 0], noisy[:, 0], matched) == 0
    assert insensitivity_loss(features[:, 1], noisy[:, 1], matched) > 1
    clean, moved = torch.tensor([0.0, 5.0]), torch.tensor([0.5, 9.0])
    assert insensitivity_loss(clean, moved, torch.tensor([True, False])) == 0.5
    assert insensitivity_loss(clean, moved, torch.tensor([False, False])) == 0


def test_contrast_of_four_known_pictures():
    """Pull is 1 - cos of the quality-equal unlike pair, push the cos of the look-alike pair."""
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    alike, unlike = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2)
    same, different = torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.9])
    assert contrast_loss(features, unlike, same).item() == pytest.approx(0.4)  # 1 - 0.6
    assert contrast_loss(features, alike, different).item() == pytest.approx(0.6)
    assert contrast_loss(features, alike, different, margin=0.5).item() == pytest.approx(0.1)
    assert contrast_loss(features, alike, same) == 0  # alike in both: nothing to learn
    assert contrast_loss(features, unlike, different) == 0


def test_a_gate_is_between_zero_and_one_and_depends_on_the_picture():
    """Two pictures get two gates, every channel strictly within 0..1."""
    torch.manual_seed(1)
    gate = ChannelGate(16)(torch.randn(2, 16))
    assert ((gate > 0) & (gate < 1)).all()
    assert not torch.equal(gate[0], gate[1])


def test_no_gradient_reaches_the_semantics():
    """The losses move features and gate, never the features that were matched by."""
    torch.manual_seed(2)
    semantics = torch.randn(8, 6, requires_grad=True)
    features = torch.randn(8, 12, requires_grad=True)
    regulariser, head = QfmRegulariser(12, tolerance=0.5), torch.nn.Linear(12, 1)
    found = regulariser(features, torch.rand(8), lambda f: head(f).squeeze(1), semantics=semantics)
    assert found.num_matched > 0
    (found.insensitivity + found.contrast).backward()
    assert semantics.grad is None
    assert features.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in regulariser.parameters())


def test_the_noise_is_a_constant():
    """For a head that adds the channels up, the gradient of the loss with respect to features is
    zero without a gate: noise moves clean and noisy alike, and is itself not learned from.
    """
    features = torch.randn(4, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    noisy = features + semantic_noise(features, torch.tensor([1, 0, 3, 2]))
    insensitivity_loss(features.sum(1), noisy.sum(1), torch.ones(4, dtype=torch.bool)).backward()
    assert features.grad.abs().max() < 1e-6


def test_without_partners_nothing_is_regularised():
    """In a batch of distinct qualities there is no match, and the insensitivity loss is zero."""
    torch.manual_seed(4)
    regulariser, head = QfmRegulariser(6), torch.nn.Linear(6, 1)
    found = regulariser(torch.randn(5, 6), torch.arange(5) / 4, lambda f: head(f).squeeze(1))
    assert found.num_matched == 0
    assert found.insensitivity == 0


def test_without_a_gate_the_head_is_what_is_deployed():
    """Ungated, the logits are the head's own of the features, nothing is learnt beside the head,
    and noise still moves the predictions.
    """
    torch.manual_seed(6)
    features, head = torch.randn(8, 12), torch.nn.Linear(12, 1)
    regulariser = QfmRegulariser(12, tolerance=0.5, gated=False)
    found = regulariser(features, torch.rand(8), lambda f: head(f).squeeze(1))
    torch.testing.assert_close(found.logits, head(features).squeeze(1))
    assert list(regulariser.parameters()) == []
    assert found.insensitivity > 0


def test_settings_that_cannot_be_are_refused():
    """A tolerance of 0 would match nobody."""
    with pytest.raises(ValueError, match="tolerance 0"):
        QfmRegulariser(4, tolerance=0)


def test_weights_follow_the_variance_of_crops():
    """Crops that agree weigh 1; of scores 0.4 and 0.6 (variance 0.01) at temperature 0.02 the
    weight is exp(-1/2); the target is the mean.
    """
    found = pseudo_labels(torch.tensor([[0.3, 0.3], [0.4, 0.6]]), temperature=0.02)
    torch.testing.assert_close(found.quality, torch.tensor([0.3, 0.5]))
    torch.testing.assert_close(found.weights, torch.tensor([1.0, math.exp(-0.5)]))
    assert pseudo_labels(torch.tensor([[0.7]])).weights == 1


@pytest.mark.parametrize("scores", [[[0.2, 1.2]], [[0.2, math.nan]], [0.2, 0.3]])
def test_pseudo_labels_refuse_what_are_no_scores(scores):
    """Scores outside 0..1, NaN and a list without crops are refused."""
    with pytest.raises(ValueError, match="within 0"):
        pseudo_labels(torch.tensor(scores))


def test_human_labels_come_first_and_weigh_one():
    """Two human and one pseudo label make three targets, the human ones at weight 1."""
    found = expand(torch.tensor([0.1, 0.2]), PseudoLabels(torch.tensor([0.9]), torch.tensor([0.5])))
    torch.testing.assert_close(found.quality, torch.tensor([0.1, 0.2, 0.9]))
    torch.testing.assert_close(found.weights, torch.tensor([1.0, 1.0, 0.5]))


def few_pictures(num, *, seed):
    """Quality in four noisy channels beside sixty of semantics, which say nothing of quality."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    quality = torch.rand(num, generator=generator)
    semantics = normal(num, 60)
    return torch.cat([quality[:, None] - 0.5 + 0.2 * normal(num, 4), semantics], 1), quality


def fit(weight):
    """A gated head after 150 steps on 64 pictures with the insensitivity loss at this weight."""
    torch.manual_seed(0)
    features, quality = few_pictures(64, seed=1)
    regulariser, layer = QfmRegulariser(64, tolerance=0.1), torch.nn.Linear(64, 1)
    parameters = [*regulariser.parameters(), *layer.parameters()]
    optimiser = torch.optim.Adam(parameters, 0.02)
    for _ in range(150):
        found = regulariser(
            features, quality, lambda f: layer(f).squeeze(1), semantics=features[:, 4:]
        )
        loss = (torch.sigmoid(found.logits) - quality).square().mean()
        optimiser.zero_grad()
        (loss + weight * found.insensitivity).backward()
        optimiser.step()
    return lambda f: torch.sigmoid(layer(regulariser.gate(f) * f).squeeze(1))


def test_training_makes_predictions_insensitive():
    """Where few pictures invite to learn semantics by heart, the loss makes noise move predictions
    for new pictures by less than three quarters of what it moves them without (as a share of their
    spread), and they follow quality more closely.
    """
    features, quality = few_pictures(400, seed=2)
    moved, followed = {}, {}
    for weight in (0.0, 0.5):
        predict = fit(weight)
        moved[weight] = sensitivity(
            features, quality, predict, semantics=features[:, 4:], tolerance=0.1
        )
        with torch.no_grad():
            both = torch.stack([predict(features), quality])
        followed[weight] = torch.corrcoef(both)[0, 1]
    assert moved[0.5] < 0.75 * moved[0.0]
    assert followed[0.5] > followed[0.0] + 0.2


def test_sensitivity_of_a_known_function():
    """A sum over channels moves by the noise's sum; equal predictions have no spread, so NaN."""
    features = torch.tensor([[3.0, 4.0], [3.0, -4.0]])
    quality = torch.tensor([0.5, 0.5])
    # noise (0, -5) and (0, 5), at a quarter; predictions 7 and -1 have a spread of 4
    found = sensitivity(features, quality, lambda f: f.sum(1), noise=0.25)
    assert found == pytest.approx(1.25 / 4)
    assert math.isnan(sensitivity(features, quality, lambda f: f[:, 0] * 0))
    assert math.isnan(sensitivity(features, torch.tensor([0.1, 0.9]), lambda f: f.sum(1)))
