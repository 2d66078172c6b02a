"""Settings: one field each, from which flags, help and refusals are made."""

import dataclasses

import pytest

from experiments import settings
from experiments.settings import at_least, in_range, preset, setting


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of every kind."""

  model: str = setting('mlp', 'The network.', choices=('mlp', 'lenet5'))
  rate: float = setting(None, 'Without it, that of the model.')
  macs: float = setting(0.4, 'Part that is kept.', fits=in_range('(0, 1]'))
  steps: int = setting(600, 'Of it.', fits=at_least(1), smoke=6)
  sides: tuple[int, ...] = setting((), 'Of images.', smoke=(6, 8))
  arms: tuple[str, ...] = setting(
    ('a', 'b'), 'Which.', choices=('a', 'b'), decides=False
  )
  tiny: bool = setting(True, 'Whether it is.')
  seeds: int = setting(2, 'How many.', decides=False)
  seed: int = setting(0, 'The first.', flag='first_seed')
  workdir: str = setting(None, 'The folder.', decides=False)
  preset: str = preset('smoke: in a moment.')


def parse(*argv):
  usual = {'mlp': 0.1, 'lenet5': 0.2}
  return settings.parse(Config, argv, lambda x: {'rate': usual[x['model']]})


def test_a_flag_wins_over_a_preset_and_that_over_the_default():
  assert parse() == Config(rate=0.1)
  smoke = parse('--preset=smoke')
  assert (smoke.steps, smoke.sides, smoke.macs) == (6, (6, 8), 0.4)
  given = parse('--preset=smoke', '--steps=600', '--sides=5', '--notiny')
  assert (given.steps, given.sides, given.tiny) == (600, (5,), False)
  assert parse('--model=lenet5').rate == 0.2
  assert parse('--model=lenet5', '--rate=3').rate == 3.0


def test_a_flag_file_is_read(tmp_path):
  file = tmp_path / 'my.flags'
  file.write_text('--steps=7\n# A comment.\n--first_seed=4\n--arms=b\n')
  found = parse(f'--flagfile={file}', '--steps=8')
  assert (found.steps, found.seed, found.arms) == (8, 4, ('b',))


@pytest.mark.parametrize(
  ('flag', 'text'),
  [
    ('--macs=0', r'--macs must be in \(0, 1\], got 0.0\.'),
    ('--macs=nan', r'--macs must be in \(0, 1\], got nan\.'),
    ('--steps=0', r'--steps must be at least 1, got 0\.'),
    ('--sides=4,big', r"--sides must be ints, got \['4', 'big'\]\."),
    ('--arms=a,c', r'--arms must be of a,b, got a,c\.'),
    ('--arms=', r'--arms must be of a,b, got \.'),
    ('--seed=1', r"Unknown command line flag 'seed'.*See --help\."),
    ('steps=1', r"'steps=1' is no flag; write --name=value\."),
  ],
)
def test_a_wrong_setting_is_named_with_what_was_needed(flag, text):
  with pytest.raises(settings.BadInputError, match=text):
    parse(flag)


def test_help_gives_every_flag_its_default_and_its_preset():
  text = settings.usage(Config)
  assert '--model=<mlp|lenet5>\n      The network. (default: mlp)' in text
  assert '--steps=<int>\n      Of it. (default: 600; smoke: 6)' in text
  assert '--arms=<list>\n      Which. (default: a,b)' in text
  assert '--first_seed=<int>\n      The first. (default: 0)' in text


def test_a_run_folder_is_made_of_the_settings_that_decide():
  folder = lambda *argv: settings.in_folder(parse(*argv), 'toy', 'x:1').workdir
  assert folder().startswith('runs/toy-x-1-')
  assert folder() == folder('--arms=a') == folder('--seeds=3')
  assert folder() != folder('--first_seed=1')
  assert folder('--workdir=here') == 'here'
  asked = settings.deciding(parse('--sides=5,6'))
  assert (asked['sides'], asked['first_seed']) == ([5, 6], 0)
  assert not {'arms', 'seeds', 'workdir', 'preset', 'seed'} & asked.keys()


def test_every_seed_has_settings_of_its_own():
  found = settings.by_seed(parse('--first_seed=3'))
  assert [config.seed for config in found] == [3, 4]
