"""Learning rate and options of each fine-tuning method for the small models of this folder. Not a recipe itself."""

from ml_collections import ConfigDict

from gptjax.config import pick

# Peak learning rate and keys of `config.finetune`; the fewer parameters a method trains, the higher its rate.
METHODS = {
    "full": (1e-3, {}),
    "top": (1e-3, {"top_layers": 2}),
    "lora": (3e-3, {"rank": 8, "alpha": 16.0}),
    "dora": (3e-3, {"rank": 8, "alpha": 16.0}),
    "adalora": (1e-2, {"rank": 8, "alpha": 16.0}),
    "adapter": (3e-3, {"bottleneck": 16}),
    "ia3": (1e-2, {}),
    "prefix": (1e-2, {"length": 16}),
    "prompt": (3e-2, {"length": 16}),
}


def apply_method(config: ConfigDict, method: str) -> None:
    """Sets the fine-tuning method of a recipe, with its learning rate and options."""
    rate, options = pick(METHODS, method, "configs/finetune")
    config.optimizer.update(learning_rate=rate, weight_decay=0.01, beta2=0.98)
    config.schedule.update(name="linear", warmup_steps=config.train.steps // 10, final_fraction=0.0)
    config.finetune.update(method=method, **options)
    adalora, steps = config.finetune.adalora, config.train.steps
    adalora.update(warmup_steps=steps // 10, final_steps=steps // 3, every_steps=5)
