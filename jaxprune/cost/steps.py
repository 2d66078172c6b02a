"""What a program runs, how often, and the multiply-adds of one run.

A body runs as often as its loop makes steps: those of a ``scan`` are written
in it, those of a ``while`` follow from its counter where that starts, moves and
ends by constants. ``while i < 7`` with i = 0, 3, 6 makes three steps, and its
condition runs four times. What cannot be told is refused by name, for a count
of it would be wrong: the caller may say what it is (``assume``).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import tree
from jaxprune.structure.graph import Graph
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.typed import Program, Run, all_equations
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.rules.primitives import known
from jaxprune.structure.walks.flow import Binding, Flow, read

Assume = Mapping[str, int]  # Pattern of 'operation at line' -> a number.
Gate = tuple[str, ...]  # The blocks that an operation goes with, sorted.

LONGEST = 1_000_000  # Steps of a loop that are counted by running its counter.

# Sums of products by another name: no number of them follows from the axes.
_OPAQUE_NAMES = """
  call_exported cholesky cholesky_update cudnn_fusion custom_linear_solve
  custom_partitioning dot_product_attention_bwd_wrapper
  dot_product_attention_fwd_wrapper dot_product_attention_fp8_bwd_wrapper
  dot_product_attention_fp8_fwd_wrapper eig eigh ffi_call fft geqp3 geqrf
  hessenberg householder_product linear_call lu ormqr pallas_call qr scaled_dot
  scaled_matmul scaled_matmul_wrapper schur shard_map svd symmetric_product
  triangular_solve tridiagonal tridiagonal_solve
"""
_OPAQUE = frozenset(_OPAQUE_NAMES.split())
# No rule types these, but there is no product in them.
_FREE_NAMES = """
  all_gather all_to_all approx_top_k axis_index broadcast_to debug_callback
  debug_print dim_as_value empty empty2 from_edtype inspect_sharding
  iota_2x32_shape layout_constraint lu_pivots_to_permutation pbroadcast
  philox2x32 philox4x32 platform_index pmax pmin ppermute preduced psum
  psum_invariant random_clone random_fold_in random_gamma random_seed
  random_split random_unwrap random_wrap reciprocal reduce reduce_scatter
  reshard rng_bit_generator rng_uniform select_and_scatter shape_assertion
  threefry2x32 threefry4x32 to_edtype vary_unreduced_cast_p
  with_memory_space_constraint zeros_like
