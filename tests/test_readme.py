"""Every papermill and medfusion command of README.md, run at smoke size in a copy of the clone."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medfusion.phantom import write_phantom
from medfusion.runs import notebook_parameters

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
SHELL = re.findall(r'```sh\n(.*?)```', TEXT, re.DOTALL)
COMMANDS = [line.split('  #')[0].strip() for block in SHELL for line in block.splitlines()
            if line.startswith(('papermill ', 'medfusion '))]
# What makes a command small; the folders of the commands exist in the workplace.
SMOKE = {'papermill': ['-p', 'num_epochs', '1', '-p', 'crop', '48'],
         'medfusion train': ['-p', 'epochs=1'],
         'medfusion train wavelet -f': ['-p', 'crop=48']}


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    "A copy of the clone with slices of a small phantom in the folders that the README names."
    copy = tmp_path_factory.mktemp('clone')
    for part in ('nbs', 'params', 'checkpoints/final'):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copy(ROOT / 'settings.ini', copy)
    phantom = write_phantom(copy / 'phantom', cases=6, slices=2, size=64)
    for kind in ('CT', 'MRI'):
        for folder in (copy / kind.lower(), copy / 'my_slices' / kind, copy / 'Dataset/CT-MRI' / kind):
            folder.mkdir(parents=True)
            for path in phantom.glob(f'*/{kind}/*.png'):
                shutil.copy(path, folder)
    return copy


def run(command, workplace, extra=()):
    "The finished process of a command, with the programs of this environment, under IN_TEST."
    program, *arguments = shlex.split(command)
    environment = os.environ | {'IN_TEST': '1', 'OMP_NUM_THREADS': '1'}
    return subprocess.run([Path(sys.executable).with_name(program), *arguments, *extra], cwd=workplace, env=environment,
                          capture_output=True, text=True)


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8 and any(command.startswith('medfusion fuse') for command in COMMANDS)


@pytest.mark.parametrize('command', [command for command in COMMANDS if command != 'medfusion data harvard'])
def test_command(command, workplace):
    if command.startswith('medfusion data import'):
        shutil.rmtree(workplace / 'Dataset')  # it refuses a folder that is not empty
    if 'Dataset/CT-MRI' in command and not (workplace / 'Dataset/CT-MRI').exists():
        shutil.copytree(workplace / 'my_slices', workplace / 'Dataset/CT-MRI')
    extra = [text for start, more in SMOKE.items() if command.startswith(start) for text in more]
    done = run(command, workplace, extra)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_the_download_fails_with_a_sentence_where_there_is_no_server(workplace):
    "The one command that needs a network; the downloads themselves are tested in test_data.py."
    assert 'medfusion data harvard' in COMMANDS
    target = workplace / 'harvard'
    done = run('medfusion data harvard', workplace,
               [target, '--base-url', 'http://127.0.0.1:9', '--cache', workplace / 'cache'])
    assert done.returncode != 0 and '127.0.0.1' in done.stderr and 'Traceback' not in done.stderr
    assert not target.exists()


def test_the_three_lines_of_python(workplace):
    code, = [block for block in re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL) if 'fuse(' in block]
    for kind in ('ct', 'mri'):
        shutil.copy(next((workplace / kind).iterdir()), workplace / f'{kind}.png')
    done = subprocess.run([sys.executable, '-c', code + '\nprint(fused.dtype, fused.shape)'], cwd=workplace,
                          capture_output=True, text=True)
    assert done.stdout.strip() == 'uint8 (64, 64)', done.stderr


@pytest.mark.parametrize('link', sorted(set(re.findall(r'\]\(([^)#]+)\)', TEXT)) - {'https://nbdev.fast.ai'}))
def test_link_leads_somewhere(link):
    assert link.startswith('http') or (ROOT / link).exists()


@pytest.mark.parametrize('notebook', ['trainable-wavelet-fusion.ipynb', 'resnet_based_fusion.ipynb'])
def test_every_parameter_is_explained(notebook):
    for parameter in notebook_parameters(notebook).values():
        assert f'| `{parameter.name}` | `{parameter.default!r}` | {parameter.comment} |' in TEXT
