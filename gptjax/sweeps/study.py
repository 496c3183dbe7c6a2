"""Sweeps by an Optuna study: TPE (Bergstra et al. 2011) suggests values, ASHA (arXiv 1810.05934) stops early.

Workers share only the storage of the study, a journal file or a database; Optuna numbers trials so that no two workers
get the same one. Each worker trains ordinary runs in the directory of its own sweep.
"""

import math
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.errors import ConfigError
from gptjax.core.files import file_lock
from gptjax.sweeps import folder as folders
from gptjax.sweeps import training, trials
from gptjax.sweeps.results import DONE, IMPOSSIBLE, PRUNED, Result
from gptjax.sweeps.space import Range, Space, Values
from gptjax.sweeps.trials import Search, Trial
from gptjax.sweeps.watch import Watch

JOURNAL = "study.journal"
COPIES = 100  # consecutive duplicate trials after which the space counts as exhausted
REDUCTION = 3  # of ASHA: one in this many continues after evaluations 1, 3, 9, ...
LOST_AFTER = timedelta(minutes=1)  # a trial without a home by then has lost its worker


class Study(NamedTuple):
    """An Optuna study with the sweep that contributes to it.

    Attributes:
      optuna: the optuna.Study.
      search, folder: the sweep.
      home: identifies this directory among those that share the study.
    """

    optuna: Any
    search: Search
    folder: Path
    home: str


