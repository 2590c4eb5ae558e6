"""What the notebook of runs cannot show: parameters as people write them, folders under attack, damaged files, two runs at once."""
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import types
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import papermill.cli
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import in_child, notebook
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from medfusion import runs
from medfusion.files import sha256_of, write_image
from medfusion.runs import (Run, check_parameters, check_run_name, check_values, checkpoint_files, claim_folder, find_run, load_checkpoint,
                            load_weights, make_room, nbs_dir, new_folder, notebook_parameters, open_parts, open_run, read_parameters, read_run,
                            resolve_path, run_checkpoint, run_folder, save_checkpoint, write_run)

ROOT = Path(__file__).resolve().parents[1]
some = settings(suppress_health_check=list(HealthCheck))    # how many, and which, conftest.py says


# ---- parameters ---------------------------------------------------------------------------------------------------

PARAMETERS = '''num_epochs: int = 20    # passes
lr: float = 1e-3
decay: float | None = None
augment: bool = False
ct_dir: str = '../Dataset/train/CT'    # a folder
cases: list[str] = ['2', '20']
weights: dict = {'ssim': 1.0}
run_name: str | None = None
precision: str = 'no'
'''


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return notebook(tmp_path_factory.mktemp('toy'), PARAMETERS, 'for epoch in range(3):\n    total = 0.0\n%matplotlib inline')


@pytest.fixture
def values(toy):
    return {name: parameter.default for name, parameter in notebook_parameters(toy).items()}


def test_the_declared_parameters(toy):
    declared = notebook_parameters(toy)
    assert list(declared) == ['num_epochs', 'lr', 'decay', 'augment', 'ct_dir', 'cases', 'weights', 'run_name', 'precision']
    assert (declared['ct_dir'].comment, declared['lr'].comment) == ('a folder', '')
    assert declared['cases'].type == list[str]


@pytest.mark.parametrize('name, value, words', [
    ('num_epochs', '2', 'must be int'), ('num_epochs', 2.0, 'must be int'), ('num_epochs', True, 'must be int'),
    ('num_epochs', 10**30, 'must be int'), ('lr', 10**400, 'must be float'),
    ('lr', 'fast', 'must be float'), ('lr', False, 'must be float'), ('lr', float('nan'), 'must be a finite number, not nan'), ('lr', '1e999', 'must be a finite number, not inf'),
    ('lr', None, 'take the line out'), ('augment', None, 'take the line out'),
    ('augment', 'false', 'write False'), ('augment', 'True', 'write True'), ('augment', 1, 'must be bool'),
    ('ct_dir', 34, "`ct_dir: '34'`"), ('ct_dir', None, 'must be str'), ('ct_dir', False, "`ct_dir: 'False'`"),
    ('cases', '["2"]', 'a YAML file given with -f'), ('cases', [2, 20], 'for example `cases: ["2", "20"]`, texts in quotes'),
    ('weights', 'ssim', 'a YAML file given with -f'), ('run_name', 5, "`run_name: '5'`"), ('decay', 'x', 'float | None')])
def test_wrong_types(toy, name, value, words):
    with pytest.raises(ValueError, match=f'Parameter {name} of toy.ipynb') as complaint:
        check_parameters(toy, {name: value})
    assert words in str(complaint.value) and len(str(complaint.value)) < 400
    assert not re.search(r' -[ry]\b', str(complaint.value))    # options of papermill that `medfusion train` does not have


def test_right_types(toy, values):
    checked = check_parameters(toy, {'lr': 1, 'decay': 2, 'cases': [], 'run_name': 'a'})
    assert checked == values | {'lr': 1.0, 'decay': 2.0, 'cases': [], 'run_name': 'a'}
    assert type(checked['lr']) is float and type(checked['decay']) is float


@pytest.mark.parametrize('text, name, value', [
    ('precision: no', 'precision', 'no'), ('lr: 1e-3', 'lr', 0.001), ('lr: 2', 'lr', 2.0), ('lr: .5E-2', 'lr', 0.005),
    ('decay: 5e-4', 'decay', 0.0005), ('decay:', 'decay', None), ('augment: yes', 'augment', True), ('augment: off', 'augment', False)])
def test_yaml_as_people_write_it(toy, text, name, value):
    found = check_parameters(toy, yaml.safe_load(text))[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('name, hint', [('num_epoch', 'did you mean num_epochs?'), ('ctdir', 'did you mean ct_dir?'),
                                        ('temperature', 'it has num_epochs, lr'), ('mirror', 'it is augment now'), (5, 'it has'), (None, 'it has')])
def test_unknown_names(toy, values, name, hint):
    with pytest.raises(ValueError, match=f'{name} is not a parameter of toy.ipynb') as complaint:
        check_parameters(toy, values | {name: 2})
    assert hint in str(complaint.value)


def test_what_the_namespace_may_hold(toy, values):
    others = {'__name__': '__main__', '_': 3, 'np': np, 'epoch': 2, 'total': 0.5, 'run': test_unknown_names}
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


def test_a_command_shows_of_a_warning_the_sentence_alone(toy, values, monkeypatch, capsys):
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)      # and puts it back
    monkeypatch.setenv('MEDFUSION_COMMAND', 'medfusion train toy')
    read_parameters(toy, values)
    warnings.warn('The CT is dark; give a range.')
    warnings.warn('soon gone', DeprecationWarning)
    assert capsys.readouterr().err == 'The CT is dark; give a range.\n'


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
    for text in ('hello', '{"cells": [3]}', '[]', '[' * 100_000):
        (tmp_path / 'text.ipynb').write_text(text)
        with pytest.raises(ValueError, match='is not a notebook'):
            notebook_parameters(tmp_path / 'text.ipynb')


