"""Options of `config.finetune`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import is_weighted_path
from gptjax.config.options import option, section
from gptjax.finetune.methods import METHODS
from gptjax.finetune.quantization import QUANTIZERS


@dataclass(frozen=True)
class AdaloraOptions:
    """AdaLoRA (method=adalora, arXiv 2303.10512)."""

    first_rank: int = option(12, "initial rank of each matrix")
    warmup_steps: int = option(100, "steps before the first ranks are pruned")
    final_steps: int = option(200, "steps at the end with fixed ranks")
    every_steps: int = option(10, "steps between rank allocations")
    orthogonality: float = option(0.1, "weight of the penalty that keeps P and Q orthogonal")
    beta1: float = option(0.85, "decay of the running mean of sensitivities, per step", below=1)
    beta2: float = option(0.85, "decay of the running mean of their uncertainties, per step", below=1)


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tuning of the model in init_from."""

    method: str = option("full", "what trains, and what is added", choices=METHODS)
    rule: str = option("", "rule: regular expression of the paths of trainable parameters")
    also: str = option("", "regular expression of the paths of parameters trained in addition, with any method")
    top_layers: int = option(2, "top: number of last blocks to train, together with everything after them")
    targets: str = option(".", "lora, dora, adalora: regular expression of the modules to adapt")
    rank: int = option(8, "lora, dora: rank; adalora: mean rank at the end of training", above=0)
    alpha: float = option(16.0, "lora, dora, adalora: the update is scaled by alpha / rank", above=0)
    rank_stabilised: bool = option(False, "scale by alpha / sqrt(rank) instead (rsLoRA)")
    dropout: float = option(0.0, "lora, dora, adalora: dropout rate of the input of the update", below=1)
    b_rate: float = option(1.0, "lora, dora: learning rate of B relative to A (LoRA+)", above=0)
    adalora: AdaloraOptions = section(AdaloraOptions)
    bottleneck: int = option(16, "adapter: bottleneck size", above=0)
    parallel: bool = option(False, "adapter: in parallel with a sublayer instead of after it")
    quantise: str = option("none", "storage of the frozen matrices of the base", choices=QUANTIZERS)
    length: int = option(16, "prefix: number of key/value pairs per layer; prompt: number of embeddings", above=0)
    layer_decay: float = option(
        1.0,
        "layer-wise learning rate decay: factor from a block to the one before it; embeddings get the least",
        above=0,
    )
    rates: tuple[Any, ...] = option(
        (), "((regular expression of paths, factor of the learning rate), ...); the first match applies"
    )
    unfreeze_every: int = option(
        0, "steps between unfreezing one more block, from the last one down; 0: all from the start"
    )
    l2_to_start: float = option(0.0, "weight of half the squared distance to the initial parameters, added to the loss")
    ewc: float = option(
        0.0, "elastic weight consolidation: as l2_to_start, weighted by the Fisher information on the text of init_from"
    )
    fisher_rows: int = option(256, "ewc: rows of that text used to estimate the Fisher information", above=0)


def problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of `config.finetune`."""
    options = config.finetune
    if options.method != "full" and not config.init_from:
        yield f"finetune.method={options.method} fine-tunes the model of another run; give --config.init_from=RUN"
    if options.ewc and not config.init_from:
        yield f"finetune.ewc={options.ewc} uses the text of another run; give --config.init_from=RUN"
    if options.method == "rule" and not options.rule:
        yield "finetune.method=rule needs a regular expression of paths; give --config.finetune.rule"
    if options.quantise != "none" and options.method in ("full", "rule", "top"):
        yield (
            f"finetune.quantise={options.quantise} is for methods that add to a frozen base, such as lora; "
            f"with finetune.method={options.method} leave it out"
        )
    if any(not is_weighted_path(one) or type(one[1]) not in (int, float) or one[1] < 0 for one in options.rates):
        yield f"finetune.rates is {options.rates}; it must be like (('head', 1.0), ('block_0/', 0.1))"
    yield from pattern_problems(options)
    if options.method == "adalora" and options.adalora.first_rank < options.rank:
        yield f"finetune.adalora.first_rank={options.adalora.first_rank} is less than finetune.rank={options.rank}"


def pattern_problems(options: ConfigDict) -> Iterator[str]:
    """Yields problems of the regular expressions in `config.finetune`."""
    patterns = [(key, options[key]) for key in ("rule", "also", "targets")]
    for key, pattern in [*patterns, *(("rates", one[0]) for one in options.rates if is_weighted_path(one))]:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"finetune.{key} has {pattern!r}, which is not a regular expression: {error}"
