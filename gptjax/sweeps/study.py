"""An Optuna study as a sweep's chooser: TPE (Bergstra et al. 2011) asks, ASHA (arXiv 1810.05934) stops early.

The study's storage, a journal file or a database, is all that its workers share; Optuna numbers trials so that no two
workers get the same one. What each worker trains is an ordinary run below its own sweep's directory.
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
COPIES = 100  # trials in a row that were tried before, after which there is nothing new to be found
REDUCTION = 3  # of ASHA: one in so many goes on past evaluations 1, 3, 9, ...
LOST_AFTER = timedelta(minutes=1)  # a trial that has no home by then has lost its worker while it was asked for


class Study(NamedTuple):
    """A study, and the sweep that works on it from here.

    Attributes:
      optuna: the study itself.
      search, folder: the sweep.
      home: tells this directory from others that share the study.
    """

    optuna: Any
    search: Search
    folder: Path
    home: str


def library() -> Any:
    """Optuna.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--optuna=N needs optuna: pip install 'gptjax[sweeps]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def opened(search: Search, folder: Path, home: str, storage: str, name: str) -> Study:
    """The study that a sweep works on, made where it is not there yet.

    Args:
      search, folder, home: see Study.
      storage: a database's URL, a journal file, or "" for one in the sweep's directory.
      name: of the study in its storage.

    Raises:
      ConfigError: Optuna is missing, the storage cannot be opened, or the study is another sweep's.
    """
    optuna = library()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(storage).expanduser() if storage else folder / JOURNAL
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
    try:
        where = storage if "://" in storage else JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(study_name=name, storage=where, pruner=pruner, load_if_exists=True)
    except Exception as error:  # whatever the database's driver raises; it may name a password, so no more is told
        what = "the database" if "://" in storage else path
        raise ConfigError(f"--storage: {what} cannot be opened: {type(error).__name__}") from error
    if "sweep" not in study.user_attrs:
        study.set_user_attr("sweep", folders.identity(search))
    folders.check_same(study.user_attrs["sweep"], search, f"the study {name}")
    return Study(study, search, folder, home)


def size(space: Space) -> float:
    """How many different trials there can be."""
    counts = [
        len(axis) if not isinstance(axis, Range) else axis.high - axis.low + 1 if axis.whole else math.inf
        for axis in space.values()
    ]
    return math.prod(counts)


def run(study: Study, watch: Watch, on_result: Callable[[Result], None]) -> None:
    """Trains trials until the study has as many as the search wants, finished or in the hands of other workers."""
    config = study.search.config()
    for asked in to_train(study):
        trial = trials.trial(config, suggested(asked, study), study.folder)
        watch.begin(trial)
        result = trained(asked, trial, watch)
        tell(study, asked, result)
        watch.end(result)
        on_result(result)


def to_train(study: Study) -> Iterator[Any]:
    """Optuna's trials for this process, each claimed until the next is asked for.

    First those that a process of this directory has left unfinished, then new ones. A claim is a lock on a file, which
    ends with its process.
    """
    optuna = library()
    for number, trial_id in unfinished_here(study):
        with file_lock(claim(study, number)) as ours:
            # It may have been finished before we had the claim.
            if ours and (number, trial_id) in unfinished_here(study):
                yield optuna.trial.Trial(study.optuna, trial_id)
    copies = 0
    while copies < COPIES and len(counted(study)) < min(study.search.wanted, size(study.search.space)):
        asked = study.optuna.ask()
        with file_lock(claim(study, asked.number)):
            asked.set_user_attr("home", study.home)
            suggested(asked, study)
            if reason := not_needed(study, asked):
                asked.set_user_attr("left_out", reason)
                study.optuna.tell(asked, state=optuna.trial.TrialState.FAIL)
                copies += 1
                continue
            copies = 0
            yield asked


def claim(study: Study, number: int) -> Path:
    """The file whose lock says that a process is at work on a trial."""
    path = study.folder / "claims" / str(number)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


