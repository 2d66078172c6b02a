"""What is read of jaxprs, of every version of JAX: bodies, lines, what is live.

For those who walk one: :mod:`jaxprune.structure.program.typed`, which types it,
and :mod:`jaxprune.structure.sizes.padded`, which lays several side by side.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import source_info_util
from jax.interpreters import partial_eval

from jaxprune.structure.rules.primitives import where

# Calls that are no more than their body.
INLINED = where(bodies='inlined')

# Files whose lines say nothing of where an operation comes from.
_INSIDE = ('site-packages/jax/', 'site-packages/jaxlib/', 'jaxprune/structure/')


def eliminate_dead_code(jaxpr: Any) -> Any:
  """Returns a ``jax.extend.core.Jaxpr`` without its dead equations.

  Its inputs stay, used or not.
  """
  live, _ = partial_eval.dce_jaxpr(
    jaxpr, [True] * len(jaxpr.outvars), instantiate=True
  )
  return live


def line_of(source_info: Any, outer: str) -> str:
  """Returns where an equation comes from: the user's line, and a library's.

  The innermost line outside of libraries is the user's; where a library (Flax,
  an installed model) called the operation, its own line follows in brackets,
  since one call of such a model is the same line for all its operations::

    reduce_sum at train.py:12 (flax/linen/normalization.py:226)

  Args:
    source_info: of an equation.
    outer: the line that called it, for what has no line of its own.
  """
  lines = _lines(source_info.traceback)
  own = [line for line in lines if 'site-packages' not in line[0]]
  if not lines:
    return outer or source_info_util.summarize(source_info)
  file, number = lines[-1]
  inner = f'{_in_library(file)}:{number}'
  if not own:  # The call of the library is that of the caller.
    return (
      f'{outer} ({inner})' if outer and '(' not in outer else outer or inner
    )
  user = f'{pathlib.PurePath(own[-1][0]).name}:{own[-1][1]}'
  return user if lines[-1] == own[-1] else f'{user} ({inner})'


def _lines(traceback: Any) -> list[tuple[str, int]]:
  """(file, line) of the calls outside of JAX and this room, outermost first."""
  frame = traceback.as_python_traceback() if traceback is not None else None
  lines = []
  while frame is not None:
    file = frame.tb_frame.f_code.co_filename
    if not any(folder in file for folder in _INSIDE):
      lines.append((file, frame.tb_lineno))
    frame = frame.tb_next
  return lines


def _in_library(file: str) -> str:
  """A file as its library knows it: flax/linen/normalization.py."""
  return file.replace('\\', '/').rpartition('site-packages/')[2]


def body_of(
  params: Mapping[str, Any], *names: str
) -> tuple[Any, Sequence[Any]]:
  """Returns a body and its constants, closed or open, of any JAX version.

  Args:
    params: of an equation.
    *names: the parameters that may hold it; else those of calls.
  """
  for name in names or ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    body = params.get(name)
    if body is not None:
      if hasattr(body, 'jaxpr') and hasattr(body, 'consts'):
        return body.jaxpr, body.consts
      return body, getattr(body, 'consts', ())
  raise AssertionError(f'No body among {sorted(params)}.')
