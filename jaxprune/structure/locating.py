"""Which leaves of a pytree are those of a network, by the ends of their paths.

The moments of an optimizer, an average of the params, gradients and masks hold
each param at the end of a longer path: ``0/mu/conv/kernel`` is of
``conv/kernel``. What comes before says whose it is. In::

  {'gen': {'params': {'a'}, 'opt': (Adam(mu={'a'}, nu={'a'}),)}, 'disc': {'a'}}

the leaves ``gen/opt/0/mu/a`` and ``gen/opt/0/nu/a`` play different *roles*
(``mu``, ``nu``) and both follow the params. But ``gen/params/a`` and ``disc/a``
play the same role, that of the params, under the *owners* ``gen`` and ``disc``:
one may be another network, and the user must say so.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from jaxprune import tree

Follow = Mapping[str, bool]  # Regular expression over paths -> is it ours?

# Names around a copy of the params that say nothing of whose it is.
_NEUTRAL = frozenset(
  [
    *('params', 'variables', 'model', 'module', 'state', 'opt', 'opt_state'),
    *('optimizer', 'optimizer_state', 'inner_state', 'inner_opt_state'),
    *('base_optimizer_state',),
  ]
)
# Names of what accompanies params; with them the fields of known states.
_roles = {
  *('ema', 'ema_params', 'params_ema', 'average', 'averages', 'avg'),
  *('grads', 'gradients', 'updates', 'momentum', 'velocity', 'm', 'v'),
  *('exp_avg', 'exp_avg_sq', 'mask', 'masks', 'score', 'scores'),
  *('batch_stats',),
}


def name_roles(kind: type) -> None:
  """Takes the fields of a type of state for names of what accompanies params.

  Args:
    kind: a class, such as a NamedTuple.
  """
  _roles.update({*getattr(kind, '_fields', ())} - _NEUTRAL)


for _room in (optax, optax.contrib):
  for _kind in vars(_room).values():
    name_roles(_kind)


def locate(
  leaves: Mapping[str, Any],
  path: str,
  shape: Sequence[Any] | None = None,
  *,
  numbered: bool = True,
) -> str | None:
  """Returns the leaf of a graph in whose path another path ends, or None.

  Of several the longest. Where the leaves come in Flax's collections, the name
  of the collection may be left out.

  Args:
    leaves: path -> leaf, with a ``shape``.
    path: a path in any pytree.
    shape: what the leaf must have; None for any.
    numbered: whether a path of numbers alone names a leaf; not where they are
      the places of arguments.

  Examples:
    >>> import numpy as np
    >>> locate({'conv/kernel': np.ones(2)}, '0/mu/conv/kernel')
    'conv/kernel'
    >>> locate({'params/w': np.ones(2)}, 'grads/w')
    'params/w'
  """
  fits = lambda name: (
    (shape is None or tuple(leaves[name].shape) == tuple(shape))
    and (numbered or not all(map(str.isdigit, name.split('/'))))
  )
  collections = _collections(tuple(leaves))
  parts = path.split('/')
  for start in range(len(parts)):
    end = '/'.join(parts[start:])
    if end in leaves and fits(end):
      return end
    found = [
      name
      for name in (f'{first}/{end}' for first in collections)
      if name in leaves and fits(name)
    ]
    if len(found) == 1:
      return found[0]
  return None


@functools.lru_cache(maxsize=16)
def _collections(paths: tuple[str, ...]) -> tuple[str, ...]:
  """The first names of paths, if they are those of Flax's collections."""
  first = dict.fromkeys(path.partition('/')[0] for path in paths)
  return tuple(first) if 'params' in first else ()


