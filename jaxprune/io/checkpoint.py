"""Checkpoints that are verified when read, and weights as plain files.

A :class:`Checkpointer` keeps the last steps of a run through Orbax. Orbax
commits a step whole or not at all, also when the process is killed, but loads
an array with a flipped bit without a word: so each leaf is stored with its
sha256, and so is each file, and a damaged step gives way to the one before it.

:func:`save_arrays` writes a pytree as one compressed ``.npz`` file, the same
bytes for the same arrays, that NumPy alone can read.
"""

import hashlib
import io
import json
import os
import pathlib
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxprune import tree as tree_lib
from jaxprune.checks import kinds
from jaxprune.tree import PyTree

_SEAL = 'files.json'

Metadata = Mapping[str, Any]  # Whatever JSON can hold.


class Restored(NamedTuple):
  """What :meth:`Checkpointer.restore` found."""

  step: int
  state: PyTree  # Like the template.
  metadata: dict[str, Any]


class Checkpointer:
  """Keeps the last steps of a run in one folder; a context manager.

  Each step is a folder ``directory/step`` with the item ``state``, which
  Orbax alone can read too, the JSON item ``record``: the metadata, and of each
  leaf its path, dtype, shape and sha256; and ``files.json``, the sha256 of each
  file, by which damage is seen before Orbax reads it.

  Args:
    directory: made if need be; what killed saves left in it is removed.
    keep: how many of the last steps stay, at least 1. With 2 or more, a
      damaged one has one to fall back to.
    background: whether ``save`` returns once the state is copied from the
      device, and writes in a thread; for large states.

  Raises:
    ValueError: if ``keep`` is below 1.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int = 3,
    background: bool = False,
  ):
    if keep < 1:
      raise ValueError(f'`keep` must be at least 1, got {keep}.')
    self.directory = pathlib.Path(directory).absolute()
    self._damaged: set[int] = set()
    self._unsealed: set[int] = set()  # Saved, perhaps still being written.
    self._background = background
    if jax.process_index() == 0:  # Orbax itself passes over an empty one.
      for unfinished in self.directory.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(unfinished, ignore_errors=True)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=background,
      ),
    )

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Waits for what is being written, and lets go of the folder."""
    self._settle()
    self._manager.close()

  def steps(self) -> tuple[int, ...]:
    """Returns the steps that are there, the oldest first."""
    return tuple(sorted(self._manager.all_steps()))

  def save(
    self, step: int, state: PyTree, metadata: Metadata | None = None
  ) -> None:
    """Writes a step; it is there as a whole when this returns, or not at all.

    Steps only go up. Steps that :meth:`restore` found damaged are removed.

    Args:
      step: above all that are there, at least 0.
      state: a pytree of arrays, typed PRNG keys and numbers.
      metadata: plain data to keep beside it, such as the stage of the run.

    Raises:
      ValueError: if ``step`` is not above the others.
      TypeError: if a leaf is no array, or if JSON cannot hold the metadata.
    """
    record = {'leaves': _manifest(state), 'metadata': dict(metadata or {})}
    try:
      record['sha256'] = _digest(record)
    except (TypeError, ValueError) as error:
      raise TypeError(f'The metadata must be JSON data: {error}.') from error
    self._settle()
    for damaged in self._damaged.intersection(self.steps()):
      self._manager.delete(damaged)
    self._damaged.clear()
    if step <= max(self.steps(), default=-1):
      raise ValueError(
        f'Step {step} must be above the last one in {self.directory}, '
        f'{max(self.steps(), default=-1)}. Go on from that one, or take '
        f'another folder.'
      )
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(jax.tree.map(_stored, state)),
      record=ocp.args.JsonSave(record),
    )
    self._manager.save(step, args=items, force=True)
    self._unsealed.add(step)
    if not self._background:
      self._settle()

  def restore(
    self,
    template: PyTree | Callable[[dict[str, Any]], PyTree],
    step: int | None = None,
  ) -> Restored:
    """Reads the last step that is whole, or the one that is asked for.

    Every leaf is checked against its sha256. A damaged step is passed over
    with a warning that names it and what is wrong with it.

    Args:
      template: a pytree like the state, of arrays or
        ``jax.ShapeDtypeStruct``, whose shardings the leaves take; or a
        function from the metadata of the step to such a pytree, where the
        shapes depend on the stage of the run.
      step: without it, the last one.

    Returns:
      A :class:`Restored`: step, state, metadata. The dicts of the state have
      the order of the template's.

    Raises:
      FileNotFoundError: if there is no step, or not the one asked for.
      ValueError: if the template does not fit, with every leaf that does not,
        or if no step is whole.
    """
    steps = [s for s in reversed(self.steps()) if step in (None, s)]
    if not steps:
      asked = 'checkpoint' if step is None else f'checkpoint of step {step}'
      available = ', '.join(map(str, self.steps())) or 'none'
      raise FileNotFoundError(
        f'There is no {asked} in {self.directory}; steps there: {available}.'
      )
    faults = []
    for number in steps:
      try:
        self._check_files(number)
        record = self._record(number)
      except Exception as error:  # Whatever Orbax raises on a damaged file.
        faults.append(f'step {number} is damaged ({_line(error)})')
        self._damaged.add(number)
        continue
      metadata, leaves = record['metadata'], record['leaves']
      like = template(metadata) if callable(template) else template
      _check_template(like, leaves, f'step {number} of {self.directory}')
      try:
        state = self._state(number, like, leaves)
      except Exception as error:
        faults.append(f'step {number} is damaged ({_line(error)})')
        self._damaged.add(number)
        continue
      if faults:
        warnings.warn(
          f'In {self.directory}, {"; ".join(faults)}: restored step {number}.',
          stacklevel=2,
        )
      return Restored(number, state, metadata)
    raise ValueError(
      f'No checkpoint in {self.directory} can be read: {"; ".join(faults)}.'
    )

  def _settle(self) -> None:
    """Waits for the steps that are being written, and seals their files."""
    self._manager.wait_until_finished()
    for step in self._unsealed.intersection(self.steps()):
      if jax.process_index() == 0:
        folder = self.directory / str(step)
        _replace(folder / _SEAL, json.dumps(_files(folder)).encode())
    self._unsealed.clear()

  def _check_files(self, step: int) -> None:
    """Raises if a file of a sealed step has changed.

    A step is not sealed if the process was killed right after it was written;
    the sha256 of its leaves is then all there is.
    """
    folder = self.directory / str(step)
    if (folder / _SEAL).exists():
      sealed = json.loads((folder / _SEAL).read_bytes())
      current = _files(folder)
      wrong = [name for name in sealed if current.get(name) != sealed[name]]
      if wrong:
        raise ValueError(f'its files {", ".join(wrong)} have changed')

  def _record(self, step: int) -> dict[str, Any]:
    items = ocp.args.Composite(record=ocp.args.JsonRestore())
    record = self._manager.restore(step, args=items)['record']
    if record.pop('sha256') != _digest(record):
      raise ValueError('the sha256 of its record differs')
    return record

  def _state(self, step: int, template: PyTree, leaves: Mapping) -> PyTree:
    target = jax.tree.map(_target, template)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    stored = self._manager.restore(step, args=items)['state']
    state = jax.tree.map(_restored, template, stored)
    manifest = _manifest(state)
    wrong = [p for p in leaves if manifest[p]['sha256'] != leaves[p]['sha256']]
    if wrong:
      raise ValueError(f'the sha256 of {", ".join(wrong)} differs')
    return _in_order_of(template, state)


