"""The networks that ship: whole, small, black where both slices are, and as good as their metadata says."""
import json
import warnings
from pathlib import Path

import pytest
import torch

from medfusion.inference import load_model, shipped_models
from medfusion.metrics import measure
from medfusion.phantom import phantom_slice
from medfusion.files import sha256_of

ROOT = Path(__file__).resolve().parents[1]
HARVARD = ROOT.parent / 'shared/harvard'
NAMES = ('wavelet', 'resnet')


@pytest.fixture(scope='module')
def models():
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # a network that is not the shipped one is warned of
        return {name: load_model(name, device='cpu') for name in NAMES}


def phantom_pair(size=256):
    made = phantom_slice(12, 4, size=size)
    return (torch.as_tensor(image)[None, None].float() for image in (made.ct, made.mri))


@pytest.mark.parametrize('folder', ['trainable_wavelet_fusion', 'resnet_fusion', 'resnet50_backbone'])
def test_files_are_small_and_recorded(folder):
    folder = ROOT / 'checkpoints/final' / folder
    metadata = json.loads((folder / 'metadata.json').read_text())
    assert metadata['sha256'] == sha256_of(folder / metadata['checkpoint'])
    assert metadata['shipped'] is True and metadata['data'] and metadata['intended_use']
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(sizes.values()) < 32e6 and str(ROOT) not in json.dumps(metadata)
    if folder.name == 'resnet50_backbone':
        assert sizes[metadata['checkpoint']] < 20e6


@pytest.mark.parametrize('name', NAMES)
def test_background_stays_black_and_both_sources_are_kept(name, models):
    ct, mri = phantom_pair()
    for image in (ct, mri):
        image[..., :24, :] = 0  # the phantom's MRI has noise outside the head
    with torch.inference_mode():
        fused = models[name](ct, mri)
    assert fused.shape == ct.shape and torch.isfinite(fused).all()
    background = fused[(ct == 0) & (mri == 0)]
    assert len(background) > 5000 and background.max() == 0
    values = measure(fused, ct, mri, names=['VIF_min', 'SD', 'SF'])
    average = measure((ct + mri) / 2, ct, mri, names=['VIF_min', 'SD', 'SF'])
    for column in values:
        assert values[column] > average[column], column


def test_the_wavelet_network_is_small(models):
    assert sum(weights.numel() for weights in models['wavelet'].parameters()) <= 300_000


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.skipif(not HARVARD.is_dir(), reason='the Harvard slices are not beside the clone')
def test_the_recorded_numbers_are_those_of_the_files(name, models):
    from medfusion.data import CTMRIDataset
    numbers = shipped_models()[name].metadata['numbers']
    slices = CTMRIDataset(HARVARD / 'CT', HARVARD / 'MRI', cases=numbers['cases'].split())
    columns = list(numbers['means'])
    with torch.inference_mode():
        rows = [measure(models[name](item['ct'][None], item['mri'][None]), item['ct'][None], item['mri'][None], names=columns)
                for item in slices]
    for column in columns:
        mean = torch.cat([row[column] for row in rows]).double().mean().item()
        assert mean == pytest.approx(numbers['means'][column], rel=2e-3), column
