"""A small base to fine-tune from, within 90 minutes on two CPU cores: English novels and articles, a modern decoder.

One command prepares the data set from a folder of novels and WikiText-2's training articles:

python -m gptjax.prepare --input "english_novels/*_*.txt" wikitext2/train.txt --document_start "^ = [^=]" \
  --tokenizer bpe:8192 --held_out 0.01 --output sets/novels
python -m gptjax.train --config=configs/novels.py --config.data.path=sets/novels
"""

from ml_collections import ConfigDict

from configs import modern


def get_config() -> ConfigDict:
    config = modern.get_config("tiny")
    config.model.update(layers=4, heads=4, width=256, context=512, windows=(256, 256, 256, 0))
    config.data.update(source="text", tokenizer="bpe:8192", batch_size=8, stages=((1800, 16, 256),))
    config.optimizer.update(name="muon", learning_rate=1e-2)
    config.optimizer.muon.adam_learning_rate = 5e-3
    config.schedule.update(name="wsd", warmup_steps=50, cooldown_fraction=0.6, final_fraction=0.0)
    config.train.steps = 2000
    config.eval.every_steps = config.checkpoint.every_steps = 200
    config.sample.update(prompt="The old house", max_tokens=150)
    return config
