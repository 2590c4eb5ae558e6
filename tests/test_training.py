"""What the training notebook cannot show: kills at every point, full disks, damaged files, signals, papermill."""
import csv
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_child, notebook
from torch import nn

from medfusion.cross_validation import stands_on
from medfusion.evaluation import cases_trained_on
from medfusion.files import read_json, sha256_of, write_json
from medfusion.runs import (build_model, checkpoint_files, claim_folder, load_checkpoint, nbs_dir, open_run, read_run, run_checkpoint, saved_epochs)
from medfusion.training import fit, loaders

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


class Net(nn.Sequential):
    "A network with everything that a state may hold: weights, counters, dropout."

    def __init__(self, width):
        super().__init__(nn.Linear(1, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 1))


def step(model, batch):
    noise = random.random() + np.random.rand()    # all generators take part
    loss = (model(batch['x']) - batch['y'] + 0.01 * noise).square().mean()
    return {'loss': loss, 'rmse': loss.sqrt()}


def parameters(folder, **given):
    return types.SimpleNamespace(**{'save_dir': str(folder), 'run': 'a', 'checkpoint_dir': '', 'num_epochs': 4, 'w_ssim': 1.0,
                                    'resume': False, 'replace': False} | given)


def toy_files(folder, **given):
    return checkpoint_files('toy', parameters(folder, **given), last_name='toy_final.pt', history_name='history.pt')


def cosine(optimizer, epochs):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


def falling(optimizer, epochs):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / epochs)


def step_lr(optimizer, epochs):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def plateau(optimizer, epochs):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)


def run(folder, epochs=4, lr=0.1, width=4, step=step, schedule=cosine, val_set=Numbers(), resume=False, given={}, finish=True, notebook='', **more):
    "A run into `folder` with everything made anew: the network and the history."
    torch.manual_seed(0)
    net = Net(width)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    p = parameters(folder, num_epochs=epochs, resume=resume, **given)
    files = toy_files(folder, **given)
    at_work = open_run('toy', p, files, {'train': ['7'], 'val': ['8'], 'test': []}, notebook, stands_on(p, files))
    settings = dict(epochs=epochs, batch_size=3, optimizer=optimizer, scheduler=schedule and schedule(optimizer, epochs), method='toy',
                    config={'width': width}, progress='none', ema=0.9, clip=1.0, resume=resume) | more
    history = fit(net, step, Numbers(), val_set, at_work, **settings)
    if finish:
        at_work.finish({'best_epoch': history.best['epoch']})
    return net, history


def written(folder):
    "The bytes of every file that a run left, by its path in the folder; not the record, which holds times."
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*'))
            if path.is_file() and path.name not in ('.running.lock', 'run.json')}


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

class Killer:
    "Counts what happens in a run (a file is renamed, before and after; a step is taken), and kills the process at one event."

    def __init__(self, monkeypatch_replace=True, at=None):
        self.count, self.at, self.replace = 0, at, os.replace
        os.replace = self.renamed

    def event(self):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def renamed(self, *arguments):
        self.event()
        self.replace(*arguments)
        self.event()

    def step(self, model, batch):
        self.event()
        return step(model, batch)


@pytest.fixture(scope='module')
def events(tmp_path_factory, quick):
    "The numbers of the events of the second epoch, and of all."
    counts = []
    for epochs in (1, 2, 4):
        killer = Killer()
        run(tmp_path_factory.mktemp('events'), epochs=epochs, step=killer.step, schedule=None)
        os.replace = killer.replace
        counts.append(killer.count)
    return range(counts[0] - 3, counts[1] - 3), counts[2]


def killed(folder, at, **more):
    "Whether a run was killed at this event."
    status = in_child(lambda: run(folder, step=Killer(at=at).step, **more))
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.fault('train', 'killed between two writes')
def test_a_run_killed_anywhere_continues_to_the_same_files(tmp_path, straight, events, record_property):
    "At files and steps of the second epoch; every file, the best checkpoint too, is then the same, byte for byte."
    record_property('points', len(events[0][::3]))
    for at in events[0][::3]:    # the others, and those of the other epochs, in `make long`
        assert killed(tmp_path / str(at), at)
        assert read_run(tmp_path / str(at) / 'a')['state'] == 'interrupted'
        run(tmp_path / str(at), resume=True)
        assert written(tmp_path / str(at)) == straight, f'killed at event {at}'


@pytest.mark.fault('train', 'killed between two writes')
@pytest.mark.long
def test_a_run_killed_at_each_event_of_all(tmp_path, straight, events, record_property):
    record_property('points', events[1])
    for at in range(1, events[1] + 1):
        assert killed(tmp_path / str(at), at)
        run(tmp_path / str(at), resume=True)
        assert written(tmp_path / str(at)) == straight, f'killed at event {at}'


