"""The objective: what a recipe asks for and nothing else, from whatever a batch knows."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest

torch = pytest.importorskip("torch")

from dgiqa_stream.errors import ConfigError  # noqa: E402
from distill.data.batches import BatchMaker  # noqa: E402
from distill.data.training_data import open_packs, open_shards  # noqa: E402
from distill.models.student import Student  # noqa: E402
from distill.objective import Objective, teacher_weights  # noqa: E402
from distill.recipe import TEACHER_LOSSES, LossConfig  # noqa: E402

ALWAYS = {"score", "plcc", "ladder"}
OTHERS = (
    *TEACHER_LOSSES, "rank_mos", "rank_pseudo_mos", "pseudo_mos", "gated_score", "insensitivity",
    "contrast",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(shards, labels):
    """Shards with a teacher's labels."""
    return open_shards(shards, labels)


@pytest.fixture(scope="module")
def batch(data, taught_recipe):
    """The first batch, as tensors; its untrained teacher's scores are spread over the scale."""
    made = BatchMaker(data, taught_recipe)(0).mapped(torch.from_numpy)
    count, num_crops = made.teacher.crop_scores.shape
    spread = torch.linspace(0.2, 0.9, count)[torch.randperm(count)]
    crop_scores = spread[:, None] + torch.linspace(-0.05, 0.05, num_crops)
    return made.with_teacher(dataclasses.replace(made.teacher, crop_scores=crop_scores))


@pytest.fixture(scope="module")
def student():
    """Random weights, no dropout."""
    torch.manual_seed(4)
    return Student()


@pytest.fixture(scope="module")
def told(student, batch):
    """What the student says of the batch."""
    with torch.no_grad():
        return student.describe(batch.views["whole"], batch.views["fragments"])


def only(recipe, **weights):
    """The recipe with these losses alone."""
    return msgspec.structs.replace(
        recipe, losses=LossConfig(confidence_temperature=0.05, **weights)
    )


@pytest.mark.parametrize("name", OTHERS)
def test_a_loss_is_there_by_its_weight(name, data, batch, student, told, taught_recipe):
    """Asked for alone, a loss is the only one beside MOS and ladders; it is finite, not zero for an
    untrained student, and twice as large at twice the weight.
    """
    made = []
    for weight in (0.5, 1.0):
        objective = Objective(only(taught_recipe, **{name: weight}), data)
        torch.manual_seed(1)
        parts = objective(told, batch, student.head)
        assert set(parts) == ALWAYS | {name}
        made.append(parts[name].item())
    assert math.isfinite(made[0])
    assert made[0] > 0
    assert made[1] == pytest.approx(2 * made[0], rel=1e-5)


def test_without_the_table_there_are_no_adapters(data, recipe):
    """A recipe without [losses] trains nothing beside the student, and draws no random number."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert list(Objective(recipe, data).parameters()) == []
    assert torch.equal(torch.random.get_rng_state(), before)


def test_adapters_draw_nothing_from_the_student(data, taught_recipe):
    """Making all adapters leaves torch's generator where it was: the student is the same."""
    before = torch.random.get_rng_state()
    assert len(list(Objective(taught_recipe, data).parameters())) > 8
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_adapter_learns(data, batch, student, taught_recipe):
    """One backward pass gives every training-only parameter and every tensor of the student a
    gradient that is not zero.
    """
    objective = Objective(taught_recipe, data)
    fresh = Student()
    fresh.load_state_dict(student.state_dict())
    told = fresh.describe(batch.views["whole"], batch.views["fragments"])
    sum(objective(told, batch, fresh.head).values()).backward()
    moved = [*objective.named_parameters(), *fresh.named_parameters()]
    # an untrained ReLU may be dead and a softmax is blind to a constant: those two are excused
    still = [n for n, p in moved if p.grad is None or p.grad.abs().max() == 0]
    assert set(still) <= {"gate.look.bias", "semantic.gate.squeeze.bias"}


def test_unlabelled_pictures_teach_nothing(data, batch, student, told, taught_recipe):
    """Where no picture has a label of the teacher every loss of it is 0, not NaN."""
    blank = batch.with_teacher(batch.teacher.mapped(lambda t: torch.full_like(t, torch.nan)))
    parts = Objective(taught_recipe, data)(told, blank, student.head)
    assert all(parts[name].item() == 0 for name in TEACHER_LOSSES)


def test_a_batch_without_ratings_has_no_loss_to_mos(data, batch, student, told, taught_recipe):
    """Blank MOS gives 0 for the score, its correlation and its order, and the rest stays finite."""
    blank = dataclasses.replace(batch, mos=torch.full_like(batch.mos, torch.nan))
    parts = Objective(taught_recipe, data)(told, blank, student.head)
    assert all(parts[name].item() == 0 for name in ("score", "plcc", "rank_mos"))
    assert all(math.isfinite(part.item()) for part in parts.values())


def test_pictures_count_by_how_far_crops_agree(batch):
    """The weight is exp(-variance over crops / temperature), the target their mean; a picture
    without a label has weight 0.
    """
    crops = torch.tensor([[0.4, 0.6], [0.5, 0.5], [math.nan, math.nan]])
    teacher = dataclasses.replace(batch.teacher, crop_scores=crops)
    weights, scores = teacher_weights(teacher, 0.02)
    assert weights.tolist() == pytest.approx([math.exp(-0.01 / 0.02), 1.0, 0.0])
    assert scores[:2].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("name", TEACHER_LOSSES)
def test_a_teachers_loss_needs_labels(name, shards, recipe):
    """Without labels each loss of the teacher is refused by name, with what makes labels."""
    with pytest.raises(ConfigError, match=f"loss {name} needs.*dgiqa-distill label"):
        Objective(only(recipe, **{name: 1.0}), open_shards(shards))


@pytest.mark.parametrize("name", ["pseudo_mos", "rank_pseudo_mos"])
def test_pseudo_mos_needs_shards_with_it(name, packs, recipe):
    """Packs have no pseudo-MOS, and a recipe that asks for it is told so."""
    with pytest.raises(ConfigError, match=f"loss {name} needs pseudo-MOS"):
        Objective(only(recipe, **{name: 1.0}), open_packs(packs))
