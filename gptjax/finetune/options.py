"""Options of `config.finetune`."""

from dataclasses import dataclass
from typing import Any

from gptjax.config.options import option, section


@dataclass(frozen=True)
class AdaloraOptions:
    """`config.finetune.adalora`: ."""

    first_rank: int = option(12, "initial rank of each matrix")
    warmup_steps: int = option(100, "steps before the first ranks are pruned")
    final_steps: int = option(200, "steps at the end with fixed ranks")
    every_steps: int = option(10, "steps between rank allocations")
    orthogonality: float = option(0.1, "weight of the penalty that keeps P and Q orthogonal")
    beta1: float = option(0.85, "decay of the running mean of sensitivities, per step", below=1)
    beta2: float = option(0.85, "decay of the running mean of their uncertainties, per step", below=1)


@dataclass(frozen=True)
class FinetuneOptions:
    """`config.finetune`: fine-tuning of the model in init_from."""

    method: str = option("full", "full, rule, top, bitfit, lora, dora, adalora, ia3, adapter, prefix or prompt")
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
    quantise: str = option("none", "storage of the frozen matrices of the base: none, int8 or nf4")
    length: int = option(16, "prefix: number of key/value pairs per layer; prompt: number of embeddings", above=0)
    layer_decay: float = option(
        1.0,
        "layer-wise learning rate decay: factor from a block to the one before it; embeddings get the least",
        above=0,
    )
    rates: tuple[Any, ...] = option(
        (),
        "((regular expression of paths, factor of the learning rate), ...); the first match applies",
    )
    unfreeze_every: int = option(
        0,
        "steps between unfreezing one more block, from the last one down; 0: all from the start",
    )
    l2_to_start: float = option(0.0, "weight of half the squared distance to the initial parameters, added to the loss")
    ewc: float = option(
        0.0,
        "elastic weight consolidation: as l2_to_start, weighted by the Fisher information on the text of "
        "init_from",
    )
    fisher_rows: int = option(256, "ewc: rows of that text used to estimate the Fisher information", above=0)