@pytest.mark.fault('train', 'killed between two writes', points=3)
def test_killed_again_and_again(tmp_path, straight):
    for at in (7, 33, 24):
        assert killed(tmp_path, at, resume=True)
    run(tmp_path, resume=True)
    assert written(tmp_path) == straight


def test_checkpoints_every_third_epoch_and_after_the_last(tmp_path, events):
    run(tmp_path / 'a', epochs=4, every=3)
    assert saved_epochs(toy_files(tmp_path / 'a')) == [4, 3]
    assert killed(tmp_path / 'b', events[1] - 15, every=3)
    run(tmp_path / 'b', every=3, resume=True)
    assert written(tmp_path / 'a') == written(tmp_path / 'b')


@pytest.mark.parametrize('schedule', [None, step_lr, plateau])
def test_more_epochs_than_before(tmp_path, schedule):
    "Where the rates do not depend on the number of epochs, the longer run is the unbroken one, byte for byte."
    run(tmp_path / 'long', epochs=4, schedule=schedule)
    run(tmp_path / 'grown', epochs=2, schedule=schedule)
    run(tmp_path / 'grown', epochs=4, schedule=schedule, resume=True)
    long, grown = written(tmp_path / 'long'), written(tmp_path / 'grown')
    early = {name for name in long if 'intermediate' in name and name.endswith(('_001.pt', '_002.pt'))}    # they say: of 2 planned
    assert {name: long[name] for name in long.keys() - early} == {name: grown[name] for name in grown.keys() - early}


@pytest.mark.parametrize('schedule', [cosine, falling])
def test_the_longer_schedule_counts(tmp_path, schedule):
    "A schedule that depends on the number of epochs is, from where the run goes on, that of the longer run."
    _, unbroken = run(tmp_path / 'long', epochs=6, schedule=schedule)
    run(tmp_path / 'grown', epochs=2, schedule=schedule)
    _, grown = run(tmp_path / 'grown', epochs=6, schedule=schedule, resume=True)
    assert [row['lr'] for row in grown[2:]] == [row['lr'] for row in unbroken[2:]] and grown[2]['lr'] > 0
    assert len(grown) == 6


def test_fewer_epochs_are_refused(tmp_path, straight):
    run(tmp_path)
    with pytest.raises(ValueError, match='of a run of 4 epochs, and 2 are asked for; their number may only grow'):
        run(tmp_path, epochs=2, resume=True)
    assert written(tmp_path) == straight


def test_resuming_a_finished_run_changes_nothing(tmp_path, straight):
    run(tmp_path)
    net, history = run(tmp_path, resume=True)
    assert written(tmp_path) == straight and len(history) == 4
    assert torch.equal(net[0].weight, load_checkpoint(toy_files(tmp_path).final / 'toy_final.pt')['state_dict']['0.weight'])


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'text', 'flipped', 'foreign dictionary', 'weights only'])
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_is_used(tmp_path, straight, capsys, damage):
    run(tmp_path)
    path = toy_files(tmp_path).epoch(4)
    good = load_checkpoint(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(good['state_dict']['0.weight'].numpy().tobytes())] ^= 0xff
    if damage == 'foreign dictionary':
        torch.save({'weights': torch.zeros(3)}, path)
    elif damage == 'weights only':
        shutil.copy(toy_files(tmp_path).final / 'toy_final.pt', path)
    else:
        path.write_bytes({'truncated': whole[:-900], 'empty': b'', 'text': b'hello\n' * 50, 'flipped': flipped}[damage])
    run(tmp_path, resume=True)
    said = capsys.readouterr().out
    assert 'toy_epoch_004.pt is not continued: it' in said and 'continues after epoch 3' in said
    assert written(tmp_path) == straight


def test_without_a_good_checkpoint_a_resumed_run_starts_anew(tmp_path, straight, capsys):
    toy_files(tmp_path).intermediate.mkdir(parents=True)
    toy_files(tmp_path).epoch(2).write_bytes(b'nothing')
    run(tmp_path, resume=True)
    said = capsys.readouterr().out
    assert 'toy_epoch_002.pt is not continued' in said and 'starts with epoch 1' in said
    assert written(tmp_path) == straight


