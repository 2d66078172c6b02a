"""Stages: a traced function as a chain of functions, cut where one says.

A cut is named by leaves: it falls before the first operation on data that reads
one of them, and before its padding. What flows across it must be one array, the
feature that the next stage begins from.

In ``tanh(x @ a) @ b`` with a[2, 4] and b[4, 3], the cut 'b' falls before the
second product, equation 2 of dot, tanh, dot. The first stage is equations 0 and
1, (params, x[n, 2]) -> h[n, 4]; the second is equation 2, (params, h) -> y.
In ``x @ a + x @ b`` the same cut is refused, for x and x @ a both cross.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.structure.graph import Graph, leaves_like
from jaxprune.structure.program.run import Run
from jaxprune.structure.program.typed import Program
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.sizes import padded

# (params, feature) -> (feature, new values of leaves by path).
Stage = Callable[[tree.PyTree, jax.Array], tuple[jax.Array, dict[str, Any]]]


@kinds.checked
def cut(graph: Graph, at: Sequence[str]) -> tuple[Stage, ...]:
  """Returns the stages of a function, one more than there are cuts.

  The stages one after another compute what the function does, at any size of
  the batch, which is the first axis of the argument and of every feature.

  Args:
    graph: the graph of ``fn(params, x)``, which returns one array and, in a
      training form, new statistics of its norms.
    at: a path of a leaf, or a regular expression over whole paths, for each
      cut, in the order of the forward pass: the next stage begins where the
      function first reads a leaf that matches.

  Returns:
    Functions ``stage(params, h) -> (h, new)`` of all params; ``new`` maps the
    paths of leaves that this stage hands back to their values.

  Raises:
    ValueError: if the function has several arguments or results, if a cut
      matches no leaf, does not follow the one before, or is crossed by more
      than one array.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 1))}
    >>> mlp = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
    >>> first, second = cut(trace(mlp, params, jnp.ones((1, 2))), ['b'])
    >>> h, _ = first(params, jnp.ones((4, 2)))
    >>> second(params, h)[0].shape
    (4, 1)
  """
  count = len(_programs(graph, at))

  def stage(number: int) -> Stage:
    def call(
      params: tree.PyTree, h: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
      x = graph.args[0]
      batch = (h.shape[0], *x.shape[1:])
      traced = graph.retrace(jax.ShapeDtypeStruct(batch, x.dtype))
      program = _programs(traced, at)[number]
      leaves = leaves_like(traced, params)
      feature = program.inputs[-1]
      if h.shape != feature.shape:
        raise ValueError(
          f'Stage {number} begins from shape {feature.shape}, got {h.shape}.'
        )
      values = [leaves[path] for path in traced.leaves]
      out, *new = Run({})(program, [*values, h])
      return out, dict(zip(_handed_back(traced, program), new, strict=True))

    return call

  return tuple(stage(number) for number in range(count))


@kinds.checked
def resized(
  graph: Graph,
  at: Sequence[str],
  sides: Sequence[Sequence[int]] | None = None,
) -> Callable[[tree.PyTree, jax.Array], Any]:
  """Returns the function with each stage at a resolution of its own.

  A stage computes what it does in the function at images of its sides. Where
  they are not those of the stage before, the feature that crosses is resized
  bilinearly (:func:`jaxprune.structure.sizes.padded.bilinear`).

  Args:
    graph: of a function of the params and one batch of images, as :func:`cut`.
    at: a cut for each border of stages, as :func:`cut`.
    sides: rows and columns of the images, for every stage; one pair more than
      cuts. Without them those of the images that come, in all stages, and the
      cuts are marked for :func:`jaxprune.structure.sizes.padded.on_canvas`.

  Returns:
    A pure function ``call(params, images)`` like that of the graph.

  Raises:
    ValueError: as :func:`cut`; when called, if the images are not of the first
      sides, or what crosses a cut is no image: [batch, rows, columns, channels]
      with channels that do not depend on the sides.
  """
  _programs(graph, at)  # Refuses a wrong cut now and not when called.

  def call(params: tree.PyTree, x: jax.Array) -> Any:
    each = [x.shape[1:3]] * (len(at) + 1) if sides is None else sides
    if x.shape[1:3] != tuple(each[0]):
      raise ValueError(
        f'The first stage takes images of sides {tuple(each[0])}, got shape '
        f'{x.shape}.'
      )
    updates, h, traced = {}, x, graph
    for number, side in enumerate(each):
      # The whole function, traced at this stage's sides: of it stage `number`.
      spec = jax.ShapeDtypeStruct((x.shape[0], *side, *x.shape[3:]), x.dtype)
      traced = graph.retrace(spec)
      program = _programs(traced, at)[number]
      leaves = leaves_like(traced, params)
      if number:
        h = _meet(h, program.inputs[-1].shape, at[number - 1], sides is None)
      values = [leaves[path] for path in traced.leaves]
      h, *new = Run({})(program, [*values, h])
      updates |= dict(zip(_handed_back(traced, program), new, strict=True))
    leaves = leaves_like(traced, params)
    outs = [
      h if path is None else updates.get(path, leaves[path])
      for path in traced.outputs_like
    ]
    return jax.tree.unflatten(traced.out_tree, outs)

  return call


def _meet(
  h: jax.Array, shape: Sequence[int], pattern: str, is_marked: bool
) -> jax.Array:
  """Returns the feature of one stage, resized to what the next takes."""
  if len(shape) != 4 or (h.shape[0], h.shape[-1]) != (shape[0], shape[-1]):
    raise ValueError(
      f'At the cut {pattern!r} no image crosses, but an array of shape '
      f'{h.shape}, that the next stage takes as {tuple(shape)}.'
    )
  return padded.border(h) if is_marked else padded.bilinear(h, shape[1:3])


def leaves_of(graph: Graph, at: Sequence[str]) -> tuple[frozenset[str], ...]:
  """Returns the paths of the leaves that each stage reads.

  Args:
    graph: as :func:`cut`.
    at: as :func:`cut`.

  Raises:
    ValueError: as :func:`cut`.
  """
  stages = []
  for program in _programs(graph, at):
    read = {value for eqn in program.equations for value in eqn.inputs}
    pairs = zip(graph.leaves, program.inputs, strict=False)
    stages.append(frozenset(path for path, value in pairs if value in read))
  return tuple(stages)


def _programs(graph: Graph, at: Sequence[str]) -> list[Program]:
  """The programs of the stages: inputs are all leaves and one feature."""
  program = graph.program
  *leaves, x = program.inputs
  results = [
    value
    for value, path in zip(program.outputs, graph.outputs_like, strict=True)
    if path is None
  ]
  if len(graph.args) != 1 or graph.args_like != (None,) or len(results) != 1:
    raise ValueError(
      f'Stages need a function of the params and one array that returns one '
      f'array (and statistics of its norms), got {len(graph.args)} arguments '
      f'and {len(results)} results.'
    )
  starts = [0, *_starts(graph, at), len(program.equations)]
  maker = {
    value: k for k, e in enumerate(program.equations) for value in e.outputs
  }
  maker[x] = -1  # Before the first equation.
  features = [x]
  for pattern, start in zip(at, starts[1:-1], strict=True):
    features.append(_crossing(program, maker, start, pattern))
  features.append(results[0])
  for value in features[1:]:
    if value.shape[:1] != x.shape[:1]:
      raise ValueError(
        f'A stage ends at an array of shape {value.shape}, whose first axis is '
        f'not the batch of {x.shape[0]}.'
      )
  programs = []
  for k in range(len(starts) - 1):
    # The new leaves (statistics of norms) that this stage computes.
    new = [
      value
      for value, path in zip(program.outputs, graph.outputs_like, strict=True)
      if path is not None and starts[k] <= maker.get(value, -1) < starts[k + 1]
    ]
    outputs = [features[k + 1], *new]
    equations = _needed(program.equations, outputs, features[k])
    programs.append(Program([*leaves, features[k]], False, equations, outputs))
  return programs


def _handed_back(graph: Graph, program: Program) -> list[str]:
  """Returns the paths of the leaves whose new values a stage returns."""
  paths = dict(zip(graph.program.outputs, graph.outputs_like, strict=True))
  return [str(paths[value]) for value in program.outputs[1:]]


@kinds.checked
def first_read(graph: Graph, at: Sequence[str]) -> tuple[str, ...]:
  """Returns the leaf that each cut falls before, by its path.

  A plan names its cuts by these paths: a plan may come from a file, and a
  regular expression of a stranger may run for ever.

  Args:
    graph: as :func:`cut`.
    at: as :func:`cut`.

  Raises:
    ValueError: if a cut matches no leaf.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((2, 3)), 'b1': jnp.ones((3, 1)), 'b2': 1.0}
    >>> params['b2'] = jnp.ones((1, 1))
    >>> mlp = lambda p, x: x @ p['a'] @ p['b1'] @ p['b2']
    >>> first_read(trace(mlp, params, jnp.ones((1, 2))), ['b.'])
    ('b1',)
  """
  first = _first_uses(graph)
  return tuple(_first_match(graph, first, pattern) for pattern in at)


def _first_match(graph: Graph, first: Mapping[str, int], pattern: str) -> str:
  """Returns the leaf at a path, or the first read of those that match."""
  if pattern in first:  # A path itself, perhaps with a bracket or a dot in it.
    return pattern
  # What is a path of a leaf that the function ignores is no pattern either.
  is_path = pattern in graph.leaves
  matching = [p for p in first if not is_path and re.fullmatch(pattern, p)]
  if not matching:
    raise ValueError(
      f'The cut {pattern!r} matches no leaf that the function uses; the '
      f'leaves are: {", ".join(graph.leaves)}.'
    )
  return min(matching, key=first.__getitem__)


def _first_uses(graph: Graph) -> dict[str, int]:
  """Returns path of a leaf -> index of the first equation on data to read it.

  Operations on leaves alone (a cast, a transposed kernel) do not count: what
  they compute stands for the leaf.
  """
  from_leaf: dict[Value, set[str]] = {
    value: {path}
    for path, value in zip(graph.leaves, graph.program.inputs, strict=False)
  }
  first: dict[str, int] = {}
  for k, eqn in enumerate(graph.program.equations):
    reads = set().union(*(from_leaf.get(v, set()) for v in eqn.inputs))
    if any(value.has_data for value in eqn.outputs):
      for path in reads:
        first.setdefault(path, k)
    else:
      from_leaf.update(dict.fromkeys(eqn.outputs, reads))
  return first


def _starts(graph: Graph, at: Sequence[str]) -> list[int]:
  """Returns the index of the equation that each cut falls before."""
  first = _first_uses(graph)
  starts: list[int] = []
  for pattern in at:
    start = first[_first_match(graph, first, pattern)]
    # The padding before a convolution is part of that convolution's stage.
    while start and _leads(graph.program.equations[start - 1]):
      start -= 1
    if start <= (starts[-1] if starts else 0):
      raise ValueError(
        f'The cut {pattern!r} falls at or before the one before it: give cuts '
        f'in the order of the forward pass, the first after the first layer.'
      )
    starts.append(start)
  return starts


def _leads(eqn: Equation) -> bool:
  """Whether an equation belongs to the one that follows it.

  So it does if it pads or slices the data, or is of leaves alone.
  """
  has_data = any(value.has_data for value in eqn.outputs)
  return not has_data or eqn.primitive.name in ('pad', 'slice')


def _crossing(
  program: Program, maker: Mapping[Value, int], start: int, pattern: str
) -> Value:
  """Returns the only array of data that is made before a cut and read after.

  Args:
    program: the whole function.
    maker: value -> index of the equation that computes it.
    start: index of the equation that the cut falls before.
    pattern: of the cut, for the error.
  """
  after = [value for eqn in program.equations[start:] for value in eqn.inputs]
  crossing = [
    value
    for value in dict.fromkeys(after)
    if value.has_data and maker.get(value, start) < start
  ]
  if len(crossing) != 1:
    raise ValueError(
      f'At the cut {pattern!r} {len(crossing)} arrays cross, of shapes '
      f'{[value.shape for value in crossing]}; cut where one does, such as '
      f'between two blocks.'
    )
  return crossing[0]


def _needed(
  equations: Sequence[Equation], outputs: Sequence[Value], feature: Value
) -> list[Equation]:
  """Returns the equations that compute outputs from leaves and the feature."""
  wanted, kept = set(outputs) - {feature}, []
  for eqn in reversed(equations):
    if wanted.isdisjoint(eqn.outputs):
      continue
    kept.append(eqn)
    wanted.update(value for value in eqn.inputs if value is not feature)
  return kept[::-1]
