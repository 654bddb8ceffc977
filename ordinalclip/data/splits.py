"""Which rows are for training, validation and test, and which of the training rows a protocol keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ordinalclip.config import DataConfig
from ordinalclip.data.labels import say
from ordinalclip.data.parts import ALIASES, PARTS, Part, part_called
from ordinalclip.data.tables import Table

UNUSED = "unused"  # in a split column: rows that a published split leaves out
FINENESS = 20  # folds that shares are made of where groups stay whole and strata even


def split_rows(
    table: Table, config: DataConfig, seed: int, together: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Row indices of train, validation and test.

    By `split_column` if given; else at random in the shares `split`, even over the columns `stratify`, with the rows of
    a `group` in one part. With `folds` the test part is one of them, and the rest is divided in the shares of the other
    two. Shares are exact to half a row; with groups to half a group; with groups and strata to about 1 / 20
    (scikit-learn's StratifiedGroupKFold).

    Args:
        together: (N,) ids of rows that belong together beside the groups, such as copies of a picture.

    Raises:
        ValueError: a column that is missing or has empty cells, another word than the parts', too few groups.
    """
    if config.split_column:
        texts = _texts(table, config.split_column, "data.split_column")
        given = np.asarray([part_called(text) for text in texts])
        unknown = np.flatnonzero(~np.isin(given, (*PARTS, UNUSED)))
        if len(unknown):
            raise ValueError(
                f"{table.place(unknown[0])}: column {config.split_column!r} (data.split_column) says "
                f"{str(given[unknown[0]])!r}; allowed are {', '.join((*PARTS, *ALIASES, UNUSED))}"
            )
        rows = {name: np.flatnonzero(given == name) for name in PARTS}
        if left := int((given == UNUSED).sum()):
            say(f"{table.source}: {left} of {len(given)} rows are {UNUSED} by column {config.split_column!r}")
        if config.group:
            named = group_names(table, config)
            check_groups({name: named[of_part] for name, of_part in rows.items()}, config.group)
        return rows
    strata = _codes(table, config.stratify, "data.stratify")
    groups = _codes(table, [config.group], "data.group") if config.group else None
    if config.group:
        _say_alike(table, config.group)
    if together is not None and len(np.unique(together)) < len(together):
        groups = _joined(together, groups)
    if config.folds is not None:
        folds = _folds(strata, groups, config.folds, seed, bool(config.stratify))
        return _without(folds, config.fold, strata, groups, config.split, seed, bool(config.stratify))
    return dict(zip(PARTS, _shared(strata, groups, config.split, seed, bool(config.stratify)), strict=True))


def cross_validated(
    ranks: np.ndarray,
    groups: np.ndarray | None,
    together: np.ndarray,
    number: int,
    split: tuple[float, float, float],
    seed: int,
) -> list[dict[str, np.ndarray]]:
    """Row indices of train, validation and test for each of some folds: every row is in one test part.

    Folds are even over the ranks, as far as groups allow, by scikit-learn's StratifiedKFold and StratifiedGroupKFold. A
    rank of fewer rows than folds is one stratum with its neighbours.

    Args:
        ranks: (N,) rank of every row.
        groups: (N,) names whose equal rows stay in one part; None: there are none.
        together: (N,) ids of rows that belong together beside the groups, such as copies of a picture.
        number: of folds.
        split: shares, of which the first two divide what is no test part.

    Raises:
        ValueError: fewer rows or groups than folds.
    """
    strata = _strata(ranks, number)
    if groups is not None or len(np.unique(together)) < len(together):
        groups = _joined(together, None if groups is None else np.unique(groups, return_inverse=True)[1])
    folds = _folds(strata, groups, number, seed, True)
    return [_without(folds, fold, strata, groups, split, seed, True) for fold in range(number)]


def _strata(ranks: np.ndarray, least: int) -> np.ndarray:
    """(N,) stratum of every row: its rank, those of fewer rows than `least` joined with the next."""
    counts = np.bincount(ranks)
    strata, number, members = np.zeros(len(counts), dtype=np.int64), 0, 0
    for rank, count in enumerate(counts.tolist()):
        strata[rank] = number
        members += count
        if members >= least:
            number, members = number + 1, 0
    strata[strata == number] = max(number - 1, 0)  # what is left at the upper end
    return strata[ranks]


