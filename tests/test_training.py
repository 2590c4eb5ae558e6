"""What the training notebook cannot show: kills at every point, full disks, damaged files, papermill."""
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medfusion import training
from medfusion.files import sha256_of, write_atomically
from medfusion.runs import (CheckpointFiles, check_parameters, claim_folder, load_checkpoint, nbs_dir,
                            notebook_parameters, read_parameters, resolve_path, save_checkpoint)
from medfusion.training import fit

ROOT = Path(__file__).resolve().parents[1]


# ---- a small run --------------------------------------------------------------------------------------------------

class Numbers(torch.utils.data.Dataset):
    "Eight pairs x, y; what x is depends on the epoch, as augmentation would make it."
    epoch = 0

    def __len__(self):
        return 8

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        x = torch.tensor([index / 8 + 0.01 * self.epoch])
        return {'name': f'{index:05d}.png', 'x': x, 'y': 2 * x + 1}


def step(model, batch):
    noise = random.random() + np.random.rand()    # all generators take part
    loss = (model(batch['x']) - batch['y'] + 0.01 * noise).square().mean()
    return {'loss': loss, 'rmse': loss.sqrt()}


def toy_files(folder):
    return CheckpointFiles(folder / 'intermediate', folder / 'final', 'net_epoch_{epoch:03d}.pt', 'net_best.pt',
                           'net_final.pt', 'history.pt')


def run(folder, epochs=4, lr=0.1, width=4, step=step, scheduler=True, val_set=Numbers(), **more):
    "A training run into `folder` with everything made anew."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4) if scheduler else None
    settings = dict(epochs=epochs, batch_size=3, optimizer=optimizer, scheduler=schedule, method='toy',
                    config={'width': width}, run_dir=folder / 'run', progress='none', ema=0.9, clip=1.0) | more
    return net, fit(net, step, Numbers(), val_set, toy_files(folder), **settings)


def written(folder):
    "The content of every file that a run left, by its path in the folder; checkpoints loaded, tensors as their bytes."
    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, value.numpy().tobytes()
        if isinstance(value, dict):
            # without the sha256: whether equal values are one object shows in the pickle and nowhere else
            return {name: plain(one) for name, one in value.items() if name != 'sha256'}
        return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value
    readers = {'.pt': lambda path: torch.load(path, weights_only=True),
               '.json': lambda path: json.loads(path.read_text())}
    return {str(path.relative_to(folder)): plain(readers.get(path.suffix, Path.read_bytes)(path))
            for path in sorted(folder.rglob('*')) if path.is_file() and path.name != '.running.lock'}


def in_child(function):
    "The wait status of a child process that runs `function`; forked, because importing torch takes seconds."
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.fixture(autouse=True, scope='module')
def quick():
    "One thread, as a forked child can have no more; no waiting for the disk, which a killed process does not need."
    threads, fsync = torch.get_num_threads(), os.fsync
    torch.set_num_threads(1)
    os.fsync = lambda file: None
    yield
    torch.set_num_threads(threads)
    os.fsync = fsync


@pytest.fixture(scope='module')
def straight(tmp_path_factory, quick):
    "What a run that nothing disturbs leaves."
    folder = tmp_path_factory.mktemp('straight')
    run(folder)
    return written(folder)


# ---- resuming -----------------------------------------------------------------------------------------------------

def kill_after(events):
    "Make this process kill itself at the n-th event: before or after a file is renamed, or in a training step."
    left = [events]

    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace

    def counted_replace(*arguments):
        count()
        replace(*arguments)
        count()

    def counted_step(model, batch):
        count()
        return step(model, batch)

    os.replace = counted_replace
    return counted_step


def test_a_run_killed_anywhere_continues_bit_for_bit(tmp_path, straight):
    "At each file and each step of the second epoch; the first epoch has 18 events, the run 66."
    for events in range(18, 36):
        folder = tmp_path / str(events)
        status = in_child(lambda: run(folder, step=kill_after(events)))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        run(folder, resume=True)
        assert written(folder) == straight, f'killed at event {events}'


