"""Sentences and labels: GLUE from TFDS folders, and a set that is always there.

:func:`docstrings` makes a real classification task of what is installed: from
which package does a sentence of documentation come? :func:`glue` reads MNLI,
SST-2 and QQP. :func:`word_pieces` and :func:`encode` turn either into tokens.
"""

import ast
import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import pathlib
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxprune import data
from jaxprune.checks import extras

Text = str | tuple[str, str]  # One sentence, or a pair of them.

LICENCES = {  # Of the docstrings, which are read where they are installed.
  'python': 'PSF-2.0',
  'numpy': 'BSD-3-Clause',
  'scipy': 'BSD-3-Clause',
  'sklearn': 'BSD-3-Clause',
}
_DISTRIBUTIONS = {'sklearn': 'scikit-learn'}
_SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
_TASKS = {  # The features of GLUE's tasks that hold their sentences.
  'mnli': ('premise', 'hypothesis'),
  'qqp': ('question1', 'question2'),
  'sst2': ('sentence',),
}


@dataclasses.dataclass(frozen=True, eq=False)
class TextSet:
  """One split of a text classification set."""

  texts: tuple[Text, ...]
  labels: np.ndarray  # int32, [n], in 0..len(classes)-1.
  classes: tuple[str, ...]  # Name of each label.
  name: str
  version: str

  def __len__(self) -> int:
    """Returns the number of examples."""
    return len(self.texts)


# --- GLUE --------------------------------------------------------------------


def glue(
  task: str, split: str = 'train', data_dir: str | os.PathLike | None = None
) -> TextSet:
  """Reads one split of a GLUE task from a folder that TFDS prepared.

  Args:
    task: ``'mnli'``, ``'qqp'`` or ``'sst2'``; its folder is
      ``data_dir/glue/task/version``.
    split: as in TFDS, such as ``'validation_matched'`` or ``'train[:1000]'``.
    data_dir: as in :func:`jaxprune.data.load`.

  Returns:
    A :class:`TextSet`, of pairs for ``mnli`` and ``qqp``.

  Raises:
    MissingExtraError: if a package of jaxprune[data] is not installed.
    DataError: if the task is unknown, the folder or split is missing, a record
      is damaged, or it has no label, as in the ``test`` splits.
  """
  if task not in _TASKS:
    raise data.DataError(
      f'There is no GLUE task {task!r}; there are: {", ".join(_TASKS)}.'
    )
  records, classes, version = data.records(
    f'glue/{task}', split, data_dir, (*_TASKS[task], 'label')
  )
  texts = []
  labels = np.empty(len(records), np.int32)
  for i, (*fields, label) in enumerate(records):
    if not 0 <= label < len(classes):
      raise data.DataError(
        f'Record {i} of glue/{task} {split!r} has the label {label}, but the '
        f'set has the labels 0 to {len(classes) - 1}; the test splits of GLUE '
        f'have none.'
      )
    labels[i] = label
    words = [p.decode() if isinstance(p, bytes) else p for p in fields]
    texts.append(tuple(words) if len(words) > 1 else words[0])
  return TextSet(tuple(texts), labels, classes, f'glue/{task}', version)


# --- Docstrings --------------------------------------------------------------


def docstrings(
  packages: Sequence[str] = ('python', 'numpy', 'scipy', 'sklearn'),
) -> tuple[TextSet, TextSet]:
  """Returns sentences of installed documentation, labelled by their package.

  The sentences are those of the docstrings of modules, classes and functions,
  5 to 40 words long, outside of lists and examples. The names of the packages
  are masked. One module in five, chosen by the hash of its name, is in the
  test; a sentence found in two packages or in both splits is left out.
  The sources are parsed, not imported: some 10 seconds for the four packages.

  Args:
    packages: ``'python'`` for the standard library, and names of installed
      packages; their places are the labels.

  Returns:
    (train, test): of the same classes; ``version`` names that of each package.

  Raises:
    DataError: if a package is not installed, or has no sentence.
  """
  names = re.compile(
    r'\b(' + '|'.join((*packages, *_aliases(packages))) + r')\b(\.\w+)*',
    re.IGNORECASE,
  )
  places: dict[str, set[tuple[int, bool]]] = {}  # Of each sentence.
  for label, package in enumerate(packages):
    for module, docstring in _docstrings(package):
      name = f'{package}/{module}'
      test = hashlib.sha256(name.encode()).digest()[0] % 5 == 0
      for sentence in _sentences(docstring):
        masked = names.sub('[MASK]', sentence)
        places.setdefault(masked, set()).add((label, test))
  version = ', '.join(f'{p} {_version(p)}' for p in packages)
  splits = []
  for test in (False, True):
    pairs = [
      (sentence, label)
      for sentence, where in places.items()
      for label, in_test in where
      if len(where) == 1 and in_test is test
    ]
    texts = tuple(sentence for sentence, _ in pairs)
    labels = np.array([label for _, label in pairs], np.int32)
    missing = [
      p for i, p in enumerate(packages) if not np.any(labels == i)
    ]  # fmt: skip
    if missing:
      raise data.DataError(
        f'No sentence of {", ".join(missing)} is in the '
        f'{"test" if test else "train"} split.'
      )
    splits.append(
      TextSet(texts, labels, tuple(packages), 'docstrings', version)
    )
  return splits[0], splits[1]


