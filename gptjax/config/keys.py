"""The keys of every config and their types, checked before any value is used.

configs/base.py gives the meaning of each key, and a test compares the two. gptjax.config.checks has the constraints
between values.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.config import limits


def _named(names: str) -> list[str]:
    """Returns ["a.b", "a.c", "d"] for "a: b c; : d"."""
    groups = [group.partition(":") for group in names.split(";")]
    return [f"{section.strip()}.{name}".lstrip(".") for section, _, keys in groups for name in keys.split()]


INTEGERS = _named("""
: seed; model: context experts experts_per_token heads labels layers mtp_depth types width;
model.relative: buckets longest; model.rotary: original_context; data: batch_size prefetch;
data.examples: shot_seed shots; finetune: bottleneck fisher_rows length rank top_layers unfreeze_every;
finetune.adalora: every_steps final_steps first_rank warmup_steps; optimizer: hessian_every_steps;
schedule: warmup_steps; objective: adversarial_steps; train: grad_accumulation steps;
mesh: context data expert fsdp tensor; eval: batches every_steps; checkpoint: every_steps keep keep_best keep_every;
guard: patience warmup_steps; log: every_steps statistics; sample: max_tokens top_k
""")
INTEGERS_OR_NONE = _named("""
model: base_head_width base_layers base_width encoder_layers forced_first head_width kv_heads mlp_width start
vocabulary; data: context seed; schedule: decay_steps
""")
NUMBERS = _named("""
model: dropout embedding_scale init_std load_balance_loss logit_scale logit_softcap norm_epsilon router_z_loss;
model.rotary: factor high_frequency_factor low_frequency_factor theta; data: held_out temperature;
data.augment: delete insert replace swap; finetune: alpha b_rate dropout ewc l2_to_start layer_decay;
finetune.adalora: beta1 beta2 orthogonality; optimizer: beta1 beta2 clip_norm ema epsilon gamma learning_rate momentum
weight_decay; schedule: cooldown_fraction final_fraction; objective: epsilon fim_rate fim_spm label_smoothing mask_rate
mean_span teacher_share teacher_temperature temperature z_loss; train: hang_minutes; checkpoint: every_minutes;
guard: spike_z; sample: temperature
""")
NUMBERS_OR_NONE = _named("model: attention_scale; optimizer: adam_learning_rate")
BOOLEANS = _named("""
model: bidirectional embedding_norm head_bias head_transform qk_norm scan_layers tied_head use_bias value_residual;
data.examples: balanced; finetune: parallel rank_stabilised; objective: permute_sentences
""")
BOOLEANS_OR_NONE = _named("model: qkv_bias")
STRINGS = _named("""
: init_from; model: activation arch attention cell decoder encoder kernels mlp norm norm_position parametrization
pooling positions remat residual_init task; model.rotary: scaling; data: layout path sha256 source tokenizer;
data.examples: answer chat_template choices form label second template too_long;
finetune: also method quantise rule targets; optimizer: name; schedule: name;
objective: adversarial corruption masking teacher; train: dtype objective; sample: prompt
""")
LISTS = _named("""
model: suppress_tokens windows; data: columns languages mixture stages; data.examples: fields labels; finetune: rates;
log: profile_steps writers
""")

# Types of each key, with a description; booleans are not numbers.
KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    key: kind
    for keys, kind in (
        (INTEGERS, ("a whole number", (int,))),
        (INTEGERS_OR_NONE, ("a whole number or None", (int, type(None)))),
        (NUMBERS, ("a number", (int, float))),
        (NUMBERS_OR_NONE, ("a number or None", (int, float, type(None)))),
        (BOOLEANS, ("True or False", (bool,))),
        (BOOLEANS_OR_NONE, ("True, False or None", (bool, type(None)))),
        (STRINGS, ("text", (str,))),
        (LISTS, ("a list, such as (1, 2)", (tuple, list))),
    )
    for key in keys
}

NAMES = {"data.examples.labels": (str, int), "data.examples.fields": (str,)}  # lists of these
SEEDS = ("seed", "data.seed", "data.examples.shot_seed")
# Maxima of keys that nothing else limits before they exhaust memory or time.
MAXIMA = dict.fromkeys(SEEDS, limits.SEED) | {
    "model.mtp_depth": 100,  # blocks
    "data.prefetch": 1000,  # threads
    "train.hang_minutes": 1e7,  # about 19 years
    "checkpoint.every_minutes": 1e7,
    "objective.adversarial_steps": 1000,
}
# Keys in the config of a run that was imported, not trained.
IMPORTED = ("seed", "init_from", "data.tokenizer", "data.context", "finetune.method", "train.objective", "train.dtype")


def problems(flat: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems of a flat config: values of the wrong type, and numbers out of range.

    Absent keys are not a problem.
    """
    for key, value in flat.items():
        if any(name.startswith(f"{key}.") for name in KINDS):
            yield f"{key} is {_shown(value)}; it must hold other keys"
            continue
        parent = key.rpartition(".")[0]
        if parent in KINDS:
            yield f"{parent} holds other keys; it must be {KINDS[parent][0]}"
        if key in KINDS:
            description, types = KINDS[key]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                yield f"{key} is {_shown(value)}; it must be {description}"
                continue
        if key in NAMES and any(not isinstance(one, NAMES[key]) or isinstance(one, bool) for one in value):
            yield f"{key} is {_shown(value)}; it must be a list of names, such as ('good', 'bad')"
        for number in _numbers(value):
            problem = limits.range_problem(number, _least(key), MAXIMA.get(key))
            if problem:
                where = f"{key} is" if number is value else f"{key} has"
                yield f"{where} {limits.format_number(number)}; {problem}"


def _least(key: str) -> float | None:
    return None if key.startswith("mesh.") or key in LISTS else 0


def _numbers(value: Any) -> Iterator[int | float]:
    """Yields the numbers in a value, also in nested lists."""
    if isinstance(value, tuple | list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def run_problems(flat: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems of the config of a run, which may be an imported one."""
    yield from problems(flat)
    for key in KINDS:
        if key.startswith(("model.", "objective.", *IMPORTED)) and key not in flat:
            yield f"it lacks {key}"
