"""Characters of one text, in nanoGPT's shape and schedule for a CPU: 4 layers of width 128, 2,000 short steps.

The peak learning rate is three times nanoGPT's: see experiments/shakespeare.

python -m gptjax.train --config=configs/shakespeare.py --config.data.path=input.txt
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(layers=4, heads=4, width=128, context=64)
    config.data.update(source="text", tokenizer="chars", held_out=0.1, batch_size=12)
    config.optimizer.update(learning_rate=3e-3, beta2=0.99)
    config.schedule.update(warmup_steps=100, final_fraction=0.1)
    config.train.steps = 2000
    config.eval.update(every_steps=250, batches=20)
    config.checkpoint.every_steps = 500
    config.sample.update(prompt="ROMEO:", max_tokens=500, top_k=0)
    return config
