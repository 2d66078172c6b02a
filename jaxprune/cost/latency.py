"""Latency: a table measured on the device at hand, interpolated for widths.

The program is parted before each convolution and matrix product. Every part is
compiled on its own and timed at a few widths of what it reads and writes; the
time of a whole network is the sum of its parts, and how far that is from the
network itself is measured too.
"""

import dataclasses
import hashlib
import itertools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.checks import kinds
from jaxprune.cost import polynomials
from jaxprune.cost.polynomials import Polynomial, entries, evaluate
from jaxprune.structure.graph import Graph, runner
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.typed import Program, Run, all_equations
from jaxprune.structure.rules import Equation, Value


class Check(NamedTuple):
  """A whole network that the table was not fitted to."""

  name: str
  predicted: float  # Milliseconds.
  measured: float  # Milliseconds.


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Milliseconds of the parts of a network at a few sizes; plain data.

  Attributes:
    names: of each of S parts: its operation and line.
    sizes: of each part, the polynomials of its D coordinates: entries that it
      sums over, entries that it writes, and those of other groups it touches.
    knots: float64[S, D, K], the sizes that were measured, ascending.
    ms: float64[S, K, ..., K], milliseconds at each combination of D knots,
      without the overhead; never falling.
    blocks: of each part, the blocks that it goes with.
    wholes: float64[2, K + 1], ascending: the sum of the parts, and what the
      whole network took, at each knot of all coordinates together and at 0.
    checks: other whole networks, predicted and measured.
    program: the :func:`digest` of what was measured, by which a table of
      another resolution is told; '' for one that was made up.
  """

  names: tuple[str, ...]
  sizes: tuple[tuple[Polynomial, ...], ...]
  knots: np.ndarray
  ms: np.ndarray
  blocks: tuple[tuple[str, ...], ...]
  wholes: np.ndarray
  checks: tuple[Check, ...]
  program: str = ''

  @property
  def error(self) -> float:
    """The largest relative error of the prediction among the checks."""
    return max(abs(c.predicted / c.measured - 1) for c in self.checks)

  def __str__(self) -> str:
    """Returns the slowest parts and the checks as a table."""
    last = self.ms.reshape(len(self.names), -1)[:, -1]
    order = np.argsort(-last, kind='stable')[:10]
    lines = [f'{last[k]:9.3f} ms  {self.names[k]}' for k in order]
    if len(self.names) > 10:
      lines.append(f'and {len(self.names) - 10} faster parts')
    lines += ['', 'predicted   measured   error']
    lines += [
      f'{c.predicted:6.3f} ms  {c.measured:6.3f} ms  '
      f'{c.predicted / c.measured - 1:+6.1%}  {c.name}'
      for c in self.checks
    ]
    return '\n'.join(lines)


@kinds.checked
def measure(
  graph: Graph,
  *,
  fractions: Sequence[float] = (0.25, 0.5, 1.0),
  rounds: int = 20,
  clock: Callable[[], float] = time.perf_counter,
  tick: Callable[[], Any] = lambda: None,
) -> Table:
  """Returns a table of latencies, measured now on the default device.

  Takes a compilation for each distinct part and combination of widths: minutes
  for a large network. The arrays are made up; their shapes are those traced.
  The sum of the parts is fitted to the whole network at each fraction of all
  widths; how well it then predicts other widths is in ``checks``. Widths
  between the fractions are taken to be as fast as those: where the device
  likes multiples of 8, choose widths with ``round_to=8``.

  Args:
    graph: the graph, traced at the batch that matters.
    fractions: of the widths, two or more, ascending, the last 1.0.
    rounds: how often each is called, all in turn; the fastest call counts, so
      that what else the machine does meets all alike.
    clock: seconds; ``time.process_time`` on a machine that others use.
    tick: called after each compilation and each round.

  Raises:
    ValueError: if the fractions are not as above, or the graph was traced with
      a symbolic size.
  """
  fractions = tuple(fractions)
  if (
    len(fractions) < 2
    or fractions[-1] != 1
    or fractions[0] <= 0
    or any(a >= b for a, b in itertools.pairwise(fractions))
  ):
    raise ValueError(
      f'`fractions` must rise from above 0 to 1.0, two or more, got '
      f'{fractions}.'
    )
  names = {atom: name for name, atom in graph.atoms.items()}
  parts = [_Part(part, graph, names) for part in _parts(graph.program)]
  arguments = max(len(part.program.inputs) for part in parts)
  jobs: list[_Job] = [_empty(1), _empty(1 + arguments)]
  first: dict[Any, int] = {}
  for part in parts:
    key = part.key(fractions)
    if key not in first:
      first[key] = len(jobs)
      jobs += [part.at(point) for point in part.points(fractions)]
    part.first = first[key]
  even = [_widths(graph, [fraction]) for fraction in fractions]
  others = {
    f'{(fractions[-2] + 1) / 2:.0%} of every width': [(fractions[-2] + 1) / 2],
    'fractions by turns': fractions,
    'in the other order': fractions[::-1],
  }
  begin = len(jobs)
  mixed = [_widths(graph, turns) for turns in others.values()]
  jobs += [_network(graph, widths) for widths in (*even, *mixed)]
  ms = _fastest(jobs, rounds, clock, tick)
  each = max(0.0, ms[1] - ms[0]) / arguments
  table = Table(
    names=tuple(part.name for part in parts),
    sizes=tuple(part.sizes for part in parts),
    knots=np.stack([part.knots(fractions) for part in parts]),
    ms=np.stack([part.grid(fractions, ms, ms[0], each) for part in parts]),
    blocks=tuple(part.blocks for part in parts),
    wholes=np.array([[0.0, 1.0], [0.0, 1.0]]),  # The sum itself.
    checks=(),
    program=digest(graph),
  )
  sums = [float(_sum_of_parts(table, widths)) for widths in even]
  wholes = np.array([[0.0, *sums], [0.0, *ms[begin : begin + len(even)]]])
  table = dataclasses.replace(table, wholes=np.maximum.accumulate(wholes, 1))
  checks = tuple(
    Check(name, float(predict(table, widths)), found)
    for name, widths, found in zip(
      others, mixed, ms[begin + len(even) :], strict=True
    )
  )
  return dataclasses.replace(table, checks=checks)


def digest(graph: Graph) -> str:
  """Returns a hash of the shapes of a program: what its time is a time of."""
  shapes = [
    (eqn.primitive.name, [value.shape for value in eqn.outputs])
    for eqn, _ in all_equations(graph.program)
  ]
  return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


@kinds.checked
def predict(table: Table, values: Mapping[str, Any]) -> Any:
  """Returns the milliseconds of a call at widths.

  The sum of the parts, each multilinear between the sizes that were measured
  and beyond them, taken to the time of a whole network as ``wholes`` has it.

  Args:
    table: of :func:`measure`.
    values: group -> its width, and block -> 1 or 0 (absent ones are open):
      ints, NumPy arrays, or JAX arrays (traced, differentiable), which
      broadcast against each other. A resolution is none of them: a table is of
      the one that was measured (:func:`jaxprune.cost.reached` holds a plan to
      it).

  Raises:
    ValueError: if a group has no width.

  Examples:
    >>> table = Table(
    ...   names=('dot',), sizes=(({('a',): 1},),), blocks=((),),
    ...   knots=np.array([[[2.0, 4.0]]]), ms=np.array([[1.0, 3.0]]),
    ...   wholes=np.array([[0.0, 1.0, 3.0], [0.0, 1.5, 4.0]]), checks=(),
    ... )
    >>> float(predict(table, {'a': 3}))  # The part takes 2, the whole 2.75.
    2.75
  """
  traced = any(isinstance(value, jax.Array) for value in values.values())
  xp: Any = jnp if traced else np
  total = _sum_of_parts(table, values)
  return xp.interp(total, *(xp.asarray(row) for row in table.wholes))


def on_rows(
  table: Table, names: Sequence[str], blocks: Mapping[str, int]
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns :func:`predict` as a fast function of widths, int64[..., n].

  Args:
    table: of :func:`measure`.
    names: the group of each of the n columns.
    blocks: block -> 1 or 0.
  """
  sizes_of = polynomials.on_rows(
    [p for part in table.sizes for p in part], names
  )
  is_open = [
    float(math.prod(blocks.get(name, 1) for name in part))
    for part in table.blocks
  ]

  def cost(widths: np.ndarray) -> np.ndarray:
    shape = widths.shape[:-1]
    sizes = sizes_of(widths.reshape(-1, widths.shape[-1])).T
    sizes = sizes.reshape(*table.knots.shape[:2], -1)
    total = _interpolate(table, sizes, np.array(is_open)[:, None], np)
    return np.interp(total, *table.wholes).reshape(shape)

  return cost


