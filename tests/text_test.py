import shutil
import sys

import numpy as np
import pytest

from jaxprune import data
from jaxprune.data import digits, text

# --- GLUE --------------------------------------------------------------------

# The features and labels of TFDS' glue 2.0.0, and rows made for the test.
GLUE = {
  'mnli': {
    'premise': ('It rains.', 'Er lacht über sie.', 'A cat sleeps.'),
    'hypothesis': ('It is dry.', 'He laughs.', 'It is grey.'),
    'labels': ('entailment', 'neutral', 'contradiction'),
    'answers': (2, 0, 1),
    'splits': ('train', 'validation_matched', 'validation_mismatched'),
  },
  'qqp': {
    'question1': ('Is it?', 'Why?'),
    'question2': ('Ist es ä?', 'How?'),
    'labels': ('not_duplicate', 'duplicate'),
    'answers': (1, 0),
    'splits': ('train', 'validation', 'test'),
  },
  'sst2': {
    'sentence': ('Fine.', 'Bad.'),
    'labels': ('negative', 'positive'),
    'answers': (1, 0),
    'splits': ('train', 'validation', 'test'),
  },
}
SENTENCES = {
  'mnli': ('premise', 'hypothesis'),
  'qqp': ('question1', 'question2'),
  'sst2': ('sentence',),
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder of sets with the three tasks of GLUE, as TFDS prepares them."""
  root = tmp_path_factory.mktemp('sets')
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import registered

  config = lambda name: tfds.core.BuilderConfig(name=name)
  with registered.skip_registration():

    class Glue(tfds.core.GeneratorBasedBuilder):
      """Three of the tasks."""

      VERSION = tfds.core.Version('2.0.0')
      BUILDER_CONFIGS = tuple(map(config, GLUE))

      def _info(self):
        task = self.builder_config.name
        features = {key: tfds.features.Text() for key in SENTENCES[task]}
        features['label'] = tfds.features.ClassLabel(names=GLUE[task]['labels'])
        features['idx'] = np.int32
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        splits = GLUE[self.builder_config.name]['splits']
        return {split: self._generate_examples(split) for split in splits}

      def _generate_examples(self, split):
        task = self.builder_config.name
        for i, label in enumerate(GLUE[task]['answers']):
          row = {key: GLUE[task][key][i] for key in SENTENCES[task]}
          yield i, {**row, 'label': -1 if split == 'test' else label, 'idx': i}

  with digits._silence():
    for task in GLUE:
      builder = Glue(config=task, data_dir=root, file_format='array_record')
      builder.download_and_prepare()
  return root


@pytest.mark.parametrize('task', GLUE)
def test_glue_as_tfds_prepares_it(root, task):
  for split in GLUE[task]['splits'][:2]:
    found = text.glue(task, split, root)
    rows = zip(*(GLUE[task][key] for key in SENTENCES[task]), strict=True)
    texts = [row if len(row) > 1 else row[0] for row in rows]
    expected = dict(zip(texts, GLUE[task]['answers'], strict=True))
    assert dict(zip(found.texts, found.labels, strict=True)) == expected
    assert found.labels.dtype == np.int32
    assert found.classes == GLUE[task]['labels']
    assert (found.name, found.version) == (f'glue/{task}', '2.0.0')
  assert len(text.glue(task, 'train[:1]', root)) == 1
  assert 'tensorflow' not in sys.modules


def test_glue_errors(root, tmp_path):
  (tmp_path / 'glue').symlink_to(root / 'glue' / 'sst2')
  for args, folder, message in (
    (
      ('cola', 'train'),
      root,
      "no GLUE task 'cola'; there are: mnli, qqp, sst2",
    ),
    (('mnli', 'train'), tmp_path, "There is no data set 'glue/mnli' in "),
    (('qqp', 'valid'), root, "has no split 'valid'"),
    (('mnli', 'validation'), root, 'it has train, validation_matched, valid'),
    (
      ('qqp', 'test'),
      root,
      r"Record 0 of glue/qqp 'test' has the label -1, .* 0 to 1",
    ),
  ):
    with pytest.raises(data.DataError, match=message):
      text.glue(*args, data_dir=folder)
  with pytest.raises(data.DataError, match="has no feature 'premise', but idx"):
    data.records('glue/sst2', 'train', root, ('premise', 'label'))
  with pytest.raises(data.DataError, match="its 'sentence' has no classes"):
    data.records('glue/sst2', 'train', root, ('sentence',))


def test_a_damaged_sentence_is_named(root, tmp_path):
  shutil.copytree(root / 'glue', tmp_path / 'glue')
  name = 'glue-train.array_record-00000-of-00001'
  file = tmp_path / 'glue' / 'mnli' / '2.0.0' / name
  raw = bytearray(file.read_bytes())
  raw[raw.index(b'It rains')] ^= 1
  file.write_bytes(raw)
  with pytest.raises(data.DataError, match=r'Record \d of glue .* is damaged'):
    text.glue('mnli', 'train', tmp_path)


# --- Docstrings --------------------------------------------------------------


def test_sentences_of_running_text():
  docstring = (
    'Return the sum of all entries.\n\n'
    'This first sentence is good enough.  So is this ``other`` one\nas well! '
    'too short. x is lower case and long.\n\n'
    'Args:\n  x: this is a list and no text.\n\n'
    '>>> This is an example of code.\n\n'
    'This ends before some code::\n\n'
    'Notes\n-----\nThis is under a heading and goes away.\n'
  )
  assert text._sentences(docstring) == [
    'Return the sum of all entries.',
    'This first sentence is good enough.',
    'So is this other one as well! too short. x is lower case and long.',
  ]


@pytest.fixture
def packages(tmp_path, monkeypatch):
  """Two packages of ten modules each, with a test among them."""
  for package, word in (('redpkg', 'apples'), ('bluepkg', 'berries')):
    (tmp_path / package / 'tests').mkdir(parents=True)
    (tmp_path / package / '__init__.py').touch()
    (tmp_path / package / 'broken.py').write_text('def (')
    (tmp_path / package / 'tests' / 'a.py').write_text('"""In a test it is."""')
    for i in range(10):
      (tmp_path / package / f'module{i}.py').write_text(
        f'def f():\n  """The {word} number {i} of {package}.sub.f grow well.\n'
        f'\n'
        f'  A sentence that all of them have.\n  """\n'
        f'raise RuntimeError("is not imported")\n'
      )
  monkeypatch.syspath_prepend(tmp_path)
  return 'redpkg', 'bluepkg'


