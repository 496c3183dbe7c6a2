"""Objectives: what a batch asks of the parameters. `(params, batch, rng) -> (summed loss, metrics)`.

Losses are sums, not means: whoever differentiates divides by the batch's whole weight, so that slices of a batch
add up to exactly the batch, however their weights fall.
"""

from gptjax.objectives.causal import causal

OBJECTIVES = {"causal": causal}
