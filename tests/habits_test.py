"""What every change passes is written once, or alike wherever it is written."""

import pathlib
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import jaxprune

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
HOOKS = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
JOBS = yaml.safe_load((ROOT / '.github/workflows/tests.yml').read_text())[
  'jobs'
]
CI = (ROOT / '.ci' / 'run').read_text()


def commands(job):
  """Returns the commands of a job of the workflow, a line each."""
  steps = JOBS[job]['steps']
  return [line for s in steps for line in s.get('run', '').splitlines()]


def test_the_hooks_fetch_nothing_that_the_test_extra_does_not_bring():
  brought = {
    Requirement(line).name for line in PROJECT['optional-dependencies']['test']
  }
  assert 'pre-commit' in brought
  hooks = [hook for repo in HOOKS for hook in repo['hooks']]
  assert [repo['repo'] for repo in HOOKS] == ['local']
  for hook in hooks:
    assert hook['language'] in ('system', 'pygrep')
    if hook['language'] == 'system':
      assert hook['entry'].split()[0] in brought


def test_the_marks_of_a_conflict_are_seen():
  (pattern,) = [
    hook['entry'] for hook in HOOKS[0]['hooks'] if hook['language'] == 'pygrep'
  ]
  for line in ('<' * 7 + ' HEAD', '=' * 7, '>' * 7 + ' branch', '|' * 7):
    assert re.search(pattern, line)
  for line in ('== 7', '=' * 8, '<<<', '    ' + '=' * 7, '------- | -------'):
    assert not re.search(pattern, line)


def test_the_workflow_runs_the_command_of_the_readme():
  blocks = re.findall(
    r'^```bash\n(.*?)^```$', (ROOT / 'README.md').read_text(), re.M | re.S
  )
  assert commands('quick') == blocks[1].splitlines()
  versions = JOBS['quick']['strategy']['matrix']['python']
  supported = SpecifierSet(PROJECT['requires-python'])
  assert all(version in supported for version in versions)
  assert f'>={versions[0]}' == PROJECT['requires-python']


@pytest.mark.parametrize('name', ['ruff check', 'ruff format', 'pyright'])
def test_the_workflow_lints_as_the_ci_does(name):
  (line,) = [line for line in CI.splitlines() if f'/{name}' in line]
  assert line in commands('lint')


def test_the_floors_are_installed_and_tried():
  for line in PROJECT['dependencies']:
    # Whole versions: a pinned 2.0 would be taken for the newest of 2.0.0.
    assert re.fullmatch(r'[\w-]+>=\d+\.\d+\.\d+', line), line
  assert '.ci/core' in CI
  assert any('.ci/core' in line for line in commands('core'))


def test_the_newest_version_of_the_changelog_is_that_of_the_package():
  text = (ROOT / 'jaxprune' / 'CHANGELOG.md').read_text()
  top, *dated = re.findall(r'^## (.*)$', text, re.M)
  assert top == 'Unreleased'
  assert all(re.fullmatch(r'[\d.]+ - \d{4}-\d\d-\d\d', line) for line in dated)
  version = dated[0].split(' - ')[0]
  assert version == jaxprune.__version__ == PROJECT['version']