VALUES = dict(run='latest', num_epochs=2, batch_size=4, lr=1e-3, seed=0, crop=0, ema=0.0, precision='no', w_mse=1.0, w_ssim=0.0)


@pytest.mark.parametrize('name, value', [
    ('lr', 0), ('lr', -1e-3), ('seed', -1), ('num_epochs', 0), ('batch_size', 0), ('crop', -1), ('ema', 1.0), ('ema', -0.5), ('clip', -1.0),
    ('precision', 'half'), pytest.param('precision', 'fp16', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='fp16 is possible with a GPU')),
    ('w_ssim', -1.0), ('w_mse', 0.0), ('run', '..'), ('run', 'a/b'), ('width', 0), ('residual', -0.1), ('gain', -0.1), ('layer_decay', 0.0),
    ('cache_gb', -1.0)])
def test_values_that_no_run_can_be_made_with(name, value):
    check_values(VALUES)
    with pytest.raises(ValueError, match=name if name != 'run' else 'cannot be named') as complaint:
        check_values(VALUES | {name: value})
    assert re.search(r'\.$', str(complaint.value))


def test_crops_too_small_for_vif():
    check_values(VALUES | {'w_vif': 0.1, 'crop': 41})
    with pytest.raises(ValueError, match='crop must be .* 41 and more, not 40: VIF, for w_vif'):
        check_values(VALUES | {'w_vif': 0.1, 'crop': 40})


@some
@given(st.dictionaries(st.sampled_from(['num_epochs', 'lr', 'decay', 'augment', 'ct_dir', 'cases', 'weights', 'run_name', 'precision']) | st.text() |
                       st.integers() | st.none() | st.booleans(),
                       st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
                                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4), max_size=3))
def test_whatever_a_parameter_file_holds(toy, content):
    "It is a set of checked values, or a ValueError of one sentence or two."
    content = yaml.safe_load(yaml.safe_dump(content, allow_unicode=True)) or {}
    try:
        checked = check_parameters(toy, content)
    except ValueError as error:
        assert 'toy.ipynb' in str(error)
        return
    for name, parameter in notebook_parameters(toy).items():
        assert runs.accepts(parameter.type, checked[name])


# ---- names and paths ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['..', '.', '', ' ', '../../nbs/x', '/tmp/x', 'a/b', 'a\\b', '-p', '.hidden', 'a\n', 'a\0', 'a.', 'C:', 'é' * 60])
def test_a_run_is_a_name_and_no_path(tmp_path, name):
    with pytest.raises(ValueError, match='run'):
        open_run('toy', types.SimpleNamespace(save_dir=str(tmp_path), run=name))
    assert list(tmp_path.iterdir()) == []


@some
@given(st.text(max_size=12))
def test_a_name_stays_in_its_folder(name):
    try:
        check_run_name(name)
    except ValueError:
        return
    assert Path('/results', name).parent == Path('/results') and Path('/results', name).resolve().name == name


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
    for wrong in ('', '~nosuchuser/data'):
        with pytest.raises(ValueError, match='empty path|home folder'):
            resolve_path(wrong)


def test_no_clone_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.medfusion, '__file__', str(tmp_path / 'site-packages' / 'medfusion' / '__init__.py'))
    with pytest.raises(FileNotFoundError, match='neither above'):
        resolve_path('../Dataset')
    assert resolve_path(tmp_path / 'a') == tmp_path / 'a'


# ---- data ---------------------------------------------------------------------------------------------------------

def slices(folder, *names):
    for kind in ('CT', 'MRI'):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(names):
            write_image(folder / kind / name, np.full((16, 16), 40 + i, np.uint8))
    return folder


def places(folder, **given):
    others = dict.fromkeys(['ct_val_dir', 'mri_val_dir', 'ct_test_dir', 'mri_test_dir'], '')
    return types.SimpleNamespace(**{'ct_dir': str(folder / 'CT'), 'mri_dir': str(folder / 'MRI'), 'seed': 0} | others | given)


def test_missing_data_is_said_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slices(tmp_path / 'mine', '1001.png')
    for parameters, words in [({'ct_dir': '/nonexistent'}, '/nonexistent'), ({'ct_dir': '/CT', 'mri_dir': '/MRI'}, '/CT'),
                         ({'ct_dir': 'mine/CT'}, "relative to nbs/: from there it is '" + os.path.relpath(tmp_path / 'mine/CT', nbs_dir())),
                         ({'ct_val_dir': '/no/CT', 'mri_val_dir': '/no/MRI'}, "ct_val_dir is '/no/CT'")]:
        with pytest.raises(FileNotFoundError) as complaint:
            open_parts(places(tmp_path / 'mine', **parameters))
        assert all(word in str(complaint.value) for word in (words, 'medfusion data harvard', 'medfusion data phantom'))


@pytest.mark.parametrize('names, words', [(['1001.png', '1002.png'], r'^1 case of .* cannot give .*; training takes two or more: add patients\.$'),
                                          (['1001.png', '2001.png'], r'^2 cases of .*; name one to test on and none to validate on \(test_cases=2\), or add')])
def test_too_few_patients_are_told_what_works(names, words, tmp_path):
    flat = slices(tmp_path / 'flat', *names)
    with pytest.raises(ValueError, match=words):
        open_parts(places(flat))
    if '2001.png' in names:
        assert open_parts(places(flat, test_cases='2'))[1] is None


