"""The benchmark notebook from outside: what a papermill run writes, what it refuses, and its statistics."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from medfusion.files import read_image, write_image
from medfusion.phantom import write_phantom
from medfusion.runs import save_checkpoint
from medfusion.wavelet_fusion import WaveletFusion

NOTEBOOK = Path(__file__).parents[1] / 'nbs' / '90_benchmark.ipynb'
COLUMNS = ['EN', 'SD', 'SF', 'MI', 'SCD', 'VIF', 'Qabf', 'SSIM2']
# 64 pixels a side are too few for MS-SSIM, which says so.
pytestmark = pytest.mark.filterwarnings('ignore:MS-SSIM is undefined')
CONTROLS = {'average', 'maximum', 'copy_ct', 'copy_mri'}


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    "The test part of a small synthetic data set, with a folder of fused images from outside and published numbers."
    root = tmp_path_factory.mktemp('benchmark')
    write_phantom(root / 'Dataset', cases=6, slices=7, size=64)
    test = root / 'Dataset' / 'test'
    (root / 'external' / 'minimum').mkdir(parents=True)
    rows = []
    for path in sorted((test / 'CT').iterdir()):
        darker = np.minimum(read_image(path), read_image(test / 'MRI' / path.name))
        write_image(root / 'external' / 'minimum' / path.name, darker)
        rows.append({'method': 'Wonder', 'name': path.name, **dict.fromkeys(COLUMNS, 1000.0)})
    rows += [{**row, 'method': 'maximum'} for row in rows]
    rows.append({'method': 'Partial', 'name': rows[0]['name'], **dict.fromkeys(COLUMNS, 1.0)})
    pd.DataFrame(rows).to_csv(root / 'published.csv', index=False)
    network = WaveletFusion(width=4)
    save_checkpoint(root / 'mine.pt', method='trainable_wavelet_fusion', config=network.config,
                    state_dict=network.state_dict(), epoch=1, metrics={})
    return root


def arguments(root, **more):
    "Parameters of a run on the small data set, without networks."
    test = root / 'Dataset' / 'test'
    return {'ct_dir': str(test / 'CT'), 'mri_dir': str(test / 'MRI'), 'external_dir': str(root / 'external'),
            'checkpoints': [], 'save_dir': str(root / 'results'), 'device': 'cpu', **more}


def execute(parameters, until=None):
    "The namespace of the notebook's cells run here one after the other, up to the first that defines `until`."
    namespace = {'__name__': 'benchmark'}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == 'code':
            exec(compile(cell.source, str(NOTEBOOK), 'exec'), namespace)
            if 'parameters' in cell.metadata.get('tags', []):
                namespace.update(parameters)
            if until in namespace:
                break
    return namespace


@pytest.fixture(scope='module')
def run(dataset):
    "The results folder of a papermill run that was started from another folder."
    parameters = arguments(dataset, published=str(dataset / 'published.csv'), checkpoints=[str(dataset / 'mine.pt')])
    given = '\n'.join(f'{name}: {json.dumps(value)}' for name, value in parameters.items())
    papermill = [sys.executable, '-m', 'papermill', str(NOTEBOOK), str(dataset / 'executed.ipynb'), '-y', given]
    done = subprocess.run(papermill, cwd=dataset, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'IN_TEST': ''})
    assert done.returncode == 0, done.stderr[-2000:]
    return dataset / 'results'


def test_every_file_is_written(run):
    files = {path.name for path in run.iterdir()}
    assert {'metrics.csv', 'summary.csv', 'ranking.csv', 'significance.csv', 'lesions.csv', 'box_plots.png',
            'contact_sheet.png', 'run.json', 'fused'} <= files
    record = json.loads((run / 'run.json').read_text())
    assert record['method'] == 'benchmark' and record['parameters']['preset'] == 'cvpr'
    assert len(record['checkpoints']['mine.pt']) == 64 and len(record['data_sha256']) == 64
    assert len(list((run / 'fused' / 'average').glob('*.png'))) == 7
    assert not (run / 'fused' / 'minimum').exists(), "somebody else's images stay where they are"


def test_tables(run):
    metrics = pd.read_csv(run / 'metrics.csv', comment='#')
    summary = pd.read_csv(run / 'summary.csv', index_col='method')
    rules = {'laplacian_pyramid', 'wavelet_maximum', 'guided_filter'}
    assert set(summary.index) == CONTROLS | rules | {'mine', 'minimum', 'Wonder (published)'}, 'Partial lacks six pairs'
    assert (metrics.groupby('method').name.nunique() == 7).all()
    assert summary.loc['Wonder (published)', 'kind'] == 'published' and summary.loc['minimum', 'kind'] == 'external'
    for column in COLUMNS:
        of_average = metrics[metrics.method == 'average'][column]
        assert summary.loc['average', column] == pytest.approx(of_average.mean(), rel=1e-4)
        assert summary.loc['average', f'{column}_sd'] == pytest.approx(of_average.std(), rel=1e-4)
    assert (summary.ms_per_pair.dropna() > 0).all() and np.isnan(summary.ms_per_pair['minimum'])
    assert summary.parameters['average'] == 0 and summary.parameters['mine'] > 100
    copy = metrics[metrics.method == 'copy_ct']
    assert copy.VIF_ct.mean() == pytest.approx(1, abs=1e-3) and copy.VIF_min.mean() < 0.5
    ranking = pd.read_csv(run / 'ranking.csv', index_col='method')
    assert ranking.index[0] == 'Wonder (published)' and ranking.mean_rank.is_monotonic_increasing


def test_significance(run):
    tests = pd.read_csv(run / 'significance.csv')
    assert set(tests.method) == {'mine', 'minimum', 'Wonder (published)'} and len(tests) == 3 * len(COLUMNS)
    assert tests.against.nunique() == 1 and not tests.against[0].startswith('copy_')
    assert (tests.p_holm >= tests.p).all() and (tests.p_holm <= 1).all()
    assert tests.p.min() == pytest.approx(2 / 2 ** 7), 'seven differences of one sign, two-sided'
    assert (tests.verdict == 'open').all(), '24 tests on seven pairs cannot pass Holm at 0.05'


def test_lesions(run):
    lesions = pd.read_csv(run / 'lesions.csv')
    assert CONTROLS <= set(lesions.method)
    ct = lesions[lesions.method == 'copy_ct']
    assert np.allclose(ct.fused, ct.ct, rtol=0.02, atol=0.02)


def test_without_labels_externals_and_with_one_column(dataset, tmp_path, capsys):
    for folder in ('CT', 'MRI'):
        shutil.copytree(dataset / 'Dataset' / 'test' / folder, tmp_path / folder)
    given = arguments(dataset, ct_dir=str(tmp_path / 'CT'), mri_dir=str(tmp_path / 'MRI'), columns=['Nabf'], rules=[],
                      external_dir=str(tmp_path / 'none'), save_dir=str(tmp_path / 'results'))
    result = execute(given, until='summary')
    assert 'no lesion table' in capsys.readouterr().out
    assert set(result['order']) == CONTROLS and result['starred'] == ['Nabf'] and result['tests'].empty
    means = result['means'].Nabf
    assert means.idxmin() == result['best']['Nabf'] and result['shown'].columns[-1] == 'Nabf ↓ *'


@pytest.fixture(scope='module')
def helpers(dataset):
    "The notebook's namespace after its statistics."
    return execute(arguments(dataset), until='holm')


def test_holm_is_the_textbook_procedure(helpers):
    p_values = np.random.default_rng(0).random(20) ** 3
    adjusted = helpers['holm'](p_values)
    order = np.argsort(p_values)
    rejected = set()
    for i, index in enumerate(order):  # step down: stop at the first that does not pass
        if p_values[index] > 0.05 / (20 - i):
            break
        rejected.add(index)
    assert rejected and rejected == set(np.flatnonzero(adjusted <= 0.05))


def test_ranks_share_ties_and_put_undefined_last(helpers):
    values = pd.DataFrame({column: [1.0, 2.0, 2.0, np.nan] for column in COLUMNS})
    assert helpers['rank'](values).EN.tolist() == [3, 1.5, 1.5, 4]


@pytest.mark.parametrize('given, words', [
    ({'rules': ['laplace']}, "'laplace' is not a rule"),
    ({'checkpoints': ['nowhere.pt']}, 'nowhere.pt'),
    ({'columns': ['EN', 'FID']}, "'FID' is not a metric"),
    ({'colums': ['EN']}, 'did you mean columns'),
    ({'columns': 'EN'}, r'columns of 90_benchmark.ipynb must be list'),
    ({'ct_dir': '/nowhere/CT'}, '/nowhere/CT'),
])
def test_what_is_refused(dataset, given, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        execute(arguments(dataset, **given), until='metrics')


def test_an_external_folder_must_be_complete_and_of_the_right_size(dataset, tmp_path):
    (tmp_path / 'external' / 'theirs').mkdir(parents=True)
    names = [path.name for path in sorted((dataset / 'Dataset' / 'test' / 'CT').iterdir())]
    given = arguments(dataset, external_dir=str(tmp_path / 'external'), save_dir=str(tmp_path / 'results'))
    for name in names[1:]:
        write_image(tmp_path / 'external' / 'theirs' / name, np.zeros((32, 32), np.uint8))
    with pytest.raises(ValueError, match=f'no fused image for {names[0]}'):
        execute(given, until='metrics')
    write_image(tmp_path / 'external' / 'theirs' / names[0], np.zeros((32, 32), np.uint8))
    with pytest.raises(ValueError, match=r'\(32, 32\) pixels, its sources \(64, 64\)'):
        execute(given, until='metrics')


def test_names_must_differ(dataset, tmp_path):
    (tmp_path / 'average').mkdir()
    with pytest.raises(ValueError, match='share a name'):
        execute(arguments(dataset, external_dir=str(tmp_path)), until='fused_files')


def test_published_numbers_must_have_the_columns(dataset, tmp_path):
    (tmp_path / 'short.csv').write_text('method,name,EN\nA,6000.png,1\n')
    with pytest.raises(ValueError, match="no column 'SD'"):
        execute(arguments(dataset, published=str(tmp_path / 'short.csv')), until='ranks')
