"""Params as safetensors files: names, shapes, bytes, and the plan beside them.

The format is written by its definition: eight bytes with the length of a JSON
header, the header with dtype, shape and byte range of each array, the bytes.
Any reader of it can read what is written here, and :func:`load_safetensors`
what others wrote.
"""

import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.io import pretrained
from jaxprune.io.stablehlo import write

_NAMES = {
  'bool': 'BOOL',
  'uint8': 'U8',
  'int8': 'I8',
  'int16': 'I16',
  'int32': 'I32',
  'int64': 'I64',
  'float16': 'F16',
  'bfloat16': 'BF16',
  'float32': 'F32',
  'float64': 'F64',
}


@kinds.checked
def save_safetensors(
  path: str | os.PathLike,
  params: tree.PyTree,
  metadata: Mapping[str, str] | None = None,
) -> int:
  """Writes the arrays of a pytree as a safetensors file.

  An array has the name of its path, such as ``params/conv/kernel``. The same
  arrays give the same bytes. A plan goes into the metadata: ``{'plan':
  plans.to_json(plan)}``. The file appears whole or not at all.

  Args:
    path: of the file.
    params: a pytree of arrays.
    metadata: texts by name.

  Returns:
    The size of the file in bytes.

  Raises:
    TypeError: if a leaf has a dtype that the format does not know, such as a
      typed key; if a metadata is no text.
    ValueError: if the path does not end in ``.safetensors``.

  Examples:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = f'{folder}/a.safetensors'
    ...   size = save_safetensors(path, {'a': jnp.ones(2)}, {'by': 'hand'})
    ...   arrays, metadata = load_safetensors(path)
    ...   print(arrays['a'], metadata)
    [1. 1.] {'by': 'hand'}
  """
  if not os.fspath(path).endswith('.safetensors'):
    raise ValueError(f'The file must end in .safetensors, got {path}.')
  metadata = dict(metadata or {})
  texts = [name for name, text in metadata.items() if not isinstance(text, str)]
  if texts:
    raise TypeError(
      f'Metadata must be texts, got {metadata[texts[0]]!r} for {texts[0]!r}.'
    )
  header: dict[str, Any] = {'__metadata__': metadata} if metadata else {}
  body, start = [], 0
  for name, leaf in sorted(tree.leaves(params).items()):
    dtype = str(jnp.result_type(leaf))
    if dtype not in _NAMES:
      raise TypeError(
        f'Leaf {name!r} has dtype {dtype}, which safetensors does not know; '
        f'leave it out, or store jax.random.key_data of a key.'
      )
    array = np.asarray(leaf, order='C')
    header[name] = {
      'dtype': _NAMES[dtype],
      'shape': list(array.shape),
      'data_offsets': [start, start + array.nbytes],
    }
    start += array.nbytes
    body.append(array.tobytes())
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # The arrays begin at a multiple of 8.
  return write(path, b''.join([struct.pack('<Q', len(text)), text, *body]))


@kinds.checked
def load_safetensors(
  path: str | os.PathLike, template: tree.PyTree | None = None
) -> tuple[tree.PyTree, dict[str, str]]:
  """Returns the arrays and the metadata of a safetensors file.

  Args:
    path: of the file.
    template: a pytree of arrays or ``jax.ShapeDtypeStruct`` to fill.

  Returns:
    The arrays, of NumPy, by name or in the structure of the template; the
    metadata.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is damaged, or an array of the template is missing
      or has another shape or dtype; each is named.
  """
  arrays = pretrained.read(path)
  with open(path, 'rb') as file:
    (length,) = struct.unpack('<Q', file.read(8))
    metadata = json.loads(file.read(length)).get('__metadata__', {})
  if template is None:
    return arrays, metadata
  spec = lambda x: f'{jnp.result_type(x)}{list(np.shape(x))}'
  wrong = []
  for name, leaf in tree.leaves(template).items():
    wanted = f'{leaf.dtype}{list(leaf.shape)}'
    found = spec(arrays[name]) if name in arrays else 'none'
    if wanted != found:
      wrong.append(f'{name!r} must be {wanted}, got {found}')
  if wrong:
    raise ValueError(f'{path} does not fit: {"; ".join(wrong)}.')
  filled = tree.map_with_path(lambda name, _: arrays[name], template)
  return filled, metadata
