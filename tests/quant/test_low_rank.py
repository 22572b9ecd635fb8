"""Low-rank layers against closed forms: exact where they can be, optimal where they cannot."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from quant.low_rank.config import LowRankConfig  # noqa: E402
from quant.low_rank.factorize import factorize_  # noqa: E402
from quant.low_rank.factors import LayerFactors  # noqa: E402
from quant.low_rank.layers import cost_of, empty_factors, pays, shape_of  # noqa: E402
from quant.low_rank.linear import whitener  # noqa: E402
from quant.low_rank.statistics import gather  # noqa: E402
from quant.low_rank.tucker import best_outputs, hooi, refined, weighted_tucker  # noqa: E402

DAMPING = 1e-4
FLOAT32_ROUNDING = 2e-5
"""Of outputs of size 1, through up to three layers of up to 200 products each."""


def drawn(seed: int, *shape: int, dtype=torch.float64):
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factors_of(layer, x, **settings) -> LayerFactors:
    """How a layer that reads ``x`` can be factored."""
    config = LowRankConfig(damping=DAMPING, **settings)
    found = gather(layer, {"": layer}, [(x,)], largest_side=config.largest_covariance_side)
    return LayerFactors(layer, found[""], config)


def correlated(seed: int, num: int, side: int):
    """Rows whose directions differ in size by a factor of about 30."""
    return (drawn(seed, num, side) * torch.logspace(0, -1.5, side)) @ drawn(seed + 1, side, side)


def weighted_norm(error, x) -> float:
    """Squared norm of a matrix (T, S) on rows x (N, S), damped as the config says; by numpy."""
    moments = x.T @ x / len(x)
    moments += DAMPING * np.trace(moments) / len(moments) * np.eye(len(moments))
    return float(np.trace(error @ moments @ error.T))


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_the_svd_is_optimal_in_the_norm_of_the_inputs(rank):
    """No product of that rank errs less (Eckart-Young): error and product equal those of numpy's
    SVD behind a symmetric square root, where this code has a triangular one and inverts nothing.
    """
    x, layer = correlated(1, 300, 12), nn.Linear(12, 17).double()
    mine = factors_of(layer, x).module((rank,))
    product = (mine[1].weight @ mine[0].weight).detach().numpy()
    weight, rows = layer.weight.detach().numpy(), x.numpy()
    moments = rows.T @ rows / len(rows)
    moments += DAMPING * np.trace(moments) / 12 * np.eye(12)
    values, vectors = np.linalg.eigh(moments)
    root = (vectors * np.sqrt(values)) @ vectors.T
    u, s, vt = np.linalg.svd(weight @ root)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
    assert weighted_norm(weight - product, rows) == pytest.approx((s[rank:] ** 2).sum(), rel=1e-9)
    assert np.abs(product - best).max() < 1e-9  # the optimum is unique: singular values differ


def test_the_reported_error_is_that_of_the_output():
    """With little damping the weighted error is the RMS error of the output, measured."""
    x, layer = correlated(3, 500, 16), nn.Linear(16, 24).double()
    factors = factors_of(layer, x)
    mine = factors.module((4,))
    with torch.no_grad():
        wrong, whole = mine(x) - layer(x), layer(x) - layer.bias
    share = float(wrong.norm() / whole.norm())
    assert factors.weighted_error((4,)) == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("largest_side", [1, 2000])
@pytest.mark.parametrize("seed", range(4))
def test_weighting_never_errs_more_than_plain(kernel, largest_side, seed):
    """At the same rank the weighted factors err no more on what the layer reads, and for inputs of
    unequal size clearly less; with moments of windows and of channels alone.
    """
    layer = nn.Conv2d(12, 20, kernel, padding=kernel // 2).double()
    x = correlated(seed, 2 * 9 * 11, 12).reshape(2, 9, 11, 12).permute(0, 3, 1, 2)
    rank = (4,) if kernel == 1 else (4, 6)
    errors = [
        factors_of(layer, x, weighting=how, largest_covariance_side=largest_side)
        .weighted_error(rank)
        for how in ("inputs", "none")
    ]  # fmt: skip
    assert errors[0] < 0.9 * errors[1]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(2, 7), st.integers(2, 7), st.sampled_from([4, 9])),
    rank=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    is_full=st.booleans(),
)
def test_weighted_tucker_is_never_worse_than_plain(seed, sizes, rank, is_full):
    """Whatever weight, moments and ranks: in the weighted norm plain HOOI errs at least as much."""
    outputs, inputs, window = sizes
    rank = (min(rank[0], inputs), min(rank[1], outputs))
    weight = drawn(seed, outputs, inputs, window)
    side = inputs * window if is_full else inputs
    rows = correlated(seed + 7, 2 * side, side)
    moments = rows.T @ rows / len(rows)
    mine = weighted_tucker(weight, moments, rank, num_sweeps=3, damping=DAMPING)
    plain = hooi(weight, rank, 3)
    factor = whitener(moments, DAMPING)

    def error(factors) -> float:
        product = torch.einsum("sb,abk,ta->tsk", factors.into, factors.core, factors.out)
        wrong = weight - product
        seen = wrong.flatten(1) @ factor if is_full else torch.einsum("tsk,sr->trk", wrong, factor)
        return float(seen.square().sum())

    whole = float((weight.square()).sum())
    assert error(mine) <= error(plain) * (1 + 1e-9) + 1e-12 * whole
    assert error(mine) == pytest.approx(mine.squared_error, rel=1e-6, abs=1e-9 * whole)


@pytest.mark.parametrize("seed", range(3))
def test_sweeps_only_help(seed):
    """Each alternating sweep leaves the weighted error as it was or smaller, and some do help."""
    weight, rows = drawn(seed, 10, 8, 9), correlated(seed + 1, 200, 72)
    norm = rows.T @ rows / len(rows)
    start = best_outputs(weight, norm, drawn(seed + 2, 8, 3), 4)
    errors = [refined(weight, norm, start, n).squared_error for n in range(6)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([1, 2, 3]),
    inputs=st.integers(2, 5),
    outputs=st.integers(2, 5),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (2, 1)]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    is_channels=st.booleans(),
)
def test_full_rank_is_the_same_layer(
    seed, groups, inputs, outputs, kernel, stride, dilation, padding, mode, bias, is_channels
):
    """At its largest rank a factored convolution gives what the whole one gives, to rounding in
    float64, whatever its shape, stride, dilation, padding, groups and bias.
    """
    layer = nn.Conv2d(
        groups * inputs, groups * outputs, kernel, stride, padding, dilation, groups, bias, mode
    ).double()  # fmt: skip
    x = drawn(seed, 2, groups * inputs, 8, 7)
    factors = factors_of(layer, x, largest_covariance_side=1 if is_channels else 2000)
    rank = shape_of(layer).largest_rank
    mine = factors.module(rank)
    assert (mine(x) - layer(x)).abs().max() < 1e-8
    cost = cost_of(layer, rank)
    assert cost.num_parameters == sum(p.numel() for p in mine.parameters())
    assert factors.weighted_error(rank) < 1e-6


@pytest.mark.parametrize(
    ("layer", "rank", "macs"),
    [
        # 12 x 8 pixels in, 6 x 4 = 24 positions out; the first of three layers runs on all 96
        (nn.Conv2d(8, 6, 3, 2, 1), None, 24 * 8 * 6 * 9),
        (nn.Conv2d(8, 6, 3, 2, 1), (2, 3), 96 * 8 * 2 + 24 * 2 * 3 * 9 + 24 * 3 * 6),
        (nn.Conv2d(8, 6, 3, 2, 1, groups=2), (2, 3), 2 * (96 * 4 * 2 + 24 * 54 + 24 * 3 * 3)),
        (nn.Conv2d(8, 6, 1, 2), (2,), 24 * (8 * 2 + 2 * 6)),
        (nn.Conv2d(8, 6, 1), None, 96 * 8 * 6),
    ],
)
def test_macs_are_those_that_are_computed(layer, rank, macs):
    """A layer's multiply-adds, whole and factored, are those counted by hand over its outputs."""
    module = layer if rank is None else empty_factors(layer, rank)
    y = module(torch.zeros(1, 8, 12, 8))
    assert cost_of(layer, rank).macs_per_position * y.shape[2] * y.shape[3] == macs


