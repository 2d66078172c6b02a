"""A list of ONNX nodes, how it is written down, and what is folded in it.

Plain data: a :class:`Node` names its operation and its tensors, a
:class:`Tape` holds nodes in order and the constants beside them.
:func:`simplify` takes a tape and makes it shorter: scales and shifts move into
the products before them, two clips become one, and what nothing reads goes.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Node(NamedTuple):
  """One ONNX operation; an input that is left out is the empty string."""

  op: str
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  attributes: dict[str, Any]


class Tape:
  """Nodes in the order they run; equal nodes and equal constants are one.

  Attributes:
    nodes: the nodes.
    constants: name -> value of every tensor that is known.
  """

  def __init__(self) -> None:
    self.nodes: list[Node] = []
    self.constants: dict[str, np.ndarray] = {}
    self._names: dict[Any, Any] = {}

  def constant(self, value: Any) -> str:
    """Returns the name of a constant tensor."""
    value = np.array(value, order='C', copy=None)
    digest = hashlib.sha256(value.tobytes()).digest()
    key = (value.shape, value.dtype.name, digest)
    if key not in self._names:
      self._names[key] = f'constant_{len(self.constants)}'
      self.constants[self._names[key]] = value
    return self._names[key]

  def integers(self, values: Sequence[int]) -> str:
    """Returns the name of a constant vector of int64."""
    return self.constant(np.array(values, np.int64))

  def add(self, op: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node, if there is none like it; returns the name of its output."""
    return self.add_many(1, op, *inputs, **attributes)[0]

  def add_many(
    self, count: int, op: str, *inputs: str, **attributes: Any
  ) -> tuple[str, ...]:
    """Adds a node with so many outputs; returns their names."""
    key = (op, inputs, count, repr(sorted(attributes.items())))
    if key not in self._names:
      stem = f'{op.lower()}_{len(self.nodes)}'
      names = tuple(f'{stem}_{k}' if k else stem for k in range(count))
      self.nodes.append(Node(op, inputs, names, attributes))
      self._names[key] = names
    return self._names[key]


def simplify(tape: Tape, outputs: Sequence[str]) -> list[Node]:
  """Returns fewer nodes that compute the same outputs.

  Args:
    tape: nodes and constants; the constants of new nodes are added to it.
    outputs: names of the tensors that stay.
  """
  nodes = _merge_clips(tape, tape.nodes, outputs)
  nodes = _fold_affine(tape, nodes, outputs)
  return _alive(nodes, outputs)


def _uses(nodes: Sequence[Node], outputs: Sequence[str]) -> Counter[str]:
  return Counter([*outputs, *(name for node in nodes for name in node.inputs)])


def _merge_clips(
  tape: Tape, nodes: Sequence[Node], outputs: Sequence[str]
) -> list[Node]:
  """min(max(x, a), b) is one Clip, which runtimes fuse with a convolution."""
  uses, opened, merged = _uses(nodes, outputs), {}, []
  for node in nodes:
    if node.op == 'Relu' or (node.op == 'Clip' and len(node.inputs) == 2):
      opened[node.outputs[0]] = node
    elif node.op == 'Clip' and not node.inputs[1]:
      first = opened.get(node.inputs[0])
      if first is not None and uses[node.inputs[0]] == 1:
        high = node.inputs[2]
        zero = np.zeros((), tape.constants[high].dtype)
        low = first.inputs[1] if first.op == 'Clip' else tape.constant(zero)
        node = node._replace(inputs=(first.inputs[0], low, high))
    merged.append(node)
  return merged


def _fold_affine(
  tape: Tape, nodes: Sequence[Node], outputs: Sequence[str]
) -> list[Node]:
  """Moves y * a, y + b of constants a, b into the product that makes y."""
  uses, folded = _uses(nodes, outputs), []
  # Output of a product -> its index in `folded`.
  index_of: dict[str, int] = {}
  for node in nodes:
    operand = _operand(tape, node)
    if operand is not None and uses[operand[0]] == 1 and operand[0] in index_of:
      at = index_of[operand[0]]
      absorbed = _absorb(tape, folded[at], node.op, operand[1])
      if absorbed is not None:
        folded[at] = absorbed._replace(outputs=node.outputs)
        index_of[node.outputs[0]] = at
        continue
    if node.op in ('Conv', 'MatMul') and node.inputs[1] in tape.constants:
      index_of[node.outputs[0]] = len(folded)
    folded.append(node)
  return [expanded for node in folded for expanded in _with_bias(node)]


def _operand(tape: Tape, node: Node) -> tuple[str, np.ndarray] | None:
  """The tensor and the constant of an affine node, or None."""
  if node.op not in ('Add', 'Sub', 'Mul', 'Div'):
    return None
  a, b = node.inputs
  if node.op in ('Add', 'Mul') and a in tape.constants:
    a, b = b, a
  if a in tape.constants or b not in tape.constants:
    return None
  value = tape.constants[b]
  return (a, value) if np.issubdtype(value.dtype, np.floating) else None


def _absorb(tape: Tape, node: Node, op: str, value: np.ndarray) -> Node | None:
  """A product followed by ``op`` with a constant, as one; None if it is not."""
  x, name, *biases = node.inputs
  weight = tape.constants[name]
  rank = weight.ndim - 1 if node.op == 'Conv' else 1  # Axes from channels on.
  if node.op == 'MatMul' and weight.ndim != 2:
    return None
  channels = weight.shape[0 if node.op == 'Conv' else 1]
  shape = (1,) * (rank - value.ndim) + value.shape
  if len(shape) != rank or max(shape[1:], default=1) > 1:
    return None
  if shape[0] not in (1, channels):
    return None
  vector = np.broadcast_to(value.reshape(-1).astype(np.float64), channels)
  bias = tape.constants[biases[0]] if biases else np.zeros(channels)
  if op in ('Add', 'Sub'):
    bias = bias + vector if op == 'Add' else bias - vector
  else:
    vector = vector if op == 'Mul' else 1 / vector
    bias = bias * vector if biases else None
    axis = 0 if node.op == 'Conv' else 1
    vector = vector.reshape(
      [-1 if k == axis else 1 for k in range(weight.ndim)]
    )
    name = tape.constant((weight * vector).astype(weight.dtype))
  inputs = [x, name]
  if bias is not None:
    inputs.append(tape.constant(bias.astype(weight.dtype)))
  return node._replace(inputs=tuple(inputs))


def _with_bias(node: Node) -> list[Node]:
  """A matrix product has no bias of its own: it is added after it."""
  if node.op != 'MatMul' or len(node.inputs) == 2:
    return [node]
  product = f'{node.outputs[0]}_product'
  return [
    node._replace(inputs=node.inputs[:2], outputs=(product,)),
    Node('Add', (product, node.inputs[2]), node.outputs, {}),
  ]


def _alive(nodes: Sequence[Node], outputs: Sequence[str]) -> list[Node]:
  needed, alive = set(outputs), []
  for node in reversed(nodes):
    if needed.intersection(node.outputs):
      needed.update(node.inputs)
      alive.append(node)
  return alive[::-1]
