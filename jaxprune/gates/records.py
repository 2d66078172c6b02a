"""What can close, the trained numbers, and what they say: plain data."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Cost = Callable[[Mapping[str, Any]], Any]  # Widths and open blocks -> cost.
Scalars = Mapping[str, jax.Array]


class Structure(NamedTuple):
  """What can close, as data.

  Attributes:
    units: group -> its number of units.
    layers: layer -> the groups in which a parallel branch ends, whose units
      its gate multiplies; none for a layer whose gate the function takes.
    blocks: names of the residual branches.
    inside: layer -> the other groups that nothing reads once it is closed.
    rivals: sets of layers, or of blocks, of which one has to stay open.
  """

  units: Mapping[str, int]
  layers: Mapping[str, tuple[str, ...]] = {}
  blocks: tuple[str, ...] = ()
  inside: Mapping[str, tuple[str, ...]] = {}
  rivals: tuple[tuple[str, ...], ...] = ()


class Gates(NamedTuple):
  """The trained numbers theta; what is absent is open and not trained."""

  units: Mapping[str, jax.Array]  # Group -> float32[units].
  layers: Mapping[str, jax.Array] = {}  # float32[] each.
  blocks: Mapping[str, jax.Array] = {}


class Values(NamedTuple):
  """What the gates say at one forward pass.

  Factors are of what has a gate. ``open`` is exactly 1 or 0, with the
  derivative that its gate function gives.
  """

  units: Mapping[str, jax.Array]  # Group -> factor of each unit; float32[n].
  layers: Scalars  # Layer -> factor; in `units` already where it ends in some.
  blocks: Scalars  # Block -> factor.
  open: Gates  # float32 of 0 and 1, for every name of the structure.


def names_of(structure: Structure) -> list[str]:
  """Of groups, layers and blocks, in this order."""
  return [*structure.units, *structure.layers, *structure.blocks]


def reach(structure: Structure, layer: str) -> set[str]:
  """The groups that have no width once a layer is closed."""
  return {*structure.layers[layer], *structure.inside.get(layer, ())}


def check(structure: Structure) -> None:
  """Raises ValueError if a structure contradicts itself."""
  names = names_of(structure)
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(
      f'Groups, layers and blocks must have different names; given twice: '
      f'{", ".join(twice)}.'
    )
  if not structure.units:
    raise ValueError('A structure needs groups of units.')
  empty = [name for name, size in structure.units.items() if size < 1]
  if empty:
    raise ValueError(f'Groups must have units; without: {", ".join(empty)}.')
  for what, given, known in (
    ('`layers` end in', structure.layers.values(), structure.units),
    ('`inside` holds', structure.inside.values(), structure.units),
    ('`inside` speaks of', [structure.inside], structure.layers),
    ('`rivals` holds', structure.rivals, names[len(structure.units) :]),
  ):
    lost = sorted({n for some in given for n in some} - set(known))
    if lost:
      raise ValueError(
        f'{what} {", ".join(map(repr, lost))}; known are: '
        f'{", ".join(known) or "none"}.'
      )


def check_gates(gates: Gates, structure: Structure) -> None:
  """Raises ValueError if gates do not fit a structure."""
  for what, given, known in zip(
    Gates._fields,
    gates,
    (structure.units, structure.layers, structure.blocks),
    strict=True,
  ):
    for name, theta in given.items():
      if name not in known:
        raise ValueError(
          f'`{what}` has a gate for {name!r}, which the structure does not '
          f'have; it has: {", ".join(known) or "none"}.'
        )
      shape = (structure.units[name],) if what == 'units' else ()
      if jnp.shape(theta) != shape:
        raise ValueError(
          f'The gate of {name!r} must have shape {shape}, got '
          f'{jnp.shape(theta)}.'
        )
