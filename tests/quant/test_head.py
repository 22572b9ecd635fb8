"""One head for both precisions, and weights on INT8's grid."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from quant.head import Head, HeadConfig, refit_  # noqa: E402
from quant.qat import on_grid, snap_weights_  # noqa: E402

NUM_FEATURES = 40


@pytest.fixture
def features():
    """Float features whose first half is informative, INT8 ones whose second half is disturbed."""
    rng = np.random.default_rng(3)
    of_float = rng.standard_normal((600, NUM_FEATURES)).astype(np.float32)
    noise = rng.standard_normal(of_float.shape).astype(np.float32) * 0.5
    noise[:, : NUM_FEATURES // 2] *= 0.02
    direction = rng.standard_normal(NUM_FEATURES // 2)
    mos = 1 / (1 + np.exp(-of_float[:, : NUM_FEATURES // 2] @ direction / 3))
    return of_float, of_float + noise, mos.astype(np.float32)


def drawn_head() -> Head:
    """A head that reads every feature, the disturbed ones too."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    return Head(draw(64, NUM_FEATURES), draw(64), draw(1, 64), draw(1))


def gap(head: Head, a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference of the logits between the two precisions."""
    with torch.no_grad():
        return float((head(torch.from_numpy(a)) - head(torch.from_numpy(b))).abs().mean())


def test_the_head_learns_to_look_away_from_disturbed_features(features):
    """On pictures it was not fitted to, the precisions differ by less than half of before."""
    of_float, of_int8, mos = features
    head = drawn_head()
    before = gap(head, of_float[400:], of_int8[400:])
    refit_(head, of_float[:400], of_int8[:400], mos[:400], HeadConfig(rate=3e-3))
    assert gap(head, of_float[400:], of_int8[400:]) < 0.5 * before


def test_unrated_pictures_keep_their_logits(features):
    """Without ratings and disturbance there is nothing to change: logits stay within 0.05."""
    of_float, _, mos = features
    head = drawn_head()
    with torch.no_grad():
        before = head(torch.from_numpy(of_float))
    unrated = np.full_like(mos, np.nan)
    refit_(head, of_float, of_float, unrated, HeadConfig(weight_decay=0.0))
    with torch.no_grad():
        after = head(torch.from_numpy(of_float))
    assert float((after - before).abs().max()) < 0.05


def test_weights_on_the_grid_stay_there():
    """Snapping twice is snapping once, and moves no weight by more than half a step."""
    conv = torch.nn.Conv2d(8, 4, 3)
    before = conv.weight.detach().clone()
    snap_weights_(conv)
    step = before.abs().amax((1, 2, 3), keepdim=True) / 127
    assert torch.equal(on_grid(conv.weight.detach()), conv.weight.detach())
    assert float(((conv.weight.detach() - before).abs() / step).max()) <= 0.5 + 1e-4
