"""Where the names of a network are in a file: under a prefix, or not whole."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def locate(
  arrays: Mapping[str, np.ndarray],
  expected: Mapping[str, str],
  separator: str,
  ignore: Sequence[str],
) -> tuple[str, dict[str, str]]:
  """Returns a prefix, and path -> name in the file, which begins with it.

  The prefix is the one under which all names of the library are found. A file
  of a bare body may also lack the first layer of all names, such as ``bert.``.
  If no prefix has all names, it is the one that has most, for the error.

  Raises:
    ValueError: if all names are found under several prefixes, or if a rule of
      ``ignore`` is no regular expression.
  """
  ignored = _ignored(ignore, arrays)
  spare = [name for name in arrays if name not in ignored]
  names = list(expected.values())
  counts = _prefixes(spare, names, separator)
  first_layers = {name.partition(separator)[0] for name in names}
  if max(counts.values()) < len(names) and len(first_layers) == 1:
    body = f'{first_layers.pop()}{separator}'
    bare = [name.removeprefix(body) for name in names]
    of_body = _prefixes(spare, bare, separator)
    if max(of_body.values()) == len(names):
      names, counts = bare, of_body
  complete = [prefix for prefix, n in counts.items() if n == len(names)]
  if names and len(complete) > 1:
    spelled = ' and '.join(repr(prefix) for prefix in sorted(complete))
    longest = re.escape(max(complete, key=len))
    raise ValueError(
      f'The network is in the file {len(complete)} times, under {spelled}. Use '
      f'one of them and ignore the others, such as by '
      f"ignore=(r'{longest}.*',)."
    )
  best = max(counts, key=counts.__getitem__)
  paths = zip(expected, names, strict=True)
  return best, {path: best + name for path, name in paths}


def _prefixes(
  arrays: Iterable[str], names: Iterable[str], separator: str
) -> Counter[str]:
  """Returns prefix -> how many of the names an array has behind it.

  Examples:
    >>> _prefixes(['ema.fc.bias', 'fc.bias', 'fc.weight'], ['fc.bias'], '.')
    Counter({'': 1, 'ema.': 1})
  """
  names = set(names)
  counts = Counter({'': 0})
  for array in arrays:
    starts = [0, *(m.end() for m in re.finditer(re.escape(separator), array))]
    counts.update(array[:start] for start in starts if array[start:] in names)
  return counts


def _ignored(ignore: Sequence[str], names: Iterable[str]) -> set[str]:
  """Returns the names that a rule matches.

  Raises:
    ValueError: if a rule is no regular expression.
  """
  matched = set()
  for rule in ignore:
    try:
      pattern = re.compile(rule)
    except re.error as error:
      raise ValueError(
        f'`ignore` {rule!r} is no regular expression: {error}.'
      ) from None
    matched |= {name for name in names if pattern.fullmatch(name)}
  return matched
