"""What trackers get of a run, read back from TensorBoard's own files and by a tracker of our own; early stopping."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker
from conftest import QUICK, log_of, losses_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from ordinalclip.config import flat_keys, load_config
from ordinalclip.results.record import read_run
from ordinalclip.results.run_report import run_figures
from ordinalclip.results.tracking import track
from ordinalclip.run_folder import RunFolder
from ordinalclip.training import train

TRACKED = ("train.trackers=[tensorboard]", "train.log_every=1", "evaluation.report=true")


def events_of(folder):
    """Everything that TensorBoard finds below a run folder: scalars, texts, pictures, and hyperparameters."""
    scalars, texts, images, settings = {}, {}, {}, {}
    for file in folder.rglob("events.out.tfevents.*"):
        sizes = {"scalars": 0, "images": 0, "tensors": 0}
        reader = EventAccumulator(str(file), size_guidance=sizes).Reload()
        tags = reader.Tags()
        scalars |= {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in tags["scalars"]}
        images |= {tag: reader.Images(tag) for tag in tags["images"]}
        texts |= {tag: reader.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
        for metadata in (reader.SummaryMetadata(tag) for tag in reader._plugin_to_tag_to_content.get("hparams", {})):
            content = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
            for name, value in content.session_start_info.hparams.items():
                settings[name] = getattr(value, value.WhichOneof("kind"))
    return scalars, texts, images, settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked") / "mine"
    return train(load_config(None, [f"output_dir={folder}", *QUICK, *TRACKED]), quiet=True)


@pytest.fixture(scope="module")
def events(run):
    return events_of(run)


def test_the_whole_configuration_name_versions_and_fingerprint(run, events):
    folder, settings = RunFolder(run), events[3]
    configuration = flat_keys(folder.read_config().model_dump(mode="json"))
    assert len(configuration) > 100
    for key, value in configuration.items():
        found = settings[key]
        if isinstance(value, bool | int | float | str):
            assert found == pytest.approx(value) if isinstance(value, float) else found == value
        else:
            assert json.loads(found) == value
    origin = folder.read_provenance()
    assert settings["run"] == "mine"
    assert settings["versions.torch"] == origin["versions"]["torch"]
    for part in ("train", "validation", "test"):
        assert settings[f"fingerprint.{part}.sha256"] == origin["data"][part]["sha256"]
        assert settings[f"fingerprint.{part}.rows"] == origin["data"][part]["rows"]


def test_curves_and_the_metrics_at_the_end(run, events):
    scalars, metrics = events[0], RunFolder(run).read_metrics()
    assert list(scalars["loss"]) == [1, 2, 3, 4]
    assert list(scalars["loss"].values()) == pytest.approx(losses_of(run).tolist(), rel=1e-5)
    logged = {row["step"]: row["validation_mae"] for row in log_of(run) if "validation_mae" in row}
    assert scalars["validation_mae"] == pytest.approx(logged, rel=1e-5)
    for part in ("validation", "test"):
        for name in ("mae", "rmse", "accuracy", "cs@5"):
            assert scalars[f"{part}/{name}"] == {4: pytest.approx(metrics[part][name], rel=1e-5)}
    assert scalars["best_step"] == {4: metrics["best_step"]}


def test_figures_and_the_card(run, events):
    _, texts, images, _ = events
    record = read_run(run)
    assert images.keys() == {f"figures/{name}" for name in run_figures(record)}
    for events_of_tag in images.values():
        (event,) = events_of_tag
        assert event.step == 4
        assert event.width > 300
        assert event.height > 100
    (card,) = (text for tag, text in texts.items() if tag.startswith("card"))
    assert card.strip() in (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "## Metrics" in card


def test_without_a_report_there_are_no_figures(quick):
    scalars, texts, images, _ = events_of(train(quick("train.trackers=[tensorboard]"), quiet=True))
    assert "test/mae" in scalars
    assert not images
    assert not any(tag.startswith("card") for tag in texts)


def test_a_method_that_learns_nothing_is_tracked_too(quick):
    scalars, _, _, settings = events_of(train(quick("method=zero_shot", "train.trackers=[tensorboard]"), quiet=True))
    assert settings["method"] == "zero_shot"
    assert list(scalars["test/mae"]) == [0]


class Recording(GeneralTracker):
    """A tracker that keeps what it is given, with a store for files."""

    name = "recording"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.values, self.images, self.files = {}, {}, []

    def log(self, values, step=None):
        self.values[step] = values

    def log_images(self, values, step=None):
        self.images[step] = values

    def log_artifact(self, path):
        self.files.append(path)


class Failing(Recording):
    def log(self, values, step=None):
        raise ConnectionError("no network")


def test_any_tracker_by_accelerates_methods(run, caplog):
    tracker = Recording()
    track([tracker], RunFolder(run))
    assert tracker.values[4]["test/mae"] == RunFolder(run).read_metrics()["test"]["mae"]
    assert "## Metrics" in tracker.values[4]["card"]
    for pixels in tracker.images[4].values():
        assert Image.fromarray(pixels[0]).mode == "RGB"
    assert tracker.files == [str(run / "report.html")]
    assert not caplog.text
    track([Failing()], RunFolder(run))  # a warning, and no lost run
    assert "the end of the run not tracked: ConnectionError: no network" in caplog.text


def test_trackers_are_refused_by_name(quick):
    with pytest.raises(ValueError, match=r"train\.trackers: tensorbord is unknown; choices: .*tensorboard"):
        train(quick("train.trackers=[tensorbord]"), quiet=True)
    with pytest.raises(ValueError, match=r"train\.trackers: aim is not installed; pip install aim"):
        train(quick("train.trackers=[aim]"), quiet=True)


@pytest.mark.slow
def test_two_processes_are_tracked_once(tmp_path):
    keys = [f"output_dir={tmp_path}/run", *QUICK, *TRACKED, "train.patience=1", "train.eval_every=1", "train.lr=1e-9"]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ordinalclip", "train"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, "default", *keys], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stopped at 2 of 4 steps") == 1
    scalars, _, images, settings = events_of(tmp_path / "run")
    assert len(scalars["loss"]) == 2
    assert list(scalars["test/mae"]) == [2]
    assert images
    assert settings["train.patience"] == 1


def test_early_stopping_says_where(quick, capsys):
    options = ("train.max_steps=40", "train.eval_every=1", "train.patience=2", "train.lr=1e-9")
    run = train(quick(*options, "evaluation.report=true"))
    steps = RunFolder(run).read_metrics()["steps"]
    assert 2 < steps < 40
    said = capsys.readouterr().err
    assert said.count(f"stopped at {steps} of 40 steps: no better MAE in 2 validations\n") == 1
    assert f"stopped at {steps} of 40 steps of batch 8" in (run / "report.html").read_text(encoding="utf-8")
    assert f"stopped at {steps} of 40 steps of batch 8" in (run / "model" / "README.md").read_text(encoding="utf-8")
    train(quick("overwrite=true"))
    assert "stopped at" not in capsys.readouterr().err
