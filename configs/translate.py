"""A small modern Transformer that translates: Multi30k's captions, English to German, well within an hour on two cores.

The encoder-decoder of arXiv 1706.03762 in today's form: pre-norm, RMSNorm, rotary positions. The reverse direction is
--config.data.languages="('de', 'en')"; another corpus is another path, such as a tab-separated file of English and
Chinese with --config.data.languages="('en', 'zh')".

python -m gptjax.train --config=configs/translate.py --config.data.path=multi30k
python -m gptjax.evaluate --workdir=runs/translate --test=test_2016_flickr
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    model = config.model
    model.update(arch="seq2seq", encoder_layers=4, layers=4, heads=4, width=128, mlp_width=256, context=64)
    model.update(positions="rotary", norm="rmsnorm", activation="relu", dropout=0.3)
    data = config.data
    data.update(source="text", layout="pairs", languages=("en", "de"), tokenizer="bpe:6000")
    data.batch_size = 64  # rows of about four pairs: 4,000 tokens of targets
    config.optimizer.update(learning_rate=4e-3, weight_decay=0.01, beta2=0.98)
    config.schedule.update(name="linear", warmup_steps=400, final_fraction=0.02)
    config.objective.label_smoothing = 0.1
    config.train.update(objective="seq2seq", steps=3000)
    config.eval.update(every_steps=250, batches=100)
    config.checkpoint.update(every_steps=500)
    config.sample.update(prompt="A man in a red shirt is riding a bicycle.", max_tokens=60, temperature=0.0)
    return config
