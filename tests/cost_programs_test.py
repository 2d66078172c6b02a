"""Multiply-adds of random programs, against a count that is kept by hand.

Each step of a program adds to a tally what it multiplies, by the shapes that it
sees and the steps that its loops make; nothing of the traced program is asked.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxprune import cost, plans, structure

SPEC = jax.ShapeDtypeStruct
ROWS = 6


class Sheet:
  """Params by name, and the multiply-adds that were made with them."""

  def __init__(self, params=None):
    self.params, self.given, self.macs = {}, params, 0

  def __call__(self, *shape):
    name = f'w{len(self.params)}'
    self.params[name] = SPEC(shape, jnp.float32)
    return jnp.ones(shape) if self.given is None else self.given[name]

  def count(self, *sizes):
    self.macs += math.prod(sizes)


# Each step: (a sheet, an array [ROWS, channels], a number from 0 to 4).


def dense(w, x, n):
  w.count(ROWS, x.shape[1], 3 + n)
  return jnp.tanh(x @ w(x.shape[1], 3 + n))


def convolution(w, x, n):
  groups = 2 if x.shape[1] % 2 == 0 else 1
  kernel = w(3, x.shape[1] // groups, 4)
  w.count(ROWS, 4, 3, x.shape[1] // groups)
  return lax.conv_general_dilated(
    x[None], kernel, (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC'),
    feature_group_count=groups,
  )[0]  # fmt: skip


def transposed(w, x, n):
  """3 by ROWS taps, whatever lies between the rows; then every third row."""
  kernel = w(3, x.shape[1], 4)
  w.count(ROWS, 3, x.shape[1], 4)
  return lax.conv_general_dilated(
    x[None], kernel, (1,), [(2, 2)], lhs_dilation=(3,),
    dimension_numbers=('NWC', 'WIO', 'NWC'),
  )[0, ::3]  # fmt: skip


def strided(w, x, n):
  """And its derivative by the data: as many again, of 12 rows by 2."""
  kernel = w(2, x.shape[1], 4)
  w.count(2, ROWS, 2, x.shape[1], 4)
  y = jnp.concatenate([x, jnp.sin(x)], 0)[None]
  fn = lambda y: jnp.sum(jnp.tanh(lax.conv_general_dilated(
    y, kernel, (2,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC')
  )))  # fmt: skip
  return jax.grad(fn)(y)[0, :ROWS]


def shifted(x, taps):
  padded = jnp.pad(x, ((taps - 1, 0), (0, 0)))
  return [padded[i : i + ROWS] for i in range(taps)]


def shifts(w, x, n):
  kernel = w(2 + n, x.shape[1])
  w.count(ROWS, x.shape[1], 2 + n)
  parts = shifted(x, 2 + n)
  return sum(kernel[i][None] * part for i, part in enumerate(parts))


def shifts_of_columns(w, x, n):
  """As state-space models write it, the kernel's channels first."""
  kernel = w(x.shape[1], 2 + n)
  w.count(ROWS, x.shape[1], 2 + n)
  total = jnp.zeros_like(x)
  for i, part in enumerate(shifted(x, 2 + n)):
    total = total + part * kernel[None, :, i]
  return total


def stacked_shifts(w, x, n):
  kernel = w(3, x.shape[1])
  w.count(ROWS, x.shape[1], 3)
  parts = [kernel[i][None] * part for i, part in enumerate(shifted(x, 3))]
  return jnp.sum(jnp.stack(parts), 0)


def scattered_shifts(w, x, n):
  kernel = w(2, x.shape[1])
  w.count(2 * ROWS - 1, x.shape[1])
  later = x[:-1] * kernel[1][None]
  return (x * kernel[0][None]).at[1:].add(later)


def looped_shifts(w, x, n):
  kernel = w(3, 1, x.shape[1])
  w.count(ROWS, x.shape[1], 3)
  padded = jnp.pad(x, ((2, 0), (0, 0)))
  part = lambda i: lax.dynamic_slice_in_dim(padded, i, ROWS)
  add = lambda i, total: total + part(i) * kernel[i]
  return lax.fori_loop(0, 3, add, jnp.zeros_like(x))


def scanned_shifts(w, x, n):
  """The taps are what a scan steps along; a scale meets each product."""
  kernel = w(3, x.shape[1]).astype(jnp.bfloat16).astype(jnp.float32)
  w.count(ROWS, x.shape[1], 3)
  padded = jnp.pad(x, ((2, 0), (0, 0)))

  def add(total, tap):
    i, k = tap
    part = lax.dynamic_slice_in_dim(padded, i, ROWS)
    return total + 0.5 * (part * k[None]), None

  return lax.scan(add, jnp.zeros_like(x), (jnp.arange(3), kernel))[0]


