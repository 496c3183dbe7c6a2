"""Times greedy decoding: ours and PyTorch's generate, in turns on the same shape, and how near the memory's limit.

    python experiments/bench/decode.py --batch=1
    python experiments/bench/decode.py --batch=16
    python experiments/bench/decode.py --batch=1 --dtype=bfloat16 --device=cuda        # on a GPU

GPT-2 124M with random weights, 16 prompt tokens and 128 new ones. A turn of ours is Run.generate_batch: prompts are
read, tokens drawn, ids brought to the host; nothing is compiled in it, which is counted. A figure is the median over
rounds, a ratio the median of the rounds' ratios. The peer is a script that takes `decode --layers ...` and prints one
line of JSON with `tokens_per_second`; it starts anew in each round and its start is not timed.

A step reads all parameters once, and the keys and values of every row: tokens/s <= B * bandwidth / (parameters +
B * keys and values), bytes each. The bandwidth is of the chip's data sheet; on a CPU it is measured, by a product of
a vector with a matrix of 512 MB.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_step import HERE, PEER, REPO, Figures, Ours, Peer, machine, measure, medians, ratio, versions

SHAPES = {
    "gpt2": dict(layers=12, heads=12, width=768, context=1024, vocab=50257),
    "tiny": dict(layers=2, heads=2, width=64, context=256, vocab=512),
}


def make_turn(decoder: Any, shape: dict[str, int], prompt_tokens: int, new_tokens: int) -> Callable[[], float]:
    """Returns a function that decodes one batch of random prompts and returns the seconds it took."""
    import jax
    import numpy as np

    from gptjax.data.tokenizers.tokenizers import bytes_encoding
    from gptjax.decode import engine
    from gptjax.decode.ensemble import Ensemble
    from gptjax.decode.settings import SamplingParams

    B, rng, tokenizer = shape["batch"], np.random.default_rng(0), bytes_encoding()
    tokenizer.end = None  # every text has all of its tokens
    limits = engine.Limits(B, prompt_tokens + new_tokens, shape["context"])

    def turn() -> float:
        requests = [
            engine.EngineRequest(
                (tuple(rng.integers(0, shape["vocab"], prompt_tokens).tolist()),),
                SamplingParams(max_tokens=new_tokens, temperature=0, top_k=0),
                jax.random.key(n),
            )
            for n in range(B)
        ]
        start = time.perf_counter()
        samples = dict(engine.Engine(Ensemble((decoder,)), Silent(tokenizer), limits).generate(requests))
        seconds = time.perf_counter() - start
        assert sum(len(sample.ids) for sample in samples.values()) == B * new_tokens
        return seconds

    return turn


def work(shape: dict[str, int], dtype: str, prompt_tokens: int, new_tokens: int) -> None:
    """Our side: compiles, prints its facts, and for each number read decodes that many times."""
    from gptjax.core import runtime

    runtime.start()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptjax import models
    from gptjax.core import cpu_idle
    from gptjax.decode import engine, prefill, speculative, step
    from gptjax.runs import config as configs

    config = configs.read(str(REPO / "configs" / "gpt2.py"), [])
    config.model.update({key: shape[key] for key in ("layers", "heads", "width", "context")})
    config.model.vocabulary, config.data.context = shape["vocab"], shape["context"]
    config = configs.resolve(config)
    model = models.build(config.model, dtype)
    params = jax.jit(lambda: models.init(model, jax.random.key(0)))()
    decoder, B = prefill.decoder(model, params), shape["batch"]
    del params
    turn = make_turn(decoder, shape, prompt_tokens, new_tokens)
    start = time.perf_counter()
    turn()
    compiled = time.perf_counter() - start
    programs = [step.decode_steps, prefill.extend, engine.insert, speculative.run_rounds]
    known = sum(program._cache_size() for program in programs)
    c = config.model
    each = np.dtype(jnp.dtype(dtype)).itemsize
    matrices = [leaf for leaf in jax.tree.leaves(decoder.params) if leaf.ndim > 1]
    table = c.context * c.width  # of positions, of which a row is read
    parameters = (sum(leaf.size for leaf in matrices) - table) * each
    cached = 2 * c.layers * c.kv_heads * c.head_width * each * (prompt_tokens + new_tokens / 2)
    facts = {
        "first_turn_seconds": compiled,
        "parameter_bytes": parameters,
        "cache_bytes_per_row": cached,
        "bandwidth": (limit := bandwidth()),
        "limit_tokens_per_second": B * limit / (parameters + B * cached),
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        with cpu_idle.keep_awake(jax.default_backend() == "cpu"):
            times = [turn() for _ in range(int(line))]
        seconds = statistics.median(times)
        found = {
            "tokens_per_second": B * new_tokens / seconds,
            "ms_median": 1e3 * seconds,
            "gigabytes_per_second": (parameters + B * cached) * new_tokens / seconds / 1e9,
            "recompilations": sum(program._cache_size() for program in programs) - known,
        }
        print(json.dumps(found), flush=True)


def bandwidth() -> float:
    """Bytes per second that this device's memory gives."""
    import jax
    import jax.numpy as jnp

    from gptjax.planning import chips

    kind = jax.devices()[0].device_kind
    known = [chip.bandwidth for chip in chips.DATA_SHEETS if kind.startswith(chip.kind)]
    if known:
        return known[0]
    matrix = jnp.ones((2**13, 2**14))
    product = jax.jit(lambda x, matrix: x @ matrix)
    return matrix.nbytes / chips.seconds_per_call(lambda x: product(x, matrix), jnp.ones((1, 2**13)))


