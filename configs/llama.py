"""Llama 3 (arXiv 2407.21783 table 3; 1b is Llama 3.2's, with its tied head), and small models of the same architecture.

1b, 8b and 70b have the published vocabulary and are for imported weights or a cluster; the small ones train
their own tokenizer: 15m, 42m and 110m have the shapes of llama2.c's stories, and tiny the default run's budget. 70b
has Llama 2's batch of 4 M tokens (arXiv 2307.09288 section 2.2), its blocks scanned and rematerialized.

python -m gptjax.train --config=configs/llama.py:tiny
"""

from ml_collections import ConfigDict

from configs import base
from gptjax.config import pick

PUBLISHED = dict(context=131_072, vocabulary=128_256, tied_head=False)

SIZES = {
    "tiny": dict(layers=4, heads=4, kv_heads=2, width=128, context=128),
    "15m": dict(layers=6, heads=6, kv_heads=6, width=288, mlp_width=768, context=256),
    "42m": dict(layers=8, heads=8, kv_heads=8, width=512, mlp_width=1376, context=1024),
    "110m": dict(layers=12, heads=12, kv_heads=12, width=768, mlp_width=2048, context=1024),
    "1b": PUBLISHED | dict(layers=16, heads=32, kv_heads=8, width=2048, mlp_width=8192, tied_head=True),
    "8b": PUBLISHED | dict(layers=32, heads=32, kv_heads=8, width=4096, mlp_width=14_336),
    "70b": PUBLISHED | dict(layers=80, heads=64, kv_heads=8, width=8192, mlp_width=28_672),
}


def get_config(size: str = "tiny") -> ConfigDict:
    shape = pick(SIZES, size, "configs/llama.py")
    config = base.get_config()
    config.model.update(positions="rotary", norm="rmsnorm", activation="swiglu", tied_head=False)
    config.model.update(residual_init="plain", **shape)
    if "vocabulary" in shape:
        config.model.rotary.update(theta=500_000.0, scaling="llama3")
        config.model.rotary.llama3.factor = 32.0 if size.lower() == "1b" else 8.0
        config.data.update(tokenizer="cl100k_base", context=8192)  # use the vocabulary that comes with the weights
        config.optimizer.learning_rate = 3e-4
        config.schedule.warmup_steps = 2000
        if size.lower() == "70b":
            config.model.update(scan_layers=True, remat="full")
            config.train.dtype = "bfloat16"
            config.data.batch_size = 512
    elif size.lower() != "tiny":
        config.data.batch_size = 64
        config.optimizer.learning_rate = 1e-3
        config.schedule.warmup_steps = 1000
        config.train.steps = 100_000
        config.eval.every_steps = config.checkpoint.every_steps = 1000
    return config
