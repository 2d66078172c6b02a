"""Kinds of argument: a wrong one gets one line, before any trace.

A public function says in its annotations what it takes; :func:`checked` holds
every call to them. Where JAX is forgiving so is this: a NumPy array, a tracer
or a ``jax.ShapeDtypeStruct`` is an array, a scalar array is a number.
"""

import functools
import inspect
import itertools
import numbers
import os
import sys
import types
import typing
from collections.abc import (
  Callable,
  Collection,
  Container,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax import core

F = TypeVar('F', bound=Callable[..., Any])
# What the annotation of a pytree says of its leaves.
ARRAYS = 'a pytree of arrays'
NUMBERS = 'a pytree of arrays or numbers'

_REMEDIES = {
  'Graph': '`jaxprune.trace(fn, params, *args)` makes one.',
  'Plan': '`jaxprune.plan`, `plans.from_widths` or `plans.from_kept` make one.',
  'Budget': '`jaxprune.budget(macs=0.5)` makes one of half the multiply-adds.',
  'Table': '`cost.measure(graph)` makes one.',
  'Space': '`joint.space(graph, *args)` makes one.',
  'PruningVector': '`joint.unit_range(space)` gives two.',
  'PDPState': '`soft.pdp_init(params, sparsity)` makes one.',
  'Diagnosis': '`soft.diagnose(params, state)` makes one.',
  'Channels': '`soft.channels.kernel_channels(params)` makes one.',
  'Gates': '`gates.init(structure)` makes them.',
  'Values': '`gates.evaluate(gates, structure)` makes them.',
  'GradientTransformation': 'An optimizer is one, as `optax.adam(1e-3)`.',
}
_OF_ARGUMENTS = {
  'score': (
    'A score is a function of the params, such as `scores.magnitude`; one that '
    'needs a loss or data is drawn outside: `sparsify(None, 0.9)` and '
    '`tx.update(updates, state, params, scores=scores)`.'
  ),
  'distribution': 'Such as `distributions.erk`.',
  'granularity': 'Such as `masks.groups(2, 4)` or `masks.channels()`.',
  'key': '`jax.random.key(0)` makes one.',
  'metadata': "A plan goes as its text: `{'plan': plans.to_json(plan)}`.",
  'capture': 'It is called with the params and a batch.',
}
_NEEDS = {
  'which': 'None, a function (path, leaf) -> bool or rules over paths',
}
_OF_FUNCTIONS = ('scores', 'distributions', 'schedules', 'models', 'pretrained')
_OF_LEAVES = (
  'Keep the arrays of a module apart from all else: '
  '`eqx.partition(model, eqx.is_inexact_array)`, `nnx.split(model)`.'
)


def checked(fn: F) -> F:
  """Returns a function that raises if an argument is not what it is annotated.

  Containers are looked into, iterators are not. Arrays and pytrees are asked
  for no more than a shape and a dtype at each leaf, which costs microseconds,
  and nothing at all where a function is compiled.

  Args:
    fn: a function whose annotations are classes, unions of them, callables,
      collections, literals, or :data:`ARRAYS` beside Any.

  Returns:
    The function, which raises a TypeError of one line with the name of the
    argument, what it must be, what came, and how to get it.

  Examples:
    >>> @checked
    ... def half(x: float) -> float:
    ...   return x / 2
    >>> try:
    ...   half('magnitude')
    ... except TypeError as error:
    ...   print(error)
    `x` must be a number, got 'magnitude'.
  """
  plain: Any = inspect.unwrap(fn)
  parameters = inspect.signature(fn).parameters
  named = {n: p for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
  order = [p for p in named.values() if p.kind is not p.KEYWORD_ONLY]
  more = next((p for p in order if p.kind is p.VAR_POSITIONAL), None)

  def check(args: Sequence[Any], options: Mapping[str, Any]) -> None:
    for parameter, value in itertools.zip_longest(order[: len(args)], args):
      _check(parameter or more, value, named)
    for name, value in options.items():
      if name in named:
        _check(named[name], value, named)

  def call(*args: Any, **options: Any) -> Any:
    check(args, options)
    return fn(*args, **options)

  # Doctest takes a function for one of a module only by its globals.
  held = types.FunctionType(
    call.__code__, plain.__globals__, fn.__name__, None, call.__closure__
  )
  return typing.cast(F, functools.wraps(fn)(held))


def _check(
  parameter: inspect.Parameter | None,
  value: Any,
  named: Mapping[str, inspect.Parameter],
) -> None:
  """Raises if an argument does not fit its annotation."""
  if parameter is None:
    return  # One too many, which the call itself refuses.
  kind = parameter.annotation
  if kind is parameter.empty or value is parameter.default:
    return
  for path, need, what in _misfits(kind, value):
    need = need if path else _NEEDS.get(parameter.name, need)
    line = f'`{parameter.name}{path}` must be {need}, got {shown(what)}.'
    raise TypeError(' '.join([line, *_hints(parameter, path, what, named)]))


def _misfits(kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
  """Yields (where, what is needed, what came) of each fault of an argument."""
  if not _fits(kind, value):
    yield '', described(kind), value
    return
  options = [option for option in _options(kind) if _is_of(option, value)]
  if typing.get_origin(options[0]) is typing.Annotated:
    yield from _odd_leaves(options[0].__metadata__[0], value)
  elif len(_options(kind)) == 1:
    yield from _odd_entries(kind, value)


def _odd_leaves(need: str, value: Any) -> Iterator[tuple[str, str, Any]]:
  """Yields the leaves of a pytree that are none."""
  fits = lambda x: _is_array(x) or (need == NUMBERS and _is_number(complex, x))
  if all(map(fits, jax.tree.leaves(value))):
    return
  flat, _ = jax.tree_util.tree_flatten_with_path(value)
  for path, leaf in flat:
    if not fits(leaf):
      entry = need.replace('a pytree of arrays', 'an array').removesuffix('s')
      yield jax.tree_util.keystr(path), entry if path else need, leaf


def _odd_entries(kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
  """Yields the faults of the entries of a mapping, list or tuple."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  entries: Iterable[tuple[Any, Any, Any]] = ()
  if origin is Mapping and isinstance(value, Mapping):
    entries = ((name, inner[1], entry) for name, entry in value.items())
    odd = [name for name in value if not _fits(inner[0], name)]
    if odd:
      yield '', f'a mapping whose names are {described(inner[0])} each', value
  elif origin in _IN_ORDER and inner and isinstance(value, list | tuple):
    same = origin is not tuple or inner[-1] is Ellipsis
    if not same and len(inner) != len(value):
      yield '', f'{len(inner)} entries', value
      return
    each = [inner[0]] * len(value) if same else inner
    entries = zip(itertools.count(), each, value)
  for name, kind, entry in entries:
    if not _fits(kind, entry):
      yield f'[{name!r}]', described(kind), entry


def _fits(kind: Any, value: Any) -> bool:
  """Whether a value is of a kind, its entries aside."""
  return any(_is_of(option, value) for option in _options(kind))


def _options(kind: Any) -> tuple[Any, ...]:
  """Returns the kinds of which a union is, or the kind itself."""
  union = typing.get_origin(kind) in (typing.Union, types.UnionType)
  return typing.get_args(kind) if union else (kind,)


def _is_of(kind: Any, value: Any) -> bool:
  """Whether a value is of a kind that is no union, its entries aside."""
  origin = typing.get_origin(kind)
  if origin is typing.Annotated:
    return value is not None
  if kind is Any or isinstance(kind, TypeVar | typing.ForwardRef | str):
    return True
  if kind is None or kind is type(None):
    return value is None
  if kind in _NUMBERS:
    return _is_number(kind, value)
  if origin is typing.Literal:
    return isinstance(value, type(typing.get_args(kind)[0]))
  given, kind = kind, origin or kind
  if kind in (jax.Array, np.ndarray):
    return _is_array(value)
  if kind is tuple:
    return isinstance(value, tuple | list)
  if kind is Callable:
    return callable(value) and _takes(value, typing.get_args(given))
  if kind in _MANY:
    many = isinstance(value, kind) or (_is_array(value) and np.ndim(value) > 0)
    inner = typing.get_args(given)
    if isinstance(value, Mapping):  # Of which the names would be taken.
      return many and inner[:1] == (str,)
    return many and not isinstance(value, str | bytes)
  if kind is optax.GradientTransformation:
    return hasattr(value, 'init') and hasattr(value, 'update')
  if getattr(kind, '_is_protocol', False) and kind is not os.PathLike:
    return True
  return isinstance(value, kind)


def _takes(fn: Callable[..., Any], kinds: Sequence[Any]) -> bool:
  """Whether a function can be called with as many arguments as there are."""
  if not kinds or kinds[0] is Ellipsis:
    return True
  try:
    signature = inspect.signature(fn)
  except ValueError:
    return True  # Some functions of C have none.
  try:
    signature.bind(*kinds[0])
  except TypeError:
    return False
  return True


_IN_ORDER = (tuple, Sequence, Collection, Iterable)
_MANY = (Sequence, Collection, Iterable, Container)
_NUMBERS = {
  bool: (bool | np.bool_, np.bool_),
  int: (numbers.Integral, np.integer),
  float: (numbers.Real, np.number),
  complex: (numbers.Complex, np.number),
}


def _is_number(kind: type, value: Any) -> bool:
  plain, dtype = _NUMBERS[kind]
  if isinstance(value, core.Tracer):
    return True
  if _is_array(value):
    return np.ndim(value) == 0 and (
      jax.numpy.issubdtype(value.dtype, dtype) or kind is not bool
    )
  return isinstance(value, plain)


def _is_array(value: Any) -> bool:
  has_shape = hasattr(value, 'shape') and hasattr(value, 'dtype')
  return has_shape and not isinstance(value, type | types.ModuleType)


def described(kind: Any) -> str:
  """Returns what a kind is called in an error.

  Examples:
    >>> described(int | None)
    'an integer'
  """
  options = [option for option in _options(kind) if option is not type(None)]
  if any(option in _NUMBERS for option in options):  # An array is one, too.
    options = [option for option in options if option is not jax.Array]
  if len(options) > 1:
    names = list(dict.fromkeys(map(described, options)))
    return ' or '.join([', '.join(names[:-1]), names[-1]][not names[:-1] :])
  kind = options[0] if options else None
  origin = typing.get_origin(kind)
  if origin is typing.Annotated:
    return kind.__metadata__[0]
  if origin is typing.Literal:
    return ' or '.join(map(repr, typing.get_args(kind)))
  if origin is Callable and typing.get_args(kind)[0] is not Ellipsis:
    count = len(typing.get_args(kind)[0])
    return f'a function of {count} argument{"s" * (count > 1)}'
  plain = origin or kind
  known = {
    None: 'None',
    bool: 'True or False',
    int: 'an integer',
    float: 'a number',
    str: 'a string',
    tuple: 'a tuple',
    Callable: 'a function',
    Mapping: 'a mapping',
    jax.Array: 'an array',
    np.ndarray: 'an array',
    os.PathLike: 'a path',
  }
  if plain in known:
    return known[plain]
  name = getattr(plain, '__name__', str(plain))
  if plain in _MANY:
    inner = typing.get_args(kind)
    what = 'strings' if str in inner else 'entries'
    return f'several {what} in a tuple'
  return f'{_article(name)} {name}'


def shown(value: Any) -> str:
  """Returns what came as an error shows it, in one line.

  Examples:
    >>> shown('magnitude'), shown({}), shown(jax.numpy.zeros(3)), shown(len)
    ("'magnitude'", 'an empty dict', 'float32[3]', 'the function len(obj)')
  """
  if isinstance(value, types.ModuleType):
    return f'the module {value.__name__}'
  if isinstance(value, str | numbers.Number | None):
    text = repr(value)
    return text if len(text) < 60 else f'{text[:50]}...'
  if hasattr(value, 'shape') and hasattr(value, 'dtype'):
    return f'{value.dtype}{list(value.shape)}'
  name = type(value).__name__
  if isinstance(value, list | tuple | dict | set) and name in _CONTAINERS:
    return f'a {name} of {len(value)}' if value else f'an empty {name}'
  if callable(value) and hasattr(value, '__name__'):
    if isinstance(value, type):
      return f'the class {value.__name__}'
    return f'the function {value.__name__}{_needs(value)}'
  return f'{_article(name)} {name}'


def _needs(fn: Callable[..., Any]) -> str:
  """Returns the arguments that a function must have, as a text."""
  try:
    parameters = inspect.signature(fn).parameters.values()
  except (TypeError, ValueError):
    return ''
  many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  names = [
    p.name for p in parameters if p.default is p.empty and p.kind not in many
  ]
  return f'({", ".join(names)})'


_CONTAINERS = ('list', 'tuple', 'dict', 'set')


def _article(name: str) -> str:
  return 'an' if name[:1] in 'AEIOaeio' else 'a'


def _hints(
  parameter: inspect.Parameter,
  path: str,
  value: Any,
  named: Mapping[str, inspect.Parameter],
) -> Iterator[str]:
  """Yields what may help: a swap, the function of a name, who makes one."""
  kind = parameter.annotation
  for name, other in ((n, p.annotation) for n, p in named.items()):
    is_own = _is_class(other) and other is not kind
    if not path and is_own and isinstance(value, other):
      yield f'It fits `{name}`: are the two swapped?'
      return
  remedies = [_REMEDIES.get(getattr(k, '__name__', '')) for k in _options(kind)]
  if path and described(kind) in (ARRAYS, NUMBERS) and callable(value):
    remedies = [_OF_LEAVES]
  elif not any(remedies):
    remedies = [_OF_ARGUMENTS.get(parameter.name)]
  if isinstance(value, str) and 'function' in described(kind):
    modules = {m: sys.modules.get(f'jaxprune.{m}') for m in _OF_FUNCTIONS}
    owners = [m for m, module in modules.items() if hasattr(module, value)]
    if owners:
      remedies = [f'Give the function itself, `{owners[0]}.{value}`.']
  yield from filter(None, remedies)


def _is_class(kind: Any) -> bool:
  """Whether a kind is a class of one purpose, as a graph or a plan is."""
  return isinstance(kind, type) and kind.__module__.startswith('jaxprune')
