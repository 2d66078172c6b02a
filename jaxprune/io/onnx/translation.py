"""The table of translations from JAX primitives to ONNX, and its use."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxprune.io.onnx.views import View, Writer, constant, is_symbolic
from jaxprune.structure.program.run import Run
from jaxprune.structure.program.typed import Program
from jaxprune.structure.rules import Equation, primitives

Translation = Callable[[Writer, Equation, list[View]], Sequence[View]]


def translation(*names: str, viewed: bool = False) -> Any:
  """Registers a function as the translation of the primitives of these names.

  Args:
    *names: of primitives.
    viewed: whether known operands go to the function too, as views, and are
      not computed with.
  """

  def register(fn: Translation) -> Translation:
    primitives.add(*names, onnx=fn, viewed=viewed)
    return fn

  return register


def require(condition: Any, why: str) -> None:
  """Raises ValueError(why) unless a condition holds."""
  if not condition:
    raise ValueError(why)


def run(writer: Writer, program: Program, views: Sequence[View]) -> list[View]:
  """Writes a program; returns the views of its outputs.

  Args:
    writer: where to.
    program: its custom derivatives inlined.
    views: of its inputs.

  Raises:
    ValueError: if an operation has no translation, with its name and line.
  """
  view_of = dict(zip(program.inputs, views, strict=True))
  read = lambda value: (
    view_of[value] if value in view_of else constant(value.constant)
  )
  for eqn in program.equations:
    outs = _translate(writer, eqn, [read(value) for value in eqn.inputs])
    view_of.update(zip(eqn.outputs, outs, strict=True))
  return [read(value) for value in program.outputs]


def _translate(
  writer: Writer, eqn: Equation, views: list[View]
) -> Sequence[View]:
  """Writes one operation; what depends on known arrays alone is computed."""
  row = primitives.known(eqn.primitive.name)
  if eqn.primitive.name == 'remat2':
    return run(writer, eqn.programs[0], views)
  is_known = bool(views) and all(view.is_known for view in views)
  shapes = [v.shape for v in (*views, *eqn.outputs)]
  is_static = not any(is_symbolic(n) for shape in shapes for n in shape)
  if is_known and is_static and not row.viewed:
    outs = Run({}).apply(eqn, [view.whole() for view in views])
    return [constant(out) for out in outs]
  if row.onnx is None:
    raise ValueError(
      f'{eqn.why} has no translation to ONNX. Write this part with other '
      f'operations, or export it as StableHLO with jaxprune.io.save_stablehlo.'
    )
  try:
    return row.onnx(writer, eqn, views)
  except ValueError as error:
    raise ValueError(
      f'{eqn.why} cannot be translated to ONNX: {error}.'
    ) from error
