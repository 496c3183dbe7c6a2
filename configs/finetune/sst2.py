"""Sentiment of film reviews (SST-2): a head on a pretrained decoder, with any fine-tuning method.

data.path is a directory of {train,dev,test}.tsv whose lines are a sentence, a tab, and 0 or 1.

python -m gptjax.train --config=configs/finetune/sst2.py --config.data.path=sst2 --config.init_from=runs/novels
python -m gptjax.train --config=configs/finetune/sst2.py:lora --config.data.path=sst2 --config.init_from=runs/novels
python -m gptjax.evaluate --workdir=runs/sst2-lora --test=test
"""

from ml_collections import ConfigDict

from configs import base
from configs.finetune.methods import apply_method


def get_config(method: str = "full") -> ConfigDict:
    config = base.get_config()
    config.model.update(task="classification", labels=2, pooling="mean", dropout=0.1)
    config.data.update(path="../shared/data/sst2", layout="examples", batch_size=32, context=48)
    config.data.examples.update(form="classes", fields=("text", "label"), labels=("0", "1"))
    config.train.update(objective="classification", steps=430)  # twice through 6,920 sentences
    config.eval.update(every_steps=86, batches=28)
    config.checkpoint.every_steps = 430
    config.sample.prompt = ""
    apply_method(config, method)
    return config
