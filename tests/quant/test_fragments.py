"""``dgiqa-quant fragments`` from two files and packs to a student that sees its fragments anew."""

from __future__ import annotations

import json
import shutil
import warnings

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

import quant.folds  # noqa: E402
from dgiqa_stream.errors import ConfigError  # noqa: E402
from dgiqa_stream.manifest import load_model  # noqa: E402
from dgiqa_stream.preprocess import make_batch  # noqa: E402
from dgiqa_stream.scorer import load_scorer, planes_of_rgb  # noqa: E402
from distill.data.packed import Pack, Record, as_planes_420, write_pack  # noqa: E402
from distill.models.trunks import INPUT_MEAN, INPUT_STD  # noqa: E402
from quant.export_onnx import write_model, write_successor  # noqa: E402
from quant.fragments import Beside, FragmentsConfig, Lessons, Said, lesson_loss  # noqa: E402
from quant.fragments_command import fragments  # noqa: E402
from quant.fragments_training import Teaching  # noqa: E402
from quant.head import HeadConfig, Labels  # noqa: E402
from quant.leave_out_command import leave_out  # noqa: E402
from quant.proof.figures import float_convs, read_graph  # noqa: E402
from quant.ptq import Int8StaticConfig, quantize_onnx  # noqa: E402
from quant.qat import Ranges  # noqa: E402
from quant.refit_command import refit  # noqa: E402
from quant.rounded_tensors import trained_spans  # noqa: E402

SETTINGS = """
[fragments]
widths = [8, 8, 16, 16]
num_heads = 2
head_width = 8
num_steps = 120
batch = 32
ladders_at_once = 2
rate = 3e-3
rating_share = 1.0
agreement_weight = 1.0
[head]
num_looks = 2
num_ladders = 4
num_heads = 1
width = 16
num_steps = 200
fall_weight = 0.0
taught_by = "regression"
"""
HEIGHT, WIDTH = 256, 320
COUNTED = ("trunk", "fragment_trunk", "hidden", "quality")


def picture(seed: int, grain: float) -> np.ndarray:
    """One of four scenes with grain of one pixel that is gone from a reduced picture; (H, W, 3)."""
    rng = np.random.default_rng(seed % 4)
    coarse = rng.uniform(60, 190, (4, 4, 3)).repeat(HEIGHT // 4, 0).repeat(WIDTH // 4, 1)
    checks = np.indices((HEIGHT, WIDTH)).sum(0) % 2 * 2.0 - 1.0
    return np.clip(coarse + 60 * grain * checks[..., None], 0, 255).astype(np.uint8)


def grain_of(seed: int) -> float:
    """How much grain a rated picture has, 0..1; people like it 1 - grain."""
    return float(np.random.default_rng([7, seed]).uniform())


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Pictures rated by their grain, and ladders of it."""
    folder = tmp_path_factory.mktemp("packs")
    about = {"made_by": "test", "settings": {}}
    rated = [
        (
            Record(f"{i}", f"{i}", "train" if i < 120 else "validation", mos=1 - grain_of(i)),
            as_planes_420(picture(i, grain_of(i))),
        )
        for i in range(128)
    ]
    write_pack(folder / "rated", rated, **about)
    ladders = [
        (
            Record(f"{c}/{level}", f"c{c}", "train", degradation=name, level=level),
            as_planes_420(picture(100 + c, level / 3)),
        )
        for c in range(4)
        for level, name in enumerate(("clean", "grain", "grain", "grain"))
    ]
    write_pack(folder / "ladders", ladders, **about)
    return folder


@pytest.fixture(scope="module")
def former(trained_student, graph, specs, batches, tmp_path_factory):
    """The files of a student whose fragments pass its trunk, float and INT8."""
    folder = tmp_path_factory.mktemp("former")
    about = {
        "name": "small",
        "version": "1",
        "views": specs,
        "normalisation": (INPUT_MEAN, INPUT_STD),
        "num_parameters": sum(p.numel() for p in trained_student.parameters()),
        "made_by": "x",
        "history": [{"step": "train"}],
    }
    graph = onnx.ModelProto.FromString(graph.SerializeToString())
    small = quantize_onnx(graph, Int8StaticConfig(), batches[:16])
    write_model(graph, folder / "f.onnx", precision="fp32", **about)
    write_model(small, folder / "q.onnx", precision="int8", **about)
    return folder / "f.onnx", folder / "q.onnx"


@pytest.fixture
def config(tmp_path):
    """The settings' file."""
    path = tmp_path / "fragments.toml"
    path.write_text(SETTINGS)
    return path


def teach(former, packs, config, folder, **options):
    """Run the command; what it wrote."""
    made = folder / "made.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fragments(
            *former,
            config=config,
            packs=packs,
            output=made,
            run=folder / "run",
            device="cpu",
            threads=1,
            **options,
        )
    return made


