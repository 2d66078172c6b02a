"""Programs made of random primitives: cut at random, they compute the same.

A program is a list of steps drawn by hypothesis; each takes arrays of shape
(rows, channels) made before it. The reference is the network with its removed
units absent, and, where no reduction runs over them, the program itself on
masked params.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxprune import plans, structure
from jaxprune.plans.proof import CheckError, check
from jaxprune.structure import rules
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program import typed
from jaxprune.structure.rules import base, parts

ROWS, INPUTS, OUTPUTS = 3, 4, 2
X = jax.random.normal(jax.random.key(7), (ROWS, INPUTS))


class Params:
  """Params by name, drawn when a program first asks for them."""

  def __init__(self):
    self.drawn = {}

  def __call__(self, *shape):
    name = f'w{len(self.drawn)}'
    key = jax.random.key(len(self.drawn))
    scale = 1 / np.sqrt(shape[0] if len(shape) > 1 else 1)
    self.drawn[name] = np.asarray(jax.random.normal(key, shape) * scale)
    return self.drawn[name]


def replay(params):
  """The same params in the order in which they were drawn."""
  values = iter(params[f'w{k}'] for k in range(len(params)))
  return lambda *shape: next(values)


# Each step: (weights, one array, another, a number) -> an array or several.


def dense(w, x, y, n):
  return jnp.tanh(x @ w(x.shape[1], 3 + n))


def bias(w, x, y, n):
  return x + w(x.shape[1])[None]


def add(w, x, y, n):
  return x + (y if x.shape == y.shape else w(x.shape[1])[None])


def gate(w, x, y, n):
  return x * jax.nn.sigmoid(y @ w(y.shape[1], x.shape[1]))


def join(w, x, y, n):
  return jnp.concatenate([x, y], 1)


def part(w, x, y, n):
  cut = 1 + n % (x.shape[1] - 1) if x.shape[1] > 1 else 0
  return jnp.split(x, [cut], 1)


def halves(w, x, y, n):
  if x.shape[1] % 2:
    return jnp.sin(x)
  left, right = jnp.split(x, 2, 1)
  return left * jax.nn.sigmoid(right)


def shuffle(w, x, y, n):
  if x.shape[1] % 2:
    return jnp.cos(x)
  return x.reshape(ROWS, 2, -1).swapaxes(1, 2).reshape(ROWS, -1)


def heads(w, x, y, n):
  x = x @ w(x.shape[1], 6)
  return jnp.einsum('rhk,hko->ro', x.reshape(ROWS, 2, 3), w(2, 3, 4))


def grouped(w, x, y, n):
  if x.shape[1] % 2:
    return -x
  x = x.T.reshape(1, x.shape[1], ROWS)
  kernel = w(4, x.shape[1] // 2, 1)
  out = lax.conv_general_dilated(x, kernel, (1,), 'SAME', feature_group_count=2)
  return out[0].T


def margin(w, x, y, n):
  return jnp.pad(x, ((0, 0), (n % 2, 1)))


def center(w, x, y, n):
  return x - jnp.mean(x, 1, keepdims=True)


def softmax(w, x, y, n):
  return jax.nn.softmax(x) * x.shape[1]


def largest(w, x, y, n):
  return jnp.max(x, 1, keepdims=True) * w(1, 3)


def flip(w, x, y, n):
  return x[:, ::-1]


def every_other(w, x, y, n):
  return x[:, n % 2 :: 2] if x.shape[1] > 1 else x


def gaps(w, x, y, n):
  return lax.pad(x, 0.0, ((0, 0, 0), (n, 1, 1)))


def pairs(w, x, y, n):
  if x.shape[1] % 2:
    return jnp.abs(x)
  angle = 2.0 ** -jnp.arange(x.shape[1] // 2)[None]
  a, b = x[:, ::2] * jnp.cos(angle), x[:, 1::2] * jnp.sin(angle)
  return jnp.stack([a - b, a + b], -1).reshape(x.shape)


def permute(w, x, y, n):
  return x[:, np.random.default_rng(n).permutation(x.shape[1])]


def mirror(w, x, y, n):
  return x + jnp.flip(y if x.shape == y.shape else x, 1)


def count(w, x, y, n):
  counted = jnp.arange(x.shape[1]) % (n + 2)
  return x * (counted - jnp.mean(counted))[None]


def attend(w, x, y, n):
  width = 2 + n % 3
  q, k = x @ w(x.shape[1], width), y @ w(y.shape[1], width)
  return jax.nn.softmax(q @ k.T) @ x


def loop(w, x, y, n):
  kernel = w(x.shape[1], x.shape[1])
  step = lambda h, row: (jnp.tanh(h @ kernel) + row, h)
  last, states = lax.scan(step, x[:1], x[:, None])
  return states[:, 0] + last


def branch(w, x, y, n):
  return lax.cond(jnp.sum(X) > n, jnp.sin, lambda x: 0.5 * x, x)


def rows(w, x, y, n):
  return jnp.take(x, jnp.array([2, 0, 1]), axis=0) + x


STEPS = (
  dense,
  bias,
  add,
  gate,
  join,
  part,
  halves,
  shuffle,
  heads,
  grouped,
  margin,
  center,
  softmax,
  largest,
  flip,
  every_other,
  gaps,
  pairs,
  permute,
  mirror,
  count,
  attend,
  loop,
  branch,
  rows,
)


def run(steps, weights, x):
  """Runs a program; what its steps leave is summed by one dense layer."""
  known = [dense(weights, x, x, 3)]
  for step, first, second, number in steps:
    one, other = known[first % len(known)], known[second % len(known)]
    made = step(weights, one, other, number)
    made = made if isinstance(made, list) else [made]
    known += [array for array in made if array.shape[1]]
  ends = [array @ weights(array.shape[1], OUTPUTS) for array in known[-3:]]
  return functools.reduce(jnp.add, ends)


def compare(steps, seed):
  """The largest relative errors of a random cut; None if there is nothing."""
  weights = Params()
  run(steps, weights, X)
  params = weights.drawn
  fn = lambda p, x: run(steps, replay(p), x)
  rng = np.random.default_rng(seed)
  for reductions in ('keep', 'protect'):
    graph = structure.trace(fn, params, X, reductions=reductions)
    kept = {
      name: rng.permutation(group.size)[: rng.integers(1, group.size + 1)]
      for name, group in graph.groups.items()
    }
    plan = plans.from_kept(graph, kept)
    small = plans.shrink(graph, plan, params)
    ours = jax.jit(plans.specialise(graph, plan))(small, X)
    yield ours, jax.jit(plans.masked(graph, plan))(params, X)
    if not any(graph.groups[name].reduced for name, _ in plan.kept):
      masks = plans.leaf_masks(graph, plan)
      hidden = {
        path: np.where(masks.get(path, True), w, 0)
        for path, w in params.items()
      }
      yield ours, jax.jit(fn)(hidden, X)


PROGRAMS = st.lists(
  st.tuples(
    st.sampled_from(STEPS),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 4),
  ),
  min_size=1,
  max_size=7,
)
COMMON = {
  'deadline': None,
  'derandomize': True,
  'suppress_health_check': [HealthCheck.too_slow],
}


def law(steps, seed):
  for ours, reference in compare(steps, seed):
    size = max(float(jnp.max(jnp.abs(reference))), 1.0)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * size)


@given(steps=PROGRAMS, seed=st.integers(0, 99))
@settings(max_examples=3, **COMMON)
def test_a_random_program_computes_what_its_masked_self_does(steps, seed):
  law(steps, seed)


@pytest.mark.slow
@given(steps=PROGRAMS, seed=st.integers(0, 99))
@settings(max_examples=60, **COMMON)
def test_many_random_programs_compute_what_their_masked_selves_do(steps, seed):
  law(steps, seed)


@pytest.mark.slow
@pytest.mark.parametrize('step', STEPS, ids=lambda step: step.__name__)
def test_each_step_alone_computes_what_its_masked_self_does(step):
  law([(dense, 0, 0, 1), (step, 1, 0, 2), (bias, 2, 0, 0)], 0)


# A rule that is wrong in one place must not pass.


def concatenated_in_the_other_order(eqn, right):
  right(eqn)
  axis = eqn.params['dimension']
  parts = [value.axes[axis] for value in eqn.inputs]
  eqn.outputs[0].axes[axis] = ax.concatenation(reversed(parts))


def split_in_the_other_order(eqn, right):
  resize = right(eqn)
  axes = [out.axes for out in eqn.outputs]
  for out, other in zip(eqn.outputs, reversed(axes), strict=True):
    out.axes = other
  return resize


def merged_in_the_other_order(eqn, right):
  resize = right(eqn)
  x, (out,) = eqn.inputs[0], eqn.outputs
  if len(out.shape) == 2 and len(x.shape) == 3:
    out.axes[1] = ax.product(reversed(x.axes[1:]))
  return resize


def square_axes_in_the_other_order(eqn, right):
  resize = right(eqn)
  (out,) = eqn.outputs
  if len(set(out.shape)) == 1:
    out.axes = out.axes[::-1]
  return resize


def square_kernels_the_other_way_round(eqn, right):
  kernel = eqn.inputs[1]
  kernel.axes = [*kernel.axes[1::-1], *kernel.axes[2:]]
  return right(eqn)


def the_first_part(eqn, right):
  resize = right(eqn)
  eqn.outputs[0].axes[1] = ax.terms(eqn.inputs[0].axes[1])[0]
  return resize


def margins_at_the_other_end(eqn, right):
  resize = right(eqn)
  parts = ax.terms(eqn.outputs[0].axes[1])
  eqn.outputs[0].axes[1] = ax.concatenation(parts[::-1])
  return resize


def of_the_first_operand_alone(eqn, right):
  eqn.outputs[0].axes = list(eqn.inputs[0].axes)


def in_the_order_of_indices(eqn, right):
  x, index = eqn.inputs
  ax.unify(x.axes[1], index.axes[0], eqn.why)
  eqn.outputs[0].axes = list(x.axes)


def without_its_reductions(eqn, right):
  right(eqn)
  eqn.reductions = []


def at_the_start_of_each_block(steps):
  return steps._replace(offset=0)


def of_their_own(*values):
  """Carries whose types a loop does not tie."""


def transposed(p, x):
  y = jnp.tanh(x @ p['a']).reshape(ROWS, 4, 3)
  return y.reshape(ROWS, 12) @ p['c']


def two_parts(p, x):
  left, right = jnp.split(x @ p['a'], 2, 1)
  return jnp.tanh(left) @ p['b'] + jnp.sin(right) @ p['b2']


def two_slices(p, x):
  y = x @ p['a']
  return jnp.tanh(y[:, :6]) @ p['b'] + jnp.sin(y[:, 6:]) @ p['b2']


def two_wholes(p, x):
  both = jnp.concatenate([jnp.tanh(x @ p['b']), jnp.sin(x @ p['b2'])], 1)
  return both @ p['c']


def two_terms(p, x):
  return (jnp.tanh(x @ p['b']) + jnp.sin(x @ p['b2'])) @ p['c']


def two_kernels(p, x):
  return jnp.tanh(x @ p['a']) @ (p['b'] @ p['b2']) @ p['c']


def a_kernel_on_its_side(p, x):
  return jnp.tanh(x @ p['a']) @ jnp.sin(p['b']).T @ p['c']


def a_kernel_times_a_row(p, x):
  row = lax.broadcast_in_dim(jnp.sin(p['row']), (6, 6), (1,))
  return jnp.tanh(x @ p['a']) @ (p['b'] * row) @ p['c']


def two_convolutions(p, x):
  y = jnp.tanh(x @ p['a']).T[None]
  y = lax.conv_general_dilated(y, p['k'], (1,), 'SAME')
  return jnp.tanh(y[0]).T @ p['c']


def with_a_margin(p, x):
  y = jnp.tanh(x @ p['a'])
  return jnp.pad(y, ((0, 0), (0, 6))) @ p['c'] + jnp.cos(x @ p['b']) @ p['c2']


def and_along(operation):
  """A layer, and another along whose channels an operation runs."""

  def program(p, x):
    y = jnp.tanh(jnp.tanh(x @ p['a']) @ p['b'])
    return y @ p['c'] + operation(y) @ p['c2']

  return program


def neighbours(y):
  window, pads = (1, 2), ((0, 0), (1, 0))
  return lax.reduce_window(y, 0.0, lax.add, window, (1, 1), pads)


def two_carries(p, x):
  swap = lambda state, _: ((jnp.tanh(state[1]), state[0]), None)
  init = (jnp.sin(x @ p['b']), x @ p['b2'])
  (one, other), _ = lax.scan(swap, init, length=2)
  return one @ p['c'] + other @ p['c2']


def draw(**shapes):
  weights = Params()
  return {name: weights(*shape) for name, shape in shapes.items()}


LAYERS = draw(a=(INPUTS, 6), b=(6, 6), c=(6, 2), c2=(6, 2))
PAIR = draw(b=(INPUTS, 6), b2=(INPUTS, 6), c=(6, 2), c2=(6, 2))
# What is wrong, under the name of its rule -> (how, a program, its params).
MUTANTS = {
  'concatenate': (
    concatenated_in_the_other_order,
    two_wholes,
    draw(b=(INPUTS, 6), b2=(INPUTS, 6), c=(12, 2)),
  ),
  'split': (
    split_in_the_other_order,
    two_parts,
    draw(a=(INPUTS, 12), b=(6, 2), b2=(6, 2)),
  ),
  'reshape': (
    merged_in_the_other_order,
    transposed,
    draw(a=(INPUTS, 12), c=(12, 2)),
  ),
  'elementwise': (of_the_first_operand_alone, two_terms, PAIR),
  'dot_general': (
    square_axes_in_the_other_order,
    two_kernels,
    draw(a=(INPUTS, 6), b=(6, 5), b2=(5, 6), c=(6, 2)),
  ),
  'conv_general_dilated': (
    square_kernels_the_other_way_round,
    two_convolutions,
    draw(a=(INPUTS, 6), k=(6, 6, 3), c=(6, 2)),
  ),
  'transpose': (square_axes_in_the_other_order, a_kernel_on_its_side, LAYERS),
  'broadcast_in_dim': (
    square_axes_in_the_other_order,
    a_kernel_times_a_row,
    {**LAYERS, 'row': draw(row=(6,))['row']},
  ),
  'slice': (
    the_first_part,
    two_slices,
    draw(a=(INPUTS, 12), b=(6, 2), b2=(6, 2)),
  ),
  'pad': (
    margins_at_the_other_end,
    with_a_margin,
    draw(a=(INPUTS, 6), b=(INPUTS, 6), c=(12, 2), c2=(6, 2)),
  ),
  'gather': (
    in_the_order_of_indices,
    and_along(lambda y: y[:, np.array([5, 0, 4, 1, 3, 2])]),
    LAYERS,
  ),
  'reduce_sum': (
    without_its_reductions,
    and_along(lambda y: y / jnp.sum(jnp.exp(y), 1, keepdims=True)),
    LAYERS,
  ),
  'reduce_window_sum': (
    of_the_first_operand_alone,
    and_along(neighbours),
    LAYERS,
  ),
  'rev': (of_the_first_operand_alone, and_along(lambda y: y[:, ::-1]), LAYERS),
  'sort': (
    of_the_first_operand_alone,
    and_along(lambda y: jnp.sort(y, 1)),
    LAYERS,
  ),
  'stride': (
    at_the_start_of_each_block,
    and_along(lambda y: jnp.repeat(y[:, 1::2], 2, 1)),
    LAYERS,
  ),
  'scan': (of_their_own, two_carries, PAIR),
}
# The others say the same of their families, among the slow tests.
QUICK = ('concatenate', 'split', 'reshape', 'elementwise', 'dot_general', 'rev')


def mutate(name, wrong, monkeypatch):
  """Puts a wrong rule in the place of the right one."""
  if name == 'scan':
    return monkeypatch.setattr(typed, '_unify_values', wrong)
  if name == 'stride':
    right = parts._steps
    return monkeypatch.setattr(parts, '_steps', lambda *xs: wrong(right(*xs)))
  names = list(base.ELEMENTWISE) if name == 'elementwise' else [name]
  for each in names:
    row = rules.TABLE[each]
    mutant = functools.partial(wrong, right=row.rule)
    row = dataclasses.replace(row, rule=mutant)
    monkeypatch.setitem(rules.TABLE, each, row)
  return None


@pytest.mark.parametrize(
  'name',
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in MUTANTS
  ],
)
def test_a_wrong_rule_is_caught(name, monkeypatch):
  wrong, fn, params = MUTANTS[name]
  params = {path: jnp.asarray(w) for path, w in params.items()}

  def proved():
    graph = structure.trace(fn, params, X, reductions='keep')
    kept = {
      group.name: np.delete(
        np.arange(group.size), np.array([k + 1, k + 3]) % group.size
      )
      for k, group in enumerate(graph.groups.values())
    }
    plan = plans.from_kept(graph, kept)
    return check(graph, plan, params, X, gradients=False)

  assert proved().values <= 1e-5
  mutate(name, wrong, monkeypatch)
  with pytest.raises(CheckError, match='differs from'):
    proved()
