"""Programs made of random primitives: cut at random, they compute the same.

A program is a list of steps drawn by hypothesis; each takes arrays of shape
(rows, channels) made before it. The reference is the network with its removed
units absent, and, where no reduction runs over them, the program itself on
masked params.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxprune import plans, structure
from jaxprune.proof import CheckError, check
from jaxprune.structure import axes as ax
from jaxprune.structure import rules

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


def transposed(p, x):
  y = jnp.tanh(x @ p['a']).reshape(ROWS, 4, 3)
  return y.reshape(ROWS, 12) @ p['c']


def two_parts(p, x):
  left, right = jnp.split(x @ p['a'], 2, 1)
  return jnp.tanh(left) @ p['b'] + jnp.sin(right) @ p['b2']


def two_wholes(p, x):
  both = jnp.concatenate([jnp.tanh(x @ p['b']), jnp.sin(x @ p['b2'])], 1)
  return both @ p['c']


def draw(**shapes):
  weights = Params()
  return {name: weights(*shape) for name, shape in shapes.items()}


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
}


@pytest.mark.parametrize('name', MUTANTS)
def test_a_wrong_rule_is_caught(name, monkeypatch):
  wrong, fn, params = MUTANTS[name]
  params = {path: jnp.asarray(w) for path, w in params.items()}

  def proved():
    graph = structure.trace(fn, params, X)
    kept = {
      group.name: [k, *range(2, group.size - 1)]
      for k, group in enumerate(graph.groups.values())
    }
    plan = plans.from_kept(graph, kept)
    return check(graph, plan, params, X, gradients=False)

  assert proved().values <= 1e-5
  right = rules.RULES[name]
  monkeypatch.setitem(rules.RULES, name, lambda eqn: wrong(eqn, right))
  with pytest.raises(CheckError, match='differs from'):
    proved()
