"""Whether one method's errors are larger than another's on the same images, or only happen to be."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ordinalclip.metrics import bootstrap_interval, mean_absolute_error

LEVEL = 0.05  # below it a difference counts


@dataclass(frozen=True)
class Verdict:
    """A method's absolute errors beside those of the best method.

    Attributes:
        mae: mean over images, with its 95 % bootstrap interval.
        difference: of the mean to the best method's, with its 95 % bootstrap interval over the same images.
        p: of the one-tailed paired t-test, that these errors are no larger than the best method's; None for the best.
        p_holm: the same, corrected for the number of methods.
    """

    mae: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    p: float | None = None
    p_holm: float | None = None


def judge(errors: dict[str, np.ndarray], best: str) -> dict[str, Verdict]:
    """Compare every method with the best.

    Args:
        errors: by method, (N,) absolute errors on the same N images, in the same order.
        best: the method to compare with.

    Raises:
        ValueError: lengths that differ, or fewer than two images.
    """
    lengths = {name: len(values) for name, values in errors.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        raise ValueError(f"every method needs errors on the same images, two at least, got {lengths}")
    others = [name for name in errors if name != best]
    raw = [greater_p_value(errors[name], errors[best]) for name in others]
    p_values = dict(zip(others, zip(raw, holm(raw), strict=True), strict=True))
    verdicts = {}
    for name, values in errors.items():
        p, p_holm = p_values.get(name, (None, None))
        verdicts[name] = Verdict(
            mae=float(values.mean()),
            interval=bootstrap_interval(mean_absolute_error, values, np.zeros_like(values)),
            difference=float((values - errors[best]).mean()),
            difference_interval=bootstrap_interval(_mean_difference, values, errors[best]),
            p=p,
            p_holm=p_holm,
        )
    return verdicts


def greater_p_value(errors: ArrayLike, reference: ArrayLike) -> float:
    """One-tailed paired t-test: how likely so much larger errors are if their mean is no larger than the reference's.

    Args:
        errors, reference: (N,) absolute errors on the same images, N >= 2.

    >>> greater_p_value([2.0, 3.0, 5.0], [1.0, 2.0, 2.0]) < 0.08
    True
    >>> greater_p_value([1.0, 2.0], [1.0, 2.0])
    1.0
    """
    first, second = np.asarray(errors, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    gaps = first - second
    if np.ptp(gaps) == 0:  # the t statistic is 0 / 0, or infinite
        return 0.0 if gaps[0] > 0 else 1.0
    return float(stats.ttest_rel(first, second, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down procedure (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [1.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def errors_by_image(images: Sequence[Hashable], errors: ArrayLike) -> np.ndarray:
    """One error per distinct image: repeated splits and seeds test some images several times, and errors on one image
    are no independent observations.

    Args:
        images: (M,) what identifies the image of each error.
        errors: (M,).

    Returns:
        (N,) sums of the errors on an image over the mean number of errors per image, so that their mean is that of all
        errors; images in order of their first appearance.

    >>> errors_by_image(["b", "a", "b"], [1.0, 5.0, 3.0])
    array([2.66666667, 3.33333333])
    """
    places: dict[Hashable, int] = {}
    found = np.asarray([places.setdefault(image, len(places)) for image in images], dtype=np.int64)
    return np.bincount(found, np.asarray(errors, dtype=np.float64)) * len(places) / len(found)


def _mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float((first - second).mean())
