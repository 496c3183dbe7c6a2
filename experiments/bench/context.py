"""Attention over sequences that devices divide: keys gathered by all, as gptjax does it, beside a ring.

    python experiments/bench/context.py                    # four virtual CPU devices, forward and backward pass

In a ring (arXiv 2310.01889) each device passes its keys on and adds up what it reads of each part; it holds scores of a
part of the keys at a time. Both sides take turns; figures are medians over rounds. Memory is the program's temporary
buffer on one device.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial
from typing import Any


def ring(q: Any, k: Any, v: Any, axis: str, devices: int) -> Any:
    """Sight attention of this device's queries, [B, t, H, K], to all keys, which come by one part after the other."""
    import jax
    import jax.numpy as jnp

    own, at = jax.lax.axis_index(axis), jnp.arange(q.shape[1])
    around = [(i, (i + 1) % devices) for i in range(devices)]

    def part(carry: Any, behind: Any) -> Any:
        k, v, top, total, mixed = carry
        whose = (own - behind) % devices
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
        seen = (own * q.shape[1] + at)[:, None] >= whose * q.shape[1] + at
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, old = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        total = total * old + weights.sum(-1, keepdims=True)
        mixed = mixed * old.transpose(0, 2, 1, 3) + jnp.einsum("bhts,bshk->bthk", weights, v)
        k, v = (jax.lax.ppermute(x, axis, around) for x in (k, v))
        return (k, v, new_top, total, mixed), None

    B, t, H, _ = q.shape
    # Its own part comes first, so that the highest score is finite from then on.
    start = k, v, jnp.full((B, H, t, 1), -1e30), jnp.zeros((B, H, t, 1)), jnp.zeros_like(q)
    _, _, _, total, mixed = jax.lax.scan(jax.checkpoint(part), start, jnp.arange(devices))[0]
    return mixed / total.transpose(0, 2, 1, 3)


def main() -> None:
    """Times both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="virtual CPU devices")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one object and nothing else on stdout")
    flags = parser.parse_args()
    os.environ["JAX_NUM_CPU_DEVICES"] = str(flags.devices)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from gptjax import sharding
    from gptjax.models.kernels import reference

    mesh = sharding.make_mesh(context=flags.devices)
    divided, whole = P(None, "context"), NamedSharding(mesh, P())

    def gathered(q: Any, k: Any, v: Any) -> Any:
        k, v = (jax.lax.with_sharding_constraint(x, whole) for x in (k, v))
        return reference.attend(q, k, v, reference.AttentionSpec())

    around = partial(ring, axis="context", devices=flags.devices)
    passed = jax.shard_map(around, mesh=mesh, in_specs=(divided,) * 3, out_specs=divided, check_vma=False)
    results = []
    for context in flags.contexts:
        rng = np.random.default_rng(0)
        shape = (1, context, 4, 64)
        given = [jax.device_put(rng.normal(size=shape).astype("f"), NamedSharding(mesh, divided)) for _ in range(3)]
        sides = {}
        for name, attend in (("gathered", gathered), ("ring", passed)):
            loss = jax.jit(jax.value_and_grad(lambda *x, attend=attend: (attend(*x) ** 2).sum(), argnums=(0, 1, 2)))
            sides[name] = loss.lower(*given).compile()
        found = [jax.device_get(side(*given)) for side in sides.values()]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), *found)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(flags.rounds):
            for name, side in sides.items():
                began = time.perf_counter()
                jax.block_until_ready(side(*given))
                seconds[name].append(time.perf_counter() - began)
        ratios = [a / b for a, b in zip(seconds["ring"], seconds["gathered"], strict=True)]
        line: dict[str, Any] = {"context": context, "devices": flags.devices, "ratio": statistics.median(ratios)}
        line |= {f"{name}_ms": 1e3 * statistics.median(times) for name, times in seconds.items()}
        line |= {f"{name}_bytes": side.memory_analysis().temp_size_in_bytes for name, side in sides.items()}
        results.append(line)
        if not flags.json:
            print(
                "  ".join(
                    f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value:,}"
                    for key, value in line.items()
                )
            )
    if flags.json:
        print(json.dumps({"ratio": results[-1]["ratio"], "lines": results}))


if __name__ == "__main__":
    main()
