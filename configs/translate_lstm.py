"""Translation before the Transformer: a bidirectional LSTM encoder and an LSTM decoder with Bahdanau attention.

After arXiv 1409.0473, with LSTMs for its gated units; data and schedule as in configs/translate.py.

python -m gptjax.train --config=configs/translate_lstm.py --config.data.path=multi30k
python -m gptjax.evaluate --workdir=runs/translate_lstm --test=test_2016_flickr
"""

from ml_collections import ConfigDict

from configs import translate


def get_config() -> ConfigDict:
    config = translate.get_config()
    model = config.model
    model.update(encoder="lstm", decoder="lstm", layers=1, encoder_layers=1, width=192, positions="none")
    model.update(use_bias=True, init_std=0.1)  # no norm makes up for small embeddings
    config.optimizer.learning_rate = 3e-3
    config.train.steps = 1000
    return config
