"""Runs a sweep from its search to its results: trains every trial that is not finished, and saves each result."""

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
    """Location of an Optuna study.

    Attributes:
      place: URL of a database, or a journal file; "": a file in the sweep's directory.
      name: of the study.
    """

    place: str
    name: str


def run(
    search: Search, folder: Path, backend: Backend = SEQUENTIAL, on_result: OnResult = lambda result: None
) -> list[Result]:
    """Trains all trials of a grid, of random draws or of files; finished trials are not repeated.

    Args:
      search: what to sweep, with any method but Optuna.
      folder: of the sweep: absent, empty or of the same sweep.
      backend: trains the trials.
      on_result: called with each result.

    Returns:
      The result of each trial.

    Raises:
      UserError: user errors.
      Interrupted: by a signal; the current trial is saved.
    """
    all_trials = trials.list_trials(search, folder)
    backend.check(all_trials)
    folders.open_or_create(folder, search)
    with folders.lock_sweep(folder), show_progress(len(all_trials)) as watch:
        by_name = {trial.name: outcomes.load_result(folder, trial.name, trial.values) for trial in all_trials}
        watch.add_finished([one for one in by_name.values() if one])
        for result in backend.train([trial for trial in all_trials if not by_name[trial.name]], watch):
            outcomes.save_result(folder, result)
            by_name[result.name] = result
            watch.end(result)
            on_result(result)
    return [one for one in by_name.values() if one]


def run_study(
    search: Search, folder: Path, storage: Storage, on_result: OnResult = lambda result: None
) -> list[Result]:
    """Trains trials that Optuna chooses until the study has `search.n_trials` of them; otherwise like `run`.

    Returns:
      The results of the study's trials, wherever they were trained.
    """
    if not search.space:
        raise ConfigError("--optuna needs --set KEY=log:LOW..HIGH (lin:, int:) or lists; give one")
    studies.library()
    search.config()
    content = folders.open_or_create(folder, search)
    study = studies.open_study(search, folder, content["home"], *storage)
    with show_progress(search.n_trials) as watch:
        watch.add_finished(studies.results(study))
        studies.run(study, watch, on_result)
    if others := studies.unfinished_elsewhere(study):
        console.say(
            f"{others} trials of the study are still running elsewhere; repeat the command later to report them too"
        )
    return studies.results(study)
