"""The losses of distillation: zero at equality, blind to what they say, and safe at the edges."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from distill.distilling import (  # noqa: E402
    DepthGuidedGate,
    FeatureAdapter,
    VectorAdapter,
    attention_loss,
    attention_target,
    cross_attention_weights,
    fused_loss,
    pooled_loss,
    ranking_loss,
    relation_distance_loss,
    relation_similarity_loss,
    teacher_score_loss,
)

B = 8


def drawn(*shape, seed=0, **kwargs):
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def log_maps(logits):
    """(B, 7, 7) logits as the logarithm of a distribution."""
    return logits.flatten(1).log_softmax(1).view_as(logits)


def standardised(a, t, w=None):
    """The other kind of pooled loss."""
    return pooled_loss(a, t, w, kind="standardised")


def bradley_terry(z, y, w=None):
    """The other kind of ranking loss."""
    return ranking_loss(z, y, w, kind="bradley_terry")


# name: the loss, a student's side from numbers (B, 7, 7), a teacher's side from the same numbers
LOSSES = {
    "score": (
        teacher_score_loss,
        lambda x: x[:, 0, 0],
        lambda x: torch.sigmoid(x[:, 0, 0]),
    ),
    "fused": (fused_loss, lambda x: x[:, :, :, None], lambda x: x[:, :, :, None]),
    "cosine": (pooled_loss, lambda x: x[:, 0], lambda x: x[:, 0]),
    "standardised": (standardised, lambda x: x[:, 0], lambda x: x[:, 0]),
    "distance": (relation_distance_loss, lambda x: x[:, 0], lambda x: x[:, 0]),
    "similarity": (relation_similarity_loss, lambda x: x[:, 0], lambda x: x[:, 0]),
    "fidelity": (ranking_loss, lambda x: x[:, 0, 0], lambda x: x[:, 0, 0] * 0.25),
    "bradley_terry": (bradley_terry, lambda x: x[:, 0, 0], lambda x: x[:, 0, 0] * 0.25),
    "attention": (attention_loss, log_maps, lambda x: log_maps(x).exp()),
}
every = pytest.mark.parametrize("name", LOSSES)


@every
def test_zero_where_student_and_teacher_agree(name):
    """Equal sides give 0 within float32's rounding, and other sides clearly more."""
    loss, student, teacher = LOSSES[name]
    x, other = drawn(B, 7, 7), drawn(B, 7, 7, seed=1)
    assert abs(loss(student(x), teacher(x)).item()) < 2e-6
    assert loss(student(other), teacher(x)) > 1e-3


@every
def test_masked_pictures_count_nothing(name):
    """With weight 0 a picture changes neither loss nor gradient, even where its teacher is NaN."""
    loss, student, teacher = LOSSES[name]
    x, other = drawn(B, 7, 7, seed=1).requires_grad_(), drawn(B, 7, 7)
    target = teacher(other).clone()
    target[5:] = math.nan
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    masked = loss(student(x), target, weights)
    alone = loss(student(x)[:5], target[:5], weights[:5])
    torch.testing.assert_close(masked, alone)
    masked.backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad[5:].eq(0).all()
    assert x.grad[:5].abs().sum() > 0


@every
def test_weights_are_relative(name):
    """Equal weights of any size give the unweighted loss."""
    loss, student, teacher = LOSSES[name]
    x, other = drawn(B, 7, 7, seed=1), drawn(B, 7, 7)
    plain = loss(student(x), teacher(other))
    torch.testing.assert_close(loss(student(x), teacher(other), torch.full((B,), 0.3)), plain)


@every
def test_without_any_weight_the_loss_is_zero(name):
    """A batch that is masked altogether has loss 0 and a gradient of 0, not NaN."""
    loss, student, teacher = LOSSES[name]
    x = drawn(B, 7, 7).requires_grad_()
    found = loss(student(x), teacher(drawn(B, 7, 7, seed=1)), torch.zeros(B))
    assert found == 0
    found.backward()
    assert x.grad is None or x.grad.eq(0).all()


@every
@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("num", [1, B])
def test_constant_batches_are_finite(name, value, num):
    """A batch of one value everywhere, or of one picture, has a finite loss and gradient."""
    loss, student, teacher = LOSSES[name]
    x = torch.full((num, 7, 7), value, requires_grad=True)
    found = loss(student(x), teacher(torch.full((num, 7, 7), 0.7)))
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(x.grad).all()


