"""What is read of jaxprs, of every version of JAX: bodies, lines, what is live.

For those who walk one: :mod:`jaxprune.structure.program`, which types it, and
:mod:`jaxprune.structure.canvas`, which lays several side by side.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import source_info_util
from jax.interpreters import partial_eval

from jaxprune.structure.primitives import where

# Calls that are no more than their body.
INLINED = where(bodies='inlined')


def eliminate_dead_code(jaxpr: Any) -> Any:
  """Returns a ``jax.extend.core.Jaxpr`` without its dead equations.

  Its inputs stay, used or not.
  """
  live, _ = partial_eval.dce_jaxpr(
    jaxpr, [True] * len(jaxpr.outvars), instantiate=True
  )
  return live


def line_of(source_info: Any, outer: str) -> str:
  """Returns the innermost line outside of libraries, else that of the caller.

  Args:
    source_info: of an equation.
    outer: the line that called it, for what has no line of its own.
  """
  back = source_info.traceback
  found = back.as_python_traceback() if back is not None else None
  lines = []
  while found is not None:
    code = found.tb_frame.f_code
    lines.append((code.co_filename, found.tb_lineno))
    found = found.tb_next
  own = [
    (name, line)
    for name, line in lines
    if not any(part in name for part in ('site-packages', 'jaxprune/structure'))
  ]
  if not own:
    return outer or source_info_util.summarize(source_info)
  name, line = own[-1]
  return f'{pathlib.PurePath(name).name}:{line}'


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
