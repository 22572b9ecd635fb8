"""Training batches: decided by seed and step, fair to every picture, one look for a ladder."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from dgiqa_stream.preprocess import make_batch
from distill.data.batches import BatchMaker
from distill.data.loader import LadderDraws, random_look, read_ahead, views_of
from distill.data.packed import Pack, Record, as_planes_420, write_pack
from distill.data.training_data import TrainingData

NUM_RATED = 22


@pytest.fixture(scope="module")
def rated(tmp_path_factory, make_picture):
    """22 pictures for training, 3 for validation; MOS tells them apart."""
    folder = tmp_path_factory.mktemp("rated")
    splits = ["train"] * NUM_RATED + ["validation"] * 3
    pictures = [
        (Record(f"{i}", f"{i}", split, mos=i / 100), as_planes_420(make_picture(i)))
        for i, split in enumerate(splits)
    ]
    write_pack(folder, pictures, made_by="test", settings={})
    return Pack(folder)


@dataclass(frozen=True)
class Part:
    """Some pictures of every batch: views as they stand, MOS and levels by group."""

    maker: BatchMaker
    pack: Pack
    chosen: str

    def __call__(self, step):
        """The part of a batch."""
        batch = self.maker(step)
        on_ladder = batch.ladders >= 0
        kept = on_ladder if self.chosen == "ladders" else ~on_ladder
        levels = batch.levels[on_ladder].reshape(batch.num_ladders, -1)
        views = {name: view[kept] for name, view in batch.views.items()}
        return SimpleNamespace(views=views, mos=batch.mos[kept], levels=levels)

    def steps_per_epoch(self):
        """Of the rated pictures."""
        return self.maker.per_epoch()


@pytest.fixture
def maker(recipe):
    """``maker(rated, ladders, ...)``: whole batches of two packs."""

    def make(rated, ladders, *, seed=1, smallest_crop=0.8, groups=2, levels=4, batch=5):
        train = msgspec.structs.replace(
            recipe.train,
            seed=seed,
            smallest_crop=smallest_crop,
            rated_batch=batch,
            ladder_groups=groups,
            ladder_levels=levels,
        )
        return BatchMaker(
            TrainingData(rated, ladders), msgspec.structs.replace(recipe, train=train)
        )

    return make


@pytest.fixture
def rated_loader(rated, packs, maker):
    """Batches of five."""

    def make(seed=1, **options):
        return Part(maker(rated, Pack(packs / "ladders"), seed=seed, **options), rated, "rated")

    return make


class Watched(Pack):
    """A pack that notes which pictures were read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.read = []

    def planes(self, record):
        """Note and read."""
        self.read.append(record)
        return super().planes(record)


@pytest.fixture
def ladder_loader(packs, rated, maker):
    """Groups of four levels of the test packs' ladders."""

    def make(seed=1, groups=2, levels=4, folder=None):
        pack = Watched(folder or packs / "ladders")
        made = maker(rated, pack, seed=seed, smallest_crop=0.5, groups=groups, levels=levels)
        return Part(made, pack, "ladders")

    return make


def same(a, b):
    """Whether two sets of views are equal bit for bit."""
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_rated_batch_is_its_step(rated_loader):
    """Batch 7 is the same from a new loader, and after other steps in another order."""
    fresh = rated_loader()(7)
    used = rated_loader()
    for step in (9, 3, 7, 0):
        batch = used(step)
        if step == 7:
            assert same(batch.views, fresh.views)
            np.testing.assert_array_equal(batch.mos, fresh.mos)


def test_a_ladder_batch_is_its_step(ladder_loader):
    """The ladders of step 7 do not depend on which steps were made before."""
    fresh = ladder_loader()(7)
    used = ladder_loader()
    for step in (9, 3, 7, 0):
        batch = used(step)
        if step == 7:
            assert same(batch.views, fresh.views)
            np.testing.assert_array_equal(batch.levels, fresh.levels)


def test_steps_and_seeds_differ(rated_loader, ladder_loader):
    """Another step or another seed gives other views."""
    for make in (rated_loader, ladder_loader):
        views = [make(1)(0).views, make(1)(1).views, make(2)(0).views]
        assert not any(same(a, b) for a, b in pairwise([*views, views[0]]))


def test_an_epoch_takes_each_picture_at_most_once(rated_loader):
    """Four batches of five from 22 pictures name 20 different ones, in every epoch another 20."""
    loader = rated_loader()
    assert loader.steps_per_epoch() == 4
    epochs = [
        Counter(float(m) for step in range(4) for m in loader(4 * epoch + step).mos)
        for epoch in range(6)
    ]
    assert all(len(seen) == 20 and max(seen.values()) == 1 for seen in epochs)
    assert len(set().union(*epochs)) == NUM_RATED


def test_only_training_pictures_are_taken(rated_loader):
    """No validation picture is in any batch."""
    loader = rated_loader()
    taken = {round(100 * float(m)) for step in range(24) for m in loader(step).mos}
    assert taken == set(range(NUM_RATED))


def test_mos_belongs_to_its_views(rated, rated_loader, small_views):
    """With whole crops, each picture of a batch is the one whose MOS stands beside it."""
    loader = rated_loader(batch=4, smallest_crop=1.0)
    served = make_batch([rated.planes(r) for r in rated.records], small_views).views["whole"]
    batch = loader(0)
    for view, mos in zip(batch.views["whole"], batch.mos, strict=True):
        plain = served[round(100 * float(mos))]
        assert np.array_equal(view, plain) or np.array_equal(view, plain[:, ::-1])


