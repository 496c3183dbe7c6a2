"""Dialogues: a pretrained decoder learns to answer (DailyDialog), with loss on the second speaker's turns alone.

data.path is a directory of {train,val,test}.jsonl, or a file, of {"messages": [{"role": ..., "content": ...}, ...]};
experiments/finetune/dialogues.py makes one of DailyDialog's lines.

python -m gptjax.train --config=configs/finetune/dialogue.py --config.data.path=dialogues --config.init_from=runs/novels
python -m gptjax.generate --workdir=runs/dialogue --chat
"""

from ml_collections import ConfigDict

from configs import base
from configs.finetune.methods import apply_method


def get_config(method: str = "full") -> ConfigDict:
    config = base.get_config()
    config.model.dropout = 0.1
    config.data.update(source="text", layout="packed", batch_size=8, context=256)
    config.data.examples.update(form="chat", chat_template="plain")
    config.train.steps = 150
    config.eval.update(every_steps=50, batches=20)
    config.checkpoint.every_steps = 150
    config.sample.update(prompt="User: How are you ?\nAssistant:", max_tokens=40)
    apply_method(config, method)
    return config
