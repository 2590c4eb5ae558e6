"""Cross-validation by patient: the folds, their records and tables, and the command that ships a network."""
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from medfusion.baselines import baselines
from medfusion.cross_validation import (detection_record, fold_name, fold_networks, fold_numbers, fold_record, folds_table, missing_folds, pool_slices,
                                        read_folds, recipe_method, run_values, seen_before, stands_on, untrained_folds, values_sha256)
from medfusion.data import CTMRIDataset
from medfusion.detection import summarise_detection
from medfusion.evaluation import cases_trained_on, evaluate, reported_columns
from medfusion.files import read_image, read_json, sha256_of, write_image, write_json
from medfusion.inference import ShippedModel, load_model, methods, network_roles
from medfusion.phantom import write_phantom
from medfusion.runs import check_parameters, data_sha256, listed_cases, open_parts, save_checkpoint, split_of, write_metadata, write_run
from medfusion.tables import replace_blocks
from medfusion.wavelet_fusion import WaveletFusion

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / '.ci'))

import ship  # noqa: E402
import tables  # noqa: E402

WAVELET = methods()['wavelet']
MEANS = {'VIF': 0.54321987, 'invented': 0.00012345678}


# What a recipe is

def test_the_method_of_a_recipe_may_have_any_name(monkeypatch):
    "One with an underline was no method, and was listed among those that are."
    two = {name: WAVELET._replace(name=name) for name in ('unet', 'unet_small')}
    monkeypatch.setattr('medfusion.cross_validation.methods', lambda: two)
    assert [getattr(recipe_method(name), 'name', None) for name in ('unet_small_table', 'unet_small', 'unet_table', 'unets_table')] == ['unet_small', 'unet_small', 'unet', None]


# The command that ships a network

def made_run(folder, data, state='finished', **parameters):
    "A run's folder, as a training by the recipe leaves it, with made-up numbers and weights."
    recipe = yaml.safe_load((ROOT / 'params/wavelet_shipped.yaml').read_text())
    places = {'start': '', 'ct_dir': str(data / 'train/CT'), 'mri_dir': str(data / 'train/MRI'), 'save_dir': str(folder.parent), 'run': folder.name}
    values = check_parameters(WAVELET.notebook, recipe | places | parameters)
    parts = open_parts(SimpleNamespace(**values))
    final, known = folder / 'checkpoints/final' / WAVELET.directory, data_sha256(*parts[:2])
    final.mkdir(parents=True)
    checkpoint = save_checkpoint(final / WAVELET.best_name, method=WAVELET.directory, config={}, state_dict={}, epoch=2, metrics={},
                                 data_sha256=known)
    write_metadata(checkpoint, cases=split_of(*parts))
    (folder / 'metrics.csv').write_text('# preset cvpr: made up\n')
    write_run(folder, method=WAVELET.directory, parameters=values, state=state, started=time.time(), split=split_of(*parts),
              data_sha256=known, checkpoints=[checkpoint],
              numbers={'best_epoch': 2, 'means': {'wavelet fusion': MEANS, 'maximum': {}}, 'validation': MEANS if parts[1] else None})
    return checkpoint


@pytest.fixture(scope='module')
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp('data') / 'Dataset', cases=4, slices=1, size=64)


def test_a_finished_run_ships(phantom, tmp_path):
    results = tmp_path / 'results'
    checkpoint = made_run(results / WAVELET.directory / 'final', phantom)
    metadata = read_json(ship.ship('wavelet', 'final', results, tmp_path / 'shipped'))
    there = tmp_path / 'shipped' / WAVELET.directory
    assert sorted(path.name for path in there.iterdir()) == ['metadata.json', WAVELET.best_name]
    assert metadata['sha256'] == sha256_of(checkpoint) == sha256_of(there / WAVELET.best_name)
    assert metadata['shipped'] is True and metadata['recipe'] == 'params/wavelet_shipped.yaml' and metadata['intended_use']
    assert metadata['cases'] == {'train': ['1', '2'], 'validation': ['3'], 'test': ['4']} and metadata['pairs']['train'] == 2
    assert metadata['numbers'] == {'cases': '4', 'convention': 'preset cvpr: made up', 'means': {'VIF': 0.5432, 'invented': 0.000123}}
    assert metadata['validation_numbers']['cases'] == '3' and str(tmp_path) not in json.dumps(metadata)


