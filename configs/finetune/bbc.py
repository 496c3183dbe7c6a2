"""Summaries of news (BBC): a pretrained decoder continues an article's beginning with a summary of it.

data.path is a .jsonl of {"article": ..., "summary": ...}; the end of a long article is cut, never its summary.

python -m gptjax.train --config=configs/finetune/bbc.py --config.data.path=bbc.jsonl --config.init_from=runs/novels
"""

from ml_collections import ConfigDict

from configs import base
from configs.finetune.methods import apply_method


def get_config(method: str = "full") -> ConfigDict:
    config = base.get_config()
    config.model.dropout = 0.1
    config.data.update(
        path="../shared/data/bbc_news_summary/bbc_news_summary.jsonl",
        layout="examples",
        batch_size=8,
        context=512,
        held_out=0.15,
    )
    config.data.examples.update(form="text", template="{article}\n\nSummary:\n", answer="{summary}")
    config.train.steps = 150
    config.eval.update(every_steps=50, batches=10)
    config.checkpoint.every_steps = 150
    config.sample.update(prompt="", max_tokens=100)
    apply_method(config, method)
    return config
