"""The method notebooks as papermill runs them: read by its own inspection, from any folder, in mixed precision, killed and resumed."""
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from papermill.cli import papermill
from papermill.inspection import display_notebook_help, inspect_notebook

from medfusion.files import read_image, write_image
from medfusion.inference import load_model, methods
from medfusion.phantom import write_phantom
from medfusion.runs import check_parameters, notebook_parameters

ROOT = Path(__file__).resolve().parents[1]
WAVELET, RESNET, LITE = 'trainable-wavelet-fusion.ipynb', 'resnet_based_fusion.ipynb', 'wavelet-lite.ipynb'
PARAMETERISED = sorted(path.name for path in (ROOT / 'nbs').glob('*.ipynb') if '"parameters"' in path.read_text(encoding='utf-8'))
SMALL = {WAVELET: {'num_epochs': 2, 'width': 4}, RESNET: {'epochs': 2, 'backbone_weights': 'none', 'deepest': 'layer1',
                                                          'perceptual_stages': 'stem'}, LITE: {'epochs': 2, 'crop': 0, 'width': 4}}


@pytest.fixture(autouse=True)
def no_pictures_for_nobody(monkeypatch):
    "Kernels show no figure; those that a run writes into its folder are drawn."
    monkeypatch.setenv('MPLBACKEND', 'agg')


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp('data') / 'Dataset', cases=3, slices=2, size=64)


def arguments(notebook, dataset, folder, **parameters):
    "Those of a papermill call at smoke size that writes into `folder` only."
    values = {'ct_dir': dataset / 'train/CT', 'mri_dir': dataset / 'train/MRI', 'save_dir': folder / 'results',
              **SMALL[notebook], 'run': 'mine', **parameters}
    options = [text for name, value in values.items() for text in ('-p', name, str(value))]
    return ['--no-progress-bar', str(ROOT / 'nbs' / notebook), str(folder / 'executed.ipynb'), *options]


def run(notebook, dataset, folder, **parameters):
    "What a call ended with, in this process; the notebook has its own."
    with contextlib.chdir(folder):
        return CliRunner().invoke(papermill, arguments(notebook, dataset, folder, **parameters))


def begin(notebook, dataset, folder, **parameters):
    "A call in a process of its own, which may be killed: what it cannot remove then lies in `folder`."
    words = [sys.executable, '-m', 'papermill', *arguments(notebook, dataset, folder, **parameters)]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {'TMPDIR': str(folder)})


def finished(done, folder):
    "The record of a run that ended well."
    assert done.exit_code == 0, done.output[-3000:]
    record = json.loads((folder / 'results/mine/run.json').read_text())
    assert record['state'] == 'finished'
    return record


def failure(done, folder):
    "The error of a failed run, which kept its executed notebook."
    assert done.exit_code != 0
    outputs = [output for cell in nbformat.read(folder / 'executed.ipynb', 4).cells for output in cell.get('outputs', [])]
    error, = [output for output in outputs if output.output_type == 'error']
    return error.evalue


def weights(folder, name='wavelet_fusion_spatial_final.pt'):
    path = folder / 'results/mine/checkpoints/final/trainable_wavelet_fusion' / name
    return torch.load(path, weights_only=True)['state_dict']


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What papermill reads of a notebook before it runs it

@pytest.mark.parametrize('notebook', PARAMETERISED)
def test_papermill_understands_every_parameter(notebook, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    path, declared = str(ROOT / 'nbs' / notebook), notebook_parameters(notebook)
    read = inspect_notebook(path)
    assert 'Unable to parse' not in caplog.text
    assert list(read) == list(declared)
    for name, parameter in declared.items():
        assert read[name]['help'].strip() == parameter.comment.strip(), name
    context = type('Context', (), {'command': type('Command', (), {'get_usage': lambda self, context: ''})()})()
    assert display_notebook_help(context, path, {}) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf'^\s*{name}: ', shown, re.MULTILINE) for name in declared)


def test_both_methods_name_alike():
    "What the specification does not fix has one name in both, in one order."
    wavelet, resnet = (list(notebook_parameters(name)) for name in (WAVELET, RESNET))
    own = {'num_epochs', 'epochs', 'width', 'shared_mask', 'cycle_spin', 'layer_decay', 'schedule', 'save_every', 'cache_gb',
           'backbone_weights', 'deepest', 'perceptual_stages', 'w_perceptual', 'follow_edges', 'dial', 'masks', 'clip'}
    assert set(wavelet) ^ set(resnet) == own


