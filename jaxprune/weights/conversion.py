"""Arrays under the names and in the layout of another library, as ours."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.weights.names import Named, Names

PyTree = Any
Arrays = Mapping[str, np.ndarray]


def from_torch(
  arrays: Arrays,
  like: PyTree,
  names: Names,
  *,
  ignore: Sequence[str] = (),
  keep: Sequence[str] = (),
) -> PyTree:
  """Returns the variables of a network from a PyTorch state dict.

  A convolution OIHW becomes HWIO and a dense layer OI becomes IO; if it reads a
  flattened feature map, its inputs are reordered from CHW to HWC. A leading
  ``module.`` and counters of batches and positions are dropped; ``gamma`` and
  ``beta`` are read as ``weight`` and ``bias``.

  Args:
    arrays: name -> array, such as :func:`read` gives.
    like: variables of the network, or their shapes by ``jax.eval_shape``.
    names: a function of this module, such as :func:`torch_resnet`.
    ignore: regular expressions over whole names to leave unused, such as
      ``'aux.*'``.
    keep: regular expressions over whole paths to take from ``like``, such as
      ``'params/head/.*'`` for another number of classes.

  Returns:
    pytree like ``like``, of jax arrays with its dtypes.

  Raises:
    ValueError: if a name is missing or left over, or an array has another
      shape, a value that is not finite or one that the dtype of ``like`` would
      round, all of them listed; if two names become one; if a rule of
      ``ignore`` or ``keep`` matches nothing.
    TypeError: if arrays are no floats, in the same list, or if ``keep`` meets a
      leaf of ``like`` that is a shape without values.
  """
  counters = ('num_batches_tracked', 'position_ids')
  weights = {k: x for k, x in arrays.items() if not k.endswith(counters)}
  found = _renamed(weights, _torch_name)
  return _convert(found, like, names, _torch_leaf, _from_torch, ignore, keep)


def from_keras(
  arrays: Arrays,
  like: PyTree,
  names: Names,
  *,
  ignore: Sequence[str] = (),
  keep: Sequence[str] = (),
) -> PyTree:
  """Returns the variables of a network from the weights of a Keras model.

  Names are ``layer/weight``, such as ``conv_dw_1/depthwise_kernel``; a trailing
  ``:0`` is dropped. A depthwise kernel HWC1 becomes HW1C.

  Args:
    arrays: name -> array, such as :func:`read` gives.
    like: variables of the network, or their shapes by ``jax.eval_shape``.
    names: :func:`keras_mobilenet_v1`, ``_v2`` or ``_v3``.
    ignore: regular expressions over whole names to leave unused.
    keep: regular expressions over whole paths to take from ``like``.

  Returns:
    pytree like ``like``, of jax arrays with its dtypes.

  Raises:
    ValueError: as :func:`from_torch`.
    TypeError: as :func:`from_torch`.
  """
  found = _renamed(arrays, lambda name: name.removesuffix(':0'))
  return _convert(found, like, names, _keras_leaf, _from_keras, ignore, keep)


def to_torch(variables: PyTree, names: Names) -> dict[str, np.ndarray]:
  """Returns a PyTorch state dict: the inverse of :func:`from_torch`.

  Args:
    variables: variables of a network; a shrunk one keeps its names.
    names: a function of this module, such as :func:`torch_resnet`.

  Returns:
    name -> array, in PyTorch's layout, without counters of batches.

  Raises:
    ValueError: if ``names`` has no name for a layer; all such are listed.
  """
  leaves = tree.leaves(variables)
  known = names(_layers(leaves))
  lost = [path for path in leaves if _split(path)[0] not in known]
  if lost:
    raise ValueError(f'No name is known for {_list(lost)}.')
  found = {}
  for path, leaf in leaves.items():
    layer, kind = _split(path)
    their = known[layer]
    array = np.asarray(leaf)
    if kind == 'kernel':
      array = _to_torch(array, their)
    found[_torch_leaf(their.name, layer, kind)] = array
  return found


def _convert(
  arrays: Arrays,
  like: PyTree,
  names: Names,
  leaf_name: Callable[[str, str, str], str],
  layout: Callable[[np.ndarray, Named, str], np.ndarray],
  ignore: Sequence[str],
  keep: Sequence[str],
) -> PyTree:
  leaves = tree.leaves(like)
  known = names(_layers(leaves))
  kept = tree.match(dict.fromkeys(keep, True), leaves, False)
  ignored = tree.match(dict.fromkeys(ignore, True), arrays, False)
  taken, used = {}, set()
  missing, wrong, other, infinite, rounded = [], [], [], [], []
  for path, leaf in leaves.items():
    if kept[path]:
      taken[path] = _as_array(path, leaf)
      continue
    layer, kind = _split(path)
    their = known.get(layer)
    if their is None:
      missing.append(f'{path} (no name is known)')
      continue
    name = leaf_name(their.name, layer, kind)
    if name not in arrays:
      missing.append(f'{name} (for {path})')
      continue
    used.add(name)
    array = np.asarray(arrays[name])
    if not jnp.issubdtype(array.dtype, jnp.floating):
      other.append(f'{name} {array.dtype}')
      continue
    try:
      ours = layout(array, their, layer) if kind == 'kernel' else array
    except ValueError:
      ours = array
    if ours.shape != tuple(leaf.shape):
      wrong.append(f'{name} {array.shape} for {path} {tuple(leaf.shape)}')
    elif not np.all(np.isfinite(ours)):
      infinite.append(name)
    elif not _exact(ours, leaf.dtype):
      rounded.append(f'{name} {array.dtype} for {path} {leaf.dtype}')
    else:
      taken[path] = jnp.asarray(ours, leaf.dtype)
  left = [name for name in arrays if name not in used and not ignored[name]]
  faults = [
    f'{what}: {_list(which)}'
    for what, which in (
      ('missing', missing),
      ('left over', left),
      ('of another shape', wrong),
      ('no floats', other),
      ('not finite', infinite),
      ('rounded by the dtype', rounded),
    )
    if which
  ]
  if faults:
    error = TypeError if other else ValueError
    raise error(
      f'The weights do not fit the network. {". ".join(faults)}. Check the '
      f'network and its arguments; `ignore` leaves names unused, `keep` takes '
      f'leaves from `like`.'
    )
  return tree.map_with_path(lambda path, _: taken[path], like)


def _renamed(arrays: Arrays, rename: Callable[[str], str]) -> Arrays:
  """Returns the arrays under new names, of which no two may be the same."""
  found: dict[str, str] = {}
  pairs = [
    f'{found[new]} and {old}'
    for old in arrays
    if found.setdefault(new := rename(old), old) != old
  ]
  if pairs:
    raise ValueError(
      f'Two arrays are of one name in the network: {_list(pairs)}. Remove one '
      f'of each.'
    )
  return {new: arrays[old] for new, old in found.items()}


def _exact(array: np.ndarray, dtype: Any) -> bool:
  """Returns whether finite values are the same in another dtype."""
  if array.dtype == dtype:
    return True
  with np.errstate(over='ignore'):
    return np.array_equal(array.astype(dtype).astype(array.dtype), array)


def _as_array(path: str, leaf: Any) -> jax.Array:
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise TypeError(
      f'`keep` matches {path!r}, of which `like` has only the shape. Give the '
      f'variables that model.init returns, not those of jax.eval_shape.'
    )
  return jnp.asarray(leaf)


def _layers(leaves: Mapping[str, Any]) -> dict[str, int]:
  """Returns our layers in order, with the length of the last axis of each."""
  return {_split(path)[0]: leaf.shape[-1] for path, leaf in leaves.items()}


def _split(path: str) -> tuple[str, str]:
  """Returns the layer and the kind of a leaf of variables.

  Examples:
    >>> _split('params/stage1_block1/conv1/kernel')
    ('stage1_block1/conv1', 'kernel')
  """
  _, _, rest = path.partition('/')
  layer, _, kind = rest.rpartition('/')
  return layer, kind


def _list(names: Sequence[str]) -> str:
  return ', '.join(names)


def _torch_name(name: str) -> str:
  name = name.removeprefix('module.')
  return re.sub(
    r'\.(gamma|beta)$',
    lambda match: '.weight' if match[1] == 'gamma' else '.bias',
    name,
  )


def _torch_leaf(name: str, layer: str, kind: str) -> str:
  kinds = {'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
  return f'{name}.{kinds.get(kind, "weight")}'


def _from_torch(array: np.ndarray, their: Named, layer: str) -> np.ndarray:
  """Returns a kernel HWIO or IO of one OIHW or OI."""
  if array.ndim == 2 and their.flattened and not their.side:
    array = array.reshape(len(array), their.flattened, -1)
    return array.transpose(2, 1, 0).reshape(-1, len(array))
  if array.ndim == 2 and not their.side:
    return array.T
  if array.ndim != 4 or their.side not in (0, array.shape[-1]):
    raise ValueError('No kernel of a convolution.')
  kernel = array.transpose(2, 3, 1, 0)
  return kernel.reshape(-1, len(array)) if their.side else kernel


def _to_torch(array: np.ndarray, their: Named) -> np.ndarray:
  """Returns a kernel OIHW or OI of one HWIO or IO."""
  if array.ndim == 4:
    return array.transpose(3, 2, 0, 1)
  outputs = array.shape[-1]
  if their.side:
    array = array.reshape(their.side, their.side, -1, outputs)
    return array.transpose(3, 2, 0, 1)
  if their.flattened:
    array = array.reshape(-1, their.flattened, outputs)
    return array.transpose(2, 1, 0).reshape(outputs, -1)
  return array.T


def _keras_leaf(name: str, layer: str, kind: str) -> str:
  if layer.endswith('norm'):
    kinds = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean'}
    return f'{name}/{kinds.get(kind, "moving_variance")}'
  if layer.endswith('depthwise'):
    return f'{name}/depthwise_kernel'
  return f'{name}/{kind}'


def _from_keras(array: np.ndarray, their: Named, layer: str) -> np.ndarray:
  """Returns a kernel of our shape of one HWIO, HWC1 or IO."""
  if layer.endswith('depthwise'):
    return array.transpose(0, 1, 3, 2)
  if their.side and array.ndim == 4:
    return array.reshape(-1, array.shape[-1])
  return array
