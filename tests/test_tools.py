"""The notebooks that train many networks, by papermill at small size: the ablation, the folds, and the trial of a leaking split."""
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from medfusion.cross_validation import fold_networks
from medfusion.files import read_json, write_json
from medfusion.inference import load_model
from medfusion.phantom import write_phantom
from medfusion.runs import make_folder, run_checkpoint, save_checkpoint
from medfusion.wavelet_fusion import WaveletFusion

NBS = Path(__file__).resolve().parents[1] / 'nbs'
pytestmark = pytest.mark.long


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp('data') / 'Dataset', cases=5, slices=2, size=64)


def papermill(notebook, folder, **parameters):
    "Runs a notebook of nbs/ with these parameters; what it executed lies in `folder`."
    (folder / 'given.yaml').write_text(yaml.safe_dump({name: str(value) if isinstance(value, Path) else value for name, value in parameters.items()}))
    return subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', NBS / notebook, folder / 'executed.ipynb', '--cwd', NBS,
                           '-f', folder / 'given.yaml'], capture_output=True, text=True)


def recipe(folder, name, **values):
    (folder / f'{name}.yaml').write_text(yaml.safe_dump({'width': 8} | values))
    return str(folder / f'{name}.yaml')


def test_the_ablation_trains_the_rows_that_its_record_lacks(tmp_path):
    "A recipe that goes on from another one does so from the fold that left out the same cases; a finished run is taken as it is."
    network = WaveletFusion(width=8)
    save_checkpoint(make_folder(tmp_path / 'folds/wavelet_one-without-3-5') / 'wavelet_fusion_spatial_best.pt', method='trainable_wavelet_fusion',
                    config=network.config, state_dict=network.state_dict(), epoch=1, metrics={})
    write_json(tmp_path / 'folds/wavelet_one-without-3-5/metadata.json', {'cases': {'train': ['1', '2', '4']}})
    write_json(tmp_path / 'folds/wavelet_one-without-3-5.json', {'format': 'medfusion fold 2', 'recipe_sha256': 'that of wavelet_one'})
    (tmp_path / 'ablation/wavelet_two').mkdir(parents=True)
    recipe(tmp_path / 'ablation/wavelet_two', 'without_vif', w_vif=0.0)
    given = {'recipes': [recipe(tmp_path, 'wavelet_two', start='run:wavelet_one', w_vif=0.1)], 'epochs': 1, 'make': 'missing', 'left_out': ['3', '5'],
             'kinds': ['haemorrhage'], 'paintings': 2, 'record': tmp_path / 'ablation.csv', 'folds': tmp_path / 'folds', 'save_dir': tmp_path / 'runs',
             'data': write_phantom(tmp_path / 'Dataset', cases=5, slices=2, size=192)}
    done = papermill('91_ablation.ipynb', tmp_path, **given)
    assert done.returncode == 0, done.stderr[-2000:]
    made = pd.read_csv(given['record'], keep_default_na=False)
    assert list(made.change) == ['', 'without_vif'] and (made.VIF.astype(float) > 0).all() and (made['η haemorrhage'].astype(float) >= 0).all()
    runs = [tmp_path / f'runs/wavelet_two-{change}-1-seed0-without-3-5' for change in ('as_it_is', 'without_vif')]
    told = [read_json(run / 'run.json') for run in runs]
    assert all(one['parameters']['start'] == str(tmp_path / 'folds/wavelet_one-without-3-5') and set(one['split']['train']) == {'1', '2', '4'} for one in told)
    given['record'].unlink()
    assert papermill('91_ablation.ipynb', tmp_path, **given).returncode == 0
    assert [read_json(run / 'run.json')['started'] for run in runs] == [one['started'] for one in told]
    assert pd.read_csv(given['record'], keep_default_na=False).equals(made)
    (tmp_path / 'folds/wavelet_one-without-3-5').rename(tmp_path / 'folds/wavelet_one-without-1-5')
    done = papermill('91_ablation.ipynb', tmp_path, **given | {'changes': [''], 'left_out': ['1', '5']})
    assert done.returncode and 'was trained on case 1, which is left out' in done.stderr
    write_json(tmp_path / 'folds/wavelet_one-without-1-5/metadata.json', {'cases': {'train': ['2', '3', '4']}})
    done = papermill('91_ablation.ipynb', tmp_path, **given | {'kinds': ['tumour'], 'changes': [''], 'left_out': ['1', '5']})
    assert done.returncode == 0, done.stderr[-2000:]
    grown = pd.read_csv(given['record'], keep_default_na=False)     # other cases left out are a row of their own, and no column is lost
    assert list(grown.left_out) == ['3 5', '3 5', '1 5'] and {*grown} - {*made} == {'η tumour'} and (grown['η haemorrhage'][:2].astype(float) == made['η haemorrhage']).all()
    # a slice that the rows are trained on was drawn anew
    changed, other = sorted(given['data'].glob('*/CT/2*'))
    changed.write_bytes(other.read_bytes())
    before = given['record'].read_text().splitlines()
    done = papermill('91_ablation.ipynb', tmp_path, **given | {'changes': [''], 'left_out': ['1', '5']})
    assert done.returncode == 0, done.stderr[-2000:]
    again = pd.read_csv(given['record'], keep_default_na=False)
    assert given['record'].read_text().splitlines()[:3] == before[:3] and again.VIF[2] != grown.VIF[2] and again.slices[2] != grown.slices[2], 'the row was taken as it was'
    assert not again['η tumour'][2] and again['η haemorrhage'][2] != '', 'what was measured of another network stands beside it'