def scores(path):
    """Scores of pictures that nobody was taught, and their grain."""
    grains = np.linspace(0, 1, 12)
    with load_scorer(path) as scorer:
        said = scorer.predict([planes_of_rgb(picture(300 + i, g)) for i, g in enumerate(grains)])
    return np.array([p.score for p in said]), grains


def test_what_only_native_pixels_show_is_learnt(former, packs, config, tmp_path):
    """Of unseen pictures the taught student orders the grain, which reducing takes away; the trunk
    of the whole view has stayed; and INT8 with one head for both, taught by the float model's own,
    agrees as far as this trunk of random weights lets it, whose features hardly differ.
    """
    made = teach(former, packs, config, tmp_path)
    found, grains = scores(made)
    assert np.corrcoef(found, grains)[0, 1] < -0.9
    before, after = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer}
        for p in (former[0], made)
    )
    kept = [name for name in before if name.startswith("trunk.") and name in after]
    assert len(kept) > 50
    assert all(np.array_equal(before[name], after[name]) for name in kept)
    manifest = load_model(made).manifest
    assert [step["step"] for step in manifest.history] == ["train", "fragments"]
    assert manifest.history[-1]["settings"]["head_width"] == 8
    counted = sum(a.size for n, a in after.items() if n.split(".")[0] in COUNTED)
    assert manifest.num_parameters == counted
    settings = config.with_name("int8.toml")
    settings.write_text(SETTINGS.replace('"regression"', '"own_head"'))
    quantised = int8_of(made, packs, tmp_path / "q.onnx")
    assert np.corrcoef(scores(quantised)[0], found)[0, 1] > 0.9
    refit(made, quantised, config=settings, packs=packs)
    one, two = scores(made)[0], scores(quantised)[0]
    assert np.corrcoef(one, grains)[0, 1] < -0.9
    assert np.corrcoef(one, two)[0, 1] > 0.9
    with pytest.raises(ConfigError, match="leave --falls-of away"):
        refit(made, quantised, config=settings, packs=packs, falls_of=str(made))


def int8_of(model, packs, path):
    """Its INT8 file, calibrated on rated pictures; every convolution is quantised."""
    source = load_model(model)
    views = source.manifest.preprocess.views
    pack = Pack(packs / "rated")
    batches = [dict(make_batch([pack.planes(r)], views).views) for r in pack.records[:16]]
    made = quantize_onnx(read_graph(source), Int8StaticConfig(), batches)
    assert not float_convs(made)
    write_successor(
        made, path, source.manifest, step={"step": "int8"}, made_by="x", precision="int8"
    )
    return path


def test_a_run_that_was_interrupted_ends_alike(former, packs, config, tmp_path):
    """Taken up again from its checkpoint it writes the very bytes of a run that was not stopped;
    with other settings it is refused.
    """
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config.write_text(SETTINGS.replace("num_steps = 120", "num_steps = 12"))
    whole = teach(former, packs, config, tmp_path / "a")
    teach(former, packs, config, tmp_path / "b", steps=5)
    assert teach(former, packs, config, tmp_path / "b").read_bytes() == whole.read_bytes()
    config.write_text(SETTINGS.replace("head_width = 8", "head_width = 12"))
    with pytest.raises(ConfigError, match=r"begun with something else as \[fragments\]"):
        teach(former, packs, config, tmp_path / "b")


