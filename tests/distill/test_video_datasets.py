"""Rated video sets in their official layouts, with empty files for clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill.data.datasets import DATASETS, load_dataset
from made_sets import table, touch

scipy_io = pytest.importorskip("scipy.io")
H264 = "_crf_10_ss_00_t_20.0.mp4"


def make_konvid1k(root: Path) -> dict[str, float]:
    """Twelve clips by their Flickr number; one carries the long name of the first release."""
    rows = [(f"{1000 + i}", 1 + i / 3) for i in range(12)]
    table(root / "KoNViD_1k_metadata/KoNViD_1k_mos.csv", "flickr_id,mos", rows)
    touch(root, *(f"KoNViD_1k_videos/{clip}.mp4" for clip, _ in rows[1:]))
    long_name = "konvid_1k_videos/1000_original_centercrop_960x540_8s.mp4"
    touch(root, long_name.replace("konvid", "KoNViD"))
    return {long_name: 0.0, "konvid_1k_videos/1006.mp4": 0.5}


def make_live_vqc(root: Path) -> dict[str, float]:
    """Twelve clips, as column cells of a MATLAB file."""
    root.mkdir(exist_ok=True)
    names = [f"A{i:03d}.mp4" for i in range(12)]
    cells = np.array([[name] for name in names], dtype=object)
    values = {"video_list": cells, "mos": np.arange(12.0)[:, None] * 8}
    scipy_io.savemat(root / "data.mat", values)
    touch(root, *(f"Video/{name}" for name in names))
    return {"Video/A000.mp4": 0.0, "Video/A010.mp4": 0.8}


def make_youtube_ugc(root: Path) -> dict[str, float]:
    """Ten originals, one H.264 copy and one clip that was not rated as a whole."""
    rows = [(f"Gaming_720P-{i:04x}", "Gaming", 1 + i * 0.4) for i in range(11)]
    path = root / "original_videos_MOS_for_YouTube_UGC_dataset.csv"
    table(path, "vid,category,MOS full", [*rows, ("Vlog_1080P-ffff", "Vlog", "")])
    touch(root, *(f"original_videos/Gaming/720P/{vid}.mkv" for vid, _, _ in rows[:-1]))
    touch(root, f"original_videos_h264/{rows[-1][0]}{H264}")
    return {
        "original_videos/gaming/720p/gaming_720p-0000.mkv": 0.0,
        f"original_videos_h264/gaming_720p-000a{H264}": 1.0,
    }


def make_lsvq(root: Path) -> dict[str, float]:
    """Ten clips for training, two for each test."""
    rows = [(f"yfcc-batch1/{i}", 10 * i, False) for i in range(10)]
    rows += [("ia-batch2/x", 55, True), ("ia-batch2/y", 65, True)]
    table(root / "labels_train_test.csv", "name,mos,is_test", rows)
    large = [("yfcc-batch3/100", 70), ("yfcc-batch3/101", 80)]
    table(root / "labels_test_1080p.csv", "name,mos", large)
    touch(root, *(f"{row[0]}.mp4" for row in [*rows, *large]))
    return {"yfcc-batch1/4.mp4": 0.4, "yfcc-batch3/101.mp4": 0.8}


MAKERS = {
    name: globals()[f"make_{name}"] for name, dataset in DATASETS.items() if dataset.kind == "video"
}


@pytest.mark.parametrize("name", MAKERS)
def test_mos_is_on_0_to_1_with_1_best(name, tmp_path):
    """Labels worked out by hand come back for each video set, with a file that exists."""
    wanted = MAKERS[name](tmp_path)
    by_name = {item.name: item for item in load_dataset(name, tmp_path)}
    for path, mos in wanted.items():
        assert by_name[path].mos == pytest.approx(mos, abs=1e-9)
        assert by_name[path].path.is_file()


@pytest.mark.parametrize("name", MAKERS)
def test_no_clip_is_in_two_parts(name, tmp_path):
    """One seed gives one part to every clip, and all parts have clips."""
    MAKERS[name](tmp_path)
    parts = {item.name: item.split for item in load_dataset(name, tmp_path, seed=2)}
    assert parts == {item.name: item.split for item in load_dataset(name, tmp_path, seed=2)}
    assert {"train", "validation", "test"} <= set(parts.values())


def test_lsvq_keeps_both_official_tests(tmp_path):
    """Whatever the seed, is_test and the 1080p table decide; validation comes from training."""
    make_lsvq(tmp_path)
    for seed in range(4):
        split = {i.name: i.split for i in load_dataset("lsvq", tmp_path, seed=seed)}
        assert {n for n, s in split.items() if s == "test"} == {
            "ia-batch2/x.mp4",
            "ia-batch2/y.mp4",
        }
        large = {n for n, s in split.items() if s == "test_1080p"}
        assert large == {"yfcc-batch3/100.mp4", "yfcc-batch3/101.mp4"}
        assert sum(s == "validation" for s in split.values()) == 1


def test_a_clip_not_rated_as_a_whole_is_passed_over(tmp_path):
    """YouTube-UGC's row without a MOS is neither loaded nor missed."""
    make_youtube_ugc(tmp_path)
    assert len(load_dataset("youtube_ugc", tmp_path)) == 11


def test_a_missing_clip_is_named(tmp_path):
    """A label without its clip stops the load with the clip's name."""
    make_live_vqc(tmp_path)
    (tmp_path / "Video/A004.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 12 files of live_vqc .*Video/A004\.mp4"):
        load_dataset("live_vqc", tmp_path)


def test_a_mos_outside_the_scale_names_the_entry(tmp_path):
    """An impossible MOS in a MATLAB file is told with its entry and value."""
    make_live_vqc(tmp_path)
    cells = np.array([["A000.mp4"], ["A001.mp4"]], dtype=object)
    scipy_io.savemat(tmp_path / "data.mat", {"video_list": cells, "mos": np.array([5.0, 140.0])})
    with pytest.raises(ValueError, match=r"data\.mat, entry 2: 140 of Video/A001\.mp4"):
        load_dataset("live_vqc", tmp_path)


def test_another_matlab_file_is_refused(tmp_path):
    """A file without the variables, or no MATLAB file at all, is named with what is wrong."""
    make_live_vqc(tmp_path)
    scipy_io.savemat(tmp_path / "data.mat", {"video_list": np.array([["A000.mp4"]], dtype=object)})
    with pytest.raises(ValueError, match=r"no variable 'mos'; it has \['video_list'\]"):
        load_dataset("live_vqc", tmp_path)
    (tmp_path / "data.mat").write_bytes(b"not a MATLAB file, but long enough to look at" * 9)
    with pytest.raises(ValueError, match=r"data\.mat is not a MATLAB file"):
        load_dataset("live_vqc", tmp_path)
