"""Models on rated pictures and clips: the served one, a checkpoint, a teacher; tables and JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("scipy")
torch = pytest.importorskip("torch")

from dgiqa_stream.config import StreamConfig  # noqa: E402
from dgiqa_stream.errors import ConfigError, SourceError  # noqa: E402
from dgiqa_stream.pipeline import score_frames  # noqa: E402
from dgiqa_stream.pooling import POOLERS  # noqa: E402
from dgiqa_stream.scorer import load_scorer  # noqa: E402
from distill.data.datasets import RatedItem  # noqa: E402
from distill.data.degrade import encode  # noqa: E402
from distill.evaluation import commands  # noqa: E402
from distill.evaluation.pictures import judge_pictures, readable  # noqa: E402
from distill.evaluation.predictors import (  # noqa: E402
    depth_free_predictor,
    scorer_predictor,
    student_predictor,
)
from distill.evaluation.tables import (  # noqa: E402
    markdown,
    read_result,
    read_table,
    write_result,
)
from distill.evaluation.video import ScoredClip, judge_clips, score_clips  # noqa: E402
from distill.models.student import Student  # noqa: E402

LEVELS_PX = (0.0, 1.5, 4.0)


@pytest.fixture(scope="module")
def rated(make_picture, tmp_path_factory) -> Path:
    """A CSV of four contents, each clean, blurred twice and made noisy twice; MOS on 1..5."""
    folder = tmp_path_factory.mktemp("rated")
    rows = []
    for content in range(4):
        rgb = make_picture(content, 230, 240)
        grain = np.random.default_rng(content).normal(0, 1, rgb.shape)
        for level, sigma in enumerate(LEVELS_PX):
            made = {"blur": cv2.GaussianBlur(rgb, (0, 0), sigma) if sigma else rgb}
            if level:
                made["noise"] = np.clip(rgb + 12 * sigma * grain, 0, 255).astype(np.uint8)
            for kind, picture in made.items():
                name = f"{content}_{kind}_{level}.png"
                cv2.imwrite(str(folder / name), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
                rows.append([name, 4.6 - 1.5 * level - 0.1 * content, str(content), kind, level])
    with (folder / "rated.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerows([["path", "mos", "content", "degradation", "level"], *rows])
    return folder / "rated.csv"


@pytest.fixture(scope="module")
def items(rated):
    """The table as rated items, MOS on 0..1."""
    return read_table(rated, worst=1, best=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A student's weights as training writes them."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    torch.save(Student().state_dict(), path)
    return path


def oracle(paths):
    """Scores from the level in the file's name."""
    return np.array([100.0 - 30 * int(path.stem.split("_")[2]) for path in paths])


def upside_down(paths):
    """The opposite of the oracle."""
    return 100 - oracle(paths)


@pytest.fixture(scope="module")
def judged(items):
    """A model that knows the levels and one that reverses them, on pictures with noise left out."""
    return judge_pictures(
        items,
        {"oracle": oracle, "upside down": upside_down},
        set_name="made up",
        mos_span=4,
        left_out=["noise"],
        num_resamples=20,
    )


def test_a_model_is_judged_by_set_degradation_and_ladder(judged):
    """The oracle has its ladders in order and a high SRCC overall and by degradation, the reversed
    model the negative of each; noise is marked as left out of training.
    """
    good, bad = (judged["models"][name] for name in ("oracle", "upside down"))
    assert good["agreement"]["srcc"]["value"] > 0.9
    assert bad["agreement"]["srcc"]["value"] == -good["agreement"]["srcc"]["value"]
    assert {k: a["num_pictures"] for k, a in good["degradations"].items()} == {
        "blur": 12,
        "noise": 8,
    }
    ladders = {row["degradation"]: row for row in good["ladders"]}
    assert ladders["blur"]["share_falling"] == ladders["noise"]["share_falling"] == 1
    assert (ladders["blur"]["in_training"], ladders["noise"]["in_training"]) == (True, False)
    assert ladders["blur"]["mean_drop_points"] == 60
    assert all(row["share_falling"] == 0 for row in bad["ladders"])
    difference = judged["differences"]["oracle - upside down"]
    assert difference["srcc"]["low"] > 1
    # MOS within a level differ by 0.1 from content to content: their deviation is 0.11 of 4
    assert good["agreement"]["rmse_logistic5"]["value"] == pytest.approx(0.11, abs=0.03)