@pytest.mark.parametrize(
    ("layer", "rank"),
    [
        (nn.Linear(40, 30), (5,)),
        (nn.Linear(9, 50, bias=False), (3,)),
        (nn.Conv2d(24, 32, 1, stride=2), (4,)),
        (nn.Conv2d(12, 16, 1, groups=2), (2,)),
        (nn.Conv2d(16, 20, 3, padding=2, dilation=2), (4, 5)),
        (nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2), (2, 3)),
    ],
)
@pytest.mark.parametrize("weighting", ["inputs", "none"])
def test_layers_of_low_rank_come_back_exactly(layer, rank, weighting):
    """A weight that is of a rank loses nothing at it, in either norm."""
    made = empty_factors(layer, rank)
    with torch.no_grad():
        for number, part in enumerate(made):
            part.weight.copy_(drawn(number, *part.weight.shape) / part.weight[0].numel() ** 0.5)
            if part.bias is not None:
                part.bias.copy_(layer.bias)
        shape = shape_of(layer)
        parts = [p.weight.unflatten(0, (shape.groups, -1)).flatten(2) for p in made]
        if len(rank) == 1:
            weight = parts[1] @ parts[0]
        else:
            core = parts[1].unflatten(2, (rank[0], shape.window))
            weight = torch.einsum("gbs,gabk,gta->gtsk", parts[0], core, parts[2])
        layer.weight.copy_(weight.reshape(layer.weight.shape))
    x = drawn(9, 3, layer.weight.shape[1] * shape.groups, 8, 8, dtype=torch.float32)
    x = x.permute(0, 2, 3, 1) if isinstance(layer, nn.Linear) else x
    want = layer(x)
    factors = factors_of(layer, x, weighting=weighting)
    assert (made(x) - want).abs().max() < FLOAT32_ROUNDING * want.abs().max()
    assert (factors.module(rank)(x) - want).abs().max() < FLOAT32_ROUNDING * want.abs().max()
    assert factors.weighted_error(rank) < 1e-5