def test_what_cannot_be_taught_is_told_before_the_work(former, packs, config, tmp_path):
    """Files in the wrong order, an output in no folder and an unknown setting."""
    with pytest.raises(ConfigError, match=r"q\.onnx and f\.onnx are int8 and fp32"):
        teach(former[::-1], packs, config, tmp_path)
    with pytest.raises(ConfigError, match="name a file in a folder that is there"):
        teach(former, packs, config, tmp_path / "gone")
    config.write_text(SETTINGS.replace("widths", "breadths"))
    with pytest.raises(ConfigError, match="breadths"):
        teach(former, packs, config, tmp_path)
    assert list(tmp_path.iterdir()) == [config]


def test_heads_that_are_left_in_the_dark_are_not_taught_by_one_that_knows(
    former, packs, config, tmp_path
):
    """``leave-out`` refuses the head of a student that was taught all kinds as a teacher."""
    config.write_text(SETTINGS.replace('"regression"', '"own_head"'))
    for seed in range(2):
        cv2.imwrite(str(tmp_path / f"clic_{seed}.png"), picture(seed, 0.0))
    with pytest.raises(ConfigError, match='give settings with "regression"'):
        leave_out(
            *former,
            config=config,
            packs=packs,
            shards=[tmp_path],
            pristine=[tmp_path],
            output=tmp_path / "o.json",
            folds=2,
            contents=1,
        )


def test_each_fold_teaches_a_trunk_that_knows_fewer_kinds(
    former, packs, config, tmp_path, monkeypatch
):
    """``leave-out --run``: no fold's trunk is shown a ladder of what it is judged on; a run that is
    there goes on, to the same figures, and is refused under other settings.
    """
    config.write_text(SETTINGS.replace("num_steps = 120", "num_steps = 12"))
    kinds = ("gaussian_noise", "jpeg")
    ladders = [
        (
            Record(f"{c}/{level}", f"c{c}", "train", degradation=name, level=level),
            as_planes_420(picture(100 + c, level / 2)),
        )
        for c in range(4)
        for level, name in enumerate(("clean", kinds[c % 2], kinds[c % 2]))
    ]
    shutil.copytree(packs, tmp_path / "packs")
    shutil.rmtree(tmp_path / "packs" / "ladders")
    write_pack(tmp_path / "packs" / "ladders", ladders, made_by="test", settings={})
    (tmp_path / "clean").mkdir()
    for seed in range(2):
        cv2.imwrite(str(tmp_path / "clean" / f"clic_{seed}.png"), picture(seed, 0.0))
    taught = []

    class Watched(Teaching):
        def __init__(self, looks, *args, **more):
            taught.append({record.degradation for _, record, _ in looks.drawn} - {"", "clean"})
            super().__init__(looks, *args, **more)

    monkeypatch.setattr(quant.folds, "Teaching", Watched)

    def left_out():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            leave_out(
                *former,
                config=config,
                packs=tmp_path / "packs",
                shards=[],
                pristine=[tmp_path / "clean"],
                output=tmp_path / "o.json",
                kind=list(kinds),
                folds=2,
                contents=2,
                heads=1,
                run=tmp_path / "run",
                device="cpu",
                threads=1,
            )
        return json.loads((tmp_path / "o.json").read_text())

    found = left_out()
    assert taught == [{"jpeg"}, {"gaussian_noise"}]
    assert found["settings"]["folds"] == [["gaussian_noise"], ["jpeg"]]
    assert found["settings"]["fragments"]["num_steps"] == 12
    assert found["settings"]["fragments"]["num_heads"] == 1
    assert set(found["by_kind"]) == set(kinds)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "without_gaussian_noise",
        "without_jpeg",
    }
    assert left_out()["by_kind"] == found["by_kind"]
    config.write_text(config.read_text().replace("head_width = 8", "head_width = 12"))
    with pytest.raises(ConfigError, match="begun with something else"):
        left_out()


