"""Cached features: the numbers of computing them, computed once, whoever asks, and nothing foreign read."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUICK, interrupted, learner_of, log_of, losses_of, without_times
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_training import launch
from timm.models.vision_transformer import Attention

from ordinalclip.cli import main
from ordinalclip.config import load_config
from ordinalclip.data import load_parts
from ordinalclip.files import ASIDE, lock
from ordinalclip.images import Augmentation, PixelSpec
from ordinalclip.model import Encoder, OrdinalModel
from ordinalclip.ranks import Ranks
from ordinalclip.runs import evaluate_run
from ordinalclip.training import features, preparation, train
from ordinalclip.training.features import FeatureCache, features_folder, kept_features, read_features
from ordinalclip.training.sampling import Stream, StreamDataset, ViewDataset

COMPUTED = ("model.features=computed", "train.freeze=[encoder.*]")
CACHED = ("model.features=cached",)
EXACT = ("train.precision=float64", "evaluation.space=true")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORDINALCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def no_encoder(monkeypatch):
    """A switch: from then on whoever encodes a picture fails."""

    def refuse():
        def encode(*_):
            raise AssertionError("a picture was encoded")

        monkeypatch.setattr(Encoder, "encode", encode)

    return refuse


def files_of(cache):
    """Those that are whole: a killed job may have left one that it was about to rename."""
    return sorted(path for path in cache.glob("*/*.safetensors") if not path.name.startswith(ASIDE))


def pictures_in(cache):
    """How many pictures' features each store holds, with those that are held twice counted twice."""
    counts = {}
    for file in files_of(cache):
        pictures, _ = read_features(file, file.parent.name)
        counts.setdefault(file.parent.name, []).extend(row.tobytes() for row in pictures)
    return counts


@pytest.mark.parametrize(
    "options",
    [
        ["method=ordinalclip", "data.views=1", "train.sampling=balanced"],
        ["method=l1", "data.views=3", "data.augment.flip=true", "model.dropout=0.2", "model.mirror=[horizontal]"],
        ["method=rm_loss", "data.views=2", "data.augment.rotate=20", "train.micro_batch_size=3"],
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                ["method=l1", "data.views=1"],
                ["method=rank_n_contrast", "data.views=1"],
                ["method=large", "data.views=1"],
                ["method=layerwise_heads:MeanOfLayers", "data.views=2", "model.dropout=0.2"],
                ["method=ranking_adapter", "data.views=2", "head.width=16"],
            )
        ),
    ],
    ids=lambda options: options[0].removeprefix("method="),
)
def test_numbers_are_those_of_computing(quick, options):
    """Losses, weights of the head, predictions and metrics of a run, to 1e-6 and better."""
    folders = [
        train(quick(*EXACT, *options, *features, f"output_dir=run-{number}"), quiet=True)
        for number, features in enumerate((COMPUTED if options[0] != "method=large" else COMPUTED[:1], CACHED))
    ]
    if log_of(folders[0]):
        one, other = map(losses_of, folders)
        assert np.abs(other / one - 1).max() < 1e-9
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    for part in ("validation", "test"):
        for key, value in one[part]["median"].items():
            assert other[part]["median"][key] == pytest.approx(value, rel=1e-6)
    assert other["test"]["d5"] == pytest.approx(one["test"]["d5"], rel=1e-6)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_nothing_is_computed_twice(quick, no_encoder, cache):
    """Other method, seed, settings, split and draw of the same pictures; evaluation and resuming, too."""
    options = ("data.split_seed=1", "data.views=1", *CACHED)
    train(quick(*options, "method=l1"), quiet=True)
    assert {len(held) for held in pictures_in(cache).values()} == {48}
    before = {file: file.stat().st_mtime_ns for file in files_of(cache)}
    no_encoder()
    second = train(quick(*options, "method=cnn", "seed=7", "train.batch_size=4", "output_dir=second"), quiet=True)
    train(quick(*options, "method=l1", "data.train_share=0.5", "output_dir=third"), quiet=True)
    train(
        quick(*options, "method=cnn", "seed=7", "train.batch_size=4", "train.max_steps=0", "output_dir=4"), quiet=True
    )
    metrics = json.loads((second / "metrics.json").read_text())
    assert evaluate_run(second, quiet=True)["test"] == metrics["test"]
    assert before == {file: file.stat().st_mtime_ns for file in files_of(cache)}


