"""Products of data with a kernel that are written out and summed by hand.

A convolution of each channel with a kernel of its own may be written as shifts,
y[t] = k[0] x[t] + k[1] x[t + 1] + k[2] x[t + 2], and a matrix product as a
multiplication and a sum. These multiply and add as often as the operation that
they stand for. The scale of a norm is a product with a parameter too, but
nothing sums it: what tells is that pieces of one kernel are summed, three here,
or that one array is, shifted, in products with parameters that stand alone.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxprune.structure.program.typed import Program, all_equations
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.walks.flow import Binding, Flow, read

# Hands on entries of its first operand, all of them or a part.
_MOVES_NAMES = """
  broadcast_in_dim convert_element_type copy dynamic_slice gather
  optimization_barrier pvary reduce_precision reshape rev slice split squeeze
  transpose unstack
"""
_MOVES = frozenset(_MOVES_NAMES.split())
_SHIFTS = _MOVES | {'pad'}
_TAKES = frozenset(['dynamic_slice', 'gather', 'slice', 'split', 'unstack'])
_SUMS = frozenset(['add', 'add_any', 'scatter-add', 'sub'])
_JOINS = {'concatenate': 'dimension', 'stack': 'axis'}


class _Product(NamedTuple):
  """A product of data with a piece of a kernel, or with all of it.

  Attributes:
    eqn: the multiplication.
    data: the operand that depends on an argument.
    kernel: the other, made of params alone.
    origin: what the kernel is taken from.
    is_piece: whether it is a part of that.
    by_step: whether a loop takes another part at each step.
  """

  eqn: Equation
  data: Value
  kernel: Value
  origin: Value
  is_piece: bool
  by_step: bool


class Written(NamedTuple):
  """The multiplications of products that are written out, and their sums."""

  products: frozenset[Equation]
  sums: frozenset[Equation]


def written_out(stream: Flow, program: Program) -> Written:
  """Returns the multiplications that are a product of matrices written out.

  Args:
    stream: the flow of a program.
    program: the program.
  """
  return _Search(stream, program).result()


class _Search:
  """The sums of a program, and the products that they add up."""

  def __init__(self, stream: Flow, program: Program):
    self.flow = stream
    bodies = [b for e, _ in all_equations(program) for b in e.programs]
    inner = {value for body in bodies for value in body.inputs}
    # What a loop carries is bound twice: at its start, and after a step.
    self.carries = {v for v in inner if len(stream.makers.get(v, ())) > 1}
    self.products: dict[Value, _Product] = {}
    self.added: set[Equation] = set()
    self.sums: set[Equation] = set()

  def result(self) -> Written:
    # Value -> the products, and the carries of loops, whose sum it is.
    terms: dict[Value, frozenset[Value]] = {}
    largest: set[frozenset[Value]] = set()
    for step in self.flow.steps:
      if isinstance(step, Binding):
        self.bind(step, terms)
        continue
      name, out = step.primitive.name, next(iter(step.outputs), None)
      if out is None:
        continue
      product = self.product(step) if name == 'mul' else None
      if product:
        self.products[out] = product
      if product:
        scaled = terms.get(product.data, frozenset())
        terms[out] = frozenset([out]) if product.is_piece else scaled | {out}
      elif name == 'reduce_sum':
        terms[out] = self.reduced(step, terms)
        largest.add(terms[out])
      elif name in ('mul', 'div'):  # s (k[0] x[0] + k[1] x[1])
        scaled = [terms.get(value, frozenset()) for value in step.inputs]
        terms[out] = frozenset().union(*scaled)
      elif name in _SUMS:
        before = [terms.get(value, frozenset()) for value in step.inputs]
        terms[out] = frozenset().union(*before)
        largest.difference_update(before)
        largest.add(terms[out])
      elif name in _MOVES or name in ('pad', 'neg'):
        terms[out] = terms.get(step.inputs[0], frozenset())
    for together in largest:
      self.add_up(together)
    return Written(frozenset(self.added), frozenset(self.sums))

  def bind(self, step: Binding, terms: dict[Value, frozenset[Value]]) -> None:
    """Follows a sum into a body, out of it, or around a loop."""
    target, summed = step.target, terms.get(step.source, frozenset())
    if target not in self.carries:
      terms[target] = terms.get(target, frozenset()) | summed
    elif target in summed:  # acc = acc + k[i] x[i], after a step.
      depends = self.flow.descendants([target], ())
      for value in summed & self.products.keys():
        product = self.products[value]
        if product.by_step and product.data not in depends:
          self.added.add(product.eqn)
    else:
      terms[target] = frozenset([target])

  def product(self, eqn: Equation) -> _Product | None:
    """The product of an operation, if it is of data with params."""
    first, second = eqn.inputs
    for data, kernel in ((first, second), (second, first)):
      if data.has_data and kernel.sources and not kernel.has_data:
        return _Product(eqn, data, kernel, *self.origin(kernel))
    return None

  def origin(self, value: Value) -> tuple[Value, bool, bool]:
    """What a value is taken from, whether it is a part, and by a loop."""
    is_piece = by_step = False
    while len(makers := self.flow.makers.get(value, ())) == 1:
      (maker,) = makers
      is_binding = isinstance(maker, Binding)
      if not is_binding and maker.primitive.name not in _MOVES:
        break
      source = read(maker)[0]
      takes = is_binding or maker.primitive.name in _TAKES
      if takes and math.prod(source.shape) > math.prod(value.shape):
        is_piece = True
        by_step |= is_binding or maker.primitive.name != 'slice'
      value = source
    return value, is_piece, by_step

  def unmoved(self, value: Value) -> Value:
    """The value whose entries an operand has, shifted, padded or in part."""
    while len(makers := self.flow.makers.get(value, ())) == 1:
      (maker,) = makers
      if not isinstance(maker, Binding) and maker.primitive.name in _JOINS:
        # A roll joins two slices, a causal shift zeros and a slice.
        sources = {self.unmoved(v) for v in maker.inputs if v.has_data}
        return sources.pop() if len(sources) == 1 else value
      if not isinstance(maker, Binding) and maker.primitive.name not in _SHIFTS:
        break
      value = read(maker)[0]
    return value

  def reduced(
    self, eqn: Equation, terms: Mapping[Value, frozenset[Value]]
  ) -> frozenset[Value]:
    """The products that a sum over axes adds up: marks those of one kernel."""
    value, axes = eqn.inputs[0], eqn.params['axes']
    maker = self.maker(value)
    while maker and maker.primitive.name in ('convert_element_type', 'copy'):
      value = maker.inputs[0]
      maker = self.maker(value)
    product = self.products.get(value)
    if product and any(self.varies(product.kernel, k) for k in axes):
      self.added.add(product.eqn)
      self.sums.add(eqn)
    elif maker and not product and self.contracts(maker, axes):
      self.added.add(maker)
      self.sums.add(eqn)
    joined = _JOINS.get(maker.primitive.name) if maker else None
    if maker and joined and maker.params[joined] in axes:
      parts = (terms.get(v, frozenset()) for v in maker.inputs)
      return frozenset().union(*parts)
    return terms.get(value, frozenset())

  def contracts(self, eqn: Equation, axes: Iterable[int]) -> bool:
    """Whether the sum of a product of data with data is one of matrices.

    Both vary along an axis that is summed, and one is broadcast along another:
    a[:, None, :] b[None, :, :], but not the square of a norm.
    """
    if eqn.primitive.name != 'mul' or not all(v.has_data for v in eqn.inputs):
      return False
    first, second = (
      [self.varies(value, k) for k in range(len(value.shape))]
      for value in eqn.inputs
    )
    return first != second and any(first[k] and second[k] for k in axes)

  def maker(self, value: Value) -> Equation | None:
    makers = self.flow.makers.get(value, ())
    alone = makers[0] if len(makers) == 1 else None
    return None if isinstance(alone, Binding) else alone

  def varies(self, value: Value, axis: int) -> bool:
    """Whether the entries along an axis differ, but for a broadcast."""
    maker = self.maker(value)
    if maker is None or maker.primitive.name != 'broadcast_in_dim':
      return value.shape[axis] != 1
    places = maker.params['broadcast_dimensions']
    return axis in places and self.varies(maker.inputs[0], places.index(axis))

  def add_up(self, together: Iterable[Value]) -> None:
    """Marks the products of a sum with one kernel's pieces, or one array's.

    Of y = x + s[0] f(x), z = y + s[1] g(y) the second is made of the first:
    these are scales of two layers, and no sum over the pieces of s.
    """
    by_origin: dict[Value, list[_Product]] = {}
    by_data: dict[Value, list[_Product]] = {}
    for value in together:
      if value in self.products:
        product = self.products[value]
        if product.is_piece:
          by_origin.setdefault(product.origin, []).append(product)
        by_data.setdefault(self.unmoved(product.data), []).append(product)
    shifted = [
      products
      for products in by_data.values()
      if len({product.data for product in products}) > 1
    ]
    for products in (*by_origin.values(), *shifted):
      if len(products) < 2:
        continue
      reach = lambda outs: self.flow.descendants(outs, self.carries)
      made_of_any = reach([p.eqn.outputs[0] for p in products])
      if not any(p.data in made_of_any for p in products):
        self.added |= {p.eqn for p in products}
        continue
      each = [(p, reach(p.eqn.outputs)) for p in products]
      for (one, of_one), (other, of_other) in itertools.combinations(each, 2):
        if one.data not in of_other and other.data not in of_one:
          self.added |= {one.eqn, other.eqn}