@pytest.mark.parametrize('changed, words', [
    (dict(lr=0.2), 'lr is 0.1, and 0.2'), (dict(width=5), 'config width is 4, and 5'),
    (dict(seed=1), 'seed is 0, and 1'), (dict(batch_size=2), 'batch_size is 3, and 2'),
    (dict(clip=None), 'clip is 1.0, and None'), (dict(ema=None), 'ema is 0.9, and None'),
    (dict(precision='bf16'), "precision is 'no', and 'bf16'"), (dict(method='other'), "method is 'toy', and 'other'"),
    (dict(given={'w_ssim': 2.0}), 'its w_ssim is 1.0, and 2.0'), (dict(settings={'phase': 2}), 'phase is None, and 2'),
    (dict(schedule=None), "scheduler class is 'CosineAnnealingLR', and None")], ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_other_settings_are_not_continued(tmp_path, changed, words):
    "A difference is refused in a sentence with both values, and nothing is touched."
    run(tmp_path, epochs=2)
    before, record = written(tmp_path), (tmp_path / 'a' / 'run.json').read_bytes()
    with pytest.raises(ValueError, match='toy_epoch_002.pt cannot be continued') as complaint:
        run(tmp_path, **{'epochs': 2, 'resume': True} | changed)
    assert words in str(complaint.value) and 'begin a new run' in str(complaint.value)
    assert written(tmp_path) == before and (tmp_path / 'a' / 'run.json').read_bytes() == record


def test_a_run_that_was_begun_before_there_was_a_parameter_goes_on_with_its_default(tmp_path):
    run(tmp_path, epochs=2)
    with_it = str(notebook(tmp_path, "save_dir: str = ''\nw_ssim: float = 1.0\nw_new: float = 0.5", ''))
    with pytest.raises(ValueError, match='its w_new is 0.5, and 0.7 is asked for'):
        run(tmp_path, epochs=2, resume=True, given={'w_new': 0.7}, notebook=with_it)
    _, history = run(tmp_path, epochs=3, resume=True, given={'w_new': 0.5}, notebook=with_it)
    assert [row['epoch'] for row in history] == [1, 2, 3]


def test_what_a_run_was_trained_on_is_recorded_and_compared(tmp_path):
    class Slices(Numbers):
        pairs = []
    for kind in ('ct', 'mri'):
        (tmp_path / kind).write_text(kind)
    Slices.pairs = [types.SimpleNamespace(ct=tmp_path / 'ct', mri=tmp_path / 'mri')]
    run(tmp_path, epochs=1, val_set=Slices())
    digest = load_checkpoint(toy_files(tmp_path).best())['data_sha256']
    assert digest and read_run(tmp_path / 'a')['data_sha256'] == digest
    (tmp_path / 'ct').write_text('another slice')
    with pytest.raises(ValueError, match=f"data_sha256 is '{digest}', and "):
        run(tmp_path, epochs=1, val_set=Slices(), resume=True)


def test_a_case_that_was_trained_on_cannot_come_to_the_side_that_validates(tmp_path):
    "The slices of both sides together are the same then, in the same order."
    class Slices(Numbers):
        def __init__(self, *cases):
            self.cases, self.pairs = list(cases), []
            for case in cases:
                path = tmp_path / f'{case}001.png'
                path.write_text(case)
                self.pairs.append(types.SimpleNamespace(ct=path, mri=path))

    def go(train, val, **more):
        net = Net(2)
        fit(net, step, train, val, toy_files(tmp_path), epochs=2, batch_size=4, optimizer=torch.optim.Adam(net.parameters()), method='toy',
            config={}, progress='none', **more)
    go(Slices('1', '2'), Slices('3'))
    with pytest.raises(ValueError, match=r"its cases is \['1', '2'\], and \['1'\] is asked for"):
        go(Slices('1'), Slices('2', '3'), resume=True)
    checkpoint = load_checkpoint(path := toy_files(tmp_path).epoch(2))
    checkpoint['settings'].pop('cases')     # one of before they were told
    torch.save(checkpoint, path)
    Slices.features = 'of crops'            # nor this
    go(Slices('1', '2'), Slices('3'), resume=True)


def test_a_run_does_not_go_on_with_another_network_that_has_the_name_of_the_first(tmp_path):
    run(tmp_path, epochs=1, given={'run': 'first'})
    first = toy_files(tmp_path, run='first').best()
    given, before = {'teacher': str(first), 'run': 'second'}, first.read_bytes()
    run(tmp_path, epochs=1, given=given)
    run(tmp_path, epochs=1, given={'run': 'other', 'w_ssim': 2.0}, lr=0.2)
    first.write_bytes(toy_files(tmp_path, run='other').best().read_bytes())
    with pytest.raises(ValueError, match=f"its networks teacher is '{hashlib.sha256(before).hexdigest()}', and '{sha256_of(first)}'"):
        run(tmp_path, epochs=2, given=given, resume=True)
    checkpoint = load_checkpoint(path := toy_files(tmp_path, **given).epoch(1))
    assert checkpoint['settings'].pop('networks')
    torch.save(checkpoint, path)    # one of before they were told
    run(tmp_path, epochs=2, given=given, resume=True)


def test_a_run_that_began_with_the_one_whose_place_it_took_goes_on(tmp_path):
    "What `start` names is its own best network by then, which is nothing to compare."
    given = {'run': 'latest', 'checkpoint_dir': str(tmp_path / 'checkpoints')}
    run(tmp_path, epochs=1, given=given)
    given['start'] = str(toy_files(tmp_path, **given).best())
    run(tmp_path, epochs=1, given=given)
    run(tmp_path, epochs=2, given=given, resume=True)


def test_a_run_that_goes_on_and_gets_no_better_keeps_its_best_network(tmp_path):
    "Its record names the best of the epochs before, and where that file was lost meanwhile, it is there again."
    class Worse(Numbers):
        def __getitem__(self, index):
            return super().__getitem__(index) | {'y': torch.tensor([10. * self.epoch])}
    run(tmp_path, epochs=1, val_set=Worse())
    toy_files(tmp_path).best().unlink()
    _, history = run(tmp_path, epochs=2, val_set=Worse(), resume=True)
    assert history.best['epoch'] == load_checkpoint(run_checkpoint(tmp_path / 'a'))['epoch'] == 1


@pytest.mark.parametrize('name, values', [('crop', (None, 32)), ('augment', (False, True)), ('features', ('of whole slices', 'of crops')), ('value_range', ('0,255', '0,100'))])
def test_what_is_seen_is_compared(tmp_path, name, values):
    class Slices(Numbers):
        def __init__(self, value):
            setattr(self, name, value)
    net = nn.Linear(1, 1)
    for value in values:
        arguments = dict(epochs=1, batch_size=3, method='toy', config={}, progress='none', resume=value == values[1],
                         optimizer=torch.optim.Adam(net.parameters(), lr=0.1))
        if value == values[1]:
            with pytest.raises(ValueError, match=f'{name} is {values[0]!r}, and {value!r}'):
                fit(net, step, Slices(value), None, toy_files(tmp_path), **arguments)
        else:
            fit(net, step, Slices(value), None, toy_files(tmp_path), **arguments)


def test_a_checkpoint_of_the_first_version_is_refused_by_its_version(tmp_path):
    run(tmp_path)
    path = toy_files(tmp_path).epoch(4)
    checkpoint = load_checkpoint(path)
    checkpoint['versions']['medfusion'] = '0.0.9'
    torch.save({name: value for name, value in checkpoint.items() if name not in ('planned', 'steps')}, path)
    with pytest.raises(ValueError, match='was written by medfusion 0.0.9, whose unfinished runs'):
        run(tmp_path, resume=True)


def test_a_training_without_a_run_never_removes_checkpoints(tmp_path):
    net = nn.Linear(1, 1)
    arguments = dict(epochs=1, batch_size=3, method='toy', config={}, progress='none')
    for attempt in (1, 2):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        if attempt == 1:
            fit(net, step, Numbers(), None, toy_files(tmp_path), optimizer=optimizer, **arguments)
            before = written(tmp_path)
        else:
            with pytest.raises(FileExistsError, match='holds 1 checkpoints of an earlier run; go on with it by resume=True'):
                fit(net, step, Numbers(), None, toy_files(tmp_path), optimizer=optimizer, **arguments)
    assert written(tmp_path) == before


def test_the_same_objects_can_be_trained_on(tmp_path):
    "In JupyterLab, the cell with fit is interrupted and run again with resume=True, with the objects of before."
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    common = dict(batch_size=3, optimizer=optimizer, scheduler=scheduler, method='toy', config={}, progress='none')

    def interrupted(model, batch):
        if Numbers.calls > 6:
            raise KeyboardInterrupt
        Numbers.calls += 1
        return step(model, batch)
    Numbers.calls = 0
    with pytest.raises(KeyboardInterrupt):
        fit(net, interrupted, Numbers(), None, toy_files(tmp_path), epochs=3, **common)
    history = fit(net, step, Numbers(), None, toy_files(tmp_path), epochs=3, resume=True, **common)
    assert [row['lr'] for row in history] == [0.1, 0.05, 0.025]
    with pytest.raises(ValueError, match='scheduler has been used.*run the cell that makes the optimiser'):
        fit(net, step, Numbers(), None, toy_files(tmp_path), epochs=4, resume=True, **common)


@pytest.mark.parametrize('shell, said', [(False, 'Interrupted; the run is kept up to epoch 1'), (True, '')])
def test_a_stop_is_said_once(tmp_path, monkeypatch, capsys, shell, said):
    "By the notebook; under the command, which has a sentence of its own, only by that."
    monkeypatch.delenv('MEDFUSION_COMMAND', raising=False)
    if shell:
        monkeypatch.setenv('MEDFUSION_COMMAND', 'medfusion train toy')
    net = nn.Linear(1, 1)

    def stopped(model, batch):
        if list(tmp_path.rglob('*.pt')):
            raise KeyboardInterrupt
        return step(model, batch)
    with pytest.raises(KeyboardInterrupt):
        fit(net, stopped, Numbers(), None, toy_files(tmp_path), epochs=3, batch_size=99, optimizer=torch.optim.Adam(net.parameters(), lr=0.1),
            method='toy', config={}, progress='none')
    out = capsys.readouterr().out
    assert out.startswith(said) and bool(out) == bool(said)


# ---- what fit refuses, and what it leaves -------------------------------------------------------------------------

def test_checkpoints_hold_what_the_contract_says(tmp_path):
    net, history = run(tmp_path)
    files = toy_files(tmp_path)
    best = load_checkpoint(files.best(), method='toy')
    assert list(best) == ['data_sha256', 'format', 'method', 'config', 'state_dict', 'epoch', 'metrics', 'versions']
    assert best['metrics'] == min(history, key=lambda row: row['val_loss'])
    metadata = json.loads((files.final / 'metadata.json').read_text())
    assert metadata['sha256'] == sha256_of(files.best()) and metadata['config'] == {'width': 4}
    assert metadata['cases']['train'] == ['7']
    with open(tmp_path / 'a' / 'history.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['val_loss']) for row in rows] == [row['val_loss'] for row in history]
    assert list(rows[0]) == ['epoch', 'lr', 'train_loss', 'train_rmse', 'val_loss', 'val_rmse']
    assert torch.load(files.final / 'history.pt')['train_loss'] == [row['train_loss'] for row in history]
    record = read_run(tmp_path / 'a')
    assert record['checkpoints'] == {name: sha256_of(files.final / name) for name in ('toy_best.pt', 'toy_final.pt')}
    assert record['state'] == 'finished' and record['numbers']['best_epoch'] == best['epoch']


def test_a_run_evaluates_what_it_trained_whatever_the_disk_holds(tmp_path):
    _, history = run(tmp_path, finish=False)
    best = load_checkpoint(toy_files(tmp_path).best())
    toy_files(tmp_path).best().write_bytes(b'of somebody else')
    net = build_model(Net, history.best, 'history')
    assert all(torch.equal(value, best['state_dict'][name]) for name, value in net.state_dict().items())


def test_nobody_writes_under_the_hands_of_a_run_that_evaluates(tmp_path, monkeypatch):
    "Two runs with other names share a checkpoint_dir: the second waits until the first has written its record, or is refused."
    shared = {'checkpoint_dir': str(tmp_path / 'shared')}
    run(tmp_path, given=shared, finish=False)    # trained, and evaluating now
    monkeypatch.setattr('medfusion.runs.claim_folder.__wrapped__.__defaults__', (0.2,))

    def second():
        os.close(2)
        run(tmp_path, given=shared | {'run': 'b'})
    assert in_child(second) != 0 and not (tmp_path / 'b' / 'run.json').exists()
    open_run('toy', parameters(tmp_path, resume=True, **shared), toy_files(tmp_path, **shared)).finish()


def test_the_validated_weights_are_the_averaged_ones(tmp_path):
    net, history = run(tmp_path, step=lambda model, batch: {'loss': (model(batch['x']) - batch['y']).square().mean()})
    data = Numbers()
    data.set_epoch(4)
    items = [data[i] for i in range(8)]
    x, y = (torch.stack([item[name] for item in items]) for name in 'xy')
    with torch.no_grad():
        loss = (net(x) - y).square().mean()    # fit leaves the averaged weights in the model
    assert history[-1]['val_loss'] == pytest.approx(loss.item(), rel=1e-5)


def test_without_validation_the_training_loss_decides(tmp_path, capsys):
    net, history = run(tmp_path, val_set=None)
    assert history.best['metrics']['train_loss'] == min(row['train_loss'] for row in history)
    assert 'nothing was validated' in capsys.readouterr().out


def test_workers_change_nothing(tmp_path):
    plain = lambda model, batch: {'loss': (model(batch['x']) - batch['y']).square().mean()}
    _, alone = run(tmp_path / 'a', epochs=2, step=plain, ema=None)
    _, helped = run(tmp_path / 'b', epochs=2, step=plain, ema=None, workers=1)
    assert alone == helped


def test_crops_that_some_slices_are_too_small_for_share_no_batch():
    "ResNet fusion crops no smaller slice, so a batch of both would not stack; a crop that fits all, or none of one size, does."
    def pairs(sizes, crop):
        data_set = Numbers()
        data_set.sizes, data_set.crop = sizes, crop
        return data_set
    with pytest.raises(ValueError, match='differ in size, .* crops no larger than any'):
        loaders(pairs([(64, 64), (96, 96)], 80), None, 4, 0)
    for sizes, crop, batch_size in (([(64, 64), (96, 96)], 64, 4), ([(64, 64), (96, 96)], 80, 1), ([(64, 64)], 80, 4)):
        assert loaders(pairs(sizes, crop), None, batch_size, 0)


def test_progress_by_lines(tmp_path, capsys, monkeypatch):
    for name in ('IN_TEST', 'MEDFUSION_PROGRESS', 'JPY_SESSION_NAME'):
        monkeypatch.delenv(name, raising=False)
    run(tmp_path / 'a', epochs=2, progress=None)
    said = capsys.readouterr()
    assert 'epoch   1/2  train_loss ' in said.out and ' s left' in said.out and said.err == ''
    monkeypatch.setenv('MEDFUSION_PROGRESS', 'none')
    run(tmp_path / 'b', epochs=2, progress=None)
    assert 'epoch   1/2' not in capsys.readouterr().out
    run(tmp_path / 'c', epochs=2, progress='bar')
    assert 'batch' in capsys.readouterr().err


class Convolutions(nn.Module):
    "A small network of images, with what half precision has to pass: convolutions, a mean, arithmetic with the input."

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, ct, mri):
        return ct + self.layers(torch.cat([ct, mri], 1)).tanh()


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {name: torch.rand(1, 16, 16, generator=generator) for name in ('ct', 'mri')}


@pytest.mark.parametrize('precision', ['bf16', pytest.param('fp16', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='fp16 needs a GPU'))])
def test_half_precision_trains_resumes_and_gives_the_network_back(tmp_path, precision):
    def image_step(model, batch):
        fused = model(batch['ct'], batch['mri'])
        return {'loss': (fused - torch.maximum(batch['ct'], batch['mri'])).square().mean()}

    def image_run(name, epochs, resume=False):
        torch.manual_seed(0)
        net = Convolutions()
        history = fit(net, image_step, Images(), Images(), toy_files(tmp_path, run=name), epochs=epochs, batch_size=2, resume=resume,
                      optimizer=torch.optim.Adam(net.parameters(), lr=0.01), method='toy', config={}, progress='none', precision=precision)
        return net, history
    net, straight = image_run('straight', 4)
    assert straight[-1]['train_loss'] < straight[0]['train_loss'] and np.isfinite(straight[-1]['val_loss'])
    image_run('stopped', 2)
    again, resumed = image_run('stopped', 4, resume=True)
    device = next(net.parameters()).device
    assert net(*torch.rand(2, 1, 1, 16, 16, device=device)).dtype == torch.float32    # the network is given back as it was
    if device.type == 'cpu':
        assert straight == resumed and all(torch.equal(*pair) for pair in zip(net.parameters(), again.parameters()))


