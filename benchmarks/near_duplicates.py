"""Which bound tells copies of a picture from other pictures: those of `ordinalclip audit`, on real data.

    python benchmarks/near_duplicates.py --root FOLDER --image file --label age

FOLDER holds labels.csv and pictures; features are those of EfficientNet-Lite0. Of some pictures copies are made, one
kind at a time, and put among all others. Printed: how many copies `similar` finds, by features and thumbnails together
and by either alone, under several values of its bound, and under bounds on the cosine instead; and how many pairs of
the pictures themselves each bound lists, which are to be looked at.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from ordinalclip.config import load_config
from ordinalclip.data import PARTS, load_parts
from ordinalclip.data import duplicates as known
from ordinalclip.data.parts import joined
from ordinalclip.images import prepare
from ordinalclip.training.distributed import make_accelerator
from ordinalclip.training.features import FeatureCache
from ordinalclip.training.preparation import build_model

BOUNDS, COSINES = (0.2, 0.3, 0.4), (0.8, 0.9, 0.95)


def jpeg(image: Image.Image) -> Image.Image:
    """Compressed again, quality 50."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    """The middle."""
    x, y = (round(side * (1 - share) / 2) for side in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


COPIES = {
    "JPEG 50": jpeg,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "mirrored": ImageOps.mirror,
    "15 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "middle 95 %": lambda image: cropped(image, 0.95),
    "middle 90 %": lambda image: cropped(image, 0.9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--image", default="image", help="column of labels.csv")
    parser.add_argument("--label", default="label", help="column of labels.csv")
    parser.add_argument("--copies", type=int, default=200)
    arguments = parser.parse_args()
    options = [f"data.image_column={arguments.image}", f"data.label_column={arguments.label}", "method=l1"]
    options += ["data.source=table", f"data.root={arguments.root}", "data.table=labels.csv", "data.views=1"]
    config = load_config(None, [*options, "model.backbone=efficientnet_lite0", "model.features=cached"])
    parts = load_parts(config.data, config.ranks, 1)
    whole = joined([part for name in PARTS if (part := getattr(parts, name)) is not None])
    model = build_model(config, parts.ranks, parts.train)
    features = FeatureCache(model, config, make_accelerator("no")).evaluated(whole).take(range(len(whole))).numpy()
    small = np.stack([known.thumbnail(whole.image(row)) for row in range(len(whole))])
    rows = np.random.default_rng(0).permutation(len(whole))[: arguments.copies]
    copied = {}
    for name, copy in COPIES.items():
        images = [copy(whole.image(int(row))) for row in rows]
        with torch.no_grad():
            encoded = [model.encoder(prepare(image, model.config.pixel_spec)[None])[0].numpy() for image in images]
        copied[name] = np.stack(encoded), np.stack([known.thumbnail(image) for image in images])

    print(f"{len(whole)} pictures, {len(rows)} copies of each kind, torch {torch.__version__}\n")
    print(f"| bound | pairs of the pictures | {' | '.join(COPIES)} |\n|---|---:|{'---:|' * len(COPIES)}")

    def line(what: str) -> None:
        shares = []
        for encoded, tiny in copied.values():
            pairs = listed(np.concatenate([features, encoded]), np.concatenate([small, tiny]))
            shares.append(np.mean([(int(row), len(features) + number) in pairs for number, row in enumerate(rows)]))
        print(
            f"| {what} | {len(listed(features, small))} | {' | '.join(f'{each:.0%}' for each in shares)} |", flush=True
        )

    by_pixels = known.near_duplicates
    for bound in BOUNDS:
        known.SIMILAR, known.near_duplicates = bound, by_pixels
        line(f"{bound:g} of the tenth, or thumbnails")
    known.SIMILAR, known.near_duplicates = 0.3, lambda *_: []
    line("0.3 of the tenth alone")
    known.SIMILAR, known.near_duplicates = -1.0, by_pixels
    line("thumbnails alone")
    mean = features.mean(axis=0)
    points, others = unit(features - mean), {name: unit(copied[name][0] - mean) for name in COPIES}
    cosines = np.concatenate([(points[row] @ points[row + 1 :].T) for row in range(len(points) - 1)])
    for cosine in COSINES:
        shares = [((others[name] * points[rows]).sum(axis=1) >= cosine).mean() for name in COPIES]
        print(
            f"| cosine {cosine:g} | {int((cosines >= cosine).sum())} | {' | '.join(f'{each:.0%}' for each in shares)} |"
        )


def listed(features: np.ndarray, small: np.ndarray) -> set[tuple[int, int]]:
    """The pairs that an audit would list."""
    return {(pair.first, pair.second) for pair in known.similar(features, np.arange(len(features)), small)}


def unit(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