def test_another_split_of_the_same_files_computes_nothing(image_folder, no_encoder):
    table = ("data.source=table", f"data.root={image_folder}", "data.table=labels.csv", "data.image_column=file")
    options = [*table, "data.label_column=grade", "data.split=[0.5,0.5,0]", "train.max_steps=2", "train.batch_size=2"]
    options += ["evaluation.report=false", "method=l1", "data.views=1", *CACHED]
    train(load_config(None, [*options, "output_dir=one", "seed=1"]), quiet=True)
    no_encoder()
    train(load_config(None, [*options, "output_dir=two", "seed=2"]), quiet=True)
    (image_folder / "moved").mkdir()
    for file in image_folder.glob("cell*.png"):
        file.rename(image_folder / "moved" / file.name)
    moved = (image_folder / "labels.csv").read_text().replace("cell", "moved/cell")
    (image_folder / "labels.csv").write_text(moved)
    train(load_config(None, [*options, "output_dir=three"]), quiet=True)
    cell = image_folder / "moved" / "cell3.png"
    cell.write_bytes(cell.read_bytes() + b"\0")  # a picture of other bytes
    with pytest.raises(AssertionError, match="a picture was encoded"):
        train(load_config(None, [*options, "output_dir=four"]), quiet=True)


@pytest.mark.parametrize(
    "option, same",
    [
        ("seed=3", True),
        ("train.batch_size=3", True),
        ("evaluation.batch_size=2", True),
        ("method=coop", True),
        ("data.augment.flip=true", True),  # of which the one view as evaluated knows nothing
        ("model.load_weights=false", False),
        ("model.image_size=32", False),
        ("train.precision=float64", False),
        ("train.mixed_precision=bf16", False),
        ("method=layerwise_heads:MeanOfLayers", False),
        ("method=ranking_adapter", False),
        ("data.views=2", False),
        ("model.mirror=[vertical]", False),
    ],
)
def test_what_features_depend_on(quick, cache, option, same):
    options = ("method=l1", "data.views=1", "data.split_seed=1", *CACHED)
    train(quick(*options), quiet=True)
    first = pictures_in(cache)
    train(quick(*options, option, "output_dir=second"), quiet=True)
    assert (pictures_in(cache).keys() == first.keys()) == same
    assert all(pictures_in(cache)[key] == held for key, held in first.items())


def test_pixels_are_told_apart_where_weights_are_the_same(quick, cache):
    """A plain ResNet has the same weights for pictures of any size."""
    options = ("method=l1", "model.backbone=timm:test_resnet", "data.views=1", "data.split_seed=1", *CACHED)
    for size in (32, 64):
        train(quick(*options, f"model.image_size={size}", f"output_dir={size}"), quiet=True)
    kept = [json.loads((folder / "key.json").read_text()) for folder in cache.iterdir()]
    assert sorted(content["pixels"]["size"] for content in kept) == [32, 64]
    assert len({content["weights"] for content in kept}) == 1


def test_weights_and_augmentation_are_told_apart(quick, cache):
    """A single number of the encoder, and another augmentation of the same number of views."""
    options = ("method=l1", "data.views=2", *CACHED)
    for number, rotation in enumerate((10, 20)):
        train(quick(*options, f"data.augment.rotate={rotation}", f"output_dir={number}"), quiet=True)
    assert len(pictures_in(cache)) == 5  # as evaluated, and two views of either
    model = OrdinalModel.build("tiny", Ranks((0, 1)), "l1")
    before = features.weights_digest(model)
    assert before == features.weights_digest(OrdinalModel.build("tiny", Ranks((0, 1, 2)), "cnn"))
    with torch.no_grad():
        next(model.encoder.parameters())[0, 0, 0, 0] += 1e-6
    assert features.weights_digest(model) != before


def test_settings_that_a_module_does_not_show_are_told_apart():
    """Attention in other numbers of heads has weights of the same shapes, and the same text."""
    digests = set()
    for heads in (2, 4, 4):
        torch.manual_seed(0)
        digests.add(features.weights_digest(SimpleNamespace(encoder=SimpleNamespace(tower=Attention(8, heads)))))
    assert len(digests) == 2