def test_no_patient_comes_into_two_parts_of_a_flat_folder(tmp_path, capsys):
    flat = slices(tmp_path / 'flat', 'pA_s1.png', 'pA_s2.png', 'pB_s1.png', 'pB_s2.png')
    with pytest.raises(ValueError, match='The case of pA_s1.png'):
        open_parts(places(flat))
    mac = slices(tmp_path / 'mac', *(unicodedata.normalize('NFD', f'm\u00fcller_s{index}.png') for index in range(4)))
    with pytest.raises(ValueError, match='cannot be told from its name'):
        open_parts(places(mac))
    counters = slices(tmp_path / 'counters', 'p1_0998.png', 'p1_0999.png', 'p1_1000.png', 'p2_0001.png', 'p3_0001.png')
    with pytest.raises(ValueError, match='may be slices of one patient or of two'):
        open_parts(places(counters))
    flat = slices(tmp_path / 'good', '1001.png', '1002.png', '2001.png', '3001.png')
    parts = open_parts(places(flat))
    split = runs.split_of(*parts)
    assert sorted(case for cases in split.values() for case in cases) == ['1', '2', '3']
    said = capsys.readouterr().out
    assert 'split with seed 0' in said and all(f'{part} {", ".join(cases)}' in said for part, cases in split.items())


def test_synthetic_heads_are_shown_in_training_alone(tmp_path):
    flat = slices(tmp_path / 'flat', '1001.png', '1002.png', '2001.png', '3001.png')
    train, val, test = open_parts(places(flat), augment=True, crop=16, synthetic=1.0)
    assert all(item['name'] == 'of others' and item['ct'].shape == (1, 16, 16) for item in train)
    assert all(item['case'] for part in (val, test) for item in part) and runs.split_of(train, val, test)['train'] == train.cases
    for wrong in ({'synthetic': 1.5, 'augment': True, 'crop': 16}, {'synthetic': 0.2}, {'synthetic': 0.2, 'augment': True}, {'synthetic': 0.2, 'augment': True, 'crop': 300}):
        with pytest.raises(ValueError, match='synthetic_pairs is .* needs augment and a crop of up to 256'):
            open_parts(places(flat), **wrong)


def test_no_patient_comes_into_two_folders_without_a_record(tmp_path):
    for part, name in (('train', 'p1_0999.png'), ('val', 'p1_1000.png'), ('test', 'p3_0001.png')):
        slices(tmp_path / 'parts' / part, name)
    given = {f'{kind}_{part}_dir': str(tmp_path / 'parts' / part / kind.upper()) for part in ('val', 'test') for kind in ('ct', 'mri')}
    with pytest.raises(ValueError, match='may be slices of one patient or of two'):
        open_parts(places(tmp_path / 'parts' / 'train', **given))


def test_a_linked_data_set_is_the_data_set(tmp_path):
    for part, case in (('train', 1), ('val', 2), ('test', 3)):
        slices(tmp_path / 'Dataset' / part, f'{case}001.png')
        for kind in ('CT', 'MRI'):    # the leaf folders are links to folders with other names
            (tmp_path / 'Dataset' / part / kind).rename(tmp_path / f'{part}{kind}-blob')
            (tmp_path / 'Dataset' / part / kind).symlink_to(tmp_path / f'{part}{kind}-blob')
    parts = open_parts(places(tmp_path / 'Dataset' / 'train'))
    assert runs.split_of(*parts) == {'train': ['1'], 'val': ['2'], 'test': ['3']}


@pytest.mark.parametrize('flat', [True, False])
def test_a_range_of_values_holds_for_every_part(tmp_path, flat):
    "12 bits in 16, as scanners' exports give."
    for case, part in enumerate(('train', 'val', 'test'), 1):
        place = slices(tmp_path / 'Dataset' / ('train' if flat else part), f'{case}001.png')
        for kind in ('CT', 'MRI'):
            write_image(place / kind / f'{case}001.png', np.full((16, 16), 4080, np.uint16))
    for part in open_parts(places(tmp_path / 'Dataset' / 'train', value_range='0,4095')):
        assert part[0]['ct'].max() == pytest.approx(4080 / 4095) and part[0]['mri'].max() == pytest.approx(4080 / 4095)
    with pytest.raises(ValueError, match='is no range of values'):
        check_values({'value_range': '0-4095'})


# ---- checkpoints --------------------------------------------------------------------------------------------------

FACTS = dict(method='toy', config={'in_features': 9, 'out_features': 9}, epoch=1, metrics={'val_loss': 0.5})


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / 'net.pt', state_dict=nn.Linear(9, 9).state_dict(), **FACTS)


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match='net.pt would hold something that is neither a tensor nor a plain value: pathlib'):
        save_checkpoint(tmp_path / 'net.pt', **FACTS | {'config': {'at': tmp_path}}, state_dict={})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_damaged_anywhere_is_refused(tmp_path, checkpoint):
    whole, good = checkpoint.read_bytes(), load_checkpoint(checkpoint)['state_dict']
    for length in range(0, len(whole), 97):
        checkpoint.write_bytes(whole[:length])
        with pytest.raises(ValueError, match='net.pt is truncated'):
            load_checkpoint(checkpoint)
    for absent in (tmp_path, tmp_path / 'none.pt'):
        with pytest.raises(FileNotFoundError, match='There is no checkpoint'):
            load_checkpoint(absent)
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        checkpoint.write_bytes(damaged)
        try:
            weights = load_checkpoint(checkpoint)['state_dict']
        except ValueError:
            continue
        # what was hit lies between the parts of the file
        assert all(torch.equal(weights[name], value) for name, value in good.items())


