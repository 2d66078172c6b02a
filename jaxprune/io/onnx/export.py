"""Functions as ONNX files, for runtimes that are not JAX.

The jaxpr is translated operation by operation: what does not depend on the
inputs is computed, scales and shifts (a batch normalisation in its eval form)
move into the kernels before them, and channels come first where ONNX wants it.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import tree
from jaxprune.checks import extras, kinds
from jaxprune.io.onnx import contractions, layout, pointwise, translation
from jaxprune.io.onnx.nodes import Node, Tape, simplify
from jaxprune.io.onnx.views import Writer
from jaxprune.io.stablehlo import open_batch, write
from jaxprune.structure.program import jaxprs
from jaxprune.structure.program import typed as program
from jaxprune.structure.program.axes import atom
from jaxprune.structure.rules import Value

OPSET = 17
_LARGEST = 2**31 - 1  # Bytes of a protocol buffer.
FAMILIES = (
  pointwise,
  contractions,
  layout,
)  # Registered when they are imported.


@kinds.checked
def save_onnx(
  path: str | os.PathLike,
  fn: Callable[..., Any],
  *args: Any,
  batch: str | None = 'batch',
) -> int:
  """Writes a function as an ONNX file; the arrays it closes over with it.

  To bake the weights in, close over them: ``save_onnx(path, lambda x:
  small(params, x), x)``. The inputs are called ``input``, the outputs
  ``output``, with ``_`` and their path where there are several. The file
  appears whole or not at all, and is checked before.

  In float32 each function of one entry is within 4e-7 of its value, or 2^-126
  where the value is smaller than a normal number, infinities and NaN included.
  Two are within an absolute 2^-23 instead, so that their small values are not
  exact: ``logistic`` (sigmoid, silu), as ONNX Runtime has it, and ``erfc``
  (gelu), which is written as 1 - erf(x), one operation where an exact tail
  takes thirty.

  A depthwise convolution that is written as shifted products stays that; build
  a MobileNet with ``grouped=True`` to export it.

  Args:
    path: of the file.
    fn: a pure function of arrays, without control flow that depends on them.
    *args: what it is called with: pytrees of arrays or of
      ``jax.ShapeDtypeStruct``, of which only shapes and dtypes count.
    batch: a name for the first axis of every array, whose length is then left
      open; None to fix all shapes as they are.

  Returns:
    The size of the file in bytes.

  Raises:
    MissingExtraError: if the package onnx is not installed.
    ValueError: if an operation has no translation, with its name and the line
      that called it; if ``args`` hold no array or one has no axis to leave
      open; or if the file would have more than 2 GiB.

  References:
    ONNX operators, opset 17.
  """
  onnx = extras.require('onnx')
  specs = open_batch(args, batch)
  model = _model(onnx, fn, specs)
  if model.ByteSize() > _LARGEST:
    raise ValueError(
      f'An ONNX file holds up to 2 GiB, got {model.ByteSize() / 2**30:.1f}; '
      f'export the function as StableHLO with jaxprune.io.save_stablehlo.'
    )
  onnx.checker.check_model(model)
  return write(path, model.SerializeToString(deterministic=True))


def _model(onnx: Any, fn: Callable[..., Any], args: Sequence[Any]) -> Any:
  closed, out_spec = jax.make_jaxpr(fn, return_shape=True)(*args)
  specs = _named('input', args)
  typed = [
    Value(x.shape, x.dtype, [atom(n) for n in x.shape], has_data=True)
    for x in specs.values()
  ]
  jaxpr = jaxprs.eliminate_dead_code(closed.jaxpr)
  flat = program.build(jaxpr, closed.consts, typed, plain=True)
  writer = Writer()
  inputs = [writer.input(name, x.shape, x.dtype) for name, x in specs.items()]
  views = translation.run(writer, flat, inputs)
  outputs = dict(zip(_named('output', out_spec), views, strict=True))
  for name, view in outputs.items():
    tensor = writer.natural(view)
    writer.tape.nodes.append(Node('Identity', (tensor,), (name,), {}))
  nodes = simplify(writer.tape, list(outputs))
  describe = lambda name, x: onnx.helper.make_tensor_value_info(
    name, _element(onnx, x.dtype), [_dimension(n) for n in x.shape]
  )
  graph = onnx.helper.make_graph(
    [_proto(onnx, node) for node in nodes],
    'jaxprune',
    [describe(name, x) for name, x in specs.items()],
    [describe(name, x) for name, x in outputs.items()],
    _initializers(onnx, writer.tape, nodes),
  )
  return onnx.helper.make_model(
    graph,
    producer_name='jaxprune',
    ir_version=8,
    opset_imports=[onnx.helper.make_opsetid('', OPSET)],
  )


def _named(stem: str, values: tree.PyTree) -> dict[str, Any]:
  """Leaves by name: the stem alone if there is one, else with the path."""
  leaves = tree.leaves(values)
  if len(leaves) == 1:
    return dict(zip([stem], leaves.values(), strict=True))
  return {f'{stem}_{path}': leaf for path, leaf in leaves.items()}


def _dimension(size: Any) -> Any:
  return int(size) if isinstance(size, (int, np.integer)) else str(size)


def _element(onnx: Any, dtype: Any) -> int:
  return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _proto(onnx: Any, node: Node) -> Any:
  attributes = {
    name: _element(onnx, value) if isinstance(value, np.dtype) else value
    for name, value in node.attributes.items()
  }
  return onnx.helper.make_node(
    node.op, node.inputs, node.outputs, node.outputs[0], **attributes
  )


def _initializers(onnx: Any, tape: Tape, nodes: Sequence[Node]) -> list[Any]:
  used = {name for node in nodes for name in node.inputs}
  return [
    onnx.numpy_helper.from_array(value, name)
    for name, value in tape.constants.items()
    if name in used
  ]