def library() -> Any:
    """Imports Optuna.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--optuna=N needs optuna: pip install 'gptjax[sweeps]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_study(search: Search, folder: Path, home: str, storage: str, name: str) -> Study:
    """Opens the study of a sweep, or creates it.

    Args:
      search, folder, home: see Study.
      storage: URL of a database, a journal file, or "" for a journal in the sweep's directory.
      name: of the study in its storage.

    Raises:
      ConfigError: Optuna is not installed, the storage cannot be opened, or the study belongs to another sweep.
    """
    optuna = library()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(storage).expanduser() if storage else folder / JOURNAL
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
    try:
        backend = storage if "://" in storage else JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(study_name=name, storage=backend, pruner=pruner, load_if_exists=True)
    except Exception as error:  # any error of the database driver; its message may contain a password
        place = "the database" if "://" in storage else path
        raise ConfigError(f"--storage: {place} cannot be opened: {type(error).__name__}") from error
    if "sweep" not in study.user_attrs:
        study.set_user_attr("sweep", folders.identity(search))
    folders.check_same(study.user_attrs["sweep"], search, f"the study {name}")
    return Study(study, search, folder, home)


def space_size(space: Space) -> float:
    """Number of distinct trials in a space."""
    counts = [
        len(axis) if not isinstance(axis, Range) else axis.high - axis.low + 1 if axis.is_integer else math.inf
        for axis in space.values()
    ]
    return math.prod(counts)


def run(study: Study, watch: Watch, on_result: Callable[[Result], None]) -> None:
    """Trains trials until the study has `search.n_trials`, finished or claimed by other workers."""
    config = study.search.config()
    for optuna_trial in claim_trials(study):
        trial = trials.make_trial(config, suggest_values(optuna_trial, study), study.folder)
        watch.begin(trial)
        result = train_trial(optuna_trial, trial, watch)
        report_result(study, optuna_trial, result)
        watch.end(result)
        on_result(result)


def claim_trials(study: Study) -> Iterator[Any]:
    """Yields Optuna's trials for this process, each claimed until the next is requested.

    First come those that a process in this directory left unfinished, then new ones. A claim is a lock on a file, which
    ends with its process.
    """
    optuna = library()
    for number, trial_id in unfinished_here(study):
        with file_lock(claim_file(study, number)) as acquired:
            # It may have been finished before the claim.
            if acquired and (number, trial_id) in unfinished_here(study):
                yield optuna.trial.Trial(study.optuna, trial_id)
    copies = 0
    while copies < COPIES and len(active_trials(study)) < min(study.search.n_trials, space_size(study.search.space)):
        optuna_trial = study.optuna.ask()
        with file_lock(claim_file(study, optuna_trial.number)):
            optuna_trial.set_user_attr("home", study.home)
            suggest_values(optuna_trial, study)
            if reason := skip_reason(study, optuna_trial):
                optuna_trial.set_user_attr("left_out", reason)
                study.optuna.tell(optuna_trial, state=optuna.trial.TrialState.FAIL)
                copies += 1
                continue
            copies = 0
            yield optuna_trial


def claim_file(study: Study, number: int) -> Path:
    """File whose lock marks a trial as claimed by a process."""
    path = study.folder / "claims" / str(number)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


def unfinished_here(study: Study) -> list[tuple[int, int]]:
    """Lists (number, id) of the trials that started in this directory and are not finished."""
    states = library().trial.TrialState
    running = study.optuna.get_trials(deepcopy=False, states=(states.RUNNING,))
    return [(one.number, one._trial_id) for one in running if one.user_attrs.get("home") == study.home]


def active_trials(study: Study) -> list[Any]:
    """Lists the trials of the study, finished or not, except those that were left out or lost."""
    active = []
    for one in study.optuna.get_trials(deepcopy=False):
        lost = "home" not in one.user_attrs and datetime.now() - one.datetime_start > LOST_AFTER
        if not lost and "left_out" not in one.user_attrs:
            active.append(one)
    return active


def skip_reason(study: Study, optuna_trial: Any) -> str:
    """Returns the reason why a new trial is not needed, or ""."""
    before = [one for one in active_trials(study) if one.number < optuna_trial.number]
    if len(before) >= study.search.n_trials:
        return "other workers have started enough trials at the same time"
    same = [one.number for one in before if one.params == optuna_trial.params]
    return f"the same values as trial {same[0]}" if same else ""


def suggest_values(optuna_trial: Any, study: Study) -> Values:
    """Suggests the values of a trial.

    The sampler is seeded by the trial's number, so that an interrupted sweep draws the same values when it resumes, and
    workers draw different ones.
    """
    seed = np.random.SeedSequence([study.search.seed, optuna_trial.number]).generate_state(1)[0]
    study.optuna.sampler = library().samplers.TPESampler(seed=int(seed))
    return {key: _suggest(optuna_trial, key, axis) for key, axis in study.search.space.items()}


def _suggest(optuna_trial: Any, key: str, axis: tuple[Any, ...] | Range) -> Any:
    if not isinstance(axis, Range):
        plain = all(isinstance(value, bool | int | float | str | None) for value in axis)
        names = list(axis) if plain else [str(value) for value in axis]  # Optuna does not support tuples
        return axis[names.index(optuna_trial.suggest_categorical(key, names))]
    log = axis.kind == "log"
    if axis.is_integer:
        return type(axis.low)(optuna_trial.suggest_int(key, round(axis.low), round(axis.high), log=log))
    return optuna_trial.suggest_float(key, axis.low, axis.high, log=log)


def train_trial(optuna_trial: Any, trial: Trial, watch: Watch) -> Result:
    """Trains a trial and reports its held-out losses to the study, which may stop it."""
    if why := training.problem(trial.config):
        return Result(trial.name, trial.values, IMPOSSIBLE, note=why)
    every, last = trial.config.eval.every_steps, trial.config.train.steps
    reported = set(optuna_trial.study.get_trials(deepcopy=False)[optuna_trial.number].intermediate_values)

    def report(line: training.Line) -> None:
        loss, number = line.get("val/loss"), -(-line["step"] // every)
        if loss is None or number in reported:  # a trial that resumes from a checkpoint evaluates again
            return
        reported.add(number)
        optuna_trial.report(loss, number)
        if line["step"] < last and optuna_trial.should_prune():
            raise training.Pruned

    return training.train(trial, watch, report)


def report_result(study: Study, optuna_trial: Any, result: Result) -> None:
    """Reports a result to the study; a trial that diverged or is impossible has an infinite loss."""
    optuna_trial.set_user_attr("result", result._asdict())
    if result.status == PRUNED:
        study.optuna.tell(optuna_trial, state=library().trial.TrialState.PRUNED)
    else:
        study.optuna.tell(optuna_trial, result.loss if result.status == DONE else math.inf)


def results(study: Study) -> list[Result]:
    """Results of all finished trials of the study, wherever they were trained, in order."""
    finished = [one for one in study.optuna.get_trials(deepcopy=False) if one.state.is_finished()]
    stored = [Result(**one.user_attrs["result"]) for one in finished if "result" in one.user_attrs]
    return [one._replace(values={key: _plain(value) for key, value in one.values.items()}) for one in stored]


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def unfinished_elsewhere(study: Study) -> int:
    """Number of trials that other workers have started and not finished."""
    return sum(not one.state.is_finished() for one in active_trials(study))
