"""Scores: how much each weight matters. Larger = keep.

Each function returns a pytree like ``params`` that holds a score wherever the
leaf is prunable and ``optax.MaskedNode()`` elsewhere.
"""

import jax
import jax.numpy as jnp

from jaxprune import tree


def magnitude(params: tree.PyTree, which: tree.Which = None) -> tree.PyTree:
  """Returns the magnitude |w| of each prunable weight, in its own dtype.

  Args:
    params: a pytree of arrays.
    which: the leaves to score, as for :func:`jaxprune.tree.prunable`.

  Returns:
    A pytree like ``params``: |w|, or ``optax.MaskedNode()`` where a leaf stays
    dense.

  Raises:
    ValueError: if a rule matches no path, or if no leaf is left to prune.

  References:
    Han et al. (2015), arXiv:1506.02626.

  Examples:
    >>> print(magnitude({'kernel': jnp.array([[3.0, -1.0]])})['kernel'])
    [[3. 1.]]
  """
  return jax.tree.map(jnp.abs, tree.prunable(params, which))
