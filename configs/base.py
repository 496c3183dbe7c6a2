"""Base recipe: a small GPT-2 trained on the source of Python's standard library, in minutes on two CPU cores.

docs/configuration.md has every key of a run, with its default, meaning and unit. Other recipes start from this one and
set only what differs. Any key can be set on the command line: `--config.model.layers=6`.
"""

from ml_collections import ConfigDict

from gptjax.runs import config as runs


def get_config() -> ConfigDict:
    return runs.defaults()
