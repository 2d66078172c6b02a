"""What a plan does otherwise than another, to print."""

from collections.abc import Sequence
from typing import NamedTuple

# (cut, sides), in order: where the resolution changes on the way.
Resized = tuple[tuple[str, tuple[int, ...]], ...]


class Change(NamedTuple):
  """What became of the units of a group.

  Attributes:
    removed: indices that the first plan keeps and the second does not.
    restored: the reverse.
  """

  removed: tuple[int, ...]
  restored: tuple[int, ...]


class Diff(NamedTuple):
  """What a second plan does otherwise than a first; print it.

  Attributes:
    groups: group -> :class:`Change`.
    dropped: blocks that the second alone drops.
    restored: blocks that the first alone drops.
    resolution: (before, after); None if they agree.
    resized: the same of where it changes on the way.
  """

  groups: dict[str, Change]
  dropped: tuple[str, ...]
  restored: tuple[str, ...]
  resolution: tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None
  resized: tuple[Resized, Resized] | None = None

  def __str__(self) -> str:
    """Returns one line for each group, block and resolution that differs."""
    lines = [
      f'{name}: {_signed("-", change.removed)}{_signed("+", change.restored)}'
      for name, change in self.groups.items()
    ]
    lines += [f'{name}: dropped' for name in self.dropped]
    lines += [f'{name}: restored' for name in self.restored]
    if self.resolution is not None:
      before, after = (
        _by(sides) if sides else 'as traced' for sides in self.resolution
      )
      lines.append(f'resolution: {before} -> {after}')
    if self.resized is not None:
      before, after = (
        ', '.join(f'{_by(sides)} from {cut}' for cut, sides in resized)
        or 'nowhere'
        for resized in self.resized
      )
      lines.append(f'resized: {before} -> {after}')
    return '\n'.join(line.rstrip() for line in lines) or 'no difference'


def _by(sides: Sequence[int]) -> str:
  return 'x'.join(map(str, sides))


def _signed(sign: str, index: Sequence[int]) -> str:
  return f'{sign}{",".join(map(str, index))} ' if index else ''
