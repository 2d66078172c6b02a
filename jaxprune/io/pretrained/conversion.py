"""Arrays under the names and in the layout of another library, as ours."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.io.pretrained import faults, prefixes
from jaxprune.io.pretrained.names import Named, Names

PyTree = tree.Arrays
Arrays = Mapping[str, np.ndarray]


class _Library(NamedTuple):
  """How a library names and lays out the arrays of its layers."""

  separator: str  # Between the layers of a name.
  # Its layer, our layer, our kind of array -> its name of the array.
  leaf_name: Callable[[str, str, str], str]
  # A kernel of its layout, its layer, our layer -> the kernel in our layout.
  to_ours: Callable[[np.ndarray, Named, str], np.ndarray]
  # And back.
  to_theirs: Callable[[np.ndarray, Named, str], np.ndarray]


@kinds.checked
def from_torch(
  arrays: Arrays,
  like: PyTree,
  names: Names,
  *,
  ignore: Sequence[str] = (),
  keep: Sequence[str] = (),
  allow_rounding: bool = False,
) -> PyTree:
  """Returns the variables of a network from a PyTorch state dict.

  A convolution OIHW becomes HWIO and a dense layer OI becomes IO; if it reads a
  flattened feature map, its inputs are reordered from CHW to HWC. Counters of
  batches and positions are dropped; ``gamma`` and ``beta`` are read as
  ``weight`` and ``bias``.

  What wraps a network may stay in the names: ``module.`` and ``_orig_mod.``
  anywhere, and any prefix, such as ``model.`` or ``backbone.``, under which all
  names of the network are found. Of a network pruned by
  ``torch.nn.utils.prune`` the weights are ``weight_orig`` where ``weight_mask``
  is 1 and zero where it is 0: what the network computes with. The masks are
  then ``jax.tree.map(lambda w: w != 0, params)``.

  Args:
    arrays: name -> array, such as :func:`read` gives.
    like: variables of the network, or their shapes by ``jax.eval_shape``.
    names: a function of this module, such as :func:`torch_resnet`.
    ignore: regular expressions over whole names to leave unused, such as
      ``'aux.*'``; with or without the prefix of the network.
    keep: regular expressions over whole paths to take from ``like``, such as
      ``'params/head/.*'`` for another number of classes.
    allow_rounding: whether values may be rounded to the dtype of ``like``, such
      as those of a float32 file to bfloat16; to the nearest, ties to even.

  Returns:
    pytree like ``like``, of jax arrays with its dtypes.

  Raises:
    ValueError: if a name is missing or left over, or an array has another
      shape, the layout of another library, a value that is not finite or one
      that the dtype of ``like`` would round, each kind listed (and counted
      where there are many); if two names become one, or the network is there
      under two prefixes; if a mask is not of 0 and 1; if a rule of ``ignore``
      or ``keep`` matches nothing.
    TypeError: if arrays are no floats, in the same list, or if ``keep`` meets a
      leaf of ``like`` that is a shape without values.
  """
  counters = ('num_batches_tracked', 'position_ids')
  weights = {k: x for k, x in arrays.items() if not k.endswith(counters)}
  weights = _masked(_renamed(weights, _torch_name))
  return _convert(weights, like, names, _TORCH, ignore, keep, allow_rounding)


@kinds.checked
def from_keras(
  arrays: Arrays,
  like: PyTree,
  names: Names,
  *,
  ignore: Sequence[str] = (),
  keep: Sequence[str] = (),
  allow_rounding: bool = False,
) -> PyTree:
  """Returns the variables of a network from the weights of a Keras model.

  Names are ``layer/weight``, such as ``conv_dw_1/depthwise_kernel``, all under
  one prefix if there is one; a trailing ``:0`` is dropped. A depthwise kernel
  HWC1 becomes HW1C.

  Args:
    arrays: name -> array, such as :func:`read` gives.
    like: variables of the network, or their shapes by ``jax.eval_shape``.
    names: :func:`keras_mobilenet_v1`, ``_v2`` or ``_v3``.
    ignore: regular expressions over whole names to leave unused.
    keep: regular expressions over whole paths to take from ``like``.
    allow_rounding: as in :func:`from_torch`.

  Returns:
    pytree like ``like``, of jax arrays with its dtypes.

  Raises:
    ValueError: as :func:`from_torch`.
    TypeError: as :func:`from_torch`.
  """
  weights = _renamed(arrays, lambda name: name.removesuffix(':0'))
  return _convert(weights, like, names, _KERAS, ignore, keep, allow_rounding)


@kinds.checked
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
  their_layers = names(_layers(leaves))
  unnamed = [path for path in leaves if _split(path)[0] not in their_layers]
  if unnamed:
    raise ValueError(f'No name is known for {faults.summary(unnamed, "/")}.')
  state = {}
  for path, leaf in leaves.items():
    layer, kind = _split(path)
    their_layer = their_layers[layer]
    array = np.asarray(leaf)
    if kind == 'kernel':
      array = _to_torch(array, their_layer, layer)
    state[_torch_leaf(their_layer.name, layer, kind)] = array
  return state


def _convert(
  arrays: Arrays,
  like: PyTree,
  names: Names,
  library: _Library,
  ignore: Sequence[str],
  keep: Sequence[str],
  allow_rounding: bool,
) -> PyTree:
  """Returns variables from the arrays of a library, or lists all faults."""
  leaves = tree.leaves(like)
  is_kept = tree.match(dict.fromkeys(keep, True), leaves, False)
  their_layers = names(_layers(leaves))
  wrong: dict[str, list[str]] = {kind: [] for kind in faults.REMEDIES}
  expected = {}  # Path -> the name that the library has for it.
  for path in leaves:
    layer, kind = _split(path)
    if is_kept[path]:
      continue
    if layer in their_layers:
      their_name = their_layers[layer].name
      expected[path] = library.leaf_name(their_name, layer, kind)
    else:
      wrong['missing'].append(f'{path} (no name is known)')
  prefix, their_names = prefixes.locate(
    arrays, expected, library.separator, ignore
  )
  converted = {}
  for path, leaf in leaves.items():
    if is_kept[path]:
      converted[path] = _as_array(path, leaf)
    elif path in their_names and their_names[path] not in arrays:
      wrong['missing'].append(f'{their_names[path]} (for {path})')
    elif path in their_names:
      array = np.asarray(arrays[their_names[path]])
      fault, ours = _converted(
        array, path, leaf, their_layers, library, allow_rounding
      )
      if fault:
        wrong[fault].append(f'{their_names[path]} {ours}'.rstrip())
      else:
        converted[path] = jnp.asarray(ours, leaf.dtype)
  short = {name: name.removeprefix(prefix) for name in arrays}
  rules = dict.fromkeys(ignore, True)
  is_ignored = tree.match(rules, {*short.values(), *short}, False, 'name')
  used = set(their_names.values())
  wrong['left over'] = [
    name
    for name in arrays
    if name not in used and not (is_ignored[name] or is_ignored[short[name]])
  ]
  faults.check(wrong, library.separator)
  return tree.map_with_path(lambda path, _: converted[path], like)


def _converted(
  array: np.ndarray,
  path: str,
  leaf: Any,
  their_layers: Mapping[str, Named],
  library: _Library,
  allow_rounding: bool,
) -> tuple[str, Any]:
  """Returns ('', the array in our layout), or (a fault, its description)."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return 'no floats', array.dtype
  layer, kind = _split(path)
  shape, ours = tuple(leaf.shape), array
  wanted = shape  # As the library lays it out.
  if kind == 'kernel':
    try:
      blank = np.broadcast_to(np.float32(0), shape)
      wanted = library.to_theirs(blank, their_layers[layer], layer).shape
      ours = library.to_ours(array, their_layers[layer], layer)
    except ValueError:
      ours = None  # It is no kernel of such a layer.
  if ours is None or ours.shape != shape:
    # The sizes of a kernel in another order: it was laid out by someone else.
    is_turned = array.ndim > 1 and sorted(array.shape) == sorted(wanted)
    if is_turned and array.shape != wanted:
      return 'transposed', f'{array.shape}, not {wanted}, for {path}'
    return 'of another shape', f'{array.shape} for {path} {shape}'
  if not np.all(np.isfinite(ours)):
    return 'not finite', ''
  if not _exact(ours, leaf.dtype):
    if not allow_rounding:
      return 'rounded by the dtype', f'{array.dtype} for {path} {leaf.dtype}'
    with np.errstate(over='ignore'):
      if not np.all(np.isfinite(ours.astype(leaf.dtype))):
        return 'beyond the dtype', f'{array.dtype} for {path} {leaf.dtype}'
  return '', ours