def test_killed_again_and_again(tmp_path, straight):
    for events in (7, 20, 33, 5, 30, 24):
        assert os.WIFSIGNALED(in_child(lambda: run(tmp_path, resume=True, step=kill_after(events))))
    run(tmp_path, resume=True)
    assert written(tmp_path) == straight


def test_checkpoints_every_third_epoch_and_after_the_last(tmp_path):
    run(tmp_path / 'a', epochs=4, every=3)
    assert toy_files(tmp_path / 'a').saved_epochs() == [4, 3]
    in_child(lambda: run(tmp_path / 'b', every=3, step=kill_after(38)))
    run(tmp_path / 'b', every=3, resume=True)
    assert written(tmp_path / 'a') == written(tmp_path / 'b')


def test_more_epochs_than_before_and_fewer(tmp_path):
    run(tmp_path / 'long', epochs=4, scheduler=False)
    run(tmp_path / 'grown', epochs=2, scheduler=False)
    run(tmp_path / 'grown', epochs=4, scheduler=False, resume=True)
    assert written(tmp_path / 'long') == written(tmp_path / 'grown')
    run(tmp_path / 'grown', epochs=2, scheduler=False, resume=True)
    final = load_checkpoint(tmp_path / 'grown' / 'final' / 'net_final.pt')
    assert final['epoch'] == 2 and len(torch.load(tmp_path / 'grown' / 'final' / 'history.pt')['epoch']) == 2


def test_resuming_a_finished_run_changes_nothing(tmp_path, straight):
    run(tmp_path)
    net, history = run(tmp_path, resume=True)
    assert written(tmp_path) == straight and len(history) == 4
    assert torch.equal(net[0].weight, load_checkpoint(tmp_path / 'final' / 'net_final.pt')['state_dict']['0.weight'])


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'text', 'flipped', 'foreign dictionary', 'other method',
                                    'other width', 'weights only'])
def test_a_bad_checkpoint_is_refused_and_the_one_before_is_used(tmp_path, straight, capsys, damage):
    run(tmp_path)
    path = toy_files(tmp_path).epoch(4)
    good = load_checkpoint(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(good['state_dict']['0.weight'].numpy().tobytes())] ^= 0xff
    if damage in ('truncated', 'empty', 'text', 'flipped'):
        path.write_bytes({'truncated': whole[:-900], 'empty': b'', 'text': b'hello\n' * 50, 'flipped': flipped}[damage])
    elif damage == 'foreign dictionary':
        torch.save({'weights': torch.zeros(3)}, path)
    elif damage == 'weights only':
        shutil.copy(tmp_path / 'final' / 'net_final.pt', path)
    else:
        torch.save(good | ({'method': 'other'} if damage == 'other method' else
                           {'settings': good['settings'] | {'config': {'width': 5}}}), path)
    run(tmp_path, resume=True)
    said = capsys.readouterr().out
    assert 'net_epoch_004.pt is not continued: it' in said and 'continues after epoch 3' in said
    assert written(tmp_path) == straight


def test_without_a_good_checkpoint_a_resumed_run_starts_anew(tmp_path, straight, capsys):
    toy_files(tmp_path).intermediate.mkdir()
    toy_files(tmp_path).epoch(2).write_bytes(b'nothing')
    run(tmp_path, resume=True)
    said = capsys.readouterr().out
    assert 'net_epoch_002.pt is not continued' in said and 'starts with epoch 1' in said
    assert written(tmp_path) == straight


@pytest.mark.parametrize('changed, words', [
    (dict(lr=0.2), 'lr is 0.1, and 0.2'), (dict(width=5), 'config width is 4, and 5'),
    (dict(seed=1), 'seed is 0, and 1'), (dict(batch_size=2), 'batch_size is 3, and 2'),
    (dict(clip=None), 'clip is 1.0, and None'), (dict(scheduler=False), 'its scheduler')])