def test_only_files_with_wanted_pictures_stay_open(quick, cache):
    options = ("method=l1", "data.views=1", "data.split_seed=1", *CACHED)
    for number in (20, 30, 40):
        train(quick(*options, f"data.num_train={number}", f"output_dir={number}"), quiet=True)
    learner = learner_of(quick(*options, "data.num_train=20"))
    cached = FeatureCache(learner.model, quick(*options), learner.accelerator, quiet=True)
    assert len(cached.evaluated(learner.train).files) < len(files_of(cache))


def test_fixed_views_follow_the_picture_alone(image_folder):
    """Not the row, the seed or the step; every number is a view of its own, and the stream takes them in turn."""
    table = ["data.source=table", f"data.root={image_folder}", "data.table=labels.csv", "data.image_column=file"]
    config = load_config(None, [*table, "data.label_column=grade", "data.split=[1,0,0]"])
    part = load_parts(config.data, config.ranks, 1).train
    spec, augmentation = PixelSpec(16, (0.5,) * 3, (0.5,) * 3), Augmentation(rotate=90, crop_ratio=2.0)
    views = [ViewDataset(part, spec, augmentation, number) for number in range(3)]
    assert all(not torch.equal(views[0][row], views[1][row]) for row in range(6))
    turned = ViewDataset(part.select([5, 4, 3, 2, 1, 0]), spec, augmentation, 0)
    assert all(torch.equal(views[0][row], turned[5 - row]) for row in range(6))

    for seed in (1, 2):
        stream = Stream(6, seed)
        pictures = StreamDataset(part, spec, augmentation, stream, views=3)
        for position in range(24):
            expected = views[position // 6 % 3][stream.at(position)]
            assert torch.equal(pictures[position][0], expected)
    pairs = Stream(6, 1, views=2)
    assert [pairs.visit(position) for position in (0, 1, 10, 11, 12, 13, 24, 25)] == [0, 1, 0, 1, 2, 3, 4, 5]
    plain = StreamDataset(part, spec, augmentation, Stream(6, 1), views=1)
    assert torch.equal(plain[7][0], ViewDataset(part, spec, augmentation)[plain.stream.at(7)])


def test_resumed_run_is_that_of_one_piece(quick, monkeypatch):
    options = ("method=ordinalclip", "data.views=2", "model.dropout=0.3", "train.eval_every=2", *CACHED)
    whole = train(quick(*options, "output_dir=whole"), quiet=True)
    config = quick(*options, "output_dir=pieces", "train.resume=auto")
    interrupted(monkeypatch, 3, config, quiet=True)
    assert without_times(log_of(train(config, quiet=True))) == without_times(log_of(whole))


def damage_bytes(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def damage_end(file):
    file.write_bytes(file.read_bytes()[:-40])


def damage_header(file):
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def swap_rows(file):
    """The same numbers for other pictures."""
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    content = load_file(file)
    save_file({**content, "features": content["features"][::-1].copy()}, file, metadata)


@pytest.mark.parametrize("damage", [damage_bytes, damage_end, damage_header, swap_rows])
def test_damaged_features_are_refused_by_name(quick, cache, damage, capsys):
    options = ("method=l1", "data.views=1", "data.split_seed=1", *CACHED)
    train(quick(*options), quiet=True)
    file = files_of(cache)[0]
    damage(file)
    with pytest.raises(ValueError, match=f"{file.name}: damaged features .*features clear {file.parent.name}"):
        train(quick(*options, "output_dir=second"), quiet=True)
    assert not (cache.parent.parent / "second" / "config.yaml").exists()
    assert main(["features"]) == 1
    assert "damaged features" in capsys.readouterr().out
    assert main(["features", "clear", file.parent.name]) == 0
    train(quick(*options, "output_dir=second"), quiet=True)


def test_foreign_features_are_refused_by_name(quick, cache):
    """A file, or a key.json, of another encoder in the folder."""
    options = ("method=l1", "data.views=1", "data.split_seed=1", *CACHED)
    train(quick(*options), quiet=True)
    (own,) = cache.iterdir()
    train(quick(*options, "model.load_weights=false", "output_dir=other"), quiet=True)
    (other,) = set(cache.iterdir()) - {own}
    foreign = next(other.glob("*.safetensors"))
    (own / f"x{foreign.name}").write_bytes(foreign.read_bytes())
    with pytest.raises(ValueError, match=f"x{foreign.name}: these are features of something else"):
        train(quick(*options, "output_dir=second"), quiet=True)
    (own / f"x{foreign.name}").unlink()
    (own / "key.json").write_bytes((other / "key.json").read_bytes())
    with pytest.raises(ValueError, match=r"key.json: these are features of something else"):
        train(quick(*options, "output_dir=second"), quiet=True)


def command_of(config, *more):
    overrides = [f"output_dir={config.output_dir}", *more]
    return [sys.executable, "-m", "ordinalclip", "train", "default", "--quiet", *QUICK, *overrides]


@pytest.mark.slow
def test_killed_in_between_nothing_is_lost_or_repeated(quick, cache, encoded):
    """SIGKILL while features are computed, in files of few pictures: what was written is read by the next run."""
    options = ("method=l1", "data.views=1", "evaluation.batch_size=2", "data.num_train=400", *CACHED)
    script = (
        "import sys; from ordinalclip.training import features; features.AT_ONCE = 1\n"
        "from ordinalclip.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = command_of(quick(), *options)[3:]
    running = subprocess.Popen([sys.executable, "-c", script, *words])
    deadline = time.monotonic() + 120
    while len(files_of(cache)) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    held = sum(map(len, pictures_in(cache).values()))
    assert 10 <= held < 300
    train(quick(*options), quiet=True)
    (pictures,) = pictures_in(cache).values()
    assert len(pictures) == len(set(pictures)) == held + sum(encoded)
    assert not list(cache.glob("*/*.lock"))


@pytest.mark.slow
def test_jobs_at_the_same_time_compute_each_picture_once(quick, cache):
    options = ("method=l1", "data.views=1", "data.split_seed=1", "data.num_train=300", *CACHED)
    folders = ("one", "two")
    jobs = [subprocess.Popen(command_of(quick(), *options, f"output_dir={name}")) for name in folders]
    assert [job.wait(timeout=200) for job in jobs] == [0, 0]
    (pictures,) = pictures_in(cache).values()
    assert len(pictures) == len(set(pictures)) == 324
    assert losses_of("one").tolist() == losses_of("two").tolist()


@pytest.mark.slow
def test_processes_share_the_work_and_the_features(quick, cache):
    """torchrun with three processes: each picture once, and the losses of a single process."""
    options = ("method=ordinalclip", "data.views=2", "data.augment.flip=true", "model.dropout=0.2", *EXACT, *CACHED)
    single = train(quick(*options, "output_dir=single"), quiet=True)
    before = pictures_in(cache)
    for file in files_of(cache):
        file.unlink()
    launch(3, *QUICK, *options, "output_dir=several")
    after = pictures_in(cache)
    assert {key: sorted(held) for key, held in after.items()} == {key: sorted(held) for key, held in before.items()}
    assert len(files_of(cache)) >= 9  # three processes, and the parts of three stores
    assert np.abs(losses_of("several") / losses_of(single) - 1).max() < 1e-8


def test_what_is_not_written_to_its_end_is_not_read(quick, cache):
    """It may be another process's that is still writing; a job that computes features deletes it."""
    options = ("method=l1", "data.views=1", "data.split_seed=1", *CACHED)
    train(quick(*options), quiet=True)
    (store,) = cache.iterdir()
    partial = store / f"{ASIDE}abc.safetensors"
    partial.write_bytes(b"half")
    train(quick(*options, "output_dir=second"), quiet=True)
    assert partial.exists()
    train(quick(*options, "data.num_test=20", "output_dir=third"), quiet=True)
    assert not partial.exists()


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of the pictures that were encoded at once, from here on."""
    found, encode = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, pixels: found.append(len(pixels)) or encode(self, pixels))
    return found


def test_only_what_is_new_is_computed_and_each_picture_once(image_folder, encoded, cache):
    """A picture that stands in the table twice; then one picture more."""
    table = ["data.source=table", f"data.root={image_folder}", "data.table=labels.csv", "data.image_column=file"]
    options = [*table, "data.label_column=grade", "data.split=[1,0,0]", "data.duplicates=allow", "method=l1"]
    options += ["train.max_steps=2", "train.batch_size=2", "evaluation.report=false", "data.views=1", *CACHED]
    with (image_folder / "labels.csv").open("a") as rows:
        rows.write("again.png,0,a,s0\n")
    (image_folder / "again.png").write_bytes((image_folder / "cell0.png").read_bytes())
    encoded.clear()
    train(load_config(None, [*options, "output_dir=one"]), quiet=True)
    assert sum(encoded) == 6
    with (image_folder / "labels.csv").open("a") as rows:
        rows.write("new.png,2,a,s9\n")
    Image.new("RGB", (20, 20), "red").save(image_folder / "new.png")
    train(load_config(None, [*options, "output_dir=two"]), quiet=True)
    assert sum(encoded) == 7
    (pictures,) = pictures_in(cache).values()
    assert len(pictures) == len(set(pictures)) == 7


def test_pictures_of_equal_size_are_told_apart(image_folder):
    """Files of one length: only what they hold differs."""
    for file in image_folder.glob("*.png"):
        Image.open(file).save(file.with_suffix(".bmp"))
    labels = image_folder / "labels.csv"
    labels.write_text(labels.read_text().replace(".png", ".bmp"))
    table = ["data.source=table", f"data.root={image_folder}", "data.table=labels.csv", "data.image_column=file"]
    config = load_config(None, [*table, "data.label_column=grade", "data.split=[1,0,0]"])
    part = load_parts(config.data, config.ranks, 1).train
    assert len({len(part.content(row)) for row in range(6)}) == 1
    assert len({part.digest(row) for row in range(6)}) == 6


def test_features_in_many_files_are_those_in_one(quick, cache, monkeypatch):
    options = ("method=l1", "data.views=1", "evaluation.batch_size=5", *EXACT, *CACHED)
    one = train(quick(*options, "output_dir=one"), quiet=True)
    assert main(["features", "clear", "all"]) == 0
    monkeypatch.setattr(features, "AT_ONCE", 1)
    many = train(quick(*options, "output_dir=many"), quiet=True)
    assert len(files_of(cache)) > 9
    assert losses_of(many).tolist() == losses_of(one).tolist()


def test_another_job_is_waited_for(quick, cache, monkeypatch, caplog):
    """It holds the lock while this one starts; nothing is computed before it lets go."""
    monkeypatch.setattr(features, "PATIENCE", 0.2)
    options = ("method=l1", "data.views=1", *CACHED)
    train(quick(*options), quiet=True)
    (store,) = cache.iterdir()
    files_of(cache)[0].unlink()
    released = []
    holding = lock(store / features.LOCK_FILE)
    holding.__enter__()

    def release():
        released.append(time.monotonic())
        holding.__exit__(None, None, None)

    timer = threading.Timer(2, release)
    add = features.Store.add
    written = []
    monkeypatch.setattr(features.Store, "add", lambda *given: written.append(time.monotonic()) or add(*given))
    timer.start()
    train(quick(*options, "output_dir=second"), quiet=True)
    timer.join()
    assert written
    assert min(written) >= released[0]
    assert "waiting for features that another job computes" in caplog.text


def test_only_the_head_is_trained(quick):
    """L1 has a weight a feature and an offset; the optimiser holds nothing of the encoder."""
    learner = learner_of(quick("method=l1", "data.views=1", *CACHED))
    assert sum(parameter.numel() for parameter in learner.parameters) == learner.model.config.input_dim + 1


def test_rows_are_where_they_belong(quick, cache):
    """Each picture's features are those of its own pixels, after rows came in several draws and files."""
    options = ("method=l1", "data.views=1", "data.num_train=40", "data.split_seed=1", *CACHED)
    train(quick(*options, "data.train_share=0.3"), quiet=True)
    train(quick(*options, "data.train_share=0.7", "output_dir=second"), quiet=True)
    learner = learner_of(quick(*options))
    config = quick(*options)
    cached = FeatureCache(learner.model, config, learner.accelerator, quiet=True)
    rows = list(range(len(learner.train)))[::-1]
    found = cached.evaluated(learner.train).take(rows)
    pictures = ViewDataset(learner.train, learner.model.config.pixel_spec, Augmentation())
    with torch.no_grad():
        expected = learner.model.eval().encoder(torch.stack([pictures[row] for row in rows]))
    assert torch.allclose(found, expected, atol=1e-4)
    assert len(files_of(cache)) > 3
    assert isinstance(cached.evaluated(learner.train).files[0], np.memmap)


@pytest.mark.parametrize(
    "options, message",
    [
        (["model.features=cached"], "model.features=cached needs data.views"),
        (["model.features=cached", "data.views=1", "model.drop_path=0.1"], "drop_path changes"),
        (["model.features=cached", "data.views=1", "model.lora_rank=2"], "lora_rank changes"),
        (["data.views=0"], "data.views"),
    ],
)
def test_what_is_refused(quick, options, message):
    with pytest.raises(ValueError, match=message):
        quick(*options)


def test_augmentation_without_effect_is_spoken_of(quick, caplog):
    for options, said in ((["data.augment.flip=true"], True), (["data.augment.crop_ratio=1.5"], False)):
        caplog.clear()
        learner_of(quick("method=l1", "data.views=1", *options))
        assert ("without data.augment (flip)" in caplog.text) == said
    caplog.clear()
    learner_of(quick("method=l1", "data.views=2", "data.augment.flip=true"))
    assert "without data.augment" not in caplog.text


def test_encoders_own_dropout_is_spoken_of(quick, caplog):
    """A frozen encoder's dropout would move its features in training; cached ones stay as they are."""
    config = quick("method=l1", "data.views=1", "model.dropout=0.1", *CACHED)
    learner_of(config)
    assert "dropout layers of the encoder" not in caplog.text
    learner = learner_of(quick("method=l1"))
    learner.model.encoder.tower.add_module("noise", torch.nn.Dropout(0.5))
    preparation.prepare_model(learner.model, config, 1, False)
    assert "1 dropout layers of the encoder do nothing in training" in caplog.text


def test_equal_views_are_spoken_of(quick, caplog):
    for method, views, said in (("rank_n_contrast", 1, True), ("rank_n_contrast", 2, False), ("l1", 1, False)):
        caplog.clear()
        learner_of(quick(f"method={method}", f"data.views={views}"))
        assert ("all the same with data.views=1" in caplog.text) == said


def test_listed_and_cleared(quick, cache, capsys):
    assert main(["features"]) == 0
    assert f"{features_folder()}: 0.0 MB" in capsys.readouterr().out
    train(quick("method=l1", "data.views=2", "data.augment.flip=true", *CACHED), quiet=True)
    os.utime(next(iter(cache.iterdir())) / "key.json", (0, 0))
    assert [kept.used for kept in kept_features()] == [kept.used for kept in kept_features()]
    assert len(kept_features()) == 3
    assert main(["features"]) == 0
    said = capsys.readouterr().out
    assert "24 pictures" in said
    assert "tiny at 64 px, augmented view 2" in said
    assert "as evaluated" in said
    one = next(iter(sorted(cache.iterdir())))
    for words, message in (
        (["clear"], "of which KEY"),
        (["clear", "nothing"], "no names begin with 'nothing'"),
        (["clear", ""], "3 names begin with ''"),
        (["list", "x"], "features clear KEY deletes"),
    ):
        assert main(["features", *words]) == 2
        assert message in capsys.readouterr().err
    with lock(one / features.LOCK_FILE):
        assert main(["features", "clear", "all"]) == 1
    said = capsys.readouterr().out
    assert f"left: {one} is in use" in said
    assert "2 deleted" in said
    assert [kept.folder for kept in kept_features()] == [one]
    train(quick("method=l1", "data.views=2", "data.augment.flip=true", "output_dir=again", *CACHED), quiet=True)
    capsys.readouterr()
    assert main(["features", "clear", one.name[:6]]) == 0
    assert not one.exists()
    assert len(kept_features()) == 2
    assert main(["features", "clear", "all"]) == 0
    assert kept_features() == []


def test_folder_that_cannot_be_written(quick, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORDINALCLIP_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        train(quick("method=l1", "data.views=1", *CACHED), quiet=True)


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("ORDINALCLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert features_folder() == tmp_path / "ordinalclip" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert features_folder() == tmp_path / ".cache" / "ordinalclip" / "features"
    assert os.environ.get("ORDINALCLIP_CACHE") is None
