"""A download checked, counted, and written as a prepared folder: tables that name its pictures, which stay there."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from ordinalclip.files import read_json_object, whole
from ordinalclip.images import FORMATS, BrokenImageError
from ordinalclip.progress import Progress
from ordinalclip.quoting import printable
from ordinalclip.recipes import recipe
from ordinalclip.recipes.base import TEST, TRAIN, UNUSED, VALIDATION, Copies, Download, Protocol, Reading, Recipe, Row
from ordinalclip.recipes.parts import Between, add_validation, between, sizes, two_labels, without
from ordinalclip.written import dump

TABLE, DUPLICATES, RECORD, DATA, README = "table.csv", "duplicates.csv", "prepared.json", "data.yaml", "README.md"
CLEAN = "_clean"  # ends the name of a published split without what it shares between its parts


def prepare(name: str, source: Path, target: Path, overwrite: bool = False, quiet: bool = False) -> list[str]:
    """Read a download by its recipe and write the prepared folder.

    Args:
        name: of the recipe.
        source: folder of the unpacked download.
        target: folder to write; nothing else may be in it.
        overwrite: replace what another preparation left there.

    Returns:
        what was counted, beside what should be; licence and citation; how to go on: a line each.

    Raises:
        ValueError: a download of another layout, a row, name or picture that cannot be read.
        FileNotFoundError: no such download; FileExistsError: something else is in the target.
    """
    made = recipe(name)
    _check_places(source, target)
    download = Download(source, name)
    reading = made.read(download)
    rows, protocols = reading.rows, reading.protocols
    if not rows:
        raise download.lacks("pictures")
    _check(rows)
    copies = _look(source, [row.path for row in rows], quiet)
    for protocol in protocols:
        if protocol.divide is not None:
            protocol.divide(rows, protocol.columns, copies)
        else:
            add_validation(rows, protocol.columns, copies)
    shared = {column: between(rows, column, copies) for protocol in protocols for column in protocol.columns}
    cleaned = _clean(rows, protocols[0], copies, shared)
    lines = _counted(made, reading, copies, shared, cleaned)
    linked = _links_out(source.resolve(), rows)
    if linked:
        lines.append(
            "pictures are links that lead out of the download: data.outside_root=true is written, which allows it"
        )
    files = _files(made, reading, copies, shared, cleaned, source.resolve(), target.resolve(), linked, lines)
    _write(target, files, overwrite)
    return [*lines, *_onwards(made, protocols, target, bool(cleaned))]


# ---- reading


def _check_places(source: Path, target: Path) -> None:
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"--to {target} and --from {source} lie in each other; give folders apart")


def _check(rows: Sequence[Row]) -> None:
    """Raises:
    ValueError: a name that no table can hold, or a label that is no number."""
    for row in rows:
        if not row.path.isprintable() or any("\ud800" <= each <= "\udfff" for each in row.path):
            raise ValueError(f"{row.path!r}: a name with characters that are no text; rename it")
        if not math.isfinite(row.label):
            raise ValueError(f"{row.path}: label {row.label} is no value")
    twice = [path for path, times in Counter(row.path for row in rows).items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]}: stands in two rows")


def _look(root: Path, paths: Sequence[str], quiet: bool) -> Copies:
    """Every picture's header is read, and the bytes of those that have the size of another.

    Raises:
        ValueError: pictures that cannot be read, with the first of them.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    broken: list[BrokenImageError] = []
    for path in Progress(paths, "looking at pictures", unit="images", quiet=quiet):
        file = root / path
        try:
            with Image.open(file, formats=FORMATS):
                by_size[file.stat().st_size].append(path)
        except Exception as error:  # of decoders, of the file system
            reason = "empty" if file.is_file() and not file.stat().st_size else type(error).__name__
            broken.append(BrokenImageError(path, f"not a readable image ({reason})"))
    if broken:
        raise ValueError(f"{root / broken[0].name}: {broken[0].reason}, as {len(broken):,} of {len(paths):,} are")
    alike: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for group in by_size.values() if len(group) > 1 for path in group):
        with (root / path).open("rb") as opened:
            alike[hashlib.file_digest(opened, "sha256").hexdigest()].append(path)
    return Copies([group for group in alike.values() if len(group) > 1])