plain_values = st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_subnormal=False) | st.text(max_size=4),
                            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5)
fields = ['format', 'method', 'config', 'state_dict', 'epoch', 'metrics', 'versions', 'data_sha256', 'weights']


@some
@given(st.dictionaries(st.sampled_from(fields), plain_values, max_size=3), st.sets(st.sampled_from(fields), max_size=2))
def test_a_checkpoint_of_the_wrong_shape(tmp_path_factory, changed, absent):
    "It loads into a network, or is a ValueError that names the file; nothing else."
    path = tmp_path_factory.getbasetemp() / 'fuzzed.pt'
    content = dict(format='medfusion checkpoint 1', state_dict=nn.Linear(9, 9).state_dict(), versions={}, data_sha256=None, **FACTS)
    torch.save({name: value for name, value in (content | changed).items() if name not in absent}, path)
    try:
        runs.build_model(nn.Linear, load_checkpoint(path), path)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize('change, words', [
    ({'format': 'medfusion checkpoint 99'}, "has the format 'medfusion checkpoint 99'.*install the version that wrote it"),
    ({'format': 'other'}, 'is not a checkpoint of medfusion'), ({'config': 5}, 'config is missing or of the wrong kind'),
    ({'method': 'another'}, 'checkpoint of another, not of toy')])
def test_checkpoints_of_others_are_refused(checkpoint, change, words):
    torch.save(load_checkpoint(checkpoint) | change, checkpoint)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(checkpoint, 'toy')


def test_the_shipped_checkpoints_are_read():
    "They were written by version 0.1.0; the backbone by a clone that was not installed, which said no version then."
    shipped = sorted((ROOT / 'medfusion' / 'shipped').glob('*/*.pt'))
    said = {path.stem: load_checkpoint(path)['versions'].get('medfusion') for path in shipped}
    assert len(said) == 4 and said.pop('resnet50_backbone') is None and {*said.values()} == {'0.1.0'}


@pytest.mark.parametrize('change, words', [
    (lambda weights: weights.pop('bias'), 'bias is missing'),
    (lambda weights: weights.update(extra=torch.zeros(1)), 'extra is too much'),
    (lambda weights: weights.update(bias=torch.zeros(3)), r'bias is \(3,\) where the network has \(9,\)'),
    (lambda weights: weights.update(bias=[0.0] * 9), 'bias is no tensor'),
    (lambda weights: weights.update(bias=torch.full((9,), math.nan)), 'bias is not finite'),
    (lambda weights: [weights.update({f'module.{name}': weights.pop(name)}) for name in list(weights)], 'save the state_dict of model.module')])
def test_weights_that_do_not_fit(checkpoint, change, words):
    loaded = load_checkpoint(checkpoint)
    change(loaded['state_dict'])
    with pytest.raises(ValueError, match=f'do not fit Linear: .*{words}'):
        load_weights(nn.Linear(9, 9), loaded, checkpoint)


@pytest.mark.parametrize('change, words', [
    (lambda value: value.to(torch.int32), 'of torch.int32 where'), (lambda value: value > 0, 'of torch.bool'), (lambda value: value.to(torch.complex64), 'complex64'),
    (lambda value: value.to_sparse(), 'no tensor of plain numbers'), (lambda value: value.to('meta'), 'no tensor of plain'), (lambda value: 5, 'no tensor'),
    (lambda value: (value + 1).double() * 1e300, 'not finite')],
    ids=['int', 'bool', 'complex', 'sparse', 'meta', 'no tensor', 'too large'])
def test_weights_of_another_kind(checkpoint, change, words):
    loaded = load_checkpoint(checkpoint)
    loaded['state_dict']['weight'] = change(loaded['state_dict']['weight'])
    with pytest.raises(ValueError, match=f'do not fit Linear: weight is .*{words}'):
        load_weights(nn.Linear(9, 9), loaded, checkpoint)
    torch.save(loaded, checkpoint)
    with pytest.raises(ValueError, match=str(checkpoint)):
        runs.build_model(nn.Linear, load_checkpoint(checkpoint), checkpoint)


def test_weights_of_another_precision_are_converted(checkpoint):
    loaded = load_checkpoint(checkpoint)
    loaded['state_dict'] = {name: value.half() for name, value in loaded['state_dict'].items()}
    assert load_weights(nn.Linear(9, 9), loaded, checkpoint).weight.dtype == torch.float32


@pytest.mark.parametrize('name, value', [('residual', float('nan')), ('residual', 'a'), ('width', 2.5), ('width', 'no'), ('cycle_spin', 'no'),
                                         ('cycle_spin', 1), ('width', [4])])
def test_values_of_a_config_are_of_the_kind_of_the_network(checkpoint, name, value):
    from medfusion.wavelet_fusion import WaveletFusion
    loaded = load_checkpoint(checkpoint) | {'config': {name: value}}
    with pytest.raises(ValueError, match=f'WaveletFusion cannot be made with the config in {checkpoint}'):
        runs.build_model(WaveletFusion, loaded, checkpoint)


def test_a_config_of_a_newer_version(checkpoint):
    loaded = load_checkpoint(checkpoint)
    loaded['config'] |= {'gates': 3}
    with pytest.raises(ValueError, match="Linear cannot be made with the config in .*gates.*use the version that wrote it"):
        runs.build_model(nn.Linear, loaded, checkpoint)


