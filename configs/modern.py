"""Architecture changes from the small-model speed-runs of modded-nanogpt (github.com/KellerJordan/modded-nanogpt).

Text and budget are the default run's. Each line of the model can be switched off on the command line, as in
--config.model.qk_norm=none.
--config.model.mlp=experts makes it a mixture of experts. Sizes: tiny (the default run's shape) and small (GPT-2's).

python -m gptjax.train --config=configs/modern.py
"""

from ml_collections import ConfigDict

from configs import base
from gptjax.config import pick

SIZES = {
    "tiny": dict(layers=4, heads=4, width=128, context=128, windows=(64, 64, 64, 0)),
    "small": dict(layers=12, heads=6, width=768, context=1024, windows=(512, 512, 512, 0)),
}


def get_config(size: str = "tiny") -> ConfigDict:
    config = base.get_config()
    model = config.model
    model.update(**pick(SIZES, size, "configs/modern.py"))
    model.positions = "rotary"
    model.norm = "rmsnorm"
    model.qk_norm = "head"
    model.value_residual = True
    model.activation = "relu2"
    model.residual_init = "zero"
    model.tied_head = False
    model.logit_softcap = 15.0
    if size.lower() == "small":
        config.data.update(tokenizer="gpt2", batch_size=512)
        config.optimizer.learning_rate = 1e-3
        config.schedule.warmup_steps = 500
        config.train.steps = 20_000
        config.eval.every_steps = config.checkpoint.every_steps = 1000
    return config
