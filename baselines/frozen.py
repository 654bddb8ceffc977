"""References on frozen features: regressors that are solved for, not trained by steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ordinalclip.heads import Head, HeadContext, Outputs, Positive, Prediction, Targets, check_numbers
from ordinalclip.losses import absolute_error, at_least_float32

logger = logging.getLogger(__name__)
Rows = slice | np.ndarray
EVERY = slice(None)
Grid = Annotated[Sequence[Positive], Field(min_length=1)]
DEAD = 1e-5  # a feature that varies by less than this share of the typical size is constant up to rounding
ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6)
FOLDS = 5  # of the training part, where there is no validation part
LARGEST = 20_000  # training samples for which two tables of all pairs still fit into memory, 3.2 GB each


class Samples(NamedTuple):
    """A part as scikit-learn takes it, in float64: features (N, D), labels (N,), both standardised, weights (N,)."""

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class FrozenRegressor(Head):
    """A regressor of the standardised label on standardised features; subclasses define `solve` and `answers`.

    Nothing is trained by steps, and the encoder stays as it is: `fit` takes the whole training part, standardises every
    feature by its mean and deviation there, and solves. Before it every answer is the mean label.
    """

    learns = False
    center: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, context: HeadContext):
        super().__init__(context)
        self.register_buffer("center", torch.zeros(context.input_dim))
        self.register_buffer("scale", torch.ones(context.input_dim))
        self.register_buffer("offset", torch.zeros(()))

    def solve(self, train: Samples, validation: Samples | None) -> None:
        """Find the buffers that `answers` reads."""
        raise NotImplementedError(f"{type(self).__name__} defines no solve")

    def answers(self, features: Tensor) -> Tensor:
        """(B, D) standardised features, float32 at least -> (B,) standardised labels."""
        raise NotImplementedError(f"{type(self).__name__} defines no answers")

    def forward(self, features: Tensor) -> Outputs:
        features = at_least_float32(features)
        with torch.autocast(features.device.type, enabled=False):
            standardised = (features - self.center.to(features)) / self.scale.to(features)
            return {"features": features, "standardised": self.answers(standardised)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return {"loss": absolute_error(outputs["standardised"], self.standardise(targets.values), targets.weights)}

    def predict(self, outputs: Outputs) -> Prediction:
        return self.predict_value(outputs["standardised"])

    @torch.no_grad()
    def fit(self, train: tuple[Outputs, Targets], validation: tuple[Outputs, Targets] | None) -> None:
        learned, asked = self._samples(train), None if validation is None else self._samples(validation)
        center = np.average(learned.features, axis=0, weights=learned.weights)
        scale = np.sqrt(np.average(np.square(learned.features - center), axis=0, weights=learned.weights))
        typical = np.sqrt(np.mean(np.square(center) + np.square(scale)))
        scale[scale <= DEAD * typical] = typical or 1.0
        self.center.copy_(torch.from_numpy(center))
        self.scale.copy_(torch.from_numpy(scale))
        for part in (learned, asked):
            if part is not None:
                np.divide(np.subtract(part.features, center, out=part.features), scale, out=part.features)
        self.solve(learned, asked)

    def _samples(self, part: tuple[Outputs, Targets]) -> Samples:
        """A part with its features as they came, in arrays of its own."""
        outputs, targets = part
        features = check_numbers(outputs["features"]).to(torch.float64, copy=True).cpu().numpy()
        labels = self.standardise(targets.values.double()).cpu().numpy()
        weights = np.ones(len(labels)) if targets.weights is None else targets.weights.double().cpu().numpy()
        return Samples(features, labels, weights)


class Ridge(FrozenRegressor):
    """Ridge regression on frozen features: squared error and a penalty on the weights, solved exactly.

    Paper: Hoerl, Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", Technometrics 1970.

    The reference for what the features of an encoder show as they are, to a line through them. It minimises
    sum_i w_i (y_i - x_i a - b)^2 + alpha |a|^2 for features and labels standardised by the training part; alpha has the
    smallest mean absolute error on the validation part, which is not learned from, or, where there is none, when every
    training sample is answered by all others. Of `train.*` only the weights of samples count (`train.weighting`).

    Args:
        alphas: penalties to choose from.
    """

    weight: Tensor

    def __init__(self, context: HeadContext, alphas: Grid = ALPHAS):
        super().__init__(context)
        self.alphas = sorted(alphas, reverse=True)
        self.register_buffer("weight", torch.zeros(context.input_dim))

    def answers(self, features: Tensor) -> Tensor:
        return features @ self.weight.to(features) + self.offset.to(features)

    def solve(self, train: Samples, validation: Samples | None) -> None:
        from sklearn.linear_model import Ridge as Solver
        from sklearn.linear_model import RidgeCV

        def solved(alpha: float) -> Any:
            return Solver(alpha).fit(*train)

        if validation is not None:
            alpha = min(self.alphas, key=lambda alpha: _error(solved(alpha).predict(validation.features), validation))
        elif len(train.labels) > 1:
            alpha = RidgeCV(self.alphas, scoring="neg_mean_absolute_error").fit(*train).alpha_
        else:
            alpha = self.alphas[0]
        _tell_of_ends(train, {"alphas": (alpha, self.alphas)})
        solution = solved(alpha)
        self.weight.copy_(torch.from_numpy(solution.coef_))
        self.offset.fill_(float(solution.intercept_))


class SVR(FrozenRegressor):
    """Support vector regression on frozen features, with a Gaussian kernel.

    Paper: Drucker, Burges, Kaufman, Smola, Vapnik, "Support Vector Regression Machines", NIPS 1996.

    The reference for what the features of an encoder show as they are, to a smooth function of them. It minimises
    |a|^2 / 2 + C sum_i w_i max(0, |y_i - f(x_i)| - epsilon) for features and labels standardised by the training part,
    with the kernel exp(-gamma |x - x'|^2 / D). Of all settings in the grid that with the smallest mean absolute error
    on the validation part is taken, which is not learned from, or, where there is none, in cross-validation on the
    training part. Of `train.*` only the weights of samples count (`train.weighting`).

    Distances are computed once for all settings, in a table of all pairs of training samples: 16 N^2 bytes at the peak,
    and a time that grows with N^2 at least (35 s on a CPU core for 4,800 samples of 1,280 features). A saved model
    holds the features of the support vectors, which may be most of the training part.

    Args:
        costs: C, the price of an error beyond epsilon, to choose from.
        gammas: of the kernel, to choose from; 1 is scikit-learn's `gamma="scale"`.
        epsilons: errors that cost nothing, to choose from; in standard deviations of the training labels.

    Raises:
        ValueError: more than 20,000 training samples.
    """

    gamma: Tensor
    support: Tensor
    coefficients: Tensor

    def __init__(
        self,
        context: HeadContext,
        costs: Grid = (0.3, 1.0, 3.0, 10.0, 30.0),
        gammas: Grid = (0.03, 0.1, 0.3, 1.0, 3.0),
        epsilons: Grid = (0.03, 0.1, 0.3),
    ):
        super().__init__(context)
        self.costs, self.gammas, self.epsilons = sorted(costs), sorted(gammas), sorted(epsilons, reverse=True)
        self.register_buffer("gamma", torch.ones(()))
        self.register_buffer("support", torch.zeros(1, context.input_dim))
        self.register_buffer("coefficients", torch.zeros(1))

    def answers(self, features: Tensor) -> Tensor:
        support = self.support.to(features)
        squared = features.square().sum(dim=1, keepdim=True) + support.square().sum(dim=1) - 2 * features @ support.t()
        kernel = torch.exp(-self.gamma.to(features) / features.shape[1] * squared.clamp(min=0))
        return kernel @ self.coefficients.to(features) + self.offset.to(features)

    def solve(self, train: Samples, validation: Samples | None) -> None:
        from sklearn.metrics.pairwise import euclidean_distances
        from sklearn.svm import SVR as Solver

        count, width = train.features.shape
        if count > LARGEST:
            raise ValueError(
                f"method svr holds a table of all pairs of training samples, of which it takes {LARGEST:,} at most; "
                f"there are {count:,}: draw fewer with data.train_share, or take method=ridge"
            )

        def solved(kernel: np.ndarray, cost: float, epsilon: float, rows: Rows = EVERY) -> Any:
            machine = Solver(kernel="precomputed", C=cost, epsilon=epsilon)
            return machine.fit(kernel, train.labels[rows], train.weights[rows])

        asked = train if validation is None else validation
        pairs = euclidean_distances(train.features, squared=True)
        to = pairs if validation is None else euclidean_distances(asked.features, train.features, squared=True)
        answers = {each: np.empty(len(asked.labels)) for each in product(self.gammas, self.costs, self.epsilons)}
        for gamma in self.gammas:
            kernel = _gaussian(pairs, gamma / width)
            asked_kernel = kernel if validation is None else _gaussian(to, gamma / width)
            for learned, held in [(EVERY, EVERY)] if validation is not None else _folds(count):
                among, towards = kernel[learned][:, learned], asked_kernel[held][:, learned]
                for cost, epsilon in product(self.costs, self.epsilons):
                    answers[gamma, cost, epsilon][held] = solved(among, cost, epsilon, learned).predict(towards)
        gamma, cost, epsilon = min(answers, key=lambda setting: _error(answers[setting], asked))
        _tell_of_ends(train, {"costs": (cost, self.costs), "gammas": (gamma, self.gammas)})

        solution = solved(_gaussian(pairs, gamma / width), cost, epsilon)
        rows, coefficients = np.zeros(1, np.int64), np.zeros(1)  # a buffer without elements would not be saved
        if len(solution.support_):  # else no error is beyond epsilon
            rows, coefficients = solution.support_, solution.dual_coef_[0]
        self.gamma.fill_(gamma)
        self.support = torch.from_numpy(train.features[rows]).to(self.support)
        self.coefficients = torch.from_numpy(coefficients).to(self.coefficients)
        self.offset.fill_(float(solution.intercept_[0]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Make room for any number of support vectors; their width, and one coefficient each, are checked as always."""
        support = state_dict.get(prefix + "support")
        if support is not None and support.ndim == 2:
            self.support = self.support.new_empty(len(support), self.support.shape[1])
            self.coefficients = self.coefficients.new_empty(len(support))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _error(answers: np.ndarray, part: Samples) -> float:
    """Weighted mean absolute error of (N,) answers, standardised as the labels are."""
    return float(np.average(np.abs(answers - part.labels), weights=part.weights))


def _folds(count: int) -> list[tuple[Rows, Rows]]:
    """Rows to learn from and rows held out; a single one is both."""
    from sklearn.model_selection import KFold

    if count == 1:
        return [(EVERY, EVERY)]
    return list(KFold(min(FOLDS, count), shuffle=True, random_state=0).split(np.empty((count, 0))))


def _gaussian(squared: np.ndarray, gamma: float) -> np.ndarray:
    """exp(-gamma d^2)."""
    kernel = squared * -gamma
    return np.exp(kernel, out=kernel)


def _tell_of_ends(train: Samples, chosen: Mapping[str, tuple[float, Sequence[float]]]) -> None:
    """Warn where the best of a grid is its first or last value, so that a better one may be beyond it."""
    for name, (value, grid) in chosen.items():
        if len(grid) > 1 and value in (min(grid), max(grid)) and np.ptp(train.labels) > 0:
            end = "smallest" if value == min(grid) else "largest"
            logger.warning("head.%s: the %s of the grid is the best, %g; try a wider one", name, end, value)
