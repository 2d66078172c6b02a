"""Reads arrays and configurations of other libraries from files."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.checks import kinds


@kinds.checked
def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Returns the arrays of a ``.npz`` or ``.safetensors`` file by name.

  The format of safetensors is read here, without its library: 8 bytes with the
  length of a JSON header, the header with dtype, shape and byte range of each
  array, the bytes. Arrays are views of the mapped file.

  Args:
    path: a file, its ending in either case; pickles are refused.

  Raises:
    ValueError: if the file is of another kind (with a line that converts it),
      damaged, or has an array of an unknown dtype; it is named.
    FileNotFoundError: if there is none.
  """
  path = os.fspath(path)
  kind = path.lower()
  if kind.endswith('.npz'):
    try:
      return _read_npz(path)
    except FileNotFoundError:
      raise
    except Exception as error:  # Whatever is raised by zip, zlib and parsers.
      raise ValueError(f'{path!r} is no whole .npz file: {error}.') from error
  if kind.endswith('.safetensors'):
    return _read_safetensors(path)
  remedy = next(
    (text for ends, text in _CONVERSIONS.items() if kind.endswith(ends)),
    'Save its arrays by numpy.savez(path, **arrays).',
  )
  raise ValueError(f'{path!r} must end in .npz or .safetensors. {remedy}')


# Endings of other files -> how to make one of ours of them, in one line.
_CONVERSIONS = {
  ('.pt', '.pth', '.bin', '.ckpt', '.pth.tar'): (
    "In PyTorch: numpy.savez('a.npz', **{k: x.float().numpy() for k, x in "
    "torch.load(path, map_location='cpu', weights_only=True).items()}); take "
    "its entry 'state_dict' or 'model' first if it has one."
  ),
  ('.h5', '.hdf5', '.keras'): (
    "In Keras: numpy.savez('a.npz', **{w.path: w.numpy() for w in "
    'keras.saving.load_model(path).weights}); of a file of weights alone, '
    'build the model and call load_weights first.'
  ),
  ('.msgpack',): (
    'It holds the variables of a Flax network, in our layout: '
    'flax.serialization.msgpack_restore(open(path, "rb").read()) returns them.'
  ),
  ('.npy',): (
    'A .npy is a single array: name it by '
    "numpy.savez('a.npz', **{name: numpy.load(path)})."
  ),
  ('.safetensors.index.json',): (
    'It is a list of the files that hold the arrays: read each, and join what '
    'they return by `|`.'
  ),
}


@kinds.checked
def bert_options(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the keywords of ``models.BERT`` for a Hugging Face ``config.json``.

  Args:
    config: the file, as ``json.load`` gives it.

  Raises:
    ValueError: if a key is missing, or if the model is not BERT as we have it:
      another type, activation or kind of positions.

  Examples:
    >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2,
    ...              num_attention_heads=4, intermediate_size=16,
    ...              max_position_embeddings=5, type_vocab_size=2)
    >>> bert_options(sizes | {'id2label': {'0': 'a', '1': 'b', '2': 'c'}})[
    ...     'num_classes']
    3
  """
  expected = {
    'model_type': 'bert',
    'hidden_act': 'gelu',
    'position_embedding_type': 'absolute',
  }
  for key, value in expected.items():
    if config.get(key, value) != value:
      raise ValueError(
        f'The config must have {key} {value!r}, got {config[key]!r}.'
      )
  keys = {
    'vocab_size': 'vocab_size',
    'hidden': 'hidden_size',
    'depth': 'num_hidden_layers',
    'heads': 'num_attention_heads',
    'intermediate': 'intermediate_size',
    'positions': 'max_position_embeddings',
    'types': 'type_vocab_size',
  }
  lost = [key for key in keys.values() if key not in config]
  if lost:
    raise ValueError(f'The config of a BERT lacks {", ".join(lost)}.')
  labels = config.get('id2label')
  return {
    **{ours: config[theirs] for ours, theirs in keys.items()},
    'num_classes': len(labels) if labels else config.get('num_labels', 2),
    'dropout': config.get('hidden_dropout_prob', 0.1),
    'epsilon': config.get('layer_norm_eps', 1e-12),
  }


_DTYPES = {
  'BOOL': np.bool_,
  'U8': np.uint8,
  'I8': np.int8,
  'I16': np.int16,
  'I32': np.int32,
  'I64': np.int64,
  'F16': np.float16,
  'BF16': jnp.bfloat16,
  'F32': np.float32,
  'F64': np.float64,
}


def _read_npz(path: str) -> dict[str, np.ndarray]:
  file = np.load(path, allow_pickle=False)
  if not isinstance(file, np.lib.npyio.NpzFile):
    raise ValueError('it is a single array')
  with file:
    arrays = {name: file[name] for name in file.files}
  for name, array in arrays.items():
    if not isinstance(array, np.ndarray):
      raise ValueError(f'its {name!r} is no array')
  return arrays


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
  data = np.memmap(path, np.uint8, 'r') if os.path.getsize(path) else b''
  length = int.from_bytes(bytes(data[:8]), 'little')
  if len(data) < 8 or length > len(data) - 8:
    raise ValueError(f'{path!r} is no whole .safetensors file.')
  try:
    header = json.loads(bytes(data[8 : 8 + length]))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path!r} has a damaged header: {error}.') from error
  if not isinstance(header, dict):
    raise ValueError(f'{path!r} has a damaged header: it is no object.')
  header.pop('__metadata__', None)
  body = data[8 + length :]
  arrays = {
    name: _tensor(path, name, entry, body) for name, entry in header.items()
  }
  end = 0
  for start, stop in sorted(e['data_offsets'] for e in header.values()):
    if start != end:
      raise ValueError(
        f'{path!r} is damaged: its arrays must lie one after another, but one '
        f'ends at byte {end} and the next begins at {start}.'
      )
    end = stop
  if end != len(body):
    raise ValueError(
      f'{path!r} is damaged: its arrays end at byte {end} of {len(body)}.'
    )
  return arrays


def _tensor(path: str, name: str, entry: Any, body: Any) -> np.ndarray:
  """Returns the array of an entry of the header, a view of the body."""
  counts = lambda x: (
    isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)
  )
  fields: Any = entry if isinstance(entry, dict) else {}
  kind, shape = fields.get('dtype'), fields.get('shape')
  span = fields.get('data_offsets')
  is_complete = isinstance(kind, str) and counts(shape) and counts(span)
  if not is_complete or len(span) != 2:
    raise ValueError(
      f'{path!r} has a damaged header: {name!r} must have a dtype, a shape and '
      f'two data_offsets, got {entry!r}.'
    )
  if kind not in _DTYPES:
    raise ValueError(
      f'{name!r} in {path!r} has the dtype {kind!r}; known are '
      f'{", ".join(_DTYPES)}.'
    )
  start, stop = span
  size = math.prod(shape) * np.dtype(_DTYPES[kind]).itemsize
  if not start <= stop <= len(body) or stop - start != size:
    raise ValueError(
      f'{name!r} in {path!r} must have {size} bytes, its range is '
      f'{start} to {stop} of {len(body)}: the file is damaged.'
    )
  return body[start:stop].view(_DTYPES[kind]).reshape(shape)