def test_what_may_not_ship_says_why(phantom, tmp_path):
    results = tmp_path / 'results'
    made_run(results / WAVELET.directory / 'broken-off', phantom, state='interrupted')
    made_run(results / WAVELET.directory / 'faster', phantom, lr=0.5)
    with pytest.raises(ValueError, match='only a finished one can ship'):
        ship.ship('wavelet', 'broken-off', results, tmp_path / 'shipped')
    lr = yaml.safe_load((ROOT / 'params/wavelet_shipped.yaml').read_text())['lr']
    with pytest.raises(ValueError, match=f'lr of the run faster is 0.5, and of wavelet_shipped.yaml {lr}'):
        ship.ship('wavelet', 'faster', results, tmp_path / 'shipped')
    with pytest.raises(FileNotFoundError, match='no run .*nobody'):
        ship.ship('wavelet', 'nobody', results, tmp_path / 'shipped')
    assert not (tmp_path / 'shipped').exists()


@pytest.mark.parametrize('place', [str, lambda path: os.path.relpath(path, ROOT / 'nbs')])    # what a notebook was given is relative to nbs/
def test_what_a_network_stands_on_is_told_without_its_place(phantom, tmp_path, monkeypatch, place):
    monkeypatch.chdir(ROOT / 'medfusion/shipped')
    start = made_run(tmp_path / 'results' / WAVELET.directory / 'before', phantom)
    made_run(tmp_path / 'results' / WAVELET.directory / 'after', phantom, start=place(tmp_path / 'results' / WAVELET.directory / 'before'))
    metadata = read_json(ship.ship('wavelet', 'after', tmp_path / 'results', tmp_path / 'shipped'))
    assert metadata['start'] == {'name': 'run:before', 'sha256': sha256_of(start)} and str(tmp_path) not in json.dumps(metadata)


def test_a_stage_that_was_made_anew_is_another_one(phantom, tmp_path):
    for name, start in (('before', ''), ('after', str(tmp_path / 'before'))):
        made_run(tmp_path / name, phantom, start=start)
    known = run_values(tmp_path / 'after')
    assert known['start'] == values_sha256(run_values(tmp_path / 'before'))
    record = read_json(tmp_path / 'before' / 'run.json')
    write_json(tmp_path / 'after' / 'run.json', read_json(tmp_path / 'after' / 'run.json') | {'started': '2025-06-01T05:30:00-04:00'})
    for started in ('2025-06-01T09:00:00+00:00', None):    # half an hour before, by another clock; the first release did not say
        write_json(tmp_path / 'before' / 'run.json', record | {'started': started})
        assert run_values(tmp_path / 'after') == known
    later = record | {'started': '2999-01-01T00:00:00+00:00'}
    write_json(tmp_path / 'before' / 'run.json', later)
    assert run_values(tmp_path / 'after') == known | {'start': str(tmp_path / 'before')}


def test_what_a_start_has_seen_counts(phantom, tmp_path):
    start = made_run(tmp_path / 'start', phantom)
    record = {'run': 'next', 'split': {'train': ['1'], 'val': [], 'test': ['4']}, 'parameters': {'start': str(start)}}
    assert ship.cases_seen(record) == ['1', '2']
    with pytest.raises(ValueError, match='was trained on case 2, by which'):
        ship.cases_seen(record | {'split': {'train': ['1'], 'val': [], 'test': ['2']}})


def test_a_network_that_was_trained_on_all_patients_has_the_numbers_of_the_folds(phantom, tmp_path):
    everybody, run = pool_slices(phantom, tmp_path / 'slices', phantom=True), tmp_path / 'results' / WAVELET.directory / 'all'
    made_run(run, phantom, ct_dir=str(everybody[0]), mri_dir=str(everybody[1]), test_cases='phantom')
    places = {'results': tmp_path / 'results', 'shipped': tmp_path / 'shipped', 'recorded': tmp_path / 'folds'}
    sha256 = values_sha256(run_values(run))
    (tmp_path / 'folds').mkdir()
    write_folds(tmp_path / 'folds', 'wavelet_shipped', ['1,2'], sha256=sha256)
    with pytest.raises(ValueError, match='holds no fold of wavelet_shipped that left case 3 out'):
        ship.ship('wavelet', 'all', **places)
    write_folds(tmp_path / 'folds', 'wavelet_shipped', ['3', '4', '5', '6,7,8'], sha256=sha256)
    metadata = read_json(ship.ship('wavelet', 'all', **places))
    assert metadata['cases'] == {'train': ['1', '2', '3', '4'], 'validation': [], 'test': ['phantom']} and metadata['numbers']['cases'] == 'phantom'
    cases, means = ShippedModel('wavelet', '', tmp_path, metadata).numbers()
    assert cases == '1, 2, 3, 4, 5, 6, 7, 8, each by a fold that never saw it' and means['VIF'] == 0.5495


# Folds

