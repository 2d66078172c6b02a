import html.parser
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import report
from jaxprune.report import plots

# --- The log -----------------------------------------------------------------


def test_log_round_trip_with_array_scalars_and_gaps(tmp_path):
  log = tmp_path / 'metrics.jsonl'
  report.append_metrics(log, {'step': 1, 'loss': np.float32(0.5), 'ok': True})
  report.append_metrics(
    log, {'step': jnp.int32(2), 'loss': float('nan'), 'by': {'a': [1e400, 2]}}
  )
  assert log.read_text() == (
    '{"step": 1, "loss": 0.5, "ok": true}\n'
    '{"step": 2, "loss": null, "by": {"a": [null, 2]}}\n'
  )
  assert report.read_metrics(log)[1]['by'] == {'a': [None, 2]}


def test_a_half_written_line_is_dropped(tmp_path):
  log = tmp_path / 'metrics.jsonl'
  whole = b'{"step": 1}\n{"step":  2}\n'
  log.write_bytes(whole + b'{"step": 3, "lo')
  assert [r['step'] for r in report.read_metrics(log)] == [1, 2]
  report.append_metrics(log, {'step': 3})
  assert log.read_bytes() == whole + b'{"step": 3}\n'
  log.write_bytes(b'{"st')
  report.append_metrics(log, {'step': 0})
  assert log.read_bytes() == b'{"step": 0}\n'


@pytest.mark.parametrize('end', [b'', b'{"step": 3', b'{"step": 3}'])
def test_a_log_is_cut_back_to_a_step(tmp_path, end):
  log = tmp_path / 'metrics.jsonl'
  lines = [b'{"step": 1}\n', b'{"step":   2}\n', b'{"step": 2, "x": 1}\n']
  log.write_bytes(b''.join(lines) + b'{"step": 5}\n' + end)
  assert report.truncate_metrics(log, 2) == 1
  assert log.read_bytes() == b''.join(lines)
  assert report.truncate_metrics(log, 0) == 3
  assert log.read_bytes() == b''
  assert [f.name for f in tmp_path.iterdir()] == ['metrics.jsonl']
  assert report.truncate_metrics(tmp_path / 'none', 0) == 0


def test_log_errors(tmp_path):
  log = tmp_path / 'metrics.jsonl'
  with pytest.raises(TypeError, match='not JSON serializable'):
    report.append_metrics(log, {'x': {1}})
  assert not log.exists()
  log.write_text('{"step": 1}\n[2]\n')
  for call in (report.read_metrics, lambda p: report.truncate_metrics(p, 1)):
    with pytest.raises(ValueError, match=r'Line 2 of .*jsonl is no JSON obj'):
      call(log)
  log.write_text('{"loss": 1}\n')
  with pytest.raises(ValueError, match=r"Line 1 of .* has no 'step'"):
    report.truncate_metrics(log, 1)


# --- The table ---------------------------------------------------------------


def test_table_by_hand():
  rows = [
    {'network': 'dense', 'accuracy': '98.1 %', 'MACs': 1_234_000, 'x': None},
    {'network': 'small', 'accuracy': '97 %', 'MACs': 9, 'ms': 0.123456},
  ]
  assert report.table(rows) == (
    'network  accuracy       MACs  x      ms\n'
    '-------  --------  ---------  -  ------\n'
    'dense      98.1 %  1,234,000\n'
    'small        97 %          9     0.1235'
  )


# --- The page ----------------------------------------------------------------


class Page(html.parser.HTMLParser):
  """Collects tags, text, and what is open."""

  EMPTY = ('meta', 'br')

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts, self.open = [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.EMPTY:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data.strip())


