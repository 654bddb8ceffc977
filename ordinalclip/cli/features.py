"""`ordinalclip features`."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ordinalclip.training.features import Kept

NEEDS = ("training.features",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", choices=("list", "clear"), default="list", help="list (default), or clear KEY..."
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="of what is deleted: how its name begins, or all")
    parser.epilog = (
        "Runs with model.features=cached compute them where they lack. They are kept in $ORDINALCLIP_CACHE/features, "
        "by default in ~/.cache/ordinalclip."
    )


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.files import FolderInUse
    from ordinalclip.training.features import clear_features, features_folder, kept_features

    kept = kept_features()
    if arguments.what == "clear":
        deleted, chosen = [], _chosen(arguments.keys, kept)
        for each in chosen:
            try:
                clear_features(each.folder)
                deleted.append(each)
            except FolderInUse as error:
                print(f"left: {error}")
        print(f"{len(deleted)} deleted, {_megabytes(sum(each.size for each in deleted))} MB")
        return 0 if len(deleted) == len(chosen) else 1
    if arguments.keys:
        raise ValueError(f"{arguments.keys[0]!r}: `ordinalclip features` lists all; features clear KEY deletes")
    print(f"{features_folder()}: {_megabytes(sum(each.size for each in kept))} MB")
    for each in kept:
        print(f"  {each.folder.name}  {_said(each)}")
    return 1 if any(each.fault for each in kept) else 0


def _chosen(keys: list[str], kept: list[Kept]) -> list[Kept]:
    """What begins with one of the keys.

    Raises:
        ValueError: no key, or one that nothing, or more than one, begins with.
    """
    if not keys:
        raise ValueError("features clear: of which KEY? `ordinalclip features` lists them; or all")
    if keys == ["all"]:
        return kept
    chosen = []
    for key in keys:
        found = [each for each in kept if each.folder.name.startswith(key)]
        if len(found) != 1:
            raise ValueError(f"features clear: {len(found) or 'no'} names begin with {key!r}; `ordinalclip features`")
        chosen += found
    return list({each.folder: each for each in chosen}.values())


def _said(each: Kept) -> str:
    used = time.strftime("%Y-%m-%d", time.localtime(each.used))
    if each.fault:
        return f"{_megabytes(each.size):>8} MB, {used}: {each.fault}"
    content, view = each.content, each.content["view"]
    read = ", all layers" if content["layers"] else ", tokens" if "tokens" in content else ""
    what = f"{content['encoder']} at {content['pixels']['size']} px{read}"
    seen = "as evaluated" if view is None else f"augmented view {view['number'] + 1}"
    mirrored = ", with mirrors" if content["mirror"] else ""
    return f"{_megabytes(each.size):>8} MB, {each.pictures:,} pictures, used {used}: {what}, {seen}{mirrored}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