def test_equal_contents_make_equal_files(tmp_path):
    "Whether equal texts are one object, or were read from a file, must not show."
    history = [{'epoch': i, 'train_loss': 0.5 / i} for i in range(1, 4)]
    state = nn.Linear(3, 3).state_dict()
    common = dict(method='toy', config={'width': 4}, state_dict=state, epoch=3, metrics=history[-1])
    first = save_checkpoint(tmp_path / 'a.pt', **common, history=history, best={'metrics': history[-1], 'state_dict': state})
    loaded = load_checkpoint(first)
    again = save_checkpoint(tmp_path / 'b.pt', **{name: loaded[name] for name in ('method', 'config', 'state_dict', 'epoch', 'metrics')},
                            history=loaded['history'], best=loaded['best'])
    assert sha256_of(first) == sha256_of(again)


# ---- the record ---------------------------------------------------------------------------------------------------

@some
@given(st.dictionaries(st.sampled_from(['format', 'method', 'run', 'state', 'parameters', 'checkpoints', 'numbers', 'versions', 'started']),
                       plain_values, max_size=3), st.booleans())
def test_whatever_run_json_holds(tmp_path_factory, changed, old):
    "It is a record with what every record has, or a ValueError that names the file."
    folder = tmp_path_factory.getbasetemp() / 'fuzzed'
    write_run(folder, method='toy', parameters={'lr': 0.1}, state='finished', started=0)
    record = json.loads((folder / 'run.json').read_text()) | changed
    if old:
        record.pop('format')
    (folder / 'run.json').write_text(json.dumps(record))
    try:
        record = read_run(folder)
    except ValueError as error:
        assert str(folder / 'run.json') in str(error)
        return
    assert set(record) >= {'method', 'run', 'state', 'parameters', 'checkpoints', 'numbers'} and record['numbers'].keys() >= {'means', 'validation'}


@pytest.mark.parametrize('text', ['', 'hello', '[]', '{}', '{"format": "medfusion run 2"}', '[' * 100_000, '\0'])
def test_a_file_that_is_no_record(tmp_path, text):
    (tmp_path / 'run.json').write_text(text)
    with pytest.raises(ValueError, match='run.json'):
        read_run(tmp_path)


def test_a_record_of_the_first_version_is_read(tmp_path):
    (tmp_path / 'run.json').write_text(json.dumps({
        'method': 'resnet_fusion', 'parameters': {'w_intensity': 1.0, 'checkpoint_dir': '../checkpoints'}, 'git': None, 'versions': {},
        'device': 'CPU', 'seed': 0, 'data_sha256': None, 'checkpoints': {'resnet_fusion_best.pt': '0' * 64}, 'wall_seconds': 3.0,
        'numbers': {'metrics': {'ResNet fusion': {'VIF': 0.6}}, 'best_epoch': 3}}))
    record = read_run(tmp_path)
    assert record['state'] == 'finished' and record['numbers']['means'] == {'ResNet fusion': {'VIF': 0.6}} and record['numbers']['best_epoch'] == 3


# ---- a run's folder -----------------------------------------------------------------------------------------------

def parameters(folder, **given):
    return types.SimpleNamespace(**{'save_dir': str(folder / 'results'), 'run': 'a', 'checkpoint_dir': '', 'resume': False, 'replace': False} | given)


def train(p, epochs=2, finish=True, weight=1.0):
    "A run that leaves what a run leaves: checkpoints, a result, a record."
    files = checkpoint_files('toy', p)
    run = open_run('toy', p, files)
    common = dict(method='toy', config={}, state_dict={'w': torch.tensor(weight)}, metrics={})
    for epoch in range(1, epochs + 1):
        save_checkpoint(files.epoch(epoch), epoch=epoch, **common)
    save_checkpoint(files.best(), epoch=epochs, **common)
    run.checkpoints['toy_best.pt'] = sha256_of(files.best())
    (run_folder(p) / 'metrics.csv').write_text(f'{weight}\n')
    if finish:
        run.finish({'best_epoch': epochs})
    else:
        run.locks.close()    # as the end of a killed process gives them back
        Run.at_work.clear()
    return files


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file() and path.name != '.running.lock'}


def test_a_finished_run_is_replaced_only_when_asked(tmp_path):
    train(parameters(tmp_path), weight=1.0)
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match="holds a finished run. .*beside it: run = 'a-2'.*in its place.*replace = True"):
        train(parameters(tmp_path))
    assert content(tmp_path) == before
    train(parameters(tmp_path, replace=True), weight=2.0)
    kept, = [path for path in (tmp_path / 'results').iterdir() if path.name != 'a']
    assert re.fullmatch(r'\d{8}-\d{6}', kept.name) and (kept / 'metrics.csv').read_text() == '1.0\n'
    assert load_checkpoint(run_checkpoint(kept))['state_dict']['w'] == 1 and load_checkpoint(run_checkpoint(tmp_path / 'results/a'))['state_dict']['w'] == 2


def test_only_latest_makes_room_by_itself(tmp_path):
    "And the networks of the run before it are kept with it, though they lay under the fixed names."
    p = parameters(tmp_path, run='latest', checkpoint_dir=str(tmp_path / 'checkpoints'))
    for weight in (1.0, 2.0, 3.0):
        train(p, weight=weight)
    folders = sorted((tmp_path / 'results').iterdir())
    assert len(folders) == 3 and folders[-1].name == 'latest'
    assert sorted(load_checkpoint(run_checkpoint(folder))['state_dict']['w'].item() for folder in folders) == [1, 2, 3]
    assert run_checkpoint(tmp_path / 'results/latest').parent == tmp_path / 'checkpoints/final/toy'


