"""The Transformer of arXiv 1706.03762: post-norm, sinusoidal positions, shared embeddings and its warmup schedule.

Sizes: tiny (for Multi30k on two cores), base and big (table 3 of the paper; its batches have 25,000 target tokens).

python -m gptjax.train --config=configs/transformer.py:tiny --config.data.path=multi30k
"""

from ml_collections import ConfigDict

from configs import translate
from gptjax.config import pick

SIZES = {
    "tiny": dict(layers=3, heads=4, width=256, mlp_width=512, context=64, dropout=0.3),
    "base": dict(layers=6, heads=8, width=512, mlp_width=2048, context=256, dropout=0.1),
    "big": dict(layers=6, heads=16, width=1024, mlp_width=4096, context=256, dropout=0.3),
}
RUNS = {
    "tiny": dict(batch_size=64, tokenizer="bpe:6000", steps=2500, warmup_steps=600),
    "base": dict(batch_size=100, tokenizer="bpe:37000", steps=100_000, warmup_steps=4000),
    "big": dict(batch_size=100, tokenizer="bpe:37000", steps=300_000, warmup_steps=4000),
}


def get_config(size: str = "tiny") -> ConfigDict:
    config = translate.get_config()
    model, run = config.model, pick(RUNS, size, "configs/transformer.py")
    model.update(**pick(SIZES, size, "configs/transformer.py"))
    model.update(positions="sinusoidal", norm="layernorm", norm_position="post", activation="relu", use_bias=True)
    model.update(embedding_scale=model.width**0.5, init_std=model.width**-0.5, residual_init="plain")
    config.data.update(batch_size=run["batch_size"], tokenizer=run["tokenizer"])
    config.train.steps = run["steps"]
    # Section 5.3: width^-0.5 min(step^-0.5, step warmup^-1.5), whose peak, at the end of the warm-up, is this.
    config.schedule.update(name="inverse_sqrt", warmup_steps=run["warmup_steps"])
    config.optimizer.update(learning_rate=(model.width * run["warmup_steps"]) ** -0.5, weight_decay=0.0)
    config.optimizer.update(beta2=0.98, epsilon=1e-9, clip_norm=0.0)
    return config
