"""GPT-1 ("Improving Language Understanding by Generative Pre-Training", section 4.1): 117M parameters, post-norm.

python -m gptjax.train --config=configs/gpt1.py --config.data.source=text --config.data.path='books/*.txt'
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(layers=12, heads=12, width=768, context=512, vocabulary=40_478)
    config.model.update(norm_position="post", residual_init="plain", use_bias=True, dropout=0.1)
    config.data.update(tokenizer="bpe:40478", batch_size=64)
    config.optimizer.update(learning_rate=2.5e-4, weight_decay=0.01, beta2=0.999)
    config.schedule.update(warmup_steps=2000, final_fraction=0.0)
    config.train.steps = 100_000  # the paper: 100 epochs of its books
    config.eval.update(every_steps=1000, batches=20)
    config.checkpoint.every_steps = 1000
    return config