def _renamed(arrays: Arrays, rename: Callable[[str], str]) -> Arrays:
  """Returns the arrays under new names, of which no two may be the same."""
  old_names: dict[str, str] = {}
  pairs = [
    f'{old_names[new]} and {old}'
    for old in arrays
    if old_names.setdefault(new := rename(old), old) != old
  ]
  if pairs:
    listed = faults.summary(pairs, '.')
    raise ValueError(
      f'Two arrays are of one name in the network: {listed}. Remove one of '
      f'each.'
    )
  return {new: arrays[old] for new, old in old_names.items()}


def _masked(arrays: Arrays) -> Arrays:
  """Returns the arrays with each ``x_orig`` times ``x_mask`` as ``x``."""
  products = {}
  for name, mask in arrays.items():
    stem = name.removesuffix('_mask')
    if stem == name or f'{stem}_orig' not in arrays:
      continue
    weight, mask = np.asarray(arrays[f'{stem}_orig']), np.asarray(mask)
    if mask.shape != weight.shape or not np.all((mask == 0) | (mask == 1)):
      raise ValueError(
        f'{name} must hold 0 and 1 in the shape {weight.shape} of {stem}_orig, '
        f'got {mask.dtype}{list(mask.shape)} of other values or shape.'
      )
    if stem in arrays:
      raise ValueError(
        f'The file has {stem} and also {stem}_orig and {name}: remove one of '
        f'them, or remove the pruning by torch.nn.utils.prune.remove.'
      )
    # Chosen, not multiplied: a pruned infinity is 0.
    products[stem] = np.where(mask == 1, weight, np.zeros((), weight.dtype))
  ends = ('_orig', '_mask')
  is_joined = lambda name: name.endswith(ends) and name[:-5] in products
  unpaired = {name: x for name, x in arrays.items() if not is_joined(name)}
  return unpaired | products


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
  _, _, leaf = path.partition('/')
  layer, _, kind = leaf.rpartition('/')
  return layer, kind


# Modules that wrap another one and add their name to all of its names.
_WRAPPERS = (
  r'(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)'
)


def _torch_name(name: str) -> str:
  """Returns a name without the modules that wrap others, and of our time.

  Examples:
    >>> _torch_name('module._orig_mod.encoder.module.norm.gamma')
    'encoder.norm.weight'
  """
  name = re.sub(rf'(?<![^.]){_WRAPPERS}\.', '', name)
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


def _to_torch(array: np.ndarray, their: Named, layer: str) -> np.ndarray:
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


def _to_keras(array: np.ndarray, their: Named, layer: str) -> np.ndarray:
  """Returns a kernel HWIO, HWC1 or IO of one of our shape."""
  if layer.endswith('depthwise'):
    return array.transpose(0, 1, 3, 2)
  if their.side:
    return array.reshape(their.side, their.side, -1, array.shape[-1])
  return array


_TORCH = _Library('.', _torch_leaf, _from_torch, _to_torch)
_KERAS = _Library('/', _keras_leaf, _from_keras, _to_keras)