"""
_FREE = frozenset(_FREE_NAMES.split())


class Step(NamedTuple):
  """An operation of a program or of a body in it.

  Attributes:
    eqn: the operation.
    runs: how often it runs; once a step of each loop in ``untold``.
    place: its name and the line that called it.
    gate: the blocks that it goes with.
    makers: the operations beside it, by what they make.
    told: what the caller says of it, if anything.
    untold: the loop around it whose number of steps is not known, or ''.
  """

  eqn: Equation
  runs: int
  place: str
  gate: Gate
  makers: Mapping[Value, Equation]
  told: int | None
  untold: str


class Branches(NamedTuple):
  """Bodies of which one call runs a single one.

  Attributes:
    place: the operation and the line that called it.
    bodies: what each of them runs.
    told: the branch to count, if the caller says so.
  """

  place: str
  bodies: Sequence[Sequence['Step | Branches']]
  told: int | None


def gates(graph: Graph) -> dict[Equation, Gate]:
  """Returns the blocks that each operation goes with."""
  gate_of: dict[Equation, Gate] = {}
  for name, block in graph.blocks.items():
    for eqn in block.equations:
      gate_of[eqn] = tuple(sorted((*gate_of.get(eqn, ()), name)))
  return gate_of


def walk(graph: Graph, assume: Assume | None = None) -> list[Step | Branches]:
  """Returns the operations of a graph, those of bodies too, in order.

  Args:
    graph: the graph.
    assume: what cannot be derived, as :func:`jaxprune.cost.macs` takes it.

  Raises:
    ValueError: if ``assume`` matches no operation that may need it or holds
      what is no number.
  """
  told = _answers(graph.program, assume or {})
  return list(_walk(graph.flow, graph.program, gates(graph), told))


def _answers(program: Program, assume: Assume) -> dict[str, int | None]:
  """What the caller says of each operation that may need it."""
  for rule, number in assume.items():
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
      raise ValueError(
        f'`assume` gives {rule!r} the number {number!r}: it takes the steps of '
        f'a while loop, the branch of a cond or the multiply-adds of another '
        f'operation, an int of at least 0.'
      )
  places = [eqn.why for eqn, _ in all_equations(program) if _is_asked(eqn)]
  none: dict[str, int | None] = {}
  return tree.match(assume, places, None, 'operation') if assume else none


def _is_asked(eqn: Equation) -> bool:
  return eqn.primitive.name in ('while', 'cond') or is_opaque(eqn)


def is_opaque(eqn: Equation) -> bool:
  """Whether nothing here knows how many products an operation makes."""
  name = eqn.primitive.name
  if eqn.programs or eqn.products is not None or name in _PRODUCTS:
    return False
  is_typed = known(name).rule is not None
  return name in _OPAQUE or not (is_typed or name in _FREE)


def _walk(
  stream: Flow,
  program: Program,
  gate_of: Mapping[Equation, Gate],
  told: Mapping[str, int | None],
  runs: int = 1,
  outer: str = '',
  outer_gate: Gate = (),
  untold: str = '',
) -> Iterator[Step | Branches]:
  makers = {value: eqn for eqn in program.equations for value in eqn.outputs}
  for eqn in program.equations:
    name = eqn.primitive.name
    place = outer if eqn.why.endswith(' at ') and outer else eqn.why
    gate, answer = gate_of.get(eqn, outer_gate), told.get(eqn.why)
    yield Step(eqn, runs, place, gate, makers, answer, untold)
    if name == 'cond':
      bodies = [
        list(_walk(stream, body, gate_of, told, runs, place, gate, untold))
        for body in eqn.programs
      ]
      yield Branches(place, bodies, answer)
      continue
    loop = untold
    for body, steps in zip(
      eqn.programs, _steps_of(stream, eqn, answer), strict=True
    ):
      if steps is None:
        steps, loop = 1, untold or place
      yield from _walk(
        stream, body, gate_of, told, runs * steps, place, gate, loop
      )


def _steps_of(
  stream: Flow, eqn: Equation, told: int | None
) -> list[int | None]:
  """How often each body of an operation runs in one call."""
  if eqn.primitive.name == 'scan':
    return [eqn.params['length']]
  if eqn.primitive.name == 'while':
    steps = trips(stream, eqn)
    steps = told if steps is None else steps
    return [None, None] if steps is None else [steps + 1, steps]
  return [1] * len(eqn.programs)


def multiply_adds(eqn: Equation) -> tuple[list[Axis], int] | None:
  """Returns axes and a number that multiply to an operation's multiply-adds.

  None for one that is no product.

  Args:
    eqn: an operation without bodies.
  """
  law = _PRODUCTS.get(eqn.primitive.name)
  if law is not None:
    return law(eqn)
  return None if eqn.products is None else (eqn.products, 1)


def _convolution(eqn: Equation) -> tuple[list[Axis], int]:
  """One for each entry of the window, where the data have no holes.

  A transposed convolution, and the derivative of one with strides, spreads its
  data: x 0 y 0 z at a step of 2. There every tap meets the entries alone, 3 by
  3 taps for a kernel of 3, and not the 7 by 3 of the result.
  """
  params, axes = eqn.params, eqn.products or []
  spread = params['lhs_dilation']
  if all(step == 1 for step in spread):
    return axes, 1
  (data, kernel), (out,) = eqn.inputs, eqn.outputs
  numbers, number = params['dimension_numbers'], 1
  for k, step in enumerate(spread):
    place, tap = numbers.out_spec[2 + k], numbers.rhs_spec[2 + k]
    size = data.shape[numbers.lhs_spec[2 + k]]
    if step > 1:
      starts = np.arange(out.shape[place]) * params['window_strides'][k]
      taps = np.arange(kernel.shape[tap]) * params['rhs_dilation'][k]
      at = starts[:, None] + taps - params['padding'][k][0]
      inside = (at >= 0) & (at <= step * (size - 1))
      number *= int(np.sum(inside & (at % step == 0)))
    else:
      number *= out.shape[place] * kernel.shape[tap]
  channels = [out.axes[k] for k in numbers.out_spec[:2]]
  return [*channels, kernel.axes[numbers.rhs_spec[1]]], number


def _ragged_dot(eqn: Equation) -> tuple[list[Axis], int]:
  """Every row meets the kernel of its own group alone.

  [12, 5] rows by [3, 5, 7] kernels: 12 x 7 x 5, however the rows are grouped.
  The derivative by the kernels sums over the ragged rows: [5, 12] by [12, 7] to
  [3, 5, 7] is 5 x 7 x 12 too, for the groups share the rows among them.
  """
  numbers = eqn.params['ragged_dot_dimension_numbers']
  contracted, _ = numbers.dot_dimension_numbers
  data, (out,) = eqn.inputs[0], eqn.outputs
  (ragged,) = numbers.lhs_ragged_dimensions
  axes = list(out.axes)
  if ragged in contracted[0]:
    axes = axes[1:]  # Without the axis of groups, which is the first.
  return [*axes, *(data.axes[k] for k in contracted[0])], 1


_PRODUCTS = {
  'conv_general_dilated': _convolution,
  'ragged_dot': _ragged_dot,
  'ragged_dot_general': _ragged_dot,
}


def trips(stream: Flow, loop: Equation) -> int | None:
  """Returns how many steps a ``while`` makes, if it follows from constants.

  Of what the loop carries only that counts on which the condition depends, now
  or a step later. Where all of that begins with constants, it is run alone: so
  a counter may rise, fall or double. None where it depends on an argument or
  a param, or takes more than ``LONGEST`` steps.

  Args:
    stream: the flow of the program that the loop is in.
    loop: an equation of it.
  """
  condition, body = loop.programs
  first = loop.params['cond_nconsts']
  second = loop.params['body_nconsts']
  state = loop.inputs[first + second :]
  counter: set[int] = set()
  more = _inputs_of(condition, condition.outputs)
  more = {k - first for k in more if k >= first}
  while not more <= counter:
    counter |= more
    outputs = [body.outputs[k] for k in counter]
    more = {k - second for k in _inputs_of(body, outputs) if k >= second}
  order = sorted(counter)
  begin = [constant_of(stream, state[k]) for k in order]
  fixed = [
    _constants(stream, part, outputs, loop.inputs[start : start + count])
    for part, outputs, start, count in (
      (condition, condition.outputs, 0, first),
      (body, [body.outputs[k] for k in order], first, second),
    )
  ]
  if any(x is None for x in (*begin, *fixed)):
    return None
  test = _Cut(condition, condition.outputs, fixed[0], order)
  step = _Cut(body, [body.outputs[k] for k in order], fixed[1], order)
  count = _run(test, step, begin)
  return count if count < LONGEST else None


class _Cut:
  """A body, cut down to what makes some of its outputs of a counter."""

  def __init__(
    self,
    program: Program,
    outputs: Sequence[Value],
    constants: Sequence[Any] | None,
    order: Sequence[int],
  ):
    equations = _needed(program, outputs)
    self.program = Program(program.inputs, False, equations, list(outputs))
    self.constants = list(constants or ())
    self.order = order

  def __call__(self, counter: Sequence[Any]) -> list[Any]:
    size = len(self.program.inputs)
    values = [*self.constants, *[None] * (size - len(self.constants))]
    for k, value in zip(self.order, counter, strict=True):
      values[len(self.constants) + k] = value
    return Run({})(self.program, values)


def _run(test: _Cut, step: _Cut, begin: Sequence[Any]) -> int:
  """Counts the steps of a loop over a counter, on the device."""
  with jax.ensure_compile_time_eval():
    begin = tuple(jnp.asarray(x) for x in begin)

    def advance(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
      count, counter = state
      moved = step(counter)
      kept = (
        x.astype(old.dtype) for x, old in zip(moved, counter, strict=True)
      )
      return count + 1, tuple(kept)

    goes_on = lambda state: (state[0] < LONGEST) & test(state[1])[0]
    return int(lax.while_loop(goes_on, advance, (jnp.int32(0), begin))[0])


def _needed(program: Program, outputs: Sequence[Value]) -> list[Equation]:
  """The equations of a program that make some values."""
  wanted, needed = set(outputs), []
  for eqn in reversed(program.equations):
    if not wanted.isdisjoint(eqn.outputs):
      needed.append(eqn)
      wanted.update(eqn.inputs)
  return needed[::-1]


def _inputs_of(program: Program, outputs: Sequence[Value]) -> set[int]:
  """The places of the inputs that some values of a program are made of."""
  read_by = {v for e in _needed(program, outputs) for v in e.inputs}
  read_by |= set(outputs)
  return {k for k, value in enumerate(program.inputs) if value in read_by}


def _constants(
  stream: Flow,
  program: Program,
  outputs: Sequence[Value],
  values: Sequence[Value],
) -> list[Any] | None:
  """The constants a body takes first; None where one it needs is not known."""
  needed = _inputs_of(program, outputs)
  known = [
    constant_of(stream, value) if k in needed else math.nan
    for k, value in enumerate(values)
  ]
  return None if any(x is None for x in known) else known


def constant_of(stream: Flow, value: Value) -> Any:
  """Returns what a value always is, or None if it depends on anything.

  Args:
    stream: the flow of the program that it is in.
    value: a value, in a body too.
  """
  if value.constant is not None:
    return value.constant
  makers = stream.makers.get(value, ())
  if value.has_data or value.sources or len(makers) != 1:
    return None
  (maker,) = makers
  if isinstance(maker, Binding):
    whole = maker.source.shape == value.shape  # Else a step of a scan takes it.
    return constant_of(stream, maker.source) if whole else None
  known = [constant_of(stream, v) for v in read(maker)]
  if any(x is None for x in known):
    return None
  with jax.ensure_compile_time_eval():
    outs = Run({}).apply(maker, [jnp.asarray(x) for x in known])
  return outs[maker.outputs.index(value)]