def _without(
    folds: np.ndarray,
    fold: int,
    strata: np.ndarray,
    groups: np.ndarray | None,
    split: tuple[float, float, float],
    seed: int,
    stratified: bool,
) -> dict[str, np.ndarray]:
    """Row indices: one fold is the test part, the rest is divided in the shares of the other two."""
    test, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
    whole = split[0] + split[1]
    shares = (split[0] / whole, split[1] / whole, 0.0)
    inner = _shared(strata[rest], None if groups is None else groups[rest], shares, seed, stratified)
    return {"train": rest[inner[0]], "validation": rest[inner[1]], "test": test}


def _shared(
    strata: np.ndarray, groups: np.ndarray | None, shares: tuple[float, float, float], seed: int, stratified: bool
) -> list[np.ndarray]:
    """Rows of three parts in the given shares."""
    rng = np.random.default_rng([seed, 0])
    if groups is None:
        shuffled = [rng.permutation(np.flatnonzero(strata == s)) for s in np.unique(strata)]
        pieces = [_cut(rows, shares) for rows in shuffled]
        parts = [np.sort(np.concatenate([piece[part] for piece in pieces])) for part in range(3)]
        if all(len(part) or not share for part, share in zip(parts, shares, strict=True)):
            return parts
        # Strata of few rows, which are all rounded alike.
        return _dealt(np.concatenate(shuffled), shares)
    if not stratified:
        _, groups = np.unique(groups, return_inverse=True)
        return [np.flatnonzero(np.isin(groups, chunk)) for chunk in _cut(rng.permutation(groups.max() + 1), shares)]
    number = min(FINENESS, len(np.unique(groups)), int(np.bincount(strata).max()))
    folds = _folds(strata, groups, number, seed, True)
    return [np.flatnonzero(np.isin(folds, chunk)) for chunk in _cut(rng.permutation(number), shares)]


def _folds(strata: np.ndarray, groups: np.ndarray | None, number: int, seed: int, stratified: bool) -> np.ndarray:
    """(N,) fold of every row."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold  # takes a second

    units = len(strata) if groups is None else len(np.unique(groups))
    if units < max(number, 2):
        what = "row" if groups is None else "group"
        raise ValueError(f"{units} {what}{' is' if units == 1 else 's are'} too few for {max(number, 2)} folds")
    kinds = {
        (False, False): KFold,
        (True, False): StratifiedKFold,
        (False, True): GroupKFold,
        (True, True): StratifiedGroupKFold,
    }
    if stratified and groups is None and (fewest := np.bincount(strata).min()) < number:
        raise ValueError(f"a combination of data.stratify has {fewest} rows, too few for data.folds={number}")
    kind = kinds[stratified, groups is not None]
    splitter = kind(number, shuffle=True, random_state=np.random.RandomState(seed % 2**32))
    folds = np.empty(len(strata), dtype=np.int64)
    for fold, (_, rows) in enumerate(splitter.split(strata, strata, groups)):
        folds[rows] = fold
    return folds


def _joined(first: np.ndarray, second: np.ndarray | None) -> np.ndarray:
    """(N,) ids such that rows which share an id in either are one group."""
    if second is None:
        return first
    _, first = np.unique(first, return_inverse=True)
    second = second + first.max() + 1
    size = int(second.max()) + 1
    return connected_components(coo_array((np.ones(len(first)), (first, second)), (size, size)))[1][first]


def _codes(table: Table, columns: Sequence[str], option: str) -> np.ndarray:
    """(N,) a number for every combination of some columns' cells."""
    codes = np.zeros(len(table.rows), dtype=np.int64)
    for column in columns:
        texts = _texts(table, column, option)
        empty = np.flatnonzero(np.isin(texts, ("", "None", "nan")))
        if len(empty):
            raise ValueError(f"{table.place(empty[0])}: column {column!r} ({option}) is empty")
        _, code = np.unique(texts, return_inverse=True)
        _, codes = np.unique(codes * (code.max() + 1) + code, return_inverse=True)
    return codes


def _texts(table: Table, column: str, option: str) -> np.ndarray:
    return np.asarray([str(value).strip() for value in table.rows[table.column(column, option)]])


def group_names(table: Table, config: DataConfig) -> np.ndarray:
    """(N,) the cells of `data.group`."""
    return _texts(table, config.group, "data.group")


