"""Options of `config.objective`."""

from dataclasses import dataclass
from typing import ClassVar

from gptjax.config.options import option
from gptjax.objectives import OBJECTIVES
from gptjax.objectives.adversarial import ATTACKS
from gptjax.objectives.denoising import CORRUPTIONS
from gptjax.objectives.masked import MASKINGS


@dataclass(frozen=True)
class ObjectiveOptions:
    """Options of the objectives that train.objective names."""

    parts: ClassVar = OBJECTIVES

    label_smoothing: float = option(0.0, "probability mass spread evenly over all tokens or labels")
    z_loss: float = option(0.0, "weight of log(sum(exp(logits)))^2 per predicted token; arXiv 2204.02311: 1e-4")
    mask_rate: float = option(0.15, "masked, denoising: fraction of tokens masked; BART: 0.3")
    masking: str = option("token", "masked: unit of masking; span: 1 to 10 words", choices=MASKINGS)
    corruption: str = option(
        "spans", "denoising; spans: T5, one sentinel a span; infilling: BART, one mask a span", choices=CORRUPTIONS
    )
    mean_span: float = option(3.0, "denoising: mean length of a masked span in tokens")
    permute_sentences: bool = option(False, "infilling: shuffle the sentences of the source")
    fim_rate: float = option(0.5, "fim: fraction of documents rearranged for fill-in-the-middle")
    fim_spm: float = option(0.5, "fim: fraction of these in SPM order (suffix first); the rest is in PSM order")
    temperature: float = option(0.05, "contrastive: temperature of the cosine similarities")
    teacher: str = option("", "distillation: run directory of the teacher")
    teacher_temperature: float = option(2.0, "distillation: temperature of both models' logits")
    teacher_share: float = option(0.5, "distillation: weight of the teacher's loss; the rest is the data's")
    adversarial: str = option("none", "adversarial training of the embeddings; fgm: one step", choices=ATTACKS)
    epsilon: float = option(1.0, "fgm, pgd: norm of a row's perturbation")
    adversarial_steps: int = option(
        3, "pgd: number of gradient ascent steps, each of size 2.5 epsilon / steps", most=1000
    )