def test_other_settings_are_not_continued(tmp_path, capsys, changed, words):
    run(tmp_path / 'a', epochs=1)
    run(tmp_path / 'a', epochs=1, resume=True, **changed)
    assert words in capsys.readouterr().out
    run(tmp_path / 'b', epochs=1, **changed)
    assert written(tmp_path / 'a') == written(tmp_path / 'b')    # it did start anew


def test_a_new_run_removes_the_checkpoints_of_the_old_one(tmp_path, capsys):
    run(tmp_path, epochs=4)
    (tmp_path / 'intermediate' / '.net_epoch_003.pt.99.tmp').write_bytes(b'half')
    (tmp_path / 'intermediate' / 'notes about epoch 3.txt').write_text('mine')
    run(tmp_path, epochs=1)
    assert toy_files(tmp_path).saved_epochs() == [1]
    assert '4 intermediate checkpoints of an earlier run were removed' in capsys.readouterr().out
    left = {path.name for path in (tmp_path / 'intermediate').iterdir()}
    assert left == {'net_epoch_001.pt', 'notes about epoch 3.txt', '.running.lock'}


def test_the_same_objects_can_be_trained_on(tmp_path):
    "In JupyterLab, the cell with fit is interrupted and run again with resume=True, with the objects of before."
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    common = dict(batch_size=3, optimizer=optimizer, scheduler=scheduler, method='toy', config={}, progress='none')
    fit(net, step, Numbers(), None, toy_files(tmp_path), epochs=2, **common)
    history = fit(net, step, Numbers(), None, toy_files(tmp_path), epochs=3, resume=True, **common)
    assert [row['lr'] for row in history] == [0.1, 0.05, 0.025]
    with pytest.warns(UserWarning, match='made steps before'):
        fit(net, step, Numbers(), None, toy_files(tmp_path), epochs=1, **common)


# ---- what fit refuses, and what it leaves -------------------------------------------------------------------------

def test_checkpoints_hold_what_the_contract_says(tmp_path, straight):
    net, history = run(tmp_path)
    best = load_checkpoint(tmp_path / 'final' / 'net_best.pt', method='toy')
    assert list(best) == ['format', 'method', 'config', 'state_dict', 'epoch', 'metrics', 'versions', 'data_sha256']
    assert best['metrics'] == min(history, key=lambda row: row['val_loss'])
    metadata = json.loads((tmp_path / 'final' / 'metadata.json').read_text())
    assert metadata['sha256'] == sha256_of(tmp_path / 'final' / 'net_best.pt') and metadata['config'] == {'width': 4}
    with open(tmp_path / 'run' / 'history.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['val_loss']) for row in rows] == [row['val_loss'] for row in history]
    assert list(rows[0]) == ['epoch', 'lr', 'train_loss', 'train_rmse', 'val_loss', 'val_rmse']
    assert torch.load(tmp_path / 'final' / 'history.pt')['train_loss'] == [row['train_loss'] for row in history]


def test_the_validated_weights_are_the_averaged_ones(tmp_path):
    net, history = run(tmp_path, step=lambda model, batch: {'loss': (model(batch['x']) - batch['y']).square().mean()})
    net.load_state_dict(load_checkpoint(tmp_path / 'final' / 'net_final.pt')['state_dict'])
    data = Numbers()
    data.set_epoch(4)
    items = [data[i] for i in range(8)]
    x, y = (torch.stack([item[name] for item in items]) for name in 'xy')
    with torch.no_grad():
        loss = (net(x) - y).square().mean()
    assert history[-1]['val_loss'] == pytest.approx(loss.item(), rel=1e-5)


def test_without_validation_the_training_loss_decides(tmp_path, capsys):
    net, history = run(tmp_path, val_set=None)
    best = load_checkpoint(tmp_path / 'final' / 'net_best.pt')
    assert best['metrics']['train_loss'] == min(row['train_loss'] for row in history)
    assert 'nothing was validated' in capsys.readouterr().out


def test_workers_change_nothing(tmp_path):
    plain = lambda model, batch: {'loss': (model(batch['x']) - batch['y']).square().mean()}
    _, alone = run(tmp_path / 'a', epochs=2, step=plain, ema=None)
    _, helped = run(tmp_path / 'b', epochs=2, step=plain, ema=None, workers=1)
    assert alone == helped


def test_progress_by_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.delenv('MEDFUSION_PROGRESS', raising=False)
    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)
    run(tmp_path, epochs=2, progress=None)
    said = capsys.readouterr()
    assert 'epoch   1/2  train_loss ' in said.out and ' s left' in said.out and said.err == ''
    monkeypatch.setenv('MEDFUSION_PROGRESS', 'none')
    run(tmp_path, epochs=2, progress=None)
    assert 'epoch   1/2' not in capsys.readouterr().out
    run(tmp_path, epochs=2, progress='bar')
    assert 'batch' in capsys.readouterr().err


