"""Axis types on their own, and where their sizes come from."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import structure
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.run import Run
from jaxprune.structure.program.slices import occurrences


def test_sizes_that_numpy_computed_are_plain_integers():
  params = {'in': jnp.ones((2, 7)), 'out': jnp.ones((4, 2))}

  def fn(p, x):
    parts = jnp.split(x @ p['in'], np.cumsum([2, 4]), axis=1)
    return parts[1] @ p['out']

  graph = structure.trace(fn, params, jnp.ones((1, 2)))
  assert {type(g.size) for g in graph.groups.values()} == {int}
  assert ax.is_locked(ax.atom(np.int64(1)))


def test_the_reverse_of_parts_is_the_reverse_of_each_in_reverse():
  a, b, c = ax.atom(3), ax.atom(2), ax.atom(4)
  both = ax.permuted(ax.concatenation([a, b]), np.arange(5)[::-1], 'flip')
  assert [part.parts[0] for part in ax.terms(both)] == [b, a]
  assert [list(part.order) for part in ax.terms(both)] == [[1, 0], [2, 1, 0]]
  heads = ax.permuted(ax.product([a, c]), np.arange(12)[::-1], 'flip')
  assert [part.parts[0] for part in ax.factors(heads)] == [a, c]
  turned = np.arange(12).reshape(3, 4).T.reshape(-1)
  assert ax.factors(ax.permuted(ax.product([a, c]), turned, 'turn')) == [c, a]


def test_an_axis_that_equals_its_reverse_is_made_of_pairs():
  axis = ax.atom(5)
  ax.unify(axis, ax.permuted(axis, np.arange(5)[::-1], 'flip'), 'add')
  (pair, single, again) = occurrences(axis)
  assert pair[0] is again[0]
  assert list(pair[1]) == [0, 1, -1, -1, -1]
  assert list(again[1]) == [-1, -1, -1, 1, 0]
  assert single[0].locked


def test_an_order_across_the_parts_of_an_axis_locks_it_by_name():
  axis = ax.concatenation([ax.atom(3), ax.atom(3)])
  ax.permuted(axis, [0, 3, 1, 4, 2, 5], 'gather at line 7')
  (first, _) = ax.atoms(axis)
  assert first.locked == 'gather at line 7 reorders it across its parts'


N = 12
ORDERS = st.one_of(
  st.sampled_from([np.arange(N)[::-1], np.roll(np.arange(N), 4)]),
  st.permutations(range(N)),
)
CHANGES = st.one_of(
  st.tuples(st.just('cut'), st.integers(1, N - 1)),
  st.tuples(st.just('factor'), st.sampled_from([2, 3, 4, 6])),
  st.tuples(st.just('tie'), ORDERS),
  st.tuples(st.just('bind'), ORDERS),
)


@given(
  orders=st.lists(ORDERS, min_size=1, max_size=3),
  changes=st.lists(st.tuples(st.integers(0, 3), CHANGES), max_size=4),
  seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_permuted_axis_keeps_what_its_order_says(orders, changes, seed):
  """Whatever is done to an axis or to a view of it, entry j is order[j]."""
  base = ax.atom(N)
  views = [(base, np.arange(N))]
  for order in map(np.asarray, orders):
    views.append((ax.permuted(base, order, 'test'), order))
  for which, (change, detail) in changes:
    axis, order = views[which % len(views)]
    if change == 'cut':
      parts = [ax.atom(detail), ax.atom(N - detail)]
      ax.unify(axis, ax.concatenation(parts), 'test')
    elif change == 'factor':
      parts = [ax.atom(N // detail), ax.atom(detail)]
      ax.unify(axis, ax.product(parts), 'test')
    elif change == 'bind':
      other = ax.atom(N)
      ax.unify(axis, ax.permuted(other, np.asarray(detail), 'test'), 'test')
    else:
      other, its = views[detail[0] % len(views)]
      ax.unify(axis, other, 'test')
      tied = its[np.argsort(order)]  # Of the base: entry j with entry tied[j].
      views.append((ax.permuted(base, tied, 'test'), np.arange(N)))
  rng = np.random.default_rng(seed)
  atoms = [atom for atom in dict.fromkeys(ax.atoms(base)) if not atom.locked]
  for _ in range(4):
    kept = {
      atom: rng.permutation(atom.size)[: rng.integers(1, atom.size + 1)]
      for atom in atoms
    }
    run = Run(kept)
    masks = [run.mask(axis) for axis, _ in views]
    masks = [np.ones(N, bool) if mask is None else mask for mask in masks]
    for mask, (_, order) in zip(masks, views, strict=True):
      assert np.array_equal(mask, masks[0][order])
