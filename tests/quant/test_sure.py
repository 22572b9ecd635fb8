"""Two more outputs: how wrong a score probably is, and whether its picture is of a known kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import helper, numpy_helper  # noqa: E402

from quant.extra_outputs import Reader, add_outputs_, remove_outputs_  # noqa: E402
from quant.head import Features, HeadConfig, Labels  # noqa: E402
from quant.kernel_ridge import KernelRidge  # noqa: E402
from quant.sure import Known, SureConfig, fit_, look_errors  # noqa: E402

NUM_FEATURES = 24
QUICK = SureConfig(width=16, num_steps=400, batch=64, rate=5e-3, dropout=0.1)
HEAD = HeadConfig(num_looks=2)


def headed(*, seed: int = 0, last: str = "Sigmoid"):
    """A graph that ends as a student's does: features, two Gemm nodes and a sigmoid."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (8, NUM_FEATURES), "b": (8,), "v": (1, 8), "c": (1,)}
    constants = [
        numpy_helper.from_array(rng.standard_normal(s).astype(np.float32) / 3, n)
        for n, s in shapes.items()
    ]
    nodes = [
        helper.make_node("Abs", ["x"], ["features"], name="abs_0"),
        helper.make_node("Gemm", ["features", "w", "b"], ["hidden"], name="gemm_1", transB=1),
        helper.make_node("Relu", ["hidden"], ["shown"], name="relu_2"),
        helper.make_node("Gemm", ["shown", "v", "c"], ["logit"], name="gemm_3", transB=1),
        helper.make_node(last, ["logit"], ["quality"], name="last_4"),
    ]
    x, quality = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", width])
        for name, width in (("x", NUM_FEATURES), ("quality", 1))
    )
    inner = helper.make_graph(nodes, "headed", [x], [quality], constants)
    opset = helper.make_opsetid("", 20)
    return helper.make_model(inner, opset_imports=[opset], ir_version=9)


def run(graph, x: np.ndarray) -> dict[str, np.ndarray]:
    """Every output of a graph, (N,) each."""
    import onnxruntime as ort

    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    found = session.run(names, {"x": x.astype(np.float32)})
    return {n: v.reshape(len(x)) for n, v in zip(names, found, strict=True)}


def reader(seed: int, width: int = 5) -> Reader:
    """One of random weights."""
    rng = np.random.default_rng(seed)
    return Reader(
        rng.standard_normal((width, NUM_FEATURES)) / 4,
        rng.standard_normal(width),
        rng.standard_normal((1, width)),
        rng.standard_normal(1),
    )


@pytest.mark.parametrize("ridge", [0.1, 1.0])
def test_leave_one_out_is_leaving_one_out(ridge):
    """The closed form gives what fitting to all but one picture does, for each of 40: to 1e-6 with
    the kernel of all and its scale, which is float32's rounding of distances at most.
    """
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 6)).astype(np.float32)
    mos = rng.uniform(size=40).astype(np.float32)
    teacher = KernelRidge(x, mos, width=1.5, ridge=ridge)
    kernel = np.exp(-teacher._scale * teacher._squared_distances(teacher._known)).astype(float)
    wanted = []
    for i in range(40):
        rest = np.arange(40) != i
        system = kernel[np.ix_(rest, rest)] + ridge * np.eye(39)
        dual = np.linalg.solve(system, mos[rest] - float(mos.mean()))
        wanted.append(mos[i] - (kernel[i, rest] @ dual + float(mos.mean())))
    found = teacher.leave_one_out_errors()
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(found).mean() > 1.05 * np.abs(mos - teacher(x)).mean()  # training errors are less


def test_the_graph_gives_what_the_readers_say():
    """Both outputs equal the readers' formula on the graph's features to float32's rounding, with
    widths that differ; parameters are counted; only kinds of node that the head has are added.
    """
    graph, x = headed(), np.random.default_rng(1).standard_normal((9, NUM_FEATURES))
    kinds = {n.op_type for n in graph.graph.node}
    spread, unfamiliar = reader(1, 5), reader(2, 3)
    added = add_outputs_(graph, spread=spread, unfamiliar=unfamiliar)
    found = run(graph, x)
    assert list(found) == ["quality", "spread", "unfamiliar"]
    np.testing.assert_allclose(found["spread"], spread(np.abs(x)), atol=1e-6)
    np.testing.assert_allclose(found["unfamiliar"], unfamiliar(np.abs(x)), atol=1e-6)
    assert {n.op_type for n in graph.graph.node} == kinds
    assert added == 8 * (NUM_FEATURES + 1) + 2 * (8 + 1)


def test_quality_is_the_same_to_the_last_bit():
    """Neither adding the outputs nor removing them changes quality, and removing gives the graph
    that was, byte by byte.
    """
    graph, x = headed(), np.random.default_rng(1).standard_normal((33, NUM_FEATURES))
    before, plain = run(graph, x)["quality"], graph.SerializeToString(deterministic=True)
    added = add_outputs_(graph, spread=reader(1), unfamiliar=reader(2))
    np.testing.assert_array_equal(run(graph, x)["quality"], before)
    assert remove_outputs_(graph) == added
    assert graph.SerializeToString(deterministic=True) == plain
    assert remove_outputs_(graph) == 0