def test_bfloat16_and_back(tmp_path):
    net, history = run(tmp_path / 'a', epochs=1, precision='bf16')
    assert np.isfinite(history[0]['val_loss'])
    assert net(torch.zeros(2, 1)).dtype == torch.float32    # the network is given back as it was
    assert run(tmp_path / 'b', epochs=1)[1] != history


def test_plateau_scheduler(tmp_path):
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
    history = fit(net, step, Numbers(), Numbers(), toy_files(tmp_path), epochs=3, batch_size=8, optimizer=optimizer,
                  scheduler=scheduler, method='toy', config={}, progress='none')
    assert history[2]['lr'] < history[0]['lr']


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def broken(model, batch):
        values = step(model, batch)
        wrong = '00003.png' in batch['name'] and Numbers.calls > 8
        Numbers.calls += 1
        return values | ({'loss': values['loss'] * float('nan')} if wrong else {})
    Numbers.calls = 0
    with pytest.raises(FloatingPointError, match=r'loss is nan in epoch 2, for .*00003\.png'):
        run(tmp_path, step=broken)
    assert toy_files(tmp_path).saved_epochs() == [1]
    with claim_folder(tmp_path / 'final', patience=0):    # the lock was given back
        pass


def test_weights_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match='After epoch 1 the weights'):
        run(tmp_path, val_set=None, scheduler=False, clip=None, lr=float('inf'), batch_size=8)
    assert toy_files(tmp_path).saved_epochs() == []


@pytest.mark.parametrize('wrong, words', [
    (dict(epochs=0), 'epochs must be at least 1'), (dict(batch_size=0), 'batch_size'), (dict(every=0), 'every'),
    (dict(ema=1.0), 'ema'), (dict(clip=-1.0), 'clip'), (dict(precision='half'), "'half'"), (dict(val_set=[]), 'empty'),
    (dict(progress='dots'), "'dots'")])
def test_what_cannot_be_asked_for(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason='fp16 is possible with a GPU')
def test_half_precision_wants_a_gpu(tmp_path):
    with pytest.raises(ValueError, match='on a GPU'):
        run(tmp_path, precision='fp16')


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / 'run').write_text('a file')
    with pytest.raises(FileExistsError, match='run is a file where a folder should be'):
        run(tmp_path)
    (tmp_path / 'run').unlink()
    shutil.rmtree(tmp_path / 'final')
    (tmp_path / 'final').write_text('a file')
    with pytest.raises(FileExistsError, match='final is a file where a folder should be'):
        run(tmp_path)


def test_no_run_writes_into_the_notebooks_folder(tmp_path):
    with pytest.raises(ValueError, match=r'write \.\./results/toy'):
        run(tmp_path, run_dir='results/toy')
    assert not (nbs_dir() / 'results').exists()


