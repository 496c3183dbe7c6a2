"""BERT (arXiv 1810.04805) on raw text: `configs/bert.py:tiny` (L2 H2 D128), base or large; masked words, no sentences.

Hidden tokens are guessed from both sides. With `train.objective="masked + next_sentence"`, `data.layout=examples` and
`model.task=classification` it is the original's two tasks at once.
"""

from ml_collections import ConfigDict

from configs import base

# Layers, heads and width of arXiv 1810.04805 section 3, and of arXiv 1908.08962's smallest.
SIZES = {"tiny": (2, 2, 128), "base": (12, 12, 768), "large": (24, 16, 1024)}


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
    config.train.objective = "masked"
    return config
