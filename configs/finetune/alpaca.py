"""Instructions: a pretrained decoder learns to follow them (Alpaca's fields), with loss on the output only.

data.path is a .json or .jsonl of {"instruction": ..., "input": ..., "output": ...}.

python -m gptjax.train --config=configs/finetune/alpaca.py --config.data.path=alpaca.json --config.init_from=runs/novels
"""

from ml_collections import ConfigDict

from configs import base
from configs.finetune.methods import apply_method


def get_config(method: str = "full") -> ConfigDict:
    config = base.get_config()
    config.model.dropout = 0.1
    config.data.update(
        path="../shared/data/alpaca_5000/alpaca_5000.json", layout="packed", batch_size=8, context=256, held_out=0.1
    )
    config.data.examples.form = "instructions"
    config.train.steps = 150
    config.eval.update(every_steps=50, batches=20)
    config.checkpoint.every_steps = 150
    config.sample.update(prompt="### Instruction:\nName three animals.\n\n### Response:\n", max_tokens=60)
    apply_method(config, method)
    return config
