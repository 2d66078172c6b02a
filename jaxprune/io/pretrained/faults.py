"""What does not fit between a file and a network, in one line."""

import itertools
import re
from collections.abc import Mapping, Sequence


def check(faults: Mapping[str, Sequence[str]], separator: str) -> None:
  """Raises an error of one line that lists the faults, if there are any."""
  present = {kind: entries for kind, entries in faults.items() if entries}
  if not present:
    return
  listed = '. '.join(
    f'{kind}: {summary(entries, separator)}'
    for kind, entries in present.items()
  )
  remedies = [REMEDIES[kind] for kind in present]
  if any(map(_REPARAMETRIZED.search, faults['left over'])):
    remedies.insert(0, _BAKE)
  error = TypeError if faults['no floats'] else ValueError
  raise error(
    f'The weights do not fit the network. {listed}. '
    f'{" ".join(dict.fromkeys(remedies))}'
  )


_CHECK = (
  'Check the network and its arguments; `ignore` leaves names unused, `keep` '
  'takes leaves from `like`.'
)
# Kind of fault -> what helps; in the order in which they are listed.
REMEDIES = {
  'missing': _CHECK,
  'left over': _CHECK,
  'of another shape': _CHECK,
  'transposed': 'Give a transposed array in the layout of its library.',
  'no floats': _CHECK,
  'not finite': _CHECK,
  'rounded by the dtype': 'allow_rounding=True rounds to the nearest value.',
  'beyond the dtype': 'Use a dtype that holds such large values.',
}
_REPARAMETRIZED = re.compile(r'parametrizations\.|_orig$|_mask$|weight_[guv]$')
_BAKE = (
  'Some names belong to a reparametrization: in PyTorch, remove it first, by '
  'torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or '
  'remove_spectral_norm.'
)


def summary(entries: Sequence[str], separator: str) -> str:
  """Returns entries in one line: all of a few, else the layers they are in.

  Examples:
    >>> summary(['aux.bias', 'aux.weight'], '.')
    'aux.bias, aux.weight'
    >>> summary([f'aux.{i}.bias' for i in range(90)], '.')
    'aux.* (90, such as aux.0.bias)'
  """
  if len(entries) <= 8:
    return ', '.join(entries)
  first_layers: dict[str, list[str]] = {}
  for entry in entries:
    layer = entry.partition(separator)[0]
    first_layers.setdefault(layer, []).append(entry)
  if len(first_layers) > 8:
    return f'{len(entries)} names, such as {", ".join(entries[:3])}'
  return ', '.join(
    f'{_shared(names, separator)}* ({len(names)}, such as {names[0]})'
    if len(names) > 1
    else names[0]
    for names in first_layers.values()
  )


def _shared(names: Sequence[str], separator: str) -> str:
  """Returns the layers that names have in common, with a separator behind.

  Examples:
    >>> _shared(['a.b.c1.x', 'a.b.c2.x'], '.')
    'a.b.'
  """
  layers = zip(*(name.split(separator)[:-1] for name in names), strict=False)
  common = itertools.takewhile(lambda at: len(set(at)) == 1, layers)
  return ''.join(f'{at[0]}{separator}' for at in common)