@pytest.mark.parametrize('limit', [3_000, 8_000, 15_000])
def test_no_space_left(tmp_path, limit):
    def with_little_space():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))    # this holds for root too
        try:
            run(tmp_path)
        except OSError as error:
            complaint = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        (tmp_path / 'complaint').write_text(complaint[:limit])
    assert in_child(with_little_space) == 0
    complaint = (tmp_path / 'complaint').read_text()
    assert str(tmp_path) in complaint and 'could not be written' in complaint
    assert not list(tmp_path.rglob('*.tmp'))
    for path in tmp_path.rglob('*.pt'):
        load_checkpoint(path)    # what is there is whole


def test_a_full_device_keeps_its_name(tmp_path):
    with pytest.raises(FileExistsError, match='/dev/full is not a file'):
        write_atomically('/dev/full', b'x')
    assert not Path('/dev/full').is_file()


def test_two_runs_at_once(tmp_path, monkeypatch):
    ready, go_on = os.pipe()

    def hold():
        with claim_folder(tmp_path / 'final'):
            os.write(go_on, b'x')
            time.sleep(60)

    child = os.fork()
    if child == 0:
        hold()
    os.read(ready, 1)
    monkeypatch.setattr(training, 'claim_folder', lambda place: claim_folder(place, patience=0.2))
    try:
        with pytest.raises(FileExistsError, match=f'Another run is writing to {tmp_path}/final'):
            run(tmp_path)
        assert toy_files(tmp_path).saved_epochs() == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run(tmp_path, epochs=1)    # a killed run leaves no lock behind


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match='net.pt would hold something that is neither a tensor nor a plain value'):
        save_checkpoint(tmp_path / 'net.pt', method='toy', config={'at': tmp_path}, state_dict={}, epoch=1, metrics={})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_damaged_anywhere_is_refused(tmp_path):
    net = nn.Linear(9, 9)
    path = save_checkpoint(tmp_path / 'net.pt', method='toy', config={}, state_dict=net.state_dict(), epoch=1,
                           metrics={})
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match='net.pt is truncated'):
            load_checkpoint(path)
    for absent in (tmp_path, tmp_path / 'none.pt'):
        with pytest.raises(FileNotFoundError, match='There is no checkpoint'):
            load_checkpoint(absent)
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            weights = load_checkpoint(path)['state_dict']
        except ValueError:
            continue
        # what was hit lies between the parts of the file
        assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())


# ---- parameters ---------------------------------------------------------------------------------------------------

PARAMETERS = '''num_epochs: int = 20    # passes
lr: float = 1e-3
decay: float | None = None
augment: bool = False
ct_dir: str = '../Dataset/train/CT'    # a folder
cases: list[str] = ['2', '20']
weights: dict = {'ssim': 1.0}
run_name: str | None = None
'''


def notebook(folder, *cells, tags=('parameters',)):
    "A notebook whose first cell is tagged `parameters`."
    path = folder / 'toy.ipynb'
    path.write_text(json.dumps({'nbformat': 4, 'nbformat_minor': 5, 'metadata': {
        'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}, 'cells': [
        {'cell_type': 'code', 'id': f'c{i}', 'source': source.splitlines(keepends=True), 'outputs': [],
         'execution_count': None, 'metadata': {'tags': list(tags)} if i == 0 else {}}
        for i, source in enumerate(cells)]}))
    return path


@pytest.fixture
def toy(tmp_path):
    return notebook(tmp_path, PARAMETERS, 'for epoch in range(3):\n    total = 0.0\n%matplotlib inline')


@pytest.fixture
def values(toy):
    return {name: parameter.default for name, parameter in notebook_parameters(toy).items()}


def test_the_declared_parameters(toy):
    declared = notebook_parameters(toy)
    assert list(declared) == ['num_epochs', 'lr', 'decay', 'augment', 'ct_dir', 'cases', 'weights', 'run_name']
    assert (declared['ct_dir'].comment, declared['lr'].comment) == ('a folder', '')
    assert declared['cases'].type == list[str]


