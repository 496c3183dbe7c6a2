"""Fastest recipe on two CPU cores to the final loss of nanoGPT's CPU recipe on characters of Shakespeare (1.898).

Few steps, few programs to compile and no evaluation during training: see experiments/speedrun.

python -m gptjax.train --config=configs/speedrun.py --config.data.path=input.txt
"""

from ml_collections import ConfigDict

from configs import modern


def get_config() -> ConfigDict:
    config = modern.get_config("tiny")
    config.model.update(layers=2, context=64, windows=(0,))
    config.data.update(source="text", tokenizer="chars", held_out=0.1, batch_size=24)
    config.optimizer.update(name="muon", learning_rate=1e-2)
    config.optimizer.muon.update(adam_learning_rate=2e-2, momentum=0.85)
    config.schedule.update(name="wsd", warmup_steps=20, cooldown_fraction=0.85, final_fraction=0.0)
    config.train.update(steps=160, dtype="bfloat16")  # float32 where the processor has no units for bfloat16
    config.eval.update(every_steps=160, batches=1)
    config.checkpoint.every_steps = 160
    config.sample.update(prompt="ROMEO:", max_tokens=50, top_k=0)
    return config
