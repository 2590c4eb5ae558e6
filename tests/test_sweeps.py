"""Sweeps from outside: what is started, gone on with and left alone; failures and stops; the table of runs. A run here is a small script."""
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_cli import assert_sentence, medfusion

from medfusion import sweeps as S
from medfusion.cli import read_value
from medfusion.files import sha256_of
from medfusion.inference import find_model, methods, named_model
from medfusion.paper_figures import named_method
from medfusion.phantom import write_phantom
from medfusion.runs import check_parameters, make_folder, nbs_dir, read_run, save_checkpoint, slices_sha256, write_history, write_metadata, write_run
from medfusion.tables import split_values
from medfusion.wavelet_fusion import WaveletFusion

GRID = {'w_gradient': [0.5, 1.0], 'seed': [0, 1]}
# Takes the place of `medfusion train`: epochs until told to stop, a record of how it ended; `w_sd` is how it misbehaves.
TOY = '''
import json, pathlib, signal, sys, time
folder, values = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
def record(state):
    (folder / 'run.json').write_text(json.dumps({'format': 'medfusion run 1', 'method': 'toy', 'run': folder.name, 'state': state,
        'started': '2026-01-01T00:00:00+00:00', 'parameters': values, 'versions': {}, 'checkpoints': {}, 'numbers': {'means': {'toy': {'VIF': .5}}, 'best_epoch': 1, 'validation': {'VIF': .4}}}))
def stop(*_):
    record('interrupted')
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if values['w_sd'] == 1:
    sys.exit('medfusion: the disk is full.')
folder.mkdir(parents=True, exist_ok=True)
history = folder / 'history.csv'
done = len(history.read_text().splitlines()) - 1 if history.is_file() and '-p resume=true' in sys.argv[3] else 0
for epoch in range(done + 1, values['num_epochs'] + 1):
    rows = history.read_text().splitlines() if epoch > 1 else ['epoch,train_loss,val_loss']
    history.write_text('\\n'.join([*rows, f'{epoch},{1 / epoch},{2 / epoch}']) + '\\n')
    time.sleep(30 if values['w_sd'] == 2 and epoch == 2 and not done else 0)
record('finished')
'''


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    data = write_phantom(tmp_path_factory.mktemp('sweeps') / 'Dataset', cases=3, slices=1, size=64) / 'train'
    return {'ct_dir': str(data / 'CT'), 'mri_dir': str(data / 'MRI'), 'num_epochs': 3}


@pytest.fixture
def started(monkeypatch):
    "The commands of the runs that a sweep starts; the toy runs in their place."
    commands, real = [], subprocess.Popen

    class Toy(S.RunAtWork):
        def __init__(self, run, jobs=1):
            def popen(words, **options):
                commands.append(words[3:])
                return real([sys.executable, '-c', TOY, str(run.folder), json.dumps(run.parameters), ' '.join(words)], **options)
            monkeypatch.setattr(S.subprocess, 'Popen', popen)
            super().__init__(run, jobs)
    monkeypatch.setattr(S, 'RunAtWork', Toy)
    return commands


def test_every_combination_once_and_never_again(base, started, tmp_path, capsys):
    given = base | {'save_dir': str(tmp_path)}
    table = S.sweep('wavelet', GRID, given, jobs=2, progress='lines')
    names = ['w_gradient=0.5+seed=0', 'w_gradient=0.5+seed=1', 'w_gradient=1+seed=0', 'w_gradient=1+seed=1']
    assert list(table.index) == names and table.state.eq('finished').all() and table.epochs.eq(3).all() and table.fault.eq('').all()
    assert sorted(command[-1] for command in started) == names and all('resume=true' not in command for command in started)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 8 and sum(line.endswith(' more to come') for line in told) == 4 == sum('finished' in line for line in told)
    assert told[0] == 'w_gradient=0.5+seed=0: begins, 3 more to come', 'a line before the first run ends'
    assert max(np.cumsum([1 if line.endswith(' more to come') else -1 for line in told])) == 2, 'two at a time'
    assert S.sweep('wavelet', GRID | {'seed': [0, 1, 2]}, given, progress='none').state.eq('finished').all()
    assert sorted(command[-1] for command in started[4:]) == ['w_gradient=0.5+seed=2', 'w_gradient=1+seed=2'], 'only what is new'
    S.sweep('wavelet', GRID, given | {'num_epochs': 5}, progress='none')
    assert len(started) == 10 and all('resume=true' in command for command in started[6:]), 'longer runs go on'


