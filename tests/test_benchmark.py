"""The benchmark notebook from outside: what a run writes, and what it refuses. Its statistics: test_evaluation.py."""
import contextlib
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_cells

from medfusion.data import case_of
from medfusion.files import read_image, write_image
from medfusion.phantom import write_phantom
from medfusion.runs import save_checkpoint, write_metadata
from medfusion.wavelet_fusion import WaveletFusion

NOTEBOOK = Path(__file__).parents[1] / 'nbs' / '90_benchmark.ipynb'
COLUMNS = ['EN', 'SD', 'SF', 'MI', 'SCD', 'VIF', 'Qabf', 'SSIM2']
CONTROLS = {'average', 'maximum', 'copy_ct', 'copy_mri'}
# 64 pixels a side are too few for MS-SSIM, which says so.
pytestmark = pytest.mark.filterwarnings('ignore:MS-SSIM is undefined')


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    "A small synthetic data set, with a folder of fused images from outside, published numbers and a network."
    root = tmp_path_factory.mktemp('benchmark')
    test = write_phantom(root / 'Dataset', cases=3, slices=3, size=64) / 'test'
    (root / 'external' / 'minimum').mkdir(parents=True)
    rows = []
    for part in ('val', 'test'):
        for path in sorted((test.parent / part / 'CT').iterdir()):
            darker = np.minimum(read_image(path), read_image(test.parent / part / 'MRI' / path.name))
            write_image(root / 'external' / 'minimum' / path.name, darker)
            rows.append({'method': 'Wonder', 'name': path.name, **dict.fromkeys(COLUMNS, 1000.0)})
    rows += [{**row, 'method': 'maximum'} for row in rows]
    rows.append({'method': 'Partial', 'name': rows[0]['name'], **dict.fromkeys(COLUMNS, 1.0)})
    pd.DataFrame(rows).to_csv(root / 'published.csv', index=False)
    network = WaveletFusion(width=4, dial=True)
    save_checkpoint(root / 'mine.pt', method='trainable_wavelet_fusion', config=network.config,
                    state_dict=network.state_dict(), epoch=1, metrics={})
    write_metadata(root / 'mine.pt', cases={'train': [case_of(next((test / 'CT').iterdir()).name), '99']})
    return root


def arguments(root, **more):
    "Parameters of a run on the small data set, without networks."
    test = root / 'Dataset' / 'test'
    return {'ct_dir': str(test / 'CT'), 'mri_dir': str(test / 'MRI'), 'external_dir': str(root / 'external'),
            'checkpoints': [], 'save_dir': str(root / 'results'), 'device': 'cpu', **more}


execute = partial(run_cells, NOTEBOOK)


@pytest.fixture(scope='module')
def run(dataset):
    "The results folder of a run over two parts that was started from another folder, and what it printed. By papermill: test_own_method.py."
    with contextlib.chdir(dataset), contextlib.redirect_stdout(io.StringIO()) as printed:
        execute(arguments(dataset, join=['val'], published=str(dataset / 'published.csv'), checkpoints=[str(dataset / 'mine.pt')]))
    return dataset / 'results', printed.getvalue()


def test_every_file_is_written(run):
    run, _ = run
    files = {path.name for path in run.iterdir()}
    assert {'metrics.csv', 'summary.csv', 'ranking.csv', 'significance.csv', 'lesions.csv', 'box_plots.png',
            'contact_sheet.png', 'run.json', 'fused'} <= files
    record = json.loads((run / 'run.json').read_text())
    assert record['method'] == 'benchmark' and record['state'] == 'finished' and record['parameters']['preset'] == 'cvpr'
    assert len(record['checkpoints']['mine: mine.pt']) == 64 and len(record['data_sha256']) == 64
    assert CONTROLS <= set(record['numbers']['means']) and CONTROLS <= set(record['numbers']['lesions_kept'])
    kept = record['numbers']['lesions_kept']
    assert kept['copy_ct'] and all(max(kept['copy_ct'][kind], kept['copy_mri'][kind]) > 0.9 for kind in kept['copy_ct'])
    assert len(list((run / 'fused' / 'average').glob('*.png'))) == 6, 'three of the part val, three of the part test'
    assert not (run / 'fused' / 'minimum').exists(), "somebody else's images stay where they are"


