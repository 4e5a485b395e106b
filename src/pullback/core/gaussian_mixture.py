"""Gaussian mixtures along a Gaussian path: densities, scores and flows in closed form: oracles without training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pullback.core.checks import finite, floating
from pullback.core.gaussian_path import Coefficients, GaussianPath, Number
from pullback.core.prediction import GaussianField, Prediction


class GaussianMixture:
    """``sum_k w_k N(m_k, C_k)`` in D dimensions.

    Every covariance is kept by its eigenvalues; the path adds to them and leaves the eigenvectors as they are:
    at time t the component is ``N(alpha m_k, alpha^2 C_k + sigma^2 I)``.

    Args:
        means: [K, D], floating; its dtype and device are those of the mixture.
        stds: standard deviations: a number, [K], or [K, D] for one per axis.
        weights: [K], positive, scaled to sum 1; equal unless given.
        covariances: [K, D, D], symmetric positive definite, instead of ``stds``.

    Raises:
        TypeError: if a tensor is not floating.
        ValueError: if shapes differ, a standard deviation or weight is not positive, or a covariance is not positive
            definite.

    Example:
        >>> means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
        >>> mixture = GaussianMixture(means, 0.5)
        >>> model = mixture.denoiser(GaussianPath.cosine())
        >>> model(torch.zeros(1, 2), 0.5).x0
        tensor([[0., 0.]])
    """

    def __init__(
        self,
        means: Tensor,
        stds: float | Tensor | None = None,
        weights: Tensor | None = None,
        *,
        covariances: Tensor | None = None,
    ) -> None:
        self.means = floating("means", means, ndim=2)
        count, size = means.shape
        if (stds is None) == (covariances is None):
            raise ValueError(
                f"one of stds and covariances must be given, got stds={stds!r:.40}. Give exactly one."
            )
        self.vectors: Tensor | None = None
        if covariances is None:
            if not isinstance(stds, Tensor):
                stds = torch.tensor(finite("stds", stds), dtype=means.dtype)
            if stds.dim() < 2:
                stds = stds.reshape(-1, 1).expand(count, size)
            floating("stds", stds, shape=(count, size))
            self.variances = stds.to(means) * stds.to(means).abs()  # a negative one stays visible
        else:
            floating("covariances", covariances, shape=(count, size, size))
            self.variances, self.vectors = torch.linalg.eigh(covariances.to(means))
        weights = (
            torch.ones(count).to(means) if weights is None else floating("weights", weights, shape=(count,))
        )
        sound = (
            bool((self.variances > 0).all()) and bool((weights > 0).all()) and bool(means.isfinite().all())
        )
        if not sound:
            raise ValueError(
                "means must be finite, standard deviations (or eigenvalues of covariances) and weights positive, got "
                f"smallest signed variance {float(self.variances.min()):.4g} and weight {float(weights.min()):.4g}. "
                "Add a little to the diagonal, and leave out components without weight."
            )
        self.log_weights = (weights / weights.sum()).to(means).log()

    def __repr__(self) -> str:
        return f"GaussianMixture(components={len(self.means)}, dimensions={self.means.shape[1]})"

    def sample(self, size: int, *, generator: torch.Generator) -> Tensor:
        """Independent draws [size, D]."""
        picks = torch.multinomial(self.log_weights.exp(), size, replacement=True, generator=generator)
        noise = torch.randn(
            size, self.means.shape[1], generator=generator, dtype=self.means.dtype, device=generator.device
        )
        noise = noise * self.variances[picks].sqrt()
        if self.vectors is not None:
            noise = (self.vectors[picks] @ noise.unsqueeze(-1)).squeeze(-1)
        return self.means[picks] + noise

    def at(self, path: GaussianPath, t: float) -> GaussianMixture:
        """The mixture of the states at time ``t``, for t with sigma > 0 or t = 0."""
        four = path(float(t))
        there = GaussianMixture.__new__(GaussianMixture)
        there.means, there.log_weights, there.vectors = (
            four.alpha * self.means,
            self.log_weights,
            self.vectors,
        )
        there.variances = four.alpha**2 * self.variances + four.sigma**2
        return there

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density [batch] in nats of the points ``x`` [batch, D]."""
        gaps = self._rotated(x.unsqueeze(1) - self.means)
        return self._log_joint(gaps, self.variances).logsumexp(1)

    def _rotated(self, gaps: Tensor) -> Tensor:
        """Gaps [batch, K, D] in the eigenvectors of every component."""
        return gaps if self.vectors is None else torch.einsum("bki,kij->bkj", gaps, self.vectors)

    def _back(self, gaps: Tensor) -> Tensor:
        return gaps if self.vectors is None else torch.einsum("bkj,kij->bki", gaps, self.vectors)

    def _log_joint(self, gaps: Tensor, variances: Tensor) -> Tensor:
        """Log w_k N(x; m_k, C_k) [batch, K] from rotated gaps."""
        quadratic = gaps.square() / variances + variances.log()
        return self.log_weights - 0.5 * (quadratic.sum(-1) + gaps.shape[-1] * math.log(2 * math.pi))

    def flow(self, path: GaussianPath, x: Tensor, s: float, t: float) -> Tensor:
        """Where the probability flow of a single Gaussian takes ``x`` from time ``s`` to ``t``, exactly.

        Along each eigenvector ``alpha_t m + (G_t / G_s) (x - alpha_s m)`` with ``G_t^2 = alpha_t^2 c + sigma_t^2``.

        Args:
            path: the path.
            x: states [batch, D] at time ``s``.
            s: time of ``x``.
            t: time of the result, before or after ``s``.

        Raises:
            ValueError: if the mixture has more than one component, whose flow has no closed form.
        """
        if len(self.means) != 1:
            raise ValueError(
                f"flow must start from one component, got {len(self.means)}. Use a solver for mixtures."
            )
        a, b = path(float(s)), path(float(t))
        ratio = (b.alpha**2 * self.variances + b.sigma**2) / (a.alpha**2 * self.variances + a.sigma**2)
        gaps = self._rotated(x.unsqueeze(1) - a.alpha * self.means)
        return b.alpha * self.means[0] + self._back(gaps * ratio.sqrt()).squeeze(1)

    def denoiser(self, path: GaussianPath) -> MixtureDenoiser:
        """The exact model of this mixture on ``path``."""
        return MixtureDenoiser(self, path)


