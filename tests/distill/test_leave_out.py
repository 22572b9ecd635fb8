"""Training without some kinds of damage: what is dropped, what stays, what may go on."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from dgiqa_stream.errors import ConfigError
from distill.data.leave_out import kinds_of, without_kinds
from distill.data.loader import ladders_of
from distill.data.packed import Record
from distill.data.shards import ShardRecord
from distill.data.training_data import open_packs, open_shards


def test_a_kind_is_left_out_of_ladders_alone(packs):
    """Without noise the ladders of both splits have blur and the clean picture; ratings stay."""
    data = open_packs(packs)
    kept = without_kinds(data, ["noise"])
    assert {r.degradation for r in kept.ladders.records} == {"clean", "blur"}
    assert {r.split for r in kept.ladders.records} == {"train", "validation"}
    assert kept.rated is data.rated
    for by_name in ladders_of(kept.ladders.records, "train").values():
        assert {name: len(ladder) for name, ladder in by_name.items()} == {"blur": 7}
    record = kept.ladders.records[0]
    assert kept.ladders.planes(record).size == data.ladders.planes(record).size


def test_unrated_pictures_and_chains_go_too(write_shards, make_picture, tmp_path):
    """Of a shard's unrated pictures those with a left-out step go, alone or in a chain."""
    names = ["clean", "haze", "blur", "haze:3+h264:5", "blur:1+h264:5"]
    pictures = [
        (
            ShardRecord(
                name, f"c{i}", "train", "pristine", degradation=name,
                ladder="" if "+" in name or name == "clean" else f"c{i}/{name}",
                level=None if "+" in name else int(name != "clean"),
            ),
            make_picture(i),
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    data = open_shards(write_shards(tmp_path / "s", pictures))
    kept = without_kinds(data, ["haze"])
    assert {r.name for r in kept.unrated.records} == {"clean", "blur", "blur:1+h264:5"}
    assert {r.name for r in kept.ladders.records} == {"clean", "blur"}


def test_nothing_left_out_changes_nothing(packs):
    """An empty list gives back the very data: a run begun before the setting was there goes on.
    Any other list is another run, whatever its order.
    """
    data = open_packs(packs)
    assert without_kinds(data, []) is data
    found = {
        without_kinds(data, kinds).identity for kinds in (["blur", "noise"], ["noise", "blur"])
    }
    assert len(found) == 1
    assert data.identity not in found


def test_a_misspelt_kind_is_refused(packs):
    """A kind that no picture has is an error with those there are, not a training with it."""
    with pytest.raises(ConfigError, match=r"nose.*known: blur, noise"):
        without_kinds(open_packs(packs), ["nose"])


def test_the_steps_of_a_record():
    """A clean picture has no kind, a ladder's one, a chain's each step's."""
    kinds = ("clean", "", "haze", "haze:3+h264:5")
    found = [kinds_of(Record("a", "a", "train", degradation=kind)) for kind in kinds]
    assert found == [set(), set(), {"haze"}, {"haze", "h264"}]


def test_training_leaves_them_out_and_resumes(recipe, packs, backbone, tmp_path):
    """A run whose recipe leaves noise out draws no picture of it, and goes on as it began; with
    another list it is refused. A run begun without the setting goes on with an empty list.
    """
    pytest.importorskip("torch")
    from distill.trainer import train

    def run(folder, steps, *kinds):
        data = msgspec.structs.replace(recipe.data, leave_out=list(kinds))
        changed = msgspec.structs.replace(recipe, data=data)
        return train(changed, packs, tmp_path / folder, backbone=backbone, num_steps=steps)

    run("one", 1, "noise")
    run("one", 1, "noise")
    with pytest.raises(ConfigError, match=r"other data.*noise"):
        run("one", 1)
    with pytest.raises(ConfigError, match=r"nose.*known: blur, noise"):
        run("two", 1, "nose")
    train(recipe, packs, tmp_path / "old", backbone=backbone, num_steps=1)
    run("old", 1)


@pytest.fixture
def haze_and_noise(write_shards, make_picture, tmp_path):
    """Shards of one content: clean, haze, noise and a chain of both, all with a pseudo-MOS."""
    names = ["clean", "haze", "gaussian_noise", "gaussian_noise:2+haze:1"]
    pictures = [
        (
            ShardRecord(
                f"c0/{name}", "c0", "train", "pristine", pseudo_mos=0.5, confidence=0.8,
                degradation=name, ladder="" if "+" in name or name == "clean" else f"c0/{name}",
                level=None if "+" in name else int(name != "clean"),
            ),
            make_picture(i),
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    return open_shards(write_shards(tmp_path / "shards", pictures))


def test_of_some_kinds_only_the_order_counts(haze_and_noise, recipe):
    """The pseudo-MOS of haze, alone or in a chain, has no confidence left; that of noise has."""
    from distill.data.batches import BatchMaker

    train = msgspec.structs.replace(recipe.train, unrated_batch=8, ladder_groups=1)

    def trusted(order_only):
        losses = msgspec.structs.replace(recipe.losses, order_only=order_only)
        chosen = msgspec.structs.replace(recipe, train=train, losses=losses)
        maker = BatchMaker(haze_and_noise, chosen)
        return {c for number in range(4) for c in np.round(maker(number).confidence, 3).tolist()}

    assert trusted([]) == {np.float32(0.8).round(3).item()}
    assert trusted(["haze"]) == {0.0, np.float32(0.8).round(3).item()}
    assert trusted(["haze", "gaussian_noise", "h264"]) == {0.0, np.float32(0.8).round(3).item()}
    with pytest.raises(ConfigError, match="no degradation 'hase'"):
        trusted(["hase"])
