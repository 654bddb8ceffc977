"""Nothing is lost: checkpoints whole or not at all, resuming bit for bit, being told to stop, numbers that go wrong."""

import json
import logging
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import NOISY, QUICK, interrupted, log_of, without_times

from ordinalclip.config import load_config
from ordinalclip.run_folder import RunFolder
from ordinalclip.runs import train_run
from ordinalclip.signals import PREEMPTED, Preempted
from ordinalclip.training import Diverged, train
from ordinalclip.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from ordinalclip.training.interruption import Pruned
from ordinalclip.training.sampling import Stream
from ordinalclip.training.step import Learner

FOUR = ("train.eval_every=2", "train.max_steps=8", "train.keep_checkpoints=9", "method=l1")


def weights_of(folder, step):
    return load_checkpoint(folder / "checkpoints" / f"step-{step:08d}").weights


def assert_same_run(one, other, step):
    """Log, figures and final weights, bit for bit; times aside."""
    assert without_times(log_of(one)) == without_times(log_of(other))
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
    assert {**figures[0], "train_seconds": 0} == {**figures[1], "train_seconds": 0}
    first, second = weights_of(one, step), weights_of(other, step)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("method", ["ordinalclip", pytest.param("l1", marks=pytest.mark.slow)])
def test_resume_is_bit_for_bit(quick, tmp_path, monkeypatch, method):
    options = (f"method={method}", "train.max_steps=6", "train.eval_every=2", "train.keep_checkpoints=9", *NOISY)
    whole = train(quick(*options, f"output_dir={tmp_path}/whole"), quiet=True)
    interrupted(monkeypatch, 5, quick(*options, f"output_dir={tmp_path}/cut", "train.log_every=1"), quiet=True)
    assert len(log_of(tmp_path / "cut")) == 5
    cut = train(quick(*options, f"output_dir={tmp_path}/cut", "train.resume=auto"), quiet=True)
    assert_same_run(whole, cut, 6)


def test_resuming_under_another_configuration_is_refused(quick, tmp_path):
    train(quick("train.eval_every=2"), quiet=True)
    with pytest.raises(ValueError, match=r"another configuration: train\.lr was 0\.001, is 0\.1"):
        train(quick("train.eval_every=2", "train.resume=auto", "train.lr=0.1"), quiet=True)
    with pytest.raises(ValueError, match="is not a checkpoint of"):
        train(quick(f"output_dir={tmp_path}/b", f"train.resume={tmp_path}/run/checkpoints/step-00000004"), quiet=True)