@pytest.mark.parametrize('given, words', [({'change': 'wdth: 4'}, 'wavelet_one, narrow: wdth is not a parameter of trainable-wavelet-fusion.ipynb; did you mean width?'),
                                          ({'change': 'width: 4', 'seeds': [0, -1]}, 'seed must be a whole number from 0 up, not -1'),
                                          ({'change': '- width'}, 'narrow.yaml must hold lines'), ({'change': 'start:'}, 'narrow.yaml gives start no value'),
                                          ({'change': 'width: 4', 'kinds': ['bleeding']}, "'bleeding' is not a kind of painted lesion"),
                                          ({'change': 'width: 4', 'left_out': []}, 'left_out are [] and'),
                                          ({'change': 'width: 4', 'record': NBS / '91_ablation.ipynb'}, '91_ablation.ipynb is no record of an ablation'),
                                          ({'change': 'width: 4', 'record': NBS}, 'nbs is no record of an ablation'),
                                          ({'change': 'width: 4', 'recipes': ['../params/wavelet_table.yaml', '../params/ablation/wavelet_table.yaml']}, 'are recipes of one name')])
def test_what_no_row_can_be_made_of_is_said_before_the_first(tmp_path, given, words):
    (tmp_path / 'ablation/wavelet_one').mkdir(parents=True)
    (tmp_path / 'ablation/wavelet_one/narrow.yaml').write_text(f'{given.pop("change")}\n')
    done = papermill('91_ablation.ipynb', tmp_path, **{'recipes': [recipe(tmp_path, 'wavelet_one')], 'record': tmp_path / 'ablation.csv', 'save_dir': tmp_path / 'runs', 'epochs': 1,
                                                       'make': 'missing', 'left_out': ['1'], 'data': tmp_path / 'nowhere'} | given)
    assert done.returncode and words in done.stderr and not (tmp_path / 'runs').exists(), done.stderr[-2000:]


