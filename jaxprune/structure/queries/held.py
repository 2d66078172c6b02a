"""Why a graph has nothing to remove, and what to do about it."""

from jaxprune import tree
from jaxprune.structure.graph import Graph


def remedy(graph: Graph) -> str:
  """Returns what holds the axes of a graph without groups, and the remedy.

  Args:
    graph: of :func:`jaxprune.structure.trace`.

  Returns:
    Sentences for the end of an error; '' if the graph has groups.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune import trace
    >>> graph = trace(lambda p, s: p['w'] * s, {'w': jnp.ones(4)}, jnp.ones(4))
    >>> print(remedy(graph)[:61])
    The graph has no group: w:0 (it is an input of the function).
  """
  if graph.groups:
    return ''
  held = [f'{axis} ({why})' for axis, why in graph.protected.items()]
  lines = [f'The graph has no group: {_few(held)}.']
  arrays = zip(
    tree.leaves(list(graph.args)).items(), graph.args_like, strict=True
  )
  inputs = [
    f'args/{path} {tuple(x.shape)}' for (path, x), like in arrays if not like
  ]
  numbers = graph.out_tree.unflatten(range(len(graph.outputs_like)))
  outputs = [
    path or 'the result'
    for path, k in tree.leaves(numbers).items()
    if graph.outputs_like[k] is None
  ]
  lines.append(
    f'Whole stay the widths of the arguments {_few(inputs)} and of the outputs '
    f'{_few(outputs)}. Statistics and states that are as wide as the layers '
    'go into the params, under the names that the function gives them back '
    'by; other functions of the params, such as the training step, into '
    '`trace(..., also=[(fn, *args)])`.'
  )
  return ' '.join(lines)


def _few(names: list[str], most: int = 4) -> str:
  """Returns names as a text, the first few of many."""
  more = len(names) - most
  return ', '.join(names[:most] or ['(none)']) + (
    f' and {more} more' if more > 0 else ''
  )