def check_groups(groups: Mapping[str, np.ndarray], column: str) -> None:
    """Raises:
    ValueError: rows of one group are in two of the parts that were given."""
    owner: dict[str, str] = {}
    for part, names in groups.items():
        for name in np.unique(names).tolist():
            if owner.setdefault(name, part) != part:
                raise ValueError(
                    f"{column} {name!r} (data.group) is in two of the given parts, {owner[name]} and {part}"
                )


def _say_alike(table: Table, column: str) -> None:
    """Groups whose names are written in two ways would be two groups."""
    seen: dict[str, str] = {}
    for name in np.unique(_texts(table, column, "data.group")).tolist():
        other = seen.setdefault(re.sub(r"^0+(?=\d)|\s", "", name.casefold()), name)
        if other != name:
            say(
                f"{table.source}: {other!r} and {name!r} in column {column!r} (data.group) are two groups; are they "
                "one?"
            )
            return


def _dealt(rows: np.ndarray, shares: tuple[float, ...]) -> list[np.ndarray]:
    """Rows, given stratum by stratum, dealt out to the part that lacks most: even over strata as far as rows allow."""
    parts: list[list[int]] = [[] for _ in shares]
    for number, row in enumerate(rows.tolist(), 1):
        lacking = [share * number - len(part) for share, part in zip(shares, parts, strict=True)]
        parts[int(np.argmax(lacking))].append(row)
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def _cut(rows: np.ndarray, shares: tuple[float, ...]) -> list[np.ndarray]:
    bounds = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int)
    return np.split(rows, bounds)


def kept_out(part: Part, share: float, group: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows that choose, rows that calibrate, and what groups the latter are of, if rows are grouped; drawn without
    regard to labels, on which the promise of conformal intervals rests.

    Args:
        share: of the rows, or groups, that calibrate.
        group: column (subject, patient); "": rows are not grouped.

    Raises:
        ValueError: one of both would be empty, a column that is missing or has empty cells.
    """
    groups = group_names(Table(part.rows, part.source), DataConfig(group=group)) if group else None
    codes = None if groups is None else np.unique(groups, return_inverse=True)[1]
    choosing, held_out, _ = _shared(np.zeros(len(part), np.int64), codes, (1 - share, share, 0.0), seed, False)
    if not len(choosing) or not len(held_out):
        what = f"{len(part)} rows" if codes is None else f"{len(np.unique(codes))} groups"
        raise ValueError(f"{part.source}: {what} are too few to keep a share of {share:g} out for the calibration")
    return choosing, held_out, None if groups is None else groups[held_out]


def few_shot(part: Part, shots: int, seed: int) -> Part:
    """At most `shots` random rows of every rank, drawn by their own generator."""
    rng = np.random.default_rng([seed, 1])
    chosen = [rng.permutation(np.flatnonzero(part.ranks == rank))[:shots] for rank in np.unique(part.ranks)]
    return part.select(np.sort(np.concatenate(chosen)))


def thinned(part: Part, share: float, seed: int) -> Part:
    """A share of the rows of every rank, at least one, drawn by their own generator.

    The same seed draws smaller shares from larger ones.
    """
    kept = _drawn(part, np.unique(part.ranks), share, np.random.default_rng([seed, 3]))
    return part.select(np.sort(np.concatenate(kept)))


def label_shift(part: Part, num_ranks: int, keep: float, seed: int) -> Part:
    """Of the `num_ranks` most populated ranks only a share `keep` of the rows, at least one, drawn at random.

    The distribution-shift protocol of OrdinalCLIP (section 4.4), with a generator of its own.
    """
    rng = np.random.default_rng([seed, 2])
    present, counts = np.unique(part.ranks, return_counts=True)
    reduced = present[np.argsort(-counts, kind="stable")[:num_ranks]]
    untouched = np.flatnonzero(~np.isin(part.ranks, reduced))
    return part.select(np.sort(np.concatenate([untouched, *_drawn(part, reduced, keep, rng)])))


def _drawn(part: Part, ranks: np.ndarray, share: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Of each of some ranks a random share of its rows, at least one."""
    drawn = []
    for rank in ranks:
        members = rng.permutation(np.flatnonzero(part.ranks == rank))
        drawn.append(members[: max(1, round(share * len(members)))])
    return drawn
