"""Optuna's side of a search: what draws values, what prunes, and the journal that both read.

The journal is a file that grows by lines, so that processes on several machines write to it through a shared folder.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ordinalclip.files import delete
from ordinalclip.search import Choice, Range, Search, drawn
from ordinalclip.training.interruption import Pruned, Watch

try:
    import optuna
except ImportError as error:
    raise ImportError(f"a search needs Optuna ({error}): pip install 'ordinalclip[tune]'") from error

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

OPTUNA = optuna.__version__
NAME = "ordinalclip"
STARTUP = 10  # trials that cover the search evenly, before there is anything to learn from
LONG_HELD = 2.0  # s, where writing a line takes milliseconds

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="The reported value is ignored because this `step`")  # of a resumed trial


class Study:
    """The trials of a search in their journal.

    Args:
        journal: its file, which is made where there is none.
        pruner: median, hyperband or none.
        seed: of what is drawn.
    """

    def __init__(self, journal: Path, pruner: str, seed: int = 0):
        self.seed = seed
        self.storage = optuna.storages.JournalStorage(
            JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
        )
        self.study = optuna.create_study(
            study_name=NAME,
            storage=self.storage,
            sampler=optuna.samplers.RandomSampler(),
            pruner=_pruner(pruner),
            load_if_exists=True,
        )

    def trials(self, search: Search) -> list[FrozenTrial]:
        """Those of which all values were drawn: whoever is killed while drawing leaves half of one."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.params.keys() == search.keys()]

    def draw(self, search: Search) -> FrozenTrial:
        """The next trial, which is a function of the seed and of the trials so far: what draws has no memory."""
        begun = len(self.trials(search))
        waiting = self.study.get_trials(deepcopy=False, states=[TrialState.WAITING])  # of who was killed just here
        if begun < STARTUP and not waiting:
            setting = drawn(search, begun + 1, self.seed)[begun]
            self.study.enqueue_trial({key: search[key].value(text) for key, text in setting.items()})
        seed = np.random.SeedSequence([self.seed, begun]).generate_state(1).item()
        self.study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=STARTUP, seed=seed, multivariate=True, constant_liar=True
        )
        number = self.study.ask({key: _distribution(each) for key, each in search.items()}).number
        return self.study.get_trials(deepcopy=False)[number]

    def watch(self, number: int) -> Watch:
        """Takes the validations of a trial, and prunes it."""
        trial_id = self.study.get_trials(deepcopy=False)[number]._trial_id
        trial = optuna.trial.Trial(self.study, trial_id)  # as Optuna has it where a trial is run by another process

        def tell(validation: int, mae: float) -> None:
            trial.report(mae, validation)
            if trial.should_prune():
                raise Pruned(f"pruned after validation {validation}: MAE {mae:.4g}")

        return tell

    def finish(self, number: int, value: float) -> None:
        """A trial came to its end with a validation MAE, infinite where it diverged."""
        self.study.tell(number, value)

    def prune(self, number: int) -> None:
        self.study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, why: str) -> None:
        """A trial broke off."""
        trial_id = self.study.get_trials(deepcopy=False)[number]._trial_id
        self.storage.set_trial_user_attr(trial_id, "error", why)
        self.study.tell(number, state=TrialState.FAIL)

    def importances(self) -> Mapping[str, float]:
        """Shares of what separates good trials from bad ones, by key (PED-ANOVA; Watanabe et al., 2023).

        Empty where the trials that came to their end are too few to say, or all alike.
        """
        done = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if len(done) < STARTUP or len({trial.value for trial in done}) < 2:
            return {}
        return optuna.importance.get_param_importances(self.study)


def texts(trial: FrozenTrial) -> dict[str, str]:
    """The values of a trial as they are written in a configuration."""
    return {key: value if isinstance(value, str) else repr(value) for key, value in trial.params.items()}


def repair(journal: Path) -> None:
    """After a kill: the lock of who wrote goes, as does a line that was not written to its end."""
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        if time.time() - lock.lstat().st_mtime > LONG_HELD:  # or a worker that has not noticed yet is writing
            delete(lock)
    content = journal.read_bytes() if journal.is_file() else b"\n"
    if not content.endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)


def _pruner(name: str) -> optuna.pruners.BasePruner:
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner()
    if name == "median":  # from the second validation on: the first shows little but how fast it starts
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    return optuna.pruners.NopPruner()


def _distribution(each: Range | Choice) -> BaseDistribution:
    if isinstance(each, Choice):
        return CategoricalDistribution(each.choices)
    if each.is_whole:
        return IntDistribution(int(each.low), int(each.high), log=each.log, step=int(each.step or 1))
    return FloatDistribution(each.low, each.high, log=each.log, step=each.step)
