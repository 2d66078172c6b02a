"""Rules of what lays an array out anew: reshape, transpose, broadcast."""

from collections.abc import Sequence

from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis, Size
from jaxprune.structure.rules.base import (
  Equation,
  Resize,
  drop,
  elementwise,
  lock_all,
  rule,
  same,
  shape,
)


@rule('bitcast_convert_type')
def _bitcast(eqn: Equation) -> None:
  """To a dtype of the same size; any other adds or takes an axis."""
  x, (out,) = eqn.inputs[0], eqn.outputs
  if len(x.shape) == len(out.shape):
    return elementwise(eqn)
  return lock_all(eqn, f'{eqn.why} changes the number of axes')


@rule('optimization_barrier')
def _barrier(eqn: Equation) -> None:
  for value, out in zip(eqn.inputs, eqn.outputs, strict=True):
    out.axes = list(value.axes)


@rule('broadcast_in_dim')
def _broadcast(eqn: Equation) -> Resize:
  x, (out,) = eqn.inputs[0], eqn.outputs
  out.axes = [ax.atom(n) for n in out.shape]
  for axis, n, k in zip(
    x.axes, x.shape, eqn.params['broadcast_dimensions'], strict=True
  ):
    if same(n, out.shape[k]):
      out.axes[k] = axis
  return lambda size: {'shape': shape(out, size)}


@rule('empty')
def _empty(eqn: Equation) -> Resize:
  (out,) = eqn.outputs
  out.axes = [ax.atom(n) for n in out.shape]
  return lambda size: {'shape': shape(out, size)}


@rule('iota')
def _iota(eqn: Equation) -> Resize:
  (out,) = eqn.outputs
  counted = eqn.params['dimension']
  out.axes = [
    ax.atom(n, f'{eqn.why} numbers its entries' if k == counted else None)
    for k, n in enumerate(out.shape)
  ]
  return lambda size: {'shape': shape(out, size)}


@rule('transpose')
def _transpose(eqn: Equation) -> None:
  eqn.outputs[0].axes = [
    eqn.inputs[0].axes[k] for k in eqn.params['permutation']
  ]


@rule('squeeze')
def _squeeze(eqn: Equation) -> None:
  eqn.outputs[0].axes = drop(eqn.inputs[0].axes, eqn.params['dimensions'])


@rule('reshape')
def _reshape(eqn: Equation) -> Resize | None:
  """Splits both shapes into the shortest runs of equal product."""
  x, (out,) = eqn.inputs[0], eqn.outputs
  order = eqn.params.get('dimensions') or range(len(x.shape))
  shape_in, axes = ([of[k] for k in order] for of in (x.shape, x.axes))
  runs = _matching_runs(shape_in, out.shape)
  if runs is None:
    return lock_all(eqn, f'{eqn.why} cannot be followed')
  out.axes = [ax.atom(n) for n in out.shape]
  for before, after in runs:
    whole = ax.product(axes[k] for k in before)
    if len(after) == 1:
      out.axes[after[0]] = whole
      continue
    parts = ax.factors(whole)
    if len(parts) == len(after) and all(
      same(p.size, out.shape[k]) for p, k in zip(parts, after, strict=True)
    ):
      for part, k in zip(parts, after, strict=True):
        out.axes[k] = part
      continue
    pieces = [out.axes[k] for k in after]
    ax.unify(whole, Axis(whole.size, 'product', pieces), eqn.why)
  return lambda size: {'new_sizes': shape(out, size)}


def _matching_runs(
  a: Sequence[Size], b: Sequence[Size]
) -> list[tuple[list[int], list[int]]] | None:
  """Pairs runs of axes of two shapes with equal products, 1s left out."""
  left = [k for k, n in enumerate(a) if not same(n, 1)]
  right = [k for k, n in enumerate(b) if not same(n, 1)]
  if any(same(n, 0) for n in (*a, *b)):
    return None
  runs = []
  while left and right:
    before, after = [left.pop(0)], [right.pop(0)]
    m, n = a[before[0]], b[after[0]]
    while not same(m, n):
      try:
        grow_left = bool(m < n)
      except Exception:  # Two symbolic sizes that cannot be compared.
        return None
      rest = left if grow_left else right
      if not rest:
        return None
      if grow_left:
        before.append(left.pop(0))
        m *= a[before[-1]]
      else:
        after.append(right.pop(0))
        n *= b[after[-1]]
    runs.append((before, after))
  return None if left or right else runs


@rule('tile')
def _tile(eqn: Equation) -> None:
  x, (out,) = eqn.inputs[0], eqn.outputs
  times = [ax.atom(r, f'{eqn.why} counts it') for r in eqn.params['reps']]
  out.axes = [
    ax.product([time, axis]) for time, axis in zip(times, x.axes, strict=True)
  ]


@rule('stack')
def _stack(eqn: Equation) -> None:
  first, *others = eqn.inputs
  for value in others:
    for a, b in zip(first.axes, value.axes, strict=True):
      ax.unify(a, b, eqn.why)
  new = ax.atom(len(eqn.inputs), f'{eqn.why} made it')
  axes = list(first.axes)
  axes.insert(eqn.params['axis'], new)
  eqn.outputs[0].axes = axes


@rule('unstack')
def _unstack(eqn: Equation) -> None:
  x, axis = eqn.inputs[0], eqn.params['axis']
  ax.lock(x.axes[axis], f'{eqn.why} takes it apart')
  for out in eqn.outputs:
    out.axes = drop(x.axes, (axis,))