def _sum_of_parts(table: Table, values: Mapping[str, Any]) -> Any:
  traced = any(isinstance(value, jax.Array) for value in values.values())
  xp: Any = jnp if traced else np
  is_open = [
    math.prod((values.get(name, 1) for name in part), start=xp.ones(()))
    for part in table.blocks
  ]
  flat = [evaluate(p, values) for part in table.sizes for p in part]
  flat = xp.broadcast_arrays(*map(xp.asarray, (*flat, *is_open)))
  shape, count = flat[0].shape, len(flat) - len(is_open)
  sizes = xp.stack(flat[:count]).reshape(*table.knots.shape[:2], -1)
  is_open = xp.stack(flat[count:]).reshape(len(is_open), -1)
  return _interpolate(table, sizes, is_open, xp).reshape(shape)


def _interpolate(table: Table, sizes: Any, is_open: Any, xp: Any) -> Any:
  """The sum over parts, [N], at sizes [S, D, N]; is_open is [S, 1 or N]."""
  knots = xp.asarray(table.knots)[..., None]
  lower = xp.sum(sizes[:, :, None] >= knots, 2) - 1
  lower = xp.clip(lower, 0, table.knots.shape[2] - 2)
  left, right = (
    xp.take_along_axis(knots, (lower + k)[:, :, None], 2)[:, :, 0]
    for k in (0, 1)
  )
  share = (sizes - left) / xp.maximum(right - left, 1e-9)
  rows, ms = np.arange(len(table.names))[:, None], xp.asarray(table.ms)
  total = 0.0
  for corner in itertools.product((0, 1), repeat=table.knots.shape[1]):
    weight: Any = 1.0
    for k, side in enumerate(corner):
      weight = weight * (share[:, k] if side else 1 - share[:, k])
    index = tuple(lower[:, k] + side for k, side in enumerate(corner))
    total = total + weight * ms[(rows, *index)]
  return xp.sum(is_open * xp.maximum(total, 0.0), 0)


