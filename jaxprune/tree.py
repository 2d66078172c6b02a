"""Leaves of a pytree by path: their names, rules over names, what is prunable.

Every other room speaks of a leaf by its *path*, a string such as
``'Conv_0/kernel'`` that is the same for Flax Linen, Flax NNX, Equinox, Haiku
and plain dicts, and chooses leaves by *rules*: a mapping from a regular
expression over paths to a value, in which the first match wins.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.checks import kinds

# Pytrees such as the params of a network; numbers are as good in the first.
PyTree = Annotated[Any, kinds.NUMBERS]
Arrays = Annotated[Any, kinds.ARRAYS]
Rules = Mapping[str, Any]  # Regular expression over paths -> value.
Which = Callable[[str, Any], bool] | Mapping[str, bool] | None
T = TypeVar('T')

_VALUE = jax.tree_util.GetAttrKey('value')
# Types of Flax that hold one array in an attribute `value`, by where they are
# from: NNX is imported by those alone who use it.
_BOXES = {
  ('flax.nnx.variablelib', 'Variable'),
  ('flax.nnx.variablelib', 'VariableState'),
  ('flax.core.meta', 'AxisMetadata'),
}
_WEIGHT_NAMES = ('kernel', 'weight', 'w')
_BESIDE = 'Masks, scores and states of these settings and params'
_DENSE_NAMES = ('bias', 'b', 'scale', 'offset', 'embedding', 'embeddings')


def flatten(
  tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
  """Returns (path, leaf) of each leaf, and the structure of the pytree.

  A path is one string, the same for every framework: Flax ends its own in the
  attribute ``value`` of a variable, or of a box with names of axes, which does
  not name a leaf and goes. A field or an entry of that name in anything else
  stays.

  Args:
    tree: any pytree.
    is_leaf: what counts as a leaf beside those, as for ``jax.tree.map``.

  Examples:
    >>> flatten({'a': [1.0, {'value': 2.0}]})[0]
    [('a/0', 1.0), ('a/1/value', 2.0)]
  """
  flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
  boxes = set()
  if any(len(keys) > 1 and keys[-1] == _VALUE for keys, _ in flat):
    stop = lambda x: _is_box(x) or (is_leaf is not None and is_leaf(x))
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, stop)
    boxes = {keys for keys, node in nodes if keys and _is_box(node)}

  def name(keys: tuple[Any, ...]) -> str:
    in_box = keys[:-1] in boxes and keys[-1] == _VALUE
    keys = keys[:-1] if in_box else keys
    return jax.tree_util.keystr(keys, simple=True, separator='/')

  return [(name(keys), leaf) for keys, leaf in flat], treedef


def _is_box(node: Any) -> bool:
  classes = type(node).__mro__
  return any((c.__module__, c.__name__) in _BOXES for c in classes)


def leaves(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves of a pytree by path, in the order of the pytree.

  Args:
    tree: any pytree.

  Raises:
    ValueError: if two leaves have the same path.

  Examples:
    >>> leaves({'dense': {'kernel': 1, 'bias': 2}})
    {'dense/bias': 2, 'dense/kernel': 1}
  """
  flat, _ = flatten(tree)
  named = dict(flat)
  if len(named) != len(flat):
    names = [path for path, _ in flat]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(f'Two leaves share one path: {", ".join(twice)}.')
  return named


