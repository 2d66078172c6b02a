"""What a network costs at any widths: made once from a graph, without a run.

MACs are the multiply-adds of convolutions and matrix products; FLOPs = 2 MACs.
They are the same where such a product is written out, as a depthwise
convolution may be as shifts (:mod:`jaxprune.cost.taps`). A body counts as often
as it runs, and what cannot be counted is refused
(:mod:`jaxprune.cost.steps`).
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxprune import plans
from jaxprune.checks import kinds
from jaxprune.cost import polynomials, steps
from jaxprune.cost.polynomials import Polynomial, Term, entries, evaluate
from jaxprune.cost.steps import Assume, Branches, Step
from jaxprune.cost.taps import written_out
from jaxprune.structure.graph import Graph
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.typed import Program, loop_parts
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.rules.primitives import LAYOUT, known, where

Count = Literal['norms', 'activations', 'pooling']
COUNTS: tuple[Count, ...] = ('norms', 'activations', 'pooling')


class Layer(NamedTuple):
  """The cost of one layer; all but the activations add up to the whole."""

  name: str
  macs: int
  parameters: int
  weight_bytes: int
  activation_bytes: int


Layers = Mapping[str, Collection[str]]  # Variable -> paths of leaves.
Priced = tuple[str, Polynomial]  # A layer and the multiply-adds in it.


@kinds.checked
def macs_polynomial(
  graph: Graph,
  count: Collection[Count] = (),
  *,
  layers: Layers | None = None,
  assume: Assume | None = None,
) -> Polynomial:
  """Returns the multiply-adds at the traced arguments as a polynomial.

  Its variables are the groups, whose values are widths, and the blocks, whose
  values are 1 (open) or 0 (dropped): see :func:`variables`.

  Args:
    graph: the graph; trace it with a batch of 1 for multiply-adds an example.
    count: what counts beside convolutions and matrix products:

      - 'norms': one for each entry of data that is shifted or scaled by a
        statistic or a parameter (``sub``, ``mul``, ``div``, ``add`` with a
        parameter, or with data of fewer entries); a ``mul`` and the ``add``
        after it are one multiply-add. So a batch norm is two an entry, and a
        bias one.
      - 'activations': one for each entry of a nonlinear operation; a clip is
        one.
      - 'pooling': one for each entry that a window or a reduction reads, of
        which those of norms and softmaxes.

    layers: further switches, as those of blocks: variable -> the leaves whose
      operations it opens and closes.
    assume: what does not follow from the program: a regular expression over
      operations as errors name them ('while at net.py:12') -> the steps of a
      ``while`` whose counter does not run between constants, the branch of a
      ``cond`` (else the one that costs most, where one does at all widths), and
      the multiply-adds of one call of an operation of which nothing is known
      here (a Fourier transform, a solver, a kernel of Pallas).

  Raises:
    ValueError: if ``count`` names something else, the graph was traced with
      a symbolic size, a number is needed that ``assume`` does not give, or it
      matches no operation that may need one.
  """
  priced = _products(graph, count, layers, assume)
  return polynomials.total(polynomial for _, polynomial in priced)


@kinds.checked
def parameters_polynomial(
  graph: Graph, *, layers: Layers | None = None
) -> Polynomial:
  """Returns the number of entries of all leaves as a polynomial.

  Where the leaves come in Flax's collections, those of ``params`` alone count.

  Args:
    graph: the graph.
    layers: as :func:`macs_polynomial`.
  """
  total: dict[Term, int] = {}
  for path, polynomial in _leaves(graph, layers).items():
    if _is_parameter(graph, path):
      polynomials.add(total, polynomial)
  return total


@kinds.checked
def weight_bytes_polynomial(
  graph: Graph, *, layers: Layers | None = None
) -> Polynomial:
  """Returns the bytes of all leaves, statistics too, as a polynomial.

  Args:
    graph: the graph.
    layers: as :func:`macs_polynomial`.
  """
  total: dict[Term, int] = {}
  for path, polynomial in _leaves(graph, layers).items():
    size = graph.leaves[path].dtype.itemsize
    polynomials.add(total, polynomials.times(polynomial, size))
  return total


@kinds.checked
def activation_bytes_polynomials(graph: Graph) -> tuple[Polynomial, ...]:
  """Returns polynomials of which the largest is the live activations' bytes.

  One for each operation, in the order of the program: the bytes of all arrays
  that depend on the arguments and that it or a later one reads, its own result
  too. An upper bound, since a compiler that fuses operations stores fewer; what
  it sets aside beside them (copies of kernels in a layout of its own) is not in
  it. The arguments count, params do not. Polynomials that another exceeds at
  all widths are left out.
  """
  return polynomials.undominated(
    polynomial for _, polynomial in _Live(graph).points(graph.program)
  )


@kinds.checked
def macs(
  graph: Graph,
  plan: plans.Plan | None = None,
  count: Collection[Count] = (),
  *,
  assume: Assume | None = None,
) -> int:
  """Returns the multiply-adds at the traced arguments, an exact int.

  Args:
    graph: the graph; trace it with a batch of 1 for multiply-adds an example.
    plan: what is kept; None for the whole network.
    count: what else counts; see :func:`macs_polynomial`.
    assume: what does not follow from the program; see there too. Of a ``cond``
      the branch that costs most at these widths, if it is not said.

  Raises:
    ValueError: as :func:`macs_polynomial`, or if the plan is of another graph.
  """
  values = variables(graph, plan)
  priced = _products(at(graph, plan), count, None, assume, values)
  return evaluate(polynomials.total(each for _, each in priced), values)


@kinds.checked
def parameters(graph: Graph, plan: plans.Plan | None = None) -> int:
  """Returns the number of entries of all leaves, an exact int."""
  return evaluate(
    parameters_polynomial(at(graph, plan)), variables(graph, plan)
  )


@kinds.checked
def weight_bytes(graph: Graph, plan: plans.Plan | None = None) -> int:
  """Returns the bytes of all leaves, statistics too, an exact int."""
  return evaluate(
    weight_bytes_polynomial(at(graph, plan)), variables(graph, plan)
  )


@kinds.checked
def activation_bytes(graph: Graph, plan: plans.Plan | None = None) -> int:
  """Returns an upper bound of the bytes of live activations, an exact int.

  See :func:`activation_bytes_polynomials`.
  """
  return evaluate(
    activation_bytes_polynomials(at(graph, plan)), variables(graph, plan)
  )


@kinds.checked
def layers(
  graph: Graph,
  plan: plans.Plan | None = None,
  count: Collection[Count] = (),
  *,
  assume: Assume | None = None,
) -> list[Layer]:
  """Returns the cost of each layer, in the order of the program.

  A layer is what its leaves are filed under: ``block/conv`` owns the leaves
  ``block/conv/kernel`` and ``block/conv/bias``. What reads no leaf (attention,
  an activation) is named by its operation and line. The activations of a layer
  are the live ones while it runs.

  Args:
    graph: the graph.
    plan: what is kept; None for the whole network.
    count: what else counts; see :func:`macs_polynomial`.
    assume: what does not follow from the program; see there too.

  Raises:
    ValueError: as :func:`macs`.
  """
  values, graph = variables(graph, plan), at(graph, plan)
  found: dict[str, list[int]] = {}
  row = lambda name: found.setdefault(name, [0, 0, 0, 0])
  for name, polynomial in _products(graph, count, None, assume, values):
    row(name)[0] += evaluate(polynomial, values)
  for path, polynomial in _leaves(graph).items():
    size = evaluate(polynomial, values)
    figures = row(_module(graph, path))
    figures[1] += size if _is_parameter(graph, path) else 0
    figures[2] += size * graph.leaves[path].dtype.itemsize
  for (eqn, place), polynomial in _Live(graph).points(graph.program):
    name = _owner(graph, eqn, place)
    if name in found:
      figures = found[name]
      figures[3] = max(figures[3], evaluate(polynomial, values))
  return [Layer(name, *figures) for name, figures in found.items()]


@kinds.checked
def variables(graph: Graph, plan: plans.Plan | None = None) -> dict[str, int]:
  """Returns the value of each variable: the widths and blocks a plan leaves.

  The resolution is no variable: for a plan that changes it the polynomials are
  those of ``plans.at(graph, plan.resolution, plan.resized)``.

  Args:
    graph: the graph.
    plan: what is kept; None for the whole network.

  Returns:
    group -> width, and block -> 1 if it stays, else 0.
  """
  if plan is None:
    widths = {name: group.size for name, group in graph.groups.items()}
    return {**widths, **dict.fromkeys(graph.blocks, 1)}
  widths = {
    name: after for name, (_, after) in plans.widths(graph, plan).items()
  }
  return {**widths, **plans.open_blocks(graph, plan)}


def at(graph: Graph, plan: plans.Plan | None) -> Graph:
  """Returns the graph at the resolutions of a plan, those on the way too."""
  if plan is None:
    return graph
  return plans.at(graph, plan.resolution, plan.resized)


def _names(graph: Graph) -> dict[Axis, str]:
  return {atom: name for name, atom in graph.atoms.items()}


def _leaves(
  graph: Graph, layers: Layers | None = None
) -> dict[str, Polynomial]:
  """The entries of each leaf."""
  names, found = _names(graph), {}
  switches = {name: block.leaves for name, block in graph.blocks.items()}
  for path, leaf in graph.leaves.items():
    gate = [
      n for n, own in {**switches, **(layers or {})}.items() if path in own
    ]
    found[path] = polynomials.times(
      entries(leaf.axes, names), {tuple(sorted(gate)): 1}
    )
  return found


def _in_collections(graph: Graph) -> bool:
  return any(path.startswith('params/') for path in graph.leaves)


def _is_parameter(graph: Graph, path: str) -> bool:
  return path.startswith('params/') or not _in_collections(graph)


def _module(graph: Graph, path: str) -> str:
  """The layer that owns a leaf."""
  parts = path.split('/')[1 if _in_collections(graph) else 0 :]
  return '/'.join(parts[:-1] or parts)


def _owner(graph: Graph, eqn: Equation, place: str) -> str:
  """The layer that an operation belongs to: that of the largest leaf read."""
  sources = [
    path for value in eqn.inputs if not value.has_data for path in value.sources
  ]
  if not sources:
    return place
  size = lambda path: math.prod(graph.leaves[path].shape)
  return _module(graph, max(sorted(sources), key=size))


def _products(
  graph: Graph,
  count: Collection[Count] = (),
  layers: Layers | None = None,
  assume: Assume | None = None,
  values: Mapping[str, int] | None = None,
) -> list[Priced]:
  """The multiply-adds of each operation that has some, by layer.

  Of branches those of the largest: at the values of the variables, or at any.
  """
  given = [count] if isinstance(count, str) else count
  unknown = [repr(what) for what in given if what not in COUNTS]
  if unknown or isinstance(count, str):
    raise ValueError(
      f'`count` takes any of {COUNTS}, in a tuple, got '
      f'{", ".join(unknown) or repr(count)}.'
    )
  prices = _Prices(graph, count, layers or {}, values)
  return prices.of(steps.walk(graph, assume))


class _Prices:
  """The multiply-adds of operations, as polynomials."""

  def __init__(
    self,
    graph: Graph,
    count: Collection[Count],
    layers: Layers,
    values: Mapping[str, int] | None,
  ):
    self.graph = graph
    self.values = values
    self.count = count
    self.layers = layers
    self.names = _names(graph)
    self.written = written_out(graph.flow, graph.program)

  def of(self, walked: Iterable[Step | Branches]) -> list[Priced]:
    """The layer and the polynomial of each operation that has one."""
    priced: list[Priced] = []
    for step in walked:
      if isinstance(step, Branches):
        priced += self.largest(step)
      elif (polynomial := self.price(step)) is not None:
        if step.untold:
          raise ValueError(
            f'{step.untold} makes a number of steps that does not follow from '
            f'constants, so that what it runs cannot be counted: say how many, '
            f"as in `assume={{'while at .*': 10}}`, or write it as a scan."
          )
        priced.append((_owner(self.graph, step.eqn, step.place), polynomial))
    return priced

  def price(self, step: Step) -> dict[Term, int] | None:
    """The multiply-adds of all runs of an operation, None if it has none."""
    eqn = step.eqn
    if steps.is_opaque(eqn):
      if step.told is None:
        raise ValueError(
          f'{step.place} may multiply and add, and how often is not known: say '
          f"it, as in `assume={{'{eqn.primitive.name} at .*': 0}}`."
        )
      each: dict[Term, int] = {(): step.told} if step.told else {}
    else:
      product = steps.multiply_adds(eqn)
      axes, number = product or (None, 1)
      if eqn in self.written.products:
        axes = eqn.outputs[0].axes
      if axes is None and eqn not in self.written.sums:
        axes = _counted(eqn, step.makers, self.count)
      if axes is None:
        return None
      each = polynomials.times(entries(axes, self.names), number)
    sources = {path for value in eqn.inputs for path in value.sources}
    switched = [name for name, own in self.layers.items() if sources & {*own}]
    term = tuple(sorted((*step.gate, *switched)))
    return polynomials.times(each, {term: step.runs})

  def largest(self, branches: Branches) -> list[Priced]:
    """Those of the branch that costs most."""
    bodies = [self.of(body) for body in branches.bodies]
    if branches.told is not None:
      if branches.told >= len(bodies):
        raise ValueError(
          f'`assume` takes branch {branches.told} of {branches.place}, which '
          f'has branches 0 to {len(bodies) - 1}.'
        )
      return bodies[branches.told]
    totals = [polynomials.total(p for _, p in body) for body in bodies]
    if self.values is not None:
      costs = [evaluate(polynomial, self.values) for polynomial in totals]
      return bodies[costs.index(max(costs))]
    for body, most in zip(bodies, totals, strict=True):
      if all(
        most.get(term, 0) >= n for other in totals for term, n in other.items()
      ):
        return body
    raise ValueError(
      f'{branches.place} has branches of which none costs most at all widths, '
      f'so that its multiply-adds are no polynomial: say which one runs, as in '
      f"`assume={{'cond at .*': 0}}`."
    )


_LAYOUT = where(moves=LAYOUT)


def _counted(
  eqn: Equation, makers: Mapping[Value, Equation], count: Collection[Count]
) -> list[Axis] | None:
  """The axes of the entries that count as one multiply-add each, if any."""
  name, (out, *_) = eqn.primitive.name, eqn.outputs or [None]
  if out is None or not any(value.has_data for value in eqn.inputs):
    return None
  kind = known(name).counts
  if kind == 'pooling':
    return eqn.inputs[0].axes if 'pooling' in count else None
  if out.dtype is None or not jnp.issubdtype(out.dtype, jnp.inexact):
    return None
  # The second half of a clip, and the addition of a multiply-add.
  joined = {'max': 'min', 'min': 'max', 'add': 'mul'}.get(name)
  before = [makers[value] for value in eqn.inputs if value in makers]
  if any(maker.primitive.name == joined for maker in before):
    return None
  if kind == 'activations' and kind in count:
    return out.axes
  if kind == 'norms' and kind in count:
    origins = [_origin(value, makers) for value in eqn.inputs]
    sizes = [math.prod(value.shape) for value in origins]
    if any(
      n > 1 and (value.sources or (value.has_data and n < math.prod(out.shape)))
      for n, value in zip(sizes, origins, strict=True)
    ):
      return out.axes
  return None


def _origin(value: Value, makers: Mapping[Value, Equation]) -> Value:
  """The array that a broadcast or reshaped one is made of."""
  while value in makers and makers[value].primitive.name in _LAYOUT:
    value = makers[value].inputs[0]
  return value


Live = tuple[tuple[Equation, str], Polynomial]


class _Live:
  """The bytes that are live at each operation of a graph, in order."""

  def __init__(self, graph: Graph):
    self.names = _names(graph)
    self.gates = steps.gates(graph)

  def bytes_of(
    self, values: Mapping[Value, Term], loops: bool
  ) -> dict[Term, int]:
    """The bytes of arrays, each with the blocks that it goes with."""
    total: dict[Term, int] = {}
    for value, gate in values.items():
      if (value.has_data or loops) and value.dtype is not None:
        size = {gate: value.dtype.itemsize}
        size = polynomials.times(entries(value.axes, self.names), size)
        polynomials.add(total, size)
    return total

  def points(
    self,
    program: Program,
    around: Polynomial | None = None,
    loops: bool = False,
    constants: int = 0,
    outer: str = '',
    outer_gate: Term = (),
  ) -> list[Live]:
    """Every operation with what is live there.

    Args:
      program: the program.
      around: what is live outside of a body.
      loops: whether it is the body of a loop: its inputs are arrays of their
        own, and all depend on data after the first step.
      constants: how many of its first inputs are those outside, at any step.
      outer: where the body is called.
      outer_gate: the blocks that the call goes with.
    """
    equations = program.equations
    last: dict[Value, int] = dict.fromkeys(program.outputs, len(equations))
    for k, eqn in reversed(list(enumerate(equations))):
      for value in eqn.inputs:
        last.setdefault(value, k)
    live, owned = dict(around or {}), {}
    if around is None or loops:  # Else they are live outside already.
      owned = dict.fromkeys(program.inputs[constants:], outer_gate)
    polynomials.add(live, self.bytes_of(owned, loops))
    found: list[Live] = []
    for k, eqn in enumerate(equations):
      place = outer if eqn.why.endswith(' at ') and outer else eqn.why
      gate = self.gates.get(eqn, outer_gate)
      before, made = dict(live), dict.fromkeys(eqn.outputs, gate)
      polynomials.add(live, self.bytes_of(made, loops))
      owned.update(made)
      found.append(((eqn, place), dict(live)))
      is_loop = eqn.primitive.name in ('scan', 'while')
      for body, fixed in zip(eqn.programs, _constants(eqn), strict=True):
        # A loop fills arrays that exist already; other bodies make them.
        live_there = live if is_loop else before
        found += self.points(body, live_there, is_loop, fixed, place, gate)
      gone = {
        value: owned.pop(value)
        for value in dict.fromkeys((*eqn.inputs, *eqn.outputs))
        if value in owned and last.get(value, k) == k
      }
      polynomials.add(live, self.bytes_of(gone, loops), -1)
    return found


def _constants(eqn: Equation) -> list[int]:
  """How many of the first inputs of each body never change."""
  if eqn.primitive.name == 'scan':
    return [loop_parts(eqn.params)[0]]
  if eqn.primitive.name == 'while':
    return [eqn.params['cond_nconsts'], eqn.params['body_nconsts']]
  return [0] * len(eqn.programs)
