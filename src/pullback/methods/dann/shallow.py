"""The shallow network of Algorithm 1 as a scikit-learn estimator (Ganin et al. 2016, arXiv:1505.07818)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from pullback.core.checks import integer, non_negative, positive
from pullback.core.streams import numpy_generator

try:
    from scipy.special import expit
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        'ShallowDANN needs scikit-learn. Install it with: pip install "pullback[lab]".'
    ) from error


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.column_stack([x, np.ones(len(x))])


class ShallowDANN(ClassifierMixin, BaseEstimator):
    r"""One hidden layer of sigmoids, a softmax label head and a logistic domain head, trained by Algorithm 1.

    Unlike the deep version, ``lam`` scales both the reversed gradient into the hidden layer and the domain head's own
    update (paper eq. 13-15 as printed). With ``lam=0`` the domain head is not trained at all.

    Args:
        hidden: number of hidden units.
        lam: strength of adaptation, >= 0.
        lr: learning rate, > 0.
        epochs: passes over the source.
        batch_size: source examples (and as many random target examples) per update, whose gradients are averaged;
            1 is the paper's.
        adversarial: False leaves out the two terms that reach the hidden layer (lines 22 and 31): a plain network
            with a domain head that only watches.
        shuffle: draw the source in a new order every epoch; False walks through it in the given order (the paper's).
        seed: stream of all randomness.

    Attributes:
        classes_: the labels, sorted.
        hidden_weight_: W [hidden, d]; ``hidden_bias_``: b [hidden].
        label_weight_: V [classes, hidden]; ``label_bias_``: c [classes].
        domain_weight_: u [hidden]; ``domain_bias_``: z; the head gives the probability of *source*.
        n_iter_: number of epochs run.

    Example:
        >>> x, y = np.array([[0.0], [1.0]]), np.array([0, 1])
        >>> ShallowDANN(hidden=4, lr=0.5, epochs=300).fit(x, y, X_target=x).predict(x)
        array([0, 1])
    """

    kind: ClassVar[str] = "learner"

    def __init__(
        self,
        hidden: int = 50,
        *,
        lam: float = 1.0,
        lr: float = 0.05,
        epochs: int = 100,
        batch_size: int = 1,
        adversarial: bool = True,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.hidden = hidden
        self.lam = lam
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.adversarial = adversarial
        self.shuffle = shuffle
        self.seed = seed

    def fit(
        self,
        X: Any,
        y: Any,
        X_target: Any = None,
        *,
        X_valid: Any = None,
        y_valid: Any = None,
        start: ShallowDANN | None = None,
    ) -> ShallowDANN:
        """Fit on labelled source and unlabelled target examples.

        Args:
            X: source inputs [n, d].
            y: source labels [n].
            X_target: target inputs [m, d]; None trains without adaptation (as ``lam=0``).
            X_valid: source inputs held out: the weights of the epoch of least error on them are kept.
            y_valid: their labels.
            start: a fitted estimator of the same sizes and classes to begin from (reverse validation).

        Returns:
            The estimator itself.

        Raises:
            ValueError: if a hyperparameter is out of range or the data do not fit together.
        """
        self._check_hyperparameters()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least 2 classes, got one class: {self.classes_[0]!r}.")
        target = None
        if X_target is not None:
            target = validate_data(self, X_target, dtype=np.float64, reset=False)
        if (X_valid is None) != (y_valid is None):
            raise ValueError("X_valid and y_valid must be given together, got one of them. Pass both.")
        rng = numpy_generator("shallow-dann", self.seed)
        self._begin(X.shape[1], rng, start)
        best, least = None, np.inf
        for _ in range(self.epochs):
            self._epoch(X, codes, target, rng)
            if X_valid is not None:
                risk = float(np.mean(self.predict(X_valid) != np.asarray(y_valid)))
                if risk < least:
                    best, least = [w.copy() for w in self._weights()], risk
        if best is not None:
            self._set(best)
        self.n_iter_ = self.epochs
        return self

    def _check_hyperparameters(self) -> None:
        integer("hidden", self.hidden, minimum=1)
        integer("epochs", self.epochs, minimum=1)
        integer("batch_size", self.batch_size, minimum=1)
        positive("lr", self.lr)
        non_negative("lam", self.lam)

    # --- training ----------------------------------------------------------------------------------------------

    def _begin(self, features: int, rng: np.random.Generator, start: ShallowDANN | None) -> None:
        classes = len(self.classes_)
        if start is not None:
            same = start.hidden_weight_.shape == (self.hidden, features)
            if not same or not np.array_equal(start.classes_, self.classes_):
                raise ValueError(
                    "start must have the same sizes and classes, got another network. Leave it out."
                )
            self._set([w.copy() for w in start._weights()])
            return
        wide, top = np.sqrt(6 / (features + self.hidden)), np.sqrt(6 / (self.hidden + classes))
        hidden = rng.uniform(-wide, wide, (self.hidden, features))
        label = rng.uniform(-top, top, (classes, self.hidden))
        zeros = np.zeros(self.hidden)
        self._set([hidden, zeros, label, np.zeros(classes), zeros, np.zeros(1)])

    def _set(self, weights: list[np.ndarray]) -> None:
        """Lay the weights out as two matrices, biases last and the domain head as the last row of the heads.

        The public attributes are views of them, so that one product updates many: at this size the number of NumPy
        calls is the cost.
        """
        w, b, v, c, u, z = weights
        self._below = np.column_stack([w, b])
        self._heads = np.column_stack([np.vstack([v, u]), np.concatenate([c, z])])
        self.hidden_weight_, self.hidden_bias_ = self._below[:, :-1], self._below[:, -1]
        self.label_weight_, self.label_bias_ = self._heads[:-1, :-1], self._heads[:-1, -1]
        self.domain_weight_, self.domain_bias_ = self._heads[-1, :-1], self._heads[-1, -1:]

    def _weights(self) -> list[np.ndarray]:
        hidden, label = [self.hidden_weight_, self.hidden_bias_], [self.label_weight_, self.label_bias_]
        return [*hidden, *label, self.domain_weight_, self.domain_bias_]

    def _epoch(
        self, X: np.ndarray, codes: np.ndarray, target: np.ndarray | None, rng: np.random.Generator
    ) -> None:
        order = rng.permutation(len(X)) if self.shuffle else np.arange(len(X))
        adapt = target is not None and self.lam > 0
        # drawn in any case, so that every strength sees the source in the same order
        picks = None if target is None else rng.integers(len(target), size=len(X))
        xs, ys = _with_one(X[order]), np.eye(len(self.classes_))[codes[order]]
        xt = _with_one(target[picks]) if adapt else xs[:0]
        for first in range(0, len(X), self.batch_size):
            rows = slice(first, first + self.batch_size)
            self._update(xs[rows], ys[rows], xt[rows])

    def _update(self, x: np.ndarray, y: np.ndarray, x_target: np.ndarray) -> None:
        """Lines 7-41 of Algorithm 1 with gradients averaged over the rows.

        Args:
            x: source rows [n, d + 1], the last column 1.
            y: their labels, one-hot [n, classes].
            x_target: target rows [m, d + 1]; none: no adaptation.
        """
        n, rate = len(x), self.lr / len(x)
        inputs = np.concatenate((x, x_target)) if len(x_target) else x
        h = np.ones((len(inputs), self.hidden + 1))
        h[:, :-1] = expit(inputs @ self._below.T)
        logits = h @ self._heads.T
        error = np.zeros_like(logits)  # d(L_y + lam L_d) / d(logits of labels and of the domain)
        scores = np.exp(logits[:n, :-1] - logits[:n, :-1].max(axis=1, keepdims=True))
        error[:n, :-1] = scores / scores.sum(axis=1, keepdims=True) - y
        if len(x_target):
            error[:, -1] = expit(logits[:, -1])  # the head gives the probability of source
            error[:n, -1] -= 1.0
            error[:, -1] *= self.lam
        reversed_error = error.copy()
        reversed_error[:, -1] *= -1.0 if self.adversarial else 0.0
        back = (reversed_error @ self._heads)[:, :-1] * h[:, :-1] * (1.0 - h[:, :-1])
        self._heads -= rate * (error.T @ h)
        self._below -= rate * (back.T @ inputs)

    # --- use ---------------------------------------------------------------------------------------------------

    def features(self, X: Any) -> np.ndarray:
        """Hidden activations [n, hidden], each in (0, 1)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return expit(X @ self.hidden_weight_.T + self.hidden_bias_)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Label probabilities [n, classes]."""
        scores = self.features(X) @ self.label_weight_.T + self.label_bias_
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """Labels [n]."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def predict_source(self, X: Any) -> np.ndarray:
        """Probability [n] that the domain head gives to the source."""
        return expit(self.features(X) @ self.domain_weight_ + self.domain_bias_)