@pytest.mark.parametrize('name, value, words', [
    ('num_epochs', '2', 'must be int'), ('num_epochs', 2.0, 'must be int'), ('num_epochs', True, 'must be int'),
    ('lr', '1e-3', 'must be float'), ('lr', False, 'must be float'), ('lr', float('nan'), 'must be float'),
    ('augment', 'false', '-p augment False'), ('augment', 'True', '-p augment True'), ('augment', 1, 'must be bool'),
    ('ct_dir', 34, '-r ct_dir 34'), ('ct_dir', None, 'must be str'), ('cases', '["2"]', "-y 'cases:"),
    ('cases', [2], 'list[str]'),
    ('weights', 'ssim', "-y 'weights:"), ('run_name', 5, '-r run_name 5'), ('decay', 'x', 'float | None')])
def test_wrong_types(toy, name, value, words):
    with pytest.raises(ValueError, match=f'Parameter {name} of toy.ipynb') as complaint:
        check_parameters(toy, {name: value})
    assert words in str(complaint.value)


def test_right_types(toy, values):
    checked = check_parameters(toy, {'lr': 1, 'decay': 2, 'cases': [], 'run_name': 'a'})
    assert checked == values | {'lr': 1.0, 'decay': 2.0, 'cases': [], 'run_name': 'a'}
    assert type(checked['lr']) is float and type(checked['decay']) is float


@pytest.mark.parametrize('name, hint', [('num_epoch', 'did you mean num_epochs?'), ('ctdir', 'did you mean ct_dir?'),
                                        ('temperature', 'it has num_epochs, lr')])
def test_unknown_names(toy, values, name, hint):
    with pytest.raises(ValueError, match=f'{name} is not a parameter of toy.ipynb') as complaint:
        read_parameters(toy, values | {name: 2})
    assert hint in str(complaint.value)


def test_what_the_namespace_may_hold(toy, values):
    others = {'__name__': '__main__', '_': 3, 'np': np, 'epoch': 2, 'total': 0.5, 'run': run}
    assert vars(read_parameters(toy, values | others)) == values
    kernel = {'In': ['', 'num_epochs: int = 20'], 'Out': {}, 'exit': exit, 'quit': quit, 'get_ipython': len, '_i': '',
              'scratch': 3}
    assert vars(read_parameters(toy, values | others | kernel)) == values
    for name in ('scratch', 'epoch'):    # as papermill injects it, even if the notebook has such a variable of its own
        with pytest.raises(ValueError, match=f'{name} is not a parameter'):
            read_parameters(toy, values | kernel | {'In': ['', f'# Parameters\n{name} = 3\n'], name: 3})
    with pytest.raises(ValueError, match='did you mean augment?'):
        read_parameters(toy, values | kernel | {'augmnt': True})
    with pytest.raises(ValueError, match='lr of toy.ipynb has no value'):
        read_parameters(toy, {name: value for name, value in values.items() if name != 'lr'})


def test_smoke_values(toy, values, monkeypatch):
    smoke = {'num_epochs': 1, 'ct_dir': '/tmp/phantom'}
    monkeypatch.delenv('IN_TEST', raising=False)
    assert read_parameters(toy, values, smoke).num_epochs == 20
    monkeypatch.setenv('IN_TEST', '1')
    assert read_parameters(toy, values, smoke).num_epochs == 1
    given = read_parameters(toy, values | {'num_epochs': 3}, smoke)
    assert (given.num_epochs, given.ct_dir) == (3, '/tmp/phantom')
    with pytest.raises(ValueError, match='did you mean num_epochs?'):
        read_parameters(toy, values, {'epochs': 1})