@pytest.mark.parametrize('run', ['a', 'latest'])
def test_an_unfinished_run_is_not_begun_anew_by_accident(tmp_path, run, monkeypatch):
    p = parameters(tmp_path, run=run, checkpoint_dir=str(tmp_path / 'checkpoints'))
    train(p, finish=False)
    before = content(tmp_path)
    monkeypatch.setenv('MEDFUSION_COMMAND', 'medfusion train toy -f x.yaml')
    with pytest.raises(FileExistsError, match='holds 2 checkpoints of a run that is not finished') as complaint:
        open_run('toy', p, checkpoint_files('toy', p), notebook='toy.ipynb')
    for way in (f'--run {run} -p resume=true', f'--run {run}-2', f'--run {run} -p replace=true'):
        assert f'medfusion train toy -f x.yaml {way}' in str(complaint.value)
    assert content(tmp_path) == before
    resumed = parameters(tmp_path, run=run, resume=True, checkpoint_dir=str(tmp_path / 'checkpoints'))
    open_run('toy', resumed, checkpoint_files('toy', resumed)).finish()


def test_checkpoints_of_another_run_are_never_removed(tmp_path):
    "Two names, one checkpoint_dir: what the first left is not the second's to replace."
    shared = str(tmp_path / 'shared')
    train(parameters(tmp_path, run='latest', checkpoint_dir=shared), weight=1.0)
    with pytest.raises(FileExistsError, match='holds 2 checkpoints of another run, or of one whose record is gone'):
        train(parameters(tmp_path, run='b', checkpoint_dir=shared))
    train(parameters(tmp_path, run='latest', checkpoint_dir=str(tmp_path / 'elsewhere')), weight=2.0)
    with pytest.raises(FileExistsError, match='holds 2 checkpoints of another run, or of one whose record is gone'):
        train(parameters(tmp_path, run='latest', checkpoint_dir=shared))


def test_each_run_keeps_its_network_where_several_share_a_place(tmp_path):
    "Two names, one checkpoint_dir: whichever makes room, what lies there goes to the run that trained it, and takes no other network's place."
    shared = str(tmp_path / 'shared')
    train(parameters(tmp_path, run='a', checkpoint_dir=shared), weight=1.0)
    train(parameters(tmp_path, run='b'), weight=2.0)
    train(parameters(tmp_path, run='b', checkpoint_dir=shared, replace=True), weight=3.0)
    train(parameters(tmp_path, run='c', checkpoint_dir=shared, replace=True), weight=4.0)
    folders = {path.name: path for path in (tmp_path / 'results').iterdir()}
    [kept] = folders.keys() - {'a', 'b', 'c'}
    weights = {name: load_checkpoint(run_checkpoint(folder))['state_dict']['w'].item() for name, folder in folders.items()}
    assert weights == {'a': 1, 'b': 3, 'c': 4, kept: 2}


def test_where_another_runs_checkpoints_lie_each_way_out_leads_out(tmp_path, monkeypatch):
    "A run beside it keeps its own; a folder that was made for the new run, and holds nothing yet, is not kept as if it were a run."
    shared = str(tmp_path / 'shared')
    train(parameters(tmp_path, run='a', checkpoint_dir=shared), weight=1.0)
    for run in ('a', 'b'):
        with pytest.raises(FileExistsError, match=f"beside it: run = '{run}-2' and checkpoint_dir = ''. To begin anew"):
            train(parameters(tmp_path, run=run, checkpoint_dir=shared))
    monkeypatch.setenv('MEDFUSION_COMMAND', 'medfusion train toy')
    with pytest.raises(FileExistsError, match="--run b-2 -p checkpoint_dir=''[.] To begin anew"):     # without the quotes the full stop would be a folder
        open_run('toy', parameters(tmp_path, run='b', checkpoint_dir=shared), checkpoint_files('toy', parameters(tmp_path, run='b', checkpoint_dir=shared)), notebook='toy.ipynb')
    (tmp_path / 'results/b').mkdir()
    for name in ('.running.lock', 'executed.ipynb'):
        (tmp_path / 'results/b' / name).touch()
    assert make_room(tmp_path / 'results/b', checkpoint_files('toy', parameters(tmp_path, run='b', checkpoint_dir=shared))) == tmp_path / 'results/a'
    assert sorted(path.name for path in (tmp_path / 'results').iterdir()) == ['a', 'b']
    assert load_checkpoint(run_checkpoint(tmp_path / 'results/a'))['state_dict']['w'] == 1


def test_a_network_of_nobody_takes_no_other_networks_place(tmp_path):
    "What a run left whose record is gone is kept in a folder of its own, not over the network of the run that makes room."
    shared = str(tmp_path / 'shared')
    train(parameters(tmp_path / 'elsewhere', run='a', checkpoint_dir=shared), weight=1.0)
    train(parameters(tmp_path, run='b'), weight=2.0)
    train(parameters(tmp_path, run='b', checkpoint_dir=shared, replace=True), weight=3.0)
    found = (tmp_path / 'results').glob('*/checkpoints/final/toy/toy_best.pt')
    assert sorted(load_checkpoint(path)['state_dict']['w'].item() for path in found) == [1, 2]
    assert load_checkpoint(run_checkpoint(tmp_path / 'results/b'))['state_dict']['w'] == 3
    train(parameters(tmp_path, run='b', checkpoint_dir=str(tmp_path / 'new'), replace=True), weight=4.0)
    assert len(list((tmp_path / 'results').iterdir())) == 4 and all(map(content, (tmp_path / 'results').iterdir()))     # no folder without a run


