"""How the state of an optimizer is cut: a registry by the type of the state.

A state that holds trees like the params (the moments of Adam) needs no entry:
each of its leaves is cut like the param that it has the path and shape of. One
that keeps a param in another form does. SM3, say, keeps for a kernel [5, 6]
one vector [5] and one [6], each the maxima over the other axis::

  @plans.register_state(SM3State)
  def cut_sm3(state, cut):
    axis = lambda path, x: (int(path.rpartition('/')[2]),)
    return SM3State(mu=cut(state.mu, axis), nu=cut(state.nu))
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import optax

from jaxprune import tree
from jaxprune.structure import locating

# (path in the tree, array) -> the axis of its param that each axis is.
Axes = Callable[[str, Any], Sequence[int | None]]


class Cut(Protocol):
  """Cuts a pytree within a state, or puts it back at its full size."""

  def __call__(self, values: tree.PyTree, axes: Axes | None = None) -> Any:
    """Returns the pytree with each leaf cut like its param.

    Args:
      values: a pytree like the params, or with one more level of names below
        each of them, which needs ``axes``.
      axes: (path, array) -> for each axis of the array, which axis of the
        param it is, or None for one that stays whole; those of the param, in
        order, unless given.
    """
    ...


Rule = Callable[[Any, Cut], Any]  # (state, cut) -> the state, cut.
R = TypeVar('R', bound=Rule)
_RULES: dict[type, Rule] = {}


def register_state(kind: type) -> Callable[[R], R]:
  """Returns a decorator for the function that cuts a type of state.

  :func:`jaxprune.plans.shrink` and :func:`jaxprune.plans.grow` call it wherever
  they meet a node of exactly this type in a pytree. A later registration of a
  type takes the place of an earlier one.

  Args:
    kind: a class of pytree nodes, such as a NamedTuple.

  Raises:
    TypeError: if ``kind`` is no class.

  Examples:
    >>> from typing import Any, NamedTuple
    >>> class RowState(NamedTuple):
    ...   rows: Any  # Of each kernel [n, m] the largest gradients, [n].
    >>> @register_state(RowState)
    ... def cut_rows(state, cut):
    ...   return RowState(cut(state.rows, lambda path, x: (0,)))
  """
  if not isinstance(kind, type):
    raise TypeError(
      f'A type of state must be a class, got {type(kind).__name__}.'
    )

  def register(rule: R) -> R:
    _RULES[kind] = rule
    locating.name_roles(kind)
    return rule

  return register


def rule_of(node: Any) -> Rule | None:
  """Returns what cuts a node of a pytree, None for all but known states."""
  return _RULES.get(type(node))


def kind_of(values: tree.PyTree, path: str) -> str:
  """Returns the name of the innermost state that holds a leaf, or ''."""
  kind, before = '', ''
  node, is_open = values, True
  while is_open:
    is_state = lambda x, top=node: x is not top and hasattr(x, '_fields')
    flat, _ = tree.flatten(node, is_state)
    is_open = False
    for inner, child in flat:
      name = before + inner
      if hasattr(child, '_fields') and path.startswith(f'{name}/'):
        kind, before = type(child).__name__, f'{name}/'
        node, is_open = child, True
        break
  return kind or (type(values).__name__ if hasattr(values, '_fields') else '')


@register_state(optax.ScaleBySM3State)
def _sm3(state: Any, cut: Cut) -> Any:
  """Maxima over the other axes: of removed units, whose gradients are 0, none.

  (Anil et al. (2019), arXiv:1901.11150.)
  """
  axis = lambda path, x: (int(path.rpartition('/')[2]),)
  return state._replace(mu=cut(state.mu, axis), nu=cut(state.nu))


@register_state(optax.contrib.MuonState)
def _muon(state: Any, cut: Cut) -> Any:
  """Momentum like the params; the coefficients of its polynomial are no one's.

  (Jordan et al. (2024), Muon.)
  """
  return state._replace(mu=cut(state.mu))


@register_state(optax.ScaleByNovogradState)
def _novograd(state: Any, cut: Cut) -> Any:
  """Momentum like the params; of each leaf one squared norm, to which removed
  units, whose gradients are 0, add nothing.

  (Ginsburg et al. (2019), arXiv:1905.11286.)
  """
  return state._replace(mu=cut(state.mu))


@register_state(optax.FactoredState)
def _factored(state: Any, cut: Cut) -> Any:
  """Moments in full where Adafactor keeps them so; its factors are refused.

  They are means over rows and columns, of removed units too (Shazeer and Stern
  (2018), arXiv:1804.04235).
  """
  rows = tree.leaves(state.v_row)
  factored = [path for path, x in rows.items() if np.size(x) > 1]
  if factored:
    raise ValueError(
      f'Adafactor holds the second moments of {factored[0]!r} as means over '
      f'rows and columns, removed ones too, which no cut makes those of the '
      f'smaller network: initialise the optimizer anew for the smaller params, '
      f'or give a cut of your own with plans.register_state(FactoredState).'
    )
  return state._replace(v=cut(state.v))