@pytest.mark.skipif(torch.cuda.is_available(), reason='fp16 is possible with a GPU')
def test_fp16_wants_a_gpu(tmp_path):
    with pytest.raises(ValueError, match='on a GPU'):
        run(tmp_path, precision='fp16')


def test_plateau_scheduler(tmp_path):
    _, history = run(tmp_path, schedule=plateau, lr=1e-4, epochs=3)
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
    assert saved_epochs(toy_files(tmp_path)) == [1] and read_run(tmp_path / 'a')['state'] == 'failed'
    with claim_folder(toy_files(tmp_path).final, patience=0):    # the lock was given back
        pass


def test_weights_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match='After epoch 1 the weights'):
        run(tmp_path, val_set=None, schedule=None, clip=None, lr=float('inf'), batch_size=8)
    assert saved_epochs(toy_files(tmp_path)) == []


def stale(net):
    return torch.optim.Adam(Net(4).parameters(), lr=0.1)


@pytest.mark.parametrize('wrong, words', [
    (dict(epochs=0), 'epochs must be'), (dict(epochs=2.0), 'epochs must be'), (dict(batch_size=0), 'batch_size'), (dict(every=0), 'every'),
    (dict(seed=-1), 'seed must be'), (dict(ema=1.0), 'ema'), (dict(clip=-1.0), 'clip'), (dict(precision='half'), "'half'"),
    (dict(val_set=[]), 'empty'), (dict(progress='dots'), "'dots'"), (dict(lr=0.0), 'learning rate'),
    (dict(optimizer=torch.optim.Adam(Net(4).parameters(), lr=0.1)), 'make the optimiser anew'),
    (dict(scheduler=step_lr(torch.optim.Adam(Net(4).parameters(), lr=0.1), 1)), 'rate of another optimiser')],
    ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_what_cannot_be_asked_for(tmp_path, wrong, words):
    "Refused in a sentence, before anything of an earlier run is touched."
    run(tmp_path, epochs=1)
    before, record = written(tmp_path), (tmp_path / 'a' / 'run.json').read_bytes()
    with pytest.raises(ValueError, match=words):
        run(tmp_path, **{'resume': True} | wrong)
    assert written(tmp_path) == before and (tmp_path / 'a' / 'run.json').read_bytes() == record


def test_a_stale_optimiser_with_resume(tmp_path):
    "A new network with an old optimiser trained nothing, silently."
    net, _ = run(tmp_path, epochs=1)
    old = torch.optim.Adam(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match='The optimiser holds tensors that are no parameters of this model'):
        run(tmp_path, epochs=2, resume=True, optimizer=old, scheduler=None)


# ---- stopped by hand ----------------------------------------------------------------------------------------------

@pytest.mark.fault('train', 'stopped (Ctrl-C, SIGTERM)')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_what_is_kept_and_how_to_go_on(tmp_path, straight, number, monkeypatch):
    monkeypatch.delenv('MEDFUSION_COMMAND', raising=False)    # under the command its own sentence says it
    path = notebook(tmp_path, "save_dir: str = ''\nrun: str = 'latest'\nresume: bool = False", '')

    def stopped():
        calls = iter(range(99))
        out = os.open(tmp_path / 'said', os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        sys.stdout = open(1, 'w', closefd=False)

        def late(model, batch):
            if next(calls) == 8:
                os.kill(os.getpid(), number)
            return step(model, batch)
        at = open_run('toy', parameters(tmp_path / 'runs'), toy_files(tmp_path / 'runs'), notebook=str(path))
        torch.manual_seed(0)
        net = Net(4)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        fit(net, late, Numbers(), Numbers(), at, epochs=4, batch_size=3, optimizer=optimizer, scheduler=cosine(optimizer, 4), method='toy',
            config={'width': 4}, progress='none', ema=0.9, clip=1.0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = in_child(stopped)
    assert os.WTERMSIG(status) == signal.SIGTERM if number == signal.SIGTERM else os.WEXITSTATUS(status) == 1
    said = (tmp_path / 'said').read_text()
    assert 'kept up to epoch 1' in said and 'toy.ipynb a.ipynb ' in said and '-p resume True' in said, said
    assert read_run(tmp_path / 'runs' / 'a')['state'] == 'interrupted'
    run(tmp_path / 'runs', resume=True)
    assert written(tmp_path / 'runs') == straight


# ---- the disk -----------------------------------------------------------------------------------------------------

def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / 'a').write_text('a file')
    with pytest.raises(FileExistsError, match='a is a file where a folder should be'):
        run(tmp_path)
    (tmp_path / 'a').unlink()
    toy_files(tmp_path).final.parent.mkdir(parents=True)
    toy_files(tmp_path).final.write_text('a file')
    with pytest.raises(FileExistsError, match='toy is a file where a folder should be'):
        run(tmp_path)


def test_no_run_writes_into_the_notebooks_folder(tmp_path):
    with pytest.raises(ValueError, match=r'write \.\./results/a'):
        run('results')
    assert not (nbs_dir() / 'results').exists()


def with_limit(tmp_path, limit, function):
    "What OSError says where no file may become larger than `limit` bytes; this holds for root too."
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            function()
            complaint = 'none'
        except OSError as error:
            complaint = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (tmp_path / 'complaint').write_text(complaint)
    assert in_child(limited) == 0
    return (tmp_path / 'complaint').read_text()


@pytest.mark.fault('train', 'disk full, or failing', points=5)
def test_disk_full_at_each_write(tmp_path, straight):
    "Wherever the disk is full, what is there is whole, the sentence names the file, and the run goes on once there is space."
    said = set()
    for limit in (100, 1_000, 3_000, 6_000, 15_000):
        folder = tmp_path / str(limit)
        complaint = with_limit(tmp_path, limit, lambda: run(folder))
        if complaint != 'none':
            assert str(folder) in complaint and 'could not be written' in complaint
            said.add(complaint.split(' could not')[0].split('/')[-1])
        assert not list(folder.rglob('*.tmp'))
        for path in folder.rglob('*.pt'):
            if path.name != 'history.pt':
                load_checkpoint(path)
        for path in folder.rglob('*.json'):
            json.loads(path.read_text())
        run(folder, resume=True)
        assert written(folder) == straight
    assert len(said) >= 3    # the limits met several files


@pytest.mark.fault('train', 'several at once')
def test_two_runs_at_once(tmp_path, monkeypatch):
    ready, go_on = os.pipe()

    def hold():
        with claim_folder(toy_files(tmp_path).final):
            os.write(go_on, b'x')
            time.sleep(60)

    child = os.fork()
    if child == 0:
        hold()
    os.read(ready, 1)
    monkeypatch.setattr('medfusion.runs.claim_folder.__wrapped__.__defaults__', (0.2,))
    try:
        with pytest.raises(FileExistsError, match=f'Another run is writing to {toy_files(tmp_path).final}'):
            run(tmp_path)
        assert saved_epochs(toy_files(tmp_path)) == [] and not (tmp_path / 'a' / 'run.json').exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run(tmp_path, epochs=1)    # a killed run leaves no lock behind


def test_no_clone_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('medfusion.__file__', str(tmp_path / 'site-packages' / 'medfusion' / '__init__.py'))
    run(tmp_path, epochs=1)    # absolute paths need no clone


# ---- papermill ----------------------------------------------------------------------------------------------------

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
    return subprocess.Popen(command, cwd=clone, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {'TMPDIR': str(clone)})    # a killed one leaves its connection file there


@pytest.mark.fault('train', 'killed from outside')
@pytest.mark.long
def test_papermill(tmp_path, straight):
    "A run by papermill is killed during its third epoch and continued."
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = medfusion\nnbs_path = nbs\n')
    notebook(tmp_path / 'nbs', "folder: str = ''\npause: float = 0.0\nresume: bool = False",
             PAPERMILL_RUN.format(tests=str(ROOT / 'tests')))
    folder = tmp_path / 'out'
    killed = papermill(tmp_path, '-p', 'folder', str(folder), '-p', 'pause', '0.2')
    deadline = time.monotonic() + 60
    while not toy_files(folder).epoch(2).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not toy_files(folder).epoch(4).exists()
    continued = papermill(tmp_path, '-p', 'folder', str(folder), '-p', 'resume', 'True')
    complaint = continued.communicate()[1]
    assert continued.returncode == 0, complaint
    assert written(folder) == straight


def test_a_tracker_gets_every_epoch(tmp_path):
    "TensorBoard, where it is installed; it takes no part in what a run that goes on must share."
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = open_run('toy', parameters(tmp_path, tracker='tensorboard'), toy_files(tmp_path))
    net = Net(2)
    history = fit(net, step, Numbers(), Numbers(), run, epochs=2, batch_size=4, optimizer=torch.optim.Adam(net.parameters()), method='toy', config={},
                  progress='none', tracker='tensorboard')
    run.finish()
    [events] = [path for path in (tmp_path / 'a' / 'tracker').rglob('events*') if 'medfusion' == path.parent.name]
    read = EventAccumulator(str(events.parent)).Reload()
    assert [scalar.value for scalar in read.Scalars('val_loss')] == pytest.approx([row['val_loss'] for row in history], rel=1e-5)
    with pytest.raises(ValueError, match="no tracker 'tensorbord'"):
        fit(net, step, Numbers(), None, toy_files(tmp_path, run='b'), epochs=1, batch_size=4, optimizer=torch.optim.Adam(net.parameters()), method='toy',
            config={}, progress='none', tracker='tensorbord')


def test_a_run_goes_on_that_took_the_place_of_the_network_on_which_it_stands(tmp_path, monkeypatch):
    "`run:again` means its own network by then."
    monkeypatch.setattr('medfusion.inference.find_run', lambda name, first: tmp_path / name)
    run(tmp_path, epochs=1, given={'run': 'again'})
    before = sha256_of(toy_files(tmp_path, run='again').best())
    given = {'run': 'again', 'start': 'run:again', 'checkpoint_dir': str(tmp_path / 'elsewhere')}
    run(tmp_path, epochs=1, lr=0.2, given=given | {'replace': True})
    assert load_checkpoint(toy_files(tmp_path, **given).epoch(1))['settings']['networks'] == {'start': before}
    _, history = run(tmp_path, epochs=2, lr=0.2, given=given, resume=True)
    assert [row['epoch'] for row in history] == [1, 2]


def test_what_a_network_saw_on_which_a_run_stands_it_saw_too(tmp_path):
    path, seen = '', []
    for name, role in (('first', 'start'), ('second', 'teacher'), ('third', 'masks')):
        given, before = {role: path, 'run': name}, path
        run(tmp_path, epochs=1, given=given)
        path = str(toy_files(tmp_path, **given).best())
        assert read_json(Path(path).with_name('metadata.json'))['networks'] == ({role: sha256_of(before)} if before else {}), 'and which network that was'
        if name == 'first':      # one that saw others, of before anything told on what it stood
            beside = Path(path).with_name('metadata.json')
            told = read_json(beside)
            assert told.pop('seen_before') == []
            write_json(beside, told | {'cases': {'train': ['1', '2']}})
        seen.append(cases_trained_on(path))
    assert seen == [{'1', '2'}, {'1', '2', '7'}, {'1', '2', '7'}]