def test_lines_of_the_features_are_folded_in():
    """A reader after lines says of features what it says of corrected ones, to rounding."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((7, NUM_FEATURES)).astype(np.float32)
    slope, offset = rng.uniform(0.5, 2, NUM_FEATURES), rng.standard_normal(NUM_FEATURES)
    plain = reader(3)
    found = plain.after_lines(slope, offset)(x)
    np.testing.assert_allclose(found, plain((x * slope + offset).astype(np.float32)), atol=1e-6)


def test_a_graph_without_the_quality_head_is_refused():
    """A graph that ends otherwise is named for what it is, before anything is fitted."""
    with pytest.raises(ValueError, match="two and a Sigmoid are known"):
        add_outputs_(headed(last="Tanh"), spread=reader(1), unfamiliar=reader(2))


@pytest.fixture(scope="module")
def known() -> Known:
    """Rated pictures whose noise doubles with their first feature, in two looks; ladders that end
    far out in the second one; strange ones far out in the third.
    """
    rng = np.random.default_rng(8)
    x = np.abs(rng.standard_normal((500, NUM_FEATURES))).astype(np.float32)
    noise = np.where(x[:, 0] > 0.7, 0.25, 0.02) * rng.standard_normal(500)
    mos = np.clip(0.5 + 0.15 * (x[:, 3] - 0.8) + noise, 0, 1)
    level = np.tile(np.arange(5), 40)
    ladders = np.abs(rng.standard_normal((40, 1, NUM_FEATURES))).repeat(5, 1).reshape(200, -1)
    ladders[:, 1] += 2 * level
    strange = np.abs(rng.standard_normal((150, NUM_FEATURES)))
    strange[:, 2] += 5
    nan = np.full(1000, np.nan)
    labels = Labels(
        np.concatenate([mos, mos, nan[:200]]).astype(np.float32),
        np.concatenate([np.full(1000, -1), np.repeat(np.arange(40), 5)]),
        np.concatenate([np.zeros(1000, int), level]),
        np.concatenate([nan, 1 - level / 8]).astype(np.float32),
        np.ones(1200, np.float32),
    )
    of_float = np.concatenate([x, x * 1.01, ladders]).astype(np.float32)
    of_int8 = (of_float * 0.9 + 0.05).astype(np.float32)
    looks = Features(of_float, of_int8, labels)
    strange = strange.astype(np.float32)
    return Known(looks, np.ones(1200, bool), strange, (strange * 0.9 + 0.05).astype(np.float32))


@pytest.fixture(scope="module")
def fitted(known):
    """The float and the INT8 graph with both outputs, and the parameters of these."""
    graphs = headed(), headed()
    return *graphs, fit_(*graphs, known, HEAD, QUICK)


def fresh(seed: int = 21) -> np.ndarray:
    """New features as those of rated pictures."""
    return np.abs(np.random.default_rng(seed).standard_normal((400, NUM_FEATURES)))


def test_spread_says_where_ratings_scatter(fitted):
    """On new pictures the mean spread is at least 1.7 times as large where ratings scatter as where
    they do not, and lies there within a third of the mean |error|, 0.25 sqrt(2 / pi) = 0.2.
    """
    x = fresh()
    spread = run(fitted[0], x)["spread"]
    wide = x[:, 0] > 1.0
    calm = x[:, 0] < 0.4
    assert spread[wide].mean() >= 1.7 * spread[calm].mean()
    assert spread[wide].mean() == pytest.approx(0.2, rel=1 / 3)


def test_unfamiliar_tells_new_strange_pictures(fitted):
    """Of new strange pictures 95 % lie above 0.5 and of new known ones 95 % below."""
    x = fresh()
    assert (run(fitted[0], x)["unfamiliar"] < 0.5).mean() >= 0.95
    x[:, 2] += 5
    assert (run(fitted[0], x)["unfamiliar"] > 0.5).mean() >= 0.95


def test_both_precisions_say_the_same(fitted):
    """Where INT8 features are a line of the float ones, its graph says the same to a hundredth:
    its weights are rounded to 127 steps of their row's largest.
    """
    x = fresh()
    float_says, int8_says = run(fitted[0], x), run(fitted[1], x * 0.9 + 0.05)
    for name in ("spread", "unfamiliar"):
        np.testing.assert_allclose(int8_says[name], float_says[name], atol=1e-2)


def test_a_second_fit_replaces_the_first(fitted, known):
    """Fitting the result again gives the same graphs, byte by byte, and the same parameters."""
    again = [onnx.ModelProto.FromString(g.SerializeToString()) for g in fitted[:2]]
    assert fit_(*again, known, HEAD, QUICK) == fitted[2]
    for graph, was in zip(again, fitted[:2], strict=True):
        assert graph.SerializeToString(deterministic=True) == was.SerializeToString(
            deterministic=True
        )


def test_what_a_ladder_says_of_errors(known):
    """A clean picture is wrong by as much as a rated one is on average; a degraded one by that
    share of it and, at a right angle, by how much its quality misses clean quality x pseudo-MOS;
    without a pseudo-MOS nothing is said, and all looks at a rated picture share its error.
    """
    graph = headed()
    errors = look_errors(graph, known.looks, HEAD)
    rated = KernelRidge(
        known.looks.of_float[:500], known.looks.labels.mos[:500], width=1.5, ridge=0.25
    )
    alone = np.abs(rated.leave_one_out_errors())
    np.testing.assert_allclose(errors[:500], alone, atol=1e-6)
    np.testing.assert_array_equal(errors[500:1000], errors[:500])
    quality = run(graph, known.looks.of_float)["quality"]  # Abs changes nothing: all are positive
    share = 1 - np.arange(5) / 8
    wanted = np.hypot(quality[1000:1005] - quality[1000] * share, alone.mean() * share)
    np.testing.assert_allclose(errors[1000:1005], wanted, atol=1e-5)
    labels = known.looks.labels
    silent = replace(labels, pseudo_mos=labels.pseudo_mos * np.nan)
    unsaid = look_errors(graph, Features(known.looks.of_float, known.looks.of_int8, silent), HEAD)
    assert np.isnan(unsaid[1001:1005]).all()
    assert unsaid[1000] == pytest.approx(alone.mean())
