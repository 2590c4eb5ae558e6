"""The wavelet notebook as papermill runs it: from any folder, guarded, killed and resumed."""
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch

from medfusion.phantom import write_phantom

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / 'nbs/trainable-wavelet-fusion.ipynb'
PAPERMILL = [sys.executable, '-m', 'papermill', '--no-progress-bar']


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp('data') / 'Dataset', cases=6, slices=2, size=64)


def command(dataset, folder, **parameters):
    "A papermill call at smoke size that writes into `folder` only."
    values = {'ct_dir': dataset / 'train/CT', 'mri_dir': dataset / 'train/MRI', 'save_dir': folder / 'results',
              'checkpoint_dir': folder / 'checkpoints', 'num_epochs': 2, 'width': 4, **parameters}
    options = [text for name, value in values.items() for text in ('-p', name, str(value))]
    return [*PAPERMILL, str(NOTEBOOK), str(folder / 'executed.ipynb'), *options]


def run(dataset, folder, **parameters):
    return subprocess.run(command(dataset, folder, **parameters), cwd=folder, capture_output=True, text=True)


def failure(done, folder):
    "The error of a failed run, which kept its executed notebook."
    assert done.returncode != 0
    outputs = [output for cell in nbformat.read(folder / 'executed.ipynb', 4).cells for output in cell.get('outputs', [])]
    error, = [output for output in outputs if output.output_type == 'error']
    return error.evalue


def weights(folder, name='wavelet_fusion_spatial_final.pt'):
    path = folder / 'checkpoints/final/trainable_wavelet_fusion' / name
    return torch.load(path, weights_only=True)['state_dict']


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope='module')
def whole(dataset, tmp_path_factory):
    "A run of four epochs that nobody stopped."
    folder = tmp_path_factory.mktemp('whole')
    done = run(dataset, folder, num_epochs=4)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_run_leaves_everything_in_its_place(whole, dataset):
    run_dir = whole / 'results/latest'
    manifest = json.loads((run_dir / 'run.json').read_text())
    assert manifest['parameters']['num_epochs'] == 4 and set(manifest['numbers']['metrics']) >= {'wavelet fusion', 'average', 'maximum'}
    assert len((run_dir / 'history.csv').read_text().splitlines()) == 5
    names = {path.name for path in (dataset / 'test/CT').iterdir()}
    assert {path.name for path in (run_dir / 'fused').iterdir()} == names
    assert {'curves.png', 'panel.png', 'masks.png', 'metrics.csv'} <= {path.name for path in run_dir.iterdir()}
    final = whole / 'checkpoints/final/trainable_wavelet_fusion'
    assert {path.name for path in final.iterdir() if not path.name.startswith('.')} == {
        'wavelet_fusion_spatial_best.pt', 'wavelet_fusion_spatial_final.pt', 'training_history.pt', 'metadata.json'}
    intermediate = whole / 'checkpoints/intermediate/trainable_wavelet_fusion'
    assert {path.name for path in intermediate.glob('*.pt')} == {f'wavelet_fusion_spatial_epoch_{n}.pt' for n in range(1, 5)}


def test_a_recipe_may_ask_for_lesions(dataset, tmp_path):
    done = run(dataset, tmp_path, w_lesion=1., w_ssim_min=1.)
    assert done.returncode == 0, done.stderr[-3000:]
    columns = (tmp_path / 'results/latest/history.csv').read_text().split('\n')[0].split(',')
    assert {'train_lesion', 'val_lesion', 'train_ssim_min', 'val_ssim_min'} <= set(columns)


@pytest.mark.parametrize('moment', ['between epochs', 'during an epoch'])
def test_a_killed_run_resumes_to_the_same_bits(moment, whole, dataset, tmp_path):
    second = tmp_path / 'checkpoints/intermediate/trainable_wavelet_fusion/wavelet_fusion_spatial_epoch_2.pt'
    process = subprocess.Popen(command(dataset, tmp_path, num_epochs=4), cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not second.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    if moment == 'during an epoch':
        time.sleep(0.03)
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.kill()
    process.wait()
    assert second.exists() and not (tmp_path / 'results/latest/run.json').exists()
    done = run(dataset, tmp_path, num_epochs=4, resume=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ('wavelet_fusion_spatial_final.pt', 'wavelet_fusion_spatial_best.pt'):
        assert same(weights(tmp_path, name), weights(whole, name))
    assert (tmp_path / 'results/latest/history.csv').read_text() == (whole / 'results/latest/history.csv').read_text()


@pytest.mark.parametrize('parameters, sentence', [
    ({'num_epoch': 3}, r"num_epoch\b.*num_epochs"),
    ({'num_epochs': 'three'}, r'num_epochs'),
    ({'augment': '"false"'}, r'augment'),
    ({'ct_dir': 'nowhere/CT'}, r'nowhere/CT'),
], ids=['unknown name', 'wrong type', 'text for a bool', 'missing folder'])
def test_bad_parameters_fail_before_anything_is_written(parameters, sentence, dataset, tmp_path):
    done = run(dataset, tmp_path, **parameters)
    assert re.search(sentence, failure(done, tmp_path), re.DOTALL)
    assert [path.name for path in tmp_path.iterdir()] == ['executed.ipynb']


def test_a_file_where_the_results_folder_should_be(dataset, tmp_path):
    (tmp_path / 'results').write_text('not a folder')
    message = failure(run(dataset, tmp_path), tmp_path)
    assert 'results' in message and 'is a file' in message
    assert not list(tmp_path.rglob('*.pt'))


def test_two_runs_at_once_in_one_folder(dataset, tmp_path):
    first = subprocess.Popen(command(dataset, tmp_path, num_epochs=10_000), cwd=tmp_path,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob('*_epoch_1.pt')) and time.monotonic() < deadline:
            time.sleep(0.05)
        other = tmp_path / 'second'
        other.mkdir()
        done = run(dataset, other, save_dir=tmp_path / 'results', checkpoint_dir=tmp_path / 'checkpoints')
        assert 'Another run is writing to' in failure(done, other)
    finally:
        for one in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
            one.kill()
        first.wait()


def test_the_flat_alternative_works_by_changing_two_paths(dataset, tmp_path):
    flat = tmp_path / 'CT-MRI'
    for kind in ('CT', 'MRI'):
        (flat / kind).mkdir(parents=True)
        for path in dataset.glob(f'*/{kind}/*.png'):
            (flat / kind / path.name).write_bytes(path.read_bytes())
    done = run(dataset, tmp_path, ct_dir=flat / 'CT', mri_dir=flat / 'MRI', num_epochs=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / 'results/latest/fused').iterdir())) == 2  # the slices of one case
