"""The counts of benchmarks/hlo.py on programs whose costs are known."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo, products

LOOPS = """
HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%scan.cond (p: (s32[], f32[8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  %p = (s32[], f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%scan.body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0:T(8,128)}) parameter(0)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[16,32] all-gather(%x), dimensions={0}
  %y = f32[8,32] convolution(%x, %w), dim_labels=bf_io->bf
  %r = (f32[8]{0:T(256)S(1)}, /*index=1*/f32[4,4]) all-reduce(%y, %y), to_apply=%sum
}

%two.cond (p: (u32[], f32[8,16])) -> pred[] {
  %n = u32[]{:T(128)} constant(8)
  %p = (u32[], f32[8,16]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%two.body (p: (u32[], f32[8,16])) -> (u32[], f32[8,16]) {
  %p = (u32[], f32[8,16]) parameter(0)
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[8,16] get-tuple-element(%p), index=1
  %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %next = u32[] add(%i, %two)
  ROOT %t = (u32[], f32[8,16]) tuple(%next, %x)
}

%open.cond (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %m = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %m), direction=LT
}

%open.body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %a = f32[8,16] parameter(0)
  ROOT %z = f32[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16] parameter(0)
  %t = (s32[], f32[8,16]) tuple(%x)
  %l = (s32[], f32[8,16]{1,0:T(8,128)S(1)}) while(%t), condition=%scan.cond, body=%scan.body
  %o = (s32[], s32[]) while(%t), condition=%open.cond, body=%open.body
  %w = (u32[], f32[8,16]) while(%t), condition=%two.cond, body=%two.body
  %s = (f32[4,16], f32[8,16]) all-gather-start(%x), dimensions={0}
  %c = (f32[8,16], f32[8,16], u32[], u32[]) collective-permute-start(%x), source_target_pairs={}
  %e = f32[8,16] collective-permute-done(%c)
  ROOT %d = f32[8,16] all-gather-done(%s)
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_an_open_one_once():
  cost = hlo.cost(LOOPS)
  assert cost.matrix_flops == 12 * 2 * 8 * 32 * 16 + (4 + 1) * 2 * 8 * 8 * 16
  assert cost.collective_bytes == {
    "all-gather": 12 * 16 * 32 * 2 + 8 * 16 * 4,
    "all-reduce": 12 * (8 * 4 + 16 * 4),
    "collective-permute": 8 * 16 * 4,
  }
  assert cost.bytes == sum(cost.collective_bytes.values())
  assert (cost.collectives, cost.open_loops) == (26, 1)


@pytest.mark.parametrize(
  "line, flops",
  [
    # A batch of 4 products of 8x16 and 16x32: the batch is a spatial axis with one tap that hits.
    (
      "f32[4,8,32] convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, "
      "dim_labels=0bf_0io->0bf",
      2 * 4 * 8 * 32 * 16,
    ),
    # A 3x3 convolution of 8x8 pixels with padding: the taps beyond the edge are no products.
    (
      "f32[1,8,8,32] convolution(%c, %d), window={size=3x3 pad=1_1x1_1}, "
      "dim_labels=b01f_01io->b01f",
      2 * 32 * 16 * 22 * 22,
    ),
  ],
)
def test_a_convolution_counts_the_products_that_are_there(line, flops):
  text = f"""
ENTRY %main () -> f32[] {{
  %a = f32[4,8,16] parameter(0)
  %b = f32[4,16,32] parameter(1)
  %c = f32[1,8,8,16] parameter(2)
  %d = f32[3,3,16,32] parameter(3)
  ROOT %y = {line}
}}
"""
  assert hlo.cost(text).matrix_flops == flops


def test_a_compiled_scan_of_products_is_counted_whole():
  def step(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

  shapes = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
  cost = hlo.cost(jax.jit(step).lower(*shapes).compile().as_text())
  assert cost.matrix_flops == 5 * 2 * 8 * 64 * 64
  assert cost.collective_bytes == {} and cost.open_loops == 0


MEMORY = """
%slices (p: f32[12,16,32], q: s32[], r: f32[8,16]) -> (f32[16,32], f32[12,8]) {
  %p = f32[12,16,32]{2,1,0:T(8,128)} parameter(0)
  %q = s32[] parameter(1)
  %r = f32[12,8]{1,0} parameter(2)
  %b = f32[12,16,32]{2,1,0} bitcast(%p)
  %w = f32[1,16,32] dynamic-slice(%b, %q, %q, %q), dynamic_slice_sizes={1,16,32}
  %row = f32[1,8] constant(0)
  %u = f32[12,8] dynamic-update-slice(%r, %row, %q, %q)
  %v = f32[12,8] bitcast(%u)
  ROOT %t = (f32[1,16,32], f32[12,8]) tuple(%w, %v)
}

%body (s: (s32[], f32[12,16,32], f32[12,8])) -> (s32[], f32[12,16,32], f32[12,8]) {
  %s = (s32[], f32[12,16,32], f32[12,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %p = f32[12,16,32] get-tuple-element(%s), index=1
  %r = f32[12,8] get-tuple-element(%s), index=2
  %f = (f32[1,16,32], f32[12,8]) fusion(%p, %i, %r), kind=kLoop, calls=%slices
  %w = f32[1,16,32] get-tuple-element(%f), index=0
  %near = f32[8,16]{1,0:T(8,128)S(1)} copy(%w)
  %y = bf16[8,32] custom-call(%near, %w), custom_call_target="kernel"
  ROOT %t = (s32[], f32[12,16,32], f32[12,8]) tuple(%i, %p, %r)
}

%cond (s: (s32[], f32[12,16,32], f32[12,8])) -> pred[] {
  ROOT %lt = pred[] parameter(0)
}

ENTRY %main () -> f32[] {
  %s = (s32[], f32[12,16,32], f32[12,8]) parameter(0)
  %c = (f32[8,16], f32[8,16]{1,0:S(1)}, u32[]) copy-start(%s)
  %l = (s32[]) while(%s), condition=%cond, body=%body, config={"known_trip_count":{"n":"12"}}
}
"""


def test_main_memory_holds_what_is_sliced_and_updated_in_place_once():
  """A slice of a stack and its result, the index, a row written; then its copy and the kernel."""
  fusion = 2 * 16 * 32 * 4 + 4 + 8 * 4
  copy, kernel = 16 * 32 * 4, 16 * 32 * 4 + 8 * 32 * 2
  start = 8 * 16 * 4 + 4
  assert hlo.cost(MEMORY).memory_bytes == start + 12 * (fusion + copy + kernel)


def test_a_jaxpr_counts_loops_gradients_and_one_branch_of_each_choice():
  def loss(w, x):
    step = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x)
    return jax.lax.scan(lambda x, _: (step(x), None), x, None, length=5)[0].sum()

  shapes = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((8, 64), jnp.float32)
  product = 2 * 8 * 64 * 64
  assert products.count(jax.make_jaxpr(loss)(*shapes).jaxpr) == 5 * product
  # Backward, each product has a gradient by either factor.
  assert products.count(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*shapes).jaxpr) == 15 * product
  image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
  convolve = lambda x: jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  assert products.count(jax.make_jaxpr(convolve)(image).jaxpr) == 2 * 64 * 5 * 27


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    hlo.cost("nothing")
