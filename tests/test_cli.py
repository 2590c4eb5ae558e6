"""The `medfusion` command: exit codes, sentences on standard error, and what is on the disk afterwards."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from medfusion.cli import app
from medfusion.files import read_image, to_depth, write_image
from medfusion.phantom import phantom_slice
from medfusion.files import sha256_of
from medfusion.runs import save_checkpoint


def medfusion(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_sentence(result, *words, code=1):
    "A failure is an exit code and one line on standard error, not a traceback."
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('medfusion: '), result.stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    "The current folder holds CT/ and MRI/ with three pairs, and checkpoints with an untrained wavelet network."
    from medfusion.wavelet_fusion import WaveletFusion
    for folder in ('CT', 'MRI'):
        (tmp_path / folder).mkdir()
    for i in range(3):
        head = phantom_slice('7', i + 2, size=64)
        write_image(tmp_path / 'CT' / head.name, to_depth(head.ct, np.uint8))
        write_image(tmp_path / 'MRI' / head.name, to_depth(head.mri, np.uint8))
    final = tmp_path / 'checkpoints' / 'final' / 'trainable_wavelet_fusion'
    final.mkdir(parents=True)
    model = WaveletFusion()
    path = final / 'wavelet_fusion_spatial_best.pt'
    save_checkpoint(path, method='trainable_wavelet_fusion', config=model.config, state_dict=model.state_dict(), epoch=1, metrics={})
    numbers = {'cases': '41', 'convention': 'cvpr conventions', 'means': {'SF': 31.25, 'VIF': 0.71239}}
    metadata = {'sha256': sha256_of(path), 'shipped': True, 'numbers': numbers}
    (final / 'metadata.json').write_text(json.dumps(metadata))
    monkeypatch.setenv('MEDFUSION_CHECKPOINTS', str(tmp_path / 'checkpoints'))
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
    for arguments in (['fuse', 'a'], ['nothing'], ['train', 'magic'], ['data', 'phantom', '--size', '3'], ['evaluate', 'a', 'b', 'c', '--preset', 'x']):
        assert medfusion(*arguments).exit_code == 2


def test_the_installed_command(pairs):
    command = Path(sys.executable).with_name('medfusion')
    if not command.exists():
        pytest.skip(f'{command} is not there: the package is not installed in this environment')
    done = subprocess.run([command, 'fuse', 'CT', 'nowhere', '-o', 'out'], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr


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


def test_data_import(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ('CT', 'MRI'):
        Path('source', folder).mkdir(parents=True)
        for case in range(1, 5):
            write_image(Path('source', folder, f'{case}001.png'), np.full((20, 20), 10 * case, np.uint8))
    result = medfusion('data', 'import', 'source', 'mine')
    assert result.exit_code == 0, result.output
    assert [len(list(Path('mine').glob(f'{part}/CT/*.png'))) for part in ('train', 'val', 'test')] == [2, 1, 1]
    assert_sentence(medfusion('data', 'import', 'nowhere', 'other'), 'nowhere')
    assert not Path('other').exists()


# Fuse

def test_fuse_files(pairs):
    result = medfusion('fuse', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', '-o', 'fused.png')
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == 'fused.png' and read_image('fused.png').shape == (64, 64)
    Path('out').mkdir()
    medfusion('fuse', f'CT/{pairs[1]}', f'MRI/{pairs[1]}', '-o', 'out', '--model', 'checkpoints/final/trainable_wavelet_fusion/wavelet_fusion_spatial_best.pt')
    assert read_image(Path('out', pairs[1])).dtype == np.uint8


def test_fuse_folders(pairs):
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out')
    assert result.exit_code == 0 and result.stdout.startswith('3 fused') and not result.stderr
    again = medfusion('fuse', 'CT', 'MRI', '-o', 'out')
    assert again.exit_code == 0 and again.stdout.startswith('0 fused, 3 already there')


def test_a_bad_pair_is_in_the_exit_status(pairs):
    Path('MRI', pairs[1]).write_bytes(b'')
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out')
    assert result.exit_code == 1 and not result.stdout and 'Traceback' not in result.stderr
    assert f'{pairs[1]}: ' in result.stderr and '2 fused' in result.stderr
    assert sorted(path.name for path in Path('out').glob('*.png')) == [pairs[0], pairs[2]]


def test_what_fuse_refuses(pairs):
    one = f'CT/{pairs[0]}'
    assert_sentence(medfusion('fuse', one, 'MRI', '-o', 'x.png'), 'two files or two folders')
    assert_sentence(medfusion('fuse', 'CT/none.png', f'MRI/{pairs[0]}', '-o', 'x.png'), 'none.png')
    assert_sentence(medfusion('fuse', one, f'MRI/{pairs[0]}', '-o', one), 'one of the slices')
    assert_sentence(medfusion('fuse', one, f'MRI/{pairs[0]}', '-o', 'x.txt'), 'x.txt')
    assert_sentence(medfusion('fuse', one, f'MRI/{pairs[0]}', '-o', 'x.png', '--model', 'wavlet'), 'wavlet')
    assert_sentence(medfusion('fuse', 'CT', 'MRI', '-o', 'CT'), 'the slices themselves')
    Path('theirs').mkdir()
    Path('theirs', 'fused_with.json').write_text(json.dumps({'model': 'other', 'weights_sha256': '0' * 64}))
    assert_sentence(medfusion('fuse', 'CT', 'MRI', '-o', 'theirs'), 'another network', '--replace')
    assert not Path('x.png').exists() and not Path('x.txt').exists()


def test_a_warning_is_a_sentence_too(pairs):
    next(Path('checkpoints').glob('**/metadata.json')).unlink()
    result = medfusion('fuse', 'CT', 'MRI', '-o', 'out')
    assert result.exit_code == 0 and result.stderr.startswith('medfusion: ') and 'not the shipped' in result.stderr
    assert result.stderr.count('\n') == 1


# Evaluate

def test_evaluate_folders_and_files(pairs):
    medfusion('fuse', 'CT', 'MRI', '-o', 'out')
    result = medfusion('evaluate', 'CT', 'MRI', 'out', '--csv', 'table.csv')
    assert result.exit_code == 0, result.output
    assert '3 pairs' in result.stdout and 'Qabf' in result.stdout and 'mean' in result.stdout
    text = Path('table.csv').read_text()
    assert all(name in text for name in pairs)
    one = medfusion('evaluate', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', f'out/{pairs[0]}', '--preset', 'textbook')
    assert one.exit_code == 0 and pairs[0] in one.stdout
    assert_sentence(medfusion('evaluate', 'CT', 'MRI', f'out/{pairs[0]}'), 'three files or three folders')


def test_one_pair_has_the_numbers_of_its_row_in_the_folder(pairs):
    from medfusion.metrics import read_table
    medfusion('fuse', 'CT', 'MRI', '-o', 'out')
    medfusion('evaluate', 'CT', 'MRI', 'out', '--csv', 'all.csv')
    medfusion('evaluate', f'CT/{pairs[0]}', f'MRI/{pairs[0]}', f'out/{pairs[0]}', '--csv', 'one.csv')
    together, alone = read_table('all.csv'), read_table('one.csv')
    np.testing.assert_allclose(alone.loc[pairs[0]], together.loc[pairs[0], alone.columns], rtol=1e-4)


# Models

def test_models(pairs):
    result = medfusion('models')
    assert result.exit_code == 0 and 'as shipped' in result.stdout and 'resnet: resnet_fusion, missing' in result.stdout
    assert 'means on cases 41; cvpr conventions\n  SF 31.25, VIF 0.7124\n' in result.stdout


def test_a_network_trained_here_does_not_count_as_shipped(pairs):
    path = next(Path('checkpoints').glob('**/metadata.json'))
    record = json.loads(path.read_text())
    del record['numbers']
    path.write_text(json.dumps({**record, 'shipped': False}))
    result = medfusion('models')
    assert result.exit_code == 0 and 'not the shipped file' in result.stdout and 'means' not in result.stdout


def test_models_outside_a_clone(monkeypatch):
    monkeypatch.delenv('MEDFUSION_CHECKPOINTS', raising=False)
    no_clone(monkeypatch)
    assert_sentence(medfusion('models'), 'MEDFUSION_CHECKPOINTS')


# Train: a small clone with a notebook that needs no training stands for the real one

def no_clone(monkeypatch):
    from medfusion import inference, training

    def none():
        raise FileNotFoundError('There is no clone of the repository here; change into one.')
    monkeypatch.setattr(training, 'nbs_dir', none)
    monkeypatch.setattr(inference, 'nbs_dir', none)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A folder that looks like a clone, with a method notebook that prints and can fail."
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = medfusion\nnbs_path = nbs\n')
    cells = [new_code_cell("save_dir: str = '../results/trainable_wavelet_fusion'\nrun: str = 'latest'\nnum_epochs: int = 20\n"
                           "lr: float = 1e-3\nct_dir: str = '../Dataset/train/CT'\nresume: bool = False",
                           metadata={'tags': ['parameters']}),
             new_code_cell("import json, pathlib\nfolder = pathlib.Path(save_dir) / run\n"
                           "(folder / 'seen.json').write_text(json.dumps([run, num_epochs, lr, ct_dir, resume]))\n"
                           "print('epoch', num_epochs)"),
             new_code_cell("if num_epochs == 13:\n    raise ValueError('thirteen epochs')")]
    nbformat.write(new_notebook(cells=cells), tmp_path / 'nbs' / 'trainable-wavelet-fusion.ipynb')
    cells = [new_code_cell("save_dir: str = '../results/benchmark'\ncheckpoints: list[str] = ['wavelet', 'resnet']",
                           metadata={'tags': ['parameters']}),
             new_code_cell("import json, pathlib\n(pathlib.Path(save_dir) / 'seen.json').write_text(json.dumps(checkpoints))")]
    nbformat.write(new_notebook(cells=cells), tmp_path / 'nbs' / '90_benchmark.ipynb')
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path


def test_train(clone):
    Path('x.yaml').write_text(yaml.safe_dump({'lr': 0.5, 'num_epochs': 3, 'ct_dir': '../elsewhere/CT'}))
    result = medfusion('train', 'wavelet', '-f', 'x.yaml', '-p', 'epochs=5', '-p', 'resume=true', '--run', 'a')
    assert result.exit_code == 0, result.output
    folder = clone / 'results' / 'trainable_wavelet_fusion' / 'a'
    assert json.loads((folder / 'seen.json').read_text()) == ['a', 5, 0.5, '../elsewhere/CT', True]
    assert (folder / 'executed.ipynb').is_file() and 'epoch 5' in result.stdout and str(folder) in result.stdout


def test_typed_folders_are_seen_from_the_shell(clone):
    result = medfusion('train', 'wavelet', '-p', 'ct_dir=my/CT', '-p', 'save_dir=runs', '-p', 'run=2')
    assert result.exit_code == 0, result.output
    assert json.loads(Path('runs/2/seen.json').read_text())[:4] == ['2', 20, 0.001, str(Path.cwd() / 'my/CT')]


@pytest.mark.parametrize('typed, folder', [([], '../results/benchmark'), (['-p', 'save_dir=tables'], 'tables')])
def test_benchmark_has_a_folder_for_each_run_like_train(clone, typed, folder):
    Path('mine.pt').write_bytes(b'')
    result = medfusion('benchmark', '-p', 'checkpoints=[wavelet, mine.pt]', '--run', 'a', *typed)
    assert result.exit_code == 0, result.output
    assert json.loads(Path(folder, 'a', 'seen.json').read_text()) == ['wavelet', str(Path.cwd() / 'mine.pt')]
    assert Path(folder, 'a', 'executed.ipynb').is_file()
    assert_sentence(medfusion('benchmark', '-p', 'checkpoints=[wavelet'), 'checkpoints', 'list[str]')


def test_a_failing_notebook_is_kept(clone):
    result = medfusion('train', 'wavelet', '-p', 'num_epochs=13', '--run', 'b')
    executed = clone / 'results' / 'trainable_wavelet_fusion' / 'b' / 'executed.ipynb'
    assert result.exit_code == 1 and executed.is_file() and 'thirteen epochs' in executed.read_text()
    last = result.stderr.strip().splitlines()[-1]
    assert 'thirteen epochs' in last and str(executed) in last and isinstance(result.exception, SystemExit)


@pytest.mark.parametrize('arguments, words', [
    (['-p', 'num_epoch=5'], ['num_epoch', 'num_epochs']),
    (['-p', 'num_epochs=many'], ['num_epochs', 'int']),
    (['-p', 'lr'], ['lr=VALUE']),
    (['-f', 'broken.yaml'], ['broken.yaml', 'YAML']),
    (['-f', 'list.yaml'], ['list.yaml', 'name: value']),
    (['-f', 'missing.yaml'], ['missing.yaml']),
    (['--run', 'taken'], ['taken', 'file']),
])
def test_parameters_are_checked_before_anything_is_made(clone, arguments, words):
    Path('broken.yaml').write_text('a: [1')
    Path('list.yaml').write_text('- 1')
    if 'taken' in arguments:
        (clone / 'results' / 'trainable_wavelet_fusion').mkdir(parents=True)
        (clone / 'results' / 'trainable_wavelet_fusion' / 'taken').write_text('')
    assert_sentence(medfusion('train', 'wavelet', *arguments), *words)
    assert 'taken' in arguments or not (clone / 'results').exists()


def test_train_and_benchmark_outside_a_clone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    no_clone(monkeypatch)
    assert_sentence(medfusion('train', 'resnet'), 'clone')
    assert_sentence(medfusion('benchmark'), 'clone')
