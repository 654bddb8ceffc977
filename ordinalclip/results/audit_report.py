"""What an audit of labels has found, as tables and as one self-contained page of thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ordinalclip.config import RunConfig
from ordinalclip.data import Part
from ordinalclip.data.duplicates import Similar
from ordinalclip.files import write_text
from ordinalclip.metrics import METRICS
from ordinalclip.predictions import Predictions
from ordinalclip.provenance import data_name
from ordinalclip.quoting import spreadsheet
from ordinalclip.ranks import Ranks
from ordinalclip.results.leaderboard import write_csv
from ordinalclip.results.pages import data_uri, outline, templates, thumbnail
from ordinalclip.run_folder import local

OWN = ("file", "row", "part", "given", "predicted", "score", "fold")  # columns of the table
SIDE = 144  # of thumbnails, in pixels
MOST_PAIRS = 40  # on the page; the table has more


@dataclass(frozen=True)
class LabelAudit:
    """Every labelled picture with what models that have not seen it answer.

    Attributes:
        config: of the run whose data it is.
        ranks: the label space.
        pictures: all of them.
        parts: (N,) name of the run's part that each is in.
        folds: (N,) which fold judged it, from 0.
        predictions: out of fold, in the order of `pictures`.
        scores: (N,) how badly the given label fits them: larger is worse.
        measure: "RPS", or "absolute error" of heads without a distribution.
        pairs: near-duplicates, the most similar first; None: not looked for.
        notes: what else is to be known, in sentences.
    """

    config: RunConfig
    ranks: Ranks
    pictures: Part
    parts: np.ndarray
    folds: np.ndarray
    predictions: Predictions
    scores: np.ndarray
    measure: str
    pairs: Sequence[Similar] | None
    notes: Sequence[str]

    @property
    def order(self) -> np.ndarray:
        """Rows of `pictures`, the label that fits least first."""
        return np.argsort(-self.scores, kind="stable")

    @property
    def answers(self) -> np.ndarray:
        """(N,) values that the models answer, decoded as the run says."""
        return self.predictions.decoded[self.config.evaluation.decoding]

    def given(self, row: int) -> str:
        """The label of a picture, as people are told it."""
        return self.ranks.say(self.pictures.values[row])

    def answered(self, row: int) -> str:
        """The answer for a picture, as people are told it."""
        return self.ranks.say(self.answers[row])

    def differ(self, pair: Similar) -> bool:
        """Whether near-duplicates have different labels."""
        return bool(self.pictures.values[pair.first] != self.pictures.values[pair.second])

    def across(self, pair: Similar) -> bool:
        """Whether near-duplicates are in different parts of the run."""
        return bool(self.parts[pair.first] != self.parts[pair.second])


def write_labels(audit: LabelAudit, path: Path) -> None:
    """The table of all labels, the one that fits least first, with the other columns of the data."""
    more = _other_columns(audit.pictures, audit.config)
    rows = [
        {
            **_place(audit, row),
            "predicted": _number(audit, audit.answers[row], 6),
            "score": f"{audit.scores[row]:.4f}",
            "fold": int(audit.folds[row]),
            **{name: cells[row] for name, cells in more.items()},
        }
        for row in audit.order.tolist()
    ]
    write_csv(path, rows)


def write_pairs(audit: LabelAudit, path: Path) -> None:
    """The table of near-duplicates, the most similar first."""
    columns = ["cosine", "in two parts", "labels differ", *(f"{name} {side}" for side in (1, 2) for name in OWN[:4])]
    rows = [
        [
            f"{pair.cosine:.4f}",
            "yes" if audit.across(pair) else "no",
            "yes" if audit.differ(pair) else "no",
            *_place(audit, pair.first).values(),
            *_place(audit, pair.second).values(),
        ]
        for pair in audit.pairs or ()
    ]
    write_csv(path, [dict(zip(columns, row, strict=True)) for row in rows], columns)


def write_page(audit: LabelAudit, path: Path, top: int) -> None:
    """The page: the labels that fit least, and near-duplicates.

    Args:
        top: how many labels.
    """
    pairs = sorted(audit.pairs or (), key=lambda pair: (not audit.across(pair), not audit.differ(pair)))
    content = (
        templates()
        .get_template("audit.html")
        .render(
            audit=audit,
            config=audit.config,
            ranks=audit.ranks,
            data=local(data_name(audit.config.data)),
            mae=METRICS["mae"].function(audit.answers, audit.pictures.values),
            folds=int(audit.folds.max()) + 1,
            pictures=[_picture(audit, row) for row in audit.order[:top].tolist()],
            across=sum(map(audit.across, audit.pairs or ())),
            pairs=[_pair(audit, pair) for pair in pairs[:MOST_PAIRS]],
        )
    )
    write_text(path, content)


def _picture(audit: LabelAudit, row: int) -> dict[str, Any]:
    given = audit.predictions.probabilities
    return {
        **_seen(audit, row),
        "answer": audit.answered(row),
        "score": audit.scores[row],
        "outline": None if given is None else outline(given[row]),
        "label_place": (audit.pictures.ranks[row] + 0.5) / len(audit.ranks),
    }


def _pair(audit: LabelAudit, pair: Similar) -> dict[str, Any]:
    both = [_seen(audit, row) for row in (pair.first, pair.second)]
    return {"both": both, "cosine": pair.cosine, "differ": audit.differ(pair), "across": audit.across(pair)}


def _seen(audit: LabelAudit, row: int) -> dict[str, Any]:
    """What a page shows of a picture."""
    names = audit.pictures.names
    return {
        "image": data_uri(thumbnail(audit.pictures.image(row), SIDE)),
        "name": names[row],
        "row": int(names.rows[row]) + 1,
        "part": str(audit.parts[row]),
        "label": audit.given(row),
    }


def _place(audit: LabelAudit, row: int) -> dict[str, Any]:
    """Where a picture stands, and its label: the first four of `OWN`."""
    names = audit.pictures.names
    label = _number(audit, audit.pictures.values[row], 10)
    return dict(zip(OWN, (names[row], int(names.rows[row]) + 1, str(audit.parts[row]), label), strict=False))


def _number(audit: LabelAudit, value: float, digits: int) -> str:
    """A label as a cell: the name of its rank where ranks have names, else a number."""
    return audit.ranks.say(value) if audit.ranks.worded else f"{value:.{digits}g}"


def _other_columns(part: Part, config: RunConfig) -> dict[str, list[str]]:
    """Columns of plain values beside picture and label; one that is called like one of ours gets another name."""
    found: dict[str, list[str]] = {}
    for name, feature in part.rows.features.items():
        if name not in (part.image_column, config.data.label_column) and isinstance(feature, datasets.Value):
            called = spreadsheet(name)
            while called in OWN or called in found:
                called += " of the data"
            found[called] = ["" if cell is None else str(cell) for cell in part.rows[name]]
    return found