def test_tables(run):
    run, printed = run
    metrics = pd.read_csv(run / 'metrics.csv', comment='#')
    summary = pd.read_csv(run / 'summary.csv', index_col='method')
    rules = {'laplacian_pyramid', 'wavelet_maximum', 'guided_filter'}
    assert set(summary.index) == CONTROLS | rules | {'mine', 'minimum', 'Wonder (published)'}, 'Partial lacks pairs'
    assert (metrics.groupby('method').name.nunique() == 6).all()
    assert summary.loc['Wonder (published)', 'kind'] == 'published' and summary.loc['minimum', 'kind'] == 'external'
    assert summary.index[0] == 'Wonder (published)' and summary.mean_rank.is_monotonic_increasing
    for column in COLUMNS:
        of_average = metrics[metrics.method == 'average'][column]
        assert summary.loc['average', column] == pytest.approx(of_average.mean(), rel=1e-4)
        assert summary.loc['average', f'{column}_sd'] == pytest.approx(of_average.std(), rel=1e-4)
    assert summary.trained_on.dropna().index.tolist() == ['mine'] and summary.invented['average'] < 1e-3
    assert '**mine †**' in printed
    assert np.isnan(summary.ms_per_pair['minimum']) and summary.parameters['average'] == 0 and summary.parameters['mine'] > 100


def test_significance(run):
    tests = pd.read_csv(run[0] / 'significance.csv')
    best, column = (tests[tests.rival == rival] for rival in ('best baseline', 'best in the column'))
    assert set(best.method) == {'mine', 'minimum', 'Wonder (published)'} and best.against.nunique() == 1
    assert not best.against.iloc[0].startswith('copy_') and set(best.over) == {'6 slices of 2 patients'}
    assert set(column.method) == {'mine'} and set(column.against) == {'Wonder (published)'}


def test_without_labels_and_externals_and_with_one_column(dataset, tmp_path, capsys):
    for folder in ('CT', 'MRI'):
        (tmp_path / folder).mkdir()
        for path in sorted((dataset / 'Dataset' / 'test' / folder).iterdir())[:2]:
            write_image(tmp_path / folder / path.name, read_image(path))
    given = arguments(dataset, ct_dir=str(tmp_path / 'CT'), mri_dir=str(tmp_path / 'MRI'), columns=['Nabf', 'Nabf'], rules=[],
                      external_dir=str(tmp_path / 'none'), save_dir=str(tmp_path / 'results'))
    result = execute(given, until='summary')
    assert 'no lesion table' in capsys.readouterr().out
    assert set(result['order']) == CONTROLS and result['starred'] == ['Nabf'] and result['tests'].empty
    assert result['order'][0] == result['means'].Nabf.idxmin() and 'Nabf ↓ *' in result['shown']


