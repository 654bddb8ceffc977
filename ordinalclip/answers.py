"""What a model answers to pictures, a batch at a time: the engine below the command, bulk prediction and data frames.

A picture goes the way it goes in training's evaluation and in the pipeline: `load_image`, `prepare`, encoder, head. One
that cannot be read is a row with its error, or ends it all; the others' answers do not depend on it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ordinalclip.heads import NoNumber, Prediction
from ordinalclip.images import FORMATS, BrokenImageError, PixelSpec, load_image, prepare
from ordinalclip.model import OrdinalModel
from ordinalclip.processing import OrdinalImageProcessor
from ordinalclip.ranks import Ranks
from ordinalclip.workers import decoded

if TYPE_CHECKING:
    import pandas as pd

Errors = Literal["keep", "stop"]
NOT_FINITE = "the model answers this picture with a number that is not finite"


@dataclass(frozen=True)
class Answers:
    """Answers to N pictures, in their order.

    Attributes:
        values: (N,) float64 in the label's unit, as the model's own decoding gives them; NaN for a broken picture.
        ranks: (N,) int64; -1 for a broken picture.
        probabilities: (N, R) float32, NaN for a broken picture; None for heads without.
        errors: of each picture why it is broken, or None.
        intervals: (N, 2) lower and upper ends in the label's unit, NaN for a broken picture; None: not asked for.
    """

    values: np.ndarray
    ranks: np.ndarray
    probabilities: np.ndarray | None
    errors: list[str | None]
    intervals: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def joined(cls, pieces: Iterable[Answers]) -> Answers:
        """Answers one after the other, of one model.

        Raises:
            ValueError: there is none.
        """
        every = list(pieces)
        if not every:
            raise ValueError("no pictures, so there are no answers")
        found = [piece.probabilities for piece in every if piece.probabilities is not None]
        ends = [piece.intervals for piece in every if piece.intervals is not None]
        return cls(
            np.concatenate([piece.values for piece in every]),
            np.concatenate([piece.ranks for piece in every]),
            np.concatenate(found) if found else None,
            [error for piece in every for error in piece.errors],
            np.concatenate(ends) if ends else None,
        )

    def to_arrow(self, ranks: Ranks) -> pa.Table:
        """A row per picture: value, rank, name, low and high (where asked for), probabilities (of heads that have
        them), error; null where there is none."""
        broken = self.ranks < 0
        rank = pa.array(self.ranks, mask=broken)
        columns = {
            "value": pa.array(self.values, mask=broken),
            "rank": rank,
            "name": pa.array(ranks.names, pa.string()).take(rank),
        }
        if self.intervals is not None:
            columns |= {name: pa.array(self.intervals[:, i], mask=broken) for i, name in enumerate(("low", "high"))}
        if self.probabilities is not None:
            ends = np.append(0, np.cumsum(np.where(broken, 0, self.probabilities.shape[1]))).astype(np.int32)
            likely = pa.array(self.probabilities[~broken].ravel(), pa.float32())
            columns["probabilities"] = pa.ListArray.from_arrays(ends, likely, mask=pa.array(broken))
        return pa.table({**columns, "error": pa.array(self.errors, pa.string())})

    def to_frame(self, ranks: Ranks) -> pd.DataFrame:
        """The same as a frame: value NaN, rank (Int64) <NA> and name None for a broken picture."""
        import pandas as pd

        frame = self.to_arrow(ranks).drop_columns("rank").to_pandas()
        frame.insert(1, "rank", pd.arrays.IntegerArray(self.ranks.copy(), self.ranks < 0))
        return frame


def load_model(name: str) -> OrdinalModel:
    """The model of a folder or a name on the hub, whose image processor gives the pixels that it wants.

    Raises:
        OSError, ValueError: see `OrdinalModel.from_pretrained` and `OrdinalImageProcessor.from_pretrained`.
    """
    model = OrdinalModel.from_pretrained(name)
    OrdinalImageProcessor.from_pretrained(name)
    return model


def answer(
    model: OrdinalModel,
    pictures: Sequence[Any],
    batch_size: int = 32,
    workers: int = 0,
    formats: Sequence[str] = FORMATS,
    errors: Errors = "keep",
    names: Sequence[str] | None = None,
    batches: Iterable[list[int]] | None = None,
    prefetch: int = 2,
    interval: float | None = None,
) -> Generator[Answers, None, None]:
    """What a model answers, on its device and in its precision; a batch is decoded when it is asked for.

    Args:
        model: is set to evaluate.
        pictures: by index, each asked for when its turn comes: what `load_image` takes. One may raise
            `BrokenImageError` itself.
        batch_size: pictures at once.
        workers: processes that decode pictures ahead; 0: this one does.
        formats: of files that are read, see `read_formats`.
        errors: of a picture that cannot be read: "keep" makes it a row with its error, "stop" raises it.
        names: what to call pictures in the error that is raised; default: their paths, or "picture N", from 1.
        batches: indices of the pictures of each batch; default: all, in order.
        prefetch: batches that each worker is ahead.
        interval: level of the intervals that are given, too, see `OrdinalModel.interval`.

    Raises:
        ValueError: another `errors`, an interval that the model has not; NoNumber: the model answers every picture of a
            batch, or under "stop" one, with what is not finite (else that is a row with its error); BrokenImageError:
            see `errors`; ChildProcessError: a process that decodes was killed.

    >>> [len(batch) for batch in answer(model, ["a.png", "b.png", "c.png"], batch_size=2)]  # doctest: +SKIP
    [2, 1]
    """
    if errors not in get_args(Errors):
        raise ValueError(f"errors must be keep or stop, got {errors!r}")
    model.eval()
    if interval is not None:
        model.check_interval(interval)
    if batches is None:
        rows = range(len(pictures))
        batches = (list(rows[begin : begin + batch_size]) for begin in range(0, len(rows), batch_size))
    with decoded(
        _Pixels(pictures, model.config.pixel_spec, formats, errors, names), batches, workers, prefetch
    ) as loaded:
        for pixels, reasons in loaded:
            yield _answered(model, pixels, [reason or None for reason in reasons], errors, interval)


class _Pixels(Dataset):
    """Prepared pictures by index: (3, size, size) and "", or zeros and why the picture cannot be read."""

    def __init__(
        self,
        pictures: Sequence[Any],
        spec: PixelSpec,
        formats: Sequence[str],
        errors: Errors,
        names: Sequence[str] | None,
    ):
        self.pictures, self.spec, self.formats, self.errors, self.names = pictures, spec, formats, errors, names

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            picture = load_image(self.pictures[index], f"picture {index + 1}", self.formats)
            return prepare(picture, self.spec), ""
        except BrokenImageError as error:
            if self.errors == "stop":
                raise error if self.names is None else BrokenImageError(self.names[index], error.reason) from error
            return torch.zeros(3, self.spec.size, self.spec.size), error.reason


def _answered(
    model: OrdinalModel, pixels: Tensor, reasons: list[str | None], errors: Errors, interval: float | None
) -> Answers:
    """One batch. Where all are broken the model answers a blank picture, by which it says whether it has probabilities.
    Of a batch in which no picture has a number not the pictures are to blame, but the model."""
    good = np.flatnonzero([reason is None for reason in reasons])
    try:
        readable = pixels if len(good) == len(pixels) else pixels[good]  # most batches need no copy
        found = _predict(model, readable if len(good) else torch.zeros_like(pixels[:1]))
    except NoNumber:
        if errors == "stop" or len(good) < 2:
            raise
        pieces = [_alone(model, pixels[[index]], reason, interval) for index, reason in enumerate(reasons)]
        if all(pieces[index].errors[0] for index in good):
            raise
        return Answers.joined(pieces)
    values, ranks = np.full(len(reasons), np.nan), np.full(len(reasons), -1, np.int64)
    probabilities = None
    if found.probabilities is not None:
        probabilities = np.full((len(reasons), found.probabilities.shape[1]), np.nan, np.float32)
        probabilities[good] = found.probabilities[: len(good)].float().cpu().numpy()
    values[good] = found.value[: len(good)].double().cpu().numpy()
    ranks[good] = found.rank[: len(good)].cpu().numpy()
    ends = None
    if interval is not None:
        ends = np.full((len(reasons), 2), np.nan)
        ends[good] = torch.stack(model.interval(found, interval), dim=1)[: len(good)].double().cpu().numpy()
    return Answers(values, ranks, probabilities, reasons, ends)


def _alone(model: OrdinalModel, pixels: Tensor, reason: str | None, interval: float | None) -> Answers:
    try:
        return _answered(model, pixels, [reason], "keep", interval)
    except NoNumber:
        return _answered(model, pixels, [NOT_FINITE], "keep", interval)


def _predict(model: OrdinalModel, pixels: Tensor) -> Prediction:
    return model.predict(pixels.to(model.device, model.dtype))
