"""The `medfusion` command: exit codes, sentences on standard error, and what is on the disk afterwards."""
import errno
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import begin_child
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image
from typer.testing import CliRunner

from medfusion import cli, inference
from medfusion.cli import app
from medfusion.evaluation import GrowingTable
from medfusion.files import list_pairs, read_image, to_depth, write_image
from medfusion.phantom import phantom_slice
from medfusion.runs import make_folder, nbs_dir, open_parts, write_run


def medfusion(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_sentence(result, *words, code=1):
    "A failure is an exit code and one line on standard error, not a traceback."
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('medfusion: '), result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def shell(*arguments, module='medfusion', **options):
    "The command in a process of its own."
    return subprocess.run([sys.executable, '-W', 'ignore', '-m', module, *map(str, arguments)], capture_output=True, text=True, **options)


@pytest.fixture(scope='module')
def three_pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp('pairs')
    for folder in ('CT', 'MRI'):
        (root / folder).mkdir()
    for i in range(3):
        head = phantom_slice('7', i + 2, size=64)
        write_image(root / 'CT' / head.name, to_depth(head.ct, np.uint8))
        write_image(root / 'MRI' / head.name, to_depth(head.mri, np.uint8))
    return root


def test_an_order_that_names_contradict(three_pairs, tmp_path):
    "Folders, files and patterns by whose names the MRI comes first are refused; names that tell nothing, or not both, are taken as they come."
    ct, mri = three_pairs / 'CT', three_pairs / 'MRI'
    one = next(mri.iterdir()).name
    shutil.copyfile(ct / one, tmp_path / '1_CT.png'), shutil.copyfile(mri / one, tmp_path / '1_T1.png')
    out, patterns = tmp_path / 'out', [tmp_path / f'{{name}}_{kind}.png' for kind in ('T1', 'CT')]
    for first, second, target in ((mri, ct, out), (tmp_path / '1_T1.png', tmp_path / '1_CT.png', tmp_path / 'out.png'), (*patterns, out)):
        assert_sentence(medfusion('fuse', first, second, '-m', 'maximum', '-o', target), 'The order is CT, then MRI', 'swap them')
    for slash in ('', '/'):         # as text in Python, where a slash stays
        with pytest.raises(ValueError, match='by their names MRI is an MRI and CT a CT'):
            list_pairs(f'{mri}{slash}', f'{ct}{slash}')
        assert not target.exists()
    shutil.copytree(mri, tmp_path / 'first')
    assert medfusion('fuse', tmp_path / 'first', ct, '-m', 'maximum', '-o', out).exit_code == 0


@pytest.fixture
def pairs(three_pairs, tmp_path, monkeypatch):
    "The current folder holds CT/ and MRI/ with three pairs; their names."
    shutil.copytree(three_pairs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return sorted(path.name for path in Path('CT').iterdir())


# The command as a whole

def test_help_answers_without_torch():
    code = 'import sys; from medfusion.cli import app; sys.exit("torch" in sys.modules or "pandas" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
    for command in ([], ['data'], ['data', 'phantom'], ['fuse'], ['evaluate'], ['train'], ['benchmark'], ['models']):
        result = medfusion(*command, '--help')
        assert result.exit_code == 0 and 'Usage' in result.stdout


def test_wrong_command_lines_exit_with_2():
    for arguments in (['fuse', 'a'], ['nothing'], ['train', 'magic'], ['data', 'phantom', '--size', '3'], ['data', 'phantom', '--size', '10000000'],
                      ['data', 'phantom', '--seed', '-1'], ['evaluate', 'a', 'b', 'c', '--preset', 'x'], ['fuse', 'a', 'b', '-o', ''],
                      ['fuse', '', 'b', '-o', 'x'], ['data', 'check', ''], ['fuse', 'a', 'b', '-o', 'x', '--batch-size', '0'],
                      ['evaluate', 'a', 'b', 'c', '--csv', ' ']):
        assert medfusion(*arguments).exit_code == 2, arguments


@pytest.mark.parametrize('module', ['medfusion', 'medfusion.cli'])
def test_the_package_is_the_command(module, tmp_path):
    done = shell('--version', module=module, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith('medfusion 0.') and not done.stderr
    done = shell('train', 'wavelet', '-f', '', module=module, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and 'empty path' in done.stderr and 'Traceback' not in done.stderr


def test_debug_shows_the_traceback(pairs):
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'CT', '--debug')
    assert result.exit_code == 1 and 'Traceback' in result.stderr and result.stderr.splitlines()[-1].startswith('medfusion: ')


def test_what_was_not_foreseen_is_a_sentence_too(pairs, monkeypatch):
    def fail(*_, **__):
        raise KeyError('depth')
    monkeypatch.setattr('medfusion.inference.fuse_folder', fail)
    assert_sentence(medfusion('fuse', 'CT', 'MRI', '-o', 'out'), "KeyError: 'depth'", '--debug')


def test_a_busy_machine_may_take_minutes_to_begin_a_kernel(tmp_path, monkeypatch):
    "A kernel that dies is noticed at once, however long one is waited for."
    told = {}
    monkeypatch.setattr('papermill.execute_notebook', lambda *_, **given: told.update(given))
    cli.execute('scan_fusion.ipynb', cli.ExecutedNotebook(tmp_path / 'executed.ipynb'), {})
    assert told['start_timeout'] >= 600


def test_a_console_that_cannot_print_a_character(pairs):
    "It loses the character, not the exit status."
    done = shell('fuse', 'CT', '5×7.png', '-o', 'out', env=os.environ | {'PYTHONIOENCODING': 'iso8859_5', 'PYTHONUTF8': '0'})
    assert done.returncode == 1 and done.stderr == f'medfusion: There is no file or folder {Path.cwd()}/5?7.png; check the path.\n'


def test_shards_of_folders(pairs):
    for k in (1, 2, 3):
        assert medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum', '--shard', f'{k}/3').exit_code == 0
    assert sorted(path.name for path in Path('out').glob('*.png')) == pairs
    assert_sentence(medfusion('fuse', 'CT', 'MRI', '-o', 'new', '--shard', '4/3'), "'4/3' is no shard", '3/16')
    assert_sentence(medfusion('fuse', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', '-o', 'a.png', '--shard', '1/3'), '--shard 1/3', 'is a file')


@pytest.mark.fault('fuse', 'stopped (Ctrl-C, SIGTERM)')
@pytest.mark.parametrize('stop, code', [(signal.SIGTERM, 143)])     # Ctrl-C takes the same way
def test_stopped_while_fusing(pairs, stop, code):
    "One sentence, what was fused is kept, and the command that it names goes on."
    for i in range(9):
        for side in ('CT', 'MRI'):
            shutil.copy(Path(side, pairs[0]), Path(side, f'8{i:03d}.png'))
    def slowly(real=inference.write_atomically, pool=inference.ThreadPoolExecutor):
        class Pool(pool):
            def shutdown(self, *given, cancel_futures=False, **more):
                if cancel_futures:
                    super().shutdown(wait=False, cancel_futures=True)
                    Path('go').touch()
                super().shutdown(*given, **more)

        def write(path, data, first=threading.Lock()):
            while not (first.acquire(blocking=False) or Path('go').exists()):   # all but the first wait for the stop
                time.sleep(0.01)
            return real(path, data)
        inference.write_atomically, inference.ThreadPoolExecutor = write, Pool
        with open('said', 'w') as sys.stderr:
            app(['fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum', '--replace'], prog_name='medfusion')
    child = begin_child(slowly)
    while not list(Path().glob('out/*.png')):
        time.sleep(0.01)
    os.kill(child, stop)
    status, said = os.waitpid(child, 0)[1], Path('said').read_text()
    assert os.waitstatus_to_exitcode(status) == code and said.count('\n') == 1, said
    assert said.rstrip().endswith('medfusion fuse CT MRI -o out -m maximum') and 'kept in out' in said
    assert '(files there that medfusion did not make are refused; --replace fuses all again)' in said     # for --replace was typed
    there = len(list(Path('out').glob('*.png')))
    result = medfusion(*said.rstrip().rpartition('medfusion ')[2].split())
    assert 0 < there < 12 and result.exit_code == 0 and f'{12 - there} fused, {there} already there' in result.stdout


# Data

def test_data_phantom_and_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = medfusion('data', 'phantom', '--cases', 6, '--slices', 2, '--size', 64)
    assert result.exit_code == 0, result.output
    assert len(list(Path('Dataset').glob('*/CT/*.png'))) == 12
    assert medfusion('data', 'check').exit_code == 0
    assert_sentence(medfusion('data', 'phantom', '--size', 64), 'not empty', '--replace')
    assert medfusion('data', 'phantom', '--cases', 6, '--slices', 1, '--size', 64, '--replace').exit_code == 0
    assert len(list(Path('Dataset').glob('*/CT/*.png'))) == 6
    next(Path('Dataset').glob('train/CT/*.png')).unlink()
    changed = medfusion('data', 'check')
    assert changed.exit_code == 1 and 'Traceback' not in changed.stderr


def test_what_no_data_set_can_be_made_from(tmp_path, monkeypatch):
    "The sentence names what was typed, not a temporary folder, and advises no second try of what cannot work."
    monkeypatch.chdir(tmp_path)
    result = medfusion('data', 'phantom', '/proc/x', '--cases', 3, '--slices', 1, '--size', 64)
    assert_sentence(result, 'Cannot fill the data set', '/proc/x')
    assert '.tmp' not in result.stderr
    assert_sentence(medfusion('data', 'harvard', '--base-url', 'nonsense'), "'nonsense' is no address", 'https://')
    assert not list(tmp_path.iterdir())


def test_a_split_is_audited(tmp_path):
    (tmp_path / 'train.txt').write_text('34010.png\n2001.png\n')
    (tmp_path / 'test.json').write_text('["34011.png", "41001.png"]')
    audit = ['data', 'check', '--train', tmp_path / 'train.txt', '--test', tmp_path / 'test.json']
    leak = medfusion(*audit)
    assert leak.exit_code == 1 and '1 of 2 test slices are of a case' in leak.stdout
    assert medfusion(*audit, '--case-pattern', '(?P<slice>[0-9]{3})(?P<case>[0-9]+)').exit_code == 0
    assert_sentence(medfusion(*audit, '--case-pattern', '('), 'is no rule')
    assert medfusion(*audit[:4]).exit_code == 2


def write_flat(folder, sizes):
    "Grey slices of these names and sizes, in CT and in MRI."
    for kind in ('CT', 'MRI'):
        (folder / kind).mkdir(parents=True)
        for name, size in sizes.items():
            write_image(folder / kind / name, np.full((size, size), 90, np.uint8))


def test_names_that_do_not_tell_the_cases(tmp_path, monkeypatch):
    "What then is refused is not proposed, nor what only Python takes."
    monkeypatch.chdir(tmp_path)
    write_flat(tmp_path / 'flat', {f'ann-{number}.png': 20 for number in range(4)})
    for result in (medfusion('data', 'check', 'flat'), medfusion('data', 'import', 'flat', 'mine')):
        assert result.exit_code == 1 and 'cannot be told from its name; name slices by case and three digits (34010.png).' in result.output
        assert 'case_of' not in result.output and 'medfusion train' not in result.output and 'data import' not in result.output


def test_what_is_said_of_own_slices_goes_with_their_range_and_their_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ('CT', 'MRI'):
        for case in '123':
            write_image(make_folder(tmp_path / 'flat' / kind) / f'{case}001.png', np.full((20, 20), 4095, np.uint16))
    told = medfusion('data', 'import', 'flat', 'a', '--range', '0,4095').stdout
    assert 'no problems' in told and '16 bit grey' in told and told.splitlines()[-1] == 'train on it: medfusion train wavelet -p ct_dir=a/train/CT -p mri_dir=a/train/MRI --range 0,4095'
    assert 'problem: ' in medfusion('data', 'check', 'a').stdout and 'no problems' in medfusion('data', 'check', 'a', '--range', '0,4095').stdout
    flat = medfusion('data', 'check', 'flat', '--range', '0,4095')
    assert flat.exit_code == 0 and flat.stdout.count('test_cases=3 --range 0,4095') == flat.stdout.count('--test-cases 3 --range 0,4095') == 1
    assert 'train on it' not in medfusion('data', 'import', 'flat', 'b', '--val', '0').stdout, 'training wants cases to validate on'


def test_data_import(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ('CT', 'MRI'):
        Path('source', folder).mkdir(parents=True)
        for case in range(1, 5):
            write_image(Path('source', folder, f'{case}001.png'), np.full((20, 20), 50 + 10 * case, np.uint8))
    result = medfusion('data', 'import', 'source', 'mine')
    assert result.exit_code == 0, result.output
    assert [len(list(Path('mine').glob(f'{part}/CT/*.png'))) for part in ('train', 'val', 'test')] == [2, 1, 1]
    assert_sentence(medfusion('data', 'import', 'nowhere', 'other'), 'nowhere')
    assert not Path('other').exists()
    for root in ('source', 'source/CT', './source/../source'):
        assert_sentence(medfusion('data', 'import', 'source', root, '--replace'), 'is what is read')
    assert len(list(Path('source').glob('*/*.png'))) == 8
    named = ('data', 'import', 'source', 'named', '--val-cases', '3', '--test-cases', '4')
    for part, number in (('val', 7), ('test', 0), ('test', 2)):
        refused = medfusion(*named, f'--{part}', number)
        assert refused.exit_code == 2 and f'--{part} {number} does not go with --val-cases and --test-cases' in ' '.join(refused.stderr.split())
    assert not Path('named').exists() and medfusion(*named, '--val', 1).exit_code == 0
    for path in Path('source').glob('*/[34]001.png'):
        path.unlink()
    assert_sentence(medfusion('data', 'import', 'source', 'few'), '2 cases of', 'source cannot give', 'ask for fewer (--val 0, --test 0), or add patients')
    assert medfusion('data', 'import', 'source', 'few', '--val', 0).exit_code == 0


def test_what_can_be_imported_can_be_checked(tmp_path, monkeypatch):
    "Folders in small letters were not found, and of names that tell their kind the audit of a split knew no case."
    monkeypatch.chdir(tmp_path)
    write_flat(tmp_path / 'small', {f'{case}001.png': 20 for case in (1, 2, 3)})
    for kind in ('CT', 'MRI'):
        os.rename(tmp_path / 'small' / kind, tmp_path / 'small' / kind.lower())
    told = medfusion('data', 'check', 'small')
    assert told.exit_code == 0 and 'all: 3 CT and 3 MRI slices of cases 1, 2, 3' in told.stdout and '-p ct_dir=small/ct -p mri_dir=small/mri' in told.stdout
    for kind in ('ct', 'mri'):
        for path in list((tmp_path / 'small' / kind).iterdir()):
            path.rename(path.with_name(f'{path.stem}_{kind}.png'))
    assert medfusion('data', 'check', 'small').exit_code == 0
    leak = medfusion('data', 'check', '--train', 'small', '--test', 'small')
    assert leak.exit_code == 1 and '3 of 3 test slices are of a case that is in training too (case 1, 2, 3)' in leak.stdout


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    "Of a pair in a folder nothing but 'Permission denied' was told, and not of which of its files."
    monkeypatch.chdir(tmp_path)
    write_flat(tmp_path / 'own', {f'{case}001.png': 20 for case in (1, 2, 3)})
    (tmp_path / 'own/CT/2001.png').chmod(0)
    real = Path.read_bytes

    def refuse(path):      # root may read all
        if path.parts[-2:] == ('CT', '2001.png'):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)
    monkeypatch.setattr(Path, 'read_bytes', refuse)
    sentence = f'{tmp_path}/own/CT/2001.png cannot be read (Permission denied); change who may read it, or copy it again'
    fused = medfusion('fuse', 'own/CT', 'own/MRI', '-o', 'out', '-m', 'maximum')
    assert fused.exit_code == 1 and f'2001.png: {sentence}\n' in fused.output
    checked = medfusion('data', 'check', 'own')
    assert checked.exit_code == 1 and f'problem: {sentence}\n' in checked.output
    assert_sentence(medfusion('data', 'import', 'own', 'mine'), sentence)
    assert not (tmp_path / 'mine').exists()


def test_cases_with_blanks_in_their_names_can_be_named(tmp_path, monkeypatch):
    "As the check of a flat folder proposes."
    monkeypatch.chdir(tmp_path)
    write_flat(Path('my slices'), {f'Müller {case} – {number:03d}.png': 50 * case + number for case in (1, 2, 3) for number in (1, 2)})
    told = medfusion('data', 'check', 'my slices').stdout
    command = shlex.split(told.split('parts: medfusion ')[1])
    assert medfusion(*command).exit_code == 0 and json.loads(Path('Dataset/split_info.json').read_text())['cases']['val'] == ['Müller 2 – ']
    words = dict(word.split('=', 1) for word in shlex.split(told.split('(medfusion train wavelet ')[1].split('), and')[0]) if word != '-p')
    places = {name: str(Path(words.get(name) or '').absolute()) if words.get(name) else '' for name in
              ('ct_dir', 'mri_dir', 'ct_val_dir', 'mri_val_dir', 'ct_test_dir', 'mri_test_dir')}
    train, val, test = open_parts(SimpleNamespace(seed=0, **(words | places)))
    assert (train.cases, val.cases, test.cases) == (['Müller 1 – '], ['Müller 2 – '], ['Müller 3 – '])


def test_sides_may_be_named_and_empty_and_folders_in_small_letters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_flat(Path('source'), {f'{case}001.png': 64 for case in range(1, 5)})
    assert_sentence(medfusion('data', 'import', 'source', 'mine', '--val-cases', '3'), 'left to test on', '--test-cases', '--test 0')
    assert_sentence(medfusion('data', 'import', 'source', 'mine', '--test-cases', '1,2,3,4'), 'left to train on', '--val-cases')
    assert_sentence(medfusion('data', 'import', 'source', 'mine', '--test-cases', '7'), '--val-cases or --test-cases name case 7')
    assert medfusion('data', 'import', 'source', 'mine', '--val-cases', '3', '--test', '0').exit_code == 0
    assert [len(list(Path('mine').glob(f'{part}/CT/*.png'))) for part in ('train', 'val', 'test')] == [3, 1, 0]
    for kind in ('CT', 'MRI'):
        Path('source', kind).rename(f'source/{kind.lower()}')
    result = medfusion('data', 'import', 'source', 'other')
    assert result.exit_code == 0 and sorted(path.name for path in Path('other/train').iterdir()) == ['CT', 'MRI']
    assert_sentence(medfusion('data', 'import', 'source', 'source/ct', '--replace'), 'is what is read')


def test_a_data_set_beside_the_clone_is_trained_on_as_it_is_told(tmp_path, monkeypatch):
    "The command that is printed names its folders, and training without them says what is there."
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = medfusion\nnbs_path = nbs\n')
    shutil.copy(nbs_dir() / 'trainable-wavelet-fusion.ipynb', tmp_path / 'nbs')
    (tmp_path / 'a b').mkdir()
    monkeypatch.chdir(tmp_path / 'a b')
    write_flat(Path('source'), {f'{case}001.png': 64 for case in range(1, 5)})
    folders = '-p ct_dir=Dataset/train/CT -p mri_dir=Dataset/train/MRI'
    assert medfusion('data', 'import', 'source').stdout.splitlines()[-1] == f'train on it: medfusion train wavelet {folders}'
    assert_sentence(medfusion('train', 'wavelet'), f'There is no folder {tmp_path}/Dataset/train/CT', folders)
    assert medfusion('data', 'import', 'source', '../Dataset').stdout.splitlines()[-1] == 'train on it: medfusion train wavelet'


def test_what_cannot_be_trained_on_is_told_with_the_parameter_that_helps(tmp_path):
    write_flat(tmp_path, {'1001.png': 128, '2001.png': 128, '3001.png': 48})
    folders = ['-p', f'ct_dir={tmp_path}/CT', '-p', f'mri_dir={tmp_path}/MRI', '-p', f'save_dir={tmp_path}/runs', '-p', 'epochs=1', '-p', 'seed=1']
    assert_sentence(medfusion('train', 'wavelet-lite', *folders, '-p', 'test_cases=1'), 'CT/3001.png of 48×48', '(-p crop=48)', 'or leave such slices out')
    for kind in ('CT', 'MRI'):
        (tmp_path / kind / '3001.png').unlink()
    assert_sentence(medfusion('train', 'wavelet-lite', *folders), f'2 cases of {tmp_path} cannot give', '(-p test_cases=2), or add patients')


def test_a_run_without_a_name_cannot_go_on(tmp_path):
    write_flat(tmp_path, {f'{case}001.png': 64 for case in '123'})
    folders = ['-p', f'ct_dir={tmp_path}/CT', '-p', f'mri_dir={tmp_path}/MRI', '-p', f'save_dir={tmp_path}/runs', '-p', 'epochs=1']
    assert_sentence(medfusion('train', 'wavelet', *folders, '-p', 'resume=true'), 'goes on with a run, and none is named', '--run NAME')
    assert not (tmp_path / 'runs').exists()


def test_a_folder_without_a_record_is_told_the_command(tmp_path):
    write_flat(tmp_path / 'train', {'1001.png': 64})
    assert medfusion('data', 'check', tmp_path).stderr.count('medfusion data import') == 1


# Fuse

def test_fuse_files(pairs):
    result = medfusion('fuse', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', '-o', 'fused.png')
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == 'fused.png' and read_image('fused.png').shape == (64, 64)
    Path('out').mkdir()
    medfusion('fuse', f'CT/{pairs[1]}', f'MRI/{pairs[1]}', '-o', 'out', '--model', 'maximum')
    expected = np.maximum(read_image(f'CT/{pairs[1]}'), read_image(f'MRI/{pairs[1]}'))
    assert np.array_equal(read_image(Path('out', pairs[1])), expected)


def test_fuse_folders(pairs):
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out')
    assert result.exit_code == 0 and result.stdout.startswith('3 fused') and not result.stderr
    again = medfusion('fuse', 'CT', 'MRI', '-o', 'out')
    assert again.exit_code == 0 and again.stdout.startswith('0 fused, 3 already there')


def test_a_bad_pair_is_in_the_exit_status(pairs):
    Path('MRI', pairs[1]).write_bytes(b'')
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'average')
    assert result.exit_code == 1 and not result.stdout and 'Traceback' not in result.stderr
    assert f'{pairs[1]}: ' in result.stderr and '2 fused' in result.stderr
    assert sorted(path.name for path in Path('out').glob('*.png')) == [pairs[0], pairs[2]]


def test_what_fuse_refuses(pairs):
    one, other = f'CT/{pairs[0]}', f'MRI/{pairs[0]}'
    Path('link.png').symlink_to(one)
    assert_sentence(medfusion('fuse', one, 'MRI', '-o', 'x.png'), 'two files or two folders')
    assert_sentence(medfusion('fuse', 'CT/none.png', other, '-o', 'x.png'), 'none.png')
    assert_sentence(medfusion('fuse', '~nosuchuser/a.png', other, '-o', 'x.png'), 'nosuchuser')
    for out in (one, other, f'CT/../{one}', 'link.png'):
        assert_sentence(medfusion('fuse', one, other, '-o', out, '-m', 'maximum'), 'is what is read')
    assert_sentence(medfusion('fuse', one, other, '-o', 'x.txt'), 'x.txt')
    assert_sentence(medfusion('fuse', one, other, '-o', '/dev/null'), '/dev/null')
    assert_sentence(medfusion('fuse', 'CT', 'MRI', '-o', f'{one}/x'), one, 'is a file where a folder should be')
    assert medfusion('fuse', one, other, '-o', 'x\0.png').exit_code == 2
    assert_sentence(medfusion('fuse', one, other, '-o', 'x.png', '--model', 'wavlet'), 'wavlet')
    assert_sentence(medfusion('fuse', one, other, '-o', 'x.png', '--device', 'meta'), "'meta'")
    assert_sentence(medfusion('fuse', 'CT', 'MRI', '-o', 'CT'), 'the slices themselves')
    medfusion('fuse', 'CT', 'MRI', '-o', 'theirs', '-m', 'average')
    assert_sentence(medfusion('fuse', 'CT', 'MRI', '-o', 'theirs', '-m', 'maximum'), 'fused with average', '--replace')
    assert not Path('x.png').exists() and not Path('x.txt').exists()


def test_a_warning_is_a_sentence_too_and_the_range_its_remedy(pairs):
    for name in pairs:
        write_image(Path('CT', name), (to_depth(read_image(Path('CT', name)) / 255, np.uint16) // 16))
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum')
    assert result.exit_code == 0 and result.stderr.startswith('medfusion: ') and '--range 0,4095' in result.stderr
    assert result.stderr.count('\n') == 1
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'mapped', '-m', 'maximum', '--range', '0,4095')
    assert result.exit_code == 0 and not result.stderr and read_image(Path('mapped', pairs[0])).max() > 60000
    result = medfusion('evaluate', 'CT', 'MRI', 'mapped', '--range', '0,4095')
    assert result.exit_code == 0 and 'nearly black' not in result.stderr, result.stderr      # of MS-SSIM it says that 64 pixels are few
    assert '--range 0,4095' in medfusion('evaluate', 'CT', 'MRI', 'mapped').stderr


def test_what_is_there_stays_unless_it_is_to_be_replaced(pairs):
    "Any image, not only the inputs; in a folder too, and in its report the words of the shell."
    one, other = f'CT/{pairs[0]}', f'MRI/{pairs[0]}'
    Path('out').mkdir()
    for out in (Path('x.png'), Path('out', pairs[0])):
        out.write_bytes(b'holiday')
        target = out if out.parent == Path() else 'out'
        assert_sentence(medfusion('fuse', one, other, '-o', target, '-m', 'maximum'), str(out), 'is there already', '--replace')
        assert out.read_bytes() == b'holiday'
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum')
    assert result.exit_code == 1 and 'replace it (--replace)' in result.stderr and 'replace=True' not in result.stderr
    assert medfusion('fuse', one, other, '-o', 'x.png', '-m', 'maximum', '--replace').exit_code == 0
    assert medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum', '--replace').exit_code == 0


def test_links_that_lead_nowhere_or_in_a_circle(pairs):
    Path('broken.png').symlink_to('nowhere/x.png')
    Path('loop.png').symlink_to('back.png')
    Path('back.png').symlink_to('loop.png')
    for name, words in (('broken.png', 'a link to nowhere/x.png, which is not there'), ('loop.png', 'a link to back.png, which leads in a circle')):
        assert_sentence(medfusion('fuse', f'CT/{pairs[0]}', name, '-o', 'y.png'), name, words)
        assert_sentence(medfusion('evaluate', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', name), name, words)
    Path('MRI', pairs[1]).unlink()
    Path('MRI', pairs[1]).symlink_to(Path.cwd() / 'broken.png')
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum')
    assert result.exit_code == 1 and 'broken.png, which is not there' in result.stderr and '2 fused' in result.stderr


def test_a_name_that_no_disk_takes(pairs):
    result = medfusion('fuse', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', '-o', 300 * 'a' + '.png')
    assert result.exit_code == 2 and 'has 304 bytes' in result.stderr and 60 * 'a' not in result.stderr
    assert_sentence(medfusion('fuse', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', '-o', 'x.png', '-m', '~nosuchuser/x'), '~nosuchuser/x names a home folder')


def test_damage_is_said_for_each_file(pairs):
    "Cut files of every format, and a flipped byte where there is a checksum; the others are fused."
    grey = Image.fromarray(read_image(f'CT/{pairs[0]}'))
    formats = {'lzw.tif': {'compression': 'tiff_lzw'}, 'bits.tif': {'compression': 'packbits'}, 'deflate.tif': {'compression': 'tiff_adobe_deflate'},
               'raw.tif': {}, 'cut.jpg': {'quality': 95}, 'cut.bmp': {}, 'cut.png': {}, 'flip.png': {}}
    for name, options in formats.items():
        grey.save(Path('MRI', name), **options)
        data = bytearray(Path('MRI', name).read_bytes())
        Path('CT', name).write_bytes(data)
        if name == 'flip.png':
            data[len(data) // 2] ^= 1
        else:
            del data[-len(data) // 3:]
        Path('MRI', name).write_bytes(data)
    Path('CT/cut.jpg').rename('CT/photo.jpg'), Path('MRI/cut.jpg').rename('MRI/photo.jpg')      # cut.png is there already
    Path('CT/cut.bmp').rename('CT/old.bmp'), Path('MRI/cut.bmp').rename('MRI/old.bmp')
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum')
    assert result.exit_code == 1 and '3 fused, 0 already there, 8 failed' in result.stderr and 'Traceback' not in result.stderr, result.stderr
    for line in result.stderr.strip().splitlines()[1:]:
        assert 'MRI/' in line and ('truncated' in line or 'damaged' in line), line


def test_slices_lie_as_their_notes_say(pairs):
    "EXIF's orientation 6: the camera was turned, the rows of the file are columns of the picture."
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.zeros((20, 40), np.uint8)
    wide[0, :] = 200
    for name in ('a.png', 'a.jpg', 'a.tif'):
        for side in ('CT', 'MRI'):
            Image.fromarray(wide).save(Path(side, name), exif=exif)
        assert medfusion('fuse', f'CT/{name}', f'MRI/{name}', '-o', f'{name}.png', '-m', 'maximum').exit_code == 0
        fused = read_image(f'{name}.png')
        assert fused.shape == (40, 20) and fused[:, -1].min() > 150 and fused[:, :10].max() < 50, name


@pytest.mark.fault('fuse, evaluate, data', 'disk full, or failing', points=4)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(pairs):
    "A limit on the size of files stands for it."
    for i, name in enumerate(pairs):
        for side in ('CT', 'MRI'):
            Path('mine', side).mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(side, name), Path('mine', side, f'{i + 1}001.png'))
    one = [f'CT/{pairs[0]}', f'MRI/{pairs[0]}']
    before = sorted(Path().rglob('*'))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for words, name in ((['fuse', *one, '-o', 'x.png', '-m', 'maximum'], 'x.png'), (['evaluate', *one, one[0], '--csv', 'x.csv'], 'x.csv'),
                        (['data', 'import', 'mine', 'new'], 'new'), (['data', 'phantom', 'drawn', '--cases', 3, '--slices', 1, '--size', 64], 'drawn')):
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
        try:
            result = medfusion(*words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert result.exit_code == 1 and 'Traceback' not in result.stderr, (words, result.output)
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith('medfusion: ') and name in last, (words, last)
        assert [path for path in sorted(Path().rglob('*')) if path not in before] == [], words


def test_lesions_are_no_part_of_a_name(pairs):
    "Not of that of a file or a folder which happens to be called like a name and a number."
    from medfusion.inference import shipped_models
    Path('mine').mkdir()
    shutil.copy(shipped_models()['wavelet'].path, 'mine/w.pt')
    Path('mine/w.pt@1').write_text('no network')
    for out, model in (('mine@1', 'mine'), ('mine@1', 'mine'), ('other', 'mine/w.pt')):
        assert medfusion('fuse', 'CT', 'MRI', '-o', out, '-m', model, '--lesions', '1').exit_code == 0
    owners = [json.loads(Path(out, 'fused.jsonl').read_text().splitlines()[0]) for out in ('mine@1', 'other')]
    assert [owner['model'] for owner in owners] == ['mine@1', 'mine/w.pt@1'] and owners[0]['network'] == owners[1]['network']
    assert medfusion('fuse', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', '-o', 'new/one/a.png', '-m', 'mine/w.pt', '--lesions', '1').exit_code == 0
    assert Path('new/one/a.png').read_bytes() == Path('mine@1', pairs[0]).read_bytes()


def test_what_is_no_slice_names_the_command_for_scans(pairs):
    Path('scans').mkdir()
    for name in ('head.nii.gz', 'scans/1.dcm'):
        Path(name).write_bytes(b'')
    for path in ('head.nii.gz', 'scans'):
        assert_sentence(medfusion('fuse', path, path, '-o', 'out.png' if '.' in path else 'out'), 'is fused by medfusion scan')


def test_what_m_understands_is_told_in_one_way():
    for command in ('fuse', 'scan', 'export'):
        assert 'wavelet-lite; run:NAME' in ' '.join(re.sub(r'[│|]', ' ', medfusion(command, '--help').output).split())
    assert 'Value error' not in medfusion('fuse', 'a', 'b', '-o', 'c', '--engine', 'Dask').stderr


def test_a_typed_network_is_found_from_the_notebooks_with_its_dial_turned(pairs):
    "They run in another folder."
    Path('mine.pt').write_bytes(b'')
    assert [cli.absolute_path('model', text) for text in ('mine.pt@1', './mine.pt@.5', 'wavelet@1', 'mine.pt', 'nobody.pt@1', '@' * 5000)] == [
        f'{Path.cwd()}/mine.pt@1', f'{Path.cwd()}/mine.pt@.5', 'wavelet@1', f'{Path.cwd()}/mine.pt', 'nobody.pt@1', '@' * 5000]
    assert cli.named_models(['ours=mine.pt@1', 'mine.pt@0']) == [f'ours={Path.cwd()}/mine.pt@1', f'{Path.cwd()}/mine.pt@0']
    assert_sentence(medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'wavelet@1', '--lesions', '0.5'), 'says twice')
    assert not Path('out').exists()


def test_a_typed_value_is_a_path_by_its_parameter_and_not_by_what_lies_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('2', 'wavelet', 'axial', 'val', 'medfusion', 'IMAGENET1K_V2', 'w.pth', 'scan.nii'):
        Path(name).write_bytes(b'')
    words = ['ct_series=2', 'mri_series=[2]', 'model=wavelet', 'plane=axial', 'ct=nowhere', 'mri=[scan.nii, ~/mri]', 'transform=', 'study=2']
    assert cli.given_parameters('scan_fusion.ipynb', [], words) == {
        'ct_series': '2', 'mri_series': ['2'], 'model': 'wavelet', 'plane': 'axial', 'ct': str(tmp_path / 'nowhere'),
        'mri': [str(tmp_path / 'scan.nii'), os.path.expanduser('~/mri')], 'transform': '', 'study': str(tmp_path / '2')}
    assert cli.given_parameters('90_benchmark.ipynb', [], ['join=[val]', 'published=w.pth']) == {'join': ['val'], 'published': str(tmp_path / 'w.pth')}
    weights = [cli.absolute_path('backbone_weights', text) for text in ('medfusion', 'IMAGENET1K_V2', 'w.pth', './2')]
    assert weights == ['medfusion', 'IMAGENET1K_V2', str(tmp_path / 'w.pth'), str(tmp_path / '2')]


# Evaluate

def evaluated(pairs, fused='CT'):
    "A process that writes t.csv, of a fused slice that is a copy of the CT or of the MRI."
    shutil.copy(f'{fused}/{pairs[0]}', 'fused.png')
    child = os.fork()
    if child == 0:
        os._exit(medfusion('evaluate', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', 'fused.png', '--csv', 't.csv').exit_code)
    return child


@pytest.mark.long
@pytest.mark.fault('evaluate', 'killed between two writes', points=2)
def test_evaluate_killed_at_its_table(pairs, monkeypatch):
    "The table that was there, or the new one, whole; the next call is not disturbed."
    def table(*fused):
        os.waitpid(evaluated(pairs, *fused), 0)
        return Path('t.csv').read_bytes()
    new, old = table(), table('MRI')
    assert old != new
    for moment, wanted in (('before', old), ('after', new)):
        assert table('MRI') == old

        def dies(*given, real=os.replace):
            if moment == 'after':
                real(*given)
            os._exit(9)
        with monkeypatch.context() as patched:
            patched.setattr('medfusion.files.os.replace', dies)
            assert os.waitstatus_to_exitcode(os.waitpid(evaluated(pairs), 0)[1]) == 9
        assert Path('t.csv').read_bytes() == wanted
    assert table('MRI') == old and not list(Path().glob('.*'))


@pytest.mark.long
@pytest.mark.fault('evaluate', 'several at once')
def test_two_tables_into_one_file(pairs):
    children = [evaluated(pairs), evaluated(pairs), evaluated(pairs)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    first = Path('t.csv').read_text().splitlines()
    assert len(first) >= 3 and not list(Path().glob('.*'))    # whole, whoever's it is


def test_slices_that_are_too_small_are_named(pairs):
    for folder in ('CT', 'MRI', 'F'):
        Path('tiny', folder).mkdir(parents=True)
        write_image(Path('tiny', folder, '1001.png'), np.zeros((3, 5), np.uint8))
    assert_sentence(medfusion('evaluate', *(f'tiny/{folder}/1001.png' for folder in ('CT', 'MRI', 'F'))), '1001.png: ', '7')
    assert_sentence(medfusion('evaluate', 'tiny/CT', 'tiny/MRI', 'tiny/F'), '1001.png: ', '7')


def test_evaluate_folders_and_files(pairs):
    medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'average')
    result = medfusion('evaluate', 'CT', 'MRI', 'out', '--csv', 'table.csv')
    assert result.exit_code == 0, result.output
    assert '3 pairs' in result.stdout and 'Qabf' in result.stdout and 'mean' in result.stdout
    text = Path('table.csv').read_text()
    assert all(name in text for name in pairs)
    one = medfusion('evaluate', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', f'out/{pairs[0]}', '--preset', 'textbook')
    assert one.exit_code == 0 and pairs[0] in one.stdout
    assert_sentence(medfusion('evaluate', 'CT', 'MRI', f'out/{pairs[0]}'), 'three files or three folders')


def test_the_means_say_of_how_many_pairs_they_are(pairs):
    "The convention stands below them; a slice that is its source has no finite PSNR, and the mean leaves it out."
    medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'average')
    Path('out', pairs[2]).unlink()
    shutil.copy(Path('CT', pairs[1]), Path('out', pairs[1]))
    result = medfusion('evaluate', 'CT', 'MRI', 'out')
    lines = result.stdout.splitlines()
    assert lines[0] == f'2 of 3 pairs; no fused image for {pairs[2]}' and lines[1].split()[0] == 'mean' and max(map(len, lines)) <= 100
    assert any(line.startswith('preset cvpr: grey') for line in lines) and 'inf ' not in result.stdout
    assert f'PSNR, or a part of it, is infinite for {pairs[1]} (1 of 2)' in result.stderr
    from medfusion.cli import evaluation_text
    rare = pd.DataFrame({'invented': [2e-5]}, index=['a.png'])
    rare.attrs['convention'] = 'preset x'
    assert '0.00002' in evaluation_text(rare)


def test_a_table_beside_the_slices_goes_on(pairs):
    "It is in a folder that is read, but no slice; what is one there is not written over."
    medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum')
    words = ['evaluate', 'CT', 'MRI', 'out', '--csv', 'out/scores.csv']
    tables = [medfusion(*words).exit_code or Path('out/scores.csv').read_bytes() for _ in range(2)]
    assert tables[0] == tables[1] and tables[0].count(b'\n') == 5
    assert medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum').exit_code == 0


def test_a_table_is_written_over_nothing_but_a_table(pairs):
    slices = [f'{side}/{pairs[0]}' for side in ('CT', 'MRI', 'MRI')]
    before = Path(slices[0]).read_bytes()
    Path('table.csv').symlink_to(slices[0])
    Path('folder.csv').mkdir()
    os.mkfifo('pipe.csv')
    for out in (slices[0], 'table.csv', 'folder.csv', 'pipe.csv', '/dev/null', 'table.txt'):
        assert_sentence(medfusion('evaluate', *slices, '--csv', out), out)
    assert Path(slices[0]).read_bytes() == before and Path('table.csv').is_symlink()
    Path('mine.csv.part').write_text('mine')
    assert medfusion('evaluate', *slices, '--csv', 'mine.csv').exit_code == 0 and Path('mine.csv.part').read_text() == 'mine'


def test_one_pair_has_the_numbers_of_its_row_in_the_folder(pairs):
    from medfusion.metrics import read_table
    medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'average')
    medfusion('evaluate', 'CT', 'MRI', 'out', '--csv', 'all.csv')
    medfusion('evaluate', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', f'out/{pairs[0]}', '--csv', 'one.csv')
    together, alone = read_table('all.csv'), read_table('one.csv')
    np.testing.assert_allclose(alone.loc[pairs[0]], together.loc[pairs[0], alone.columns], rtol=1e-4)


@pytest.mark.fault('evaluate', 'stopped (Ctrl-C, SIGTERM)')
@pytest.mark.parametrize('jobs, stop, code', [(1, signal.SIGTERM, 143), pytest.param(2, signal.SIGINT, 130, marks=pytest.mark.long)])
def test_stopped_while_evaluating(pairs, jobs, stop, code):
    "One sentence, from one process or several; the rows are kept, and the command that it names goes on."
    for i in range(40):
        for side in ('CT', 'MRI'):
            shutil.copy(Path(side, pairs[0]), Path(side, f'8{i:03d}.png'))
    words = ['evaluate', 'CT', 'MRI', 'CT', '--csv', 't.csv', '--jobs', str(jobs)]

    def slowly(real=GrowingTable.add):
        GrowingTable.add = lambda *given: (time.sleep(0.2), real(*given))
        os.setsid()
        with open('said', 'w') as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)     # what its processes say, too
            app(words, prog_name='medfusion')
    child = begin_child(slowly)
    while not Path('t.csv').exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.01)
    (os.killpg if stop == signal.SIGINT else os.kill)(child, stop)      # Ctrl-C reaches all processes
    status, said = os.waitpid(child, 0)[1], Path('said').read_text()
    assert os.waitstatus_to_exitcode(status) == code and said.count('\n') == 1, said
    assert said.rstrip().endswith(shlex.join(['medfusion', *words])) and 'kept in t.csv' in said
    there = Path('t.csv').read_text().count('\n') - 2
    result = medfusion(*words)
    assert 0 < there < 43 and result.exit_code == 0 and result.stdout.startswith('43 pairs') and Path('t.csv').read_text().count('\n') == 45


def test_a_bad_file_among_those_to_evaluate(pairs):
    shutil.copytree('CT', 'F')
    Path('F', pairs[1]).write_bytes(b'')
    assert_sentence(medfusion('evaluate', 'CT', 'MRI', 'F', '--csv', 't.csv'), '1 of 3 rows', 't.csv', f'{pairs[1]} is empty')
    shutil.copy(Path('CT', pairs[1]), 'F')
    assert medfusion('evaluate', 'CT', 'MRI', 'F', '--csv', 't.csv').stdout.startswith('3 pairs')


# Models

def test_models():
    result = medfusion('models')
    assert result.exit_code == 0 and result.stdout.count('as shipped') == 3
    assert result.stdout.count('each by a fold that never saw it: EN ') == 3, 'all have seen all patients'
    assert 'pyramid' in result.stdout and max(map(len, result.stdout.splitlines())) < 250
    assert result.stdout.count('cvpr') == 1


# Train: a small clone with a notebook that needs no training stands for the real one

@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A folder that looks like a clone, with a method notebook that prints, can fail, and can take long."
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = medfusion\nnbs_path = nbs\n')
    cells = [new_code_cell("save_dir: str = '../results/trainable_wavelet_fusion'\nrun: str = 'latest'\nnum_epochs: int = 20  # passes\n"
                           "lr: float = 1e-3\ndata_dir: str = '../Dataset/train/CT'\nprecision: str = 'no'\naugment: bool = False\n"
                           "resume: bool = False\nreplace: bool = False", metadata={'tags': ['parameters']}),
             new_markdown_cell('# A toy\n\nText.\n\n## Training'),
             new_code_cell("import json, os, pathlib, time\nfolder = pathlib.Path(save_dir) / run\nfolder.mkdir(parents=True, exist_ok=True)\n"
                           "(folder / 'seen.json').write_text(json.dumps([run, num_epochs, lr, data_dir, resume, precision]))\n"
                           "print('epoch', num_epochs)\nprint(os.environ['MEDFUSION_COMMAND'])\n"
                           "rows = {'toy': {'SD': 80.0}, 'average': {'SD': 60.0}, 'copy_ct': {'SD': 90.0}}\n"
                           "if lr == 0.5:    # medfusion.runs, which writes records, would import torch, and that takes seconds\n"
                           "    (folder / 'run.json').write_text(json.dumps({'format': 'medfusion run 1', 'method': 'toy', 'run': run, 'state': 'finished',\n"
                           "        'started': '2026-01-01T00:00:00+00:00', 'parameters': {}, 'versions': {}, 'checkpoints': {}, 'numbers': {'means': rows}}))"),
             new_code_cell("if num_epochs == 13:\n    raise ValueError('thirteen epochs')\nif num_epochs == 14:\n    1 / 0\n"
                           "if num_epochs == 15:\n    os._exit(1)\nif num_epochs == 16:\n    time.sleep(60)")]
    nbformat.write(new_notebook(cells=cells), tmp_path / 'nbs' / 'trainable-wavelet-fusion.ipynb')
    cells = [new_code_cell("save_dir: str = '../results/benchmark'\nrun: str = 'latest'\ncheckpoints: list[str] = ['wavelet', 'resnet']\nexternal_dir: str = '../external'",
                           metadata={'tags': ['parameters']}),
             new_code_cell("import json, pathlib\n(pathlib.Path(save_dir) / f'seen-{run}.json').write_text(json.dumps(checkpoints))")]
    nbformat.write(new_notebook(cells=cells), tmp_path / 'nbs' / '90_benchmark.ipynb')
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path


def test_train(clone):
    Path('x.yaml').write_text('lr: 5e-1\nprecision: no\nnum_epochs: 3\ndata_dir: ../elsewhere/CT\naugment: yes\n')
    result = medfusion('train', 'wavelet', '-f', 'x.yaml', '-p', 'epochs=5', '-p', 'resume=true', '--run', 'a')
    assert result.exit_code == 0, result.output
    folder = clone / 'results' / 'trainable_wavelet_fusion' / 'a'
    assert json.loads((folder / 'seen.json').read_text()) == ['a', 5, 0.5, '../elsewhere/CT', True, 'no']
    assert (folder / 'executed.ipynb').is_file() and 'epoch 5' in result.stdout and str(folder) in result.stdout
    assert 'medfusion train wavelet -f x.yaml -p epochs=5\n' in result.stdout and not result.stderr
    assert re.search(r'SD\ntoy +80\naverage +60\ndone', result.stdout) and result.stdout.endswith('-o OUT -m run:wavelet/a\n')


def test_training_ends_with_a_name_that_means_its_run(clone):
    "Also when another method, or a study, has a run of that name, before or after it."
    for other in ('nothing', 'scan_fusion', 'resnet_fusion'):
        write_run(clone / 'results' / other / 'a', method=other, parameters={}, state='finished', started=0)
        result = medfusion('train', 'wavelet', '-p', 'lr=0.5', '-p', 'resume=true', '--run', 'a')
        assert result.exit_code == 0 and result.stdout.endswith('-o OUT -m run:wavelet/a\n'), result.output


def test_typed_folders_are_seen_from_the_shell_and_runs_have_names_of_their_own(clone):
    Path('2').write_text('a file that is called like the run')
    result = medfusion('train', 'wavelet', '-p', 'data_dir=my/CT', '-p', 'save_dir=runs', '-p', 'run=2')
    assert result.exit_code == 0, result.output
    assert json.loads(Path('runs/2/seen.json').read_text())[:4] == ['2', 20, 0.001, str(Path.cwd() / 'my/CT')]


def test_the_name_after_run_is_that_of_the_run(clone, monkeypatch):
    "Also where a file of parameters gives another one: what is proposed ends in --run. Two names that were typed are refused."
    names = []
    monkeypatch.setattr(cli, 'execute', lambda notebook, executed, given: names.append((executed.folder.name, given['run'])))
    Path('x.yaml').write_text('run: of_the_file\n')
    for words in (['--run', 'typed'], []):
        assert medfusion('train', 'wavelet', '-f', 'x.yaml', *words).exit_code == 0
    assert names == [('typed', 'typed'), ('of_the_file', 'of_the_file')]
    result = medfusion('train', 'wavelet', '-p', 'run=a', '--run', 'b')
    assert result.exit_code == 2 and 'the run is named twice' in ' '.join(result.stderr.split())


@pytest.mark.fault('train', 'several at once')
def test_two_runs_in_one_second_have_two_folders(clone, monkeypatch):
    monkeypatch.setattr(cli.time, 'strftime', lambda _: '20260101-120000')
    monkeypatch.setattr(cli, 'execute', lambda notebook, executed, given: executed.write('{}'))
    for _ in range(2):
        assert medfusion('train', 'wavelet').exit_code == 0
    names = sorted(path.name for path in (clone / 'results/trainable_wavelet_fusion').iterdir())
    assert names == ['20260101-120000', '20260101-120000-2']


def test_benchmark_takes_models_as_every_command_does(clone, monkeypatch):
    Path('mine.pt').write_bytes(b'')
    (clone / 'results/benchmark').mkdir(parents=True)
    monkeypatch.setattr('medfusion.inference.run_checkpoint', lambda folder: Path('mine.pt'))
    monkeypatch.setattr('medfusion.inference.find_run', lambda name, first: Path(name))
    result = medfusion('benchmark', '-p', 'checkpoints=[wavelet, mine.pt, run:a]', '--run', 'a')
    assert result.exit_code == 0, result.output
    seen = json.loads((clone / 'results/benchmark/seen-a.json').read_text())
    assert seen == ['wavelet', str(Path.cwd() / 'mine.pt'), 'run:a']
    assert_sentence(medfusion('benchmark', '-p', 'checkpoints=[wavelet'), 'checkpoints', 'list[str]')


@pytest.mark.parametrize('epochs, words', [(13, ['under the heading "Training": thirteen epochs; see']),
                                           pytest.param(14, ['ZeroDivisionError'], marks=pytest.mark.long), (15, ['died without a word', 'What was finished is kept in', '--run b -p resume=true'])])
def test_a_failing_notebook_is_kept(clone, epochs, words):
    result = medfusion('train', 'wavelet', '-p', f'num_epochs={epochs}', '--run', 'b')
    executed = clone / 'results' / 'trainable_wavelet_fusion' / 'b' / 'executed.ipynb'
    assert result.exit_code == 1 and len(nbformat.read(executed, 4).cells) >= 4
    last = result.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words) and str(executed) in last and 'Traceback' not in result.stderr
    assert 'TCP' not in result.stderr


def test_the_name_of_a_benchmark_that_failed_at_once_is_free(clone):
    nbformat.write(new_notebook(cells=[new_code_cell("save_dir: str = '../results/benchmark'\ncheckpoints: list[str] = ['wavelet']\nexternal_dir: str = '../external'", metadata={'tags': ['parameters']})]), clone / 'nbs/90_benchmark.ipynb')
    folder = clone / 'results' / 'benchmark' / 'b'
    folder.mkdir(parents=True)
    (folder / 'executed.ipynb').write_text('of one that failed')
    result = medfusion('benchmark', '--run', 'b')
    assert result.exit_code == 0 and [path.name for path in folder.parent.iterdir()] == ['b'], result.output
    (folder / 'summary.csv').write_text('EN')
    assert_sentence(medfusion('benchmark', '--run', 'b'), 'b is there already; name another run')


@pytest.mark.fault('train', 'disk full, or failing')
def test_the_executed_notebook_is_whole_or_absent(clone, monkeypatch):
    "A disk that fills up during the run: the run is whole, its exit status 0, and a sentence names what is missing."
    def full(path, data):
        raise OSError(errno.ENOSPC, f'{path} could not be written (No space left on device)')
    monkeypatch.setattr('medfusion.files.write_atomically', full)
    result = medfusion('train', 'wavelet', '--run', 'c')
    folder = clone / 'results' / 'trainable_wavelet_fusion' / 'c'
    assert result.exit_code == 0 and [path.name for path in folder.iterdir()] == ['seen.json']
    assert 'executed.ipynb could not be written' in result.stderr and 'the run itself is whole' in result.stderr


def test_a_refused_run_leaves_the_other_ones_notebook(clone):
    folder = clone / 'results' / 'trainable_wavelet_fusion' / 'd'
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text(json.dumps({'started': 'yesterday'}))
    (folder / 'executed.ipynb').write_text('of the first run')
    notebook = cli.ExecutedNotebook(folder)
    notebook.write('{}')
    assert (folder / 'executed.ipynb').read_text() == 'of the first run' and not notebook.written
    (folder / 'run.json').write_text(json.dumps({'started': 'today'}))
    notebook.write('{}')
    assert (folder / 'executed.ipynb').read_text() == '{}'


@pytest.mark.parametrize('more', [[], pytest.param(['-p', 'resume=true'], marks=pytest.mark.long)])
def test_a_run_that_is_refused_in_its_notebook_leaves_the_other_ones(clone, more, monkeypatch):
    folder = clone / 'results' / 'trainable_wavelet_fusion' / 'd'
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text(json.dumps({'started': 'yesterday'}))
    (folder / 'executed.ipynb').write_text('of the first run')
    monkeypatch.setattr('medfusion.runs.needs_room', lambda *_: False)
    result = medfusion('train', 'wavelet', '-p', 'num_epochs=13', '--run', 'd', *more)
    assert result.exit_code == 1 and 'thirteen epochs' in result.stderr
    assert (folder / 'executed.ipynb').read_text() == 'of the first run'


@pytest.mark.fault('train', 'stopped (Ctrl-C, SIGTERM)')
@pytest.mark.parametrize('stop, code', [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)])
def test_stopped_while_a_notebook_runs(clone, stop, code):
    "One sentence with the whole command that goes on; the kernel ends too; nothing of ZMQ."
    process = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'medfusion', 'train', 'wavelet', '-p', 'num_epochs=16', '--run', 'e f'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = clone / 'results' / 'trainable_wavelet_fusion' / 'e f'
    while not (folder / 'seen.json').exists() and process.poll() is None:
        time.sleep(0.02)
    import psutil
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(stop)
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said.count('\n')) == (code, 1), said
    assert said.rstrip().endswith("To go on: medfusion train wavelet -p num_epochs=16 --run 'e f' -p resume=true") and str(folder) in said
    assert kernels and not psutil.wait_procs(kernels, timeout=60)[1]
    assert len(nbformat.read(folder / 'executed.ipynb', 4).cells) >= 4


@pytest.mark.fault('train', 'killed from outside')
@pytest.mark.long
def test_a_kernel_does_not_outlive_its_command(clone):
    "SIGKILL leaves nobody who could end it; it notices."
    import psutil
    process = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'medfusion', 'train', 'wavelet', '-p', 'num_epochs=16', '--run', 'k'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {'TMPDIR': str(clone)})
    while not (clone / 'results/trainable_wavelet_fusion/k/seen.json').exists() and process.poll() is None:
        time.sleep(0.02)
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert kernels and not psutil.wait_procs(kernels, timeout=60)[1]


@pytest.mark.parametrize('arguments, words', [
    (['-p', 'num_epoch=5'], ['num_epoch', 'num_epochs']),
    (['-p', 'num_epochs=many'], ['num_epochs', 'int']),
    (['-p', 'lr'], ['lr=VALUE']),
    (['-p', '=3'], ['names no parameter']),
    (['-p', 'lr=1' + 400 * '0'], ['lr', 'must be a finite number, not inf']),
    (['-p', 'run='], ["named ''"]),
    (['--run', ''], ["named ''"]),
    (['-p', 'lr={[]:1}'], ['lr', 'float']),
    (['-p', 'lr=' + 5000 * '('], ['lr', 'float']),
    (['-p', 'run=../x'], ['../x', 'name']),
    (['--run', '/tmp/x'], ['/tmp/x', 'name']),
    (['--run', '..'], ["'..'", 'name']),
    (['-f', 'missing.yaml'], ['missing.yaml']),
    (['--run', 'taken'], ['taken', 'no folder']),
])
def test_parameters_are_checked_before_anything_is_made(clone, arguments, words):
    if 'taken' in arguments:
        (clone / 'results' / 'trainable_wavelet_fusion').mkdir(parents=True)
        (clone / 'results' / 'trainable_wavelet_fusion' / 'taken').write_text('')
    assert_sentence(medfusion('train', 'wavelet', *arguments), *words)
    assert 'taken' in arguments or not (clone / 'results').exists()


@pytest.mark.parametrize('text, words', [
    ('a: [1', ['YAML']), ('- 1', ['name: value']), ('5: 3', ['5 is not a parameter']), ('yes: 1', ['yes is not a parameter']),
    ('~: 1', ['~ is not a parameter']), ('lr: ' + 2000 * '[', ['YAML']), ('lr: ' + 2000 * '[' + 2000 * ']', ['YAML']),
    ('lr: &a 1\nnum_epochs: *a', ['alias']), ('a: &a [x]\nb: &b [*a, *a]', ['alias']), ('lr:', ['lr no value']),
    ('lr: 1\nlr: 2', ['lr twice']), ('? [1]\n: 2', ['YAML']), ('? [a]', ['lines `name: value`']), ('lr: .inf', ['lr', 'must be a finite number, not inf']), ('lr: !!python/object/apply:os.system [touch x]', ['lr', 'float']),
    ('\x00', ['YAML']), ('lr: 2020-01-01', ['lr', 'float']), ('num_epochs: 1.5', ['num_epochs', 'int']), ('data_dir: ""', None)])
def test_files_of_parameters_as_people_and_accidents_write_them(clone, text, words, monkeypatch):
    Path('x.yaml').write_text(text)
    monkeypatch.setattr(cli, 'execute', lambda notebook, executed, given: None)
    result = medfusion('train', 'wavelet', '-f', 'x.yaml')
    if words is None:
        assert result.exit_code == 0
    else:
        assert_sentence(result, *words)
    assert not Path('x').exists()


def test_every_parameter_file_of_the_project_is_read():
    for path in (Path(cli.__file__).parents[1] / 'params').glob('**/*.yaml'):
        assert cli.read_parameter_file(path).keys() == yaml.safe_load(path.read_text()).keys(), path


def test_help_prints_the_parameters_of_the_notebook(clone):
    for method in (['wavelet'], ['-p', 'lr=1', 'wavelet']):
        text = medfusion('train', *method, '--help').stdout
        assert 'num_epochs=20' in text and 'passes' in text and 'run="latest"' in text
    assert 'num_epochs' not in medfusion('train', '--help').stdout
    assert all(f'METHOD <str>  one of {", ".join(inference.methods())}  ' in medfusion(command, '--help').stdout for command in ('train', 'sweep'))
    assert 'checkpoints=["wavelet", "resnet"]' in medfusion('benchmark', '--help').stdout


@pytest.fixture
def no_kernel(tmp_path, monkeypatch):
    "With the real notebooks: whatever is noticed is noticed before a kernel starts."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, 'execute', lambda *_: pytest.fail('a kernel was started'))
    return tmp_path


@pytest.mark.parametrize('command', [['train', 'wavelet'], ['train', 'resnet'], ['benchmark']])
def test_missing_data_is_noticed_at_once(command, no_kernel):
    "No folder is made, and the ways to get data are named."
    result = medfusion(*command, '-p', 'ct_dir=nowhere/CT', '-p', 'mri_dir=nowhere/MRI', '-p', 'save_dir=results')
    assert_sentence(result, str(no_kernel / 'nowhere/CT'), 'medfusion data harvard', 'medfusion data phantom')
    assert not list(no_kernel.iterdir())


@pytest.mark.parametrize('place', ['file.txt', 'file.txt/new', 'gone', 'circle', 'CT'])
def test_where_nothing_can_be_written_is_noticed_at_once(pairs, place, no_kernel, monkeypatch):
    "By every command that fills a folder, before anything is computed; what is there stays as it is."
    Path('file.txt').write_text('mine')
    Path('gone').symlink_to('nowhere')
    Path('circle').symlink_to('circle')
    for name in ('phantom.write_phantom', 'phantom_volume.phantom_study', 'data.download_harvard', 'data.prepare_dataset', 'detection.calibrate_amplitude'):
        monkeypatch.setattr(f'medfusion.{name}', lambda *_, **more: pytest.fail('something was computed'))
    before = sorted(Path().rglob('*'))
    commands = [['data', 'scans', '-o', place], ['scan', 'CT', 'MRI', '-m', 'maximum', '-o', place], ['evaluate', 'CT', 'MRI', '--task', place]]
    if place != 'CT':
        commands += [['data', 'phantom', place], ['data', 'harvard', place], ['data', 'import', '.', place], ['fuse', 'CT', 'MRI', '-m', 'maximum', '-o', place]]
    for words in commands:
        assert_sentence(medfusion(*words), place.split('/')[0])
        assert sorted(Path().rglob('*')) == before and Path('file.txt').read_text() == 'mine', words


@pytest.mark.parametrize('place', ['new', 'new/newer'])
def test_a_folder_that_cannot_be_made_is_told_by_its_own_name(pairs, place, no_kernel, monkeypatch):
    "Beside which a hidden one cannot be made either, whose name was told."
    def refuse(path, *mode, **more):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    monkeypatch.setattr(os, 'mkdir', refuse)
    monkeypatch.setattr('medfusion.phantom_volume.phantom_study', lambda *_, **more: None)
    for words in (['data', 'scans', '-o', place], ['scan', 'CT', 'MRI', '-m', 'maximum', '-o', place], ['fuse', 'CT', 'MRI', '-m', 'maximum', '-o', place]):
        result = medfusion(*words)
        assert_sentence(result, str(no_kernel / 'new'), 'cannot be made (Permission denied); name another one')
        assert '.tmp' not in result.stderr, words


def test_lesions_are_painted_into_the_values_that_are_said(pairs, monkeypatch):
    ranges = []
    monkeypatch.setattr('medfusion.detection.write_task', lambda data_set, folder: ranges.append(data_set.value_range) or Path())
    medfusion('evaluate', 'CT', 'MRI', '--task', 'task', '--range', '0,4095')
    assert ranges == [(0, 4095)]


@pytest.mark.parametrize('more, words', [(['--grid', 'pet'], "'ct' or 'mri', not 'pet'"), (['-p', 'spacing=-1'], 'spacing of -1 mm'), (['-p', 'plane=oblique'], 'no plane'),
                                         (['-p', 'batch_size=0'], 'batch_size is 0'), (['-p', 'device=hpu'], "'hpu'"), (['-m', 'nobody'], "no model 'nobody'"),
                                         (['-m', 'wavelet@2'], 'a number from 0 to 1'), (['-m', 'wavelet-lite@1'], 'no dial'), (['-m', 'maximum@1'], 'no dial'),
                                         (['--window', 'x'], "'x' is no window"), (['-p', 'colour=red'], 'colour'), (['-o', 'CT/study'], 'searched whole')])
def test_what_no_study_can_be_made_with_is_noticed_at_once(pairs, no_kernel, more, words):
    before = sorted(Path().rglob('*'))
    assert_sentence(medfusion('scan', 'CT', 'MRI', '-m', 'maximum', '-o', 'study', *more), words)
    assert sorted(Path().rglob('*')) == before


@pytest.mark.parametrize('parameter, option', [('out_dir=elsewhere', '--out'), ('replace=true', '--replace')])
def test_the_folder_of_a_study_is_named_by_an_option(pairs, no_kernel, parameter, option):
    before = sorted(Path().rglob('*'))
    result = medfusion('scan', 'CT', 'MRI', '-m', 'maximum', '-o', 'study', '-p', parameter)
    assert result.exit_code == 2 and f'-p {parameter} would do nothing; say {option}' in ' '.join(result.stderr.split())
    assert sorted(Path().rglob('*')) == before


def test_a_folder_whose_name_is_not_utf8_is_told_and_ends_nothing(pairs, no_kernel):
    "SimpleITK ends the whole process at such a path, as old servers have them, and what was half-written stayed."
    place = Path(os.fsdecode(b'M\xfcller'))
    place.mkdir()
    (place / 'study').mkdir()
    (place / 'a.nrrd').write_bytes(b'NRRD0004\n')
    before = sorted(Path().rglob('*'))
    for words in (['scan', 'CT', 'MRI', '-m', 'maximum', '-o', str(place / 'new')], ['view', str(place / 'study')]):
        assert_sentence(medfusion(*words), 'is not UTF-8', 'rename')
    read = medfusion('scans', str(place.absolute()))
    assert read.exit_code == 0 and 'is not UTF-8' in read.stdout
    ended = subprocess.run([sys.executable, '-m', 'medfusion', 'data', 'scans', '--voxel', '8', '-o', place / 'new'], capture_output=True, text=True)
    assert ended.returncode == 1 and 'is not UTF-8' in ended.stderr and 'terminate' not in ended.stderr
    assert sorted(Path().rglob('*')) == before


def test_the_help_of_scan_names_every_window():
    from medfusion.studies import windows
    assert f'{", ".join(windows())}, or level,width' in ' '.join(medfusion('scan', '--help').stdout.split())


@pytest.mark.fault('scan', 'stopped (Ctrl-C, SIGTERM)', points=2)
def test_a_stopped_scan_leaves_nothing(pairs, no_kernel, monkeypatch):
    before = sorted(Path().rglob('*'))
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        def execute(notebook, executed, given, number=number):
            Path(given['out_dir'], 'half.nii.gz').write_bytes(b'half')
            os.kill(os.getpid(), number)
        monkeypatch.setattr(cli, 'execute', execute)
        assert_sentence(medfusion('scan', 'CT', 'MRI', '-m', 'maximum', '-o', 'a/study'), 'stopped; nothing is left half-written', 'medfusion scan CT MRI', code=code)
        assert sorted(Path().rglob('*')) == before


@pytest.mark.fault('benchmark', 'stopped (Ctrl-C, SIGTERM)', points=4)
def test_a_stopped_benchmark_keeps_what_it_had(pairs, no_kernel, monkeypatch):
    "And says so; where it had nothing, no folder is left."
    before = sorted(Path().rglob('*'))
    words = ['benchmark', '-p', 'ct_dir=CT', '-p', 'mri_dir=MRI', '-p', 'save_dir=results', '-m', 'maximum']
    for (number, code), had in itertools.product(((signal.SIGINT, 130), (signal.SIGTERM, 143)), (False, True)):
        def execute(notebook, executed, given, number=number, had=had):
            if had:
                Path(given['save_dir'], 'metrics.csv').write_text('whole')
            os.kill(os.getpid(), number)
        monkeypatch.setattr(cli, 'execute', execute)
        kept = 'what was finished is kept in' if had else 'nothing is left half-written'
        assert_sentence(medfusion(*words), kept, f'To begin again: {shlex.join(["medfusion", *words])}', code=code)
        assert [path.name for path in sorted(Path().rglob('*')) if path not in before and path.is_file()] == ['metrics.csv'] * had
        shutil.rmtree('results')


class StoppedAt:
    "`os` as medfusion.files sees it; before the call number `at` of those that change the disk, the signal `number` arrives."

    def __init__(self, number, at):
        self.number, self.at, self.calls = number, at, 0

    def __getattr__(self, name):
        if name in ('open', 'write', 'fsync', 'close', 'replace', 'unlink'):
            self.calls += 1
            if self.calls == self.at:
                signal.raise_signal(self.number)
        return getattr(os, name)


@pytest.mark.parametrize('name', ['external_dir', 'published'])
def test_a_benchmark_looks_for_what_was_named_at_once(pairs, no_kernel, name):
    assert_sentence(medfusion('benchmark', '-p', 'ct_dir=CT', '-p', 'mri_dir=MRI', '-p', f'{name}=nowhere'), 'no file or folder', 'nowhere')


def test_a_finished_benchmark_is_shown(pairs):
    Path('toy').mkdir()
    assert_sentence(medfusion('benchmark', '--record', 'nowhere'), 'no file or folder', 'nowhere')
    assert_sentence(medfusion('benchmark', '--record', 'toy'), 'toy holds no metrics.csv')
    Path('toy/metrics.csv').write_text('# a convention\nname,method,case,EN,SD\n1002.png,one,1,2.5,60\n1002.png,two,1,3.5,50\n')
    result = medfusion('benchmark', '--record', 'toy', '--columns', 'EN')
    assert result.exit_code == 0 and 'EN ↑' in result.stdout and 'SD' not in result.stdout and '3.50' in result.stdout
    once, twice = (medfusion('benchmark', '--record', 'toy', '--methods', methods, '--columns', columns).stdout
                   for methods, columns in (('one,two', 'EN,SD'), ('one,two,one', 'EN,SD,EN')))
    assert once == twice and 'over 1 slice' in once
    Path('toy/summary.csv').write_text('method,trained_on,EN\none,,2.5\ntwo,1,3.5\n')
    marked = medfusion('benchmark', '--record', 'toy', '--columns', 'EN', '--latex', 'a.tex', '--markdown', 'a.md').stdout
    assert 'two †' in marked and 'one †' not in marked and '† This network was trained on slices of a case that is judged here.' in marked
    assert 'two †' in Path('a.md').read_text() and r'two $^\dagger$' in Path('a.tex').read_text()


@pytest.mark.parametrize('typed, vain', [
    (['benchmark', '--record', 'toy', '-m', 'maximum', '-p', 'ct_dir=CT', '--run', 'a', '--detection', '--columns', 'EN'], '--parameter, --run, --model, --detection'),
    (['evaluate', 'CT', '--task', 'task', '--jobs', '1', '--preset', 'cvpr', '--pattern', '{name}_f.png', '--range', '0,1'], '--preset, --range, --jobs, --pattern'),
    (['evaluate', 'CT', 'MRI', '--task', 'task', '--csv', 'a.csv', '--range', '0,1'], '--csv'),
    (['data', 'check', 'CT', '--train', 'CT', '--test', 'CT', '--range', '0,1'], 'ROOT, --range')])
def test_an_option_that_would_do_nothing_is_refused(pairs, typed, vain):
    before = sorted(Path().rglob('*'))
    result = medfusion(*typed)
    assert result.exit_code == 2 and f'{vain} would do nothing with {"--record" if "toy" in typed else "--task" if "--task" in typed else "--train"}' in ' '.join(result.stderr.replace('│', ' ').split())
    assert sorted(Path().rglob('*')) == before


def test_a_rule_is_listed_once_with_its_other_names():
    [rules] = [line for line in medfusion('models').stdout.splitlines() if line.startswith('Rules: ')]
    assert 'laplacian (laplacian_pyramid or pyramid)' in rules and 'wavelet_maximum (wavelet-max)' in rules and 'maximum, ' in rules


@pytest.mark.fault('export, figure, runs, benchmark', 'stopped (Ctrl-C, SIGTERM)')
@pytest.mark.parametrize('words, files', [
    (['export', 'wavelet-lite', 'a.safetensors', '--replace'], ['a.safetensors', 'metadata.json']),
    pytest.param(['figure', 'CT/1002.png', 'MRI/1002.png', '-m', 'maximum', '-o', 'a.svg', '--replace'], ['a.svg'], marks=pytest.mark.long),
    (['runs', 'toy', '--csv', 'a.csv', '--markdown', 'a.md'], ['a.csv', 'a.md']),
    (['benchmark', '--record', 'toy', '--columns', 'EN', '--latex', 'a.tex', '--markdown', 'a.md'], ['a.tex', 'a.md'])])
def test_stopped_at_any_write(pairs, words, files, monkeypatch, record_property):
    "Wherever it comes: one sentence, the status of the signal, each file the old one or the new one, whole, and nothing beside them."
    for side in ('CT', 'MRI'):
        shutil.copy(Path(side, pairs[0]), Path(side, '1002.png'))
    write_run(Path.cwd() / 'toy/r1', method='toy', parameters={'seed': 1}, state='finished', started=1, numbers={'means': {'x': {'EN': 1.}}})
    Path('toy/metrics.csv').write_text('# a convention\nname,method,case,EN\n1002.png,one,1,2.5\n1002.png,two,1,3.5\n')
    assert medfusion(*words).exit_code == 0
    new = {name: Path(name).read_bytes() for name in files}
    for at in itertools.count(1):
        for name in files:
            Path(name).write_bytes(b'old')
        before, (number, code) = sorted(Path().rglob('*')), ((signal.SIGINT, 130), (signal.SIGTERM, 143))[at % 2]
        with monkeypatch.context() as patched:
            patched.setattr('medfusion.files.os', StoppedAt(number, at))
            result = medfusion(*words)
        found = {name: Path(name).read_bytes() for name in files}
        assert sorted(Path().rglob('*')) == before and all(found[name] in (b'old', new[name]) for name in files), at
        if result.exit_code == 0:
            break
        assert_sentence(result, 'stopped; nothing is left half-written. To begin again: ' + shlex.join(['medfusion', *words]), code=code)
    record_property('points', at - 1)
    assert found == new and at > 5 * len(files)


def test_a_home_folder_that_cannot_be_written_is_told_before_the_viewer_begins(tmp_path, monkeypatch):
    "JupyterLab, which keeps its files there, ends in a hundred lines. A file stands for such a folder, for root too."
    Path(tmp_path, 'file').touch()
    monkeypatch.setattr('medfusion.scan_viewer.record_in', lambda folder: {})
    monkeypatch.setattr('medfusion.scan_viewer.subprocess.Popen', lambda *_, **more: pytest.fail('a server was started'))
    for name in ('JUPYTER_RUNTIME_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_PLATFORM_DIRS', 'XDG_DATA_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path / 'file'))
    assert_sentence(medfusion('view', tmp_path), 'JupyterLab', str(tmp_path / 'file'), 'cannot be made (Not a directory)', 'HOME')


@pytest.mark.fault('view', 'stopped (Ctrl-C, SIGTERM)', points=2)
def test_a_stopped_viewer_ends_its_server(pairs, monkeypatch):
    "And removes the notebook that it opened."
    served = []

    class Server:
        def __init__(self, command, **more):
            served.append((Path(command[-1]), Path(command[-1]).is_file()))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            served.append('waited for')

        def wait(self):
            os.kill(os.getpid(), number)
            time.sleep(10)

        def terminate(self):
            served.append('ended')
    monkeypatch.setattr('medfusion.scan_viewer.viewer_notebook', lambda folder: {'cells': [{}, {'source': ''}]})
    monkeypatch.setattr('medfusion.scan_viewer.find_spec', lambda name: True)
    monkeypatch.setattr('medfusion.scan_viewer.subprocess.Popen', Server)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        served.clear()
        assert_sentence(medfusion('view', 'CT'), 'stopped', 'medfusion view CT', code=code)
        (notebook, there), *after = served
        assert there and not notebook.parent.exists() and after == ['ended', 'waited for']


@pytest.mark.parametrize('many', [10**12, 10**30])
def test_a_batch_of_any_size(pairs, many):
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum', '--batch-size', many)
    assert result.exit_code == 0 and '3 fused' in result.stdout, result.output


def test_what_a_method_cannot_do_is_noticed_at_once(pairs, no_kernel):
    places = ['-p', 'ct_dir=CT', '-p', 'mri_dir=MRI', '-p', 'save_dir=results']
    assert_sentence(medfusion('train', 'resnet', *places, '-p', 'crop=32'), 'crop is 32')
    assert_sentence(medfusion('train', 'wavelet', '-p', 'ct_dir=CT', '-p', 'save_dir=results'), 'ct_dir was given without mri_dir')
    assert_sentence(medfusion('benchmark', '-p', 'mri_dir=MRI', '-p', 'save_dir=results'), 'mri_dir was given without ct_dir')
    assert_sentence(medfusion('train', 'wavelet', *places, '-p', 'ct_val_dir=CT'), 'ct_val_dir was given without mri_val_dir')
    assert_sentence(medfusion('train', 'wavelet', *places, '-p', 'value_range=5'), "'5' is no range of values")
    for text, words in (('5', "'5' is no range of values"), ('', 'an empty range was given')):
        result = medfusion('train', 'wavelet', *places, '--range', text)
        assert result.exit_code == 2 and words in ' '.join(result.stderr.replace('│', ' ').split())
    for model, words in (('nobody', 'no model'), ('wavelet@2', 'a number from 0 to 1'), ('wavelet@1.5', 'lesions is 1.5'), ('wavelet-lite@1', 'no dial'), ('gone.pt@1', 'no model')):
        assert_sentence(medfusion('train', 'wavelet', *places, '-p', f'start={model}'), words)
        assert_sentence(medfusion('benchmark', *places, '-m', f'mine={model}'), words)
    assert not Path('results').exists()


@pytest.mark.parametrize('method, epoch', [('wavelet', 'trainable_wavelet_fusion/wavelet_fusion_spatial_epoch_3.pt'),
                                           ('resnet', 'resnet_fusion/resnet_fusion_epoch_010.pt')])
def test_checkpoints_of_another_run_are_noticed_at_once(pairs, no_kernel, monkeypatch, method, epoch):
    "And another run that is at work there."
    from medfusion.runs import claim_folder
    arguments = ['train', method, '-p', 'ct_dir=CT', '-p', 'mri_dir=MRI', '-p', 'save_dir=results', '-p', 'checkpoint_dir=kept']
    place = Path('kept/intermediate', epoch)
    place.parent.mkdir(parents=True)
    place.write_bytes(b'')
    assert_sentence(medfusion(*arguments), 'holds 1 checkpoints', '-p resume=true', '-p replace=true')
    monkeypatch.delenv('MEDFUSION_COMMAND')
    assert_sentence(medfusion(*arguments, '--processes', '2', '--run', 'b'), 'checkpoint_dir=kept --processes 2 --run b -p resume=true.')
    place.unlink()
    monkeypatch.setattr('medfusion.runs.claim_folder', partial(claim_folder, patience=0))
    with claim_folder(place.parent.absolute()):
        assert_sentence(medfusion(*arguments), 'Another run is writing to')
    assert not Path('results').exists()


def test_a_range_for_training(pairs, monkeypatch):
    "It reaches the notebook as a parameter, and the data sets of both methods."
    given = {}
    monkeypatch.setattr(cli, 'execute', lambda notebook, executed, parameters: given.update(parameters))
    result = medfusion('train', 'wavelet', '-p', 'ct_dir=CT', '-p', 'mri_dir=MRI', '-p', 'save_dir=results', '--range', '0,4095')
    assert result.exit_code == 0 and given['value_range'] == '0,4095', result.output
    assert result.stdout.splitlines()[-1].endswith(' --range 0,4095')     # with which to fuse by the new network


def test_train_and_benchmark_outside_a_clone(monkeypatch, tmp_path):
    def none():
        raise FileNotFoundError('There is no clone of the repository here; change into one.')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('medfusion.runs.nbs_dir', none)
    assert_sentence(medfusion('train', 'resnet'), 'clone')
    assert_sentence(medfusion('benchmark'), 'clone')
    for command in (['train', 'resnet'], ['sweep', 'wavelet'], ['benchmark']):
        helped = medfusion(*command, '--help')
        assert helped.exit_code == 0 and 'Works inside a clone' in helped.stdout and '--file' in helped.stdout and 'change into one' in helped.stdout
    assert all('Works inside a clone' in medfusion(command, '--help').stdout for command in ('scan', 'sweep'))
