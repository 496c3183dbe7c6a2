"""What each way of fine-tuning wants, of the small models of this folder's recipes. No recipe itself."""

from ml_collections import ConfigDict

from gptjax.config import pick

# Learning rate at the peak, and keys of `config.finetune`; what trains less of a model wants more.
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


def apply_method(config: ConfigDict, way: str) -> None:
    """Sets a recipe's way of fine-tuning, its learning rate and its sizes."""
    rate, options = pick(METHODS, way, "configs/finetune")
    config.optimizer.update(learning_rate=rate, weight_decay=0.01, beta2=0.98)
    config.schedule.update(name="linear", warmup_steps=config.train.steps // 10, final_fraction=0.0)
    config.finetune.update(method=way, **options)
    adalora, steps = config.finetune.adalora, config.train.steps
    adalora.update(warmup_steps=steps // 10, final_steps=steps // 3, every_steps=5)