@every
def test_the_teacher_receives_no_gradient(name):
    """Only the student's side is learned from."""
    loss, student, teacher = LOSSES[name]
    x, other = drawn(B, 7, 7).requires_grad_(), drawn(B, 7, 7, seed=1).requires_grad_()
    loss(student(x), teacher(other)).backward()
    assert other.grad is None
    assert x.grad.abs().sum() > 0


@every
def test_a_step_downhill_comes_closer(name):
    """Fifty steps of Adam at least halve the loss: its gradient points to the teacher."""
    loss, student, teacher = LOSSES[name]
    x, target = drawn(B, 7, 7).requires_grad_(), teacher(drawn(B, 7, 7, seed=1))
    before = loss(student(x), target).item()
    optimiser = torch.optim.Adam([x], 0.05)
    for _ in range(50):
        optimiser.zero_grad()
        loss(student(x), target).backward()
        optimiser.step()
    assert loss(student(x), target) < before / 2


def test_score_loss_is_the_divergence_of_two_bernoullis():
    """KL(0.8 || 0.5) = 0.8 ln 1.6 + 0.2 ln 0.4, and labels of 0 and 1 are allowed."""
    expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert teacher_score_loss(torch.zeros(1), torch.tensor([0.8])).item() == pytest.approx(expected)
    ends = teacher_score_loss(torch.tensor([40.0, -40.0]), torch.tensor([1.0, 0.0]))
    assert ends.item() == pytest.approx(0, abs=1e-6)


def test_the_adapter_meets_the_teachers_shape():
    """12 channels of 14x14 become 20 of 7x7: the mean of four positions through the 1x1."""
    adapter, x = FeatureAdapter(12, 20), drawn(2, 12, 14, 14)
    with torch.no_grad():
        found = adapter(x, size=(7, 7))
        mean = x[1, :, 2:4, 4:6].mean((1, 2))
        expected = adapter.project.weight[:, :, 0, 0] @ mean + adapter.project.bias
    assert found.shape == (2, 20, 7, 7)
    torch.testing.assert_close(found[1, :, 1, 2], expected)
    assert VectorAdapter(12, 20)(x[:, :, 0, 0]).shape == (2, 20)


def test_fused_loss_does_not_know_the_teachers_scale():
    """Scaling both maps by 50 changes nothing; predicting zero costs exactly 1."""
    a, t = drawn(B, 4, 7, 7), drawn(B, 4, 7, 7, seed=1)
    torch.testing.assert_close(fused_loss(50 * a, 50 * t), fused_loss(a, t))
    assert fused_loss(torch.zeros_like(t), t).item() == pytest.approx(1)


def test_cosine_does_not_know_lengths():
    """A factor for each picture on either side changes nothing; opposite vectors cost 2."""
    a, t = drawn(B, 5), drawn(B, 5, seed=1)
    factor = 0.1 + drawn(B, 1, seed=2).abs()
    torch.testing.assert_close(pooled_loss(factor * a, t / factor), pooled_loss(a, t))
    assert pooled_loss(-t, t).item() == pytest.approx(2)


def test_standardised_is_twice_one_minus_plcc():
    """Against numpy's correlation of each dimension; shift and scale of a dimension do nothing."""
    a, t = drawn(B, 3), drawn(B, 3, seed=1)
    plcc = [torch.corrcoef(torch.stack([a[:, k], t[:, k]]))[0, 1] for k in range(3)]
    expected = torch.stack([2 - 2 * r for r in plcc]).mean()
    torch.testing.assert_close(standardised(a, t), expected)
    torch.testing.assert_close(standardised(a * torch.tensor([9.0, 0.1, 1.0]) + 3, t), expected)


def rotation(width, seed):
    """A random orthogonal matrix."""
    return torch.linalg.qr(drawn(width, width, seed=seed))[0]


