"""The typed program: a jaxpr, flat, every axis typed.

``build`` walks a jaxpr once, inlines calls and types every equation by its
rule; control flow and custom derivatives keep typed bodies of their own. What
depends on no input is a constant, made anew wherever it is used (see
:mod:`jaxprune.structure.program.constants`), so that it ties nothing.
:mod:`jaxprune.structure.program.run` evaluates the program again, smaller or
masked.

The jaxpr of ``scan(lambda c, x: (tanh(c @ w + x), c), h, xs)`` with h[4],
w[4, 4] and xs[2, 4] becomes one equation ``scan`` with one body, typed once and
not once per step. The body's carry c is a value of its own with the axis of h;
what it returns for the next step, with the axis of w's columns, must have the
type of c. So both axes of w, the axis of h and the second of xs are one group
of 4, and the first axis of xs, the steps, stays whole.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.structure import rules
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program import constants, derivatives
from jaxprune.structure.program.constants import Constant
from jaxprune.structure.program.jaxprs import (
  INLINED,
  body_of,
  eliminate_dead_code,
  line_of,
)
from jaxprune.structure.program.run import Run as Run
from jaxprune.structure.rules import Equation, Value


@dataclasses.dataclass(eq=False, slots=True)
class Program:
  """A flat list of typed equations from inputs to outputs.

  Attributes:
    inputs: what it reads.
    plain: whether it is a derivative, in which custom derivatives are inlined:
      they are kept to the first order.
    equations: its operations in order.
    outputs: what it returns.
    numbers: the scalar constants that its equations read; they have no axis
      that a use could tie.
  """

  inputs: list[Value]
  plain: bool = False
  equations: list[Equation] = dataclasses.field(default_factory=list)
  outputs: list[Value] = dataclasses.field(default_factory=list)
  numbers: dict[Constant, Value] = dataclasses.field(default_factory=dict)


Operand = Value | Constant
# For each operand of an equation: the table that it is, or None. A body makes a
# table anew for each use, as a program does; a number it takes as it comes.
Known = Sequence[Constant | None]


def build(
  jaxpr: Any,
  consts: Sequence[Any],
  inputs: list[Value],
  plain: bool = False,
  known: Known = (),
) -> Program:
  """Types a jaxpr.

  Args:
    jaxpr: a ``jax.extend.core.Jaxpr``.
    consts: the values of its constvars.
    inputs: typed values, one for each of its invars.
    plain: whether to inline custom derivatives.
    known: the constants that the first inputs are at every call; the program
      makes these itself.

  Returns:
    The program; its values share their axis types with ``inputs``.
  """
  program = Program(list(inputs), plain)
  operands: list[Operand] = list(inputs)
  for k, constant in enumerate(known):
    if constant is not None:
      operands[k] = constant
  outputs = _walk(jaxpr, consts, operands, program)
  program.outputs = [_use(value, program) for value in outputs]
  return program


def all_equations(
  program: Program, derivatives: bool = False
) -> list[tuple[Equation, int]]:
  """Returns every equation, those of bodies too, with how often it runs.

  Args:
    program: the program.
    derivatives: whether to return those of custom derivatives too.
  """
  equations = []
  for eqn in program.equations:
    equations.append((eqn, 1))
    times = eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else 1
    bodies = [*eqn.programs]
    if derivatives and eqn.derivative is not None:
      bodies.append(eqn.derivative)
    for body in bodies:
      inner = all_equations(body, derivatives)
      equations += [(each, n * times) for each, n in inner]
  return equations


def _walk(
  jaxpr: Any,
  consts: Sequence[Any],
  inputs: Sequence[Operand],
  program: Program,
  where: str = '',
) -> Sequence[Operand]:
  """Adds the equations of a jaxpr to a program; returns its outputs.

  ``where`` is the line that called it, for what has no line of its own.
  """
  env: dict[Any, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
  for var, const in zip(jaxpr.constvars, consts, strict=True):
    env[var] = constants.given(const, var.aval)

  def read(var: Any) -> Operand:
    if isinstance(var, jex.Literal):
      aval: Any = var.aval
      return constants.given(np.asarray(var.val, aval.dtype), aval)
    return env[var]

  for jaxpr_eqn in jaxpr.eqns:
    name = jaxpr_eqn.primitive.name
    operands = [read(var) for var in jaxpr_eqn.invars]
    if name in INLINED or (program.plain and name in _CUSTOM):
      body, body_consts = body_of(jaxpr_eqn.params)
      called = line_of(jaxpr_eqn.source_info, where)
      outs = _walk(body, body_consts, operands, program, where=called)
    else:
      outs = constants.made(jaxpr_eqn, operands, where) or _append(
        jaxpr_eqn, operands, program, where
      )
    env.update(zip(jaxpr_eqn.outvars, outs, strict=True))
  return [read(var) for var in jaxpr.outvars]


def _append(
  jaxpr_eqn: Any, operands: Sequence[Operand], program: Program, where: str
) -> list[Value]:
  """Adds an equation to a program; returns its results, typed."""
  values = [_use(operand, program) for operand in operands]
  return _add(jaxpr_eqn, operands, values, program, where=where)


def _use(operand: Operand, program: Program) -> Value:
  """Returns the value of an operand; for a constant, a new one for this use.

  Two uses of one table must not tie what they meet, so that each has axis
  types of its own. With t = arange(4), ``h + t`` and ``k + t`` would otherwise
  make the axes of h and k one group. A table that is too large, or holds one
  number throughout, is computed by its equations at each use instead.
  """
  if isinstance(operand, Value):
    return operand
  results: dict[constants.Step, list[Value]] = {}

  def read(constant: Constant) -> Value:
    value = program.numbers.get(constant)
    if value is not None:
      return value
    if constant.step in results:
      value = results[constant.step][constant.place]
    else:
      axes = [ax.atom(n) for n in constant.shape]
      array = constants.table(constant)
      value = Value(constant.shape, constant.dtype, axes, array)
    if not constant.shape:
      program.numbers[constant] = value
    return value

  for step in constants.steps(operand, program.numbers):
    values = list(map(read, step.operands))
    results[step] = _add(
      step.equation, step.operands, values, program, where=step.where
    )
  return read(operand)


def _add(
  jaxpr_eqn: Any,
  operands: Sequence[Operand],
  values: list[Value],
  program: Program,
  where: str,
) -> list[Value]:
  """Adds an equation to a program; returns its results, typed.

  Args:
    jaxpr_eqn: the equation of the jaxpr.
    operands: what it reads; a body of control flow makes tables anew.
    values: the values of these operands.
    program: extended.
    where: the line that called it.
  """
  eqn = _equation(jaxpr_eqn, values, where)
  name = jaxpr_eqn.primitive.name
  if name in _CONTROL:
    known = [
      x if isinstance(x, Constant) and not constants.is_number(x) else None
      for x in operands
    ]
    _CONTROL[name](eqn, program.plain, known)
  else:
    rules.infer(eqn)
  program.equations.append(eqn)
  return eqn.outputs


def _equation(jaxpr_eqn: Any, operands: list[Value], where: str) -> Equation:
  """Returns an equation whose results are not typed yet."""
  sources = frozenset().union(*(value.sources for value in operands))
  has_data = any(value.has_data for value in operands)
  outputs = [
    Value(
      tuple(var.aval.shape),
      getattr(var.aval, 'dtype', None),
      sources=frozenset() if has_data else sources,
      has_data=has_data,
    )
    for var in jaxpr_eqn.outvars
  ]
  line = line_of(jaxpr_eqn.source_info, where)
  why = f'{jaxpr_eqn.primitive.name} at {line}'
  return Equation(
    jaxpr_eqn.primitive, dict(jaxpr_eqn.params), operands, outputs, why
  )


def _copy(value: Value, drop_first: bool = False) -> Value:
  """Returns a new value of the same types, for a body.

  With ``drop_first`` it is one step of a scanned value: [2, 4] becomes [4].
  """
  skip = 1 if drop_first else 0
  return Value(
    value.shape[skip:],
    value.dtype,
    list(value.axes[skip:]),
    sources=value.sources,
    has_data=value.has_data,
  )


def _unify_values(a: Value, b: Value, why: str) -> None:
  """Makes the axes of two values of one shape equal, one by one."""
  for x, y in zip(a.axes, b.axes, strict=True):
    ax.unify(x, y, why)


def _type_outputs(eqn: Equation, values: Sequence[Value]) -> None:
  """Gives the results of an equation the axes of other values."""
  for out, value in zip(eqn.outputs, values, strict=True):
    out.axes = list(value.axes)


def loop_parts(params: Mapping[str, Any]) -> tuple[int, int]:
  """Returns how many constants a scan takes, and how many carries after."""
  if 'num_consts' in params:
    return params['num_consts'], params['num_carry']
  consts, carries, _ = params['ft_in'].unpack()
  return len(consts), len(carries)


def _carry_data(jaxpr: Any, inputs: Sequence[Value], consts: int) -> None:
  """Marks what a loop carries as data where a step makes data of it.

  A carry that starts as a parameter (a learned first state h0) is data from
  the second step on. It may make another carry data in turn, so this repeats
  until nothing changes.
  """
  while True:
    has_data = dict(zip(jaxpr.invars, inputs, strict=True))
    known = {var for var, value in has_data.items() if value.has_data}
    for jaxpr_eqn in jaxpr.eqns:
      operands = [v for v in jaxpr_eqn.invars if not isinstance(v, jex.Literal)]
      if known.intersection(operands):
        known.update(jaxpr_eqn.outvars)
    changed = [
      value
      for out, value in zip(jaxpr.outvars, inputs[consts:], strict=False)
      if out in known and not value.has_data
    ]
    if not changed:
      return
    for value in changed:
      value.has_data, value.sources = True, frozenset()


def _scan(eqn: Equation, plain: bool, known: Known) -> None:
  """Types a scan: carries keep their types, the scanned axis stays whole."""
  params = eqn.params
  consts, carries = loop_parts(params)
  split = consts + carries
  for value in eqn.inputs[split:]:
    ax.lock(value.axes[0], f'{eqn.why} steps along it')
  inputs = [_copy(v, k >= split) for k, v in enumerate(eqn.inputs)]
  _carry_data(body_of(params)[0], inputs, consts)
  body = build(*body_of(params), inputs, plain, known[:consts])
  for out, carry in zip(
    body.outputs[:carries], inputs[consts:split], strict=True
  ):
    _unify_values(out, carry, eqn.why)
  eqn.programs = (body,)
  for k, (out, value) in enumerate(zip(eqn.outputs, body.outputs, strict=True)):
    out.axes = list(value.axes)
    if k >= carries:
      out.axes.insert(0, ax.atom(out.shape[0], f'{eqn.why} steps along it'))

  def evaluate(run: Run, values: list[Any]) -> list[Any]:
    fixed = values[:consts]

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
      outs = run(body, [*fixed, *carry, *xs])
      carry = [
        c if out is None else lax.convert_element_type(out, c.dtype)
        for out, c in zip(outs[:carries], carry, strict=True)
      ]
      return tuple(carry), tuple(outs[carries:])

    carry, outs = lax.scan(
      step,
      _begin(run, values[consts:split], eqn.outputs[:carries]),
      tuple(values[split:]),
      length=params['length'],
      reverse=params['reverse'],
      unroll=params['unroll'],
    )
    return [*carry, *outs]

  eqn.evaluate = evaluate


def _while(eqn: Equation, plain: bool, known: Known) -> None:
  """Types a while loop: the carry has one type, before and after a step."""
  params = eqn.params
  n_cond, n_body = params['cond_nconsts'], params['body_nconsts']
  cond_consts = eqn.inputs[:n_cond]
  body_consts = eqn.inputs[n_cond : n_cond + n_body]
  carry = eqn.inputs[n_cond + n_body :]
  cond = build(
    *body_of(params, 'cond_jaxpr'),
    [_copy(v) for v in (*cond_consts, *carry)],
    plain,
    known[:n_cond],
  )
  inputs = [_copy(v) for v in (*body_consts, *carry)]
  _carry_data(body_of(params, 'body_jaxpr')[0], inputs, n_body)
  fixed = known[n_cond : n_cond + n_body]
  body = build(*body_of(params, 'body_jaxpr'), inputs, plain, fixed)
  for out, value in zip(body.outputs, carry, strict=True):
    _unify_values(out, value, eqn.why)
  eqn.programs = (cond, body)
  _type_outputs(eqn, carry)

  def evaluate(run: Run, values: list[Any]) -> list[Any]:
    fixed, inner = values[:n_cond], values[n_cond : n_cond + n_body]

    def step(state: Any) -> Any:
      outs = zip(run(body, [*inner, *state]), state, strict=True)
      return tuple(old if out is None else out for out, old in outs)

    out = lax.while_loop(
      lambda state: run(cond, [*fixed, *state])[0],
      step,
      _begin(run, values[n_cond + n_body :], eqn.outputs),
    )
    return list(out)

  eqn.evaluate = evaluate


def _cond(eqn: Equation, plain: bool, known: Known) -> None:
  """Types a condition: its branches return the same types."""
  index, *operands = eqn.inputs
  del index
  branches = [
    build(
      *body_of({'jaxpr': branch}),
      [_copy(v) for v in operands],
      plain,
      known[1:],
    )
    for branch in eqn.params['branches']
  ]
  for branch in branches[1:]:
    for a, b in zip(branch.outputs, branches[0].outputs, strict=True):
      _unify_values(a, b, eqn.why)
  eqn.programs = tuple(branches)
  _type_outputs(eqn, branches[0].outputs)

  def evaluate(run: Run, values: list[Any]) -> list[Any]:
    branch_index, *arguments = values
    calls = [
      lambda *xs, branch=branch: tuple(run(branch, xs)) for branch in branches
    ]
    return list(lax.switch(branch_index.astype(jnp.int32), calls, *arguments))

  eqn.evaluate = evaluate


def _remat(eqn: Equation, plain: bool, known: Known) -> None:
  """Types what a gradient computes again (jax.checkpoint)."""
  inputs = [_copy(v) for v in eqn.inputs]
  body = build(*body_of(eqn.params), inputs, plain, known)
  eqn.programs = (body,)
  _type_outputs(eqn, body.outputs)
  options = {k: eqn.params[k] for k in ('prevent_cse', 'policy')}

  def evaluate(run: Run, values: list[Any]) -> list[Any]:
    def call(*xs: Any) -> tuple[Any, ...]:
      return tuple(run(body, xs))

    return list(jax.checkpoint(call, **options)(*values))

  eqn.evaluate = evaluate


def _is_float(value: Any) -> bool:
  """Whether a value has a derivative."""
  return value.dtype is not None and jnp.issubdtype(value.dtype, jnp.inexact)


def _begin(
  run: Run, values: Sequence[Any], carried: Sequence[Value]
) -> tuple[Any, ...]:
  """What a loop carries at first; zeros where a dropped block alone read it.

  Of h = tanh(w x + u h) without u h the last step is all that is needed.
  """

  def shape(value: Value) -> tuple[int, ...]:
    return value.shape if run.masked else tuple(map(run.size, value.axes))

  return tuple(
    jnp.zeros(shape(like), like.dtype) if value is None else jnp.asarray(value)
    for value, like in zip(values, carried, strict=True)
  )


def _specs(values: Sequence[Value]) -> list[jax.ShapeDtypeStruct]:
  """Returns the shapes and dtypes of values, to trace on."""
  return [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values]


def _custom_derivative(eqn: Equation, known: Known, forward: bool) -> None:
  """Types a function jointly with its custom derivative, and keeps both.

  The derivative is traced by JAX at the original sizes, typed with the types of
  the function's inputs and outputs, and attached again at the new sizes.
  """
  jaxpr, consts = body_of(eqn.params)
  body = build(
    eliminate_dead_code(jaxpr),
    consts,
    [_copy(v) for v in eqn.inputs],
    known=known,
  )
  _type_outputs(eqn, body.outputs)
  floats = [k for k, v in enumerate(eqn.inputs) if _is_float(v)]
  slopes = [k for k, v in enumerate(eqn.outputs) if _is_float(v)]
  eqn.programs = (body,)
  if not floats or not slopes:

    def call(run: Run, values: list[Any]) -> list[Any]:
      return run(body, values)

    eqn.evaluate = call
    return
  # A tangent has the type of its input, a cotangent that of its output. Of
  # f(x, w) = x @ w: jvp(x, w, dx, dw) -> (y, dy), vjp(x, w, dy) -> (dx, dw).
  if forward:
    inner = [eqn.inputs[k] for k in floats]
    wanted = [*eqn.outputs, *(eqn.outputs[k] for k in slopes)]
  else:
    inner = [eqn.outputs[k] for k in slopes]
    wanted = [eqn.inputs[k] for k in floats]
  rule = derivatives.jvp_rule if forward else derivatives.vjp_rule
  closed = jax.make_jaxpr(rule(derivatives.original(eqn), floats, slopes))(
    _specs(eqn.inputs), _specs(inner)
  )
  derivative = build(
    eliminate_dead_code(closed.jaxpr),
    closed.consts,
    [_copy(v) for v in (*eqn.inputs, *inner)],
    plain=True,
    known=known,
  )
  eqn.derivative = derivative
  for out, value in zip(derivative.outputs, wanted, strict=True):
    _unify_values(out, value, eqn.why)
  attach = derivatives.with_jvp if forward else derivatives.with_vjp
  eqn.evaluate = attach(
    derivatives.Derivative(body, derivative, floats, slopes)
  )


def _custom_jvp(eqn: Equation, plain: bool, known: Known) -> None:
  del plain  # Inlined there.
  _custom_derivative(eqn, known, forward=True)


def _custom_vjp(eqn: Equation, plain: bool, known: Known) -> None:
  del plain  # Inlined there.
  _custom_derivative(eqn, known, forward=False)


_CUSTOM = {
  'custom_jvp_call': _custom_jvp,
  'custom_vjp_call': _custom_vjp,
}
_CONTROL: dict[str, Callable[[Equation, bool, Known], None]] = {
  'scan': _scan,
  'while': _while,
  'cond': _cond,
  'remat2': _remat,
  **_CUSTOM,
}