@kinds.checked
def map_with_path(
  fn: Callable[..., Any],
  tree: Any,
  *rest: Any,
  is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
  """Maps ``fn(path, leaf, *rest_leaves)`` over a pytree.

  Args:
    fn: called with the path as a string and one leaf of each tree.
    tree: the pytree that decides the structure.
    *rest: pytrees of which ``tree`` is a prefix.
    is_leaf: what counts as a leaf beside those, as for ``jax.tree.map``.

  Examples:
    >>> map_with_path(lambda path, x: f'{path}={x}', {'a': 1, 'b': 2})
    {'a': 'a=1', 'b': 'b=2'}
  """
  flat, treedef = flatten(tree, is_leaf)
  others = [treedef.flatten_up_to(other) for other in rest]
  return treedef.unflatten(
    [fn(*row, *xs) for row, *xs in zip(flat, *others, strict=True)]
  )


def compact(tree: PyTree) -> PyTree:
  """Returns nested dicts without the entries that hold no leaf.

  What :func:`jaxprune.plans.shrink` leaves of a network with a dropped block
  becomes the params of the module built without it.

  Args:
    tree: a pytree; mappings become dicts, anything else stays as it is.

  Examples:
    >>> compact({'a': {'kernel': None, 'bias': None}, 'b': {'kernel': 1}})
    {'b': {'kernel': 1}}
  """
  if not isinstance(tree, Mapping):
    return tree
  inner = {name: compact(child) for name, child in tree.items()}
  return {n: child for n, child in inner.items() if jax.tree.leaves(child)}


@kinds.checked
def match(
  rules: Mapping[str, T],
  paths: Iterable[str],
  default: T,
  what: str = 'leaf',
) -> dict[str, T]:
  """Returns the value of each path under rules, of which the first match wins.

  Args:
    rules: regular expression -> value; it must match a path as a whole.
    paths: the paths to decide.
    default: the value of a path that no rule matches.
    what: what the paths name, for errors.

  Returns:
    path -> value, for every path, in the order of ``paths``.

  Raises:
    ValueError: if a rule is no regular expression, or if it matches no path
      (a rule that an earlier one shadows altogether does match).

  Examples:
    >>> match({'head.*': 0.0, '.*kernel': 0.9}, ['a/kernel', 'head/kernel'], 0)
    {'a/kernel': 0.9, 'head/kernel': 0.0}
  """
  paths = list(paths)
  patterns = {}
  for rule in rules:
    try:
      patterns[rule] = re.compile(rule)
    except re.error as error:
      raise ValueError(
        f'Rule {rule!r} is no regular expression: {error}.'
      ) from None
  idle = [
    rule
    for rule, pattern in patterns.items()
    if not any(pattern.fullmatch(path) for path in paths)
  ]
  if idle:
    raise ValueError(
      f'No {what} matches {", ".join(map(repr, idle))}. A rule is a regular '
      f'expression that must match a whole path; the paths are: '
      f'{_nearest(paths, idle[0]) or "none"}.'
    )
  first = lambda path: next(
    (
      rules[rule]
      for rule, pattern in patterns.items()
      if pattern.fullmatch(path)
    ),
    default,
  )
  return {path: first(path) for path in paths}


def _nearest(paths: Sequence[str], rule: str, most: int = 12) -> str:
  """Returns paths as a text: all of a few, else those most like a rule."""
  if len(paths) <= most:
    return ', '.join(paths)
  likeness = lambda path: difflib.SequenceMatcher(None, rule, path).ratio()
  near = sorted(paths, key=likeness, reverse=True)[:most]
  return f'{", ".join(near)} and {len(paths) - most} more'


def is_prunable(path: str, leaf: Any) -> bool:
  """Whether a leaf is a weight that pruning may thin out, by default.

  True for a floating-point leaf with at least two axes whose last name is
  ``kernel``, ``weight`` or ``w``, and for one of any other name with at least
  two axes longer than one. Dense stay, by name, ``bias``, ``b``, ``scale``,
  ``offset``, ``embedding`` and ``embeddings``; by shape, norm scales and biases
  (also Equinox's, of shape (n, 1, 1)); and integer leaves.

  Args:
    path: the leaf's path.
    leaf: an array or ``jax.ShapeDtypeStruct``.

  Examples:
    >>> is_prunable('conv/kernel', jnp.zeros((3, 3, 1, 8)))
    True
    >>> is_prunable('conv/bias', jnp.zeros((8, 1, 1)))
    False
  """
  return not why_dense(path, leaf)


def why_dense(path: str, leaf: Any) -> str:
  """Returns why a leaf stays dense by default; nothing if it is prunable.

  Args:
    path: the leaf's path.
    leaf: an array or ``jax.ShapeDtypeStruct``.

  Examples:
    >>> why_dense('linear/b', jnp.zeros((4, 8)))
    "leaves named 'b' stay dense by default"
    >>> why_dense('conv/bias_term', jnp.zeros((8, 1, 1)))
    'fewer than two of its axes are longer than 1'
  """
  dtype = getattr(leaf, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    return f'its dtype is {dtype}, and only floats are weights'
  name = path.rsplit('/', 1)[-1]
  if name in _DENSE_NAMES:
    return f'leaves named {name!r} stay dense by default'
  wide = sum(n > 1 for n in leaf.shape)
  if len(leaf.shape) < 2 or (wide < 2 and name not in _WEIGHT_NAMES):
    return 'fewer than two of its axes are longer than 1'
  return ''


@kinds.checked
def prunable(params: PyTree, which: Which = None) -> PyTree:
  """Returns params with ``optax.MaskedNode()`` for each leaf that stays dense.

  A ``jax.tree.map`` over the result visits the leaves to prune and no other.

  Args:
    params: a pytree of arrays or ``jax.ShapeDtypeStruct``.
    which: the leaves to prune. None: those of :func:`is_prunable`; a function
      ``(path, leaf) -> bool``; or rules over paths with values True and False,
      :func:`is_prunable` deciding where no rule matches.

  Raises:
    ValueError: if a rule matches no path, or if nothing is left to prune.
    TypeError: if ``which``, or the value of a rule, is of another kind.

  Examples:
    >>> params = {'w': jnp.ones((2, 3)), 'head': jnp.ones((3, 2))}
    >>> prunable(params, {'head': False})['head']
    MaskedNode()
  """
  named = leaves(params)
  if which is None:
    chosen = {path: is_prunable(path, leaf) for path, leaf in named.items()}
  elif callable(which):
    chosen = {path: bool(which(path, leaf)) for path, leaf in named.items()}
  elif isinstance(which, Mapping):
    odd = [
      f'{rule!r}: {x!r}' for rule, x in which.items() if x not in (True, False)
    ]
    if odd:
      raise TypeError(
        f'A rule that says which leaves to prune has the value True or False, '
        f'got {", ".join(odd)}.'
      )
    ruled = match(which, named, None)
    chosen = {
      path: is_prunable(path, leaf) if ruled[path] is None else ruled[path]
      for path, leaf in named.items()
    }
  else:
    raise TypeError(
      f'`which` must be None, a function (path, leaf) -> bool or rules over '
      f'paths, got {type(which).__name__}.'
    )
  if not any(chosen.values()):
    raise ValueError(
      f'No leaf is left to prune; choose some with `which`. The paths are: '
      f'{", ".join(named) or "none"}.'
    )
  keep = lambda path, leaf: leaf if chosen[path] else optax.MaskedNode()
  return map_with_path(keep, params)


@kinds.checked
def check_alike(
  name: str, given: Any, like: Any, *, shapes: bool = False
) -> None:
  """Raises if a pytree has not the leaves of another one, which it goes with.

  Args:
    name: of what is given, for the error.
    given: a pytree of which ``like`` is a prefix, or that is one of ``like``,
      ``optax.MaskedNode()`` and None standing for leaves.
    like: the pytree that decides.
    shapes: whether each leaf must broadcast to the shape of its partner.

  Raises:
    ValueError: naming the leaves that one has and the other has not, or those
      of another shape.

  Examples:
    >>> try:
    ...   check_alike('The masks', {'a': 1}, {'a': 1, 'b': 2})
    ... except ValueError as error:
    ...   print(error)
    The masks must have the leaves of what they go with; not there: b.
  """
  odd: list[str] = []

  def look(path, x, y):
    if shapes and not _broadcasts(np.shape(y), np.shape(x)):
      what = f'of {path!r} ' if path else ''
      odd.append(f'{what}{np.shape(x)}, got {np.shape(y)}')

  is_single = like is None or jax.tree_util.all_leaves([like])
  try:
    if (
      is_single
      and not isinstance(given, optax.MaskedNode | None)
      and (not jax.tree_util.all_leaves([given]))
    ):
      raise ValueError('A leaf is a prefix of every pytree.')
    call = lambda path, x, y: look(path, x, y) if _is_leaf(y) else None
    map_with_path(call, like, given, is_leaf=lambda x: x is None)
  except (ValueError, TypeError):
    odd = []
  else:
    if odd:
      raise ValueError(f'{name} must have the shape {"; ".join(odd)}.')
    return
  theirs, ours = _paths(given), _paths(like)
  lacking = ', '.join(path for path in ours if path not in theirs)
  beyond = ', '.join(path for path in theirs if path not in ours)
  faults = [f'not there: {lacking}'] if lacking else []
  faults += [f'too many: {beyond}'] if beyond else []
  why = '; '.join(faults) or 'the containers are of other types'
  raise ValueError(f'{name} must have the leaves of what they go with; {why}.')


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
  try:
    return np.broadcast_shapes(shape, to) == tuple(to)
  except ValueError:
    return False


def _is_leaf(x: Any) -> bool:
  return x is not None and jax.tree_util.all_leaves([x])


def _paths(tree: Any) -> list[str]:
  is_leaf = lambda x: x is None or isinstance(x, optax.MaskedNode)
  return [path or 'a single array' for path, _ in flatten(tree, is_leaf)[0]]


@kinds.checked
def restrict(params: Any, like: Any) -> PyTree:
  """Returns params with ``optax.MaskedNode()`` wherever ``like`` has one.

  Args:
    params: a pytree.
    like: masks, scores or other data of the leaves to prune.

  Examples:
    >>> masks = {'kernel': 10, 'bias': optax.MaskedNode()}
    >>> restrict({'kernel': 1, 'bias': 2}, masks)
    {'bias': MaskedNode(), 'kernel': 1}
  """
  check_alike(_BESIDE, like, params)
  choose = lambda leaf, x: x if isinstance(x, optax.MaskedNode) else leaf
  return jax.tree.map(choose, params, like)


@kinds.checked
def map_pruned(
  fn: Callable[..., Any], params: Any, some: Any, *rest: Any
) -> PyTree:
  """Maps ``fn(w, x, ...)`` over the leaves to prune; the others pass unchanged.

  Args:
    fn: called with a leaf of params and one of each other tree.
    params: a pytree of arrays.
    some: a pytree like ``params`` with ``optax.MaskedNode()`` for the leaves
      that pass.
    *rest: further pytrees like ``some``.

  Examples:
    >>> masks = {'kernel': 10, 'bias': optax.MaskedNode()}
    >>> map_pruned(lambda w, x: w * x, {'kernel': 1, 'bias': 2}, masks)
    {'bias': 2, 'kernel': 10}
  """
  call = lambda leaf, x, *xs: (
    leaf if isinstance(x, optax.MaskedNode) else fn(leaf, x, *xs)
  )
  for given in (some, *rest):
    check_alike(_BESIDE, given, params)
  return jax.tree.map(call, params, some, *rest)


def size(tree: PyTree) -> int:
  """Returns the number of entries of all leaves, an exact Python int.

  Args:
    tree: a pytree of arrays or ``jax.ShapeDtypeStruct``.

  Examples:
    >>> size({'kernel': jnp.zeros((3, 4)), 'bias': jnp.zeros(4)})
    16
  """
  return sum(
    int(np.prod(np.shape(leaf), dtype=object)) for leaf in jax.tree.leaves(tree)
  )
