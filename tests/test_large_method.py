"""LARGE as a method of the trainer, on the encoder and the generator that the package brings: runs, starts, files."""

import json

import pytest
import torch
from conftest import NOISY, interrupted, log_of, losses_of, without_times
from safetensors.torch import load_file

from baselines.large.head import TunedLatentRegressor
from ordinalclip import OrdinalModel
from ordinalclip.data import load_parts
from ordinalclip.pipeline import load_pipeline
from ordinalclip.training import train
from ordinalclip.training.checkpoint import load_checkpoint
from ordinalclip.training.preparation import build_model
from ordinalclip.training.step import Learner

TANKS = ("data.kinds=[tank]", "data.style=calm", "model.backbone=e4e", "ranks.num=101")
MANY = (*TANKS, "data.num_train=200", "data.num_test=100")
TEXT = ("head.direction=text", "head.source=low", "head.target=high", "model.text=tiny")


def figures(folder):
    return json.loads((folder / "metrics.json").read_text())["test"]


@pytest.mark.parametrize(
    ("options", "share"),
    [
        pytest.param(("head.share=0.1",), 0.4, marks=pytest.mark.slow),
        pytest.param(("head.share=0.1", "head.layers=separate", "head.penalty=ridge"), 0.2, marks=pytest.mark.slow),
        (("head.share=0.1", "head.layers=generator"), 0.4),
        pytest.param((*TEXT, "head.budget=5"), 0.75, marks=pytest.mark.slow),
        pytest.param((*TEXT, "head.budget=5", "head.layers=generator"), 0.75, marks=pytest.mark.slow),
    ],
)
def test_calm_tanks_are_read(quick, tmp_path, options, share):
    """Of the error of the best constant no more than a share; with a text, five labels are all that is known."""
    constant = figures(train(quick(*MANY, "method=constant", f"output_dir={tmp_path}/constant"), quiet=True))
    found = figures(train(quick(*MANY, "method=large", *options), quiet=True))
    assert constant["mae"] > 20
    assert found["mae"] < share * constant["mae"]
    assert found["spearman"] > 0.8


@pytest.mark.parametrize("options", [("head.share=0.1",), (*TEXT, "head.budget=5")])
@pytest.mark.parametrize("method", ["large", "large_tuned"])
def test_models_come_back_and_are_served(quick, tmp_path, method, options):
    """Deployed and trainable, without generator, text tower or file of weights: the same answers."""
    if method == "large_tuned":
        options = [option for option in options if "budget" not in option]
    config = quick(*TANKS, f"method={method}", *options)
    folder = train(config, quiet=True)
    model = OrdinalModel.from_pretrained(folder / "model")
    part = load_parts(config.data, config.ranks, config.seed).test
    pictures = [part.image(row) for row in range(len(part))]
    pixels = model.image_processor(pictures)["pixel_values"]
    answers = model.predict(pixels).value
    assert len(set(answers.tolist())) > 6
    served = [found["value"] for found in load_pipeline(str(folder / "model"))(pictures)]
    assert served == pytest.approx(answers.tolist(), rel=1e-6)
    for form in ("deployed", "trainable"):
        model.save_pretrained(tmp_path / form, form=form)
        back = OrdinalModel.from_pretrained(tmp_path / form)
        assert torch.equal(back.predict(pixels).value, answers)
    names = load_file(tmp_path / "deployed" / "model.safetensors")
    assert not [name for name in names if not name.startswith(("encoder.tower.", "head."))]
    assert {name for name in names if name.startswith("head.")} == {"head.normals", "head.slopes", "head.offset"}


@pytest.mark.parametrize("options", [(), (*TEXT, "model.text=tiny")])
def test_a_model_before_its_training_comes_back(quick, tmp_path, options):
    """The trainable form of a text direction, with its text tower."""
    config = quick(*TANKS, "method=large_tuned", *options)
    parts = load_parts(config.data, config.ranks, config.seed)
    model = build_model(config, parts.ranks, parts.train)
    model.save_pretrained(tmp_path / "model", form="trainable")
    back, pixels = OrdinalModel.from_pretrained(tmp_path / "model"), torch.randn(2, 3, 32, 32)
    assert torch.equal(back.predict(pixels).value, model.predict(pixels).value)
    assert back(pixels, torch.tensor([1.0, 9.0])).loss == model(pixels, torch.tensor([1.0, 9.0])).loss
    assert isinstance(back.head, TunedLatentRegressor)


TUNED = (*TANKS, "method=large_tuned", "head.share=0.2")


def test_the_start_comes_once_before_the_first_step(quick, monkeypatch):
    events = []
    start, step = TunedLatentRegressor.start, Learner.step

    def watched_start(self, train):
        events.append("start")
        assert len(train[1].values) == len(train[0]["codes"]) == 24  # the whole training part
        start(self, train)
        events.append(self.normals.detach().clone())

    def watched_step(self, number, *batch):
        if number == 0:
            events.append(self.model.head.normals.detach().clone())
        events.append(number)
        return step(self, number, *batch)

    monkeypatch.setattr(TunedLatentRegressor, "start", watched_start)
    monkeypatch.setattr(Learner, "step", watched_step)
    train(quick(*TUNED), quiet=True)
    assert events[0] == "start"
    assert torch.equal(events[1], events[2])  # what was fitted is what learns
    assert events[3:] == [0, 1, 2, 3]


def test_training_goes_on_from_what_large_answers(quick, tmp_path):
    """At a rate of next to nothing the tuned one is LARGE; at a useful one it reads its training part better."""
    fixed = figures(train(quick(*TANKS, "method=large", "head.share=0.2", f"output_dir={tmp_path}/fixed"), quiet=True))
    still = figures(train(quick(*TUNED, "train.lr=1e-12", f"output_dir={tmp_path}/still"), quiet=True))
    assert still["mae"] == pytest.approx(fixed["mae"], rel=1e-4)
    losses = losses_of(train(quick(*TUNED, "train.max_steps=20", f"output_dir={tmp_path}/tuned"), quiet=True))
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()


def test_no_step_at_all_is_large(quick, tmp_path):
    found = [
        figures(train(quick(*TUNED, *options, f"output_dir={tmp_path}/{options[0]}"), quiet=True))
        for options in (("method=large",), ("train.max_steps=0",))
    ]
    assert found[0] == found[1]


def test_resuming_is_bit_for_bit(quick, tmp_path, monkeypatch):
    """The start is made again and changes nothing: the checkpoint's weights take its place."""
    options = (*TUNED, "train.max_steps=6", "train.eval_every=2", "train.keep_checkpoints=9", *NOISY)
    whole = train(quick(*options, f"output_dir={tmp_path}/whole"), quiet=True)
    interrupted(monkeypatch, 5, quick(*options, f"output_dir={tmp_path}/cut", "train.log_every=1"), quiet=True)
    cut = train(quick(*options, f"output_dir={tmp_path}/cut", "train.resume=auto"), quiet=True)
    assert without_times(log_of(whole)) == without_times(log_of(cut))
    assert figures(whole) == figures(cut)
    one, other = (load_checkpoint(folder / "checkpoints" / "step-00000006").weights for folder in (whole, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