def test_what_a_killed_run_left_is_kept_with_its_record(tmp_path):
    "No record holds the hash of its network, but it is of the run that had its checkpoints there."
    p = parameters(tmp_path, checkpoint_dir=str(tmp_path / 'shared'))
    train(p, finish=False)
    train(parameters(tmp_path, checkpoint_dir=p.checkpoint_dir, replace=True), weight=2.0)
    kept, = [path for path in (tmp_path / 'results').iterdir() if path.name != 'a']
    assert read_run(kept)['state'] == 'interrupted' and load_checkpoint(kept / 'checkpoints/final/toy/toy_best.pt')['state_dict']['w'] == 1


@pytest.mark.fault('train', 'killed between two writes', points=4)
def test_what_another_run_left_goes_to_it_whole(tmp_path, monkeypatch):
    "Its epochs, its metadata and its network, whichever of them was moved when the machine went down."
    for at in range(1, 5):
        p = parameters(tmp_path / str(at), checkpoint_dir=str(tmp_path / str(at) / 'shared'))
        files = train(p)
        (files.final / 'metadata.json').write_text('{}')
        whole = sorted(content(tmp_path / str(at) / 'shared').values())
        moved = runs.shutil.move
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            left = iter(range(at))

            def move(*places):
                if next(left) == at - 1:
                    raise InterruptedError
                return moved(*places)
            patch.setattr(runs.shutil, 'move', move)
            make_room(tmp_path / str(at) / 'results/b', files)
        make_room(tmp_path / str(at) / 'results/b', files)
        assert sorted(content(run_folder(p) / 'checkpoints').values()) == whole and not content(tmp_path / str(at) / 'shared')


def test_bad_parameters_touch_nothing(tmp_path):
    train(parameters(tmp_path), finish=False)
    before = content(tmp_path)
    for wrong in ({'seed': -1}, {'w_ssim': -1.0}, {'lr': 0.0}, {'precision': 'half'}, {'run': '../a'}):
        with pytest.raises(ValueError):
            p = parameters(tmp_path, replace=True, **wrong)
            open_run('toy', p, checkpoint_files('toy', p))
    assert content(tmp_path) == before


@pytest.mark.fault('train', 'killed between two writes', points=6)
def test_making_room_survives_a_crash_at_any_move(tmp_path, monkeypatch):
    "Whatever was moved when the machine went down, the next call ends it, and no file is lost."
    for at in range(1, 7):
        folder = tmp_path / str(at)
        p = parameters(folder, run='latest', checkpoint_dir=str(folder / 'checkpoints'))
        files = train(p)
        whole = sorted(content(folder).values())

        def crash():
            def count(original):
                def counted(*arguments):
                    count.calls += 1
                    if count.calls == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*arguments)
                return counted
            count.calls = 0
            runs.shutil.move, os.rename = count(runs.shutil.move), count(os.rename)
            make_room(run_folder(p), files)
        in_child(crash)
        assert sorted(content(folder).values()) == whole
        train(p, weight=2.0)
        assert set(whole) <= set(content(folder).values())


@pytest.mark.fault('train', 'several at once', points=8)
def test_two_runs_in_one_second(tmp_path):
    "Array jobs start at the same moment: each makes a folder that no other has."
    made = []
    for _ in range(8):
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, new_folder(tmp_path, '20260101-120000').name.encode())
            os._exit(0)
        os.close(write)
        made.append(read)
    assert len({os.read(read, 100) for read in made}) == 8
    for _ in range(8):
        os.wait()


@pytest.mark.fault('train', 'several at once')
def test_two_processes_on_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr('medfusion.runs.claim_folder.__wrapped__.__defaults__', (0.2,))
    p = parameters(tmp_path)
    open_run('toy', p, checkpoint_files('toy', p))

    def second():
        try:
            open_run('toy', p, checkpoint_files('toy', p))
        except FileExistsError as error:
            (tmp_path / 'said').write_text(str(error))
    assert in_child(lambda: (Run.at_work.clear(), second())) == 0
    assert 'Another run is writing to' in (tmp_path / 'said').read_text()
    assert read_run(run_folder(p))['state'] == 'running'
    again = open_run('toy', p, checkpoint_files('toy', p))    # the cell is run again in the same kernel
    again.finish()
    assert read_run(run_folder(p))['state'] == 'finished'


def test_a_run_that_waited_holds_the_folder_that_is_there(tmp_path):
    "The folder that it waited for was renamed meanwhile, and another stands in its place."
    (tmp_path / 'latest').mkdir()
    ready, go = os.pipe()

    def hold():
        with claim_folder(tmp_path / 'latest'):
            os.write(go, b'x')
            time.sleep(0.5)
            os.rename(tmp_path / 'latest', tmp_path / 'kept')
    child = os.fork()
    if child == 0:
        hold()
        os._exit(0)
    os.read(ready, 1)
    with claim_folder(tmp_path / 'latest'):
        os.waitpid(child, 0)
        assert runs.is_claimed(tmp_path / 'latest') and not runs.is_claimed(tmp_path / 'kept')