@pytest.mark.parametrize('given, until, words', [
    ({'rules': ['laplace']}, 'groups', "'laplace' is not a rule"),
    ({'checkpoints': ['nowhere.pt']}, 'groups', 'nowhere.pt'),
    ({'columns': ['EN', 'FID']}, 'data_set', "'FID' is not a metric"),
    ({'columns': ['EN', 'hue_error'], 'rules': []}, 'convention', "'hue_error' is of pairs in colour, and there is none"),
    ({'colums': ['EN']}, 'p', 'did you mean columns'),
    ({'columns': 'EN'}, 'p', r'columns of 90_benchmark.ipynb must be'),
    ({'ct_dir': '/nowhere/CT'}, 'data_set', '/nowhere/CT'),
    ({'join': ['holdout']}, 'data_set', 'holdout'),
    ({'detection': True, 'rules': []}, 'fused', 'slices are too few'),
])
def test_what_is_refused(dataset, given, until, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        execute(arguments(dataset, **given), until=until)


def test_an_external_folder_must_be_complete_and_of_the_right_size(dataset, tmp_path):
    (tmp_path / 'external' / 'theirs').mkdir(parents=True)
    names = [path.name for path in sorted((dataset / 'Dataset' / 'test' / 'CT').iterdir())]
    given = arguments(dataset, external_dir=str(tmp_path / 'external'), rules=[], save_dir=str(tmp_path / 'results'))
    for name in names[1:]:
        write_image(tmp_path / 'external' / 'theirs' / name, np.zeros((32, 32), np.uint8))
    with pytest.raises(ValueError, match=f'no fused image for {names[0]}'):
        execute(given, until='groups')
    write_image(tmp_path / 'external' / 'theirs' / names[0], np.zeros((32, 32), np.uint8))
    with pytest.raises(ValueError, match='32 x 32 pixels, its sources 64 x 64'):
        execute(given, until='groups')


def test_names_must_differ(dataset, tmp_path):
    (tmp_path / 'external' / 'average').mkdir(parents=True)
    for path in (dataset / 'Dataset' / 'test' / 'CT').iterdir():
        write_image(tmp_path / 'external' / 'average' / path.name, read_image(path))
    with pytest.raises(ValueError, match='Two methods are called average'):
        execute(arguments(dataset, external_dir=str(tmp_path / 'external'), rules=[]), until='kinds')


def test_with_detection_no_method_has_the_name_of_the_observer(dataset, tmp_path):
    given = arguments(dataset, checkpoints=[f'joint={dataset / "mine.pt"}'], rules=[], detection=True, save_dir=str(tmp_path / 'results'))
    with pytest.raises(ValueError, match="called 'joint'"):
        execute(given, until='fused')


def test_networks_have_titles_and_files_from_outside_keep_their_names(dataset, tmp_path):
    (tmp_path / 'external' / 'theirs').mkdir(parents=True)
    for path in (dataset / 'Dataset' / 'test' / 'CT').iterdir():
        write_image(tmp_path / 'external' / 'theirs' / f'fused_{path.stem}_v2.png', read_image(path))
    given = arguments(dataset, external_dir=str(tmp_path / 'external'), rules=[], columns=['EN'])
    mine = str(dataset / 'mine.pt')
    result = execute(given | {'checkpoints': [f'ours={mine}', f'again={mine}', 'rule=maximum']}, until='duels')
    assert {'ours', 'again', 'rule', 'theirs'} <= set(result['order']) and result['seen']['ours'] and 'rule' not in result['weights']
    assert set(result['duels'].against) == {'again', 'rule', 'theirs'} and len(result['duels']) == 3 + 3
    turned = execute(given | {'checkpoints': ['wavelet', 'wavelet@1', 'every lesion=wavelet@1']}, until='weights')['groups']['network']
    assert turned['wavelet@1'].lesions == turned['every lesion'].lesions == 1 != turned['wavelet'].lesions
    with pytest.raises(ValueError, match='Two methods are called mine; .*as in other=MODEL'):
        execute(given | {'checkpoints': [mine, mine]}, until='kinds')
    turned = execute(given | {'checkpoints': ['wavelet', 'wavelet@1', f'{mine}@0']}, until='kinds')['groups']['network']
    assert {name: network.lesions for name, network in turned.items()} == {'wavelet': 0.5, 'wavelet@1': 1, 'mine.pt@0': 0}
    with pytest.raises(ValueError, match='theirs holds no slice that is named like .name._fused.png; it holds fused_'):
        execute(given | {'external_pattern': '{name}_fused.png'}, until='groups')


def test_nothing_of_an_earlier_run_is_left(dataset, tmp_path):
    asked = arguments(dataset, save_dir=str(tmp_path / 'results'), rules=[], columns=['SD'])
    execute({**asked, 'checkpoints': [f'first={dataset / "mine.pt"}']})
    (tmp_path / 'results' / 'detection_summary.csv').write_text('of a run that asked for it')
    (tmp_path / 'results' / 'notes.txt').write_text('of the user')
    execute(asked)
    left = {path.name for path in (tmp_path / 'results').iterdir()}
    assert {path.name for path in (tmp_path / 'results' / 'fused').iterdir()} == CONTROLS
    assert 'lesions.csv' in left and 'notes.txt' in left and 'detection_summary.csv' not in left
