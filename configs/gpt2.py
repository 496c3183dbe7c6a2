"""GPT-2 ("Language Models are Unsupervised Multitask Learners", table 2): small, medium, large, xl.

Shape and initialisation are the paper's; it gives no training settings, so those are nanoGPT's reproduction of small:
half a million tokens a step.

python -m gptjax.train --config=configs/gpt2.py:medium --config.data.source=text --config.data.path='text/*.txt'
"""

from ml_collections import ConfigDict

from configs import base
from gptjax.config import pick

SIZES = {
    "small": dict(layers=12, heads=12, width=768),  # 124,439,808 parameters
    "medium": dict(layers=24, heads=16, width=1024),  # 354,823,168
    "large": dict(layers=36, heads=20, width=1280),  # 774,030,080
    "xl": dict(layers=48, heads=25, width=1600),  # 1,557,611,200
}


def get_config(size: str = "small") -> ConfigDict:
    config = base.get_config()
    config.model.update(context=1024, vocabulary=50_257, use_bias=True, **pick(SIZES, size, "configs/gpt2.py"))
    config.data.update(tokenizer="gpt2", batch_size=512)
    config.optimizer.learning_rate = 6e-4
    config.schedule.warmup_steps = 2000
    config.train.steps = 600_000
    config.eval.update(every_steps=1000, batches=20)
    config.checkpoint.every_steps = 1000
    return config