def test_slices_are_pooled_from_parts_and_nothing_else(phantom, tmp_path):
    folders = pool_slices(phantom, tmp_path / 'slices', phantom=True)
    assert pool_slices(phantom, tmp_path / 'slices') == folders      # again: nothing changes
    assert len(list((tmp_path / 'slices/labels').iterdir())) == 8    # of the phantom alone
    assert [path.name for path in sorted(folders[0].iterdir()) if not path.name.startswith('phantom')] == [f'{case}000.png' for case in (1, 2, 3, 4)]
    (folders[1] / '9000.png').write_bytes((folders[1] / '1000.png').read_bytes())
    with pytest.raises(ValueError, match='9000.png is no slice of .* remove'):
        pool_slices(phantom, tmp_path / 'slices')


def test_of_invented_edges_the_worst_slice_is_recorded(phantom):
    slices, rule = CTMRIDataset(phantom / 'train/CT', phantom / 'train/MRI'), baselines()['wavelet']
    found = evaluate(slices, {'network': rule}, columns=['invented', 'invented_max'])
    numbers = fold_numbers(slices, rule)['network']
    assert found.invented.nunique() > 1
    assert numbers['invented_worst'] == pytest.approx(found.invented.max(), abs=1e-8) and numbers['invented_max'] == pytest.approx(found.invented_max.max(), abs=1e-7)


def test_only_a_finished_run_is_recorded(phantom, tmp_path):
    made_run(tmp_path / 'results' / 'half', phantom, state='interrupted')
    with pytest.raises(ValueError, match='is interrupted, so there is nothing to record'):
        fold_record(tmp_path / 'results' / 'half', 'wavelet_shipped')


def test_a_fold_is_judged_on_the_values_that_it_was_trained_on(phantom, tmp_path):
    "The same slices, once as they are and once as 12 bits in 16: the same numbers."
    for side in ('CT', 'MRI'):
        (tmp_path / 'deep/train' / side).mkdir(parents=True)
        for path in (phantom / 'train' / side).iterdir():
            write_image(tmp_path / 'deep/train' / side / path.name, read_image(path).astype(np.uint16) * 16)
    shutil.copytree(phantom / 'val', tmp_path / 'deep/val'), shutil.copytree(phantom / 'test', tmp_path / 'deep/test')
    found = []
    for name, data, drawn in (('plain', phantom, ''), ('deep', tmp_path / 'deep', '0,4080')):
        checkpoint = made_run(tmp_path / name, data, value_range=drawn)
        torch.manual_seed(0)
        network = WaveletFusion(8)
        save_checkpoint(checkpoint, method=WAVELET.directory, config=network.config, state_dict=network.state_dict(), epoch=2, metrics={},
                        data_sha256='')
        checkpoint.with_name('metadata.json').unlink()
        record = read_json(tmp_path / name / 'run.json')
        record['split'] = {'train': record['split']['test'], 'val': [], 'test': record['split']['train'][:1]}
        record['checkpoints'] = {checkpoint.name: sha256_of(checkpoint)}
        write_json(tmp_path / name / 'run.json', record)
        [numbers] = fold_record(tmp_path / name, 'mine')['numbers'].values()
        found.append(pd.DataFrame(numbers))
    assert np.allclose(*found, rtol=1e-3, atol=1e-4, equal_nan=True)


def write_folds(folder, recipe, folds, better=0.0, sha256='a'):
    "Made-up records of folds, each a text of the cases that it leaves out of eight."
    eight = [str(case) for case in range(1, 9)]
    for left_out in map(listed_cases, folds):
        numbers = {}
        for case in left_out:
            value = 0.5 + int(case) / 100
            numbers[case] = {name: dict.fromkeys([*reported_columns(), 'invented_worst', 'invented_max'], value + more)
                             for name, more in (('network', better + int(case) / 1000), ('maximum', 0.0), ('average', -0.1))}
        write_json(folder / f'{fold_name(recipe, left_out)}.json', {
            'format': 'medfusion fold 2', 'method': recipe.split('_')[0], 'recipe': recipe, 'recipe_sha256': sha256, 'left_out': left_out,
            'trained_on': [other for other in eight if other not in left_out], 'numbers': numbers})


