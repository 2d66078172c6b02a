"""The tables of a comparison: every contender at every amount of pruning."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments import evidence, runbook

Row = Mapping[str, Any]


def table(done: Sequence[Row]) -> str:
  """Returns the tables of what has run, two for each setting."""
  parts = []
  setting = lambda row: json.dumps(
    {
      k: v
      for k, v in row['settings'].items()
      if k not in ('contender', 'amount')
    }
  )
  for shared in dict.fromkeys(map(setting, done)):
    rows = [row for row in done if setting(row) == shared]
    parts += [shared, *_tables(rows)]
  return '\n\n'.join(parts)


def _tables(rows: Sequence[Row]) -> Iterator[str]:
  by = {(r['settings']['contender'], r['settings']['amount']): r for r in rows}
  names = list(dict.fromkeys(name for name, amount in by if amount))
  amounts = sorted({amount for _, amount in by if amount}, key=float)

  def left(amount):
    counts = next(row for (_, a), row in by.items() if a == amount)['counts']
    return f'{sum(counts["kept"].values()) / counts["weights"]:.2%}'

  def cell(name, amount):
    row = by.get((name, amount))
    return evidence.summary(row['accuracy']) if row else 'not run'

  header = ['weights left', *map(left, amounts)]
  body = [[name, *(cell(name, a) for a in amounts)] for name in names]
  yield evidence.table(header, body)
  if ('dense', None) in by:
    yield f'Before pruning: {cell("dense", None)}.'
  if 'magnitude' in names:
    yield _against(by, names, amounts, header)
  yield f'{runbook.minutes(rows)} without the training before.'


def _against(by, names, amounts, header) -> str:
  """Returns the table of differences to magnitude, paired by seed."""

  def gain(name, amount):
    if (name, amount) not in by or ('magnitude', amount) not in by:
      return None
    ours, base = (by[n, amount]['accuracy'] for n in (name, 'magnitude'))
    return [a - b for a, b in zip(ours, base, strict=True)]

  body = []
  for name in names:
    if name == 'magnitude':
      continue
    gains = [gain(name, amount) for amount in amounts]
    show = lambda g: evidence.paired(g, [0.0] * len(g)) if g else 'not run'
    more = ''
    if len(gains) > 1 and gains[0] and gains[-1]:
      more = evidence.paired(gains[-1], gains[0])
    body.append([name, *map(show, gains), more])
  return evidence.table(['minus magnitude', *header[1:], 'last - first'], body)