def _links_out(root: Path, rows: Sequence[Row]) -> bool:
    """Whether a picture is a link to somewhere else, which is refused by default where a run reads it."""
    return any(not (root / row.path).resolve().is_relative_to(root) for row in rows)


def _clean(rows: Sequence[Row], protocol: Protocol, copies: Copies, shared: dict[str, Between]) -> dict[str, str]:
    """Columns without what parts share, by published column, where the first protocol needs them; added to the rows."""
    if not (protocol.published and any(_leaks(shared[column]) for column in protocol.columns)):
        return {}
    for column in protocol.columns:
        parts = without(rows, column, copies)
        for row in rows:
            row.parts[column + CLEAN] = parts[row.path]
    return {column: column + CLEAN for column in protocol.columns}


def _leaks(found: Between) -> bool:
    return bool(found.copies or found.labels or found.people)


# ---- what is said


def _counted(
    made: Recipe, reading: Reading, copies: Copies, shared: dict[str, Between], cleaned: dict[str, str]
) -> list[str]:
    rows = reading.rows
    low, high = min(row.label for row in rows), max(row.label for row in rows)
    lines = [
        f"{made.title}: {len(rows):,} pictures ({_beside(len(rows), made.pictures)}), labels {low:g} to {high:g} "
        f"{made.unit}"
    ]
    lines += [f"left out, {why}: {number:,}" for why, number in reading.left_out.items() if number]
    lines += list(reading.said)
    odd = two_labels(rows, copies)
    groups = {copies.of[path] for path in odd}
    lines.append(
        f"byte-identical pictures: {len(copies.groups):,} groups, {sum(map(len, copies.groups)):,} files, "
        f"{len(groups):,} groups with two labels"
    )
    for protocol in reading.protocols:
        kind = "as published" if protocol.published else "drawn here" if protocol.columns else "by seed"
        lines.append(f"{protocol.name}: {protocol.what} ({kind})")
        lines += _of_columns(made, rows, protocol, shared)
    for column, clean in cleaned.items():
        lost = [row for row in rows if row.parts.get(column, UNUSED) != row.parts[clean]]
        if not lost:
            continue
        of_part = Counter(row.parts[column] for row in lost)
        lines.append(
            f"{clean}: {column} without what its parts share: {of_part[TRAIN]:,} training, {of_part[VALIDATION]:,} "
            f"validation and {of_part[TEST]:,} test pictures are left out"
        )
    if made.counted_by:
        lines.append(f"published counts: {made.counted_by}")
    return lines


def _beside(number: int, published: int | None) -> str:
    if published is None:
        return "no published count known"
    apart = number - published
    return f"published {published:,}" + (f": {abs(apart):,} {'more' if apart > 0 else 'fewer'}" if apart else "")


def _of_columns(made: Recipe, rows: Sequence[Row], protocol: Protocol, shared: dict[str, Between]) -> list[str]:
    """Sizes of the parts beside the published ones, and what they share; columns of which the same is said together."""
    said = []
    for column in protocol.columns:
        found = sizes(row.parts.get(column, UNUSED) for row in rows)
        train, validation, test = made.parts.get(column, (None, None, None))
        parts = f"train {found[TRAIN]:,}, validation {found[VALIDATION]:,}, test {found[TEST]:,}"
        if validation is not None:
            published = [(found[TRAIN], train), (found[VALIDATION], validation), (found[TEST], test)]
        else:
            published = [(found[TRAIN] + found[VALIDATION], train), (found[TEST], test)]
        kinds = ["train", "validation", "test"] if validation is not None else ["train + validation", "test"]
        beside = [
            f"{kind} {_beside(number, known)}"
            for kind, (number, known) in zip(kinds, published, strict=True)
            if known is not None
        ]
        if protocol.published:
            parts += f" ({'; '.join(beside) or 'no published count known'})"
        between_parts = shared[column]
        leaks = []
        if between_parts.copies:
            leaks.append(f"{len(between_parts.copies):,} files are copies across parts")
        if between_parts.labels:
            leaks.append(f"{len(between_parts.labels):,} files have two labels")
        if between_parts.seen:
            share = between_parts.seen / between_parts.test
            leaks.append(f"{share:.1%} of the test pictures show somebody of the training part")
        said.append((column, "; ".join([parts, *leaks])))
    lines = []
    for what, members in groupby(said, key=lambda each: each[1]):
        names = [column for column, _ in members]
        lines.append(f"  {names[0]}{f' to {names[-1]}' if names[1:] else ''}: {what}")
    return lines


