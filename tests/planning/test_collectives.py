"""Parsing of compiled programs: collectives in every format that XLA prints, and their execution counts."""

import pytest

from gptjax.planning import chips, hlo
from gptjax.planning.collectives import collectives, group_along, link

MESH = {"data": 2, "fsdp": 2, "tensor": 2}  # devices 0 to 7, tensor's neighbours next to each other


def only(line, mesh=MESH):
    text = f"HloModule jit_step\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}\n"
    (found,) = collectives(text, mesh)
    return found


@pytest.mark.parametrize(
    "groups, axes, group",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",), (0, 1)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data", "fsdp"), (0, 2, 4, 6)),
        ("replica_groups={}", ("data", "fsdp", "tensor"), tuple(range(8))),
        ("replica_groups=[4,2]<=[8]", ("tensor",), (0, 1)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp", "tensor"), tuple(range(8))),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), (0, 2, 4, 6)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), (0, 2)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}", ("data", "fsdp"), (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", ("tensor",), (0, 1)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", ("data",), (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2,'b'}", ("fsdp", "tensor"), (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp"), (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",), (0, 4)),
    ],
)
def test_groups_and_their_axes(groups, axes, group):
    found = only(f"%x = f32[4]{{0}} all-reduce(%p), channel_id=1, {groups}, use_global_device_ids=true, to_apply=%add")
    assert (found.axes, found.group) == (axes, group)


def test_groups_in_an_unknown_form_are_not_guessed():
    with pytest.raises(ValueError, match="unknown format of replica groups: %p"):
        only("%x = f32[4]{0} all-reduce(%p), replica_groups=elsewhere, to_apply=%add")


PAIRS = "replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}"


@pytest.mark.parametrize(
    "line, op, size, sent",
    [
        (f"%x = f32[6,2]{{1,0}} all-gather(%p), {PAIRS}", "all-gather", 48, 24),
        (f"%x = bf16[6,2]{{1,0:T(8,128)}} all-gather(%p), {PAIRS}", "all-gather", 24, 12),
        (f"%x = f32[6]{{0}} reduce-scatter(%p), {PAIRS}, to_apply=%add", "reduce-scatter", 24, 24),
        (f"%x = f32[6]{{0}} all-reduce(%p), {PAIRS}, to_apply=%add", "all-reduce", 24, 24),
        (f"%x = f32[6]{{0}} all-reduce(%p), {PAIRS}, to_apply=%add.clone_promoted", "all-reduce", 12, 12),
        (f"%x = (f32[6]{{0}}, /*index=1*/s8[4]{{0}}) all-reduce(%p, %q), {PAIRS}", "all-reduce", 28, 28),
        (f"%x = f32[6]{{0}} all-reduce-start(%p), {PAIRS}", "all-reduce", 24, 24),
        (f"%x = (f32[3]{{0}}, f32[6]{{0}}) all-gather-start(%p), {PAIRS}", "all-gather", 24, 12),
        (f"%x = ((f32[3], f32[1]), (f32[6]{{0}}, f32[2])) all-gather-start(%p, %q), {PAIRS}", "all-gather", 32, 16),
        (f"ROOT %x = (f32[2]{{0}}, f32[2]{{0}}) all-to-all(%p, %q), {PAIRS}", "all-to-all", 16, 8),
        ("%x = f32[6] collective-permute(%p), source_target_pairs={{0,1},{1,0}}", "collective-permute", 24, 24),
        (
            "%x = (f32[6], f32[6], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            "collective-permute", 24, 24,
        ),
    ],
)  # fmt: skip
def test_bytes_of_the_result_and_on_the_link(line, op, size, sent):
    found = only(line)
    assert (found.op, found.bytes, found.sent, found.axes, found.times) == (op, size, sent, ("tensor",), 1)


def test_groups_of_one_device_send_nothing():
    line = "%x = f32[4] all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add"
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}\n"
    assert collectives(text, MESH) == []


LOOPS = """HloModule jit_step, is_scheduled=true

%fused (a: f32[9,4], b: f32[1,4], i: s32[]) -> f32[9,4] {
  %a = f32[9,4]{1,0} parameter(0)
  %b = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[9,4]{1,0} dynamic-update-slice(%a, %b, %i, %i)
}

%inner (p: (f32[4])) -> (f32[4]) {
  %g = f32[4]{0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}
  %kept = f32[9,4]{1,0} fusion(%stack, %g, %i), kind=kLoop, calls=%fused
}

%outer.1 (p: (f32[4], /*index=1*/f32[2])) -> (f32[4]) {
  %w = (f32[4]{0}) while(%t), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"3"},"x":[]}
  %g2 = f32[8]{0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}
  %s = f32[8]{0} add(%g2, %g2)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w2 = (f32[4]{0}) while(%t), condition=%less, body=%outer.1, backend_config={"known_trip_count":{"n":"5"}}
  %c = f32[4]{0} call(%p), to_apply=%outer.1
}
"""


def test_what_is_in_loops_counts_as_often_as_they_run():
    assert [(one.bytes, one.times) for one in collectives(LOOPS, MESH)] == [(32, 6), (16, 18)]


def test_what_is_changed_in_place_moves_only_what_changes():
    assert hlo.traffic(LOOPS) == 2 * (6 * 32 + 18 * 16)


def test_a_group_that_leaves_its_node_goes_through_the_network():
    chip = chips.CHIPS["h100"]._replace(node=4, near=100.0, far=10.0)
    assert link((0, 1, 2, 3), chip) == ("near", 100.0)
    assert link((0, 4), chip) == ("far", 10.0)
    assert link((0, 1, 4, 5), chip) == ("far", 20.0), "two devices of a node share the way out"
    assert link(range(64), chip._replace(node=32)) == ("far", 100.0)
    assert group_along({"data": 2, "fsdp": 2, "tensor": 2}, ("data", "tensor")) == (0, 1, 4, 5)
