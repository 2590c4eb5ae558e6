"""The notebook that pretrains the backbone, with other parameters than its own."""
from pathlib import Path

import numpy as np
import pytest
from conftest import run_cells

from medfusion.files import write_image
from medfusion.phantom import write_phantom
from medfusion.runs import make_folder

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


def test_own_slices_that_validate_may_have_any_sizes(tmp_path):
    for name, side in (('901', 70), ('902', 83)):
        for kind in ('CT', 'MRI'):
            write_image(make_folder(tmp_path / kind) / f'{name}001.png', np.random.default_rng(0).integers(0, 256, (side, 75), dtype=np.uint8))
    given = {'ct_val_dir': str(tmp_path / 'CT'), 'mri_val_dir': str(tmp_path / 'MRI'), 'crop': 40}
    assert run_cells(NOTEBOOK, arguments(tmp_path, **given))['best']['epoch'] == 1


@pytest.mark.parametrize('wrong', [{'hidden': 0.}, {'hidden': 1.}, {'block': 0}])
def test_some_blocks_are_hidden_and_others_seen(tmp_path, wrong):
    with pytest.raises(ValueError, match='{} is {}'.format(*[*wrong.items()][0])):
        run_cells(NOTEBOOK, arguments(tmp_path, **wrong), until='train_set')


def test_a_step_in_which_every_block_is_hidden_or_none(tmp_path):
    kept = run_cells(NOTEBOOK, arguments(tmp_path, deepest='stem', block=64, batch_size=1), until='best')
    assert np.isfinite(kept['best']['metrics']['val_loss'])