def _aliases(packages: Iterable[str]) -> list[str]:
  """Returns other names that give a package away."""
  aliases = {
    'python': ['cpython', 'pep'],
    'numpy': ['np', 'ndarrays?', 'ufuncs?'],
    'scipy': ['sp'],
    'sklearn': ['scikit-learn', 'scikit', 'estimators?'],
  }
  return [alias for package in packages for alias in aliases.get(package, [])]


def _version(package: str) -> str:
  if package == 'python':
    return platform.python_version()
  name = _DISTRIBUTIONS.get(package, package)
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return 'unknown'


def _docstrings(package: str) -> Iterator[tuple[str, str]]:
  """Yields (module, docstring) of the sources of a package, tests left out."""
  if package == 'python':
    root = pathlib.Path(sysconfig.get_path('stdlib'))
  else:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
      raise data.DataError(
        f'The docstrings of {package!r} are needed, but it is not installed.'
      )
    root = pathlib.Path(spec.origin).parent
  skip = re.compile(r'tests?|site-packages|idlelib|turtledemo|test_.*|_test.*')
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
  for file in sorted(root.rglob('*.py')):
    folders = file.relative_to(root).with_suffix('').parts
    if any(map(skip.fullmatch, folders)):
      continue
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Of escapes in the sources of others.
      try:
        tree = ast.parse(file.read_text('utf-8'))
      except (SyntaxError, UnicodeDecodeError):
        continue  # Templates and data that only look like sources.
    for node in ast.walk(tree):
      if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
        yield '/'.join(folders), docstring


def _sentences(docstring: str) -> list[str]:
  """Returns the sentences of the running text of a docstring.

  Running text is a paragraph without an indented line, a prompt, a line of
  markup or an underline.
  """
  sentences = []
  for paragraph in re.split(r'\n\s*\n', docstring):
    if re.search(
      r'^(\s|>>>|\.\.|[-*=+|:]|\w+ : )|::$', paragraph, re.MULTILINE
    ):
      continue
    text = re.sub(r'`+', '', ' '.join(paragraph.split()))
    for sentence in re.split(r'(?<=[.!?])\s+(?=[A-Z])', text):
      if (
        5 <= len(sentence.split()) <= 40
        and re.match(r'[A-Z]', sentence)
        and sentence.endswith(('.', '!', '?'))
      ):
        sentences.append(sentence)
  return sentences


# --- Baselines ---------------------------------------------------------------


def majority(train: TextSet, test: TextSet) -> float:
  """Returns the test accuracy of always naming the class most common in train.

  Args:
    train: decides the class.
    test: is named.
  """
  counts = np.bincount(train.labels, minlength=len(train.classes))
  return float(np.mean(test.labels == np.argmax(counts)))