def test_docstrings_split_by_module_mask_names_and_drop_what_is_shared(
  packages,
):
  train, test = text.docstrings(packages)
  assert len(train) + len(test) == 20
  assert not set(train.texts) & set(test.texts)
  assert train.classes == test.classes == packages
  assert train.version == 'redpkg unknown, bluepkg unknown'
  for part in (train, test):
    for sentence, label in zip(part.texts, part.labels, strict=True):
      word = ('apples', 'berries')[label]
      number = sentence.split()[3]
      assert sentence == f'The {word} number {number} of [MASK] grow well.'
  again = text.docstrings(packages)[0]
  assert again.texts == train.texts
  np.testing.assert_array_equal(again.labels, train.labels)


def test_docstrings_errors(packages, tmp_path):
  with pytest.raises(data.DataError, match="'nosuchpkg' are needed, but it is"):
    text.docstrings(('nosuchpkg',))
  (tmp_path / 'redpkg' / 'sub').mkdir()
  for file in (tmp_path / 'bluepkg').glob('module*.py'):
    file.write_text('')
  with pytest.raises(
    data.DataError, match='No sentence of bluepkg is in the t'
  ):
    text.docstrings(packages)


@pytest.mark.slow
def test_docstrings_of_what_is_installed():
  train, test = text.docstrings()
  assert len(train) > 15_000
  assert len(test) > 3_000
  assert set(text.LICENCES) == set(train.classes)
  for name in ('numpy', 'scipy', 'sklearn', 'scikit-learn', 'python'):
    assert not any(name in sentence.lower().split() for sentence in train.texts)
  most, words = text.majority(train, test), text.bag_of_words(train, test)
  print(f'{train.version}: majority {most:.3f}, bag of words {words:.3f}')
  assert 0.3 < most < 0.5
  assert 0.65 < words < 0.85