@pytest.mark.parametrize('source', ['lr = compute()', 'print(3)', 'a = b = 3', 'x: Path = "."', 'import os',
                                    'folder = "a" + "b"'])
def test_a_parameters_cell_holds_literals_only(tmp_path, source):
    with pytest.raises(ValueError, match='Line 1 of the parameters cell'):
        notebook_parameters(notebook(tmp_path, source))


def test_notebooks_without_parameters(tmp_path):
    with pytest.raises(ValueError, match='0 cells tagged'):
        notebook_parameters(notebook(tmp_path, 'lr = 1.0', tags=()))
    with pytest.raises(FileNotFoundError, match='no notebook'):
        notebook_parameters('none.ipynb')
    (tmp_path / 'text.ipynb').write_text('hello')
    with pytest.raises(ValueError, match='is not a notebook'):
        notebook_parameters(tmp_path / 'text.ipynb')


# ---- paths and papermill ------------------------------------------------------------------------------------------

def test_relative_paths_mean_the_notebooks_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert resolve_path('../Dataset') == ROOT / 'Dataset'
    monkeypatch.chdir(ROOT / 'tests')
    assert resolve_path('../Dataset') == ROOT / 'Dataset'
    clone = tmp_path / 'clone'
    (clone / 'nbs').mkdir(parents=True)
    (clone / 'settings.ini').write_text('[DEFAULT]\nlib_name = medfusion\nnbs_path = nbs\n')
    (tmp_path / 'settings.ini').write_text('not a settings file')
    monkeypatch.chdir(clone / 'nbs')
    assert resolve_path('../Dataset') == clone / 'Dataset'
    monkeypatch.chdir(tmp_path)
    assert resolve_path('../Dataset') == ROOT / 'Dataset'    # by the editable install
    with pytest.raises(ValueError, match='empty path'):
        resolve_path('')


def test_no_clone_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training.medfusion, '__file__', str(tmp_path / 'site-packages' / 'medfusion' / '__init__.py'))
    with pytest.raises(FileNotFoundError, match='neither above'):
        resolve_path('../Dataset')
    assert resolve_path(tmp_path / 'a') == tmp_path / 'a'
    run(tmp_path, epochs=1)    # absolute paths need no clone


PAPERMILL_RUN = '''import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from medfusion.runs import read_parameters
import test_training as toy
import torch
torch.set_num_threads(1)
p = read_parameters('toy.ipynb', globals())
def slow(model, batch):
    time.sleep(p.pause)
    return toy.step(model, batch)
net, history = toy.run(Path(p.folder), step=slow, resume=p.resume)
'''


def papermill(clone, *arguments):
    "A papermill, started in the clone's root as a process group of its own."
    command = [sys.executable, '-m', 'papermill', 'nbs/toy.ipynb', 'executed.ipynb', '--no-progress-bar', *arguments]
    return subprocess.Popen(command, cwd=clone, start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def test_papermill(tmp_path, straight):
    "A run by papermill is killed during its third epoch and continued; a mistyped parameter fails before it starts."
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = medfusion\nnbs_path = nbs\n')
    notebook(tmp_path / 'nbs', "folder: str = ''\npause: float = 0.0\nresume: bool = False",
             PAPERMILL_RUN.format(tests=str(ROOT / 'tests')))
    folder = tmp_path / 'out'
    mistyped = papermill(tmp_path, '-p', 'pauses', '1')
    killed = papermill(tmp_path, '-p', 'folder', str(folder), '-p', 'pause', '0.2')
    deadline = time.monotonic() + 60
    while not toy_files(folder).epoch(2).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not toy_files(folder).epoch(4).exists()
    complaint = mistyped.communicate()[1]
    assert mistyped.returncode != 0 and 'did you mean pause?' in complaint
    continued = papermill(tmp_path, '-p', 'folder', str(folder), '-p', 'resume', 'True')
    complaint = continued.communicate()[1]
    assert continued.returncode == 0, complaint
    assert written(folder) == straight