def test_a_model_without_sense_is_named(items):
    """Too few scores, or NaN, are an error that names the model."""
    for scores in (np.ones(3), np.full(len(items), np.nan)):
        with pytest.raises(ValueError, match="broken gave scores"):
            judge_pictures(items, {"broken": lambda paths, s=scores: s}, set_name="made up")


@pytest.fixture
def broken(rated, tmp_path):
    """The table with a file of noise and half a JPEG among its 20 pictures."""
    folder = tmp_path / "broken"
    shutil.copytree(rated.parent, folder)
    (folder / "2_blur_1.png").write_bytes(np.random.default_rng(0).bytes(5000))
    whole = cv2.imencode(".jpg", cv2.imread(str(folder / "0_noise_2.png")))[1].tobytes()
    (folder / "0_noise_2.png").write_bytes(whole[: len(whole) // 2])
    return folder / rated.name


def test_broken_pictures_are_left_out_and_told(broken, tmp_path):
    """Two of 20 pictures cannot be read: named on standard error, in the JSON and below the table,
    and the other 18 are judged.
    """
    call = ["pictures", broken, "-o", tmp_path / "x.json", "--model", "student"]
    words = [*call, "--worst", "1", "--best", "5", "--num-resamples", "2"]
    done = CliRunner().invoke(commands.app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["num_pictures"] == 18
    assert result["left_out"] == {
        "2_blur_1.png": "Invalid data found when processing input",
        "0_noise_2.png": "the JPEG is cut off",
    }
    assert "left out: 2_blur_1.png: Invalid data" in done.stderr
    assert "Left out: " in done.stdout


def test_a_predictor_names_the_picture_that_cannot_be_read(broken, checkpoint, recipe):
    """Without the command that leaves it out, the error has the file's name."""
    predict = student_predictor(checkpoint, recipe.views)
    with pytest.raises(SourceError, match=r"2_blur_1\.png is no picture .*Invalid data"):
        predict([broken.parent / "2_blur_1.png"])


def test_a_table_with_gaps_can_be_judged(broken, capsys):
    """A row whose file is gone stops the reading and names the option; left out, 19 stay."""
    (broken.parent / "1_blur_0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 20 .*1_blur_0.*--missing leave-out"):
        read_table(broken, worst=1, best=5)
    with pytest.raises(FileNotFoundError, match="--missing leave-out"):
        CliRunner().invoke(
            commands.app,
            ["pictures", str(broken), "-o", "x", "--worst", "1", "--best", "5"],
            catch_exceptions=False,
        )
    assert len(read_table(broken, worst=1, best=5, missing="leave-out")) == 19
    assert "1 of 20 files of rated.csv are not there" in capsys.readouterr().err


def test_too_many_broken_pictures_stop_the_evaluation(broken, items):
    """With 21 broken ones nothing is scored: their number is told."""
    lost = [dataclasses.replace(items[0], path=broken.parent / "2_blur_1.png")] * 21
    many = [dataclasses.replace(item, name=str(i)) for i, item in enumerate(lost)]
    with pytest.raises(SourceError, match="21 pictures cannot be read and 20 may be left out"):
        readable(many)


def test_a_result_and_its_table_say_what_made_them(judged, tmp_path):
    """JSON holds versions, command and seed; the table is made of it alone, with its numbers."""
    path = tmp_path / "deep" / "result.json"
    write_result(judged, path, command="dgiqa-distill judge pictures x.csv")
    result = read_result(path)
    assert result["seed"] == 0
    assert {"scipy", "torch", "numpy"} <= set(result["packages"])
    assert list(path.parent.iterdir()) == [path]
    text = markdown(result)
    srcc = result["models"]["oracle"]["agreement"]["srcc"]
    assert f"| oracle | all | 20 | {srcc['value']:.3f} [{srcc['low']:.3f}" in text
    assert "| oracle | noise | no | 4 | 100.0 % | 30.0 |" in text
    assert text.endswith("Made by `dgiqa-distill judge pictures x.csv`.\n")
    result["models"]["oracle"]["agreement"]["srcc"]["value"] = 0.123
    assert "| oracle | all | 20 | 0.123 [" in markdown(result)
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| oracle | ")}
    assert widths == {9, 7}  # eight columns of figures, six of ladders


def test_a_file_that_is_no_result_is_refused(tmp_path):
    """Neither other JSON nor text makes a table."""
    for text, words in (("[1]", "no result"), ("hello", "no JSON")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_result(tmp_path / "a.json")


def test_a_table_of_ratings_is_read(items):
    """Twenty rows on 1..5 become MOS on 0..1, with content, degradation and level."""
    assert len(items) == 20
    assert (items[0].mos, items[0].content, items[0].level) == (pytest.approx(0.9), "0", 0)
    assert items[2].degradation == "noise"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("file,mos\na.png,1\n", ValueError, "no column"),
        ("path,mos\na.png,good\n", ValueError, "line 2: could not convert"),
        ("path,mos\na.png,1.5\n", ValueError, "line 2: needs .* '1.5'"),
        ("path,mos\nt.csv,1\nt.csv,1\n", ValueError, "more than once"),
        ("path,mos\nb.png,1\na.png,1\n", FileNotFoundError, "2 of 2 .* 'b.png'"),
    ],
)
def test_a_table_that_cannot_be_right_is_named(tmp_path, text, error, words):
    """A missing column, a MOS outside the scale, a file named twice or absent: one error each."""
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(error, match=words):
        read_table(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="no span"):
        read_table(tmp_path / "t.csv", worst=1, best=1)


def test_a_scale_may_run_the_other_way(tmp_path):
    """With 100 as the worst, as in DMOS, 20 becomes a MOS of 0.8."""
    (tmp_path / "t.csv").write_text("path,mos\nt.csv,20\n")
    assert read_table(tmp_path / "t.csv", worst=100, best=0)[0].mos == pytest.approx(0.8)


def test_the_served_model_scores_as_the_runtime_does(items):
    """The predictor of a shipped model gives the very scores of the runtime's scorer."""
    paths = [item.path for item in items[:10]]  # more than one batch
    with load_scorer("student") as scorer:
        rgb = cv2.cvtColor(cv2.imread(str(paths[9])), cv2.COLOR_BGR2RGB)
        found = scorer_predictor(scorer)(paths)
        assert found.shape == (10,)
        assert found[9] == pytest.approx(scorer.score(rgb), abs=1e-6)


def test_a_checkpoint_scores_as_its_student(items, checkpoint, recipe):
    """Scores are 100 times the student's quality of the recipe's views of the picture."""
    from dgiqa_stream.preprocess import cut_view
    from distill.data.build import read_picture

    found = student_predictor(checkpoint, recipe.views)([item.path for item in items[:9]])
    student = Student()
    student.load_state_dict(torch.load(checkpoint, weights_only=True))
    planes = read_picture(items[8].path)
    views = [torch.from_numpy(cut_view(planes, view))[None] for view in recipe.views]
    with torch.no_grad():
        assert found[8] == pytest.approx(100 * student.eval()(*views).item(), abs=1e-3)


class Brightness(torch.nn.Module):
    """A teacher that takes the red of a crop for its quality and has no use for depth."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([0.229, 0.485]))  # ImageNet's

    def forward(self, picture, depth):
        """The mean of red before it was normalised."""
        assert (depth < 0).all()  # a normalised 0
        return (picture[:, 0] * self.scale[0] + self.scale[1]).mean((1, 2))


def test_a_teacher_sees_a_fixed_grid_of_crops(tmp_path):
    """Of a picture of 384x384 whose left 80 columns are white, crops at 0, 80 and 160 see 80/224
    of white, 0 and 0; scores do not change from call to call.
    """
    picture = np.zeros((384, 384, 3), np.uint8)
    picture[:, :80] = 255
    path = tmp_path / "left.png"
    cv2.imwrite(str(path), picture)
    predict = depth_free_predictor(Brightness())
    (found,) = predict([path])
    assert found == pytest.approx(100 * (80 / 224) / 3, abs=0.05)
    assert predict([path]) == found


def test_the_second_teacher_can_be_judged(items):
    """A GlintIQA-style teacher of random weights gives one finite score on 0..100 a picture."""
    pytest.importorskip("timm")
    from distill.models.glint import GlintConfig, GlintIQA

    options = {"depth": 4, "embed_dim": 24, "num_heads": 3}
    teacher = GlintIQA(GlintConfig("vit_tiny_patch16_224", "test_resnet", vit_options=options))
    found = depth_free_predictor(teacher)([item.path for item in items[:2]])
    assert found.shape == (2,)
    assert ((found > 0) & (found < 100)).all()


def test_a_teacher_with_depth_is_told_where_pictures_lie(items, tmp_path):
    """DGIQA with depth maps from a folder scores each picture with its own map, as its scorer does
    for that picture alone.
    """
    pytest.importorskip("timm")
    from distill.data.build import read_picture
    from distill.data.depth import open_depth
    from distill.models.teacher import Dgiqa, TeacherSpec
    from distill.models.teacher_file import LoadedTeacher
    from distill.teacher_score import GridProtocol, teacher_scorer

    paths = [item.path for item in items[:2]]
    for shift, path in enumerate(paths):
        ramp = np.tile(np.linspace(0, 255, 240), (230, 1)) * (1 - shift)
        cv2.imwrite(str(tmp_path / f"{path.stem}.png"), ramp.astype(np.uint8))
    torch.manual_seed(1)
    spec = TeacherSpec("mobilenetv2", (8, 8, 8, 8), num_heads=4, pooled_channels=16)
    teacher = LoadedTeacher(Dgiqa(spec).eval(), "0", "0" * 64, 1)
    depth = open_depth(str(tmp_path))
    with teacher_scorer(
        teacher, depth, path=tmp_path / "t", protocol=GridProtocol(1, 1), device="cpu"
    ) as scorer:
        found = scorer_predictor(scorer)(paths)
        with scorer.reading(str(paths[1])):
            alone = scorer.predict([read_picture(paths[1])])[0].score
        with scorer.reading(str(paths[0])):
            other_map = scorer.predict([read_picture(paths[1])])[0].score
    assert found[1] == pytest.approx(alone)
    assert abs(other_map - alone) > 1e-6


@pytest.fixture(scope="module")
def clips(make_picture, tmp_path_factory):
    """Three moving clips of a second at CRF 10, 38 and 50, and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    found = []
    for i, crf in enumerate((10, 38, 50)):
        rgb = make_picture(7, 240, 300)
        frames = [rgb[t : t + 216, 2 * t : 2 * t + 240] for t in range(24)]
        path = folder / f"crf{crf}.mp4"
        path.write_bytes(encode(frames, "libx264", crf, preset="veryfast"))
        found.append(RatedItem(path.name, path, path.stem, 0.9 - 0.4 * i, None, "test"))
    broken = folder / "broken.mp4"
    broken.write_bytes(b"this is no film" * 9)
    return [*found, RatedItem("broken.mp4", broken, "broken", 0.5, None, "test")]


@pytest.fixture(scope="module")
def scored(clips):
    """The clips through the real pipeline with the shipped student."""
    with load_scorer("student") as scorer:
        return score_clips(clips, scorer, config=StreamConfig())


def test_clips_go_through_the_real_pipeline(clips, scored):
    """Frames, minimum and maximum of each clip are those of the frame scores that the runtime gives
    for the same file, and every other pooler lies between; the clips differ.
    """
    with load_scorer("student") as scorer:
        frames = [
            [f.score for f in score_frames(str(c.path), scorer, config=StreamConfig())]
            for c in clips[:3]
        ]
    for clip, scores in zip(scored, frames, strict=False):
        assert clip.num_frames == len(scores) >= 4
        assert clip.pool["min"] == pytest.approx(min(scores))
        assert clip.pool["max"] == pytest.approx(max(scores))
        assert set(clip.pool) == set(POOLERS)
        for pooler in set(POOLERS) - {"stdev"}:
            assert min(scores) - 1e-6 <= clip.pool[pooler] <= max(scores) + 1e-6
        assert not clip.error
    assert len({clip.pool["mean"] for clip in scored[:3]}) == 3


def test_a_clip_that_fails_is_kept_with_its_reason(scored):
    """The file that is no film has no scores, and the runtime's own error without any folder."""
    assert scored[3].num_frames == 0
    assert scored[3].error.startswith("broken.mp4: ")
    assert set(scored[3].pool.values()) == {None}


def test_every_pooler_is_compared(scored):
    """Clips copied to seven levels of MOS: the mean's SRCC is 1 as the minimum's is, the deviation
    does not follow, a failed clip is named, and the table holds every pooler.
    """
    many = [
        ScoredClip(f"{k}", 0.9 - 0.1 * k, 5, dict.fromkeys(POOLERS, 90.0 - 9 * k) | {"stdev": 3.0})
        for k in range(7)
    ]
    result = judge_clips([*many, scored[3]], set_name="made up", num_resamples=10)
    assert set(result["poolers"]) == set(POOLERS)
    assert result["poolers"]["mean"]["srcc"]["value"] == 1
    assert result["poolers"]["stdev"]["srcc"]["value"] is None
    assert list(result["left_out"]) == ["broken.mp4"]
    text = markdown(result)
    assert "| hysteresis | 7 | 1.000 [1.000, 1.000] |" in text
    assert "Left out: broken.mp4." in text
    json.dumps(result, allow_nan=False)


def test_too_few_clips_are_refused(scored):
    """Three whole clips are too few for a correlation."""
    with pytest.raises(ValueError, match="5 or more"):
        judge_clips(scored, set_name="made up")


def test_the_commands_judge_and_print(rated, clips, checkpoint, recipe_file, tmp_path):
    """``pictures`` with a served model and a checkpoint, ``clips`` and ``table`` end in a JSON and
    the same table of it.
    """
    runner = CliRunner()
    output = tmp_path / "pictures.json"
    few = ["--num-resamples", "5"]
    mos = ["--worst", "1", "--best", "5"]
    models = ["--model", "student", "--student", checkpoint, "--recipe", recipe_file]
    call = ["pictures", rated, "-o", output, *models, *mos, *few]
    done = runner.invoke(commands.app, [str(word) for word in call], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"| {checkpoint.parent.name}/best.pt | blur |" in done.output
    result = json.loads(output.read_text())
    assert result["mos_span"] == 4
    assert list(result["served"]) == ["student"]
    again = runner.invoke(commands.app, ["table", str(output)], catch_exceptions=False)
    assert again.output.strip() in done.output

    lines = [f"{i.path},{i.mos},{i.name}-{k}" for k in range(2) for i in clips[:3]]
    (tmp_path / "clips.csv").write_text("\n".join(["path,mos,name", *lines]))
    call = ["clips", tmp_path / "clips.csv", "-o", tmp_path / "clips.json", *few]
    done = runner.invoke(commands.app, [str(word) for word in call], catch_exceptions=False)
    assert "| mean | 6 | " in done.output
    assert json.loads((tmp_path / "clips.json").read_text())["served"]["student"]["sha256"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pictures", "koniq10k", "-o", "x.json", "--model", "student"], "koniq10k needs --root"),
        (["pictures", "koniq9k", "-o", "x.json", "--model", "student"], "no rated set .*koniq9k"),
        (["pictures", "TABLE", "-o", "x.json"], "give models"),
        (
            ["pictures", "TABLE", "-o", "x.json", "--split", "train", "--model", "student"],
            "has 0 files in part 'train'",
        ),
    ],
)
def test_commands_say_what_is_missing(rated, words, message):
    """A set without its folder, an unknown set, no model and an empty part: one error each."""
    words = [str(rated) if word == "TABLE" else word for word in words]
    mos = ["--worst", "1", "--best", "5"]
    with pytest.raises((ConfigError, ValueError), match=message):
        CliRunner().invoke(commands.app, [*words, *mos], catch_exceptions=False)