def test_two_splits_of_the_same_slices(dataset, tmp_path):
    "By case nothing of the cases that judge is in training; by slice some of their slices are, and as many slices in all."
    given = {'data': dataset, 'recipe': recipe(tmp_path, 'wavelet_tiny'), 'epochs': 1, 'judged': ['1', '3'], 'draws': [1, 2], 'make': 'all',
             'record': tmp_path / 'split.csv', 'save_dir': tmp_path / 'runs'}
    done = papermill('95_leaking_split.ipynb', tmp_path, **given)
    assert done.returncode == 0, done.stderr[-2000:]
    made = pd.read_csv(given['record'], comment='#', dtype={'case': str}).set_index(['split', 'draw'])
    assert set(made.loc['by case'].seen) == {'nothing'} and set(made.loc['by slice'].seen) <= {'itself', 'others', 'nothing'} and set(made.case) == {'1', '3'}
    trained_on = {folder.name.rpartition('-')[0]: {path.name for path in (folder / 'CT').iterdir() if not path.name.startswith('phantom')}
                  for folder in (tmp_path / 'runs/slices').glob('by_*')}
    assert set(trained_on) == {'by_case-1', 'by_case-2', 'by_slice-1', 'by_slice-2'}
    assert {len(names) for names in trained_on.values()} == {6} and trained_on['by_case-1'] == trained_on['by_case-2']
    for draw in (1, 2):
        own = made.loc[('by slice', draw)]
        assert set(own.name[own.seen == 'itself']) == {name for name in trained_on[f'by_slice-{draw}'] if name[0] in '13'}
    # a slice of a case that does not judge was drawn anew: all networks by case are trained anew
    slices, told = tmp_path / 'slices', {path.parent.name: read_json(path)['started'] for path in (tmp_path / 'runs').glob('by_case*/run.json')}
    shutil.copytree(dataset, slices)
    shutil.rmtree(tmp_path / 'runs/slices')
    changed, other = sorted(slices.glob('*/CT/5*'))
    changed.write_bytes(other.read_bytes())
    assert papermill('95_leaking_split.ipynb', tmp_path, **given | {'data': slices}).returncode == 0
    assert all(read_json(tmp_path / 'runs' / name / 'run.json')['started'] != began for name, began in told.items())


@pytest.mark.parametrize('given, words', [({'method': 'wavelett'}, "'wavelett' is no method; the methods are wavelet,"), ({'recipe': '../nbs'}, 'There is no file'),
                                          ({'method': 'wavelet-lite', 'teacher': 'wavelet'}, 'stands on was trained on case 34, which judges')])
def test_no_split_is_tried_with_what_saw_the_cases_that_judge(tmp_path, given, words):
    "The networks by case had imitated one that ships, which has seen every patient."
    if teacher := given.pop('teacher', ''):
        given['recipe'] = recipe(tmp_path, 'taught', teacher=teacher)
    done = papermill('95_leaking_split.ipynb', tmp_path, **{'make': 'all', 'data': tmp_path / 'nowhere', 'record': tmp_path / 'split.csv', 'save_dir': tmp_path / 'runs'} | given)
    assert done.returncode and words in done.stderr and not (tmp_path / 'runs').exists(), done.stderr[-2000:]


@pytest.mark.parametrize('given, words', [({'recipes': ['wavelett']}, 'wavelett is no recipe: its name begins with that of a method (wavelet,'),
                                          ({'recipes': ['wavelet_none']}, 'wavelet_none.yaml; name a file of ../params'),
                                          ({'kinds': ['bleeding']}, "'bleeding' is not a kind of painted lesion"),
                                          ({'cases': ['']}, "cases hold '', which names no case"),
                                          ({'recipes': ['wavelet_table', '../params/ablation/wavelet_table.yaml']}, 'are recipes of one name')])
def test_what_no_fold_can_be_made_of_is_said_before_the_first(tmp_path, given, words):
    done = papermill('92_cross_validation.ipynb', tmp_path, **{'recipes': ['wavelet_table'], 'records': tmp_path / 'records', 'save_dir': tmp_path, 'make': 'missing',
                                                               'data': tmp_path / 'nowhere'} | given)
    assert done.returncode and words in done.stderr and not (tmp_path / 'cross_validation').exists(), done.stderr[-2000:]


@pytest.mark.parametrize('notebook, given, words', [('93_conditions.ipynb', {'models': ['average', 'maximum'], 'names': ['mine', 'mine']}, 'each by a name of its own'),
                                                    ('93_conditions.ipynb', {'models': ['average'], 'names': ['average']}, 'take two models at least'),
                                                    ('94_dial.ipynb', {'kinds': ['bleeding']}, "'bleeding' is not a kind of painted lesion")])
def test_what_cannot_be_measured_is_said_before_anything_is(tmp_path, notebook, given, words):
    "Of two models of one name the second alone was measured, and a kind that is none was told after twenty minutes."
    done = papermill(notebook, tmp_path, **{'make': 'all', 'data': tmp_path / 'nowhere', 'record': tmp_path / 'record.csv'} | given)
    assert done.returncode and words in done.stderr, done.stderr[-2000:]


