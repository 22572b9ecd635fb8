"""Batches from shards: what is known of each picture, and what becomes of one that is broken."""

from __future__ import annotations

import pickle
import zipfile

import msgspec
import numpy as np
import pytest

from dgiqa_stream.errors import ConfigError, SourceError
from distill.data.batch import NO_LADDER
from distill.data.batches import BatchMaker
from distill.data.packed import Pack, Record, as_planes_420, write_pack
from distill.data.shards import ShardReader, ShardRecord
from distill.data.training_data import open_packs, open_shards

RATED, LADDER, UNRATED = slice(0, 4), slice(4, 6), slice(6, 9)


@pytest.fixture
def unrated_recipe(recipe):
    """Four rated, one ladder of two and three unrated pictures a step."""
    train = msgspec.structs.replace(recipe.train, unrated_batch=3)
    return msgspec.structs.replace(recipe, train=train)


@pytest.fixture
def make(shards, unrated_recipe):
    """Batches of the shards."""
    return BatchMaker(open_shards(shards), unrated_recipe)


def test_a_batch_knows_what_its_records_say(make, shards):
    """Rated pictures have MOS and no pseudo-MOS, the others the reverse at their confidence; the
    ladder's levels rise, and no validation picture is among them.
    """
    known = {r.name: r for r in ShardReader(shards, split="train").records}
    ratings = {round(r.mos, 6) for r in known.values() if r.mos is not None}
    for number in range(4):
        batch = make(number)
        assert {round(float(m), 6) for m in batch.mos[RATED]} <= ratings
        assert np.isnan(batch.pseudo_mos[RATED]).all()
        assert (batch.confidence[RATED] == 0).all()
        for part in (LADDER, UNRATED):
            assert np.isnan(batch.mos[part]).all()
            np.testing.assert_allclose(batch.pseudo_mos[part], 1 - batch.levels[part] / 8)
            np.testing.assert_allclose(batch.confidence[part], 0.8)
        assert batch.ladders.tolist() == [NO_LADDER] * 4 + [0, 0] + [NO_LADDER] * 3
        assert batch.levels[4] < batch.levels[5]
        assert batch.contents[4] == batch.contents[5]
        assert len(set(batch.contents[RATED].tolist())) == 4


def test_a_batch_is_its_number_in_any_process(make):
    """A maker that was sent to another process, or used before, makes the same batch bit by bit."""
    first = make(5)
    make(2)
    sent = pickle.loads(pickle.dumps(make))
    for again in (make(5), sent(5)):
        for name, view in first.views.items():
            np.testing.assert_array_equal(again.views[name], view)
        np.testing.assert_array_equal(again.mos, first.mos)
        np.testing.assert_array_equal(again.levels, first.levels)


def test_a_pack_is_sent_by_its_folder(packs):
    """A pack in another process maps its file again: sending it takes less than its pictures."""
    pack = Pack(packs / "rated")
    sent = pickle.dumps(pack)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    first = pack.records[0]
    np.testing.assert_array_equal(again.planes(first).samples[0], pack.planes(first).samples[0])


def corrupt(shards, folder, content):
    """A copy of the shards in which every picture of a content has a flipped bit."""
    folder.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    for record in ShardReader(shards).records:
        if record.content != content:
            continue
        path = folder / record.shard
        with zipfile.ZipFile(path) as archive:
            offset = archive.getinfo(record.member).header_offset
        changed = bytearray(path.read_bytes())
        changed[offset + 400] ^= 1
        path.write_bytes(changed)
    return folder