def _parts(program: Program) -> list[Program]:
  """A program, parted before each convolution and matrix product."""
  runs: list[list[Equation]] = [[]]
  for eqn in program.equations:
    if _is_heavy(eqn) and any(map(_is_heavy, runs[-1])):
      runs.append([])
    runs[-1].append(eqn)
  made = [{v for eqn in run for v in eqn.outputs} for run in runs]
  needed: set[Value] = set(program.outputs)
  parts = []
  for run, own in reversed(list(zip(runs, made, strict=True))):
    reads = dict.fromkeys(value for eqn in run for value in eqn.inputs)
    outputs = [v for eqn in run for v in eqn.outputs if v in needed]
    inputs = [v for v in reads if v not in own and v.constant is None]
    parts.append(Program(inputs, False, run, outputs))
    needed.update(inputs)
  return parts[::-1]


def _is_heavy(eqn: Equation) -> bool:
  inner = (e for body in eqn.programs for e, _ in all_equations(body))
  return any(e.products is not None for e in (eqn, *inner))


class _Part:
  """A part of a program and the coordinates on which its time depends."""

  def __init__(self, program: Program, graph: Graph, names: Mapping[Axis, str]):
    self.program = program
    self.graph = graph
    heavy = [eqn for eqn in program.equations if _is_heavy(eqn)]
    head = (heavy or program.equations)[0]
    self.name = head.why
    self.blocks = tuple(
      name for name, block in graph.blocks.items() if head in block.equations
    )
    self.first = 0  # Of its measurements.
    written = head.outputs[0].axes
    summed = (head.products or [])[len(written) :]
    values = [v for e in program.equations for v in (*e.inputs, *e.outputs)]
    self.coordinates: list[list[str]] = []
    seen: set[str] = set()
    for axes in (summed, written, [a for v in values for a in v.axes]):
      groups = [names[a] for x in axes for a in ax.atoms(x) if a in names]
      new = [name for name in dict.fromkeys(groups) if name not in seen]
      self.coordinates.append(new)
      seen.update(new)
    self.sizes = tuple(
      _coordinate(new, axes, names)
      for new, axes in zip(self.coordinates, (summed, written, []), strict=True)
    )

  def at(self, fractions: Sequence[float]) -> '_Job':
    """The part at a fraction of the groups of each coordinate."""
    kept = {
      name: np.arange(_part_of(self.graph.groups[name].size, fraction))
      for groups, fraction in zip(self.coordinates, fractions, strict=True)
      for name in groups
    }
    return _job(runner(self.graph, kept), self.program)

  def key(self, fractions: Sequence[float]) -> Any:
    """The same for parts that compute the same at the same sizes."""
    texts = []
    for fraction in (fractions[0], 1.0):
      for k in range(len(self.coordinates)):
        at = [1.0] * len(self.coordinates)
        at[k] = fraction
        job = self.at(at)
        texts.append(str(jax.make_jaxpr(job.fn)(*job.specs)))
    return tuple(re.sub('0x[0-9a-f]+', '', text) for text in texts)

  def knots(self, fractions: Sequence[float]) -> np.ndarray:
    """The sizes of each coordinate at the fractions, float64[D, K]."""
    widths = [
      {
        name: _part_of(group.size, fraction)
        for name, group in self.graph.groups.items()
      }
      for fraction in fractions
    ]
    return np.array(
      [[evaluate(p, w) for w in widths] for p in self.sizes], np.float64
    )

  def points(self, fractions: Sequence[float]) -> list[tuple[float, ...]]:
    """What is measured; a coordinate without groups has one size."""
    axes = [fractions if groups else (1.0,) for groups in self.coordinates]
    return list(itertools.product(*axes))

  def grid(
    self,
    fractions: Sequence[float],
    ms: Sequence[float],
    overhead: float,
    each: float,
  ) -> np.ndarray:
    """Milliseconds at every combination of fractions, float64[K, ..., K]."""
    count = len(self.points(fractions))
    grid = np.array(ms[self.first : self.first + count])
    grid = np.maximum(grid - overhead - each * len(self.program.inputs), 0.0)
    axes = [len(fractions) if groups else 1 for groups in self.coordinates]
    grid = grid.reshape(axes)
    for k in range(grid.ndim):
      grid = np.maximum.accumulate(grid, k)
    return np.broadcast_to(grid, [len(fractions)] * len(axes))


