"""Shared parts: small towers, real image files, quick run configurations."""

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: no test may wait for a hub
os.environ["ORDINALCLIP_CACHE"] = tempfile.mkdtemp(prefix="ordinalclip-cache-")  # or tests would read the user's

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from ordinalclip import OrdinalModel, Ranks
from ordinalclip.config import load_config
from ordinalclip.data import load_parts
from ordinalclip.heads import Targets
from ordinalclip.text import TextTower
from ordinalclip.training import train
from ordinalclip.training.distributed import make_accelerator
from ordinalclip.training.preparation import build_model
from ordinalclip.training.step import Learner

os.fsync = lambda descriptor: None  # no test takes the power away, and two cores would wait for the disk
torch.set_num_threads(1)  # two threads on two busy cores wait for each other: see CONTRIBUTING.md
CACHE = os.environ["ORDINALCLIP_CACHE"]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUICK = (
    "ranks.low=0",
    "ranks.high=100",
    "ranks.num=21",
    "data.num_train=24",
    "data.num_validation=12",
    "data.num_test=12",
    "train.max_steps=4",
    "train.batch_size=8",
    "train.lr=1e-3",
    "evaluation.report=false",  # takes longer than the run
)

NOISY = ("data.augment.flip=true", "data.augment.crop_ratio=1.2", "model.dropout=0.1")


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses_of(folder):
    return np.array([row["loss"] for row in log_of(folder)])


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "processor_ms")} for row in rows]


def interrupted(monkeypatch, number, *arguments, **options):
    """A training that ends before its step `number`, counted from 0."""

    class Stopped(Exception):
        pass

    step = Learner.step

    def stopping(self, now, *batch):
        if now == number:
            raise Stopped
        return step(self, now, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stopping)
        with pytest.raises(Stopped):
            train(*arguments, **options)


def learner_of(config):
    """What a run trains, before its first step."""
    accelerator = make_accelerator(config.train.mixed_precision)
    parts = load_parts(config.data, config.ranks, config.seed)
    return Learner(build_model(config, parts.ranks, parts.train), parts, config, accelerator)


FEW = Ranks.linear(0, 10, 11)


def random_model(method, backbone="tiny", ranks=FEW, decoding="median", **head):
    """A model of random weights, whose bank, if it has one, is of random pictures."""
    torch.manual_seed(0)
    head = head or ({"loss": "torch.nn:CrossEntropyLoss"} if method == "loss" else {})
    text = "" if backbone == "tiny" else "tiny"
    options = {"label_mean": 5, "label_std": 3, "decoding": decoding}
    model = OrdinalModel.build(backbone, ranks, method, head, text, **options).eval()
    size = model.config.pixel_spec.size
    with torch.no_grad():
        if model.head.needs_fit:
            values = torch.linspace(0, 10, 24)
            outputs = model.head(model.encoder(torch.randn(24, 3, size, size).cumsum(-1) / 8))
            part = outputs, Targets(values, ranks.rank_of(values))
            model.head.fit(part, part)
    return model


@pytest.fixture
def quick(tmp_path):
    """A function (overrides) -> configuration of a run of a second."""
    return lambda *overrides: load_config(None, [f"output_dir={tmp_path}/run", *QUICK, *overrides])


def small_clip(width=64, layers=2, heads=2, output=32, **text):
    """A random open_clip model with a 77-token text tower."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers, **text}
    torch.manual_seed(0)
    return open_clip.CLIP(output, vision, text)


@pytest.fixture(scope="session")
def tower():
    """A random text tower whose weights are large enough that wrong masks show."""
    model = small_clip()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("visual"):
                parameter.normal_(std=0.1)
    return TextTower.from_open_clip(model)


@pytest.fixture
def image_folder(tmp_path):
    """Six PNG files whose brightness is their label 0, 1, 2, and a CSV."""
    rows = ["file,grade,kind,subject"]
    for number in range(6):
        grade = number % 3
        noise = np.random.default_rng(number).integers(0, 60, (40, 48, 3))
        Image.fromarray((noise + 80 * grade).astype(np.uint8)).save(tmp_path / f"cell{number}.png")
        rows.append(f"cell{number}.png,{grade},{'ab'[number % 2]},s{number // 2}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    return tmp_path
