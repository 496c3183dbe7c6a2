"""Objectives: what a batch asks of the parameters. `(params, batch, rng) -> (loss, metrics)`.

The loss is what training lowers; `metrics["loss"]` is its part that says how well the batch was predicted, and that
evaluation reads. All are sums over the batch by weight, not means: whoever differentiates divides by the batch's whole
weight, so that slices of a batch add up to exactly the batch, however their weights fall.
"""

from gptjax.objectives.causal import causal

OBJECTIVES = {"causal": causal}
