"""Sentiment of film reviews (SST-2): a head on what a pretrained decoder reads, by any way of fine-tuning.

data.path is a directory of {train,dev,test}.tsv whose lines are a sentence, a tab, and 0 or 1.

python -m gptjax.train --config=configs/finetune/sst2.py --config.data.path=sst2 --config.init_from=runs/novels
python -m gptjax.train --config=configs/finetune/sst2.py --config.data.path=sst2 --config.init_from=runs/novels \
  --config.finetune.method=lora --workdir=runs/sst2-lora
python -m gptjax.evaluate --workdir=runs/sst2 --test=test
"""

from ml_collections import ConfigDict

from configs import base

# What a method's few parameters want, times the rate of all of them.
RATES = {"full": 1.0, "top": 1.0, "rule": 1.0}


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(task="classification", labels=2, pooling="mean", dropout=0.1)
    config.data.update(source="text", layout="examples", batch_size=32, context=64)
    config.data.examples.update(form="classes", fields=("text", "label"), labels=("0", "1"))
    config.optimizer.update(learning_rate=5e-4, weight_decay=0.01, beta2=0.98)
    config.schedule.update(name="linear", warmup_steps=60, final_fraction=0.0)
    config.train.update(objective="classification", steps=650)  # three times through 6,919 sentences
    config.eval.update(every_steps=65, batches=28)
    config.checkpoint.every_steps = 650
    config.sample.update(prompt="", max_tokens=1)
    return config
