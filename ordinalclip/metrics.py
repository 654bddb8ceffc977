"""Metrics of ordered predictions: pure functions, one record for each, and modules of the `evaluate` library.

All but those of a feature space (in `space.py`), `ordinality` and `shot_groups` take (N,) predictions and references
over the WHOLE test part: never average them over batches. A new metric is a function and an entry of `METRICS`: it is
then in metrics.json, reports, model cards and the tables and figures of comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from ordinalclip.ranks import Decoding
from ordinalclip.space import best_residual_variance as best_residual_variance
from ordinalclip.space import d5 as d5
from ordinalclip.space import residual_variance as residual_variance

EMPTY = "no predictions to score: the part is empty"


def mean_absolute_error(predictions: ArrayLike, references: ArrayLike) -> float:
    """MAE, in the label's unit.

    >>> mean_absolute_error([20, 30], [21, 27])
    2.0
    """
    predicted, true = _pair(predictions, references)
    return float(np.abs(predicted - true).mean())


def root_mean_squared_error(predictions: ArrayLike, references: ArrayLike) -> float:
    """RMSE, in the label's unit."""
    predicted, true = _pair(predictions, references)
    return float(np.sqrt(((predicted - true) ** 2).mean()))


def r2_score(predictions: ArrayLike, references: ArrayLike) -> float:
    """Coefficient of determination; NaN when all references are equal."""
    predicted, true = _pair(predictions, references)
    total = ((true - true.mean()) ** 2).sum()
    return float(1 - ((predicted - true) ** 2).sum() / total) if total > 0 else float("nan")


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of predicted ranks that equal the true rank."""
    predicted, true = _pair(predictions, references)
    return float((predicted == true).mean())


def cumulative_score(predictions: ArrayLike, references: ArrayLike, k: float = 5) -> float:
    """CS@k: share of absolute errors of at most k, in the label's unit (Chang et al., CVPR 2011)."""
    predicted, true = _pair(predictions, references)
    return float((np.abs(predicted - true) <= k + 1e-9).mean())


