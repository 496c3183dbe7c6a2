"""Options of `config.objective`."""

from dataclasses import dataclass

from gptjax.config.options import option


@dataclass(frozen=True)
class ObjectiveOptions:
    """`config.objective`: options of the objectives named in train.objective."""

    label_smoothing: float = option(0.0, "probability mass spread evenly over all tokens or labels")
    z_loss: float = option(0.0, "weight of log(sum(exp(logits)))^2 per predicted token; arXiv 2204.02311: 1e-4")
    mask_rate: float = option(0.15, "masked, denoising: fraction of tokens masked; BART: 0.3")
    masking: str = option("token", "masked: unit of masking: token, word or span (1 to 10 words)")
    corruption: str = option(
        "spans",
        "denoising: spans (T5, one sentinel per span) or infilling (BART, one mask per span)",
    )
    mean_span: float = option(3.0, "denoising: mean length of a masked span in tokens")
    permute_sentences: bool = option(False, "infilling: shuffle the sentences of the source")
    fim_rate: float = option(0.5, "fim: fraction of documents rearranged for fill-in-the-middle")
    fim_spm: float = option(0.5, "fim: fraction of these in SPM order (suffix first); the rest is in PSM order")
    temperature: float = option(0.05, "contrastive: temperature of the cosine similarities")
    teacher: str = option("", "distillation: run directory of the teacher")
    teacher_temperature: float = option(2.0, "distillation: temperature of both models' logits")
    teacher_share: float = option(0.5, "distillation: weight of the teacher's loss; the rest is the data's")
    adversarial: str = option("none", "adversarial training of the embeddings: none, fgm (one step) or pgd")
    epsilon: float = option(1.0, "fgm, pgd: norm of a row's perturbation")
    adversarial_steps: int = option(
        3,
        "pgd: number of gradient ascent steps, each of size 2.5 epsilon / steps",
        most=1000,
    )
