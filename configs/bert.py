"""BERT (arXiv 1810.04805) on raw text: `configs/bert.py:tiny` (L2 H2 D128), base or large; masked words, no sentences.

Hidden tokens are guessed from both sides. With `train.objective="masked + next_sentence"`, `data.layout=examples` and
`model.task=classification` it is the original's two tasks at once. `tiny` learns WikiText-2's words in minutes on two
cores; the others have the original's sizes and peak learning rate, and want its 256 rows a step on more than that.

python -m gptjax.train --config=configs/bert.py --config.data.path=wikitext2/train.txt
python -m gptjax.evaluate --workdir=runs/bert --data=wikitext2/test.txt
"""

from ml_collections import ConfigDict

from configs import base

# Layers, heads and width of arXiv 1810.04805 section 3, and of arXiv 1908.08962's smallest.
SIZES = {"tiny": (2, 2, 128), "base": (12, 12, 768), "large": (24, 16, 1024)}
LEARNING_RATES = {"tiny": 2e-3, "base": 1e-4, "large": 1e-4}


def get_config(size: str = "tiny") -> ConfigDict:
    config = base.get_config()
    config.model.arch = "encoder"
    config.model.layers, config.model.heads, config.model.width = SIZES[size]
    config.model.norm_position, config.model.norm_epsilon = "post", 1e-12
    config.model.embedding_norm = True
    config.model.head_transform, config.model.head_bias = True, True
    config.model.activation, config.model.use_bias = "gelu", True
    config.model.pooling, config.model.types = "pooler", 2
    config.model.residual_init = "plain"
    config.data.batch_size = 32
    config.optimizer.update(learning_rate=LEARNING_RATES[size], beta2=0.98, weight_decay=0.01)
    config.schedule.update(name="linear", warmup_steps=300, final_fraction=0.0)
    config.train.update(objective="masked", steps=2500)
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 500
    config.sample.prompt = "The film was [MASK] in the United States on"
    return config