def unfinished_here(study: Study) -> list[tuple[int, int]]:
    """Number and id of the trials that began in this directory and are not finished."""
    states = library().trial.TrialState
    running = study.optuna.get_trials(deepcopy=False, states=(states.RUNNING,))
    return [(one.number, one._trial_id) for one in running if one.user_attrs.get("home") == study.home]


def counted(study: Study) -> list[Any]:
    """The study's trials, finished or not, but for those that were left out or lost."""
    found = []
    for one in study.optuna.get_trials(deepcopy=False):
        lost = "home" not in one.user_attrs and datetime.now() - one.datetime_start > LOST_AFTER
        if not lost and "left_out" not in one.user_attrs:
            found.append(one)
    return found


def not_needed(study: Study, asked: Any) -> str:
    """Why a trial that was asked for is not to be trained; "" where it is."""
    before = [one for one in counted(study) if one.number < asked.number]
    if len(before) >= study.search.wanted:
        return "others were asked for at the same time, and are enough"
    same = [one.number for one in before if one.params == asked.params]
    return f"the same values as trial {same[0]}" if same else ""


def suggested(asked: Any, study: Study) -> Values:
    """The values of a trial.

    The sampler is seeded by the trial's number: a sweep that was cut short draws what it would have drawn, and two
    workers do not draw the same.
    """
    seed = np.random.SeedSequence([study.search.seed, asked.number]).generate_state(1)[0]
    study.optuna.sampler = library().samplers.TPESampler(seed=int(seed))
    return {key: _suggest(asked, key, axis) for key, axis in study.search.space.items()}


def _suggest(asked: Any, key: str, axis: tuple[Any, ...] | Range) -> Any:
    if not isinstance(axis, Range):
        plain = all(isinstance(value, bool | int | float | str | None) for value in axis)
        names = list(axis) if plain else [str(value) for value in axis]  # Optuna knows no tuples
        return axis[names.index(asked.suggest_categorical(key, names))]
    log = axis.kind == "log"
    if axis.whole:
        return type(axis.low)(asked.suggest_int(key, round(axis.low), round(axis.high), log=log))
    return asked.suggest_float(key, axis.low, axis.high, log=log)


def trained(asked: Any, trial: Trial, watch: Watch) -> Result:
    """What becomes of a trial whose held-out losses are reported to the study, which may stop it."""
    if why := training.problem(trial.config):
        return Result(trial.name, trial.values, IMPOSSIBLE, note=why)
    every, last = trial.config.eval.every_steps, trial.config.train.steps
    reported = set(asked.study.get_trials(deepcopy=False)[asked.number].intermediate_values)

    def report(line: training.Line) -> None:
        loss, number = line.get("val/loss"), -(-line["step"] // every)
        if loss is None or number in reported:  # a trial that goes on from a checkpoint evaluates again
            return
        reported.add(number)
        asked.report(loss, number)
        if line["step"] < last and asked.should_prune():
            raise training.Pruned

    return training.train(trial, watch, report)


def tell(study: Study, asked: Any, result: Result) -> None:
    """Tells the study what became of a trial; to the sampler what diverged or cannot be is as bad as can be."""
    asked.set_user_attr("result", result._asdict())
    if result.status == PRUNED:
        study.optuna.tell(asked, state=library().trial.TrialState.PRUNED)
    else:
        study.optuna.tell(asked, result.loss if result.status == DONE else math.inf)


def results(study: Study) -> list[Result]:
    """What became of the study's trials, wherever they were trained, in their order."""
    found = [one for one in study.optuna.get_trials(deepcopy=False) if one.state.is_finished()]
    told = [Result(**one.user_attrs["result"]) for one in found if "result" in one.user_attrs]
    return [one._replace(values={key: _plain(value) for key, value in one.values.items()}) for one in told]


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def elsewhere(study: Study) -> int:
    """How many trials other workers have begun and not finished."""
    return sum(not one.state.is_finished() for one in counted(study))