def test_records_of_other_values_are_not_mixed(tmp_path):
    write_folds(tmp_path, 'mine', '123')
    write_folds(tmp_path, 'mine', '4', sha256='b')
    write_json(tmp_path / 'mine-without-phantom.json', read_json(tmp_path / 'mine-without-1.json') | {'left_out': ['phantom']})
    for sha256, cases, others in ((None, '123', '4'), ('a', '123', '4'), ('b', '4', '123')):
        records, note = read_folds(tmp_path, 'mine', sha256)
        assert [record['left_out'] for record in records] == [[case] for case in cases]
        assert ', '.join(f'mine-without-{case}' for case in others) + ': made with other values' in note
    write_folds(tmp_path, 'mine', ['5,6,7,8'], sha256='c')    # one record, and more cases than the three of a
    assert [record['left_out'] for record in read_folds(tmp_path, 'mine')[0]] == [list('5678')]
    (tmp_path / 'mine-without-5.json').write_text('{}')
    with pytest.raises(ValueError, match='mine-without-5.json is no record of a fold'):
        read_folds(tmp_path, 'mine')


def test_of_two_folds_that_left_a_case_out_the_one_counts_that_trained_on_more(tmp_path):
    write_folds(tmp_path, 'mine', ['1,2', '3,4'], better=0.1)
    write_folds(tmp_path, 'mine', ['2'], better=0.2)
    records, note = read_folds(tmp_path, 'mine')
    write_folds(tmp_path, 'mine', ['4', '3'], better=0.2)    # the pair is not needed any more
    records, note = read_folds(tmp_path, 'mine')
    assert [record['left_out'] for record in records] == [['1', '2'], ['2'], ['3'], ['4']] and not note
    assert missing_folds(records) == ['5', '6', '7', '8']
    table = folds_table({'mine': records})
    assert list(table.case[table.method == 'mine']) == ['1', '2', '3', '4']
    assert [round(value, 3) for value in table.VIF[table.method == 'mine']] == [0.611, 0.722, 0.733, 0.744]


def test_folds_from_before_a_case_came_are_told(tmp_path):
    write_folds(tmp_path, 'mine', '1234')
    assert read_folds(tmp_path, 'mine')[1] == ''
    record = read_json(tmp_path / 'mine-without-2.json')
    write_json(tmp_path / 'mine-without-2.json', record | {'trained_on': [*record['trained_on'], '42']})
    assert read_folds(tmp_path, 'mine')[1] == 'Not every fold of mine was made of slices of 42; make those anew.'


def test_each_patient_is_fused_by_the_network_that_never_saw_him():
    folder = ROOT / 'results/recorded/cross_validation'
    records, _ = read_folds(folder, 'wavelet-lite_shipped')
    networks = fold_networks(folder, records)
    assert len(networks) == 8
    for record in records:
        [file] = (folder / fold_name(record['recipe'], record['left_out'])).glob('*.pt')
        own = load_model(str(file), device='cpu').state_dict()
        assert not cases_trained_on(file) & {*record['left_out']}
        for case in record['left_out']:
            assert all(torch.equal(weights, own[name]) for name, weights in networks[case].state_dict().items()), case


def test_the_headline_waits_for_all_folds(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, 'RECORDED', tmp_path)
    monkeypatch.setattr(tables, 'means', lambda record: 'the table of case 41')
    (tmp_path / 'cross_validation').mkdir()
    write_folds(tmp_path / 'cross_validation', 'wavelet_shipped', '1234567', better=0.05)
    assert 'the table of case 41' in tables.headline()
    write_folds(tmp_path / 'cross_validation', 'wavelet_shipped', '8', better=0.05)
    write_folds(tmp_path / 'cross_validation', 'resnet_shipped', ['1,2', '3,4,5', '6,7', '8'], better=-0.05)
    text = tables.headline()
    assert 'Means over 8 patients' in text and 'recipes: [wavelet_shipped]"\n' in text and 'case 41' not in text
    assert '-y "recipes: [resnet_shipped]" -y "cases: [\'1,2\', \'3,4,5\', \'6,7\', \'8\']"' in text
    assert '| **wavelet** | 0.60 ± 0.02 |' in text and '| maximum | 0.55 ± 0.02 |' in text
    assert '* ResNet: ahead in invented (in 8 of 8); behind in' in text
    assert '* wavelet: ahead in EN (in 8 of 8)' in text and 'behind in invented (in 0 of 8)' in text
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(replace_blocks(readme, {'patients': text}).splitlines()) <= 120


def test_what_lesions_cost_is_told_within_each_patient(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, 'RECORDED', tmp_path)
    (tmp_path / 'cross_validation').mkdir()
    write_folds(tmp_path / 'cross_validation', 'wavelet_shipped', '12345678', better=0.01)
    assert 'not recorded yet' in tables.price()
    write_folds(tmp_path / 'cross_validation', 'wavelet_table', ['1,2', '3,4', '5,6', '7,8'], better=0.05)
    text = tables.price()
    assert 'recipes: [wavelet_table]" -y "cases: [\'1,2\'' in text and '| column | wavelet | wavelet, its first recipe | maximum | wavelet ahead by | in patients |' in text
    assert '| invented | 0.55950 | 0.59950 | 0.54500 | 0.04 (0.04 to 0.04) | 8 of 8 |' in text and '| -0.04 (-0.04 to -0.04) | 0 of 8 |' in text


