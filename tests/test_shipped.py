"""The networks that ship: whole, small, unchanged, even in a background of any grey, and as good as their metadata says."""
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import medfusion
from medfusion.cross_validation import pool_slices
from medfusion.data import CTMRIDataset, case_of
from medfusion.files import sha256_of
from medfusion.inference import load_model, shipped_models
from medfusion.metrics import measure
from medfusion.phantom import phantom_slice, write_phantom

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = Path(medfusion.__file__).resolve().parent / 'shipped'
NAMES = ('wavelet', 'wavelet-lite', 'resnet')


@pytest.fixture(scope='module')
def models():
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # a network that is not the shipped one is warned of
        return {name: load_model(name, device='cpu') for name in NAMES}


def phantom_pair():
    made = phantom_slice(12, 4)
    return tuple(torch.as_tensor(image)[None, None].float() for image in (made.ct, made.mri))


@pytest.mark.parametrize('folder', ['trainable_wavelet_fusion', 'wavelet_lite', 'resnet_fusion', 'resnet50_backbone'])
def test_files_are_small_and_recorded(folder):
    folder = SHIPPED / folder
    metadata = json.loads((folder / 'metadata.json').read_text())
    assert metadata['sha256'] == sha256_of(folder / metadata['checkpoint'])
    assert metadata['shipped'] is True and metadata['data'] and metadata['intended_use']
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes[metadata['checkpoint']] < 20e6 and str(ROOT) not in json.dumps(metadata)


# Means of blocks of 64 x 64 pixels, in grey levels, as the files fused the phantom on the day on which they were shipped.
AS_SHIPPED = {'wavelet': [[4.89, 103.5, 110.51, 6.63], [52.81, 123.2, 123.07, 55.84],
                          [61.21, 119.98, 137.08, 67.16], [8.92, 103.09, 113.34, 14.1]],
              'wavelet-lite': [[4.61, 106.53, 113.02, 6.37], [52.48, 124.35, 128.98, 55.78],
                               [61.0, 120.75, 140.43, 67.89], [8.62, 104.2, 116.05, 13.76]],
              'resnet': [[4.69, 103.85, 112.71, 6.48], [52.48, 121.43, 125.04, 55.5],
                         [61.01, 117.84, 134.87, 66.9], [8.73, 102.94, 114.19, 13.87]]}


@pytest.mark.parametrize('name', NAMES)
def test_the_networks_fuse_as_they_did_when_they_were_shipped(name, models):
    with torch.inference_mode():
        blocks = 255 * F.avg_pool2d(models[name](*phantom_pair()), 64)[0, 0]
    torch.testing.assert_close(blocks, torch.tensor(AS_SHIPPED[name]), atol=0.02, rtol=0)    # two digits, and other processors


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


@pytest.mark.parametrize('grey', [(85, 0), (85, 40), (0, 128)])
@pytest.mark.parametrize('name', NAMES)
def test_a_constant_background_stays_constant_whatever_its_grey(name, grey, models):
    made = phantom_slice(12, 4)
    ct, mri = phantom_pair()
    air = torch.as_tensor(made.labels == 0)
    ct[0, 0, air], mri[0, 0, air] = grey[0] / 255, grey[1] / 255
    far = F.max_pool2d((~air)[None, None].float(), 11, 1, 5) == 0    # five pixels from the head and more
    with torch.inference_mode():
        fused = models[name](ct, mri)
    assert far.sum() > 5000 and (255 * fused[far] - max(grey)).abs().max() < 1e-3


def test_the_wavelet_network_is_small(models):
    assert sum(weights.numel() for weights in models['wavelet'].parameters()) <= 300_000


def slices_of(cases, folder):
    "The slices of cases of the Harvard data: from Dataset/, filled by `medfusion data harvard`, or from beside the clone; or of the phantom."
    if cases == ['phantom']:
        return CTMRIDataset(*pool_slices(write_phantom(folder / 'Dataset', cases=3, slices=1, size=64), folder / 'all', phantom=True), cases=cases)
    found = {}
    for root in (ROOT / 'Dataset/test', ROOT / 'Dataset/val', ROOT.parent / 'shared/harvard'):
        there = set(map(case_of, (path.name for path in root.glob('CT/*.png'))))
        found |= {case: root for case in cases if case in there and case not in found and (root / 'MRI').is_dir()}
    if set(found) < set(cases):
        pytest.skip('no Harvard slices; `medfusion data harvard` fills Dataset/ with them')
    return [item for case, root in found.items() for item in CTMRIDataset(root / 'CT', root / 'MRI', cases=[case])]


@pytest.mark.parametrize('name', NAMES)
def test_the_recorded_numbers_are_those_of_the_files(name, models, tmp_path):
    numbers = shipped_models()[name].metadata['numbers']
    columns, slices = list(numbers['means']), slices_of(numbers['cases'].split(', '), tmp_path)
    with torch.inference_mode():
        rows = [measure(models[name](item['ct'][None], item['mri'][None]), item['ct'][None], item['mri'][None], names=columns)
                for item in slices]
    for column in columns:
        mean = torch.cat([row[column] for row in rows]).double().mean().item()
        assert mean == pytest.approx(numbers['means'][column], rel=2e-3, abs=2e-6), column    # two pixels of `invented` in a million