def pearson(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson's linear correlation (PLC); NaN when either side is constant."""
    predicted, true = _pair(predictions, references)
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return float("nan")
    return float(np.corrcoef(predicted, true)[0, 1])


def spearman(predictions: ArrayLike, references: ArrayLike) -> float:
    """Spearman's rank correlation (SRC), ties at their mean rank; NaN when either side is constant."""
    predicted, true = _pair(predictions, references)
    return pearson(stats.rankdata(predicted), stats.rankdata(true))


def macro_mae(predictions: ArrayLike, references: ArrayLike, ranks: ArrayLike | None = None) -> float:
    """MAE averaged over ranks: that of each true rank counts once, however many images it has, in the label's unit.

    The macroaveraged MAE of Baccianella et al. (ISDA 2009): rare ranks weigh as much as common ones.

    Args:
        ranks: (N,) true rank of every image; default: a rank for every distinct reference.

    >>> macro_mae([1, 1, 1, 5], [1, 1, 2, 4])
    0.6666666666666666
    """
    predicted, true = _pair(predictions, references)
    _, rank = np.unique(true if ranks is None else np.asarray(ranks), return_inverse=True)
    return float((np.bincount(rank, np.abs(predicted - true)) / np.bincount(rank)).mean())


def off_by_one_accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of predicted ranks that are the true rank or a neighbour of it; both are rank indices."""
    predicted, true = _pair(predictions, references)
    return float((np.abs(predicted - true) <= 1).mean())


def quadratic_weighted_kappa(predictions: ArrayLike, references: ArrayLike) -> float:
    """Cohen's kappa of rank indices, disagreement weighted by the squared distance in rank (Cohen, 1968).

    1 - E[(p - r)^2] / E[(p - r')^2], r' being the reference of another, independent image. That is what
    scikit-learn's `cohen_kappa_score(weights="quadratic", labels=range(R))` computes from its (R, R) table; from the
    moments it takes a fiftieth of the time, which a bootstrap asks for a thousand times. NaN where both are one and
    the same rank throughout.

    >>> quadratic_weighted_kappa([0, 1, 2, 3], [0, 1, 3, 2])
    0.8
    """
    predicted, true = _pair(predictions, references)
    chance = predicted.var() + true.var() + (predicted.mean() - true.mean()) ** 2
    return float(1 - ((predicted - true) ** 2).mean() / chance) if chance > 0 else float("nan")


def ranked_probability_score(probabilities: ArrayLike, references: ArrayLike) -> float:
    """RPS: mean over images of the sum over k < R - 1 of (P(rank <= k) - 1[true rank <= k])^2 (Epstein, 1969).

    In ranks: a certain answer that is d ranks off scores d, so it is the MAE in ranks of a whole distribution. It is
    not divided by R - 1.

    Args:
        probabilities: (N, R) distributions over the ranks.
        references: (N,) true rank indices.

    >>> ranked_probability_score([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]], [0, 0])
    1.125
    """
    return float(ranked_probability_scores(probabilities, references).mean())


def ranked_probability_scores(probabilities: ArrayLike, references: ArrayLike) -> np.ndarray:
    """(N,) `ranked_probability_score` of every image.

    >>> ranked_probability_scores([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]], [0, 0]).tolist()
    [2.0, 0.25]
    """
    distributions, true = np.asarray(probabilities, dtype=np.float64), np.asarray(references)
    if distributions.ndim != 2 or true.shape != distributions.shape[:1]:
        raise ValueError(f"probabilities must be (N, R) and references (N,), got {distributions.shape}, {true.shape}")
    if true.size == 0:
        raise ValueError(EMPTY)
    reached = true[:, None] <= np.arange(distributions.shape[1] - 1)
    return ((distributions[:, :-1].cumsum(axis=1) - reached) ** 2).sum(axis=1)


def bootstrap_interval(
    metric: Callable[..., float],
    *columns: ArrayLike,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric over the rows of one part (Efron & Tibshirani, 1993).

    Args:
        metric: takes the columns.
        columns: (N, ...) each, N >= 1: what the metric is computed from, usually predictions and references.

    It says how far the metric would move with other images of the same kind, not with another training.

    On a resample the metric may not be defined: a correlation where all answers are equal. Left out, such resamples
    would take with them what they stand for (no correlation), and the interval of the others could not hold 0. So they
    count as unknown, as the smallest value for the lower end and as the largest for the upper. From a share of
    (1 - level) / 2 on, 2.5 %, nothing bounds the interval: NaN, NaN.

    >>> low, high = bootstrap_interval(mean_absolute_error, [20, 30, 44], [21, 27, 40])
    >>> 1 <= low <= 8 / 3 <= high <= 4
    True
    """
    given = [np.asarray(column) for column in columns]
    if len({len(column) for column in given}) != 1 or len(given[0]) == 0:
        raise ValueError(f"columns must be (N, ...) of one length N >= 1, got {[column.shape for column in given]}")
    rng, num = np.random.default_rng(seed), len(given[0])
    rows = (rng.integers(0, num, num) for _ in range(resamples))
    values = np.asarray([metric(*(column[chosen] for column in given)) for chosen in rows])
    unknown = ~np.isfinite(values)
    with np.errstate(invalid="ignore"):  # between an infinite and a finite value lies none
        low = np.quantile(np.where(unknown, -np.inf, values), (1 - level) / 2)
        high = np.quantile(np.where(unknown, np.inf, values), (1 + level) / 2)
    return (float(low), float(high)) if np.isfinite([low, high]).all() else (float("nan"), float("nan"))


def shot_groups(train_counts: ArrayLike) -> dict[str, np.ndarray]:
    """Which ranks have many, a medium number of, or few training labels (Yang et al., ICML 2021).

    Args:
        train_counts: (R,) number of training labels of each rank.

    Returns:
        (R,) masks: "many" (more than 100), "medium" (20 to 100), "few" (less than 20, none included), and "unseen",
        those of the few that have no training label at all.
    """
    counts = np.asarray(train_counts)
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20, "unseen": counts == 0}


