"""A sweep from its search to its results: every trial that is not finished is trained, and what is known is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gptjax.config.errors import ConfigError
from gptjax.core import console
from gptjax.sweeps import folder as folders
from gptjax.sweeps import results as outcomes
from gptjax.sweeps import study as studies
from gptjax.sweeps import trials
from gptjax.sweeps.results import Result
from gptjax.sweeps.training import SEQUENTIAL, Backend
from gptjax.sweeps.trials import Search
from gptjax.sweeps.watch import show_progress

OnResult = Callable[[Result], None]


class Storage(NamedTuple):
    """Where an Optuna study is kept.

    Attributes:
      place: a database's URL or a journal file; "": a file in the sweep's directory.
      name: of the study.
    """

    place: str
    name: str


def run(
    search: Search, folder: Path, backend: Backend = SEQUENTIAL, on_result: OnResult = lambda result: None
) -> list[Result]:
    """Trains all trials of a grid, of random draws or of files; those that are finished are not repeated.

    Args:
      search: what is swept, and how; not by Optuna.
      folder: the sweep's, absent, empty or this sweep's own.
      way: how trials are trained.
      on_result: gets each result as it comes.

    Returns:
      What became of each trial.

    Raises:
      UserError: what the user can mend.
      Interrupted: by a signal; the trial in hand is saved.
    """
    chosen = trials.list_trials(search, folder)
    backend.check(chosen)
    folders.open_or_create(folder, search)
    with folders.lock_sweep(folder), show_progress(len(chosen)) as watch:
        found = {trial.name: outcomes.load_result(folder, trial.name, trial.values) for trial in chosen}
        watch.known([one for one in found.values() if one])
        for result in backend.train([trial for trial in chosen if not found[trial.name]], watch):
            outcomes.save_result(folder, result)
            found[result.name] = result
            watch.end(result)
            on_result(result)
    return [one for one in found.values() if one]


def run_study(
    search: Search, folder: Path, storage: Storage, on_result: OnResult = lambda result: None
) -> list[Result]:
    """Trains trials that Optuna chooses until the study has `search.wanted` of them; as `run` otherwise.

    Returns:
      What became of the study's trials, wherever they were trained.
    """
    if not search.space:
        raise ConfigError("--optuna needs --set KEY=log:LOW..HIGH (lin:, int:) or lists; give one")
    studies.library()
    search.config()
    own = folders.open_or_create(folder, search)
    study = studies.open_study(search, folder, own["home"], *storage)
    with show_progress(search.n_trials) as watch:
        watch.known(studies.results(study))
        studies.run(study, watch, on_result)
    if others := studies.unfinished_elsewhere(study):
        console.say(f"{others} trials of the study are unfinished elsewhere; the same command then reports them too")
    return studies.results(study)