def _in_order_of(template: PyTree, tree: PyTree) -> PyTree:
  """Returns a tree with the entries of each dict in the template's order.

  JAX and Orbax hand dicts back sorted by key, so that {'dense': ..., 'channel':
  ...} would come back with 'channel' first, and a caller who goes through it
  would do after a restart something else than before.
  """
  if type(template) is dict and type(tree) is dict:
    return {key: _in_order_of(template[key], tree[key]) for key in template}
  if isinstance(template, tuple | list) and isinstance(tree, tuple | list):
    entries = map(_in_order_of, template, tree)
    if hasattr(tree, '_fields'):  # A NamedTuple takes its fields one by one.
      return type(tree)(*entries)
    return type(tree)(entries)
  return tree


def _files(folder: pathlib.Path) -> dict[str, str]:
  """Returns the sha256 of each file of a step, by its path in the folder."""
  files = sorted(f for f in folder.rglob('*') if f.is_file())
  return {
    str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
    for f in files
    if f.name != _SEAL
  }


def _manifest(state: PyTree) -> dict[str, dict[str, Any]]:
  """Returns the dtype, shape and sha256 of each leaf, by path."""
  manifest = {}
  for path, leaf in tree_lib.leaves(state).items():
    shape, dtype = _spec(path, leaf)
    manifest[path] = {'dtype': dtype, 'shape': shape, 'sha256': _hash(leaf)}
  return manifest


def _spec(path: str, leaf: Any) -> tuple[list[int], str]:
  """Returns shape and dtype of a leaf; a Python number is a number."""
  if isinstance(leaf, bool | int | float):
    return [], type(leaf).__name__
  if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
    raise TypeError(
      f'Leaf {path!r} must be an array or a number, got '
      f'{type(leaf).__name__}. Text and the like belong in the metadata.'
    )
  return list(leaf.shape), str(leaf.dtype)


