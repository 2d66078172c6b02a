"""Sets made of arrays, and sets of every kind that others prepared."""

import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from experiments import train
from jaxprune import data
from jaxprune.data import augment, digits

RNG = np.random.default_rng(0)
DTYPES = [
  'bool',
  'uint8',
  'uint16',
  'int32',
  'int64',
  'float16',
  'float32',
  'float64',
  '>u2',
  '>f4',
]


def pixels(*shape, dtype='uint8'):
  return (50 * RNG.normal(size=shape)).astype('i4').astype(dtype)


# --- Made of arrays ----------------------------------------------------------


@pytest.mark.parametrize('dtype', DTYPES)
def test_what_is_saved_is_read_to_the_last_bit(tmp_path, dtype):
  x = np.frombuffer(RNG.bytes(8 * 600), np.dtype(dtype))  # NaN and infinities.
  if dtype == 'bool':
    x = pixels(600) > 0
  train, test = x[:504].reshape(42, 3, 2, 2), x[504:600].reshape(8, 3, 2, 2)
  y = RNG.integers(0, 7, 42)
  folder = data.save(
    tmp_path, 'mine', {'train': (train, y), 'test': (test, y[:8])}
  )
  assert folder == tmp_path / 'mine' / '1.0.0'
  for split, images, labels in (('train', train, y), ('test', test, y[:8])):
    found = data.load('mine', split, tmp_path)
    assert found.images.dtype == np.dtype(dtype).newbyteorder('=')
    assert found.images.tobytes() == images.astype(found.images.dtype).tobytes()
    assert found.images.shape == images.shape
    np.testing.assert_array_equal(found.labels, labels)
    assert found.classes == tuple('0123456'[: y.max() + 1])  # Of both splits.
    assert (found.name, found.version) == ('mine', '1.0.0')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['mine']


def test_a_stream_of_a_saved_set_has_its_images(tmp_path):
  x = pixels(12, 4, 3, 2, dtype='float32')
  data.save(tmp_path, 'mine', {'train': (x, ['cat', 'dog', 'eel'] * 4)})
  options = {'seed': 3, 'batch': 5, 'epochs': 1}
  rows = np.asarray(data.epoch_batches(3, 0, size=12, batch=5))
  batches = list(data.stream('mine', 'train', tmp_path, **options))
  for (images, labels), row in zip(batches, rows, strict=True):
    np.testing.assert_array_equal(images, x[row])
    np.testing.assert_array_equal(labels, row % 3)


def test_images_of_many_sizes_and_of_pillow_are_saved(tmp_path):
  gray = [pixels(9 + i, 12) for i in range(4)]
  photos = [Image.fromarray(x) for x in gray]
  names = ['left', 'right'] * 2
  data.save(
    tmp_path, 'gray', {'every': (photos, names)}, classes=('right', 'left')
  )
  cut = lambda image, rng: image[:9]
  found = data.load('gray', 'every', tmp_path, transform=cut)
  np.testing.assert_array_equal(found.images[..., 0], [x[:9] for x in gray])
  assert found.labels.tolist() == [1, 0, 1, 0]
  assert found.classes == ('right', 'left')
  with pytest.raises(data.DataError, match=r'Record 1 of gray .* a transform'):
    data.load('gray', 'every', tmp_path)


def test_a_set_without_labels_is_read_as_such(tmp_path):
  x = pixels(5, 4, 3)
  data.save(tmp_path, 'bare', {'train': (x, None)})
  with pytest.raises(
    data.DataError, match=r"no feature 'label', but image\. .*\('image',\)"
  ):
    data.load('bare', 'train', tmp_path)
  found = data.load('bare', 'train', tmp_path, features=('image',))
  np.testing.assert_array_equal(found.images, x[..., None])
  assert found.labels.tolist() == [-1] * 5
  assert found.classes == ()
  ((_, labels),) = data.stream(
    'bare', 'train', tmp_path, seed=0, batch=5, epochs=1, features=('image',)
  )
  assert labels.tolist() == [-1] * 5


def test_labels_of_pandas_are_texts(tmp_path):
  labels = np.array(['b', 'a'], object)
  data.save(tmp_path, 'mine', {'train': (pixels(2, 3, 3), labels)})
  assert data.load('mine', 'train', tmp_path).labels.tolist() == [1, 0]


