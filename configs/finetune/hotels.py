"""Sentiment of Chinese hotel reviews (ChnSentiCorp): a head on a decoder pretrained on such reviews only.

data.path is a .csv with a first line `label,review`. The base is pretrained on the same reviews without their labels:

python -m gptjax.train --config=configs/finetune/hotels.py:base --config.data.path=hotels.csv
python -m gptjax.train --config=configs/finetune/hotels.py --config.init_from=runs/hotels-base
"""

from ml_collections import ConfigDict

from configs import modern
from configs.finetune.methods import apply_method


def get_config(method: str = "full") -> ConfigDict:
    config = modern.get_config("tiny")
    config.model.update(layers=4, heads=4, width=192, context=128, windows=(0,))
    config.data.update(
        path="../shared/data/chnsenticorp_htl/ChnSentiCorp_htl_all.csv",
        layout="examples",
        tokenizer="bpe:6000",
        held_out=0.15,
    )
    config.data.examples.update(form="text", template="{review}", answer="")
    config.train.steps = 1200 if method == "base" else 300
    config.eval.every_steps = config.checkpoint.every_steps = config.train.steps // 5
    config.sample.update(prompt="房间", max_tokens=60)
    if method == "base":
        config.data.layout = "packed"
        config.optimizer.update(name="muon", learning_rate=1e-2)
        config.optimizer.muon.adam_learning_rate = 5e-3
        return config
    config.model.update(task="classification", labels=2, pooling="mean", dropout=0.1)
    config.data.batch_size = 32
    config.data.examples.update(form="classes", labels=("0", "1"), balanced=True)
    config.train.objective = "classification"
    config.eval.batches = 40
    apply_method(config, method)
    return config
