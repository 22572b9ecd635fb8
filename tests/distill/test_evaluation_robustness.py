"""Ladders, stability, familiarity and floors, with scorers whose scores are known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("scipy")

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.scorer import Prediction
from distill.data.codecs import CODECS
from distill.data.damage import moving
from distill.evaluation import commands, robustness
from distill.evaluation.codec_ladders import (
    full_hd_pan,
    judge_codecs,
    judge_full_size,
)
from distill.evaluation.degradation_ladders import (
    degradation_scores,
    picture_kinds,
)
from distill.evaluation.familiarity import judge_familiarity, screen_paths
from distill.evaluation.finished import FinishedParts
from distill.evaluation.robustness import RobustnessRequest, judge_robustness
from distill.evaluation.small_moves import DIRECTIONS, judge_small_moves
from distill.evaluation.static_scenes import judge_static_scenes, scene
from distill.evaluation.strange_pictures import STRANGE
from distill.evaluation.unseen import UnseenPicture, read_unseen, unseen_paths


class Known:
    """A scorer of a function of the planes; ``strange`` says which pictures it does not know."""

    def __init__(self, score, *, strange=None, interval=None):
        self.score, self.strange = score, strange
        self.manifest = SimpleNamespace(
            id="known", version="1.0.0", precision="fp32", sha256="0" * 64, history=[],
            domain=None if strange is None else SimpleNamespace(threshold=0.5),
            interval=None if interval is None else SimpleNamespace(coverage=0.9),
        )  # fmt: skip
        self.interval = interval

    def predict(self, pictures):
        """The function of each picture."""
        return [self._predict(p) for p in pictures]

    def _predict(self, planes):
        score = float(self.score(planes))
        is_strange = self.strange is not None and self.strange(planes)
        around = None if self.interval is None else (score - self.interval, score + self.interval)
        return Prediction(score, score / 100, around, ("unfamiliar",) if is_strange else ())


def psnr_to(references):
    """The PSNR to the nearest of some frames, as a score."""

    def score(planes):
        rgb = reduced_rgb(planes, longest_px=1 << 30).astype(np.float64)
        error = min(float(np.mean((rgb - frame) ** 2)) for frame in references)
        return min(99.0, 10 * np.log10(255**2 / max(error, 1e-9)))

    return score


def rgb_of(planes):
    """The whole picture."""
    return reduced_rgb(planes, longest_px=1 << 30)


@pytest.fixture(scope="module")
def pristine(make_picture, tmp_path_factory):
    """Two unseen pictures of odd size, a training picture, a photograph and a screen of GB82."""
    folder = tmp_path_factory.mktemp("pristine")
    for i, name in enumerate(["clic_1", "clic_2", "content0", "gb82_cat-lossless", "gb82_gui"]):
        bgr = cv2.cvtColor(make_picture(i, 97, 129), cv2.COLOR_RGB2BGR)
        assert cv2.imwrite(str(folder / f"{name}.webp"), bgr, [cv2.IMWRITE_WEBP_QUALITY, 101])
    return folder


def test_only_unseen_pictures_are_judged_on(pristine, tmp_path):
    """Of a folder the test split's pictures are taken, as many as asked for, at even size; a folder
    without any is an error.
    """
    assert [p.stem for p in unseen_paths([pristine])] == ["clic_1", "clic_2"]
    assert [p.stem for p in unseen_paths([pristine], number=1)] == ["clic_1"]
    picture = read_unseen(pristine / "clic_1.webp")
    assert (picture.name, picture.rgb.shape) == ("clic_1", (96, 128, 3))
    with pytest.raises(FileNotFoundError, match="clic_"):
        unseen_paths([tmp_path])


def test_psnr_falls_along_every_codec(make_picture):
    """PSNR to the very frames falls at every step of each codec's ladder, its negative rises, and
    the clean frames head the ladder.
    """
    picture = UnseenPicture("a", make_picture(1, 96, 128))
    score = psnr_to(moving(picture.rgb, num_frames=5, step_px=2))
    found = judge_codecs(Known(score), [picture])
    assert set(found.by_codec) == {"h264", "h265", "av1", "vp9"}
    for codec, row in found.by_codec.items():
        assert row.share_falling.value == 1.0, codec
        assert row.num_steps == len(CODECS[codec].points)
        assert row.drop_points.value > 5
        assert max(found.scores[codec]["a"]) == found.scores[codec]["a"][0]
    assert found.all.num_steps == sum(row.num_steps for row in found.by_codec.values())
    upside_down = judge_codecs(Known(lambda p: 99 - score(p)), [picture], codecs=["h264"])
    assert upside_down.all.share_falling.value < 0.2


def test_a_window_of_1080p_moves_about_the_centre():
    """Eight windows of 1920x1080 go two pixels down and right each; upright pictures have upright
    windows, and smaller pictures none.
    """
    rows, columns = np.indices((1100, 1940), np.uint8)
    rgb = np.stack([rows, columns, rows], -1)
    frames = full_hd_pan(rgb)
    assert [f.shape for f in frames] == [(1080, 1920, 3)] * 8
    assert frames[0][0, 0].tolist() == [3, 3, 3]
    assert frames[7][0, 0].tolist() == [17, 17, 17]
    assert full_hd_pan(np.zeros((1936, 1096, 3), np.uint8))[0].shape == (1920, 1080, 3)
    assert full_hd_pan(np.zeros((1092, 1940, 3), np.uint8)) == []


def test_full_size_drops_are_those_of_the_scorer(tmp_path):
    """A scorer that gives full-range planes 60 and decoded ones 30 drops by 30 points, which is
    enough; a picture that is too small is named, and alone it is an error.
    """
    for name, height in (("clic_large", 1096), ("clic_small", 400)):
        assert cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((height, 1936, 3), 90, np.uint8))
    scorer = Known(lambda planes: 60 if planes.full_range else 30)
    found = judge_full_size(scorer, unseen_paths([tmp_path]), codecs=["h264"])
    assert found.too_small == ["clic_small"]
    row = found.by_codec["h264"]
    assert (row.crf, row.num_contents, row.lowest_drop_points) == (45, 1, 30.0)
    assert (row.drop_points.value, row.share_at_floor.value) == (30.0, 1.0)
    with pytest.raises(ValueError, match="1920x1080"):
        judge_full_size(scorer, [tmp_path / "clic_small.png"])


def test_damage_is_scored_from_clean_to_worst(pristine):
    """A ladder has the clean picture and each level: mean luma falls along underexposure. Kinds
    share the contents between them.
    """
    brightness = Known(lambda planes: 100 * planes.samples[0].mean() / 255)
    kinds = ["underexposure", "gaussian_blur"]
    paths = unseen_paths([pristine])
    found = degradation_scores(brightness, paths, kinds=kinds, contents_per_kind=1)
    assert {kind: list(by_content) for kind, by_content in found.items()} == {
        "underexposure": ["clic_1"],
        "gaussian_blur": ["clic_2"],
    }
    [dark] = found["underexposure"].values()
    assert len(dark) == 7
    assert (np.diff(dark) < 0).all()
    clean = read_unseen(paths[0]).rgb
    grey = cv2.cvtColor(clean, cv2.COLOR_RGB2GRAY).mean()
    assert dark[0] == pytest.approx(100 * grey / 255, abs=0.2)  # OpenCV rounds each sample
    with pytest.raises(ConfigError, match="freeze"):
        degradation_scores(brightness, paths, kinds=["freeze"], contents_per_kind=1)


def test_static_scenes_show_a_score_that_wanders(pristine):
    """A score that is 40 and 50 in turn has a standard deviation of 5 points in every clip, a
    constant one of 0: none and all are steady.
    """
    calls = iter(range(10**6))
    paths = unseen_paths([pristine], number=1)
    shaky = judge_static_scenes(
        Known(lambda planes: 40 + 10 * (next(calls) % 2)), paths, crfs=[37], seconds=2
    )
    assert (shaky.num_contents, shaky.num_frames, len(shaky.clips)) == (1, 50, 4)
    assert {(c.codec, c.grain_steps) for c in shaky.clips} == {
        (codec, grain) for codec in ("h264", "h265") for grain in (0.0, 2.0)
    }
    assert [c.stdev_points for c in shaky.clips] == [5.0] * 4
    assert (shaky.share_steady.value, shaky.largest_stdev_points) == (0.0, 5.0)
    still = judge_static_scenes(Known(lambda planes: 40), paths, crfs=[37], seconds=1)
    assert (still.share_steady.value, still.largest_stdev_points) == (1.0, 0.0)


def test_grain_is_grey_and_of_the_stated_strength():
    """Grain deviates by 2 steps (5 % for the rounding and 12,288 samples), alike in each colour,
    and differs from frame to frame; without it all frames are the picture.
    """
    rgb = np.full((96, 128, 3), 120, np.uint8)
    first, second = scene(rgb, 2, 2.0, "a")
    assert first.std() == pytest.approx(2.0, rel=0.05)
    assert np.array_equal(first[..., 0], first[..., 2])
    assert not np.array_equal(first, second)
    assert all(np.array_equal(f, rgb) for f in scene(rgb, 3, 0.0, "a"))


def test_shifts_are_by_one_pixel_in_eight_directions(tmp_path):
    """On a ramp of 1 a column and 10 a row, the corner's value changes by 10, 1, 11 or 9: the very
    changes of the eight shifts, whose mean is 62 / 8. A constant score never changes.
    """
    rows, columns = np.indices((20, 66))
    ramp = np.repeat((10 * rows + columns)[..., None], 3, -1).astype(np.uint8)
    ramp = np.kron(np.ones((4, 1, 1), np.uint8), ramp)  # 80 rows: room for blocks
    assert cv2.imwrite(str(tmp_path / "clic_ramp.png"), ramp)
    corner = Known(lambda planes: rgb_of(planes)[4, 4, 1] / 1.0)
    found = judge_small_moves(corner, [tmp_path / "clic_ramp.png"])
    clean = found.shifts_by_picture["clean"]
    expected = [abs(10 * y + x) for y, x in DIRECTIONS]
    assert sorted(expected) == [1, 1, 9, 9, 10, 10, 11, 11]
    assert clean.mean_points.value == pytest.approx(62 / 8)
    assert clean.p95_points.value == pytest.approx(np.percentile(expected, 95))
    assert (clean.num_changes, clean.largest_points) == (8, 11.0)
    assert found.shifts.num_changes == 5 * 8  # clean, and four mild degradations
    assert found.rescales.num_changes == 5 * 2
    constant = judge_small_moves(Known(lambda planes: 7), [tmp_path / "clic_ramp.png"])
    assert constant.shifts.largest_points == constant.rescales.largest_points == 0


def test_a_constant_shift_of_size_is_seen_by_rescales(pristine):
    """A scorer of the width sees 1 % of 126 columns: 125 and 127, one point of change each."""
    found = judge_small_moves(Known(lambda p: p.size[1]), unseen_paths([pristine], number=1))
    assert found.rescales.p95_points.value == 1.0
    assert found.shifts.largest_points == 0.0


@pytest.mark.parametrize("group", STRANGE)
def test_strange_pictures_are_pictures(group):
    """Each is uint8 RGB at several sizes, the same from one seed; text and noise of another seed
    are other pictures.
    """
    pytest.importorskip("PIL")
    made = list(STRANGE[group](1))
    assert len(made) >= 16
    assert len({p.shape for p in made}) == 4
    for picture, again in zip(made, STRANGE[group](1), strict=True):
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert np.array_equal(picture, again)
    if group in ("text", "noise"):
        assert not np.array_equal(made[0], next(STRANGE[group](2)))


def test_strange_pictures_show_what_they_say():
    """Black stays below 4 of 255 steps, flat pictures have one colour each, and a page of text has
    mostly paper and some ink, at least 2 % of its pixels.
    """
    pytest.importorskip("PIL")
    assert max(p.max() for p in STRANGE["black"](0)) <= 3
    for picture in STRANGE["flat"](0):
        assert (picture == picture[0, 0]).all()
    for page in STRANGE["text"](0):
        ink = np.abs(page.astype(int) - page[0, 0]).max(-1) > 32
        assert 0.02 < ink.mean() < 0.4


def test_flags_are_counted_by_group(pristine):
    """A scorer that knows nothing dark flags all black pictures and no photograph; a model without
    a flag has scores alone.
    """
    pytest.importorskip("PIL")
    given = {"screens": screen_paths([pristine]), "photographs": unseen_paths([pristine])}
    dark = Known(lambda p: 5, strange=lambda planes: planes.samples[0].max() < 20)
    found = judge_familiarity(dark, **given)
    assert found.groups["black"].flagged.value == 1.0
    assert found.groups["photographs"].flagged.value == 0.0
    assert found.groups["photographs"].num_pictures == 2
    assert found.groups["screens"].num_pictures == 1
    assert found.screens_in_training == ["gb82_gui"]
    plain = judge_familiarity(Known(lambda p: 5), **given)
    assert plain.groups["black"].flagged is None
    assert plain.groups["black"].mean_score == 5


def rate(folder, make_picture):
    """A BIQ2021 of 12 training pictures and one for the test, each of one grey that is its MOS."""
    (folder / "Images").mkdir(parents=True)
    rows = [f"{i}.png,{i / 12}\n" for i in range(13)]
    for i in range(13):
        grey = np.full((64, 64, 3), round(255 * i / 12), np.uint8)
        assert cv2.imwrite(str(folder / "Images" / f"{i}.png"), grey)
    for table, lines in (("Train", rows[:12]), ("Test", rows[12:])):
        (folder / f"{table} (Images and MOS).csv").write_text("Image Name,MOS\n" + "".join(lines))
    return folder


@pytest.fixture
def request_of(pristine):
    """``request_of(**changes)``: a request of one content and two kinds."""

    def make(**changes):
        given = {"num_contents": 1, "contents_per_kind": 1, "num_scenes": 1, "num_validation": 8}
        given["kinds"] = ("h264", "gaussian_blur", "haze")
        return RobustnessRequest(pristine=(pristine,), **{**given, **changes})

    return make


def test_rated_pictures_are_those_of_validation(request_of, make_picture, tmp_path):
    """A scorer that reads the MOS off the picture agrees wholly and covers all eight ratings; the
    test part is not read, for its picture is taken away.
    """
    root = rate(tmp_path / "set", make_picture)
    (root / "Images" / "12.png").write_bytes(b"not a picture")
    oracle = Known(lambda p: 100 * rgb_of(p).mean() / 255, strange=lambda p: False, interval=2.0)
    found = judge_robustness(
        oracle, request_of(biq2021=root), result=tmp_path / "r.json", sections=("rated",)
    )
    rated = found["sections"]["rated"]
    assert (rated["split"], rated["num_pictures"]) == ("validation", 8)
    assert rated["srcc"]["value"] == 1.0
    assert rated["flagged"]["value"] == 0.0
    assert rated["intervals"]["all"]["share_inside"]["value"] == 1.0
    assert rated["intervals"]["all"]["mean_width_points"] == pytest.approx(4.0)


def test_what_is_not_given_is_named(request_of, tmp_path):
    """Without 1080p pictures and BIQ2021 both sections are named with the missing option."""
    found = judge_robustness(
        Known(lambda p: 5),
        request_of(),
        result=tmp_path / "r.json",
        sections=("full_size", "rated"),
    )
    assert found["sections"] == {}
    assert set(found["left_out"]) == set(robustness.SECTIONS)
    assert found["left_out"]["moves"] == "not asked for"
    assert "--full-size" in found["left_out"]["full_size"]
    assert "--biq2021" in found["left_out"]["rated"]


@pytest.mark.parametrize("field", ["kinds", "unseen"])
def test_unknown_kinds_are_refused_before_any_work(request_of, tmp_path, field):
    """A misspelt kind is refused at once: the scorer is never asked."""

    def never(planes):
        raise AssertionError

    with pytest.raises(ConfigError, match="hazy"):
        judge_robustness(Known(never), request_of(**{field: ("hazy",)}), result=tmp_path / "r.json")


def test_kinds_that_the_manifest_left_out_are_unseen(request_of, tmp_path):
    """What the model's recipe left out is summed up as unseen beside what is asked for; codecs are
    summed up with the other kinds, from their own ladders.
    """
    scorer = Known(lambda p: 5)
    scorer.manifest.history = [{"recipe": {"data": {"leave_out": ["haze", "vp9"]}}}]
    found = judge_robustness(
        scorer,
        request_of(unseen=("h264",)),
        result=tmp_path / "r.json",
        sections=("codecs", "degradations"),
    )
    assert found["unseen_kinds"] == ["h264", "haze"]
    rows = found["sections"]["degradations"]
    assert {k: row["in_training"] for k, row in rows["by_kind"].items()} == {
        "h264": False, "gaussian_blur": True, "haze": False,
    }  # fmt: skip
    assert rows["unseen"]["num_ladders"] == 2
    assert rows["by_kind"]["h264"]["num_steps"] == len(CODECS["h264"].points)
    json.dumps(found, allow_nan=False)


def test_an_interrupted_run_goes_on(request_of, tmp_path):
    """Sections that were done are not measured again by the same model and settings; those of
    another model are.
    """
    asked = []

    def counted(planes):
        asked.append(planes)
        return 5

    def stop(planes):
        raise KeyboardInterrupt

    result, sections = tmp_path / "r.json", ("moves", "degradations")
    first = Known(counted)
    judge_robustness(first, request_of(), result=result, sections=sections[:1])
    num_first = len(asked)
    with pytest.raises(KeyboardInterrupt):
        judge_robustness(Known(stop), request_of(), result=result, sections=sections)
    judge_robustness(first, request_of(), result=result, sections=sections[:1])
    assert len(asked) == num_first
    other = Known(counted)
    other.manifest.sha256 = "1" * 64
    judge_robustness(other, request_of(), result=result, sections=sections[:1])
    assert len(asked) == 2 * num_first


def test_damaged_leftovers_are_no_obstacle(tmp_path):
    """A file of finished parts that is no JSON is begun anew, and forgetting removes it."""
    result = tmp_path / "r.json"
    (tmp_path / "r.json.done").write_text("{")
    done = FinishedParts(result, {"a": 1})
    assert done.part("x", lambda: {"v": 1}) == {"v": 1}
    assert FinishedParts(result, {"a": 1}).part("x", lambda: {"v": 2}) == {"v": 1}
    assert FinishedParts(result, {"a": 2}).part("x", lambda: {"v": 3}) == {"v": 3}
    done.forget()
    assert not (tmp_path / "r.json.done").exists()


def test_every_picture_ladder_is_judged():
    """The kinds are those of the table that a picture can have: no timing, and all codecs."""
    kinds = picture_kinds()
    assert set(CODECS) <= set(kinds)
    assert "freeze" not in kinds
    assert len(kinds) > 30
    assert set(robustness.LADDER_CODECS) <= set(kinds)


def test_the_command_judges_the_shipped_student(pristine, tmp_path):
    """One command judges the shipped model on tiny pictures, prints the floors, and writes a JSON
    that says what made it; nothing of the run is left beside it.
    """
    pytest.importorskip("PIL")
    output = tmp_path / "out" / "robustness.json"
    words = ["robustness", "student", "--pristine", pristine, "-o", output, "--contents", 1]
    words += ["--contents-per-kind", 1, "--scenes", 1, "--kind", "gaussian_blur", "--kind", "haze"]
    done = CliRunner().invoke(
        commands.app, [str(w) for w in [*words, "--unseen", "haze"]], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert "| shift by one pixel, 95th percentile | ≤ 2 points |" in done.output
    found = json.loads(output.read_text())
    assert {"command", "date", "machine", "packages", "python"} <= set(found)
    assert found["machine"]["num_cores"] >= 1
    assert set(found["sections"]) == {"codecs", "degradations", "static", "moves", "familiarity"}
    assert set(found["left_out"]) == {"full_size", "rated"}
    assert found["sections"]["degradations"]["unseen"]["num_ladders"] == 1
    assert [p.name for p in output.parent.iterdir()] == ["robustness.json"]
    assert str(pristine.parent) not in output.read_text()


def test_a_folder_without_pictures_to_judge_is_refused_before_any_work(request_of, tmp_path):
    """One with 1080p pictures of other names is told at once: the scorer is never asked."""
    assert cv2.imwrite(str(tmp_path / "mine.png"), np.zeros((8, 8, 3), np.uint8))

    def never(planes):
        raise AssertionError

    with pytest.raises(FileNotFoundError, match="clic_"):
        judge_robustness(Known(never), request_of(full_size=tmp_path), result=tmp_path / "r.json")