X = pixels(2, 3, 3)


@pytest.mark.parametrize(
  ('splits', 'options', 'message'),
  [
    ({}, {}, 'needs one split or more'),
    ({'train': X}, {}, r"`splits\['train'\]` must be a tuple, got uint8"),
    ((X, [0, 1]), {}, '`splits` must be a mapping, got a tuple of 2'),
    ({'train': (X, [0, 10**9])}, {}, r'got 0\.\.1000000000\. np\.unique'),
    (
      {'train': (X[:, :0], [0, 1])},
      {},
      r'Image 0 of .* is uint8\[0, 3, 1\], bu',
    ),
    ({'train': (X, [0, 1])}, {'classes': 'ab'}, "several strings .* got 'ab'"),
    ({'train': (X, [0, 1])}, {'classes': ['a']}, r'in 0\.\.0, the 1 classes'),
    ({'a b': (X, [0, 1])}, {}, "The split of a set .* got 'a b'"),
    ({'all': (X, [0, 1])}, {}, "The split of a set .* got 'all'"),
    ({'train': ([], [])}, {}, "'train' has no images"),
    ({'train': (X, [0])}, {}, "'train' has 2 images, but 1 labels"),
    (
      {'train': (X[0], [0, 1])},
      {},
      r'Image 0 of .* is uint8\[3\], but an image',
    ),
    ({'train': (X + 0j, [0, 1])}, {}, 'Image 0 of .* is complex128'),
    (
      {'train': (['a.png'], [0])},
      {},
      r'Image 0 of .* is <U5\[\], but an image',
    ),
    (
      {'train': ([X[0], pixels(3, 3, 3)], [0, 1])},
      {},
      r"Image 1 .* of 3 channels, but the first .* of 1: .*convert\('RGB'\)",
    ),
    (
      {'train': (X, [0, 1]), 'test': (X / 2, [0, 1])},
      {},
      "Image 0 of 'test' is float64 of 1 channels, but the first one is uint8",
    ),
    ({'train': (X, [0, -1])}, {}, r'Labels must be in 0\.\.0, .* got -1\.\.0'),
    ({'train': (X, [0, 2])}, {'classes': ['a', 'b']}, r'in 0\.\.1, the 2 cl'),
    ({'train': (X, ['a', 'c'])}, {'classes': ['a', 'b']}, 'of the classes: c'),
    ({'train': (X, [0.0, 1.0])}, {}, r'integers, or names .* got float64\[2\]'),
    (
      {'train': (X, np.eye(2, dtype=int))},
      {},
      r'one_hot\.argmax\(1\) are; got',
    ),
    (
      {'train': (X, [0, 1]), 'test': (X, ['a', 'b'])},
      {},
      r"got int64\[2\] of 'train', <U1\[2\] of 'test'",
    ),
    ({'train': (X, [0, 1]), 'test': (X, None)}, {}, "'test' has no labels: gi"),
    ({'train': (X, None)}, {'classes': ['a']}, "'train' has no labels: give"),
    (
      {'train': (X, ['a', ' b'])},
      {},
      r"single blanks inside alone, got \[' b'",
    ),
    ({'train': (X, [0, 1])}, {'classes': ['a', 'a']}, r"must be diff.*\['a'\]"),
    ({'train': (X, [0, 1])}, {'version': '1.0'}, 'version of a set .* got'),
  ],
)
def test_what_cannot_be_saved_is_said_in_one_line(
  tmp_path, splits, options, message
):
  with pytest.raises((data.DataError, TypeError), match=message) as error:
    data.save(tmp_path, 'mine', splits, **options)
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_set_is_not_written_over(tmp_path):
  data.save(tmp_path, 'mine', {'train': (X, [0, 1])})
  with pytest.raises(data.DataError, match=r'mine/1\.0\.0 is there already'):
    data.save(tmp_path, 'mine', {'train': (X, [0, 1])})
  data.save(tmp_path, 'mine', {'train': (1 - X, [0, 1])}, version='1.0.1')
  found = data.load('mine', 'train', tmp_path)
  np.testing.assert_array_equal(found.images[..., 0], 1 - X)
  (tmp_path / 'file').touch()
  with pytest.raises(data.DataError, match='cannot be written'):
    data.save(tmp_path / 'file', 'mine', {'train': (X, [0, 1])})