def test_views_without_a_look_are_those_of_serving(rated, small_views):
    """Validation sees exactly what the runtime cuts."""
    planes = rated.planes(rated.records[0])
    served = make_batch([planes], small_views).views
    assert same({name: v[0] for name, v in served.items()}, views_of(planes, small_views, None))


def test_about_half_the_looks_are_mirrored_and_none_leaves_the_picture(small_views):
    """Crops keep their smallest share and stay inside; mirroring is a fair coin (4 sigma)."""
    rng = np.random.default_rng(1)
    looks = [random_look(rng, 0.7, small_views[1]) for _ in range(1000)]
    shares = np.array([look.crop_share for look in looks])
    assert shares[:, 2:].min() >= 0.7
    assert shares.min() >= 0
    assert (shares[:, :2] + shares[:, 2:]).max() <= 1
    assert abs(sum(look.mirrored for look in looks) - 500) < 4 * np.sqrt(250)


def test_ladders_rise_within_one_degradation_of_one_content(ladder_loader):
    """Each group is one content and one degradation at strictly rising levels."""
    loader = ladder_loader()
    for step in range(12):
        loader.pack.read.clear()
        batch = loader(step)
        assert batch.levels.shape == (2, 4)
        assert len(batch.views["whole"]) == 8
        for group, levels in enumerate(batch.levels):
            records = loader.pack.read[4 * group : 4 * group + 4]
            assert [r.level for r in records] == levels.tolist()
            assert all(b > a for a, b in pairwise(levels))
            assert len({r.content for r in records}) == 1
            assert len({r.degradation for r in records} - {"clean"}) == 1
            assert {r.split for r in records} == {"train"}


def test_every_degradation_and_clean_pictures_take_part(ladder_loader):
    """Within 40 steps both degradations, both contents and the clean pictures come up."""
    loader = ladder_loader()
    for step in range(40):
        loader(step)
    assert {r.degradation for r in loader.pack.read} == {"clean", "blur", "noise"}
    assert len({r.content for r in loader.pack.read}) == 2


def test_a_ladder_shares_one_look(tmp_path, make_picture, ladder_loader):
    """Levels that differ by nothing but brightness give views that differ by brightness alone:
    crop, mirroring and the place of every fragment are shared.
    """
    luma = make_picture(3)[..., :1].repeat(3, 2) // 2 + 20
    pictures = [
        (
            Record(f"a/dim/{level}", "a", "train", degradation="dim", level=level),
            as_planes_420(luma + np.uint8(10 * level)),
        )
        for level in range(5)
    ]
    write_pack(tmp_path, pictures, made_by="test", settings={})
    loader = ladder_loader(groups=1, levels=3, folder=tmp_path)
    for step in range(8):
        batch = loader(step)
        for view in batch.views.values():
            plain = view.astype(int) - 10 * batch.levels[0][:, None, None, None]
            assert np.abs(plain - plain[0]).max() <= 1  # rounding


def test_groups_from_the_clean_picture_begin_with_it(packs, small_views):
    """Every group's first picture is the clean one of its content; the others lie on one ladder."""
    draws = LadderDraws(
        Pack(packs / "ladders"), small_views[1], groups=2, levels=3, seed=1, smallest_crop=0.9,
        from_clean=True,
    )  # fmt: skip
    for step in range(20):
        drawn = draws(step)
        for group in (drawn[:3], drawn[3:]):
            first, *others = (d.record for d in group)
            assert first.degradation == "clean"
            assert {r.content for r in others} == {first.content}
            assert len({r.degradation for r in others}) == 1
            assert 0 < others[0].level < others[1].level


def test_mixed_groups_have_any_damage_and_no_order(packs, small_views):
    """All mixed: groups of several kinds of damage come, and no level of theirs is compared."""
    draws = LadderDraws(
        Pack(packs / "ladders"), small_views[1], groups=1, levels=4, seed=1, smallest_crop=0.9,
        mixed=1.0, from_clean=True,
    )  # fmt: skip
    groups = [draws(step) for step in range(20)]
    assert max(len({d.record.degradation for d in group[1:]}) for group in groups) == 2
    assert not any(d.is_level for group in groups for d in group)
    assert all(len({d.record.name for d in group}) == 4 for group in groups)


def test_too_many_levels_are_refused(ladder_loader):
    """A recipe that asks for more levels than the shortest ladder has is told both numbers."""
    with pytest.raises(ValueError, match=r"has 7 pictures.*asks for 8"):
        ladder_loader(levels=8)


def test_a_pack_without_training_pictures_is_refused(ladder_loader, packs, tmp_path):
    """No training ladder at all is an error when batches are planned, not at some step."""
    pack = Pack(packs / "ladders")
    kept = [(r, pack.planes(r)) for r in pack.records if r.split == "validation"]
    write_pack(tmp_path, kept, made_by="test", settings={})
    with pytest.raises(ValueError, match="shortest ladder of train has 0"):
        ladder_loader(folder=tmp_path)


def test_read_ahead_keeps_order_and_stays_near():
    """Batches come in order, from another thread, at most three ahead of the one in use."""
    made = []

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        return step

    for expected, step in enumerate(read_ahead(make, 5, 25), 5):
        assert step == expected
        assert len(made) <= expected - 5 + 1 + 3
    assert made == [(step, False) for step in range(5, 25)]


def test_read_ahead_raises_what_making_raised():
    """An error in the thread reaches the loop, after the batches before it."""

    def make(step):
        if step == 3:
            raise OSError("disk gone")
        return step

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        seen.extend(read_ahead(make, 0, 9))
