"""The notebook that pretrains the backbone, with other parameters than its own."""
from pathlib import Path

import pytest
from conftest import run_cells

from medfusion.phantom import write_phantom

NOTEBOOK = Path(__file__).resolve().parents[1] / 'nbs' / '80_pretraining.ipynb'


def arguments(root, **more):
    return {'phantom_cases': 3, 'crop': 32, 'epochs': 1, 'precision': 'no', 'save_dir': str(root / 'results'), 'checkpoint_dir': str(root / 'checkpoints'), **more}


@pytest.mark.parametrize('deepest', ['stem', 'layer1', 'layer4'])
def test_every_stage_can_be_the_deepest(tmp_path, deepest):
    kept = run_cells(NOTEBOOK, arguments(tmp_path, deepest=deepest))
    assert kept['stored'].stages[-1] == deepest


@pytest.fixture(scope='module')
def heads(tmp_path_factory):
    "Parts train and val of a data set, whose cases are numbered as those of the notebook's own synthetic head."
    return write_phantom(tmp_path_factory.mktemp('heads') / 'Dataset', cases=3, slices=1, size=64)


def test_own_slices_may_be_numbered_as_the_synthetic_head_that_validates(tmp_path, heads):
    for part in ('train', 'val', 'test'):
        given = {'ct_dir': str(heads / part / 'CT'), 'mri_dir': str(heads / part / 'MRI')}
        found = run_cells(NOTEBOOK, arguments(tmp_path, **given), until='item')
        assert len(found['training']) == 2


def test_a_case_that_is_trained_on_does_not_choose_the_epoch(tmp_path, heads):
    given = {f'{kind}{part}_dir': str(heads / 'train' / kind.upper()) for kind in ('ct', 'mri') for part in ('', '_val')}
    with pytest.raises(ValueError, match='is trained on and chooses the best epoch'):
        run_cells(NOTEBOOK, arguments(tmp_path, **given), until='item')
