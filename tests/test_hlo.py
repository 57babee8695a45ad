"""What is read from the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

PROGRAM = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%layer (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %weights = f32[8,4]{1,0} all-gather(%shard), dimensions={0}
  ROOT %next = (s32[], f32[8,4]) tuple(%i, %weights)
}

%second_pass (state: (pred[], f32[])) -> (pred[], f32[]) {
  %again = (f32[], f32[]) all-reduce(%x, %y), to_apply=%add
  ROOT %next = (pred[], f32[]) tuple(%false, %again)
}

%apart (state: (pred[], bf16[8])) -> (pred[], bf16[8]) {
  %gradient = bf16[8]{0} reduce-scatter(%whole), to_apply=%add
  ROOT %next = (pred[], bf16[8]) tuple(%false, %gradient)
}

ENTRY %main (x: f32[8,4]) -> f32[] {
  %layers = (s32[], f32[8,4]) while(%init), condition=%more, body=%layer, \
backend_config={"known_trip_count":{"n":"3"}}
  %norm = (f32[], f32[2]) all-reduce(%loss, %bias), to_apply=%add
  %squares = f32[] all-reduce(%square), to_apply=%add
  %passes = (pred[], f32[]) while(%maybe), condition=%cond, body=%second_pass
  %once = (pred[], bf16[8]) while(%true), condition=%cond, body=%apart
  ROOT %out = f32[] add(%squares, %squares)
}
"""


def test_collectives_count_as_often_as_they_run():
    assert hlo.collectives(PROGRAM) == [
        hlo.Collective("all-gather", tensors=1, scalars=0, bytes=128, times=3),
        hlo.Collective("all-reduce", tensors=1, scalars=1, bytes=12, times=1),
        hlo.Collective("all-reduce", tensors=0, scalars=1, bytes=4, times=1),
        hlo.Collective("reduce-scatter", tensors=1, scalars=0, bytes=16, times=1),
    ]


def test_the_host_waits_for_loops_of_unknown_length():
    assert hlo.host_waits(PROGRAM) == {"while": 2, "conditional": 0, "host calls": 0}


@pytest.mark.parametrize(
    ("function", "waits"),
    [
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x), {}),
        (
            lambda x: jax.lax.while_loop(lambda x: jnp.all(x < 9), jnp.exp, x),
            {"while": 1},
        ),
        (lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), {"conditional": 1}),
        (lambda x: jax.pure_callback(lambda x: x, x, x), {"host calls": 1}),
    ],
)
def test_waits_of_a_program(function, waits):
    text = jax.jit(function).lower(jnp.ones(3)).compile().as_text()
    nothing = dict.fromkeys(("while", "conditional", "host calls"), 0)
    assert hlo.host_waits(text) == nothing | waits
