"""Labels transferred by similarity of content, on features whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.content_similarity import transfer_labels

RATED = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
LABELS = np.arange(3 * 2 * 5, dtype=float).reshape(3, 2, 5)


def test_the_nearest_direction_gives_the_labels():
    """(3, 4) points nearest to the second reference, at cosine 0.8; (4, -3) to the first."""
    out = transfer_labels([[3.0, 4.0], [4.0, -3.0]], RATED, LABELS)
    assert out.reference.tolist() == [1, 0]
    np.testing.assert_allclose(out.similarity, [0.8, 0.8], rtol=1e-12)
    np.testing.assert_array_equal(out.labels, LABELS[[1, 0]])


def test_an_identical_picture_gets_its_own_labels_exactly():
    """A rated picture given as new has similarity 1 and its own labels."""
    features = np.random.default_rng(3).standard_normal((3, 64))
    out = transfer_labels(features, features, LABELS)
    np.testing.assert_array_equal(out.labels, LABELS)
    np.testing.assert_allclose(out.similarity, 1.0, atol=1e-12)


@given(st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_the_length_of_a_feature_does_not_matter(factor, seed):
    """Scaling a feature changes neither the reference nor, beyond rounding, the similarity."""
    new = np.random.default_rng(seed).standard_normal((4, 2))
    once, scaled = (transfer_labels(new * f, RATED, LABELS) for f in (1.0, factor))
    np.testing.assert_array_equal(once.reference, scaled.reference)
    np.testing.assert_allclose(once.similarity, scaled.similarity, atol=1e-12)


def test_similarity_is_the_confidence():
    """The farther a new picture turns from its reference, the lower is what comes back."""
    angles = np.radians([0, 15, 30, 40])
    new = np.stack([np.cos(angles), np.sin(angles)], 1)
    similarity = transfer_labels(new, RATED, LABELS).similarity
    np.testing.assert_allclose(similarity, np.cos(angles), atol=1e-12)


def test_several_neighbours_are_averaged():
    """Of two neighbours the label and the similarity are the means; the first named is nearer."""
    out = transfer_labels([[3.0, 4.0]], RATED, LABELS, num_neighbours=2)
    assert out.reference.tolist() == [1]
    np.testing.assert_allclose(out.labels[0], (LABELS[0] + LABELS[1]) / 2)
    np.testing.assert_allclose(out.similarity, [(0.8 + 0.6) / 2])


@pytest.mark.parametrize("number", [0, 4])
def test_neighbours_that_are_not_there_are_refused(number):
    """Of three references none, or four, cannot be averaged."""
    with pytest.raises(ValueError, match=f"{number} neighbours among 3"):
        transfer_labels([[3.0, 4.0]], RATED, LABELS, num_neighbours=number)


def test_a_callable_makes_the_features(make_picture):
    """With a feature function pictures are given; the same picture finds itself among others."""

    def histogram(rgb):
        return np.histogram(rgb, 16, (0, 256))[0]

    rated = [make_picture(seed) for seed in (1, 2, 3)]
    out = transfer_labels([rated[2], rated[0]], rated, LABELS, feature=histogram)
    assert out.reference.tolist() == [2, 0]


def test_a_missing_label_stays_missing():
    """NaN in the reference's labels is NaN in the transferred ones."""
    labels = np.array([[0.2, np.nan], [0.5, 0.6], [0.7, 0.8]])
    out = transfer_labels([[1.0, 0.1]], RATED, labels)
    np.testing.assert_array_equal(out.labels, [[0.2, np.nan]])


@pytest.mark.parametrize(
    ("new", "labels", "told"),
    [
        ([[1.0, 2.0, 3.0]], LABELS, "features have 3 values, the rated ones 2"),
        ([[1.0, 2.0]], LABELS[:2], "3 rated features and labels of 2 pictures"),
        ([[1.0, 2.0], [0.0, 0.0]], LABELS, "feature 1 is zero"),
        ([[np.nan, 2.0]], LABELS, "feature 0 is zero or not finite"),
        ([1.0, 2.0], LABELS, r"\(N, D\)"),
    ],
)
def test_what_does_not_fit_is_refused(new, labels, told):
    """Shapes that differ and features without a direction are told with their numbers."""
    with pytest.raises(ValueError, match=told):
        transfer_labels(new, RATED, labels)
