"""Leaving one case out: the folds, their records and tables, and the command that ships a network."""
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from medfusion.files import read_json, sha256_of
from medfusion.inference import methods
from medfusion.phantom import write_phantom
from medfusion.runs import check_parameters, data_sha256, open_parts, save_checkpoint, split_of, write_metadata, write_run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / '.ci'))

import ship  # noqa: E402

WAVELET = methods()['wavelet']
MEANS = {'VIF': 0.54321987, 'invented': 0.00012345678}


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
    with pytest.raises(ValueError, match='lr = 0.5, and wavelet_shipped.yaml says 0.0015'):
        ship.ship('wavelet', 'faster', results, tmp_path / 'shipped')
    with pytest.raises(FileNotFoundError, match='no run .*nobody'):
        ship.ship('wavelet', 'nobody', results, tmp_path / 'shipped')
    assert not (tmp_path / 'shipped').exists()


def test_what_a_start_has_seen_counts(phantom, tmp_path):
    start = made_run(tmp_path / 'start', phantom)
    record = {'run': 'next', 'split': {'train': ['1'], 'val': [], 'test': ['4']}, 'parameters': {'start': str(start)}}
    assert ship.cases_seen(record) == ['1', '2']
    with pytest.raises(ValueError, match='was trained on case 2, which this run is judged by'):
        ship.cases_seen(record | {'split': {'train': ['1'], 'val': [], 'test': ['2']}})