def test_a_lesson_is_decided_by_its_number():
    """The same number gives the same looks, another one others; rated looks come first."""
    ladder = np.array([-1] * 50 + [0] * 4 + [1] * 4)
    level = np.array([0] * 50 + [0, 1, 2, 3] * 2)
    nothing = np.full(58, np.nan, np.float32)
    labels = Labels(nothing, ladder, level, nothing, nothing)
    config = FragmentsConfig(batch=40, ladders_at_once=2)
    one, again, other = (
        Lessons(labels, config)(3),
        Lessons(labels, config)(3),
        Lessons(labels, config)(4),
    )
    assert torch.equal(one.chosen, again.chosen)
    assert one.rng.integers(1 << 30) == again.rng.integers(1 << 30)
    assert not torch.equal(one.chosen, other.chosen)
    assert (one.chosen[:40] < 50).all()
    assert (one.chosen[40:] >= 50).all()
    assert one.worse_by[0].tolist()[:4] == [0, 1, 2, 3]


def test_one_head_says_the_mean_of_the_taught_ones():
    """Two layers of the states that a student is given say what all heads say in the mean."""
    torch.manual_seed(3)
    config = FragmentsConfig(num_heads=3, head_width=4)
    trunk = torch.nn.Flatten()
    net = Beside(trunk, num_own=12, num_given=5, num_kinds=2, config=config).eval()
    given, pictures = torch.randn(2, 7, 5), torch.randn(7, 3, 2, 2)
    with torch.no_grad():
        said = net(given, pictures, torch.autocast("cpu", enabled=False))
        hidden, quality = torch.nn.Linear(17, 12), torch.nn.Linear(12, 1)
        hidden.load_state_dict(net.hidden_state())
        quality.load_state_dict(net.quality_state())
        own = net.norm(pictures.flatten(1))
        found = [quality(torch.relu(hidden(torch.cat([x, own], 1)))).squeeze(1) for x in given]
    assert said.logits.shape == (3, 2, 7)
    assert said.logits.std(0).min() > 1e-3
    torch.testing.assert_close(torch.stack(found), said.logits.mean(0))


def test_disagreement_between_the_precisions_costs():
    """The loss grows by the weight times the mean squared difference of the two logits."""
    config, head = FragmentsConfig(agreement_weight=10.0, own_weight=0.0), HeadConfig()
    wanted, kinds, worse_by = torch.zeros(4), torch.full((4,), -1), torch.zeros(0, 0)

    def loss(apart):
        logits = torch.tensor([[[apart] * 4, [-apart] * 4]])
        return lesson_loss(
            Said(logits, torch.zeros(4), torch.zeros(4, 2)), wanted, kinds, worse_by, config, head
        )

    assert loss(0.0) == 0
    # each logit is 0.1 from what is wanted: smooth L1 with beta 0.5 gives 0.1 ** 2 / (2 * 0.5)
    assert loss(0.1).item() == pytest.approx(10 * 0.2**2 + 0.1**2 / (2 * 0.5))


def test_ranges_may_be_older_than_the_fragments_trunk(former, packs, config, tmp_path):
    """Ranges trained for the trunk are used, and what the new one makes is measured."""
    config.write_text(SETTINGS.replace("num_steps = 120", "num_steps = 1"))
    graph = onnx.load(teach(former, packs, config, tmp_path))
    convs = {n.input[1].removesuffix(".weight") for n in graph.graph.node if n.op_type == "Conv"}
    known = {name: (0.0, 6.0) for name in convs if name.startswith("trunk.")}
    blocks = {f"trunk.blocks.{j}": (-3.0, 3.0) for j in (2, 4, 5, 7, 8, 9, 11, 12, 14, 15)}
    spans = trained_spans(graph, Ranges(conv=known, add=blocks))
    makers = {o: n for n in graph.graph.node for o in n.output}
    weights = {makers[s].input[1] for s in spans if makers[s].op_type == "Conv"}
    assert weights == {f"{name}.weight" for name in known}
    del known["trunk.stem"]
    with pytest.raises(ValueError, match=r"trunk\.stem"):
        trained_spans(graph, Ranges(conv=known, add=blocks))
