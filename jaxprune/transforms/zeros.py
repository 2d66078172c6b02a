"""Whether what masks have pruned is zero, and who brought it back.

A chain can hold its masks and still be overruled by what stands behind or
around it: ``chain(sparsify(...), adam(...))`` has masks of 90 % and no zero.
:func:`most_revived` counts that inside a chain, for ``'revived'`` in its state;
:func:`check_sparse` says it of params, by leaf, with the order that works.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import checks
from jaxprune import masks as masks_lib
from jaxprune import tree as tree_lib
from jaxprune.checks import kinds
from jaxprune.numerics import sharding

_AT_FIRST, _LATER = 8, 16  # Steps that are all looked at, then every so many.

# Wrappers of optax by the type of their state: what they do with zeros, and
# the order that holds.
_WRAPPERS = {
  'LookaheadState': (
    'optax.lookahead around it writes its slow copy over the zeros',
    'chain(lookahead(...), sparsify(...))',
  ),
  'ScheduleFreeState': (
    'optax.contrib.schedule_free around it moves the weights itself',
    'chain(schedule_free(...), sparsify(...))',
  ),
  'MechanicState': (
    'optax.contrib.mechanize around it scales the whole way from the start',
    'chain(mechanize(...), sparsify(...))',
  ),
}


@kinds.checked
def most_revived(
  params: tree_lib.Arrays,
  masks: tree_lib.Arrays,
  so_far: jax.Array,
  age: jax.Array,
) -> jax.Array:
  """Returns the most pruned weights at once that were not zero on entry.

  All of the first 8 updates under the masks are looked at, then every 16th, so
  that a step costs a sixteenth of a pass over the weights. What comes in before
  masks were in force, such as a dense start, is not looked at.

  Args:
    params: as they came into an update.
    masks: pytree of bool, that the update before this one has put in force;
      ``optax.MaskedNode()`` where dense.
    so_far: int32, shape [].
    age: how many updates have put masks in force before this one; int32.

  Returns:
    int32, shape []; exact up to 2**24 weights of a leaf. Inside of
    ``shard_map`` that of the shard with the most.

  Raises:
    TypeError: if a mask is not bool (``optax.contrib.sam`` around a link does
      sums with its state).

  Examples:
    >>> w, mask = jnp.array([3.0, 0.0, 2.0]), jnp.array([False, False, True])
    >>> print(most_revived(w, mask, jnp.int32(0), jnp.int32(1)))
    1
  """
  masks_lib.check_bool(masks)  # Not what a wrapper may have summed them up to.
  due = (age > 0) & ((age <= _AT_FIRST) | (age % _LATER == 0))

  def look():
    # Sums in float32 are vectorised, and never wrap around to 0.
    counts = jax.tree.map(
      lambda w, mask: jnp.sum((w != 0) & ~mask, dtype=jnp.float32),
      tree_lib.restrict(params, masks),
      masks,
    )
    total = jnp.float32(0)
    for count in jax.tree.leaves(counts):
      total += count
    axes = tuple(sharding.varying(total))
    total = jax.lax.pmax(total, axes) if axes else total
    return jnp.maximum(so_far, jnp.minimum(total, 2.0**30).astype(jnp.int32))

  return jax.lax.cond(due, look, lambda: jnp.asarray(so_far, jnp.int32))


@kinds.checked
def check_sparse(params: tree_lib.Arrays, masks: Any) -> None:
  """Raises if a weight that masks have pruned is not zero.

  Given the state of the optimizer, it knows what stands behind and around the
  link that prunes, and says which of them brought the weights back. It also
  warns of leaves that look like weights and that ``optax.partition`` or
  ``optax.masked`` hides from the link, such as a frozen branch: they are dense,
  and no part of what the link calls sparsity.

  Args:
    params: pytree of arrays, concrete.
    masks: the state of the optimizer of the step that made the params, or the
      masks of it, bool or packed: ``optax.tree.get(opt_state, 'masks')``.

  Raises:
    TypeError: if masks are neither bool nor packed.
    ValueError: naming every leaf with how many of its weights came back, the
      wrapper that is likely to have done it and the order that works; or if
      the state holds no masks, or masks of other params.

  Examples:
    >>> params = {'w': jnp.array([0.0, 2.0])}
    >>> check_sparse(params, {'w': jnp.array([False, True])})
    >>> try:
    ...   check_sparse(params, {'w': jnp.array([True, False])})
    ... except ValueError as error:
    ...   print(str(error)[:46])
    Pruned weights are not zero in w (1 of 1). The
  """
  links = [node for _, node in _links(masks)]
  trees = [node.masks for node in links] or [masks]
  if not links and not _is_like(masks, params):
    raise ValueError(
      'check_sparse takes the masks of these params, or a state of the '
      'optimizer that holds them; in this one no link prunes. Links that do '
      'are sparsify, soft_shrinkage, keep_sparse, rigl, set_ and track_pdp.'
    )
  revived, endless, seen = [], [], set()
  for drawn in trees:
    drawn = masks_lib.unpacked(drawn, params)
    masks_lib.check_like(drawn, params)
    named = tree_lib.leaves(params)
    for path, mask in tree_lib.leaves(drawn).items():
      seen.add(path)
      w, pruned = named[path], ~jnp.asarray(mask)
      count = int(jnp.sum((w != 0) & pruned, dtype=jnp.uint32))
      if count:
        revived.append(
          f'{path} ({count} of {int(jnp.sum(pruned, dtype=jnp.uint32))})'
        )
      if count and not bool(jnp.isfinite(jnp.where(pruned, w, 0)).all()):
        endless.append(path)
  if revived:
    why = _why(masks) if links else _ANY_ORDER
    if endless:
      why = (
        f'Of {", ".join(endless)} some are NaN or infinite, which no update '
        f'brings to zero: start again from masks.apply(masks, params). {why}'
      )
    raise ValueError(
      f'Pruned weights are not zero in {", ".join(revived)}. {why}'
    )
  _warn_of_hidden(params, masks, seen)


@kinds.checked
def check_finite(params: tree_lib.Arrays, masks: tree_lib.Arrays) -> None:
  """Raises if a weight to prune is NaN or infinite; not under a trace.

  Args:
    params: pytree of arrays.
    masks: pytree of bool like ``params``.

  Raises:
    ValueError: naming every such leaf: no update brings those to zero.

  Examples:
    >>> check_finite(jnp.array([jnp.inf, 1.0]), jnp.array([True, False]))
  """
  masks_lib.check_like(masks, params)
  if not all(map(checks.is_static, jax.tree.leaves((params, masks)))):
    return
  fine = tree_lib.leaves(
    jax.tree.map(
      lambda w, mask: (jnp.isfinite(w) | mask).all(),
      tree_lib.restrict(params, masks),
      masks,
    )
  )
  if not all(map(checks.is_static, fine.values())):
    return  # Constants, inside of a trace.
  odd = [path for path, is_fine in fine.items() if not is_fine]
  if odd:
    raise ValueError(
      f'Weights to prune are NaN or infinite in {", ".join(odd)}, which no '
      'update brings to zero. Start from masks.apply(masks, params).'
    )


_ANY_ORDER = (
  'The link that prunes must be the last one of its chain: chain(adam(...), '
  'sparsify(...)); lookahead, schedule_free and mechanize go inside of '
  'that chain, not around it.'
)


def _is_link(node: Any) -> bool:
  """Whether a node is the state of a link that prunes."""
  return hasattr(node, 'revived') and hasattr(node, 'masks')


def _is_like(masks: Any, params: tree_lib.PyTree) -> bool:
  try:
    tree_lib.restrict(params, masks)
  except (ValueError, TypeError):
    return False
  return True


def _links(state: Any) -> list[tuple[tuple[Any, ...], Any]]:
  """Returns the links that prune, each with the nodes that it lies in."""
  return list(_walk(state, ()))


def _walk(
  node: Any, around: tuple[Any, ...]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
  if _is_link(node) and jax.tree.leaves(node.masks):
    yield around, node
    return
  if hasattr(node, '_fields') or isinstance(node, list | tuple):
    children = list(node)
  elif isinstance(node, dict):
    children = list(node.values())
  else:
    return
  for child in children:
    yield from _walk(child, (*around, node))


def _why(state: Any) -> str:
  """Returns who is likely to have brought weights back, and what to write."""
  for around, link in _links(state):
    for i, node in reversed(list(enumerate(around))):
      name = type(node).__name__
      if name in _WRAPPERS:
        what, order = _WRAPPERS[name]
        return f'{what}; write {order}.'
      branches = i > 0 and hasattr(around[i - 1], 'inner_states')
      behind = [] if branches else _behind(node, (*around, link)[i + 1])
      if behind:
        order = f'{behind[0]}(...)' if behind[0].isidentifier() else '...'
        return (
          f'{" and ".join(behind)} of the same chain comes after the link that '
          'prunes and changes its updates; the link must be the last one: '
          f'chain({order}, sparsify(...)).'
        )
  return _ANY_ORDER


def _behind(node: Any, inner: Any) -> list[str]:
  """Returns what a chain has after the link that prunes; [] for no chain."""
  if isinstance(node, dict):
    nodes = list(node.values())
  elif type(node) is tuple:
    nodes = list(node)
  else:
    return []
  at = next(i for i, child in enumerate(nodes) if child is inner)
  return list(dict.fromkeys(map(_link_name, nodes[at + 1 :])))


_STATELESS = 'a link without a state (such as scale, clip, add_decayed_weights)'


def _link_name(node: Any) -> str:
  """Returns the function whose state a node is, as far as a state tells."""
  if type(node) is tuple:  # A chain: its first link that can be told.
    names = map(_link_name, node)
    return next((name for name in names if name != _STATELESS), _STATELESS)
  kind = type(node).__name__
  if kind in ('EmptyState', 'ScaleState'):
    return _STATELESS
  letters = kind.removesuffix('State')
  words = [f'_{c.lower()}' if c.isupper() else c for c in letters]
  name = ''.join(words).lstrip('_')
  if not hasattr(optax, name) and not hasattr(optax.contrib, name):
    return f'the link whose state is {kind}'
  inner = _link_name(getattr(node, 'inner_state', ()))
  if inner != _STATELESS:
    return f'{name}({inner})'
  return 'freeze or masked' if name == 'masked' else name


def _warn_of_hidden(
  params: tree_lib.PyTree, state: Any, seen: set[str]
) -> None:
  """Warns of weights that a branch hides from the link that prunes."""
  hiding = ('PartitionState', 'MaskedState')
  names = [
    type(node).__name__ for around, _ in _links(state) for node in around
  ]
  if not any(name in hiding for name in names):
    return
  hidden = [
    path
    for path, w in tree_lib.leaves(params).items()
    if path not in seen and tree_lib.is_prunable(path, w)
  ]
  if not hidden:
    return
  wrapper = 'partition' if 'PartitionState' in names else 'masked'
  warnings.warn(
    f'No mask covers {", ".join(hidden)}: optax.{wrapper} hides them from the '
    'link that prunes, so that they stay dense. If that is not meant, put the '
    f'link behind it: chain({wrapper}(...), sparsify(...)).',
    stacklevel=3,
  )
