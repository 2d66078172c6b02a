"""Real-valued gates of units and blocks, folded into the params."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.structure.graph import Graph
from jaxprune.structure.locating import Follow, belonging
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.slices import member, occurrences


@kinds.checked
def scale(
  graph: Graph,
  params: tree.PyTree,
  units: Mapping[str, Any] | None = None,
  blocks: Mapping[str, Any] | None = None,
  *,
  closable: bool = True,
  follow: Follow | None = None,
) -> tree.PyTree:
  """Returns params scaled so that the function computes with gates.

  For a unit u of a group, the rows of u of every kernel that reads the group
  (``graph.readers``) are multiplied by its gate. The function then computes
  what it would with its data multiplied by the gate in front of those kernels,
  in train and eval form alike: one place on each path, after any norm. At 0 the
  unit is gone; at any other value nothing is counted twice.

  A norm over the group itself comes before its gate, and its statistics count
  a unit whose gate is 0, which the smaller network does not have. So such
  groups are refused, unless ``closable`` is False. To close their units for
  real run the supernet, whose masks reach the statistics too::

    net = plans.supernet(graph)
    seen = scale(graph, params, values.units, closable=False)
    is_open = {name: gate > 0 for name, gate in values.open.units.items()}
    outputs = net(seen, is_open, {}, *args)

  For a block y = x + F(x) the leaves in which F ends (``closing``: the last
  kernel and bias, or the last norm's scale and bias) are multiplied by its
  gate: y = x + g F(x), for g >= 0.

  Args:
    graph: the graph of the function.
    params: a pytree like the traced params, or a sub-tree that holds the
      leaves to scale; arrays, traced or not.
    units: group -> float[size]; traced or not, differentiable.
    blocks: name of a block -> float scalar, likewise.
    closable: whether a gate of 0 must make its unit absent; False for factors
      that stay away from 0, or beside a supernet. Static.
    follow: regular expression over paths of ``params`` -> whether these are of
      the network; else the names decide. Static.

  Returns:
    A pytree like ``params``; leaves that no gate reaches are unchanged.

  Raises:
    ValueError: if a group or block is unknown, a group has no such place
      (``graph.unread`` says why) or a block no such leaves (``unclosed``), a
      gate of 0 would not close a unit (``graph.uncloseable``), a gate has
      another shape, a leaf to scale is missing, or two sub-trees could be
      those of the network.

  Examples:
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((1, 2)), 'b': jnp.ones((2, 1))}
    >>> mlp = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 1)))
    >>> scale(graph, params, {'a': jnp.array([0.5, 2.0])})['b'].tolist()
    [[0.5], [2.0]]
  """
  pairs = []
  for name, gates in (units or {}).items():
    pairs += _unit_factors(graph, name, gates, closable)
  for name, gate in (blocks or {}).items():
    pairs += _block_factors(graph, name, gate)
  # A kernel that reads a group may also be the last of a block.
  factors: dict[str, Any] = {}
  for path, factor in pairs:
    factors[path] = factors[path] * factor if path in factors else factor
  scaled = set()
  names = belonging(graph.leaves, list(tree.leaves(params)), follow)

  def scale_leaf(path: str, value: Any) -> Any:
    name = names.get(path)
    if name not in factors:
      return value
    scaled.add(name)
    return value * factors[name].astype(value.dtype)

  result = tree.map_with_path(scale_leaf, params)
  if missing := factors.keys() - scaled:
    raise ValueError(
      f'The gates scale {", ".join(sorted(missing))}, which the params lack; '
      f'pass the params that were traced.'
    )
  return result


def _block_factors(graph: Graph, name: str, gate: Any) -> list[tuple[str, Any]]:
  """Returns what the gate of a block multiplies: (path, scalar)."""
  if name not in graph.blocks:
    raise ValueError(
      f'There is no block {name!r}; the blocks are: '
      f'{", ".join(graph.blocks) or "none"}.'
    )
  block = graph.blocks[name]
  if block.unclosed:
    raise ValueError(f'Block {name!r} has no gate: {block.unclosed}.')
  if np.shape(gate):
    raise ValueError(
      f'The gate of block {name!r} must be a scalar, got {np.shape(gate)}.'
    )
  return [(path, jnp.asarray(gate)) for path in block.closing]


def _unit_factors(
  graph: Graph, name: str, gates: Any, closable: bool
) -> list[tuple[str, Any]]:
  """Returns what the gates of a group multiply: (path, factor to broadcast).

  Gates [g0, g1] of a group that sits in entries 1 and 2 of an axis of 4, whose
  labels are [-1, 0, 1, -1], give the factor [1, g0, g1, 1] along that axis.
  """
  if name not in graph.groups:
    raise ValueError(
      f'There is no group {name!r}; the groups are: '
      f'{", ".join(graph.groups) or "none"}.'
    )
  if name in graph.unread:
    raise ValueError(f'Group {name!r} has no gate: {graph.unread[name]}.')
  if closable and name in graph.uncloseable:
    raise ValueError(
      f'A gate of 0 does not close a unit of group {name!r}: '
      f'{graph.uncloseable[name]} and counts it all the same. Leave the group '
      f"without gates, trace with reductions='protect', or pass "
      f'closable=False and close its units by the masks of plans.supernet.'
    )
  size = graph.groups[name].size
  if np.shape(gates) != (size,):
    raise ValueError(
      f'The gates of group {name!r} must have shape ({size},), got '
      f'{np.shape(gates)}.'
    )
  factors = []
  for path, axis, offset, stride in graph.readers[name]:
    leaf = graph.leaves[path]
    for atom, labels in occurrences(leaf.axes[axis]):
      if atom is not ax.find(graph.atoms[name]):
        continue
      # The group may sit on the axis more than once: only where it is read.
      if member(path, axis, labels) != (path, axis, offset, stride):
        continue
      entries = jnp.where(labels >= 0, gates[np.maximum(labels, 0)], 1)
      wide = [-1 if k == axis else 1 for k in range(len(leaf.shape))]
      factors.append((path, entries.reshape(wide)))
  return factors