def test_relations_do_not_know_the_axes():
    """Rotation and scale of either side change neither relation loss, a shift only the similarity;
    widths may differ.
    """
    s, t = drawn(B, 6), drawn(B, 9, seed=1)
    turned = 3 * s @ rotation(6, 2), 0.2 * t @ rotation(9, 3)
    for loss in (relation_distance_loss, relation_similarity_loss):
        torch.testing.assert_close(loss(*turned), loss(s, t))
        assert loss(3 * s @ rotation(6, 2), s).item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(relation_distance_loss(s + 5, t), relation_distance_loss(s, t))
    assert (relation_similarity_loss(s + 5, t) - relation_similarity_loss(s, t)).abs() > 1e-3


def test_distances_of_a_known_triangle():
    """Sides 3, 4, 5 against an equilateral triangle: Huber of 3/4, 1 and 5/4 against 1."""
    right = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    equal = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    expected = (0.5 * 0.25**2 * 2) / 3
    assert relation_distance_loss(right, equal).item() == pytest.approx(expected, rel=1e-5)


def test_similarity_is_the_papers():
    """For equal weights it is |G_S - G_T|_F^2 / B^2 of row-normalised Gram matrices."""
    s, t = drawn(B, 6), drawn(B, 9, seed=1)
    gs, gt = F.normalize(s @ s.T, dim=1), F.normalize(t @ t.T, dim=1)
    torch.testing.assert_close(relation_similarity_loss(s, t), ((gs - gt) ** 2).sum() / B**2)


@pytest.mark.parametrize("kind", ["fidelity", "bradley_terry"])
def test_ranking_does_not_know_the_zero_of_logits(kind):
    """A constant added to all logits changes nothing; a wrong order costs more than a tie, a tie
    more than the right order.
    """
    y = torch.tensor([0.2, 0.5, 0.9])
    z = torch.tensor([-1.0, 0.3, 1.5])
    torch.testing.assert_close(ranking_loss(z + 7, y, kind=kind), ranking_loss(z, y, kind=kind))
    tie, wrong = ranking_loss(0 * z, y, kind=kind), ranking_loss(-z, y, kind=kind)
    assert ranking_loss(z, y, kind=kind) < tie < wrong


def test_ranking_of_one_known_pair():
    """At scale 0.25, qualities 0.5 apart want p = sigmoid(2); equal logits give q = 1/2."""
    y, z = torch.tensor([0.75, 0.25]), torch.zeros(2)
    p = 1 / (1 + math.exp(-2))
    fidelity = 1 - (p / 2) ** 0.5 - ((1 - p) / 2) ** 0.5
    kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert ranking_loss(z, y).item() == pytest.approx(fidelity, rel=1e-5)
    assert bradley_terry(z, y).item() == pytest.approx(kl, rel=1e-5)


def test_pairs_within_the_dead_zone_or_one_content_count_nothing():
    """Qualities 0.04 apart are no pair at a dead zone of 0.05, nor are pictures of one content."""
    z = torch.tensor([3.0, 0.0])
    assert ranking_loss(z, torch.tensor([0.50, 0.54])) == 0
    apart = torch.tensor([0.1, 0.9])
    assert ranking_loss(z, apart) > 0.1
    assert ranking_loss(z, apart, contents=torch.tensor([4, 4])) == 0
    assert ranking_loss(z, apart, contents=torch.tensor([4, 5])) == ranking_loss(z, apart)


def test_a_hopeless_pair_still_has_a_gradient():
    """100 logits the wrong way round, both losses stay finite, and Bradley-Terry pulls fully."""
    for kind in ("fidelity", "bradley_terry"):
        z = torch.tensor([-50.0, 50.0], requires_grad=True)
        ranking_loss(z, torch.tensor([1.0, 0.0]), kind=kind).backward()
        assert torch.isfinite(z.grad).all()
    assert z.grad[0] < -0.9


@pytest.mark.parametrize("loss", [pooled_loss, ranking_loss])
def test_an_unknown_kind_is_named(loss):
    """A misspelt kind is an error that lists the known ones."""
    with pytest.raises(ValueError, match="'cosin': known are"):
        loss(torch.zeros(2), torch.zeros(2), kind="cosin")


def test_the_attention_target_is_what_each_position_is_read():
    """If every depth token reads position 10 alone, the map is 1 there; half the heads reading
    position 11 share it equally; the sum is 1.
    """
    attention = torch.zeros(2, 4, 49, 49)
    attention[0, :, :, 10] = 1
    attention[1, :2, :, 10] = 1
    attention[1, 2:, :, 11] = 1
    found = attention_target(attention)
    assert found.shape == (2, 7, 7)
    assert found[0, 1, 3] == 1
    assert (found[1, 1, 3], found[1, 1, 4]) == (0.5, 0.5)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2))