def test_going_back_to_an_earlier_checkpoint_drops_the_later_ones(quick):
    options = ("train.eval_every=2", "train.max_steps=6", "train.keep_checkpoints=5")
    folder = train(quick(*options), quiet=True)
    before = without_times(log_of(folder))
    train(quick(*options, f"train.resume={folder}/checkpoints/step-00000002"), quiet=True)
    assert without_times(log_of(folder)) == before
    assert [path.name[-1] for path in sorted((folder / "checkpoints").iterdir())] == ["2", "4", "6"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of `FOUR`, to be copied."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(load_config(None, [f"output_dir={folder}", *QUICK, *FOUR]), quiet=True)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "sha256.json"])
@pytest.mark.parametrize("damage", ["truncated", "one byte changed", "missing"])
def test_a_damaged_checkpoint_is_named_and_passed_over(quick, whole, tmp_path, caplog, file, damage):
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    victim = checkpoints(cut / "checkpoints")[-1] / file
    content = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        train(quick(*FOUR, f"output_dir={tmp_path}/cut", "train.resume=auto"), quiet=True)
    assert "step-00000008" in caplog.text
    assert file in caplog.text
    assert_same_run(whole, cut, 8)


def test_only_damaged_checkpoints_is_an_error(quick):
    folder = train(quick(*FOUR), quiet=True)
    for path in checkpoints(folder / "checkpoints"):
        (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no intact checkpoint; overwrite=true starts anew.*step-00000002"):
        train(quick(*FOUR, "train.resume=auto"), quiet=True)
    with pytest.raises(ValueError, match=r"damaged checkpoint, state\.json"):
        train(quick(*FOUR, f"train.resume={folder}/checkpoints/step-00000004"), quiet=True)


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path):
    """On a real file system of 3 MB: the third checkpoint of 1 MB does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        empty = {"state": {}, "param_groups": []}
        weights = {"w": torch.randn(2**18)}
        for step in (1, 2):
            save_checkpoint(disk, step, weights, empty, {})
        with pytest.raises(OSError, match=r"step-00000003: could not be written.*older checkpoints are as they were"):
            save_checkpoint(disk, 3, weights, empty, {})
        assert [path.name for path in sorted(disk.iterdir())] == ["step-00000001", "step-00000002"]
        for path in checkpoints(disk):
            assert torch.equal(load_checkpoint(path).weights["w"], weights["w"])
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_refused_resume_leaves_the_run_as_it_was(quick):
    folder = train(quick(*FOUR), quiet=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"train\.lr was"):
        train(quick(*FOUR, "train.resume=auto", "train.lr=0.1"), quiet=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change",
    ["train.batch_size=4", "train.warmup_steps=1", "seed=7", "data.split_seed=3", "model.dropout=0.5", "train.ema=0.5"],
)
def test_what_a_run_computes_may_not_change_on_resuming(quick, change):
    """Of each section one: whatever takes part in the numbers makes another experiment."""
    train(quick(*FOUR, "train.max_steps=2"), quiet=True)
    with pytest.raises(ValueError, match=change.partition("=")[0].replace(".", r"\.") + " was"):
        train(quick(*FOUR, "train.max_steps=2", "train.resume=auto", change), quiet=True)


def test_execution_may_change_on_resuming(quick, tmp_path):
    whole = train(quick(*FOUR, f"output_dir={tmp_path}/whole"), quiet=True)
    cut = train(quick(*FOUR, f"output_dir={tmp_path}/cut"), quiet=True)
    for path in checkpoints(cut / "checkpoints")[2:]:
        (path / "state.json").unlink()
    changed = ("train.resume=auto", "data.workers=1", "train.log_every=1", "data.cache_mb=0")
    train(quick(*FOUR, f"output_dir={tmp_path}/cut", *changed), quiet=True)
    assert_same_run(whole, cut, 8)


def test_sigterm_saves_leaves_and_goes_on(quick, tmp_path, monkeypatch):
    """The signal comes in the middle of step 4, where nothing is due."""
    options = ("method=ordinalclip", "train.max_steps=6", "train.eval_every=3", "train.ema=0.9", *NOISY)
    whole = train(quick(*options, f"output_dir={tmp_path}/whole"), quiet=True)
    step = Learner.step

    def signalled(self, number, *batch):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *batch)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Learner, "step", signalled)
    with pytest.raises(Preempted, match="told to stop after step 4") as stopped:
        train(quick(*options, f"output_dir={tmp_path}/cut"), quiet=True)
    assert stopped.value.code == PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "metrics.json").exists()
    cut = train(quick(*options, f"output_dir={tmp_path}/cut", "train.resume=auto"), quiet=True)
    assert_same_run(whole, cut, 6)


@pytest.mark.parametrize("method", ["l1", "ordinalclip"])
def test_a_diverged_run_stops_and_says_where(quick, method):
    with pytest.raises(
        ValueError, match=r"step \d+: .*(nan|inf|not finite).*; learning rate \d+.*; rows of the batch: row"
    ):
        train(quick(f"method={method}", "train.lr=100", "train.weight_decay=100", "train.max_steps=20"), quiet=True)


def test_a_gradient_that_is_not_finite_stops_before_the_update(quick, monkeypatch):
    """The loss stays finite, one gradient does not: parameter, step and rows are named, the checkpoint before stays."""
    from baselines.regression import L1

    loss = L1.loss

    def poisoned(self, outputs, targets):
        terms = loss(self, outputs, targets)
        if targets.progress == 5 / 8:
            self.linear.bias.register_hook(lambda gradient: gradient * float("nan"))
        return terms

    monkeypatch.setattr(L1, "loss", poisoned)
    config = quick(*FOUR, "data.num_train=10", "train.batch_size=4")
    with pytest.raises(ValueError, match=r"step 6: the gradient of head\.linear\.bias is not finite") as failure:
        train(config, quiet=True)
    named = str(failure.value).partition("rows of the batch: ")[2].split(", ")
    stream = Stream(10, config.seed)
    assert named == [f"row {stream.at(position) + 1}" for position in range(20, 24)]
    folder = checkpoints(Path(config.output_dir) / "checkpoints")
    assert [path.name[-1] for path in folder] == ["2", "4"]
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(folder[-1]).weights.values())


@pytest.mark.parametrize(("wrong", "log_every"), [("gradient", 10), ("loss", 10), ("gradient", 1)])
def test_where_a_device_is_not_waited_for_the_weights_are_spared_all_the_same(quick, monkeypatch, wrong, log_every):
    """As on a GPU: it is noticed a step later, or when the log is written, and neither weights nor log have it."""
    from baselines.regression import L1

    loss, begin, step = L1.loss, Learner.__init__, Learner.step
    learners, weights = [], []

    def poisoned(self, outputs, targets):
        terms = loss(self, outputs, targets)
        if targets.progress == 5 / 8:
            self.linear.bias.register_hook(lambda gradient: gradient * float("nan"))
            return {"loss": terms["loss"] * float("nan")} if wrong == "loss" else terms
        return terms

    def deferring(self, *arguments):
        begin(self, *arguments)
        self.deferred = True
        learners.append(self)

    def watched(self, *batch):
        weights.append([parameter.detach().clone() for parameter in self.parameters])
        return step(self, *batch)

    monkeypatch.setattr(L1, "loss", poisoned)
    monkeypatch.setattr(Learner, "__init__", deferring)
    monkeypatch.setattr(Learner, "step", watched)
    config = quick(
        *FOUR, "data.num_train=10", "train.batch_size=4", "train.eval_every=4", f"train.log_every={log_every}"
    )
    what = "the norm of the gradient is nan" if wrong == "gradient" else "loss is nan"
    with pytest.raises(Diverged, match=f"step 6: {what}; learning rate") as failure:
        train(config, quiet=True)
    assert len(weights) == (6 if log_every == 1 else 7)
    stream, named = Stream(10, config.seed), str(failure.value).partition("rows of the batch: ")[2].split(", ")
    assert named == [f"row {stream.at(position) + 1}" for position in range(20, 24)]
    for parameter, before in zip(learners[0].parameters, weights[5], strict=True):
        assert torch.equal(parameter, before)
    moments = learners[0].optimizer.optimizer.state_dict()["state"].values()
    assert all(torch.isfinite(tensor).all() and state["step"] == 5 for state in moments for tensor in state.values())
    assert [row["step"] for row in log_of(config.output_dir)] == [1, 2, 3, 4, 5]


def test_a_step_that_the_scaler_skips_takes_none_from_the_log_of_a_run_that_is_pruned(quick, monkeypatch):
    """With fp16 an infinite gradient is no divergence."""
    step = Learner.step

    def overflows(self, number, *batch):
        return step(self, number, *batch) | ({"grad_norm": torch.tensor(float("inf"))} if number == 1 else {})

    def prune(validation, mae):
        raise Pruned("enough")

    monkeypatch.setattr(Learner, "step", overflows)
    config = quick("method=l1", "train.eval_every=4", "train.log_every=4")
    with pytest.raises(Pruned):
        train_run(config, quiet=True, watch=prune)
    assert [row["step"] for row in log_of(config.output_dir)] == [1, 2, 3, 4]


def test_deferring_the_check_changes_no_number(quick, tmp_path, monkeypatch):
    begin = Learner.__init__
    plain = train(quick(*FOUR, f"output_dir={tmp_path}/plain"), quiet=True)

    def deferring(self, *arguments):
        begin(self, *arguments)
        self.deferred = True

    monkeypatch.setattr(Learner, "__init__", deferring)
    assert_same_run(plain, train(quick(*FOUR, f"output_dir={tmp_path}/deferred"), quiet=True), 8)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
@pytest.mark.parametrize("average", [(), ("train.ema=0.9",)])
def test_weights_that_the_last_update_spoils_are_not_saved(quick, monkeypatch, spoilt, average):
    """Loss and gradient of the last step are finite; the checkpoint before it stays, and nothing looks finished."""
    step = Learner.step

    def spoil(self, number, *batch):
        logged = step(self, number, *batch)
        if number == self.total - 1:
            self.model.head.linear.bias.data[0] = spoilt
            if self.average is not None:
                self.average.update(number)
        return logged

    monkeypatch.setattr(Learner, "step", spoil)
    config = quick(*FOUR, *average)
    with pytest.raises(Diverged, match=r"step 8: (average\.)?head\.linear\.bias holds 1 numbers that are not finite"):
        train(config, quiet=True)
    folder = RunFolder(config.output_dir)
    assert [path.name[-1] for path in checkpoints(folder.checkpoints)][-1] == "6"
    assert folder.read_log()[-1]["step"] == 8
    assert not folder.model.exists()
    assert not folder.is_finished