def test_a_corrupt_picture_counts_nothing(shards, unrated_recipe, tmp_path):
    """A broken content leaves blank places without any label, its ladder is none, it is named; all
    other pictures of the batch are bit for bit what they were.
    """
    whole = BatchMaker(open_shards(shards), unrated_recipe)
    broken = BatchMaker(open_shards(corrupt(shards, tmp_path / "s", "clean0")), unrated_recipe)
    seen = 0
    for number in range(6):
        batch, wanted = broken(number), whole(number)
        names = {left.name for left in batch.left_out}
        assert all(name.startswith("clean0/") for name in names)
        blank = ~batch.views["whole"].any((1, 2, 3))
        assert blank.sum() >= len(names)
        assert np.isnan(batch.mos[blank]).all()
        assert np.isnan(batch.pseudo_mos[blank]).all()
        assert (batch.confidence[blank] == 0).all()
        np.testing.assert_array_equal(batch.views["whole"][~blank], wanted.views["whole"][~blank])
        np.testing.assert_array_equal(batch.mos[~blank], wanted.mos[~blank])
        if blank[LADDER].any():
            assert batch.num_ladders == 0
            assert (batch.ladders == NO_LADDER).all()
        seen += blank.sum()
    assert seen > 3


@pytest.mark.parametrize("value", [1.2, -0.1])
def test_a_mos_off_the_scale_is_refused(write_shards, make_picture, tmp_path, value):
    """A rating outside 0..1 in shards or packs is one line with picture and value, before any
    training.
    """
    rgb = make_picture(1)
    good = ShardRecord("set/good", "good", "train", "set", mos=0.5)
    wrong = msgspec.structs.replace(good, name="set/wrong", mos=value)
    folder = write_shards(tmp_path / "shards", [(good, rgb), (wrong, rgb)])
    with pytest.raises(SourceError, match=f"set/wrong in .* has mos {value}, and 0 to 1") as told:
        open_shards(folder)
    assert "\n" not in str(told.value)
    about = {"made_by": "test", "settings": {}}
    rated = [(Record("wrong", "wrong", "train", mos=value), as_planes_420(rgb))]
    write_pack(tmp_path / "rated", rated, **about)
    clean = [(Record("c", "c", "train", degradation="clean"), as_planes_420(rgb))]
    write_pack(tmp_path / "ladders", clean, **about)
    with pytest.raises(SourceError, match=f"wrong in .* has mos {value}"):
        open_packs(tmp_path)


def test_damaged_shards_are_found_when_asked_for(shards, tmp_path):
    """With ``verify`` a flipped bit is an error when shards are opened, without it not yet."""
    damaged = corrupt(shards, tmp_path / "s", "clean1")
    open_shards(damaged)
    with pytest.raises(SourceError, match="is not as it was written"):
        open_shards(damaged, verify=True)


def test_shards_without_ratings_are_trained_on_alone(
    write_shards, shards, unrated_recipe, tmp_path
):
    """Unrated pictures alone make batches, and an epoch is a pass over them."""
    reader = ShardReader(shards)
    kept = [(r, reader.picture(r)) for r in reader.records if r.mos is None]
    make = BatchMaker(open_shards(write_shards(tmp_path, kept)), unrated_recipe)
    assert make.per_epoch() == 14 // 3
    batch = make(0)
    assert len(batch.mos) == 2 + 3
    assert np.isnan(batch.mos).all()


def test_several_folders_of_shards_are_one_set(packs, shards, write_shards, make_picture, tmp_path):
    """Two folders beside packs: all their pictures, each read from where it lies."""
    large = make_picture(7, 320, 384)
    record = ShardRecord("large/clean", "large", "train", "mosaics", degradation="clean", level=0)
    second = write_shards(tmp_path / "second", [(record, large)])
    alone = open_packs(packs, shards)
    data = open_packs(packs, [shards, second])
    assert len(data.ladders.records) == len(alone.ladders.records) + 1
    assert data.ladders is data.unrated
    assert data.identity.startswith(alone.identity)
    assert data.identity != alone.identity
    first, last = data.ladders.records[0], data.ladders.records[-1]
    np.testing.assert_array_equal(
        data.ladders.planes(first).samples[0], alone.ladders.planes(first).samples[0]
    )
    np.testing.assert_array_equal(
        data.ladders.planes(last).samples[0], as_planes_420(large).samples[0]
    )


def test_one_name_in_two_folders_is_refused(packs, shards):
    """A picture that two folders have would be learnt twice, and from one of them."""
    with pytest.raises(ConfigError, match=r"clean0/clean is in .* and in "):
        open_packs(packs, [shards, shards])
