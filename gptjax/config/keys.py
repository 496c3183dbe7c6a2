"""Keys that every config has, with their types: a config of another form is refused before anything reads a value.

configs/base.py says what each key means, and a test holds the two together. Which values go together is
gptjax.config.checks' part.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.config import limits


def _named(names: str) -> list[str]:
    """["a.b", "a.c", "d"] of "a: b c; : d"."""
    groups = [group.partition(":") for group in names.split(";")]
    return [f"{section.strip()}.{name}".lstrip(".") for section, _, keys in groups for name in keys.split()]


WHOLE = _named("""
: seed; model: context experts experts_per_token heads labels layers mtp_depth types width;
model.relative: buckets longest; model.rotary: original_context; data: batch_size prefetch;
data.examples: shot_seed shots; finetune: bottleneck fisher_rows length rank top_layers unfreeze_every;
finetune.adalora: every_steps final_steps first_rank warmup_steps; optimizer: hessian_every_steps;
schedule: warmup_steps; objective: adversarial_steps; train: grad_accumulation steps;
mesh: context data expert fsdp tensor; eval: batches every_steps; checkpoint: every_steps keep keep_best keep_every;
guard: patience warmup_steps; log: every_steps statistics; sample: max_tokens top_k
""")
WHOLE_OR_NONE = _named("""
model: base_head_width base_layers base_width encoder_layers forced_first head_width kv_heads mlp_width start
vocabulary; data: context seed; schedule: decay_steps
""")
REAL = _named("""
model: dropout embedding_scale init_std load_balance_loss logit_scale logit_softcap norm_epsilon router_z_loss;
model.rotary: factor high_frequency_factor low_frequency_factor theta; data: held_out temperature;
data.augment: delete insert replace swap; finetune: alpha b_rate dropout ewc l2_to_start layer_decay;
finetune.adalora: beta1 beta2 orthogonality; optimizer: beta1 beta2 clip_norm ema epsilon gamma learning_rate momentum
weight_decay; schedule: cooldown_fraction final_fraction; objective: epsilon fim_rate fim_spm label_smoothing mask_rate
mean_span teacher_share teacher_temperature temperature z_loss; train: hang_minutes; checkpoint: every_minutes;
guard: spike_z; sample: temperature
""")
REAL_OR_NONE = _named("model: attention_scale; optimizer: adam_learning_rate")
TRUTH = _named("""
model: bidirectional embedding_norm head_bias head_transform qk_norm scan_layers tied_head use_bias value_residual;
data.examples: balanced; finetune: parallel rank_stabilised; objective: permute_sentences
""")
TRUTH_OR_NONE = _named("model: qkv_bias")
TEXT = _named("""
: init_from; model: activation arch attention cell decoder encoder kernels mlp norm norm_position parametrization
pooling positions remat residual_init task; model.rotary: scaling; data: layout path sha256 source tokenizer;
data.examples: answer chat_template choices form label second template too_long;
finetune: also method quantise rule targets; optimizer: name; schedule: name;
objective: adversarial corruption masking teacher; train: dtype objective; sample: prompt
""")
LIST = _named("""
model: suppress_tokens windows; data: columns languages mixture stages; data.examples: fields labels; finetune: rates;
log: profile_steps writers
""")

# What a key may hold, in words, and the types of it; true and false are no numbers.
KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    key: kind
    for keys, kind in (
        (WHOLE, ("a whole number", (int,))),
        (WHOLE_OR_NONE, ("a whole number or None", (int, type(None)))),
        (REAL, ("a number", (int, float))),
        (REAL_OR_NONE, ("a number or None", (int, float, type(None)))),
        (TRUTH, ("True or False", (bool,))),
        (TRUTH_OR_NONE, ("True, False or None", (bool, type(None)))),
        (TEXT, ("text", (str,))),
        (LIST, ("a list, such as (1, 2)", (tuple, list))),
    )
    for key in keys
}

NAMES = {"data.examples.labels": (str, int), "data.examples.fields": (str,)}  # lists of these
SEEDS = ("seed", "data.seed", "data.examples.shot_seed")
# The most of what would be refused by nothing else before it fills the memory or the time that there is.
MOST = dict.fromkeys(SEEDS, limits.SEED) | {
    "model.mtp_depth": 100,  # blocks
    "data.prefetch": 1000,  # threads
    "train.hang_minutes": 1e7,  # about 19 years
    "checkpoint.every_minutes": 1e7,
    "objective.adversarial_steps": 1000,
}
# What the config of a run has that was imported and not trained.
IMPORTED = ("seed", "init_from", "data.tokenizer", "data.context", "finetune.method", "train.objective", "train.dtype")


def problems(flat: Mapping[str, Any]) -> Iterator[str]:
    """What makes flat {"model.layers": 4, ...} of no config's form: other types, or numbers that nothing has room for.

    Keys that are absent are none of it.
    """
    for key, value in flat.items():
        if any(known.startswith(f"{key}.") for known in KINDS):
            yield f"{key} is {_shown(value)}; it must hold other keys"
            continue
        above = key.rpartition(".")[0]
        if above in KINDS:
            yield f"{above} holds other keys; it must be {KINDS[above][0]}"
        if key in KINDS:
            words, types = KINDS[key]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                yield f"{key} is {_shown(value)}; it must be {words}"
                continue
        if key in NAMES and any(not isinstance(one, NAMES[key]) or isinstance(one, bool) for one in value):
            yield f"{key} is {_shown(value)}; it must be a list of names, such as ('good', 'bad')"
        for number in _numbers(value):
            wrong = limits.range_problem(number, _least(key), MOST.get(key))
            if wrong:
                where = f"{key} is" if number is value else f"{key} has"
                yield f"{where} {limits.format_number(number)}; {wrong}"


def _least(key: str) -> float | None:
    return None if key.startswith("mesh.") or key in LIST else 0


def _numbers(value: Any) -> Iterator[int | float]:
    """Numbers in a value, in those of a list too."""
    if isinstance(value, tuple | list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def run_problems(flat: Mapping[str, Any]) -> Iterator[str]:
    """What makes the config of a run, be it an imported one, damaged, key by key."""
    yield from problems(flat)
    for key in KINDS:
        if key.startswith(("model.", "objective.", *IMPORTED)) and key not in flat:
            yield f"it lacks {key}"
