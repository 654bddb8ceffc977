"""Pictures as parts: dealt out without chance, what is in two parts, and the same split without it."""

from __future__ import annotations

import hashlib
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ordinalclip.recipes.base import TEST, TRAIN, UNUSED, VALIDATION, Copies, Row

VALIDATION_SHARE = 0.1  # of the training part, where a split is published without a validation part
PRIORITY = {UNUSED: 0, TRAIN: 1, VALIDATION: 2, TEST: 3}


class Between(NamedTuple):
    """What two parts of a split have in common.

    Attributes:
        copies: paths of pictures that are in another part, too.
        labels: paths of pictures that have two labels in the split.
        people: subjects that are in two parts.
        seen: test pictures of a subject who is in the training part, too.
        test: test pictures.
    """

    copies: list[str]
    labels: list[str]
    people: list[str]
    seen: int
    test: int


def between(rows: Sequence[Row], column: str, copies: Copies) -> Between:
    """What the parts of a split column share that they should not."""
    used = [row for row in rows if row.parts.get(column, UNUSED) != UNUSED]
    pictures: dict[int, list[Row]] = defaultdict(list)
    people: dict[str, set[str]] = defaultdict(set)
    for row in used:
        if row.path in copies.of:
            pictures[copies.of[row.path]].append(row)
        if row.subject:
            people[row.subject].add(row.parts[column])
    shared = [row.path for group in pictures.values() if len({row.parts[column] for row in group}) > 1 for row in group]
    odd = [row.path for group in pictures.values() if len({row.label for row in group}) > 1 for row in group]
    test = [row for row in used if row.parts[column] == TEST]
    seen = sum(TRAIN in people[row.subject] for row in test if row.subject)
    return Between(shared, odd, [name for name, parts in people.items() if len(parts) > 1], seen, len(test))


def without(rows: Sequence[Row], column: str, copies: Copies) -> dict[str, str]:
    """A published split with one part, and one label, for every picture and person: part by path.

    Left out are pictures with two labels, of which no answer is right; rows of the training and validation part whose
    picture or person is in the test part; and rows of the training part whose picture or person is in the validation
    part. The test part loses nothing else.
    """
    twice = set(between(rows, column, copies).labels)
    parts = {row.path: row.parts.get(column, UNUSED) for row in rows}
    parts |= dict.fromkeys(twice, UNUSED)
    strongest: dict[object, str] = {}
    for row in rows:
        for key in _keys(row, copies):
            if PRIORITY[parts[row.path]] > PRIORITY[strongest.get(key, UNUSED)]:
                strongest[key] = parts[row.path]
    for row in rows:
        own = parts[row.path]
        if own != UNUSED and any(strongest.get(key, own) != own for key in _keys(row, copies)):
            parts[row.path] = UNUSED
    return parts


def _keys(row: Row, copies: Copies) -> Iterable[object]:
    if row.path in copies.of:
        yield copies.of[row.path]
    if row.subject:
        yield row.subject


def deal(rows: Sequence[Row], copies: Copies, shares: Sequence[float], salt: str = "") -> list[int]:
    """Rows dealt out in shares, those of one person or picture together and labels evenly: the pile of each.

    In an order that depends on names alone, so that whoever prepares the same download gets the same: by label, then by
    a digest of the name; the next goes to the pile that lacks most.

    Args:
        shares: of the piles, which add up to 1.
        salt: another one deals differently.
    """
    parent = list(range(len(rows)))

    def find(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[object, int] = {}
    for place, row in enumerate(rows):
        for key in _keys(row, copies):
            parent[find(place)] = find(first.setdefault(key, place))
    units: dict[int, list[int]] = defaultdict(list)
    for place in range(len(rows)):
        units[find(place)].append(place)

    def order(members: list[int]) -> tuple[float, str]:
        middle = sorted(rows[place].label for place in members)[len(members) // 2]
        return middle, digest(salt + min(rows[place].subject or names[place] for place in members))

    names = inner_names(rows)
    piles, sizes, done = [0] * len(rows), [0] * len(shares), 0
    for members in sorted(units.values(), key=order):
        done += len(members)
        lacking = [share * done - size for share, size in zip(shares, sizes, strict=True)]
        pile = lacking.index(max(lacking))
        sizes[pile] += len(members)
        for place in members:
            piles[place] = pile
    return piles


def inner_names(rows: Sequence[Row]) -> list[str]:
    """Paths from the deepest folder that holds all rows: the same, whichever folder above it is the download."""
    folder = posixpath.commonpath([posixpath.dirname(row.path) for row in rows]) if rows else ""
    return [row.path[len(folder) :].lstrip("/") for row in rows]


def digest(text: str) -> str:
    """An order of names without any meaning, the same on every machine."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def two_labels(rows: Sequence[Row], copies: Copies) -> set[str]:
    """Paths of pictures that have two labels."""
    labels: dict[int, set[float]] = defaultdict(set)
    for row in rows:
        if row.path in copies.of:
            labels[copies.of[row.path]].add(row.label)
    return {row.path for row in rows if row.path in copies.of and len(labels[copies.of[row.path]]) > 1}


def add_validation(rows: Sequence[Row], columns: Iterable[str], copies: Copies) -> None:
    """A validation part out of the training part of splits that are published without one."""
    for column in columns:
        train = [row for row in rows if row.parts.get(column) == TRAIN]
        if not train or any(row.parts.get(column) == VALIDATION for row in rows):
            continue
        piles = deal(train, copies, [1 - VALIDATION_SHARE, VALIDATION_SHARE], column)
        for row, pile in zip(train, piles, strict=True):
            row.parts[column] = VALIDATION if pile else TRAIN


def folds(
    validation: float = VALIDATION_SHARE, only: tuple[str, str] | None = None
) -> Callable[[Sequence[Row], Sequence[str], Copies], None]:
    """Folds of our own, as `Protocol.divide`: of each column one is the test part.

    Copies and people are in one part; pictures with two labels in none.

    Args:
        validation: share of all that is the validation part, taken from what is not the test part.
        only: column and cell of the rows that take part; None: all do.
    """

    def divide(rows: Sequence[Row], columns: Sequence[str], copies: Copies) -> None:
        odd = two_labels(rows, copies)
        mine = [row for row in rows if row.path not in odd and (only is None or row.more.get(only[0]) == only[1])]
        held = deal(mine, copies, [1 / len(columns)] * len(columns))
        share = validation / (1 - 1 / len(columns))
        for number, column in enumerate(columns):
            rest = [row for row, fold in zip(mine, held, strict=True) if fold != number]
            for row, pile in zip(rest, deal(rest, copies, [1 - share, share], column), strict=True):
                row.parts[column] = VALIDATION if pile else TRAIN
            for row, fold in zip(mine, held, strict=True):
                if fold == number:
                    row.parts[column] = TEST

    return divide


def sizes(parts: Iterable[str]) -> Mapping[str, int]:
    """How many rows train, validation and test have."""
    found = dict.fromkeys((TRAIN, VALIDATION, TEST), 0)
    for part in parts:
        if part in found:
            found[part] += 1
    return found
