"""Data in: gauges, tables, folders, `datasets` or memory -> three parts with images, labels and ranks.

sources.py, tables.py   configuration -> rows, as they stand there
labels.py               a column -> values; words by the order that was said
splits.py               rows -> train, validation, test; few shots, label shift
duplicates.py           the same picture twice
checks.py               all of it looked at, for `ordinalclip check-data`
parts.py                what comes out
"""

from ordinalclip.data.loading import load_parts, load_whole, make_parts, make_whole
from ordinalclip.data.parts import PARTS, ImageCache, Part, Parts, RowNames

__all__ = ["PARTS", "ImageCache", "Part", "Parts", "RowNames", "load_parts", "load_whole", "make_parts", "make_whole"]
