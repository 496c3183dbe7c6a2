"""GPT-3 (arXiv 2005.14165): the eight sizes of table 2.1, with their learning rates, batches and warm-up.

Every second layer is locally banded, as section 2.1 says without a width; 256 tokens is GPT-Neo's. The paper's growth
of the batch over the first billions of tokens is left out. Where the table's columns disagree (XL has 24 heads of 128
in a width of 2,048; 13B has a width of 5,140 for 40 heads of 128), what fits the parameter counts of table D.1 is here.

175b is for a cluster: its blocks are scanned and rematerialized, and its batch, 1,536 sequences for the paper's 1,600
(3.1 M tokens for 3.2 M), is one that meshes of 512 devices can share:
python -m gptjax.plan --config=configs/gpt3.py:175b --mesh=data=8,fsdp=64,tensor=8 --chip=h100

python -m gptjax.train --config=configs/gpt3.py:xl --config.data.source=text --config.data.path='text/*.txt'
"""

from ml_collections import ConfigDict

from configs import base
from gptjax.config import pick

K, M = 1024, 1024**2
CONTEXT = 2 * K

# layers, heads, width; tokens per step; peak learning rate
SIZES = {
    "small": (12, 12, 768, M // 2, 6.0e-4),
    "medium": (24, 16, 1024, M // 2, 3.0e-4),
    "large": (24, 16, 1536, M // 2, 2.5e-4),
    "xl": (24, 16, 2048, 1 * M, 2.0e-4),
    "2.7b": (32, 32, 2560, 1 * M, 1.6e-4),
    "6.7b": (32, 32, 4096, 2 * M, 1.2e-4),
    "13b": (40, 40, 5120, 2 * M, 1.0e-4),
    "175b": (96, 96, 12288, 3 * M, 0.6e-4),
}


def get_config(size: str = "small") -> ConfigDict:
    layers, heads, width, tokens, learning_rate = pick(SIZES, size, "configs/gpt3.py")
    config = base.get_config()
    config.model.update(layers=layers, heads=heads, width=width, context=CONTEXT, vocabulary=50_257)
    config.model.update(windows=(0, 256), use_bias=True)
    config.data.update(tokenizer="gpt2", batch_size=tokens // CONTEXT)
    config.optimizer.update(learning_rate=learning_rate, weight_decay=0.1, beta1=0.9, beta2=0.95, clip_norm=1.0)
    config.schedule.update(warmup_steps=round(375e6 / tokens), decay_steps=round(260e9 / tokens), final_fraction=0.1)
    config.train.steps = round(300e9 / tokens)
    if size.lower() == "175b":
        config.model.update(scan_layers=True, remat="full")
        config.train.dtype = "bfloat16"
    config.eval.update(every_steps=1000, batches=20)
    config.checkpoint.every_steps = 1000
    return config
