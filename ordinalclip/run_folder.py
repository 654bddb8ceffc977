"""What a run folder is: the names in it, who may write, how far the run has come, and reading back.

config.yaml           the whole configuration, defaults included
provenance.json       versions, source, command, device, data: where the run comes from
log.jsonl             an entry per optimiser step
checkpoints/          what resuming needs
predictions.parquet   every prediction
model/, model-last/   the chosen step's model, and the last step's when that is another
prompts.safetensors   of methods that learn prompts: their context and rank embeddings
metrics.json          written last of what counts: a run that has it is finished
diverged.txt          in its place, how a run of a comparison or a search diverged
pruned.txt            in its place, that a search has ended the run early, and when
report.html           and figures/, made of all this
run.lock              while somebody writes: who
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ordinalclip.config import RunConfig, flat_keys, load_config, read_layers
from ordinalclip.files import ASIDE, delete, lock, read_json, unwritten, whole, write_json, write_text
from ordinalclip.model import OrdinalModel
from ordinalclip.predictions import Predictions
from ordinalclip.weights import read_safetensors, write_safetensors

logger = logging.getLogger(__name__)

EXECUTION = {  # how a run is executed, not what it computes
    "output_dir",
    "overwrite",
    "data.root",
    "data.workers",
    "data.cache_mb",
    "data.prefetch",
    "train.micro_batch_size",
    "train.resume",
    "train.log_every",
    "train.keep_checkpoints",
    "train.trackers",
    "train.process_group_timeout",
}
SPEC = re.compile(r"((?:open_clip|hf|timm):(?:(?!\.\.)[^/~][^/]*/)?)?(.*)", re.DOTALL)  # family and name, then a path
# By which the best step is chosen, and which are kept in the model; the rest of evaluation can be done again.
KEPT = ("evaluation.decoding", "evaluation.intervals", "evaluation.intervals_by_rank")
HASHES = ("sha256", "pictures")  # of a fingerprint
ALWAYS = ("num_train", "train_counts", "best_step", "train_seconds")  # keys of metrics.json that every run has
WAYS = "overwrite=true replaces it, another output_dir leaves it alone"


class FolderOccupied(OSError):
    """The folder holds a run that starting anew would delete; the message says which, and both ways on."""


@dataclass(frozen=True)
class State:
    """How far the run in a folder has come.

    Attributes:
        kind: "empty", "interrupted", "diverged", "pruned", "finished", or "damaged": finished, but of its files some
            cannot be read.
        text: the same in words, for a message.
    """

    kind: str
    text: str = ""


class RunFolder:
    """The folder of one run. Nothing is read or written before it is asked for.

    Args:
        path: the folder; it need not exist.

    Raises:
        ValueError: an empty path, which would be the working directory.
    """

    def __init__(self, path: str | Path):
        if not str(path).strip():
            raise ValueError("the name of the run folder (output_dir) is empty; '.' is the working directory")
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.provenance = self.path / "provenance.json"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.predictions = self.path / "predictions.parquet"
        self.model = self.path / "model"
        self.model_last = self.path / "model-last"
        self.prompts = self.path / "prompts.safetensors"
        self.metrics = self.path / "metrics.json"
        self.diverged = self.path / "diverged.txt"
        self.pruned = self.path / "pruned.txt"
        self.report = self.path / "report.html"
        self.figures = self.path / "figures"
        self.trackers = self.path / "ordinalclip"  # what TensorBoard and its kin write, under the project's name
        self.lock = self.path / "run.lock"

    # ---- how far it has come

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end: metrics.json is written after everything that counts."""
        return self.metrics.is_file() and self.config.is_file()

    def state(self) -> State:
        """What the folder holds."""
        if self.is_finished:
            try:
                self._check_readable()
            except ValueError as error:
                return State("damaged", f"a damaged run ({error})")
            return State("finished", f"a finished run, written {_when(self.metrics)}")
        if self.diverged.is_file():
            return State("diverged", f"a run that diverged, {_when(self.diverged)}")
        if self.pruned.is_file():
            return State("pruned", f"a run that a search has ended early, {_when(self.pruned)}")
        if not any(_holds_something(path) for path in self._own):
            return State("empty")
        entries = self.read_log()
        step = f"at step {entries[-1]['step']}" if entries else "before its first step was logged"
        started = f", started {_when(self.config)}" if self.config.is_file() else ""
        return State("interrupted", f"a run that was interrupted {step}{started}")

    def _check_readable(self) -> None:
        """Raises:
        ValueError: a file of the finished run that something has cut off or overwritten."""
        self.read_metrics()
        self.read_provenance()
        self._saved_config()
        if self.predictions.is_file():
            self._parquet(pq.read_metadata)

    def difference(self, config: RunConfig, data: dict[str, Any] | None = None) -> str:
        """In what the run in the folder is another experiment, in words; "" if it is the same.

        Args:
            config: to compare with.
            data: fingerprints of the data to compare with (`provenance.fingerprints`); None: not compared.
        """
        if not self.config.is_file():
            return f"it has no {self.config.name}"
        try:
            saved = self._saved_config()
        except ValueError as error:
            return str(error)
        if changed := changed_keys(saved.model_dump(mode="json"), config.model_dump(mode="json")):
            return described(changed)
        return "" if data is None else self.data_difference(data)

    def data_difference(self, data: dict[str, Any]) -> str:
        """In what the data is not that of the run, in words; "" if it is the same or not on record."""
        before = self.read_provenance().get("data")
        if before is not None and not (
            isinstance(before, dict) and all(isinstance(each, dict) for each in before.values())
        ):
            raise ValueError(f"{self.provenance}: damaged, data is no object of objects")
        return "" if before is None else changed_data(before, data)

    def check_may_start(self, config: RunConfig) -> None:
        """Nothing that is there is lost by this run.

        Raises:
            FolderOccupied: the folder holds a run, and the configuration neither resumes nor overwrites it; or what is
                there is not of a run at all.
            ValueError: it resumes a run that was another experiment, or whose checkpoints are gone.
        """
        state = self.state()
        if state.kind != "empty" and not self._is_run():
            raise FolderOccupied(
                f"{self.path} holds files of the names of a run's, but neither {self.provenance.name} nor the "
                f"{self.config.name} of one: they may be yours; choose another output_dir"
            )
        if state.kind == "empty" or config.overwrite:
            return
        if config.train.resume == "none":
            raise FolderOccupied(f"{self.path} holds {state.text}: train.resume=auto goes on with it, {WAYS}")
        if difference := self.difference(config):
            raise ValueError(f"{self.path}: cannot resume under another configuration: {difference}; {WAYS}")

    def _is_run(self) -> bool:
        """Whether what is there is ours, and not of somebody who has a folder "model" of their own."""
        try:
            if {"versions", "data", "processes"} <= self.read_provenance().keys():
                return True
            self._saved_config()
        except (OSError, ValueError):
            return False
        return True

    def clear(self) -> None:
        """Delete the run, what makes it look whole first; files of other names stay."""
        for path in (*self._own, *self.path.glob(f"{ASIDE}*")):
            delete(path, "step-*" if path == self.checkpoints else "")

    @property
    def _own(self) -> tuple[Path, ...]:
        """All that a run may have written, what makes it look whole first."""
        ends = (self.metrics, self.diverged, self.pruned)
        files = (*ends, self.config, self.report, self.provenance, self.log, self.predictions)
        return (*files, self.model, self.model_last, self.prompts, self.checkpoints, self.figures, self.trackers)

    def reopen(self) -> None:
        """The run goes on: it is not finished until it is finished again."""
        for file in (self.metrics, self.diverged, self.pruned, self.report):
            file.unlink(missing_ok=True)

    # ---- who may write

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder within a `with` block; one that is empty in the end is deleted.

        Raises:
            FolderInUse: another job holds it; OSError: it cannot be written to.
        """
        if self.path.resolve() == Path(self.path.resolve().anchor):
            raise OSError(f"{self.path} is the root of the file system, no place for a run; choose another output_dir")
        try:
            with lock(self.lock):
                yield
        finally:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    # ---- reading back

    def read_config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The run's configuration.

        Raises:
            FileNotFoundError: no finished run there.
        """
        self.require_finished()
        return self._saved_config(overrides)

    def _saved_config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """What config.yaml says, of which every section is there: what is cut off would be taken for defaults.

        Raises:
            ValueError: it is cut off, or of no run.
        """
        if missing := RunConfig.model_fields.keys() - read_layers(self.config)[-1].content.keys():
            lost = ", ".join(name for name in RunConfig.model_fields if name in missing)
            raise ValueError(f"{self.config}: damaged, or not of a run: {lost} missing")
        return load_config(self.config, overrides)

    def require_finished(self) -> None:
        """Raises:
        FileNotFoundError: no finished run there."""
        if not self.is_finished:
            if (self.path / "runs").is_dir() and (self.path / "results.csv").is_file():
                raise FileNotFoundError(
                    f"{self.path}: the folder of a comparison, no run; name one of its runs, below {self.path}/runs "
                    "(`ordinalclip report` and `plot` take the comparison as a whole)"
                )
            missing = self.metrics if not self.metrics.is_file() else self.config
            raise FileNotFoundError(f"{self.path}: no finished run ({missing.name} is missing)")

    def read_metrics(self) -> dict[str, Any]:
        """metrics.json.

        Raises:
            ValueError: it is damaged.
        """
        metrics = _read_json(self.metrics)
        lacking = [key for key in ALWAYS if key not in metrics]
        lacking += [
            f"{part}.mae" for part in ("validation", "test") if part in metrics and not _is_scored(metrics[part])
        ]
        if lacking:
            raise ValueError(f"{self.metrics}: damaged, {', '.join(lacking)} missing")
        return metrics

    def read_provenance(self) -> dict[str, Any]:
        """provenance.json; empty for runs that have none."""
        return _read_json(self.provenance) if self.provenance.is_file() else {}

    def read_log(self) -> list[dict[str, Any]]:
        """The entries of log.jsonl, one per step; what a crash spoilt is left out, and said if others follow."""
        lines = self.log.read_bytes().splitlines() if self.log.is_file() else []
        entries = [_log_entry(line) for line in lines]
        spoilt = [number for number, entry in enumerate(entries[:-1], 1) if entry is None]
        if spoilt:
            logger.warning(
                "%s, line %d: damaged, no entry of a log; left out, as %d are", self.log, spoilt[0], len(spoilt)
            )
        return [entry for entry in entries if entry is not None]

    def read_predictions(self, part: str) -> Predictions:
        """The predictions of a part.

        Raises:
            FileNotFoundError: no predictions.parquet; ValueError: it is damaged.
        """
        if not self.predictions.is_file():
            raise FileNotFoundError(
                f"{self.predictions} is missing; `ordinalclip evaluate {self.path}` writes it again"
            )
        try:
            return Predictions.from_table(self._parquet(pq.read_table), part)
        except (KeyError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def read_model(self) -> OrdinalModel:
        """The chosen step's model, deployed, on the CPU.

        Raises:
            FileNotFoundError: it is not there (any more).
        """
        if not self.model.is_dir():
            raise FileNotFoundError(
                f"{self.model} is missing (of the trials of a search only the best keeps its model); `ordinalclip "
                f"train {self.config} output_dir=FOLDER` trains it again"
            )
        return OrdinalModel.from_pretrained(self.model)

    def read_prompts(self) -> dict[str, torch.Tensor]:
        """The learned context and rank embeddings of the chosen step, see `Head.learned_prompts`.

        Raises:
            FileNotFoundError: the method learns none, or the run is of a version that did not keep them.
        """
        if not self.prompts.is_file():
            raise FileNotFoundError(
                f"{self.prompts} is missing: its method learns no prompts, or an older version ran it"
            )
        return read_safetensors(self.prompts)[0]

    # ---- writing

    def write_config(self, config: RunConfig) -> None:
        """config.yaml."""
        write_text(self.config, config.to_yaml())

    def write_provenance(self, content: dict[str, Any]) -> None:
        """provenance.json."""
        write_json(self.provenance, content)

    def write_model(self, model: OrdinalModel, target: Path | None = None) -> None:
        """A model folder, deployed: model/, or another."""
        with whole(target or self.model) as aside:
            model.save_pretrained(aside)

    def write_prompts(self, prompts: dict[str, torch.Tensor]) -> None:
        """prompts.safetensors, of a few tensors by name."""
        write_safetensors(self.prompts, prompts)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """metrics.json, whole or not at all."""
        write_json(self.metrics, metrics)

    def add_log(self, entries: list[dict[str, Any]]) -> None:
        """Append entries to log.jsonl.

        Raises:
            OSError: it could not be written, e.g. for want of space.
        """
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as error:
            raise unwritten(self.log, error) from error

    def cut_log(self, step: int) -> int:
        """Drop the entries of later steps, so that a resumed run writes each once; returns how many are left."""
        left = [entry for entry in self.read_log() if entry["step"] <= step]
        write_text(self.log, "".join(json.dumps(entry) + "\n" for entry in left))
        return len(left)

    def write_predictions(self, predictions: dict[str, Predictions]) -> None:
        """Keep the predictions of some parts; those of the other parts in the file stay."""
        tables = [each.table(part) for part, each in predictions.items()]
        if self.predictions.is_file():
            earlier = self._parquet(pq.read_table)
            tables.insert(0, earlier.filter(pc.invert(pc.is_in(earlier["part"], pa.array(list(predictions))))))
        with whole(self.predictions) as aside, aside.open("wb") as file:
            pq.write_table(pa.concat_tables(tables), file)

    def _parquet(self, read: Callable[[Any], Any]) -> Any:
        try:
            with self.predictions.open("rb") as file:  # pyarrow takes no path that is not UTF-8
                return read(file)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        reason = str(error).partition("\n")[0]
        return ValueError(
            f"{self.predictions}: damaged ({reason}); once it is deleted, `ordinalclip evaluate {self.path}` writes it "
            "again"
        )


def find_model(name: str) -> tuple[str, RunFolder | None]:
    """What a model is called by: a run folder, the model folder in it or elsewhere, or a name on the hub.

    Returns:
        the model's folder or name, and the finished run that it is of, where there is one.
    """
    for run in (RunFolder(name), RunFolder(Path(name).parent)):
        if run.is_finished and run.model.is_dir() and Path(name).resolve() in (run.path.resolve(), run.model.resolve()):
            return str(run.model), run
    inside = Path(name) / "model"
    return (str(inside) if (inside / "config.json").is_file() else name), None


def changed_keys(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations are different experiments, with both values.

    Keys of execution are left out, and those of evaluation, which can be done again; but not those of `KEPT`.

    Args:
        saved, now: `RunConfig.model_dump(mode="json")`.
    """
    before, after = flat_keys(saved), flat_keys(now)
    return {
        key: (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key)
        and key not in EXECUTION
        and (key in KEPT or not key.startswith("evaluation."))
    }


def described(changed: dict[str, tuple[Any, Any]]) -> str:
    """What `changed_keys` gives, in words."""
    return "; ".join(f"{key} was {before!r}, is {after!r}" for key, (before, after) in sorted(changed.items()))


def changed_data(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In which part two sets of fingerprints (`provenance.fingerprints`) differ, in words; "" where they do not."""
    for name in dict.fromkeys([*before, *now]):
        was, is_now = before.get(name), now.get(name)
        if was is not None and is_now is not None and all(was[key] == is_now[key] for key in was.keys() & is_now):
            continue
        if was is None or is_now is None:
            return f"the {name} part was {'not ' * (was is None)}there, now it is{' not' * (is_now is None)}"
        keys = [key for key in was if key not in HASHES and was[key] != is_now.get(key)]
        hashed = "names or labels differ" if was.get("sha256") != is_now["sha256"] else "pictures differ"
        what = "; ".join(f"{key} was {was[key]!r}, is {is_now[key]!r}" for key in keys) or hashed
        return f"the {name} part has changed: {what}"
    return ""


def local(text: str | Path) -> str:
    """A path, or a backbone's spec with one, as cards and reports show it: on this machine only its last two parts.

    >>> local("/home/ann/study/runs/mine"), local("runs/mine"), local("../data/labels.csv"), local("hub/name")
    ('runs/mine', 'runs/mine', 'data/labels.csv', 'hub/name')
    >>> local("open_clip:/home/ann/clip"), local("open_clip:RN50//home/ann/w/rn50.pt"), local("timm:vgg16/pretrained")
    ('open_clip:ann/clip', 'open_clip:RN50/w/rn50.pt', 'timm:vgg16/pretrained')
    >>> local("~5 kg"), local("/m"), local("km//h"), local("hint: look at the hands")  # words stay
    ('~5 kg', '/m', 'km//h', 'hint: look at the hands')
    """
    found = SPEC.fullmatch(str(text))
    assert found is not None  # the pattern takes anything
    spec, path = found[1] or "", Path(found[2])
    here = path.is_absolute() or ".." in path.parts or found[2].startswith("~/")
    return spec + Path(*path.parts[-2:]).as_posix() if here and len(path.parts) > 2 else str(text)


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _when(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, no JSON object")
    return content


def _is_scored(metrics: Any) -> bool:
    return isinstance(metrics, dict) and "mae" in metrics and isinstance(metrics.get("num"), int)


def _log_entry(line: bytes) -> dict[str, Any] | None:
    """A line of log.jsonl; None for one that is no entry."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