def written_out(w, x, n):
  w.count(ROWS, x.shape[1], 3)
  return jnp.sum(x[:, :, None] * w(x.shape[1], 3)[None], 1)


def shifts_of_leaves(w, x, n):
  """Each tap is a leaf of its own: these counted 0."""
  taps = [w(1, x.shape[1]) for _ in range(2 + n % 2)]
  w.count(len(taps), ROWS, x.shape[1])
  return jnp.tanh(sum(tap * jnp.roll(x, i, 0) for i, tap in enumerate(taps)))


def attention_written_out(w, x, n):
  """x x^T and its softmax times x, by multiplications and sums."""
  w.count(2, ROWS, ROWS, x.shape[1])
  scores = (x[:, None, :] * x[None]).sum(-1)
  return (jax.nn.softmax(scores)[:, :, None] * x[None]).sum(1)


def experts(w, x, n):
  kernels = w(2, x.shape[1], 4)
  w.count(ROWS, x.shape[1], 4)
  return lax.ragged_dot(x, kernels, jnp.array([4, 2], jnp.int32))


def attention(w, x, n):
  w.count(2, ROWS, ROWS, x.shape[1])
  return jax.nn.softmax(x @ x.T) @ x


def scan(w, x, n):
  kernels = w(n, x.shape[1], x.shape[1])
  w.count(n, ROWS, x.shape[1], x.shape[1])
  return lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, kernels)[0]


def counter(w, x, n):
  """From n by 2 to 9: while i < 9; its condition has no product."""
  kernel = w(x.shape[1], x.shape[1])
  w.count(len(range(n, 9, 2)), ROWS, x.shape[1], x.shape[1])
  step = lambda s: (s[0] + 2, jnp.tanh(s[1] @ kernel))
  return lax.while_loop(lambda s: s[0] < 9, step, (n, x))[1]


def doubling(w, x, n):
  """1, 2, 4, 8 .. below 2^n, down from a limit that the loop carries."""
  kernel = w(x.shape[1], x.shape[1])
  w.count(n, ROWS, x.shape[1], x.shape[1])
  step = lambda s: (2 * s[0], s[1], s[2] @ kernel)
  start = (jnp.float32(1), jnp.float32(2**n), x)
  return lax.while_loop(lambda s: s[0] < s[1], step, start)[2]


def nested(w, x, n):
  """A while of n steps in each of the 2 of a scan."""
  kernel = w(x.shape[1], x.shape[1])
  w.count(2, n, ROWS, x.shape[1], x.shape[1])

  def outer(h, _):
    step = lambda s: (s[0] - 1, jnp.tanh(s[1] @ kernel))
    return lax.while_loop(lambda s: s[0] > 0, step, (n, h))[1], None

  return lax.scan(outer, x, length=2)[0]


def either(w, x, n):
  """A layer or nothing: the most that it can be."""
  kernel = w(x.shape[1], x.shape[1])
  w.count(ROWS, x.shape[1], x.shape[1])
  return lax.cond(jnp.sum(x) > n, lambda x: x @ kernel, jnp.sin, x)


def again(w, x, n):
  """Remade for its derivative: two products forward, one back."""
  kernel = w(x.shape[1], 3)
  w.count(2, ROWS, x.shape[1], 3)
  return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ kernel)))(x)


def scales(w, x, n):
  """No products of a kernel: the scales of norms and of layers."""
  x = x * w(x.shape[1])[None]
  both = w(2, x.shape[1])
  x = x + both[0][None] * jnp.tanh(x)
  x = w(1, x.shape[1]) * x + w(1, x.shape[1]) * jnp.sin(x)
  x = x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1)
  return jnp.sin(x + both[1][None] * jnp.tanh(x))


STEPS = (
  dense, convolution, transposed, strided, shifts, shifts_of_columns,
  stacked_shifts, scattered_shifts, looped_shifts, scanned_shifts, written_out,
  experts, attention, scan, counter, doubling, nested, either, again, scales,
  shifts_of_leaves, attention_written_out,
)  # fmt: skip


def run(steps, sheet, x):
  for step, number in steps:
    x = step(sheet, x, number)
  return x


def law(steps, seed):
  x = SPEC((ROWS, 4), jnp.float32)
  steps = [*steps, (dense, 1)]
  sheet = Sheet()
  jax.eval_shape(lambda x: run(steps, sheet, x), x)
  fn = lambda p, x: run(steps, Sheet(p), x)
  graph = structure.trace(fn, sheet.params, x, reductions='keep')
  assert cost.macs(graph) == sheet.macs
  assert sum(layer.macs for layer in cost.layers(graph)) == sheet.macs
  rng = np.random.default_rng(seed)
  plan = plans.from_widths(
    graph,
    {
      name: int(rng.integers(1, g.size + 1)) for name, g in graph.groups.items()
    },
  )
  small = jax.eval_shape(lambda p: plans.shrink(graph, plan, p), sheet.params)
  again = structure.trace(plans.specialise(graph, plan), small, x)
  assert cost.macs(graph, plan) == cost.macs(again)