def bag_of_words(train: TextSet, test: TextSet) -> float:
  """Returns the test accuracy of multinomial naive Bayes on words.

  argmax_c log P(c) + sum_w n_w log P(w | c), with P(w | c) estimated with one
  added to every count; words that train does not have are passed over.

  Args:
    train: gives the counts.
    test: is named.
  """
  classes = len(train.classes)
  counts: dict[str, np.ndarray] = collections.defaultdict(
    lambda: np.ones(classes)
  )
  for text, label in zip(train.texts, train.labels, strict=True):
    for word in _words(text):
      counts[word][label] += 1
  total = np.log(sum(counts.values(), np.zeros(classes)))
  logs = {word: np.log(count) - total for word, count in counts.items()}
  prior = np.log(np.maximum(np.bincount(train.labels, minlength=classes), 1e-9))
  hits = 0
  for text, label in zip(test.texts, test.labels, strict=True):
    known_logs = (logs[word] for word in _words(text) if word in logs)
    hits += int(np.argmax(sum(known_logs, prior)) == label)
  return hits / len(test)


def _words(text: Text) -> list[str]:
  """Returns the words of a text and its punctuation, in lower case."""
  joined = text if isinstance(text, str) else ' '.join(text)
  return re.findall(r'\w+|[^\w\s]', joined.lower().replace('[mask]', ' '))


# --- Tokens ------------------------------------------------------------------


def word_pieces(texts: Iterable[Text], size: int = 8000) -> dict[str, int]:
  """Returns a WordPiece vocabulary, the same for the same texts.

  The five special tokens, every character as a beginning and as a
  continuation (``##x``), and then the commonest words, and ends of words that
  did not make it, by count and then by the alphabet: three words to one end.
  (The trainer of ``tokenizers`` gives another vocabulary on every run.)

  Args:
    texts: to count the words of.
    size: of the vocabulary, if the texts have that many pieces.

  Returns:
    piece -> number.

  Raises:
    ValueError: if ``size`` is below what the characters need.
  """
  words = collections.Counter(itertools.chain.from_iterable(map(_words, texts)))
  characters = sorted(set(itertools.chain.from_iterable(words)))
  pieces = [*_SPECIAL, *characters, *(f'##{c}' for c in characters)]
  if size < len(pieces):
    raise ValueError(
      f'`size` must be at least {len(pieces)}, for the special tokens and the '
      f'characters, got {size}.'
    )
  by_count = lambda c: sorted(c, key=lambda piece: (-c[piece], piece))
  room = size - len(pieces)
  common = [w for w in by_count(words) if len(w) > 1][: math.ceil(room * 3 / 4)]
  ends: collections.Counter[str] = collections.Counter()
  for word in sorted(set(words) - set(common)):
    for i in range(1, len(word) - 1):
      ends[f'##{word[i:]}'] += words[word]
  pieces += [*common, *by_count(ends)[: room - len(common)]]
  return {piece: number for number, piece in enumerate(pieces)}


def encode(
  texts: Sequence[Text],
  vocabulary: Mapping[str, int] | str | os.PathLike,
  length: int = 128,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns texts as WordPiece tokens, lower case, as BERT reads them.

  [CLS] a [SEP], or [CLS] a [SEP] b [SEP] for a pair, cut and padded to one
  length.

  Args:
    texts: sentences or pairs.
    vocabulary: piece -> number, or the path of a ``vocab.txt``.
    length: of every row, at least 3.

  Returns:
    (tokens, mask, types): int32, bool (True = no padding) and int32 (1 in the
    second sentence of a pair), [n, length].

  Raises:
    MissingExtraError: if tokenizers is not installed.
    FileNotFoundError: if there is no such file.
    ValueError: if ``length`` is below 3, or if a special token is missing.
  """
  if length < 3:
    raise ValueError(f'`length` must be at least 3, got {length}.')
  if not isinstance(vocabulary, Mapping):
    lines = pathlib.Path(vocabulary).read_text('utf-8').splitlines()
    vocabulary = {piece: number for number, piece in enumerate(lines)}
  missing = [token for token in _SPECIAL if token not in vocabulary]
  if missing:
    raise ValueError(f'The vocabulary has no {", ".join(missing)}.')
  tokenizers = extras.require('tokenizers')
  tokenizer = tokenizers.BertWordPieceTokenizer(
    vocab=dict(vocabulary), lowercase=True
  )
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=vocabulary['[PAD]'])
  rows = tokenizer.encode_batch(list(texts))
  take = functools.partial(np.array, dtype=np.int32)
  tokens = take([row.ids for row in rows]).reshape(-1, length)
  mask = take([row.attention_mask for row in rows]).reshape(-1, length)
  types = take([row.type_ids for row in rows]).reshape(-1, length)
  return tokens, mask.astype(bool), types