class Silent:
    """A tokenizer for ids that no tokenizer has: each is no text."""

    def __init__(self, tokenizer: Any) -> None:
        self.end, self.stop_token_ids = tokenizer.end, tokenizer.stop_token_ids

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Nothing."""
        return b""


def readable(result: Figures) -> str:
    """The result as a table for a person."""
    ours = result["sides"]["ours"]
    rows = [f"{'':10s} {'tokens/s':>10s} {'ms a text':>10s}"]
    for name, side in result["sides"].items():
        rows.append(f"{name:10s} {side['tokens_per_second']:10,.1f} {side['ms_median']:10,.0f}")
    if result["ratio"]:
        rows.append(f"ours / peer: {result['ratio']:.3f}")
    limit = ours["limit_tokens_per_second"]
    rows.append(
        f"{ours['gigabytes_per_second']:.1f} GB/s of {ours['bandwidth'] / 1e9:.1f}; the memory's limit is "
        f"{limit:,.1f} tokens/s: {ours['tokens_per_second'] / limit:.0%}; {ours['recompilations']:.0f} recompilations"
    )
    return "\n".join(rows)


def main() -> None:
    """Measures as the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--batch", type=int, default=1, help="rows (%(default)s)")
    parser.add_argument("--prompt_tokens", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--new_tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="turns of each side in a round (%(default)s)")
    parser.add_argument("--peer", type=Path, default=PEER, help="the peer's script (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the peer (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one object and nothing else on stdout")
    parser.add_argument("--save", metavar="NAME", help="also write results/NAME.json")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        work(**flags.work)
        return
    shape = SHAPES[flags.shape] | {"batch": flags.batch}
    lengths = {"prompt_tokens": flags.prompt_tokens, "new_tokens": flags.new_tokens}
    sides: dict[str, Any] = {"ours": Ours(__file__, {"shape": shape, "dtype": flags.dtype, **lengths})}
    if flags.peer.is_file():
        words = [word for name, value in lengths.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        sides["peer"] = Peer(flags.peer, ["decode", *words, "--warmup", "2"], shape, flags.dtype, flags.device)
    else:
        print(f"bench: there is no {flags.peer}, so no peer (--peer=PATH)", file=sys.stderr)
    found = measure(sides, flags.rounds, flags.steps)
    summary = {name: medians(rows) | sides[name].facts for name, rows in found.items()}
    ours = summary["ours"]
    result = {
        "ratio": ratio(found["ours"], found["peer"]) if "peer" in found else None,
        "tokens_per_second": ours["tokens_per_second"],
        "gigabytes_per_second": ours["gigabytes_per_second"],
        "share_of_limit": ours["tokens_per_second"] / ours["limit_tokens_per_second"],
        "recompilations": ours["recompilations"],
        "shape": shape | lengths | {"dtype": flags.dtype},
        "sides": summary,
        "rounds": {name: [row["tokens_per_second"] for row in rows] for name, rows in found.items()},
        "machine": machine(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python experiments/bench/decode.py", *(a for a in sys.argv[1:] if "--peer" not in a)]),
    }
    if flags.save:
        (HERE / "results" / f"{flags.save}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result) if flags.json else readable(result))


if __name__ == "__main__":
    main()