def mae_by_shots(
    predictions: ArrayLike, references: ArrayLike, label_ranks: ArrayLike, train_counts: ArrayLike
) -> dict[str, dict[str, float | int | None]]:
    """MAE of the images whose rank belongs to each of `shot_groups`.

    Args:
        label_ranks: (N,) true rank of every image.
        train_counts: (R,) number of training labels of each rank.

    Returns:
        by group: "ranks" and "num", the numbers of ranks and of images, and "mae", None without images.
    """
    predicted, true = _pair(predictions, references)
    table: dict[str, dict[str, float | int | None]] = {}
    for name, members in shot_groups(train_counts).items():
        chosen = members[np.asarray(label_ranks)]
        mae = mean_absolute_error(predicted[chosen], true[chosen]) if chosen.any() else None
        table[name] = {"ranks": int(members.sum()), "num": int(chosen.sum()), "mae": mae}
    return table


def constant_answer(train_counts: ArrayLike, values: ArrayLike) -> float:
    """The answer with the smallest MAE that does not look at the picture: the median rank of the training labels.

    Args:
        train_counts: (R,) number of training labels of each rank.
        values: (R,) of the ranks.

    >>> constant_answer([1, 3, 0, 1], [10, 20, 30, 40])
    20.0
    """
    below = np.cumsum(np.asarray(train_counts, dtype=np.float64))
    return float(np.asarray(values)[np.searchsorted(below, below[-1] / 2)])


def against_constant(predictions: ArrayLike, references: ArrayLike, answer: float) -> dict[str, float | None]:
    """Predictions beside one answer for every picture.

    Args:
        answer: see `constant_answer`.

    Returns:
        "answer"; "mae", its MAE; "p" of the one-tailed paired t-test that the predictions' errors are no smaller, None
        for a single image; "spread", the standard deviation of the predictions as a share of that of the references,
        None where these are all equal.

    >>> beside = against_constant([20, 40], [21, 37], 25)
    >>> beside["mae"], beside["spread"], round(beside["p"], 3)
    (8.0, 1.25, 0.148)
    """
    predicted, true = _pair(predictions, references)
    errors, constant = np.abs(predicted - true), np.abs(answer - true)
    deviation = true.std()
    if len(true) < 2:
        p = None
    elif np.ptp(constant - errors) == 0:  # the t statistic is 0 / 0, or infinite
        p = 0.0 if constant[0] > errors[0] else 1.0
    else:
        p = float(stats.ttest_rel(constant, errors, alternative="greater").pvalue)
    spread = float(predicted.std() / deviation) if deviation > 0 else None
    return {"answer": float(answer), "mae": float(constant.mean()), "p": p, "spread": spread}


STILL = 0.05  # answers that vary less than this share of the labels' spread are nearly constant


def doubt(scores: Mapping[str, Any], say: Callable[[float], str] = "{:.7g}".format) -> str:
    """Why a model that was scored is no success, in words; "" where nothing speaks against it.

    Args:
        scores: of a part, as in metrics.json.
        say: how a value is said, e.g. `Ranks.say`.
    """
    beside, mae = scores.get("constant"), scores.get("mae")
    if beside is None or mae is None:
        return ""
    if mae < beside["mae"] and beside["p"] is not None and beside["p"] < 0.05:
        return ""
    if beside["spread"] is not None and beside["spread"] < STILL:
        why = "nearly the same answer for every picture"
    elif mae >= beside["mae"]:
        why = "no better than one answer for every picture"
    else:
        why = f"not shown to be better than one answer for every picture, with {scores['num']} images"
    return f"{why} (MAE {mae:.4g}; always answering {say(beside['answer'])}: {beside['mae']:.4g})"


