import sys
import xml.etree.ElementTree

import numpy as np
import pytest

pytest.importorskip('matplotlib')

from jaxprune.report import plots

RECORDS = [
  {'step': 0, 'stage': 'dense', 'train_loss': 2.0},
  {'step': 10, 'stage': 'dense', 'train_loss': 1.0, 'test_accuracy': 0.5},
  {'step': 20, 'stage': 'prune', 'train_loss': None, 'test_accuracy': 0.8},
  {'step': 30, 'stage': 'tune', 'train_loss': 0.5, 'test_accuracy': 0.9},
  {'step': 40, 'stage': 'tune', 'run': 'pdp', 'train_loss': 0.7},
]


def texts(figure):
  return [t.get_text() for axes in figure.axes for t in axes.texts]


def test_stages_end_where_the_next_begins():
  assert plots._stages(RECORDS) == [
    ('dense', 0, 20), ('prune', 20, 30), ('tune', 30, 40),
  ]  # fmt: skip
  assert plots._stages([{'step': 1}, {'step': 2}]) == []


def test_names_of_stages_do_not_meet_and_stay_on_the_plot():
  stages = [('aaaa', 0, 50), ('bb', 50, 51), ('cc', 51, 99), ('dddd', 99, 100)]
  letter = plots._LETTER
  places = plots._place_stages(stages, inches=100 * letter)
  assert [round(x / letter) for x, _ in places] == [0, 50, 51, 96]
  assert [row for _, row in places] == [0, 0, 1, 0]
  assert plots._place_stages([('a', 3, 3)], inches=1) == [(0, 0)]


def test_names_of_curves_are_spread_around_their_mean():
  assert plots._spread([0.0, 0.5, 1.0], 0.1) == [0.0, 0.5, 1.0]
  assert plots._spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
  # The third is pushed into the block of the first two.
  assert plots._spread([0, 0, 0.15], 0.2) == pytest.approx([-0.15, 0.05, 0.25])


def test_curves_break_at_runs_skip_gaps_and_average():
  assert plots._curves(RECORDS, 'train_loss') == [
    ([0, 10, 30], [2.0, 1.0, 0.5]), ([40], [0.7]),
  ]  # fmt: skip
  records = [{'step': i, 'loss': float(i % 2)} for i in range(7)]
  assert plots._curves(records, 'loss', points=3) == [
    ([1, 4, 6], [1 / 3, 2 / 3, 0]),
  ]  # fmt: skip


def test_metrics_names_panels_curves_and_stages():
  figure = plots.metrics(RECORDS)
  assert len(figure.axes) == 2
  found = texts(figure)
  assert found.count('train') == 1
  assert found.count('test') == 1
  assert {'loss', 'accuracy', 'dense', 'prune', 'tune'} <= set(found)
  loss = figure.axes[0]
  assert [list(line.get_xdata()) for line in loss.lines if line.get_marker()
          == '.'] == [[0, 10, 30], [40]]  # fmt: skip
  band = list(loss.patches)
  assert len(band) == 1
  assert band[0].get_x() == 20
  assert band[0].get_width() == 10


def bars(figure):
  """Returns the widths of the bars in front, by name."""
  found = {}
  for axes in figure.axes:
    names = [t.get_text() for t in axes.texts[::2]]
    fronts = [p.get_width() for p in axes.patches[1::2]]
    found.update(zip(names, fronts, strict=True))
  return found


def test_widths_are_shares_of_the_widest():
  figure = plots.widths({'a': (8, 4), 'b': (16, 16), '$x_1^': (1, 0)})
  assert bars(figure) == {'a': 0.25, 'b': 1.0, '$x_1^': 0.0}
  assert {'4 of 8', '16', '0 of 1'} <= set(texts(figure))


@pytest.mark.parametrize(('width', 'columns'), [(7.5, 2), (3.45, 1)])
def test_sparsity_in_columns_where_there_is_room(width, columns):
  layers = {f'layer{i}': i / 10 for i in range(5)}
  figure = plots.sparsity(layers, width=width)
  assert len(figure.axes) == columns
  assert bars(figure) == layers
  assert '40.0 %' in texts(figure)
  low = [p.get_y() for p in figure.axes[0].patches[::2]]
  assert low == sorted(low)


def test_svg_is_the_same_again_and_coloured_by_the_page():
  layers = {'a<&>"b"': (8, 4)}
  one, two = (plots.svg(plots.widths(layers), 'w') for _ in range(2))
  assert one == two
  xml.etree.ElementTree.fromstring(one)
  assert 'a&lt;&amp;&gt;"b"</text>' in one
  assert 'fill: var(--a)' in one
  assert not any(value in one for value in plots.COLOURS.values())
  assert 'metadata' not in one
  ids = [part.split('"')[0] for part in one.split(' id="')[1:]]
  assert ids
  assert all(i.startswith('w-') for i in ids)


@pytest.mark.parametrize(
  ('plot', 'data', 'text'),
  [
    (plots.metrics, [{'step': 0, 'lr': 1}], "no key that ends in 'loss'"),
    (plots.widths, {'a': (4, 5)}, "'a' must go down, got 4 before and 5"),
    (plots.widths, {}, 'There is no layer to draw'),
    (plots.sparsity, {'a': 1.5}, r"'a' must be in \[0, 1\], got 1.5"),
  ],
)
def test_errors(plot, data, text):
  with pytest.raises(ValueError, match=text):
    plot(data)


def test_matplotlib_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(ImportError, match=r"pip install 'jaxprune\[experiments"):
    plots.widths({'a': (2, 1)})


def test_gates_are_lines_that_end_where_they_close():
  history = [
    {'filters': [1.0, 1.0, 0.5], 'blocks': [1.0]},
    {'filters': [0.0, 0.8, 0.5], 'blocks': [1.0]},
    {'filters': [0.0, 1.2, 0.0], 'blocks': [0.9]},
  ]
  figure = plots.gates(history)
  assert [axes.get_title('left') for axes in figure.axes] == [
    'filters: 1 of 3 open at the end',
    'blocks: 1 of 1 open at the end',
  ]
  (image,) = figure.axes[0].images
  assert image.get_array().tolist() == [
    [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.8, 1.2]
  ]  # fmt: skip
  assert figure.axes[1].get_xlabel() == 'epoch'


def test_gates_that_cannot_be_drawn_are_refused():
  with pytest.raises(ValueError, match='There is no gate to draw'):
    plots.gates([])
  with pytest.raises(ValueError, match=r"'f' must stay .* got \[1, 2\]"):
    plots.gates([{'f': [1.0]}, {'f': [1.0, 1.0]}])


def test_a_scatter_is_a_panel_a_cloud_with_every_point():
  clouds = {'near': ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]), 'far': ([5.0], [0.2])}
  figure = plots.scatter(clouds, across='said', up='true')
  first, second = figure.axes
  assert [axes.texts[0].get_text() for axes in figure.axes] == list(clouds)
  np.testing.assert_array_equal(first.lines[0].get_xdata(), [1, 2, 3])
  np.testing.assert_array_equal(second.lines[0].get_ydata(), [0.2])
  assert (first.get_xlabel(), first.get_ylabel()) == ('said', 'true')
  assert plots.svg(figure, 'p').startswith('<svg')


def test_a_scatter_that_cannot_be_drawn_is_refused():
  with pytest.raises(ValueError, match='no cloud'):
    plots.scatter({}, across='', up='')
  with pytest.raises(ValueError, match="'a' need as many x as y, got 2 and 1"):
    plots.scatter({'a': ([1.0, 2.0], [1.0])}, across='', up='')
