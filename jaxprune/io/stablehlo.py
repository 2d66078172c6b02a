"""Functions as StableHLO files that run without the Python that made them.

The weights are part of the file, the batch size is not: one file serves any
batch on any of its platforms. What reads it is JAX alone, through :func:`load`
or through ``jax.export.deserialize`` of the file's bytes; no class of the model
is needed.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export

from jaxprune import tree
from jaxprune.checks import extras, kinds

_SEAL = b'sha256:'  # Ends the file; what a reader of the format passes over.
_SIZE = len(_SEAL) + 32
PLATFORMS = ('cpu', 'cuda', 'tpu')


@kinds.checked
def save_stablehlo(
  path: str | os.PathLike,
  fn: Callable[..., Any],
  *args: Any,
  batch: str | None = 'batch',
  platforms: Sequence[str] = PLATFORMS,
) -> int:
  """Writes a function as a StableHLO file; the arrays it closes over with it.

  To bake the weights in, close over them: ``save(path, lambda x: apply(params,
  x), x)``. The file appears whole or not at all, and ends in its sha256.

  Args:
    path: of the file.
    fn: a pure function of arrays; jitted here.
    *args: what it is called with: pytrees of arrays or of
      ``jax.ShapeDtypeStruct``, of which only shapes and dtypes count.
    batch: a name for the first axis of every array, whose length is then left
      open; None to fix all shapes as they are.
    platforms: where the file is to run, such as ``('cpu',)``.

  Returns:
    The size of the file in bytes.

  Raises:
    MissingExtraError: if flatbuffers is not installed.
    ValueError: if ``args`` hold no array, if one has no axis to leave open, or
      if a platform is unknown.

  Examples:
    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = f'{folder}/double'
    ...   size = save_stablehlo(path, lambda x: 2 * x, jnp.zeros((1, 2)))
    ...   print(load_stablehlo(path)(jnp.ones((3, 2))))
    [[2. 2.]
     [2. 2.]
     [2. 2.]]
  """
  extras.require('flatbuffers')  # JAX, which does not declare it, writes by it.
  unknown = sorted(set(platforms) - {*PLATFORMS, 'rocm'})
  if unknown or not platforms:
    raise ValueError(
      f'`platforms` must be some of {", ".join((*PLATFORMS, "rocm"))}, got '
      f'{", ".join(unknown) or "none"}.'
    )
  shapes = open_batch(args, batch)
  exported = export.export(jax.jit(fn), platforms=tuple(platforms))(*shapes)
  content = bytes(exported.serialize())
  sealed = content + _SEAL + hashlib.sha256(content).digest()
  return write(path, sealed)


@kinds.checked
def load_stablehlo(path: str | os.PathLike) -> Callable[..., Any]:
  """Returns the function that :func:`save` wrote; it may be jitted.

  Args:
    path: of the file.

  Raises:
    MissingExtraError: if flatbuffers is not installed.
    FileNotFoundError: if there is no such file.
    ValueError: if the file is damaged; when the function is called, also if
      the arguments or the platform are not those it was exported for.
  """
  extras.require('flatbuffers')
  content = pathlib.Path(path).read_bytes()
  body, seal = content[:-_SIZE], content[-_SIZE:]
  if seal != _SEAL + hashlib.sha256(body).digest():
    raise ValueError(
      f'{path} is damaged, or not written by jaxprune.io.save: its sha256 '
      f'does not match. Export it again.'
    )
  return export.deserialize(bytearray(body)).call


def open_batch(args: tree.PyTree, batch: str | None) -> tree.PyTree:
  """Returns the shapes of arguments, their first axis left open.

  Args:
    args: a pytree of arrays or ``jax.ShapeDtypeStruct``.
    batch: a name for the first axis of every array; None to leave none open.

  Raises:
    ValueError: if there is no array, or one has no axis to leave open.
  """
  named = tree.leaves(args)
  scalars = [p for p, x in named.items() if batch and not len(x.shape)]
  if not named or scalars:
    raise ValueError(
      f'Every array of `args` needs a first axis to leave open as the batch, '
      f'got {", ".join(f"{p} of shape ()" for p in scalars) or "no array"}. '
      f'Give batch=None to fix all shapes.'
    )
  sizes = export.symbolic_shape(batch) if batch else ()
  specs = [
    jax.ShapeDtypeStruct((*sizes, *x.shape[len(sizes) :]), x.dtype)
    for x in named.values()
  ]
  return jax.tree.unflatten(jax.tree.structure(args), specs)


def write(path: str | os.PathLike, content: bytes) -> int:
  """Writes a file that appears whole or not at all; returns its size."""
  path = pathlib.Path(path)
  part = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    part.write_bytes(content)
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
  return len(content)