def ordinality(prototypes: Tensor) -> float:
    """Share of prototype similarities that fall with the distance in rank (OrdinalCLIP, table 6).

    Among all ranks i <= j <= R - 2: how often cosine(i, j) > cosine(i, j + 1).

    Args:
        prototypes: (R, D) rank prototypes, R >= 2; they need not be normalised.

    Returns:
        share in [0, 1]; 1 when similarity falls at every step away from every rank.
    """
    if prototypes.ndim != 2 or len(prototypes) < 2:
        raise ValueError(f"prototypes must be (R, D) with R >= 2, got shape {tuple(prototypes.shape)}")
    unit = torch.nn.functional.normalize(prototypes.detach().double(), dim=1)
    similarity = unit @ unit.t()
    row, column = torch.triu_indices(len(unit) - 1, len(unit) - 1)
    return (similarity[row, column] > similarity[row, column + 1]).double().mean().item()


def _pair(predictions: ArrayLike, references: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise ValueError(f"predictions and references must be (N,), got {predicted.shape} and {true.shape}")
    if predicted.size == 0:
        raise ValueError(EMPTY)
    return predicted, true


@dataclass(frozen=True)
class Metric:
    """What is known of one metric, wherever it is computed, tested, written or drawn. Calling it calls its function.

    Attributes:
        function: of the columns named by `of`, in that order; a float, NaN where it is not defined.
        title: of its column, tile and axis.
        meaning: in words, for people who do not know the title.
        of: columns of a part: "values", "labels" (N,) in the label's unit; "ranks", "label_ranks" (N,) rank indices;
            "probabilities" (N, R); "space" (N, E), the points of the feature space. Or "prototypes" (R, D), of a model.
        decoding: by which predicted values and ranks the metric itself is computed; None: it takes neither.
        in_unit: whether it carries the label's unit.
        falls: whether smaller is better.
        least: images below which it is not computed.
    """

    function: Callable[..., float]
    title: str
    meaning: str
    of: tuple[str, ...] = ("values", "labels")
    decoding: Decoding | None = "median"
    in_unit: bool = False
    falls: bool = False
    least: int = 1

    def __call__(self, *columns: Any, **options: Any) -> float:
        return self.function(*columns, **options)

    @property
    def is_decoded(self) -> bool:
        """Whether it is computed from decoded values or ranks, and so under each decoding."""
        return self.decoding is not None

    def score(self, columns: Mapping[str, Any]) -> float | None:
        """The metric of named columns; None where one is missing, there are too few images, or it is not defined."""
        given = [columns.get(name) for name in self.of]
        known = [column for column in given if column is not None]
        if len(known) < len(given) or len(known[-1]) < self.least:
            return None
        value = self.function(*known)
        return None if np.isnan(value) else value


NEIGHBOURHOODS = (5, 10, 20, 50)  # sizes among which the residual variance takes the best, unless a run says others
SUBSET = 1000  # points at a time, of a larger set


def _smallest_residual_variance(points: Any, labels: ArrayLike, ks: Sequence[int] = NEIGHBOURHOODS) -> float:
    usable = [k for k in ks if k <= min(len(points), SUBSET)]
    return best_residual_variance(points, labels, usable, SUBSET)[0] if usable else float("nan")


RANKS = ("ranks", "label_ranks")
METRICS: dict[str, Metric] = {
    "mae": Metric(mean_absolute_error, "MAE", "mean absolute error", in_unit=True, falls=True),
    "macro_mae": Metric(
        macro_mae,
        "macro MAE",
        "mean absolute error, averaged over the true ranks",
        ("values", "labels", "label_ranks"),
        in_unit=True,
        falls=True,
    ),
    "rmse": Metric(root_mean_squared_error, "RMSE", "root mean squared error", in_unit=True, falls=True),
    "r2": Metric(r2_score, "R²", "share of variance explained"),
    "accuracy": Metric(accuracy, "accuracy", "share of ranks hit exactly", RANKS, "argmax"),
    "off_by_one": Metric(off_by_one_accuracy, "off by one", "share of ranks missed by one at most", RANKS, "argmax"),
    "cs": Metric(cumulative_score, "CS", "share of errors of at most this, in the label's unit"),
    "qwk": Metric(quadratic_weighted_kappa, "QWK", "quadratic weighted kappa of the ranks", RANKS, "argmax"),
    "rps": Metric(
        ranked_probability_score,
        "RPS",
        "ranked probability score of the distribution, in ranks",
        ("probabilities", "label_ranks"),
        None,
        falls=True,
    ),
    "pearson": Metric(pearson, "Pearson", "linear correlation"),
    "spearman": Metric(spearman, "Spearman", "rank correlation"),
    "d5": Metric(
        d5, "D5", "label distance to the five nearest in feature space", ("space", "labels"), None, True, True, 6
    ),
    "residual_variance": Metric(
        _smallest_residual_variance,
        "RV",
        "residual variance: label distances that distances along the feature space do not explain",
        ("space", "labels"),
        None,
        falls=True,
        least=min(NEIGHBOURHOODS),
    ),
    "ordinality": Metric(
        ordinality,
        "ordinality",
        "share of prototype similarities that fall with the distance in rank",
        ("prototypes",),
        None,
    ),
}


def decodings() -> str:
    """By which decoding metrics are computed, as a clause for people."""
    by_argmax = [metric.title for metric in METRICS.values() if metric.decoding == "argmax"]
    return f"values by median; {', '.join(by_argmax)} by argmax"


def metrics_with(cs: Sequence[float] = (5.0,), ks: Sequence[int] = NEIGHBOURHOODS) -> dict[str, Metric]:
    """`METRICS` with the options of a run: "cs" becomes a metric "cs@k" for every k.

    Args:
        cs: of `cumulative_score`; ks: sizes of the neighbourhood for the residual variance.
    """
    bound: dict[str, Metric] = {}
    for name, metric in METRICS.items():
        if name == "cs":
            for k in cs:
                function = partial(cumulative_score, k=k)
                bound[f"cs@{k:g}"] = replace(metric, function=function, title=f"CS@{k:g}")
        elif name == "residual_variance":
            bound[name] = replace(metric, function=partial(_smallest_residual_variance, ks=ks), least=min(ks))
        else:
            bound[name] = metric
    return bound


class OrdinalMetric(evaluate.Metric):
    """One of `METRICS` as a module of the `evaluate` library; build it with `load_metric`."""

    def __init__(self, name: str, **kwargs: Any):
        self.metric_name = name
        super().__init__(config_name=name, keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        metric = METRICS[self.metric_name]
        predictions = datasets.Sequence(number) if "probabilities" in metric.of else number
        return evaluate.MetricInfo(
            description=(metric.function.__doc__ or "").strip(),
            citation="",
            inputs_description=f"predictions and references: {metric.of[0]} and {metric.of[1]}",
            features=datasets.Features({"predictions": predictions, "references": number}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float], **options: Any) -> dict[str, float]:
        return {self.metric_name: METRICS[self.metric_name](predictions, references, **options)}

    def compute(self, **kwargs: Any) -> dict[str, float]:
        """As in `evaluate`; an empty metric raises a ValueError that says so."""
        if not kwargs.get("predictions", True) or (self.writer is None and "predictions" not in kwargs):
            raise ValueError(f"{self.metric_name}: nothing was added; call add_batch first or pass predictions")
        return super().compute(**kwargs)


def load_metric(name: str) -> OrdinalMetric:
    """A metric as an `evaluate` module, without network.

    Raises:
        ValueError: an unknown name; the message lists the choices.

    >>> load_metric("mae").compute(predictions=[20, 30], references=[21, 27])
    {'mae': 2.0}
    """
    choices = [known for known, metric in METRICS.items() if not {"space", "prototypes"} & set(metric.of)]
    if name not in choices:
        raise ValueError(f"metric {name!r} is unknown; choices: {', '.join(choices)}")
    return OrdinalMetric(name)
