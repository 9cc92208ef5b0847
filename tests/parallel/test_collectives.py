"""Collectives are counted as they run: in loops and branches, begun apart from their end, in groups of any notation."""

import dataclasses

import pytest

from rfjax.parallel.collectives import Collective, collectives


@dataclasses.dataclass
class Compiled:
    text: str

    def as_text(self):
        return self.text


# ruff: noqa: E501
PROGRAM = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-to-all.1 = bf16[4,8]{1,0} all-to-all(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%outer.2 (p: (s32[])) -> (s32[]) {
  %w = (s32[], bf16[4,8]) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%c (p: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%left (p: f32[2]) -> f32[2] {
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
}

%right (p: f32[2]) -> f32[2] {
  %cp = f32[2]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main.7 (p: f32[16]) -> f32[16] {
  %w = (s32[]) while(%t), condition=%c, body=%outer.2, backend_config={"known_trip_count":{"n":"5"}}
  %i = f32[2] conditional(%q, %p, %p), branch_computations={%left, %right}
  %one = f32[16]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
  %m = bf16[8]{0} all-gather(%p), replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0','axis_2'}, dimensions={0}
  %n = bf16[8]{0} all-gather(%p), replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}, dimensions={0}
  %o = bf16[8]{0} all-gather(%p), replica_groups=mesh['axis_0'=1,'axis_3'=4], device_ids=([2,2]T(1,0)) {'axis_3'}, dimensions={0}
  ROOT %r = (f32[16]{0}, s8[4]{0}) all-reduce(%p, %o), replica_groups={{0,1}}, to_apply=%add
}
"""


def test_each_counts_as_often_as_it_runs():
    found = collectives(Compiled(PROGRAM))
    assert found == [
        Collective("all-to-all", 64, 4, 15),
        Collective("all-gather", 32, 4, 1),
        Collective("collective-permute", 8, 2, 1),
        Collective("all-gather", 16, 8, 1),
        Collective("all-gather", 16, 4, 1),
        Collective("all-gather", 16, 4, 1),
        Collective("all-reduce", 68, 2, 1),  # the one of a single device passes nothing
    ]
    assert [each.sent for each in found] == [15 * 48, 24, 8, 14, 12, 12, 68]


def test_groups_that_are_not_understood_are_said():
    with pytest.raises(ValueError, match="no groups of devices"):
        collectives(
            Compiled("ENTRY %m (p: f32[2]) -> f32[2] {\n  %r = f32[2]{0} all-reduce(%p), replica_groups=new\n}\n")
        )


def test_a_reduce_scatter_sends_all_but_its_own_part():
    assert Collective("reduce-scatter", 10, 4, 2).sent == 60