def _coordinate(
  groups: Sequence[str], axes: Sequence[Axis], names: Mapping[Axis, str]
) -> Polynomial:
  """Entries of the axes that some of the groups are in, or their widths."""
  touched = [
    axis
    for axis in axes
    if any(names.get(atom) in groups for atom in ax.atoms(axis))
  ]
  return entries(touched, names) if touched else {(g,): 1 for g in groups}


def _part_of(size: int, fraction: float) -> int:
  return max(1, round(size * fraction))


class _Job(NamedTuple):
  """A function and the shapes of what it is called with."""

  fn: Callable[..., Any]
  specs: list[jax.ShapeDtypeStruct]


def _job(run: Run, program: Program) -> _Job:
  specs = []
  for value in program.inputs:
    shape = tuple(run.size(axis) for axis in value.axes)
    if any(not isinstance(n, int) for n in shape):
      raise ValueError(
        f'The graph was traced with the symbolic shape {shape}; trace it with '
        f'the batch that is to be measured.'
      )
    specs.append(jax.ShapeDtypeStruct(shape, value.dtype))
  return _Job(lambda *xs: run(program, xs), specs)


def _empty(arguments: int) -> _Job:
  spec = jax.ShapeDtypeStruct((), np.float32)
  return _Job(lambda *xs: xs[0] + 1, [spec] * arguments)


def _network(graph: Graph, widths: Mapping[str, int]) -> _Job:
  kept = {name: np.arange(width) for name, width in widths.items()}
  return _job(runner(graph, kept), graph.program)


def _widths(graph: Graph, turns: Sequence[float]) -> dict[str, int]:
  """Fractions of the groups by turns."""
  turn = itertools.cycle(turns)
  return {n: _part_of(g.size, next(turn)) for n, g in graph.groups.items()}


def _made_up(spec: jax.ShapeDtypeStruct) -> Any:
  if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
    return jax.random.split(jax.random.key(0), spec.shape)
  is_float = jnp.issubdtype(spec.dtype, jnp.inexact)
  return jnp.full(spec.shape, 0.5 if is_float else 0, spec.dtype)


def _fastest(
  jobs: Sequence[_Job],
  rounds: int,
  clock: Callable[[], float],
  tick: Callable[[], Any],
) -> list[float]:
  """The milliseconds of the fastest of so many calls of each, all in turn."""
  calls = []
  for job in jobs:
    inputs = [_made_up(spec) for spec in job.specs]
    calls.append(jax.jit(job.fn, keep_unused=True))
    jax.block_until_ready(calls[-1](*inputs))
    tick()
  fastest = np.full(len(jobs), np.inf)
  for _ in range(rounds):
    for k, job in enumerate(jobs):
      inputs = jax.block_until_ready([_made_up(spec) for spec in job.specs])
      for _ in range(2):  # The second finds its inputs in the cache.
        begin = clock()
        jax.block_until_ready(calls[k](*inputs))
        fastest[k] = min(fastest[k], clock() - begin)
    tick()
  return [1e3 * x for x in fastest]