@pytest.mark.parametrize('recipe', sorted((ROOT / 'params').rglob('*.yaml')), ids=lambda path: str(path.relative_to(ROOT / 'params')))
def test_recipes_name_parameters_of_their_notebook(recipe):
    notebooks = {name: method.notebook for name, method in methods().items()} | {'pretraining': '80_pretraining.ipynb'}
    stem = (recipe.parent if recipe.parent.parent.name == 'ablation' else recipe).stem          # changes lie in a folder that is called like their recipe
    name = next(name for name in sorted(notebooks, key=len, reverse=True) if stem.startswith(name))    # wavelet-lite is no wavelet
    assert check_parameters(notebooks[name], yaml.safe_load(recipe.read_text()))


# Runs

@pytest.mark.parametrize('notebook', [WAVELET, RESNET])
def test_a_run_in_mixed_precision_leaves_everything_in_its_place(notebook, dataset, tmp_path, caplog):
    method = next(method for method in methods().values() if method.notebook == notebook)
    done = run(notebook, dataset, tmp_path, precision='bf16', w_qabf=1., ema=0.5)
    record, run_dir = finished(done, tmp_path), tmp_path / 'results/mine'
    assert 'Unable to parse' not in caplog.text
    assert record['parameters']['precision'] == 'bf16' and set(record['split']) == {'train', 'val', 'test'}
    network = next(iter(record['numbers']['means']))
    assert {network, 'average', 'maximum', 'copy_ct', 'copy_mri'} == set(record['numbers']['means'])
    assert record['numbers']['validation']['VIF'] > 0 and record['numbers']['best_epoch'] in (1, 2)
    history = (run_dir / 'history.csv').read_text().splitlines()
    assert len(history) == 3 and {'train_qabf', 'val_qabf', 'val_ssim'} <= set(history[0].split(','))
    assert {path.name for path in (run_dir / 'fused').iterdir()} == {path.name for path in (dataset / 'test/CT').iterdir()}
    assert {'curves.png', 'panel.png', 'detail.png', 'metrics.csv'} <= {path.name for path in run_dir.iterdir()}
    final = run_dir / 'checkpoints/final' / method.directory
    assert record['checkpoints'].keys() <= {path.name for path in final.iterdir()} and method.best_name in record['checkpoints']
    assert list((run_dir / 'checkpoints/intermediate' / method.directory).glob('*_epoch_*2.pt'))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['executed.ipynb', 'results']


@pytest.mark.parametrize('notebook', [WAVELET, RESNET, LITE])
def test_a_run_on_small_slices_of_any_size_comes_to_its_end(notebook, dataset, tmp_path):
    "What a notebook shows on the way does not fail for the slices of whoever trains: 37 × 41 pixels are no multiple of anything."
    for path in [*dataset.rglob('CT/*.png'), *dataset.rglob('MRI/*.png')]:
        target = tmp_path / 'Dataset' / path.relative_to(dataset)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_image(target, read_image(path)[12:49, 10:51])
    finished(run(notebook, tmp_path / 'Dataset', tmp_path), tmp_path)


