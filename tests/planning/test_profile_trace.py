"""Attribution of a profile's time, on synthetic events and programs with a known result."""

import pytest

from gptjax.planning import modules, profile_trace
from gptjax.planning.modules import Scope
from gptjax.planning.profile_trace import Event

A, B, LOOP = Scope("tokens", False), Scope("head", True), Scope("between blocks", False)
WHERE = {"a": A, "b": B, "loop": LOOP}
IDLE, ELSE = Scope(modules.IDLE, False), Scope(modules.OTHER, False)


def divided(*events):
    seconds = profile_trace.seconds_by_scope(events, WHERE, {"loop"})
    return {where: round(value * 1e9, 6) for where, value in seconds.items() if value}


@pytest.mark.parametrize(
    "events, expected",
    [
        ([Event("a", "1", 0, 4), Event("b", "1", 4, 10)], {A: 4, B: 6}),
        ([Event("a", "1", 0, 4), Event("b", "1", 6, 10)], {A: 4, IDLE: 2, B: 4}),
        ([Event("a", "1", 0, 6), Event("b", "2", 2, 10)], {A: 2 + 2, B: 2 + 4}),
        ([Event("a", "1", 0, 10), Event("b", "1", 2, 5)], {A: 7, B: 3}),
        ([Event("a", "1", 0, 10), Event("b", "1", 0, 10)], {B: 10}),
        ([Event("loop", "1", 0, 10), Event("b", "2", 2, 5)], {LOOP: 7, B: 3}),
        ([Event("a", "1", 0, 1), Event("a", "p", 1, 9, is_tail=True), Event("b", "2", 5, 8)], {A: 6, B: 3}),
        ([Event("what", "1", 0, 3)], {ELSE: 3}),
        ([Event("a", "1", 0, 3), Event("b", "1", 1, 1)], {A: 3}),
        ([], {}),
    ],
)
def test_every_instant_is_shared_equally_by_what_runs_in_it(events, expected):
    assert divided(*events) == expected


def test_what_goes_on_in_the_pool_lasts_until_it_is_complete():
    found = [Event("dot", "1", 0, 2), Event("dot", "1", 20, 22), Event("add", "1", 2, 4)]
    tails = profile_trace.tails(found, [("dot", 9), ("add", 4), ("dot", 30), ("other", 5)])
    assert [(tail.instruction, tail.start, tail.end) for tail in tails] == [("dot", 2, 9), ("dot", 22, 30)]


PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %m = f32[2]{0} multiply(%p, %p), metadata={op_name="jvp(GPT)/GPT._through_blocks/block_10/mlp_norm/mul"}
  %d = f32[2,2]{1,0} dot(%m, %p), metadata={op_name="jit(step)/transpose(jvp(GPT))/block_10/mlp/up/dot_general"}
  ROOT %n = f32[2]{0} multiply(%m, %p), metadata={op_name="jvp(GPT)/GPT._through_blocks/block_10/mlp_norm/mul"}
}

%fused.1 (p: f32[2]) -> f32[2] {
  %x = f32[2]{0} multiply(%p, %p), metadata={op_name="jit(step)/optimizer/mul"}
  %y = f32[2]{0} multiply(%p, %p), metadata={op_name="jit(step)/optimizer/add"}
  ROOT %z = f32[2]{0} add(%p, %p), metadata={op_name="jit(step)/jvp(loss)/add"}
}

ENTRY %main (a: f32[2]) -> (f32[2], s32[]) {
  %a = f32[2]{0} parameter(0), metadata={op_name="state.params[\\'tokens\\']"}
  %product_fusion = f32[2]{0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/jvp(loss)/add"}
  %voted = (f32[2]{0}, /*index=1*/s32[]) fusion(%a), kind=kLoop, calls=%fused.1, metadata={op_name="jit(step)/loss/add"}
  %copied = f32[2]{0} copy(%product_fusion)
  %summed = f32[2]{0} all-reduce(%copied), to_apply=%fused.1, metadata={op_name="jit(step)/jvp(loss)/add"}
  %strange = f32[2]{0} copy(%a)
  ROOT %out = f32[2]{0} while(%copied), condition=%fused, body=%fused.1, metadata={op_name="jit(step)/while"}
}
"""


def test_instructions_belong_where_their_products_or_most_operations_come_from():
    where = profile_trace.scopes(PROGRAM)
    assert where["product_fusion"] == where["copied"] == Scope("block_10 mlp", True)
    assert where["voted"] == Scope("optimizer", False)
    assert where["summed"] == Scope("collectives", False)
    assert where["strange"].part == where["out"].part == modules.OTHER
    assert profile_trace.containers(PROGRAM) == {"out"}


@pytest.mark.parametrize(
    "path, part",
    [
        ("jit(step)/jvp(GPT)/GPT._through_blocks/block_0/attention/bgtk,bgsk->bgts/dot_general", "block_0 attention"),
        ("jit(step)/jvp(GPT)/GPT._through_blocks/block_0/add", "block_0 norms & residual"),
        ("jit(step)/jvp(GPT)/GPT._through_blocks/cos", "between blocks"),
        ("jit(step)/while/body/jvp(GPT)/GPT.both/GPT.read/final_norm/mul", "final_norm"),
        ("jit(step)/jvp(loss)/while/body/head/dot_general", "head"),
        ("jit(step)/jvp(GPT)/tokens/gather", "tokens"),
        ("blocks/mlp/up/kernel", "blocks mlp"),
        ("jit(step)/jvp(GPT)/Dropout_0/mul", "everything else"),
    ],
)
def test_a_path_of_modules_names_its_part(path, part):
    assert modules.part_of(path) == part


def test_parts_stand_in_the_order_of_the_model():
    found = ["idle", "loss", "block_10 mlp", "block_2 attention", "between blocks", "tokens", "block_2 mlp"]
    assert modules.sort_parts(found) == [
        "tokens", "block_2 attention", "block_2 mlp", "block_10 mlp", "between blocks", "loss", "idle",
    ]  # fmt: skip
