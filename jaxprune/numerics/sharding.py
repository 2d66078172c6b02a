"""Where arrays lie on a mesh whose axes have explicit types.

There an operation must say where its result lies, and those that regroup
entries (ravel, sort, reshape to blocks) refuse an axis that is split. Elsewhere
the compiler decides, and the functions here return what they are given.
"""

import math

import jax
from jax import core, lax
from jax.sharding import NamedSharding, PartitionSpec


def parts(x: jax.Array) -> tuple[int, ...]:
  """Returns into how many parts explicit axes of a mesh split each axis.

  Args:
    x: any array, traced or not.

  Examples:
    >>> parts(jax.numpy.ones((2, 3)))
    (1, 1)
  """
  placed = jax.typeof(x).sharding
  names = [a if isinstance(a, tuple) else (a,) for a in placed.spec]
  return tuple(
    math.prod(placed.mesh.shape[name] for name in some if name is not None)
    for some in names
  )


def whole(x: jax.Array) -> jax.Array:
  """Returns an array with no axis split over explicit axes of a mesh.

  Args:
    x: any array, traced or not.

  Examples:
    >>> whole(jax.numpy.ones(2)).tolist()
    [1.0, 1.0]
  """
  placed = jax.typeof(x).sharding
  if not any(placed.spec):
    return x
  return jax.sharding.reshard(x, NamedSharding(placed.mesh, PartitionSpec()))


def like(x: jax.Array, other: jax.Array) -> jax.Array:
  """Returns an array split over explicit axes of a mesh as another one is.

  Args:
    x: any array, traced or not.
    other: an array of the same shape; one that is only described
      (``jax.ShapeDtypeStruct``) lies nowhere, and x stays.

  Examples:
    >>> like(jax.numpy.ones(2), jax.numpy.zeros(2)).tolist()
    [1.0, 1.0]
  """
  if isinstance(other, jax.ShapeDtypeStruct):
    return x
  placed = jax.typeof(other).sharding
  if tuple(jax.typeof(x).sharding.spec) == tuple(placed.spec):
    return x
  if not any(placed.spec):
    return whole(x)
  if not isinstance(other, core.Tracer):  # It knows its devices.
    return jax.device_put(x, other.sharding)
  return jax.sharding.reshard(x, placed)


def varying(x: jax.Array) -> frozenset[str]:
  """Returns the axes of a ``shard_map`` over which an array differs.

  Args:
    x: any array, traced or not.

  Examples:
    >>> varying(jax.numpy.ones(2))
    frozenset()
  """
  aval = jax.typeof(x)
  kind = getattr(aval, 'manual_axis_type', None)  # JAX 0.8 names it `vma`.
  return getattr(aval, 'vma', frozenset()) if kind is None else kind.varying


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """Lets an array vary over these axes of a ``shard_map`` too.

  Args:
    x: any array, traced or not.
    axes: names of axes.

  Examples:
    >>> vary(jax.numpy.ones(2), frozenset()).tolist()
    [1.0, 1.0]
  """
  missing = tuple(sorted(axes - varying(x)))
  return lax.pcast(x, missing, to='varying') if missing else x