# The records that are kept

RECORDED = ROOT / 'results/recorded'


def test_each_record_of_painted_lesions_is_of_folds_that_are_recorded():
    records = {path.name.partition('-detection-')[0]: path for path in (RECORDED / 'cross_validation').glob('*-detection-*.csv')}
    assert len(records) >= 4
    for recipe, path in records.items():
        assert path == detection_record(RECORDED / 'cross_validation', read_folds(RECORDED / 'cross_validation', recipe)[0])


def test_records_of_the_dial_are_of_the_networks_of_the_folds():
    records, _ = read_folds(RECORDED / 'cross_validation', 'wavelet_shipped')
    stamp = f'networks {detection_record(RECORDED / "cross_validation", records).stem[-12:]}'
    for name in ('dial.csv', 'dial_lesions.csv'):
        assert stamp in (RECORDED / name).read_text(encoding='utf-8').splitlines()[0], f'papermill nbs/94_dial.ipynb out.ipynb -p make all makes {name}'


@pytest.mark.parametrize('recipe', ['wavelet_shipped', 'wavelet-lite_shipped', 'resnet_shipped'])
def test_no_left_out_slice_has_many_invented_edges(recipe):
    "At most .05 % of its pixels, none by more than 10 grey levels a pixel."
    records, _ = read_folds(RECORDED / 'cross_validation', recipe)
    networks = [rows['network'] for record in records for rows in record['numbers'].values()]
    assert len(networks) == 8 and max(n['invented_worst'] for n in networks) <= 5e-4 and max(n['invented_max'] for n in networks) <= 10


@pytest.mark.parametrize('recipe, column', [('wavelet_shipped', 'efficiency'), ('wavelet_shipped', 'efficiency_search'), ('wavelet-lite_shipped', 'efficiency')])
def test_no_kind_of_lesion_is_found_less_well_than_in_the_maximums_slices(recipe, column):
    records, _ = read_folds(RECORDED / 'cross_validation', recipe)
    found = pd.read_csv(detection_record(RECORDED / 'cross_validation', records), comment='#', dtype={'case': str})
    efficiency = summarise_detection(found)[column].unstack('method')
    assert len(efficiency) == 10 and (efficiency[recipe] > efficiency['maximum']).all()


def test_each_network_ranks_before_the_maximum_among_published_methods():
    rank = pd.read_csv(RECORDED / 'cases_34_41/summary.csv', index_col='method').mean_rank
    assert len(rank) > 20 and (rank[['wavelet', 'wavelet-lite', 'resnet']] < rank['maximum']).all()


def test_what_a_network_stands_on_is_found_from_nbs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = '../results/recorded/cross_validation/wavelet_shipped-without-34-41'
    absolute = str(ROOT / 'nbs' / relative)
    for role in network_roles():
        assert seen_before({role: relative}) == seen_before({role: absolute}) and '34' not in seen_before({role: f'{relative}@0.3'})


def test_a_network_of_unknown_cases_is_known_by_what_it_holds(tmp_path):
    "So that a run does not go on with another one of its name."
    network = untrained_folds(tmp_path)
    told = stands_on(SimpleNamespace(start=str(network), backbone_weights='none'))
    assert told == {'networks': {'start': sha256_of(network)}, 'seen_before': None}


def test_the_cases_of_a_backbone_were_seen_before(tmp_path):
    path = tmp_path / 'backbone.pth'
    path.touch()
    with pytest.raises(ValueError, match='Nothing says on which cases .*backbone.pth was trained'):
        seen_before({'backbone_weights': str(path)})
    write_json(tmp_path / 'metadata.json', {'cases': ['1', '2']})
    assert seen_before({'backbone_weights': str(path)}) == {'1', '2'}


def test_nobody_knows_what_a_network_saw_that_stands_on_an_unknown_one(tmp_path):
    path = tmp_path / 'net.pt'
    path.touch()
    write_json(tmp_path / 'metadata.json', {'cases': {'train': ['1']}, 'seen_before': None})
    with pytest.raises(ValueError, match='Nothing says on which cases .*net.pt was trained'):
        seen_before({'start': str(path)})
    write_json(tmp_path / 'metadata.json', {'cases': {'train': ['1']}})      # of before this was told: what ships
    assert seen_before({'start': str(path)}) == {'1'}