def record():
  return {
    'title': 'A <b> & "c"',
    'summary': 'Short.',
    'headline': [('2.0x', 'faster')],
    'rows': [{'network': 'dense', 'MACs': 100}, {'network': '<s>', 'MACs': 50}],
    'metrics': [
      {'step': i, 'stage': ['dense', 'prune'][i // 5], 'loss': 1 / (i + 1)}
      for i in range(10)
    ],
    'widths': {'conv<1>': (8, 5), 'head': (10, 10)},
    'sparsity': {'conv<1>': 0.9},
    'checks': [
      {'name': 'small == masked', 'result': '1e-7', 'passed': True},
      {'name': 'count', 'passed': False},
    ],
    'config': {'seed': 0, 'versions': {'jax': '1.2'}, 'path': '<x>'},
  }


def test_page_is_whole_escaped_and_needs_nothing_else(tmp_path):
  pytest.importorskip('matplotlib')
  path = tmp_path / 'report.html'
  report.write_html(path, record())
  text = path.read_text()
  page = Page(text)
  assert page.open == []
  names = {tag for tag, _ in page.tags}
  assert not names & {'script', 'link', 'img', 'iframe', 'b', 'x', 's'}
  for _, attributes in page.tags:
    assert not set(attributes) & {'src', 'srcset', 'onload', 'onclick'}
    assert attributes.get('xlink:href', '#').startswith('#')
  addresses = set(re.findall(r'\w+://[^"\s<]+', text))
  assert addresses <= {
    'http://www.w3.org/2000/svg', 'http://www.w3.org/1999/xlink',
  }  # fmt: skip
  assert '@import' not in text
  assert 'A <b> & "c"' in page.texts
  for expected in (
    'Short.', '2.0x', 'faster', 'Result', 'MACs', '100', 'Training', 'prune',
    'conv<1>', '5 of 8', '90.0 %', 'holds', 'fails', '1e-7', 'versions.jax',
    '<x>',
  ):  # fmt: skip
    assert expected in page.texts, expected
  ids = [a['id'] for _, a in page.tags if 'id' in a]
  assert len(ids) == len(set(ids))
  used = set(re.findall(r'var\(--([\w-]+)\)', text))
  assert used <= {*plots.COLOURS, 'paper', 'card', 'good', 'bad'}
  dark = text[text.index('(prefers-color-scheme: dark)') :].split('}')[0]
  assert used <= set(re.findall(r'--([\w-]+):', dark))


def test_page_is_the_same_again(tmp_path):
  pytest.importorskip('matplotlib')
  one, two = tmp_path / '1.html', tmp_path / '2.html'
  for path in (one, two):
    report.write_html(path, record())
  assert one.read_bytes() == two.read_bytes()
  assert len(list(tmp_path.iterdir())) == 2


def test_page_leaves_out_what_is_not_given(tmp_path):
  path = tmp_path / 'report.html'
  report.write_html(path, {'title': 'T', 'rows': [], 'config': {'a': 1}})
  page = Page(path.read_text())
  assert [t for t, _ in page.tags if t in ('h1', 'h2')] == ['h1', 'h2']
  assert 'Result' not in page.texts


def test_page_turns_the_table_for_phones(tmp_path):
  path = tmp_path / 'report.html'
  report.write_html(path, {'title': 'T', 'rows': record()['rows']})
  rows = re.findall(r'<tr>(.*?)</tr>', path.read_text())
  cells = [re.findall(r'>([^<]*)</t[hd]>', row) for row in rows]
  assert cells == [
    ['network', 'MACs'], ['dense', '100'], ['&lt;s&gt;', '50'],
    ['', 'dense', '&lt;s&gt;'], ['MACs', '100', '50'],
  ]  # fmt: skip


@pytest.mark.parametrize('bad', [{'title': 'T', 'wdiths': {}}, {}])
def test_page_errors(tmp_path, bad):
  with pytest.raises(ValueError, match=r'A report has a title .*widths.*; go'):
    report.write_html(tmp_path / 'report.html', bad)
  assert not list(tmp_path.iterdir())


def test_page_takes_what_the_log_gives_back(tmp_path):
  pytest.importorskip('matplotlib')
  log = tmp_path / 'metrics.jsonl'
  for line in record()['metrics']:
    report.append_metrics(log, line)
  metrics = json.loads(json.dumps(report.read_metrics(log)))
  report.write_html(tmp_path / 'a.html', {'title': 'T', 'metrics': metrics})
  metrics = record()['metrics']
  report.write_html(tmp_path / 'b.html', {'title': 'T', 'metrics': metrics})
  a, b = ((tmp_path / f'{n}.html').read_bytes() for n in 'ab')
  assert a == b
