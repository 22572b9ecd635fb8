"""Kernel ridge regression, the teacher of the heads that are served."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CLIPPED_AT = 4.0
"""Standard deviations beyond which a feature says no more."""
_PREDICTED_AT_ONCE = 2000

Floats = NDArray[np.float32]


class KernelRidge:
    """Kernel ridge regression with a Gaussian kernel (Saunders et al., ICML 1998, equation 7).

    Features are standardised and clipped first; the mean rating is what far away pictures get.
    """

    def __init__(self, features: Floats, mos: Floats, *, width: float, ridge: float) -> None:
        """Fit to features (N, F) and ratings (N,) on 0..1."""
        self._mean, self._std = features.mean(0), np.maximum(features.std(0), 1e-3)
        self._known = self._standard(features)
        squares = self._squared_distances(self._known)
        self._scale = width / float(np.median(squares))
        self._ridge = ridge
        self._level = float(mos.mean())
        self._dual = np.linalg.solve(self._kernel(squares), mos.astype(np.float64) - self._level)

    def _standard(self, features: Floats) -> Floats:
        return np.clip((features - self._mean) / self._std, -_CLIPPED_AT, _CLIPPED_AT)

    def _squared_distances(self, x: Floats) -> Floats:
        lengths = (self._known**2).sum(1)
        found: Floats = (x**2).sum(1)[:, None] + lengths[None] - 2 * x @ self._known.T
        return np.maximum(found, 0)

    def _kernel(self, squares: Floats) -> NDArray[np.float64]:
        kernel = np.exp(-self._scale * squares).astype(np.float64)
        kernel[np.diag_indices(len(kernel))] += self._ridge
        return kernel

    def leave_one_out_errors(self) -> NDArray[np.float64]:
        """Each rating less what the others predict for its picture, (N,), without fitting N times.

        ``dual[i] / inverse[i, i]`` of the kernel with its ridge (Rifkin and Lippert, MIT-CSAIL-TR-
        2007-025, section 3). Standardisation, kernel width and mean rating are those of all.
        """
        inverse = np.linalg.inv(self._kernel(self._squared_distances(self._known)))
        return np.asarray(self._dual / inverse.diagonal())

    def __call__(self, features: Floats) -> NDArray[np.float64]:
        """Quality (M,) of features (M, F)."""
        found = []
        for first in range(0, len(features), _PREDICTED_AT_ONCE):
            x = self._standard(features[first : first + _PREDICTED_AT_ONCE])
            kernel = np.exp(-self._scale * self._squared_distances(x))
            found.append(kernel @ self._dual + self._level)
        return np.concatenate(found)
