import functools
import json
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import data
from jaxprune.data import augment, digits, order


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder of sets: the digits, and four images of two sizes."""
  root = tmp_path_factory.mktemp('sets')
  digits.prepare(root)
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import registered

  with registered.skip_registration():

    class Sizes(tfds.core.GeneratorBasedBuilder):
      """Images of two sizes."""

      VERSION = tfds.core.Version('1.2.0')

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(
            {
              'image': tfds.features.Tensor(
                shape=(None, None, 1), dtype=np.uint8, encoding='bytes'
              ),
              'label': tfds.features.ClassLabel(names=['left', 'right']),
            }
          ),
        )

      def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

      def _generate_examples(self):
        for i in range(4):
          image = np.full((10 + i, 12, 1), 10 * i, np.uint8)
          yield i, {'image': image, 'label': i % 2}

  with digits._silence():
    Sizes(data_dir=root, file_format='array_record').download_and_prepare()
  return root


@pytest.fixture
def copy(root, tmp_path):
  """A copy of the folder that a test may damage."""
  return shutil.copytree(root, tmp_path / 'sets')


def edit(file, old, new):
  text = file.read_text()
  assert old in text
  file.write_text(text.replace(old, new))


def error(*args, **kwargs):
  with pytest.raises(data.DataError) as caught:
    data.load(*args, **kwargs)
  text = str(caught.value)
  assert '\n' not in text
  return text


# --- Reading -----------------------------------------------------------------


def test_digits_are_prepared_in_the_cache(tmp_path, monkeypatch, capfd):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv('JAXPRUNE_DATA', raising=False)
  train, test = data.load('digits'), data.load('digits', 'test')
  assert capfd.readouterr() == ('', '')
  assert 'tensorflow' not in sys.modules
  assert train.images.shape == (1437, 8, 8, 1)
  assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
  assert (len(train), len(test)) == (1437, 360)
  assert train.classes == tuple('0123456789')
  assert (train.name, train.version) == ('digits', '1.0.0')
  assert train.images.max() == 16
  assert (tmp_path / 'jaxprune' / 'digits' / '1.0.0').is_dir()
  # Every image with its label, in whatever order.
  everything = digits._digits()
  table = {x.tobytes(): y for x, y in zip(train.images, train.labels, strict=1)}
  indices, _ = digits.split()
  for i in indices:
    image = everything.images[i].astype(np.uint8)
    assert table[image.tobytes()] == everything.target[i]
  mean, deviation = augment.pixel_statistics(train.images)
  np.testing.assert_allclose([mean, deviation], augment.PIXELS['digits'], 1e-4)


def test_folder_by_argument_by_variable_and_below(root, tmp_path, monkeypatch):
  expected = data.load('digits', 'test', root).images
  monkeypatch.setenv('JAXPRUNE_DATA', str(root))
  np.testing.assert_array_equal(data.load('digits', 'test').images, expected)
  (tmp_path / 'tfds').symlink_to(root)
  below = data.load('digits', 'test', tmp_path)
  np.testing.assert_array_equal(below.images, expected)


def test_parts_of_a_split(root):
  whole = data.load('digits', 'train', root)
  part = data.load('digits', 'train[100:1300]', root)  # More than one read.
  np.testing.assert_array_equal(part.images, whole.images[100:1300])
  np.testing.assert_array_equal(part.labels, whole.labels[100:1300])
  assert len(data.load('digits', 'train+test', root)) == 1797


def test_versions_newest_first_or_as_asked(copy):
  shutil.copytree(copy / 'digits/1.0.0', copy / 'digits/1.10.0')
  shutil.copytree(copy / 'digits/1.0.0', copy / 'digits/1.9.0')
  for version in ('1.10.0', '1.9.0'):
    info = copy / 'digits' / version / 'dataset_info.json'
    edit(info, '"1.0.0"', f'"{version}"')
  assert data.load('digits', 'test', copy).version == '1.10.0'
  assert data.load('digits:1.9.0', 'test', copy).version == '1.9.0'
  text = error('digits:2.0.0', 'test', copy)
  assert 'has no version 2.0.0 of digits, only 1.10.0, 1.9.0, 1.0.0.' in text


def test_unknown_set_names_the_known_ones(root, monkeypatch):
  text = error('mnits', 'train', root)
  assert text.startswith(f"There is no data set 'mnits' in {root}; there are: ")
  assert 'digits, sizes.' in text
  monkeypatch.delenv('JAXPRUNE_DATA', raising=False)
  text = error('mnist')
  assert "no data set 'mnist' without a data folder; there are: digits." in text


def test_missing_folder(tmp_path):
  text = error('digits', 'train', tmp_path / 'no')
  assert text.startswith(f'The data folder {tmp_path}/no does not exist.')


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
  monkeypatch.delenv('JAXPRUNE_DATA', raising=False)
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  text = error('digits')
  assert f'cannot be prepared in {tmp_path}/file/jaxprune (' in text
  assert 'XDG_CACHE_HOME' in text


def test_missing_split(root):
  text = error('digits', 'valid', root)
  assert "digits has no split 'valid'" in text
  assert "it has train, test, and parts such as 'train[:100]'." in text
  for part in ('train[9:4]', 'train[:2000]', 'train[:'):
    assert f'digits has no split {part!r}' in error('digits', part, root)


def test_damaged_record_is_named(copy):
  file = copy / 'digits/1.0.0/digits-test.array_record-00000-of-00001'
  raw = bytearray(file.read_bytes())
  raw[len(raw) // 3] ^= 1
  file.write_bytes(raw)
  text = error('digits', 'test[5:]', copy)
  number = int(text.split()[1])
  assert f'Record {number} of digits' in text
  assert f'record {number + 5} of {file}, is damaged (' in text
  text = error('digits', 'train[7:10]+test', copy)  # Of two files.
  assert text.startswith(f'Record {number + 8} of digits')
  assert f'record {number + 5} of {file}, is damaged (' in text
  data.load('digits', f'test[5:{number + 5}]', copy)  # All before it are good.
  data.load('digits', 'train', copy)


def test_damaged_and_missing_files(copy):
  folder = copy / 'digits/1.0.0'
  file = folder / 'digits-test.array_record-00000-of-00001'
  os.truncate(file, file.stat().st_size // 2)
  assert f'of {file}, is damaged (' in error('digits', 'test', copy)
  file.unlink()
  assert error('digits', 'test', copy).startswith(f'{file} is missing.')
  (folder / 'features.json').write_text('{"oops')
  assert error('digits', 'test', copy).startswith(f'{folder} is damaged (')
  (folder / 'dataset_info.json').unlink()
  assert error('digits', 'test', copy).startswith(f'{folder} is damaged (')


@pytest.mark.parametrize('count', [359, 361])
def test_a_file_has_the_records_that_its_set_says(copy, count):
  folder = copy / 'digits/1.0.0'
  edit(folder / 'dataset_info.json', '"360"', f'"{count}"')
  text = error('digits', 'test[:100]', copy)
  file = folder / 'digits-test.array_record-00000-of-00001'
  assert text.startswith(f'{file} has 360 records, but by dataset_info.json')
  assert f'must have {count}.' in text


def test_a_folder_that_is_no_version_is_passed_over(copy):
  for name in ('1..0.', '1.0.', '..'):
    (copy / 'digits' / name).mkdir(exist_ok=True)
  assert data.load('digits', 'test', copy).version == '1.0.0'


def test_other_file_format(copy):
  edit(copy / 'digits/1.0.0/dataset_info.json', 'array_record', 'tfrecord')
  file = 'digits-test.array_record-00000-of-00001'
  new = file.replace('array_record', 'tfrecord')
  (copy / 'digits/1.0.0' / file).rename(copy / 'digits/1.0.0' / new)
  assert "with file_format='array_record'" in error('digits', 'test', copy)


def test_unknown_label(copy):
  file = copy / 'digits/1.0.0/features.json'
  edit(file, '"numClasses": "10"', '"numClasses": "9"')
  text = error('digits', 'test', copy)
  number = int(text.split()[1])
  assert text == (
    f"Record {number} of digits 'test' has the label 9, but the set has the 9 "
    f'labels 0 to 8.'
  )


def test_wrong_shape(root):
  text = error('sizes', 'train', root)
  assert text.startswith("Record 1 of sizes 'train' is uint8[")
  assert '12, 1], but record 0 is uint8[' in text
  assert 'A set of many sizes needs a transform' in text


def test_a_set_of_many_sizes_is_read_through_a_transform(root):
  cut = functools.partial(augment.center_crop, side=7)
  found = data.load('sizes', 'train', root, transform=cut)
  assert found.images.shape == (4, 7, 7, 1)
  # Image 10 i has the label i mod 2.
  values = found.images[:, 3, 3, 0] // 10
  assert sorted(values) == [0, 1, 2, 3]
  np.testing.assert_array_equal(values % 2, found.labels)
  seeded = lambda image, rng: cut(image) + rng.integers(9, dtype=np.uint8)
  first, again = (
    data.load('sizes', 'train', root, transform=seeded).images for _ in 'ab'
  )
  np.testing.assert_array_equal(first, again)
  assert len({int(x) for x in first[:, 0, 0, 0] - found.images[:, 0, 0, 0]}) > 1
  with pytest.raises(data.DataError, match="record 0 of sizes 'train' with Ze"):
    data.load('sizes', 'train', root, transform=lambda x, rng: 1 // 0)


def test_no_image_classification_set(copy):
  file = copy / 'sizes/1.2.0/features.json'
  features = json.loads(file.read_text())
  inner = features['featuresDict']['features']
  inner['photo'] = inner.pop('image')
  file.write_text(json.dumps(features))
  text = error('sizes', 'train', copy)
  assert "sizes has no feature 'image', but label, photo." in text


def test_empty_split(root):
  text = error('digits', 'train[:0]', root)
  assert text.startswith("digits has no split 'train[:0]' (it is empty);")


# --- The order ---------------------------------------------------------------


def test_epochs_are_permutations_and_differ():
  draw = jax.jit(lambda s, e: data.epoch_batches(s, e, size=11, batch=3))
  a, b, c = (np.asarray(draw(s, e)) for s, e in ((0, 0), (0, 1), (1, 0)))
  assert a.shape == (3, 3)
  assert len(set(a.ravel().tolist())) == 9
  assert a.min() >= 0
  assert a.max() <= 10
  assert (a != b).any()
  assert (a != c).any()
  np.testing.assert_array_equal(a, data.epoch_batches(0, 0, size=11, batch=3))


def test_the_order_stays_what_it_is():
  # Held here so that a resumed run of an older version has the same order.
  rows = data.epoch_batches(7, 2, size=8, batch=4)
  np.testing.assert_array_equal(rows, [[7, 3, 6, 4], [5, 1, 0, 2]])
  assert jax.random.bits(data.step_key(7, 2, 3)) == 234247882


def test_keys_of_steps_differ_from_each_other_and_from_the_order():
  keys = [data.step_key(0, e, s) for e in range(3) for s in range(3)]
  keys += [jax.random.fold_in(order._epoch_key(0, e), 0) for e in range(3)]
  words = {tuple(jax.random.key_data(k).tolist()) for k in keys}
  assert len(words) == 12


def test_eval_batches_visit_all_once():
  for size, batch in ((1, 4), (8, 4), (9, 4)):
    indices, valid = data.eval_batches(size, batch)
    assert indices.shape == valid.shape == (-(-size // batch), batch)
    np.testing.assert_array_equal(indices[valid], np.arange(size))
    assert indices.max() < size


def test_order_errors():
  with pytest.raises(ValueError, match=r'`batch` must be in 1..8, .* got 9'):
    data.epoch_batches(0, 0, size=8, batch=9)
  with pytest.raises(ValueError, match='must be at least 1, got 0 and 4'):
    data.eval_batches(0, 4)


# --- Large sets --------------------------------------------------------------


def test_stream_has_the_order_of_the_set_in_memory(root):
  whole = data.load('digits', 'test', root)
  options = {'seed': 3, 'batch': 100, 'epochs': 2}
  batches = list(data.stream('digits', 'test', root, **options))
  assert len(batches) == 6
  for t, (images, labels) in enumerate(batches):
    rows = data.epoch_batches(3, t // 3, size=360, batch=100)[t % 3]
    np.testing.assert_array_equal(images, whole.images[rows])
    np.testing.assert_array_equal(labels, whole.labels[rows])

  # Goes on where it was: in this process and in another.
  iterator = data.stream('digits', 'test', root, **options)
  next(iterator), next(iterator)
  state = iterator.get_state()
  assert state == {'next_index': 2}
  np.testing.assert_array_equal(next(iterator)[0], batches[2][0])
  iterator.set_state(state)
  np.testing.assert_array_equal(next(iterator)[0], batches[2][0])
  rest = list(data.stream('digits', 'test', root, start=4, **options))
  np.testing.assert_array_equal(rest[0][0], batches[4][0])
  assert len(rest) == 2


@pytest.mark.parametrize('hosts', [2, 4, 5])
def test_hosts_share_a_step_and_go_on_from_its_middle(root, hosts):
  options = {'seed': 3, 'batch': 40, 'epochs': 2}
  whole = list(data.stream('digits', 'test', root, **options))
  assert len(whole) == 18
  # From step 5 of epoch 0, and after a restart from step 2 of epoch 1.
  for start in (5, 11):
    parts = [
      data.stream(
        'digits', 'test', root, host=(i, hosts), start=start, **options
      )
      for i in range(hosts)
    ]
    for step in range(start, start + 3):
      found = [next(part) for part in parts]
      assert {len(labels) for _, labels in found} == {40 // hosts}
      for k in range(2):
        together = np.concatenate([one[k] for one in found])
        np.testing.assert_array_equal(together, whole[step][k])


def test_a_stream_of_some_rows_is_that_of_their_set(root):
  whole, rows = data.load('digits', 'test', root), np.arange(3, 360, 7)
  options = {'seed': 1, 'batch': 10, 'epochs': 2}
  found = list(data.stream('digits', 'test', root, rows=rows, **options))
  assert len(found) == 2 * (len(rows) // 10)
  for t, (images, labels) in enumerate(found):
    epoch, step = divmod(t, len(rows) // 10)
    order = data.epoch_batches(1, epoch, size=len(rows), batch=10)[step]
    np.testing.assert_array_equal(images, whole.images[rows[order]])
    np.testing.assert_array_equal(labels, whole.labels[rows[order]])
  for wrong in ([0, 360], [-1, 5]):
    with pytest.raises(ValueError, match=r'`rows` must be in 0\.\.359, the ex'):
      data.stream('digits', 'test', root, rows=np.array(wrong), **options)


def test_examples_are_counted_without_a_record(copy):
  assert data.count('digits', 'train', copy) == 1437
  assert data.count('digits', 'train[:10%]+test', copy) == 504
  file = copy / 'digits/1.0.0/digits-test.array_record-00000-of-00001'
  file.unlink()
  with pytest.raises(data.DataError, match='is missing'):
    data.count('digits', 'test', copy)


def test_stream_transforms_by_seed_epoch_and_example(root):
  def transform(image, rng):
    crop = augment.random_resized_crop(image, rng, side=4)
    return crop + rng.integers(0, 5, dtype=np.uint8)

  draw = lambda: list(
    data.stream(
      'sizes', 'train', root, seed=0, batch=2, epochs=2, transform=transform
    )
  )
  first, second = draw(), draw()
  assert first[0][0].shape == (2, 4, 4, 1)
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a[0], b[0])
  sums = [
    sorted(x.sum() for images, _ in e for x in images)
    for e in (first[:2], first[2:])
  ]
  assert sums[0] != sums[1]


def test_stream_errors(root, copy):
  with pytest.raises(ValueError, match=r'batch 5 and host .* \(0, 2\)'):
    data.stream('digits', 'test', root, seed=0, batch=5, epochs=1, host=(0, 2))
  with pytest.raises(ValueError, match=r'got batch 4 and host .* \(2, 2\)'):
    data.stream('digits', 'test', root, seed=0, batch=4, epochs=1, host=(2, 2))
  batches = data.stream('sizes', 'train', root, seed=0, batch=4, epochs=1)
  with pytest.raises(data.DataError, match='needs a transform'):
    next(batches)
  file = copy / 'digits/1.0.0/digits-test.array_record-00000-of-00001'
  raw = bytearray(file.read_bytes())
  raw[len(raw) // 3] ^= 1
  file.write_bytes(raw)
  batches = data.stream('digits', 'test', copy, seed=0, batch=360, epochs=1)
  with pytest.raises(data.DataError, match=r'Record \d+ of digits .* damaged'):
    next(batches)


def test_stream_has_one_shape_and_dtype_in_all_batches(root):
  options = {'seed': 0, 'batch': 1, 'epochs': 1}
  batches = data.stream('sizes', 'train', root, **options)
  with pytest.raises(
    data.DataError,
    match=r"Record \d of sizes 'train' is uint8\[1\d, 12, 1\], b",
  ):
    list(batches)

  def transform(image, rng):
    return image / 16 if image.sum() % 2 else image

  batches = data.stream('digits', 'test', root, transform=transform, **options)
  with pytest.raises(
    data.DataError,
    match=r"Record \d+ of digits 'test' is (float64|uint8)\[8, 8",
  ):
    list(batches)


def test_an_error_of_the_transform_names_the_record(root):
  def transform(image, rng):
    if image[0, 0] == 20:
      raise KeyError('no twenty')
    return image[:10]

  batches = data.stream(
    'sizes', 'train', root, seed=0, batch=4, epochs=1, transform=transform
  )
  with pytest.raises(
    data.DataError, match=r"record \d of sizes 'train' with KeyError \('no twen"
  ):
    next(batches)


def test_stream_starts_at_one_of_its_steps(root):
  options = {'seed': 0, 'batch': 100, 'epochs': 2}
  assert list(data.stream('digits', 'test', root, start=6, **options)) == []
  for start in (-1, 7):
    with pytest.raises(
      ValueError, match=rf'in 0\.\.6, 3 steps for each of 2 epochs, got {start}'
    ):
      data.stream('digits', 'test', root, start=start, **options)


def test_prefetch_keeps_order_runs_ahead_and_shards():
  drawn = []

  def source():
    for i in range(5):
      drawn.append(i)
      yield {'x': np.full(4, i)}

  mesh = jax.make_mesh(
    (4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  batches = data.prefetch(source(), rows, size=2)
  first = next(batches)
  assert drawn == [0, 1, 2]
  assert first['x'].sharding == rows
  assert [int(b['x'][0]) for b in batches] == [1, 2, 3, 4]
  assert isinstance(next(data.prefetch([np.ones(2)])), jnp.ndarray)
  with pytest.raises(ValueError, match='`size` must be at least 1, got 0'):
    data.prefetch([], size=0)


def test_prefetch_of_one_has_the_next_batch_on_its_way():
  drawn = []
  batches = data.prefetch(
    (drawn.append(i) or np.ones(i) for i in range(3)), size=1
  )
  assert next(batches).shape == (0,)
  assert drawn == [0, 1]


@pytest.mark.parametrize('size', [1, 2, 9])
def test_prefetch_yields_what_came_before_an_error(size):
  def source():
    yield from np.eye(3)
    raise OSError('the disk is gone')

  batches = data.prefetch(source(), size=size)
  for row in np.eye(3):
    np.testing.assert_array_equal(next(batches), row)
  with pytest.raises(OSError, match='the disk is gone'):
    next(batches)


# --- Prepared sets, where they are found -------------------------------------


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'shape', 'tolerance'),
  [
    ('mnist', (60000, 28, 28, 1), 1e-5),
    ('fashion_mnist', (60000, 28, 28, 1), 1e-5),
    ('cifar10', (50000, 32, 32, 3), 1e-2),  # A JPEG copy has other pixels.
  ],
)
def test_prepared_sets_have_their_published_statistics(name, shape, tolerance):
  if 'JAXPRUNE_DATA' not in os.environ:
    pytest.skip('JAXPRUNE_DATA names no folder')
  train = data.load(name)
  assert train.images.shape == shape
  assert np.bincount(train.labels).min() >= 5000
  statistics = augment.pixel_statistics(train.images)
  np.testing.assert_allclose(statistics, augment.PIXELS[name], tolerance)