def test_the_attention_target_of_a_real_attention():
    """From torch's own cross-attention, it is the mean over heads and queries."""
    torch.manual_seed(1)
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    _, weights = layer(
        drawn(3, 49, 32), *[drawn(3, 49, 32, seed=1)] * 2, average_attn_weights=False
    )
    found = attention_target(weights)
    torch.testing.assert_close(found.flatten(1), weights.mean((1, 2)), atol=1e-6, rtol=1e-4)
    assert not found.requires_grad


def test_the_teachers_own_attention_is_heard():
    """The weights recomputed from a passing call give that call's answer, in a real teacher."""
    pytest.importorskip("timm")
    from distill.models.teacher import Dgiqa, TeacherSpec

    torch.manual_seed(1)
    spec = TeacherSpec("mobilenetv2", (8, 8, 8, 8), num_heads=4, pooled_channels=16)
    model = Dgiqa(spec).eval()
    picture, depth = drawn(2, 3, 224, 224), drawn(2, 3, 224, 224, seed=1)
    attention = model.depth_guided_cross_attention.multihead_attn
    heard = []
    hook = attention.register_forward_hook(lambda _, inputs, out: heard.append((inputs, out[0])))
    weights = cross_attention_weights(attention, lambda: model(picture, depth))
    hook.remove()
    assert weights.shape == (2, 4, 49, 49)
    (_, _, value), answer = heard[0]
    with torch.no_grad():
        in_value, bias = attention.in_proj_weight[64:], attention.in_proj_bias[64:]
        values = F.linear(value, in_value, bias).view(2, 49, 4, 8).transpose(1, 2)
        mine = attention.out_proj((weights @ values).transpose(1, 2).reshape(2, 49, 32))
    torch.testing.assert_close(mine, answer, atol=1e-5, rtol=1e-4)
    assert attention_target(weights).shape == (2, 7, 7)
    with pytest.raises(ValueError, match="0 times"):
        cross_attention_weights(attention, lambda: None)


def test_what_is_no_attention_is_refused():
    """Logits before the softmax, 48 tokens and a missing axis of heads are refused."""
    with pytest.raises(ValueError, match="sum to 1"):
        attention_target(torch.zeros(1, 2, 49, 49))
    with pytest.raises(ValueError, match=r"\(1, 2, 48, 48\)"):
        attention_target(torch.full((1, 2, 48, 48), 1 / 48))
    with pytest.raises(ValueError, match="heads"):
        attention_target(torch.full((2, 49, 49), 1 / 49))


def test_the_gate_is_a_distribution_and_pools_under_it():
    """The map sums to 1; a gate that sees one position alone pools that position's features."""
    gate = DepthGuidedGate(3)
    features = drawn(2, 3, 14, 14)
    found = gate(features)
    torch.testing.assert_close(found.log_map.exp().sum((1, 2)), torch.ones(2))
    spike = torch.zeros(1, 3, 7, 7)
    spike[0, :, 2, 5] = torch.tensor([100.0, 7.0, -3.0])
    with torch.no_grad():
        gate.look.weight.copy_(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1))
        pooled = gate(spike).pooled
    torch.testing.assert_close(pooled, torch.tensor([[100.0, 7.0, -3.0]]))


def test_a_student_learns_where_the_teacher_looks():
    """A gate whose features hold a cue for the target finds it: the divergence falls tenfold."""
    torch.manual_seed(3)
    cue = drawn(16, 1, 7, 7)
    target = log_maps(2 * cue[:, 0]).exp()
    features = torch.cat([drawn(16, 5, 7, 7, seed=4), cue], 1)
    gate = DepthGuidedGate(6)
    optimiser = torch.optim.Adam(gate.parameters(), 0.1)
    before = attention_loss(gate(features).log_map, target).item()
    for _ in range(100):
        optimiser.zero_grad()
        attention_loss(gate(features).log_map, target).backward()
        optimiser.step()
    assert attention_loss(gate(features).log_map, target) < before / 10