def _hash(leaf: Any) -> str | None:
  """Returns the sha256 of a leaf; None if it is spread over other hosts."""
  if isinstance(leaf, jax.Array):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    if leaf.is_fully_replicated:
      leaf = leaf.addressable_data(0)
    elif not leaf.is_fully_addressable:
      return None
  return hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
  """Returns the sha256 of JSON data."""
  text = json.dumps(record, sort_keys=True, allow_nan=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _stored(leaf: Any) -> Any:
  """Returns a leaf as Orbax takes it: no NumPy scalar, not of size 0."""
  if np.size(leaf) == 0:
    return np.zeros(1, bool)
  return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _target(leaf: Any) -> Any:
  """Returns what Orbax is to restore a leaf of the template as."""
  if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
  return _stored(leaf)


def _restored(like: Any, stored: Any) -> Any:
  """Returns what Orbax restored in the form of the template's leaf."""
  if np.size(like) == 0:
    empty = isinstance(like, jax.ShapeDtypeStruct)
    return jnp.zeros(like.shape, like.dtype) if empty else like
  return like.dtype.type(stored) if isinstance(like, np.generic) else stored


def _check_template(template: PyTree, stored: Mapping, where: str) -> None:
  """Raises if a template and the stored leaves differ."""
  specs = {p: _spec(p, x) for p, x in tree_lib.leaves(template).items()}
  kept = {p: (x['shape'], x['dtype']) for p, x in stored.items()}
  text = lambda spec: f'{spec[1]}{spec[0]}' if spec else 'nothing'
  wrong = [
    f'{path!r} is {text(kept.get(path))}, wanted {text(specs.get(path))}'
    for path in {**kept, **specs}
    if kept.get(path) != specs.get(path)
  ]
  if wrong:
    raise ValueError(
      f'The template does not fit {where}: {"; ".join(wrong)}. It was saved '
      f'by another configuration.'
    )


def _line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__).rstrip('.')


# --- Weights as plain files --------------------------------------------------


@kinds.checked
def save_arrays(path: str | os.PathLike, tree: Any) -> int:
  """Writes the arrays of a pytree as one compressed ``.npz`` file.

  A leaf is the member named by its path, in sorted order, without a date: the
  same arrays give the same bytes. A dtype that NumPy does not know is stored
  as unsigned integers of its width, under ``path@dtype``. The file appears
  whole or not at all.

  Args:
    path: of the file.
    tree: a pytree of arrays and numbers.

  Returns:
    The size of the file in bytes.

  Raises:
    TypeError: if a leaf is no array or number, or is a typed PRNG key.
    ValueError: if a path has an ``@``.
  """
  path = pathlib.Path(path)
  members = {}
  for name, leaf in tree_lib.leaves(tree).items():
    _spec(name, leaf)
    if '@' in name:
      raise ValueError(f"The path of leaf {name!r} must not have an '@'.")
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
      raise TypeError(
        f'Leaf {name!r} is a typed PRNG key; store jax.random.key_data of it.'
      )
    array = np.asarray(leaf)
    if array.dtype.isbuiltin == 2:  # Registered by another library.
      name = f'{name}@{array.dtype.name}'
      array = array.view(f'u{array.dtype.itemsize}')
    members[name] = array
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    for name in sorted(members):
      entry = zipfile.ZipInfo(f'{name}.npy', (1980, 1, 1, 0, 0, 0))
      entry.compress_type = zipfile.ZIP_DEFLATED
      array = np.asarray(members[name], order='C')
      with archive.open(entry, 'w', force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
  _replace(path, buffer.getvalue())
  return path.stat().st_size


@kinds.checked
def load_arrays(
  path: str | os.PathLike, template: PyTree | None = None
) -> PyTree:
  """Reads what :func:`save_arrays` wrote.

  Args:
    path: of the file.
    template: a pytree of arrays or ``jax.ShapeDtypeStruct`` to fill.

  Returns:
    The arrays, of NumPy: by path, or in the structure of the template.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is damaged, or if the template does not fit, with
      every leaf that does not.
  """
  arrays = {}
  try:
    with open(path, 'rb') as file, np.load(file) as archive:
      for member in archive.files:
        name, _, dtype = member.partition('@')
        array = archive[member]
        arrays[name] = array.view(jnp.dtype(dtype)) if dtype else array
  except FileNotFoundError:
    raise
  except Exception as error:  # Of the zip, of the member or of its header.
    raise ValueError(f'{path} is damaged ({_line(error)}).') from error
  if template is None:
    return arrays
  spec = lambda x: {'shape': list(x.shape), 'dtype': str(x.dtype)}
  stored = {name: spec(array) for name, array in arrays.items()}
  _check_template(template, stored, str(path))
  return tree_lib.map_with_path(lambda name, _: arrays[name], template)


def _replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that appears whole or not at all."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