def _onwards(made: Recipe, protocols: Sequence[Protocol], target: Path, cleaned: bool) -> list[str]:
    lines = [f"licence: {made.licence}", f"cite: {made.citation}", f"from: {made.homepage}"]
    lines += [f"note: {caveat}" for caveat in made.caveats]
    lines.append(f"written: {printable(target)}")
    lines.append(f"next: ordinalclip compare {made.name} --data {printable(target)}")
    others = [protocol for number, protocol in enumerate(protocols) if number or (protocol.published and cleaned)]
    for protocol in others:
        kind = ", as published" if protocol.published else ""
        lines.append(f"  {protocol.what}{kind}: --data {printable(target / protocol.name)}.yaml")
    return lines


# ---- what is written


def _files(
    made: Recipe,
    reading: Reading,
    copies: Copies,
    shared: dict[str, Between],
    cleaned: dict[str, str],
    root: Path,
    target: Path,
    linked: bool,
    lines: Sequence[str],
) -> dict[str, str]:
    """Text of every file, by name."""
    rows, protocols = reading.rows, reading.protocols
    table = _table(rows, [column for protocol in protocols for column in protocol.columns] + list(cleaned.values()))
    about = f"{made.title}: {made.homepage}\nLicence: {made.licence}\nCite: {made.citation}"

    def configured(protocol: Protocol, columns: Sequence[str], as_published: bool) -> str:
        parts = _said_of(protocol, columns, as_published, shared)
        content = _configuration(made, protocol, columns, as_published, rows, root, target, linked)
        comment = "".join(f"# {line}\n" for line in about.splitlines())
        return f"{comment}\n{dump({'recipe': made.name, 'parts': parts, **content})}"

    files = {TABLE: table, DUPLICATES: _duplicates(rows, copies, shared)}
    for protocol in protocols:
        files[f"{protocol.name}.yaml"] = configured(protocol, protocol.columns, protocol.published)
    first = protocols[0]
    files[DATA] = configured(first, tuple(cleaned.values()) or first.columns, False)
    files[README] = _readme(made, lines, files)
    record = {
        "recipe": made.name,
        "from": str(root),
        "table_sha256": hashlib.sha256(table.encode()).hexdigest(),
        "counted": list(lines),
        "licence": made.licence,
        "citation": made.citation,
        "homepage": made.homepage,
        "caveats": list(made.caveats),
        "files": sorted(files),
    }
    files[RECORD] = json.dumps(record, indent=2) + "\n"
    return files


def _said_of(protocol: Protocol, columns: Sequence[str], as_published: bool, shared: dict[str, Between]) -> str:
    """How the pictures are divided, in a sentence that goes above the table of a comparison."""
    if not columns:
        return f"Parts: {protocol.what}."
    if not as_published:
        how = "drawn here" if not protocol.published else "without what they share"
        return (
            f"Parts: {protocol.what}, {'as published' if columns == protocol.columns and protocol.published else how}."
        )
    leaks = []
    worst = max((shared[column] for column in columns), key=lambda found: found.seen / max(found.test, 1))
    if worst.seen:
        leaks.append(f"{worst.seen / worst.test:.0%} of the test pictures show somebody of the training part")
    if number := max(len(shared[column].copies) for column in columns):
        leaks.append(f"{number:,} files are copies across parts")
    return f"Parts: {protocol.what}, as published{': ' if leaks else ''}{', '.join(leaks)}."


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    subjects = any(row.subject for row in rows)
    more = list(dict.fromkeys(name for row in rows for name in row.more))
    header = ["image", "label", *(["subject"] if subjects else []), *more, *columns]
    cells = (
        [
            row.path,
            f"{row.label:g}" if float(f"{row.label:g}") == row.label else repr(row.label),
            *([row.subject] if subjects else []),
            *(row.more.get(name, "") for name in more),
            *(row.parts.get(column, UNUSED) for column in columns),
        ]
        for row in rows
    )
    return _csv(header, cells)


