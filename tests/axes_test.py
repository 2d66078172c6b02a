"""Axis types on their own, and where their sizes come from."""

import jax.numpy as jnp
import numpy as np

from jaxprune import structure
from jaxprune.structure import axes as ax


def test_sizes_that_numpy_computed_are_plain_integers():
  params = {'in': jnp.ones((2, 7)), 'out': jnp.ones((4, 2))}

  def fn(p, x):
    parts = jnp.split(x @ p['in'], np.cumsum([2, 4]), axis=1)
    return parts[1] @ p['out']

  graph = structure.trace(fn, params, jnp.ones((1, 2)))
  assert {type(g.size) for g in graph.groups.values()} == {int}
  assert ax.is_locked(ax.atom(np.int64(1)))