def test_what_calibration_does_not_show_is_not_forgotten():
    """With data of one direction only, the rank that is left goes to the rest of the weight."""
    x = drawn(1, 50, 1) * drawn(2, 1, 12)
    layer = nn.Linear(12, 12).double()
    mine = factors_of(layer, x).module((11,))
    product = mine[1].weight @ mine[0].weight
    assert (product - layer.weight).norm() < 0.3 * layer.weight.norm()
    assert (mine(x) - layer(x)).abs().max() < 1e-3


def test_dead_inputs_fall_back_to_the_plain_svd():
    """A layer that reads nothing but zeros is factored as if no data were known."""
    layer = nn.Linear(10, 14).double()
    zeros = torch.zeros(5, 10, dtype=torch.float64)
    mine, plain = (
        factors_of(layer, zeros, weighting=how).module((3,)) for how in ("inputs", "none")
    )
    products = [m[1].weight @ m[0].weight for m in (mine, plain)]
    assert torch.allclose(*products, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "rank", "saves"),
    [
        (nn.Linear(960, 3840), (729,), True),  # 0.95 of the break-even rank 768
        (nn.Linear(960, 3840), (731,), False),
        (nn.Conv2d(64, 64, 1), (32,), False),  # half the rank of a square saves nothing
        (nn.Conv2d(64, 64, 1), (30,), True),
        (nn.Conv2d(960, 1024, 3), (256, 256), True),
        (nn.Conv2d(32, 32, 3, groups=32), (1, 1), False),
        # few parameters, but the first layer runs on four times the positions
        (nn.Conv2d(64, 16, 3, stride=2), (30, 12), False),
    ],
)
def test_a_rank_pays_below_its_break_even(layer, rank, saves):
    """Break-even ranks by arithmetic: m n / (m + n) of a matrix, none of a depthwise layer."""
    assert pays(layer, rank, 0.05) is saves


def test_factoring_a_model_changes_it_as_reported():
    """Parameters of the report are those of the model, and ranks those of its layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.Linear(48, 1))
    x = drawn(1, 200, 32, dtype=torch.float32)
    want = model(x)
    before = sum(p.numel() for p in model.parameters())
    report = factorize_(model, LowRankConfig(choice="fixed", rank=8), [(x[:100],), (x[100:],)])
    after = sum(p.numel() for p in model.parameters())
    assert (report.num_parameters_before, report.num_parameters_after) == (before, after)
    assert report.ranks == {"0": (8,), "2": (8,)}
    assert report.macs_after == 32 * 8 + 8 * 64 + 64 * 8 + 8 * 48 + 48
    change = (model(x) - want).detach().square().mean().sqrt()
    assert report.score_change_rms == pytest.approx(float(change), rel=1e-4)
    assert report.layers[2].reason == "does not pay at its size"