def _duplicates(rows: Sequence[Row], copies: Copies, shared: dict[str, Between]) -> str:
    """A line for every file that is a copy, and for every picture of somebody who is in two parts."""
    by_path = {row.path: row for row in rows}
    odd = two_labels(rows, copies)
    cells: list[list[str]] = []
    for number, group in enumerate(copies.groups):
        for path in group:
            row = by_path[path]
            what = "same picture, two labels" if path in odd else "same picture"
            cells.append([what, str(number), path, f"{row.label:g}", row.subject, _parts_of(row, shared)])
    within: dict[str, list[str]] = defaultdict(list)
    for column, found in shared.items():
        for name in found.people:
            within[name].append(column)
    for row in sorted((row for row in rows if row.subject in within), key=lambda row: (row.subject, row.path)):
        parts = _parts_of(row, within[row.subject])
        cells.append(["same person", row.subject, row.path, f"{row.label:g}", row.subject, parts])
    return _csv(["what", "group", "image", "label", "subject", "parts"], cells)


def _parts_of(row: Row, columns: Iterable[str]) -> str:
    return " ".join(f"{column}={row.parts[column]}" for column in columns if row.parts.get(column, UNUSED) != UNUSED)


def _csv(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(cells)
    return buffer.getvalue()


def _configuration(
    made: Recipe,
    protocol: Protocol,
    columns: Sequence[str],
    as_published: bool,
    rows: Sequence[Row],
    root: Path,
    target: Path,
    linked: bool,
) -> dict[str, Any]:
    """What `--data` lays over a configuration: every key that says where the pictures are and how they are divided."""
    subjects = any(row.subject for row in rows)
    data: dict[str, Any] = {
        "source": "table",
        "root": str(root),
        "table": str(target / TABLE),
        "image_column": "image",
        "label_column": "label",
        "split_column": columns[0] if columns else "",
        "folds": None,
        "fold": 0,
        "stratify": [],
        "group": "subject" if subjects and not as_published else "",
        "duplicates": "allow" if as_published else "refuse",
        "missing": "refuse",
        "outside_root": linked,
        "license": made.licence,
        **protocol.options,
    }
    ranks = {"names": None, "edges": None, "unit": made.unit, **(protocol.ranks or made.ranks)}
    splits = [{"data.split_column": column} for column in columns] if len(columns) > 1 else []
    return {"data": data, "ranks": ranks, "splits": splits}


def _readme(made: Recipe, lines: Sequence[str], files: Iterable[str]) -> str:
    counted = "\n".join(lines)
    caveats = "".join(f"\n* {caveat}" for caveat in made.caveats)
    return (
        f"# {made.title}, prepared by `ordinalclip prepare {made.name}`\n\n"
        f"The pictures stay where they are; `{TABLE}` names them. `--data` of `ordinalclip train`, `check-data` and "
        f"`compare` takes this folder, which means its `{DATA}`, or another of its YAML files. `{DUPLICATES}` lists "
        "copies and people in two parts.\n\n"
        f"```\n{counted}\n```\n\n"
        f"Licence: {made.licence}\n\nCite: {made.citation}\n\nFrom: {made.homepage}\n{caveats}\n"
    )


def _write(target: Path, files: dict[str, str], overwrite: bool) -> None:
    """All files or none; the same ones are there already, or nothing, or may be replaced.

    Raises:
        FileExistsError: something else is there.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a folder to write to (--to)")
    there = sorted(os.listdir(target)) if target.is_dir() else []
    if there:
        ours = RECORD in there
        if not ours:
            raise FileExistsError(f"{target} holds {there[0]} already; name another folder (--to)")
        same = all(
            (target / name).is_file() and (target / name).read_bytes() == text.encode() for name, text in files.items()
        )
        if same:
            return
        record = read_json_object(target / RECORD)
        was = record.get("recipe")
        if not overwrite:
            raise FileExistsError(
                f"{target} holds {was} prepared from other files or in another way; --overwrite replaces it, another "
                "folder leaves it alone"
            )
        if foreign := sorted(set(there) - {RECORD, *record.get("files", [])}):
            raise FileExistsError(f"{target / foreign[0]} is not of a prepared folder, which is therefore not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as aside:
        aside.mkdir()
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")