@given(
  st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(1, 4)),
    min_size=1,
    max_size=4,
  ),
  st.integers(0, 99),
)
@settings(
  max_examples=25,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.too_slow],
)
def test_a_random_program_has_the_multiply_adds_of_its_tally(steps, seed):
  law(steps, seed)


@pytest.mark.parametrize('step', STEPS, ids=lambda step: step.__name__)
def test_each_step_has_the_multiply_adds_of_its_tally(step):
  law([(dense, 2), (step, 3)], 0)


def graph_of(fn, **params):
  specs = {name: SPEC(shape, jnp.float32) for name, shape in params.items()}
  return structure.trace(fn, specs, SPEC((2, 4), jnp.float32))


def until_small(p, x):
  """As many steps as the data ask for."""
  return lax.while_loop(
    lambda h: jnp.max(h) > 1e-3, lambda h: jnp.tanh(h @ p['a']) / 2, x
  )


def two_experts(p, x):
  branches = [lambda x: jnp.tanh(x @ p['a']) @ p['b'], lambda x: x @ p['c']]
  return lax.switch((jnp.sum(x) > 0).astype(int), branches, x)


def spectral(p, x):
  return jnp.fft.fft(x).real @ p['a']


def test_what_no_program_says_may_be_told():
  """Steps of a loop, the branch that runs, the products of a solver."""
  graph = graph_of(until_small, a=(4, 4))
  assert cost.macs(graph, assume={'while at .*': 10}) == 10 * 2 * 16
  assert cost.parameters(graph) == 16  # Which no step changes.
  graph = graph_of(two_experts, a=(4, 8), b=(8, 3), c=(4, 3))
  for branch, macs in ((0, 2 * (32 + 24)), (1, 2 * 12)):
    assert cost.macs(graph, assume={'cond at .*': branch}) == macs
  assert cost.macs(graph) == 2 * (32 + 24)  # The one that costs most here,
  narrow = plans.from_widths(graph, {'a': 1})  # and there: 4 + 3 are less.
  assert cost.macs(graph, narrow) == 2 * 12
  graph = graph_of(spectral, a=(4, 3))
  assert cost.macs(graph, assume={'fft at .*': 100}) == 100 + 2 * 12
  bound, scores = cost.budget(macs=0.5), {'a': np.arange(8.0)}
  graph = graph_of(
    lambda p, x: until_small(p, x) @ p['b'] @ p['c'],
    a=(4, 4), b=(4, 8), c=(8, 3),
  )  # fmt: skip
  plan = cost.plan(graph, {'b': scores['a']}, bound, assume={'while.*': 1})
  # Half of 2 (16 + 7 * 8) is 72, and 2 (16 + 7 n) <= 72 leaves 2 of 8.
  assert len(dict(plan.kept)['b']) == 2
  reached = cost.reached(graph, plan, bound, assume={'while.*': 1})
  assert reached['MACs'].reached == 2 * (16 + 14)


@pytest.mark.parametrize(
  ('graph', 'assume', 'message'),
  [
    (
      lambda: graph_of(until_small, a=(4, 4)),
      {},
      'while at .* number of steps that does not follow from constants',
    ),
    (
      lambda: graph_of(two_experts, a=(4, 8), b=(8, 3), c=(4, 3)),
      {},
      'cond at .* has branches of which none costs most',
    ),
    (
      lambda: graph_of(two_experts, a=(4, 8), b=(8, 3), c=(4, 3)),
      {'cond at .*': 2},
      'branch 2 of cond at .*, which has branches 0 to 1',
    ),
    (
      lambda: graph_of(spectral, a=(4, 3)),
      {},
      'fft at .* may multiply and add',
    ),
    (
      lambda: graph_of(spectral, a=(4, 3)),
      {'svd.*': 1},
      "No operation matches 'svd.*'.* are: fft at",
    ),
    (
      lambda: graph_of(spectral, a=(4, 3)),
      {'fft.*': 0.5},
      "'fft.*' the number 0.5: it takes the steps of a while loop",
    ),
  ],
)
def test_what_cannot_be_counted_is_named(graph, assume, message):
  with pytest.raises(ValueError, match=message):
    cost.macs_polynomial(graph(), assume=assume)


def test_a_loop_of_no_products_is_not_asked_for_its_steps():
  graph = graph_of(
    lambda p, x: lax.while_loop(lambda h: jnp.max(h) > 1, jnp.sin, x) @ p['a'],
    a=(4, 3),
  )
  assert cost.macs(graph) == 2 * 12
  with pytest.raises(ValueError, match=r'while at .* number of steps'):
    cost.macs(graph, count=('activations',))
