"""Input axes: along which axis of a kernel a product sums.

Groups of N:M lie along it, and the layout of a leaf does not tell it: it is the
third of four in Linen, the second in PyTorch and Equinox. The trace does: of
``x @ w.T`` with w[2, 8] the product contracts axis 0 of w.T, which has the type
of axis 1 of w. So groups of 2:4 lie along axis 1, two in each row.
"""

import re
from typing import NamedTuple

from jaxprune import masks, tree
from jaxprune.checks import kinds
from jaxprune.structure.graph import Graph
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.walks.consumers import apart, contracted, types_of


class InputAxis(NamedTuple):
  """The axis of a kernel that its products sum over, or why there is none."""

  axis: int | None  # Negative: counted from the last.
  why: str = ''


@kinds.checked
def input_axes(graph: Graph) -> dict[str, InputAxis]:
  """Returns the input axis of every leaf that pruning may thin out.

  It is read off the dimension numbers of the matrix products and convolutions
  of data with the leaf, in whatever layout, also inside of loops and where the
  leaf is transposed, reshaped or masked on the way.

  Args:
    graph: of :func:`jaxprune.trace`.

  Returns:
    path -> :class:`InputAxis`, for the leaves of :func:`jaxprune.tree.prunable`
    by default.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune.structure import input_axes, trace
    >>> params = {'weight': jnp.ones((2, 8))}
    >>> torch = lambda p, x: x @ p['weight'].T
    >>> input_axes(trace(torch, params, jnp.ones((1, 8))))
    {'weight': InputAxis(axis=-1, why='')}
  """
  stream = graph.flow
  leaves = dict(zip(graph.leaves, stream.inputs, strict=False))
  data = stream.descendants(stream.inputs[len(leaves) :], ())
  fresh = apart(stream, data)
  by_path: dict[str, InputAxis] = {}
  for step in stream.steps:
    if not isinstance(step, Equation):
      continue
    for kernel, axes in _kernels(step, data).items():
      summed = {a for k in axes for a in ax.atoms(types_of(fresh, kernel)[k])}
      # A depthwise kernel [3, 3, 1, 4] has one input channel for each output.
      depthwise = all(kernel.shape[k] == 1 for k in axes)
      for path, leaf in leaves.items():
        if path not in kernel.sources:
          continue
        new = _axis(types_of(fresh, leaf), summed)
        if depthwise:
          new = InputAxis(None, f'{step.why} sums over one channel')
        if new is not None and by_path.setdefault(path, new) != new:
          by_path[path] = InputAxis(
            None, 'two products sum over different axes'
          )
  idle = InputAxis(None, 'no product of data sums over it')
  return {
    path: by_path.get(path, idle)
    for path, leaf in graph.leaves.items()
    if tree.is_prunable(path, leaf)
  }


@kinds.checked
def n_by_m(graph: Graph, n: int, m: int) -> dict[str, masks.NByM | None]:
  """Returns rules that keep n of every m inputs of each kernel of a graph.

  They are a ``granularity`` of :func:`jaxprune.sparsify`, each group along the
  input axis that the trace found; a leaf that has none stays dense
  (:func:`input_axes` has the reason). A pattern before them wins:
  ``{'head.*': None, **n_by_m(graph, 2, 4)}``.

  Args:
    graph: of :func:`jaxprune.trace`.
    n: how many of each group are kept, 1 <= n <= m.
    m: size of a group.

  Returns:
    regular expression over paths -> granularity. Where all leaves are in one
    collection (``{'params': ...}``), its name may be missing in the path.

  Raises:
    ValueError: if n and m do not satisfy 1 <= n <= m.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune.structure import n_by_m, trace
    >>> params = {'weight': jnp.ones((2, 8))}
    >>> torch = lambda p, x: x @ p['weight'].T
    >>> n_by_m(trace(torch, params, jnp.ones((1, 8))), 2, 4)
    {'weight': NByM(n=2, m=4, axis=-1)}
  """
  axes = input_axes(graph)
  first = {path.partition('/')[0] for path in axes if '/' in path}
  shared = f'{first.pop()}/' if len(first) == 1 else ''
  rules = {}
  for path, (axis, _) in axes.items():
    rule = re.escape(path)
    if shared and path.startswith(shared):
      rule = f'({re.escape(shared)})?{re.escape(path.removeprefix(shared))}'
    grain = masks.groups(n, m, axis=axis)
    rules[rule] = grain if axis is not None else None
  return rules


def _kernels(eqn: Equation, data: set[Value]) -> dict[Value, list[int]]:
  """Returns the axes of each kernel that a product with data sums over."""
  kernels: dict[Value, list[int]] = {}
  for pair in contracted(eqn):
    sides = [side for side in pair if side[0] not in data]
    if len(sides) == 1:
      ((kernel, axis),) = sides
      kernels.setdefault(kernel, []).append(axis)
  return kernels


def _axis(axes: list[Axis], summed: set[Axis]) -> InputAxis | None:
  """Returns the axis of a leaf whose entries are summed over, if any is."""
  touched = [k for k, axis in enumerate(axes) if summed & set(ax.atoms(axis))]
  if not touched:
    return None
  if len(touched) > 1:
    return InputAxis(None, f'axes {touched} are summed over together')
  (k,) = touched
  # w[6] reshaped to [3, 2] and summed over the axis of 2: no group of entries
  # that lie side by side along w's axis is what the sum runs over.
  factors = ax.factors(axes[k])
  if any(not summed & set(ax.atoms(factor)) for factor in factors):
    return InputAxis(None, f'a part of axis {k} is summed over')
  return InputAxis(k - len(axes))