def test_two_who_look_do_not_take_each_other_for_a_run(tmp_path):
    with claim_folder(tmp_path / 'run'):
        pass
    with open(tmp_path / 'run' / '.running.lock') as one, open(tmp_path / 'run' / '.running.lock') as run:
        assert runs.try_lock(one, deadline=0, shared=True)      # somebody looks
        assert not runs.is_claimed(tmp_path / 'run') and not runs.try_lock(run, deadline=0)


def test_a_system_without_locks(tmp_path, monkeypatch):
    "Windows has no fcntl: a run works, and a warning says what is missing."
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    with pytest.warns(UserWarning, match='cannot lock .*give every run a name of its own'):
        train(parameters(tmp_path))
    assert json.loads((tmp_path / 'results/a/run.json').read_text())['state'] == 'finished'


def test_a_network_that_was_changed_after_the_run_wrote_it(tmp_path):
    p = parameters(tmp_path)
    files = checkpoint_files('toy', p)
    run = open_run('toy', p, files)
    save_checkpoint(files.best(), **FACTS, state_dict={})
    run.checkpoints['toy_best.pt'] = sha256_of(files.best())
    files.best().write_bytes(b'of somebody else')
    with pytest.warns(UserWarning, match='toy_best.pt is not what this run wrote'):
        run.finish()
    assert read_run(run_folder(p))['checkpoints']['toy_best.pt'] != sha256_of(files.best())
    with pytest.raises(ValueError, match='another run has replaced it'):
        run_checkpoint(run_folder(p))


def test_finding_runs(tmp_path):
    for method in ('resnet_fusion', 'trainable_wavelet_fusion'):
        write_run(tmp_path / method / 'both', method=method, parameters={}, state='finished', started=0)
    write_run(tmp_path / 'resnet_fusion' / 'one', method='resnet_fusion', parameters={}, state='finished', started=0)
    assert find_run('one', tmp_path) == find_run('resnet_fusion/one', tmp_path) == tmp_path / 'resnet_fusion' / 'one'
    with pytest.raises(ValueError, match='several methods; write resnet_fusion/both or trainable_wavelet_fusion/both in its place'):
        find_run('both', tmp_path)
    write_run(tmp_path / 'scan_fusion' / 'one', method='scan_fusion', parameters={}, state='finished', started=0)
    with pytest.raises(ValueError, match='write resnet_fusion/one or scan_fusion/one'):
        find_run('one', tmp_path)
    assert find_run('one', tmp_path, first=['resnet_fusion']) == tmp_path / 'resnet_fusion' / 'one'    # a network, asked for by -m run:one
    with pytest.raises(FileNotFoundError, match='There is no run two .*resnet_fusion/one'):
        find_run('two', tmp_path)
    for name in ('../one', 'a/b/c', '/etc', '*', ''):
        with pytest.raises((ValueError, FileNotFoundError)):
            find_run(name, tmp_path)


def test_a_run_that_is_not_there_beside_many_benchmarks(tmp_path):
    "The runs of networks are named first, and how many more there are is said."
    for folder in [*(f'benchmark/{k}' for k in range(9)), 'resnet_fusion/mine']:
        write_run(tmp_path / folder, method=folder.partition('/')[0], parameters={}, state='finished', started=0)
    with pytest.raises(FileNotFoundError, match=r'there is resnet_fusion/mine, benchmark/0, .*, benchmark/6 and 2 more\.$'):
        find_run('two', tmp_path, first=['resnet_fusion'])


def test_a_benchmark_has_no_network(tmp_path):
    "It is no training that lost its network, so that to train it again would be no remedy."
    write_run(tmp_path / 'benchmark' / 'mine', method='benchmark', parameters={}, state='finished', started=0)
    with pytest.raises(FileNotFoundError, match=r'benchmark/mine is that of a benchmark, which trains no network; name the run of a training\.$'):
        run_checkpoint(tmp_path / 'benchmark' / 'mine')


def test_the_command_that_goes_on(tmp_path, monkeypatch):
    "Whole, for whoever started the run, and papermill understands it."
    for name in ('JPY_SESSION_NAME', 'MEDFUSION_COMMAND'):
        monkeypatch.delenv(name, raising=False)
    toy = notebook(tmp_path, "run: str = 'latest'\nlr: float = 0.1\ncases: list[str] = []\nname: str = ''\nresume: bool = False")
    p = read_parameters(toy, {'run': 'my run', 'lr': 0.2, 'cases': ['2'], 'name': '34', 'resume': False})
    words = shlex.split(runs.command_again(toy, p, resume=True))
    assert words[0] == 'papermill' and Path(words[1]).resolve() == toy.resolve()
    monkeypatch.setattr('papermill.cli.execute_notebook', lambda **given: given_to.update(given))
    given_to = {}
    done = CliRunner().invoke(papermill.cli.papermill, words[1:])
    assert done.exit_code == 0, done.output
    assert given_to['parameters'] == {'run': 'my run', 'lr': 0.2, 'cases': ['2'], 'name': '34', 'resume': True}
    for command, launched, option in (('medfusion train toy', '', '--run'), ('medfusion train toy --processes 2', '0', '--run'), ('medfusion train toy', '0', '-p run=')):
        monkeypatch.setenv('MEDFUSION_COMMAND', command)
        monkeypatch.setenv('LOCAL_RANK', launched) if launched else monkeypatch.delenv('LOCAL_RANK', raising=False)
        assert runs.command_again(toy, p, resume=True) == f"{command} {option} 'my run' -p resume=true".replace('= ', '=')     # torchrun takes --run for its own
    monkeypatch.setenv('JPY_SESSION_NAME', 'x')
    assert runs.command_again(toy, p, resume=True) == 'resume = True'