# --- Baselines ---------------------------------------------------------------


def make(texts, labels):
  return text.TextSet(tuple(texts), np.int32(labels), ('a', 'b'), 'n', '1')


def test_baselines_by_hand():
  train = make(['red red', 'red sun', 'blue'], [0, 0, 1])
  test = make(['blue blue', 'red', ('sun', 'Red'), 'unseen'], [1, 0, 0, 1])
  assert text.majority(train, test) == 0.5
  # Unseen words leave the prior, which names the wrong class once.
  assert text.bag_of_words(train, test) == 0.75
  # Of two classes as common, the one of fewer words: 2/5 above 3/10.
  train = make(['sun', 'sun sun x x x x'], [0, 1])
  assert text.bag_of_words(train, make(['sun'], [0])) == 1


# --- Tokens ------------------------------------------------------------------


def test_word_pieces_by_hand():
  texts = ['aab aab ab', ('Ab cab', '[MASK] aab')]
  pieces = text.word_pieces(texts, size=5 + 6 + 4)
  assert list(pieces) == [
    '[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b', 'c', '##a', '##b',
    '##c', 'aab', 'ab', 'cab',
  ]  # fmt: skip
  assert list(pieces.values()) == list(range(14))
  # Three words, and one end of a word that did not make it.
  pieces = text.word_pieces([*texts, 'xcab'], size=5 + 8 + 4)
  assert list(pieces)[13:] == ['aab', 'ab', 'cab', '##ab']
  with pytest.raises(ValueError, match=r'at least 11, .* got 10'):
    text.word_pieces(texts, size=10)


def test_encode_by_hand(tmp_path):
  pytest.importorskip('tokenizers')
  pieces = text.word_pieces(['aab ab ab'], size=100)
  texts = [('Ab c', '[MASK] b'), ('aab aab ab', 'b')]
  tokens, mask, types = text.encode(texts, pieces, length=8)
  names = {number: piece for piece, number in pieces.items()}
  assert [names[t] for t in tokens[0]] == [
    '[CLS]', 'ab', '[UNK]', '[SEP]', '[MASK]', 'b', '[SEP]', '[PAD]',
  ]  # fmt: skip
  np.testing.assert_array_equal(mask[0], [1] * 7 + [0])
  np.testing.assert_array_equal(types[0], [0] * 4 + [1] * 3 + [0])
  assert (tokens.dtype, mask.dtype, types.dtype) == (np.int32, bool, np.int32)
  file = tmp_path / 'vocab.txt'
  file.write_text('\n'.join(pieces) + '\n')
  np.testing.assert_array_equal(text.encode(texts, file, 8)[0], tokens)
  assert text.encode(['aab ab ab ab'], pieces, 4)[0].shape == (1, 4)
  assert text.encode([], pieces, 4)[0].shape == (0, 4)


def test_encode_errors(monkeypatch, tmp_path):
  pieces = text.word_pieces(['ab'])
  with pytest.raises(ValueError, match='`length` must be at least 3, got 2'):
    text.encode(['ab'], pieces, 2)
  with pytest.raises(ValueError, match=r'vocabulary has no \[CLS\], \[SEP\], '):
    text.encode(['ab'], {'[PAD]': 0, '[UNK]': 1})
  with pytest.raises(FileNotFoundError, match=r'none\.txt'):
    text.encode(['ab'], tmp_path / 'none.txt')
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ImportError, match='pip install tokenizers'):
    text.encode(['ab'], pieces)