def test_what_else_is_in_the_folder_stays(tmp_path):
  """A folder of a like name, however old, is no scratch of ours."""
  other = tmp_path / 'mine-backup'
  other.mkdir()
  os.utime(other, (0, 0))
  data.save(tmp_path, 'mine', {'train': (X, [0, 1])})
  assert sorted(p.name for p in tmp_path.iterdir()) == ['mine', 'mine-backup']


def test_where_no_set_is_found_the_remedy_is_named(tmp_path):
  for folder in (tmp_path, tmp_path / 'no'):
    with pytest.raises(data.DataError, match=r'jaxprune\.data\.save'):
      data.load('mine', 'train', folder)


# --- Prepared by others ------------------------------------------------------


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
  """A folder with one set of many features, and what its records hold."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import registered

  root, rng = tmp_path_factory.mktemp('sets'), np.random.default_rng(1)
  tensor = lambda dtype, *shape: tfds.features.Tensor(
    shape=shape, dtype=np.dtype(dtype).type, encoding='bytes'
  )
  features = {
    'deep': tensor('uint16', 5, 4, 3),
    'depth': tensor('float32', 5, 4, 1),
    'flat': tensor('uint8', 5, 4),
    'rgba': tensor('uint8', 5, 4, 4),
    'clip': tensor('uint8', 2, 5, 4, 3),
    'sound': tensor('float32', 16),
    'caption': tfds.features.Text(),
    'number': tfds.features.Scalar(np.int64),
    'identity': tfds.features.Scalar(np.int64),
    'price': tfds.features.Scalar(np.float32),
    'one_hot': tensor('int64', 3),
    'kind': tfds.features.ClassLabel(names=['a', 'b', 'c']),
  }
  rows = [
    {
      **{
        name: (100 * rng.random(f.shape)).astype(f.np_dtype)
        for name, f in features.items()
        if f.shape
      },
      'caption': f'number {i}',
      'number': i % 3,
      'identity': 10**9 + i,
      'price': i / 2,
      'kind': i % 3,
    }
    for i in range(4)
  ]
  with registered.skip_registration():

    class Odd(tfds.core.GeneratorBasedBuilder):
      """Features of every kind."""

      VERSION = tfds.core.Version('1.0.0')

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(features),
          disable_shuffling=True,
        )

      def _split_generators(self, dl_manager):
        return {
          'train': self._generate_examples(rows),
          'test': self._generate_examples(rows[:2]),
          'hidden': self._generate_examples([rows[0] | {'number': -1}]),
        }

      def _generate_examples(self, rows):
        yield from enumerate(rows)

  digits.write(Odd, root / 'odd' / '1.0.0')
  return root, rows


@pytest.mark.parametrize('image', ['deep', 'depth', 'flat', 'rgba'])
@pytest.mark.parametrize('label', ['number', 'kind'])
def test_images_and_labels_of_other_kinds_are_read(odd, image, label):
  root, rows = odd
  found = data.load('odd', 'train', root, features=(image, label))
  wanted = np.stack([row[image] for row in rows])
  assert found.images.dtype == wanted.dtype
  np.testing.assert_array_equal(found.images, wanted.reshape(4, 5, 4, -1))
  assert found.labels.tolist() == [0, 1, 2, 0]
  assert found.classes == tuple('012' if label == 'number' else 'abc')
  (batch,) = data.stream(
    *('odd', 'train', root), seed=0, batch=4, epochs=1, features=(image, label)
  )
  order = np.asarray(data.epoch_batches(0, 0, size=4, batch=4))[0]
  np.testing.assert_array_equal(batch[0], found.images[order])
  np.testing.assert_array_equal(batch[1], found.labels[order])


def test_integers_without_names_have_the_classes_of_all_splits(odd):
  """Else a network for the classes of a small test split had too few."""
  root, _ = odd
  found = data.load('odd', 'test', root, features=('deep', 'number'))
  assert found.labels.tolist() == [0, 1]
  assert found.classes == ('0', '1', '2')
  with pytest.raises(
    data.DataError, match=r'Record 0 .* has the label -1, but'
  ):
    data.load('odd', 'hidden', root, features=('deep', 'number'))


@pytest.mark.parametrize(
  ('features', 'message'),
  [
    (None, r"no feature 'image', 'label', but caption, clip, .*by `features`"),
    (('deep', 'nothing'), "no feature 'nothing', but caption"),
    ('deep', "`features` must be several strings .*, got 'deep'"),
    ((), r'`features` must name one or two, got \(\)'),
    (('clip', 'kind'), r'is uint8\[2, 5, 4, 3\], but an image .*data\.records'),
    (('sound', 'kind'), r"'sound' of record 0 .* is float32\[16\], but an im"),
    (('caption', 'kind'), r"'caption' of record 0 .* is bytes, but an image"),
    (
      ('deep', 'caption'),
      r"The label 'caption' of odd is Text.*data\.save num",
    ),
    (
      ('deep', 'price'),
      r"The label 'price' of odd is Scalar.*float32.* one int",
    ),
    (('deep', 'one_hot'), r"The label 'one_hot' of odd is Tensor.*\(3,\)"),
    (
      ('deep', 'identity'),
      'Record 0 .* has the label 1000000000, but labels co',
    ),
  ],
)
def test_what_is_no_image_or_label_is_said_in_one_line(odd, features, message):
  root, _ = odd
  with pytest.raises((data.DataError, TypeError), match=message) as error:
    data.load('odd', 'train', root, features=features)
  assert '\n' not in str(error.value)


def test_what_load_does_not_read_records_reads(odd):
  root, rows = odd
  found, classes, _ = data.records('odd', 'train', root, ('clip', 'kind'))
  np.testing.assert_array_equal(
    [x for x, _ in found], [r['clip'] for r in rows]
  )
  assert classes == ('a', 'b', 'c')


# --- What is done with other images ------------------------------------------


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'int32', 'float32'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_photos_of_every_kind_are_cut(dtype, channels):
  """A constant image stays constant, a gradient in its range."""
  top = {'uint8': 200, 'uint16': 60_000, 'int32': -70_000, 'float32': 0.5}[
    dtype
  ]
  image = np.full((20, 30, channels), top, dtype)
  image[..., 0] = np.linspace(0, top, 30, dtype=dtype)
  for cut in (augment.center_crop, augment.random_resized_crop):
    square = cut(image, np.random.default_rng(0), side=8)
    assert square.shape == (8, 8, channels)
    assert square.dtype == dtype
    low, high = sorted((0, top))
    assert low <= square.min()
    assert square.max() <= high
    if channels > 1:
      assert np.all(square[..., 1:] == np.asarray(top, dtype))


@pytest.mark.parametrize('dtype', ['uint16', 'int32', 'float32'])
def test_statistics_of_other_pixels(dtype):
  images = (1000 * RNG.random((9, 4, 3, 2))).astype(dtype)
  mean, deviation = augment.pixel_statistics(images)
  wanted = images.astype(np.float64)
  np.testing.assert_allclose(mean, wanted.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(deviation, wanted.std((0, 1, 2)), rtol=1e-6)
  assert mean.dtype == deviation.dtype == np.float32


@pytest.mark.parametrize('unit', [1e-6, 1, 1000])
def test_floats_of_any_unit_are_normalised(unit):
  """Deviations below 1e-3 were taken for 1e-3, as of uint8."""
  images = RNG.normal(3, 2, (99, 4, 4, 2)).astype(np.float32) * np.float32(unit)
  images[..., 1] = np.float32(unit) / 3  # Does not vary.
  x = np.asarray(train.preparation(images)(images))
  np.testing.assert_allclose(x[..., 0].mean(), 0, atol=1e-5)
  np.testing.assert_allclose(x[..., 0].std(), 1, rtol=1e-5)
  np.testing.assert_allclose(x[..., 1], 0, atol=1e-4)


# --- docs/data.md ------------------------------------------------------------


def test_the_recipes_of_the_docs_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  page = pathlib.Path(__file__).parents[1] / 'docs' / 'data.md'
  blocks = re.findall(r'^```python\n(.*?)^```$', page.read_text(), re.M | re.S)
  assert len(blocks) >= 4
  namespace: dict = {}
  for block in blocks:
    exec(compile(block, 'data.md', 'exec'), namespace)