def test_one_failing_run_does_not_stop_the_others(base, started, tmp_path):
    table = S.sweep('wavelet', {'w_sd': [0.0, 1.0, 0.5]}, base | {'save_dir': str(tmp_path)}, progress='none')
    assert table.state.tolist() == ['finished', 'failed', 'finished'] and table.fault.tolist() == ['', 'the disk is full.', '']
    shown = S.runs_table(table)
    assert shown.epochs.tolist() == ['3/3', '', '3/3'] and [*shown][:5] == ['state', 'when', 'epochs', 'best epoch', 'w_sd'], 'what differs, and nothing else'


def test_stopped_and_gone_on_with(base, started, tmp_path):
    given = base | {'save_dir': str(tmp_path)}

    def interrupt():
        while not (tmp_path / 'w_sd=2/history.csv').exists():    # the second run is at work
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # what a shell starts in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            S.sweep('wavelet', {'w_sd': [0.0, 2.0, 3.0]}, given, progress='none')
    finally:
        signal.signal(signal.SIGINT, before)
    there = {path.name: read_run(path)['state'] for path in tmp_path.iterdir()}
    assert there == {'w_sd=0': 'finished', 'w_sd=2': 'interrupted'}
    first = len(started)
    assert S.sweep('wavelet', {'w_sd': [0.0, 2.0, 3.0]}, given, progress='none').state.eq('finished').all()
    assert [command[-1] for command in started[first:]] == ['w_sd=2', 'w_sd=3'] and 'resume=true' in started[first]
    assert 'resume=true' not in started[first + 1]