def test_folds_in_two_stages(dataset, tmp_path):
    "The second stage goes on from the fold of the first that left out the same cases; where that is done, it is not made again."
    first, second = recipe(tmp_path, 'wavelet_one'), recipe(tmp_path, 'wavelet_two', start='run:wavelet_one', w_vif=0.1)
    small = recipe(tmp_path, 'wavelet-lite_three', teacher='run:wavelet_one', width=4, crop=32, val_cases='2')
    given = {'data': dataset, 'fold_epochs': 1, 'make': 'missing', 'jobs': 2, 'kinds': ['haematoma'], 'records': tmp_path / 'records',
             'save_dir': tmp_path / 'results', 'recipes': [first, second, small], 'cases': ['3', '5, 1']}
    done = papermill('92_cross_validation.ipynb', tmp_path, **given)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = {name: tmp_path / f'results/trainable_wavelet_fusion/{name}' for name in ('wavelet_one-without-1-5', 'wavelet_two-without-1-5')}
    for run, role in ((runs['wavelet_two-without-1-5'], 'start'), (tmp_path / 'results/wavelet_lite/wavelet-lite_three-without-1-5', 'teacher')):
        assert read_json(run / 'run.json')['parameters'][role] == str(runs['wavelet_one-without-1-5'])
    records = {path.stem: read_json(path) for path in (tmp_path / 'records').glob('*.json')}
    assert sorted(records) == [f'{name}-without-{cases}' for name in ('wavelet-lite_three', 'wavelet_one', 'wavelet_two') for cases in ('1-5', '3')]
    two = records['wavelet_two-without-1-5']
    assert two['trained_on'] == ['2', '3', '4'] and two['left_out'] == [*two['numbers']] == ['1', '5'] and str(tmp_path) not in str(records)
    networks = {name: load_model(str(run_checkpoint(folder)), device='cpu').state_dict() for name, folder in runs.items()}
    assert any((a != b).any() for a, b in zip(*(weights.values() for weights in networks.values())))
    kept = fold_networks(tmp_path / 'records', [two])['5'].state_dict()    # the network itself is kept beside the record
    assert all((a == b).all() for a, b in zip(kept.values(), networks['wavelet_two-without-1-5'].values()))
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / 'records').iterdir())]
    assert papermill('92_cross_validation.ipynb', tmp_path, **given).returncode == 0
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / 'records').iterdir())] == before
    # a fold that stands on a recorded one takes its network, where the run is gone
    shutil.rmtree(tmp_path / 'results')
    (tmp_path / 'records/wavelet_two-without-3.json').unlink()
    assert papermill('92_cross_validation.ipynb', tmp_path, **given).returncode == 0
    [run] = (tmp_path / 'results/trainable_wavelet_fusion').iterdir()
    assert read_json(run / 'run.json')['parameters']['start'] == str(tmp_path / 'records/wavelet_one-without-3')
    made = read_json(tmp_path / 'records/wavelet_two-without-3.json')
    assert made['recipe_sha256'] == records['wavelet_two-without-3']['recipe_sha256'] and made['trained_on'] == ['1', '2', '4', '5']
    # a slice of case 5 was drawn anew, on which the fold trains that leaves out 3, and the other one does not
    slices = tmp_path / 'slices'
    shutil.copytree(dataset, slices)
    changed, other = sorted(slices.glob('*/CT/5*'))
    changed.write_bytes(other.read_bytes())
    shutil.rmtree(tmp_path / 'results')
    given |= {'data': slices, 'recipes': [first]}
    before = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / 'records').glob('wavelet_one*.json')}
    assert papermill('92_cross_validation.ipynb', tmp_path, **given).returncode == 0
    after = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / 'records').glob('wavelet_one*.json')}
    assert [name for name in after if after[name] != before[name]] == ['wavelet_one-without-3']
    assert 'wavelet_one-without-3: its record is of other slices' in (tmp_path / 'executed.ipynb').read_text()