def role_and_owner(path: str, name: str) -> tuple[str, str]:
  """Returns what a copy of a leaf is to its network, and whose it is.

  Args:
    path: the path of the copy.
    name: that of the leaf, which the path ends in, perhaps without its first.

  Examples:
    >>> role_and_owner('gen/opt/0/mu/a', 'a')
    ('mu', 'gen/0')
    >>> role_and_owner('disc/a', 'a')
    ('', 'disc')
  """
  if path != name and not path.endswith(f'/{name}'):
    name = name.partition('/')[2]
  before = path.removesuffix(name).strip('/').split('/')
  before = [part for part in before if part and part not in _NEUTRAL]
  roles = [part for part in before if part in _roles]
  owner = '/'.join(part for part in before if part not in _roles)
  return (roles[-1] if roles else ''), owner


def belonging(
  leaves: Mapping[str, Any],
  paths: Sequence[str],
  follow: Follow | None = None,
  find: Callable[[str], str | None] | None = None,
  also: Sequence[str] = (),
) -> dict[str, str]:
  """Returns path -> leaf of the network, for all that is the network's own.

  Args:
    leaves: the leaves of a graph.
    paths: those of a pytree.
    follow: rules over these paths: True for what is the network's own, False
      for what stays as it is; where none matches, the names decide.
    find: path -> leaf; :func:`locate` unless given.
    also: paths of leaves that are the network's own beside those.

  Raises:
    TypeError: if a rule is neither True nor False.
    ValueError: if a rule matches no path, or two sub-trees could be meant.

  Examples:
    >>> import numpy as np
    >>> leaves = {'a': np.ones(2)}
    >>> belonging(leaves, ['params/a', '0/mu/a', 'step'])
    {'params/a': 'a', '0/mu/a': 'a'}
    >>> belonging(leaves, ['gen/a', 'disc/a'], {'disc/.*': False})
    {'gen/a': 'a'}
  """
  ruled = _ruled(paths, follow)
  find = functools.partial(locate, leaves) if find is None else find
  own: dict[str, str] = {}
  for path in paths:
    name = None if ruled[path] is False else find(path)
    if name is not None:
      own[path] = name
  first: dict[tuple[str, str], tuple[str, str]] = {}
  for path, name in [*((f'params/{p}', p) for p in also), *own.items()]:
    role, owner = role_and_owner(path, name)
    before, other = first.setdefault((name, role), (path, owner))
    if owner != other and not (ruled.get(path) and ruled.get(before, True)):
      choice = (path, before) if not ruled.get(path) else (before, path)
      raise ValueError(
        f'Two sub-trees could be of the network: {before!r} and {path!r} are '
        f'both like its leaf {name!r}. Say so by rules over paths: '
        f'follow={{{_rule(*choice)!r}: False}} leaves one as it is, '
        f"follow={{'.*': True}} takes both."
      )
  return own


def matching(follow: Follow, paths: Sequence[str]) -> dict[str, bool]:
  """Returns the rules that match one of these paths."""
  return {
    rule: x
    for rule, x in follow.items()
    if any(re.fullmatch(rule, path) for path in paths)
  }


def undecided(paths: Sequence[str], follow: Follow | None) -> list[str]:
  """Returns the paths of which rules do not say that they stay as they are."""
  ruled = _ruled(paths, follow)
  return [path for path in paths if ruled[path] is not False]


def _ruled(
  paths: Sequence[str], follow: Follow | None
) -> Mapping[str, bool | None]:
  """What rules say of each path; None where they say nothing."""
  odd = [
    f'{rule!r}: {x!r}'
    for rule, x in (follow or {}).items()
    if not isinstance(x, bool)
  ]
  if odd:
    raise TypeError(
      f'A rule of `follow` has the value True (it is of the network) or False '
      f'(it stays as it is), got {", ".join(odd)}.'
    )
  return tree.match(follow or {}, paths, None, 'leaf')


def _rule(path: str, other: str) -> str:
  """A rule that matches the sub-tree of one path and not that of another."""
  parts, others = path.split('/'), other.split('/')
  stop = 0
  while stop < len(others) - 1 and parts[stop] == others[stop]:
    stop += 1
  shared = '/'.join(parts[: stop + 1])
  return re.escape(shared) if shared == path else f'{re.escape(shared)}/.*'