@pytest.mark.parametrize('grid, more, words', [
    ({'seed': [0], 'w_gradent': [1.0]}, {}, 'did you mean w_gradient'),
    ({'seed': [0, 'x']}, {}, 'seed of trainable-wavelet-fusion.ipynb must be int'),
    ({'seed': 0}, {}, 'needs a list of values'),
    ({'seed': [-1]}, {}, 'seed must be a whole number'),
    ({'seed': [1, 1]}, {}, 'Two runs of the sweep would be called seed=1'),
    ({'run': ['a']}, {}, 'chooses run itself'),
    ({'seed': [0, 1]}, {'checkpoint_dir': 'weights'}, 'chooses checkpoint_dir itself'),
    ({'seed': [0]}, {'ct_dir': '/nowhere/CT'}, '/nowhere/CT'),
])
def test_what_no_sweep_can_be_made_of_is_said_before_the_first_run(base, started, tmp_path, grid, more, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        S.sweep('wavelet', grid, base | {'save_dir': str(tmp_path)} | more, progress='none')
    assert not started and not list(tmp_path.iterdir())


def test_what_the_method_refuses_is_said_before_the_first_run(base, started, tmp_path):
    given = {name: value for name, value in base.items() if name != 'num_epochs'} | {'save_dir': str(tmp_path)}
    with pytest.raises(ValueError, match='crop is 32'):
        S.sweep('resnet', {'crop': [64, 32]}, given, progress='none')
    with pytest.raises(ValueError, match='no dial'):
        S.sweep('wavelet', {'start': ['wavelet', 'wavelet-lite@1']}, given, progress='none')
    assert not started and not list(tmp_path.iterdir())


def test_runs_of_which_none_began_are_a_sentence(base, started, tmp_path):
    given = [word for name, value in (base | {'save_dir': tmp_path, 'w_sd': 1}).items() for word in ('-p', f'{name}={value}')]
    result = medfusion('sweep', 'wavelet', '-p', 'seed=0,1', *given)
    assert result.exit_code == 1 and result.stderr.strip().splitlines()[-1].startswith('medfusion: 2 of 2 runs failed: seed=0 (the disk is full)'), result.stderr


def test_a_run_of_the_name_with_other_parameters_is_refused(base, started, tmp_path):
    given = base | {'save_dir': str(tmp_path)}
    S.sweep('wavelet', {'seed': [0]}, given, progress='none')
    with pytest.raises(ValueError, match='seed=0 holds a run whose w_mse is 1.0, and 0.5 is asked for; give the sweep a name'):
        S.sweep('wavelet', {'seed': [0]}, given | {'w_mse': 0.5}, progress='none')
    with pytest.raises(ValueError, match='num_epochs is 3, and 2'):
        S.sweep('wavelet', {'seed': [0]}, given | {'num_epochs': 2}, progress='none')
    assert S.sweep('wavelet', {'seed': [0]}, given | {'w_mse': 0.5}, 'soft', progress='none').index[0] == 'soft+seed=0'


@pytest.mark.parametrize('method, name, value', [('wavelet', 'start', find_model('wavelet').path), ('resnet', 'backbone_weights', 'b.pt')])
def test_a_network_is_the_same_by_whatever_path(base, tmp_path, method, name, value):
    "A path from nbs/, as in a file of parameters, is in the record of the run from the root on, for the command that made it took it as typed."
    notebook, place = methods()[method].notebook, Path(tmp_path, value)
    given = {one: text for one, text in base.items() if one != 'num_epochs'} | {'save_dir': str(tmp_path), name: os.path.relpath(place, nbs_dir())}
    write_run(tmp_path / 'seed=0', method='toy', parameters=check_parameters(notebook, given | {'run': 'seed=0', name: str(place)}), state='finished', started=0)
    assert [run.todo for run in S.plan(method, {'seed': [0]}, given)] == ['finished']
    with pytest.raises(ValueError, match=f'seed=0 holds a run whose {name} is'):
        S.plan(method, {'seed': [0]}, given | {name: {'start': 'wavelet', 'backbone_weights': 'medfusion'}[name]})


def test_a_run_that_was_killed_says_so_and_not_its_last_warning(base, tmp_path, monkeypatch):
    script = "import os, sys; print('medfusion: the slices are nearly black.', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    popen = subprocess.Popen
    monkeypatch.setattr(S.subprocess, 'Popen', lambda words, **options: popen([sys.executable, '-c', script], **options))
    run, = S.plan('wavelet', {'seed': [0]}, base | {'save_dir': str(tmp_path)})
    assert S.RunAtWork(run).fault() == 'its process ended with -9.'


def test_from_the_shell(base, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ['sweep', 'wavelet', '-p', 'w_sd=0,1', '-p', 'epochs=2', '-p', 'save_dir=R', '-p', f'ct_dir={base["ct_dir"]}', '-p', f'mri_dir={base["mri_dir"]}']
    listed = medfusion(*words, '--dry-run')
    assert listed.exit_code == 0 and listed.stdout.split() == ['begin', str(tmp_path / 'R/w_sd=0'), 'begin', str(tmp_path / 'R/w_sd=1')] and not started
    result = medfusion(*words)
    assert_sentence(result, '1 of 2 runs failed: w_sd=1 (the disk is full). The same command tries them again.')
    shown = medfusion('runs', 'R')
    assert shown.exit_code == 0 and 'w_sd=0' in shown.stdout and '2/2' in shown.stdout
    assert medfusion('sweep', 'wavelet', '-p', 'seed=0').exit_code == 2, 'nothing is varied'
    assert_sentence(medfusion('sweep', 'wavelet', '-p', 'seed=0,1', '-p', 'run=a'), 'chooses run itself')
    assert_sentence(medfusion('sweep', 'wavelet', '-p', 'seed=0,1', '-p', f'ct_dir={base["ct_dir"]}'), 'ct_dir was given without mri_dir')


@pytest.fixture
def runs(tmp_path):
    "A folder with two runs of each of two recipes, one that failed, and a benchmark."
    for number in range(4):
        write_run(tmp_path / 'toy' / f'r{number}', method='toy', parameters={'seed': number % 2, 'w': number // 2 / 10, 'save_dir': str(tmp_path)}, state='finished', started=60 * number,
                  numbers={'best_epoch': 3, 'validation': {'VIF': 0.5 + number / 100, 'invented': 0.01 / (1 + number)}, 'means': {'toy': {'VIF': 0.6}, 'maximum': {'VIF': 0.9}}})
        write_history(tmp_path / 'toy' / f'r{number}' / 'history.csv', [{'epoch': 1, 'val_loss': 0.1 * number}])
    write_run(tmp_path / 'toy' / 'bad', method='toy', parameters={'seed': 0, 'w': 0.2}, state='failed', started=900)
    write_run(tmp_path / 'all', method='benchmark', parameters={'columns': ['EN']}, state='finished', started=1000, numbers={'means': {'x': {'EN': 1.0}}})
    return tmp_path


def test_the_table_of_runs(runs):
    (runs / 'toy' / 'torn').mkdir()
    (runs / 'toy' / 'torn' / 'run.json').write_text('{')
    with pytest.warns(UserWarning, match='torn/run.json is not JSON'):
        table = S.load_runs(str(runs))
    assert list(table.index) == ['r0', 'r1', 'r2', 'r3', 'bad'] and table['VIF test'].tolist()[:4] == [0.6] * 4
    toys = S.select_runs(table, {'method': 'toy'})
    assert S.varied(toys) == ['seed', 'w'], 'the benchmark is no training, and is not in the table'
    with pytest.raises(ValueError, match='No run has w=7; there is 0.0, 0.1, 0.2'):
        S.select_runs(toys, {'w': '7'})
    assert list(S.select_runs(toys, {'w': '0.1', 'state': 'finished'}, 'VIF').index) == ['r3', 'r2']
    assert S.select_runs(toys, sort='invented').index[0] == 'r3', 'lower is better' and S.select_runs(toys, sort='invented').index[-1] == 'bad'
    told = S.over_seeds(toys, columns=['VIF'])
    assert told.index.tolist() == ['w=0', 'w=0.1'] and told.runs.tolist() == [2, 2] and told['VIF val'].tolist() == ['0.505 ± 0.007', '0.525 ± 0.007']
    with pytest.raises(ValueError, match="no column 'VIV'"):
        S.select_runs(table, sort='VIV')


def test_runs_of_other_lengths_are_other_recipes(tmp_path):
    for number in range(4):
        write_run(tmp_path / f'r{number}', method='toy', parameters={'seed': number % 2, 'num_epochs': 2 + number // 2}, state='finished', started=number,
                  numbers={'best_epoch': 1, 'validation': {'VIF': number / 10}, 'means': {'toy': {'VIF': 0.6}}})
    table = S.load_runs(str(tmp_path))
    assert S.over_seeds(table, columns=['VIF']).runs.to_dict() == {'epochs=2': 2, 'epochs=3': 2}
    for name in ('epochs', 'num_epochs'):
        assert S.over_seeds(table, name, columns=['VIF']).runs.to_dict() == {'seed=0': 2, 'seed=1': 2}
    with pytest.raises(ValueError, match="no column 'sede'"):
        S.over_seeds(table, 'sede')
    with pytest.raises(ValueError, match='VIF val is no parameter in which runs could differ; give one, such as seed'):
        S.over_seeds(table, 'VIF')


def test_where_only_benchmarks_are_is_said(tmp_path):
    write_run(tmp_path / 'nc', method='benchmark', parameters={}, state='finished', started=0)
    with pytest.raises(ValueError, match='what is there is of a benchmark, not of a training'):
        S.load_runs(tmp_path)
    (tmp_path / 'nc' / 'run.json').unlink()
    with pytest.raises(ValueError, match='no folder there holds a run.json'):
        S.load_runs(tmp_path)


def test_the_table_in_files(runs, monkeypatch):
    monkeypatch.chdir(runs)
    result = medfusion('runs', 'toy', '--where', 'state=finished', '--sort', 'VIF', '--columns', 'VIF', '--csv', 'a.csv', '--latex', 'a.tex', '--markdown', 'a.md', '--curves', 'a.png')
    assert result.exit_code == 0, result.output
    assert list(pd.read_csv('a.csv').run) == ['r3', 'r2', 'r1', 'r0'] and 'VIF test' in pd.read_csv('a.csv')
    assert r'\toprule' in (runs / 'a.tex').read_text() and '| r3 |' in (runs / 'a.md').read_text() and (runs / 'a.png').stat().st_size > 1000
    grouped = medfusion('runs', 'toy', '--over', 'seed', '--columns', 'VIF')
    assert '0.525 ± 0.007' in grouped.stdout
    assert_sentence(medfusion('runs', 'toy', '--csv', 'a.txt'), 'a.txt')
    assert_sentence(medfusion('runs', 'toy', '--curves', 'a.doc'), 'a.doc does not end in .pdf, .svg, .png')
    assert_sentence(medfusion('runs', 'nowhere'), 'nowhere')
    assert medfusion('runs', 'toy', '--where', 'seed').exit_code == 2


def test_a_table_takes_the_place_of_no_history(runs, monkeypatch):
    monkeypatch.chdir(runs)
    before = (runs / 'toy/r1/history.csv').read_bytes()
    (runs / 'toy/linked.csv').symlink_to('r1/history.csv')
    for out in ('toy/r1/history.csv', 'toy/linked.csv'):
        assert_sentence(medfusion('runs', 'toy', '--csv', out), 'is what is read')
    assert (runs / 'toy/r1/history.csv').read_bytes() == before


@pytest.mark.long
def test_real_runs_interrupted_and_gone_on_with(base, tmp_path):
    given = {**base, 'save_dir': str(tmp_path), 'num_epochs': 150, 'width': 4}
    command = [sys.executable, '-m', 'medfusion', 'sweep', 'wavelet', '-p', 'w_gradient=0.5,1', '-p', 'seed=0,1']
    command += [word for name, value in given.items() for word in ('-p', f'{name}={value}')]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    second = tmp_path / 'w_gradient=0.5+seed=1'
    while first.poll() is None and len(S.read_history(second)) < 3:
        time.sleep(0.2)
    first.terminate()
    told = first.communicate()[1]
    assert first.returncode == 143 and 'To go on: medfusion sweep' in told, told
    assert read_run(tmp_path / 'w_gradient=0.5+seed=0')['state'] == 'finished' and read_run(second)['state'] == 'interrupted'
    began = read_run(tmp_path / 'w_gradient=0.5+seed=0')['started']
    assert subprocess.run(command).returncode == 0
    table = S.load_runs(str(tmp_path))
    assert table.state.eq('finished').all() and table.epochs.eq(150).all() and len(table) == 4
    assert read_run(tmp_path / 'w_gradient=0.5+seed=0')['started'] == began and S.varied(table) == ['seed', 'w_gradient']


def test_the_names_work_wherever_a_run_is_named():
    "In a shell, in a list of the benchmark's checkpoints, with a title, between commas."
    name = S.name_of_run({'w_gradient': 0.5, 'lr': 1e-5, 'start': 'run:a,b'}, 'wide')
    assert shlex.quote(name) == name and split_values(f'{name},maximum') == [name, 'maximum']
    specs = read_value(f'[run:{name}, ours=run:{name}]', list[str])
    assert [named_model(spec) for spec in specs] == [(name, f'run:{name}'), ('ours', f'run:{name}')]
    assert [named_method(spec)[1] for spec in specs] == [f'run:{name}'] * 2


def test_a_run_that_began_from_another_network_is_refused(base, tmp_path):
    "The path is the same, and what lies there is not: the table told of a network that no longer is."
    network = WaveletFusion(width=4)
    kept = {'method': 'trainable_wavelet_fusion', 'config': network.config, 'state_dict': network.state_dict(), 'metrics': {}}
    start = save_checkpoint(make_folder(tmp_path / 'start') / 'wavelet_fusion_spatial_best.pt', epoch=1, **kept)
    given = base | {'save_dir': str(tmp_path), 'start': str(start)}
    [run] = S.plan('wavelet', {'seed': [0]}, given)
    best = save_checkpoint(make_folder(run.folder / 'checkpoints/final/trainable_wavelet_fusion') / 'wavelet_fusion_spatial_best.pt', epoch=3, **kept)
    write_metadata(best, networks={'start': sha256_of(start)})
    write_run(run.folder, method='trainable_wavelet_fusion', parameters=run.parameters, state='finished', started=0, checkpoints=[best])
    assert [one.todo for one in S.plan('wavelet', {'seed': [0]}, given)] == ['finished']
    save_checkpoint(start, epoch=2, **kept)
    with pytest.raises(ValueError, match='whose start, .*_best.pt, was another network then; give the sweep a name'):
        S.plan('wavelet', {'seed': [0]}, given)


def test_a_run_on_slices_that_were_changed_is_refused(started, tmp_path):
    part = write_phantom(tmp_path / 'Dataset', cases=3, slices=1, size=64) / 'train'
    given = {'ct_dir': str(part / 'CT'), 'mri_dir': str(part / 'MRI'), 'num_epochs': 1, 'save_dir': str(tmp_path / 'results')}
    for run in S.plan('wavelet', {'seed': [0, 1]}, given):
        write_run(run.folder, method='trainable_wavelet_fusion', parameters=run.parameters, state='finished', started=0,
                  data_sha256=slices_sha256(SimpleNamespace(**run.parameters)))
    assert [run.todo for run in S.plan('wavelet', {'seed': [0, 1, 2]}, given)] == ['finished', 'finished', 'begin']
    write_phantom(tmp_path / 'Dataset', cases=3, slices=1, size=64, seed=5, replace=True)
    with pytest.raises(ValueError, match=r'seed=0 holds a run that was trained on other slices than .*train/CT and those beside it hold now; give the sweep a name'):
        S.sweep('wavelet', {'seed': [0, 1]}, given, progress='none')
    assert not started and [run.todo for run in S.plan('wavelet', {'seed': [0, 1]}, given, 'other')] == ['begin', 'begin']