class MixtureDenoiser(GaussianField):
    """The exact prediction for a `GaussianMixture`: every reading without error at every time, no training.

    Args:
        mixture: distribution of the data.
        path: the path.
    """

    def __init__(self, mixture: GaussianMixture, path: GaussianPath) -> None:
        self.mixture, self.path = mixture, path

    def __repr__(self) -> str:
        return f"MixtureDenoiser({self.mixture!r}, {self.path!r})"

    def __call__(self, x: Tensor, t: Number, **cond: Any) -> Prediction:
        """The exact prediction at states [batch, D] and one time, or times [batch].

        Raises:
            TypeError: if conditions are given, which a mixture has not.
        """
        if cond:
            raise TypeError(
                f"cond must be empty for a mixture, got {sorted(cond)}. Make one mixture for each label."
            )
        floating("x", x, shape=(None, self.mixture.means.shape[1]))
        at = self.path(t).over(x)
        gaps, variances, shares = self._parts(x, at)
        x0 = (shares.unsqueeze(-1) * self._means(at, gaps, variances)).sum(1)
        eps = at.sigma * (shares.unsqueeze(-1) * self.mixture._back(gaps / variances)).sum(1)
        velocity = at.dalpha * x0 + at.dsigma * eps  # from v all other readings are safe
        return Prediction(x, velocity.to(x.dtype), "v", at)

    def posterior(self, x: Tensor, t: Number) -> tuple[Tensor, Tensor]:
        """Mean [batch, D] and covariance [batch, D, D] of the data given the states ``x`` [batch, D] at time ``t``."""
        mixture, at = self.mixture, self.path(t).over(x)
        gaps, variances, shares = self._parts(x, at)
        means = self._means(at, gaps, variances)
        mean = (shares.unsqueeze(-1) * means).sum(1)
        inner = torch.diag_embed(mixture.variances * (_wide(at.sigma) ** 2 / variances))
        if mixture.vectors is not None:
            inner = mixture.vectors @ inner @ mixture.vectors.mT
        off = means - mean.unsqueeze(1)
        within = (shares[..., None, None] * inner).sum(1)
        return mean, within + torch.einsum("bk,bki,bkj->bij", shares, off, off)

    def _parts(self, x: Tensor, at: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated gaps to the noisy means [batch, K, D], their variances, and responsibilities [batch, K]."""
        mixture, alpha = self.mixture, _wide(at.alpha)
        gaps = mixture._rotated(x.unsqueeze(1) - alpha * mixture.means)
        variances = alpha**2 * mixture.variances + _wide(at.sigma) ** 2
        return gaps, variances, mixture._log_joint(gaps, variances).softmax(1)

    def _means(self, at: Coefficients, gaps: Tensor, variances: Tensor) -> Tensor:
        """Expected data within every component [batch, K, D]."""
        mixture = self.mixture
        return mixture.means + mixture._back(gaps * (_wide(at.alpha) * mixture.variances / variances))


def _wide(value: Any) -> Any:
    """A coefficient with an axis for the components."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.dim() else value