def test_a_loss_by_which_noise_is_better_than_an_untrained_network_trains(dataset, tmp_path):
    "Contrast alone: of noise there is more."
    finished(run(WAVELET, dataset, tmp_path, w_mse=0, w_ssim=0, w_gradient=0, w_sd=1), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize('notebook', [WAVELET, RESNET])
def test_a_recipe_may_ask_for_lesions(notebook, dataset, tmp_path):
    finished(run(notebook, dataset, tmp_path, w_lesion=1., precision='bf16'), tmp_path)
    columns = (tmp_path / 'results/mine/history.csv').read_text().split('\n')[0].split(',')
    assert {'train_lesion', 'val_lesion'} <= set(columns)


@pytest.mark.long
@pytest.mark.parametrize('notebook', [WAVELET, RESNET])
def test_a_run_starts_from_the_network_of_another(notebook, dataset, tmp_path):
    "At a rate of nearly 0, what comes out is what it began with."
    for name in ('first', 'second'):
        (tmp_path / name).mkdir()
    finished(run(notebook, dataset, tmp_path / 'first'), tmp_path / 'first')
    finished(run(notebook, dataset, tmp_path / 'second', start=tmp_path / 'first/results/mine', lr=1e-12), tmp_path / 'second')
    networks = [load_model(str(tmp_path / name / 'results/mine'), device='cpu').state_dict() for name in ('first', 'second')]
    assert all(torch.allclose(weights, networks[1][name], atol=1e-6) for name, weights in networks[0].items())


@pytest.mark.long
def test_a_range_makes_12_bits_in_16_what_the_8_bits_are(dataset, tmp_path):
    "`train --range` from the shell: the network is that of the same slices in 8 bits."
    for path in dataset.rglob('*.png'):
        twelve = tmp_path / 'twelve' / path.relative_to(dataset)
        twelve.parent.mkdir(parents=True, exist_ok=True)
        write_image(twelve, read_image(path).astype(np.uint16) * 16)
    for place, value_range in ((dataset, []), (tmp_path / 'twelve', ['--range', '0,4080'])):
        (tmp_path / place.name).mkdir(exist_ok=True)
        options = {'ct_dir': place / 'train/CT', 'mri_dir': place / 'train/MRI', 'save_dir': tmp_path / place.name / 'results', **SMALL[WAVELET]}
        done = subprocess.run([sys.executable, '-m', 'medfusion', 'train', 'wavelet', '--run', 'mine', *value_range,
                               *(text for name, value in options.items() for text in ('-p', f'{name}={value}'))],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and 'nearly black' not in done.stderr, done.stderr
    one, other = (weights(tmp_path / name) for name in (dataset.name, 'twelve'))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)    # the division rounds once or twice


def kill(process):
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.kill()
    process.wait()


def start_and_kill(dataset, folder, moment):
    "A run of four epochs, killed after its second."
    second = folder / 'results/mine/checkpoints/intermediate/trainable_wavelet_fusion/wavelet_fusion_spatial_epoch_2.pt'
    process = begin(WAVELET, dataset, folder, num_epochs=4)
    deadline = time.monotonic() + 120
    while not second.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(moment)
    kill(process)
    assert second.exists() and json.loads((folder / 'results/mine/run.json').read_text())['state'] == 'running'


@pytest.mark.fault('train', 'killed from outside')
@pytest.mark.long
@pytest.mark.parametrize('moment', [0, 0.03], ids=['between epochs', 'during an epoch'])
def test_a_killed_run_resumes_to_the_same_bits(moment, dataset, tmp_path):
    whole, other = tmp_path / 'whole', tmp_path / 'other'
    for folder in (whole, other):
        folder.mkdir()
    finished(run(WAVELET, dataset, whole, num_epochs=4), whole)
    start_and_kill(dataset, other, moment)
    finished(run(WAVELET, dataset, other, num_epochs=4, resume=True), other)
    for name in ('wavelet_fusion_spatial_final.pt', 'wavelet_fusion_spatial_best.pt'):
        assert same(weights(other, name), weights(whole, name))
    assert (other / 'results/mine/history.csv').read_text() == (whole / 'results/mine/history.csv').read_text()


def test_old_names_are_refused_with_the_new_ones():
    for old, new in (('w_intensity', 'w_mse'), ('mirror', 'augment')):
        with pytest.raises(ValueError, match=f'{old}.*it is {new} now'):
            check_parameters(RESNET, {old: 1})


@pytest.mark.long
@pytest.mark.parametrize('notebook, parameters, sentence', [
    (RESNET, {'w_intensity': 3}, r'w_intensity.*it is w_mse now'),
    (WAVELET, {'augment': '"false"'}, r'augment'),
    (WAVELET, {'ct_dir': 'nowhere/CT'}, r'nowhere/CT'),
    (RESNET, {'crop': 32}, r'crop is 32'),
], ids=['old name', 'text for a bool', 'missing folder', 'crop too small'])
def test_bad_parameters_fail_before_anything_is_written(notebook, parameters, sentence, dataset, tmp_path):
    done = run(notebook, dataset, tmp_path, **parameters)
    assert re.search(sentence, failure(done, tmp_path), re.DOTALL)
    assert [path.name for path in tmp_path.iterdir()] == ['executed.ipynb']


@pytest.mark.long
def test_a_file_where_the_results_folder_should_be(dataset, tmp_path):
    (tmp_path / 'results').write_text('not a folder')
    message = failure(run(WAVELET, dataset, tmp_path), tmp_path)
    assert 'results' in message and 'is a file' in message
    assert not list(tmp_path.rglob('*.pt'))


@pytest.mark.fault('train', 'several at once')
@pytest.mark.long
def test_two_runs_at_once_in_one_folder(dataset, tmp_path):
    first = begin(WAVELET, dataset, tmp_path, num_epochs=10_000)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob('*_epoch_1.pt')) and time.monotonic() < deadline:
            time.sleep(0.05)
        other = tmp_path / 'second'
        other.mkdir()
        done = run(WAVELET, dataset, other, save_dir=tmp_path / 'results')
        assert 'Another run is writing to' in failure(done, other)
    finally:
        kill(first)


@pytest.mark.long
def test_the_flat_alternative_works_by_changing_two_paths(dataset, tmp_path):
    flat = tmp_path / 'CT-MRI'
    for kind in ('CT', 'MRI'):
        (flat / kind).mkdir(parents=True)
        for path in dataset.glob(f'*/{kind}/*.png'):
            (flat / kind / path.name).write_bytes(path.read_bytes())
    finished(run(WAVELET, dataset, tmp_path, ct_dir=flat / 'CT', mri_dir=flat / 'MRI', num_epochs=1), tmp_path)
    assert len(list((tmp_path / 'results/mine/fused').iterdir())) == 2  # the slices of one case
