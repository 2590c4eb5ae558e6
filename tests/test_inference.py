"""What the inference notebook cannot show on a page: every kind of input, tiles against the whole, faults in a folder."""
import colorsys
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Future
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import begin_child, in_child, peak_memory, write_slices
from PIL import Image, ImageCms
from torch import nn

from medfusion import files, inference
from medfusion.cli import typed_model
from medfusion.files import list_pairs, luminance, read_image, sha256_of, to_depth, write_image
from medfusion.inference import (FolderReport, at_lesions, check_output, find_model, fuse, fuse_folder, in_place, load_model, methods, model_of,
                                 model_sha256, network_roles, receptive_radius, shipped_models, start_from, with_luminance)
from medfusion.phantom import phantom_slice
from medfusion.runs import save_checkpoint, write_run


class Strided(nn.Module):
    "A network with strides down to 16, whose result depends on where its grid lies, and a known receptive field."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.ModuleList([nn.Conv2d(2 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(4)])
        self.up = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, ct, mri):
        height, width = ct.shape[-2:]
        x = F.pad(torch.cat([ct, mri], 1), (0, -width % 16, 0, -height % 16), mode='replicate')
        for layer in self.down:
            x = layer(x).relu()
        mask = torch.sigmoid(5 * F.interpolate(self.up(x), scale_factor=16))[..., :height, :width]
        return mask * ct + (1 - mask) * mri


def small_pair(index, height, width):
    "The middle of a phantom slice, CT and MRI, smaller than a phantom can be."
    head = phantom_slice('5', index, size=128)
    window = slice(64 - height // 2, 64 - height // 2 + height), slice(64 - width // 2, 64 - width // 2 + width)
    return head.ct[window], head.mri[window]


def maximum(ct, mri):
    return torch.maximum(ct, mri)


def minimum(ct, mri):
    return torch.minimum(ct, mri)


@pytest.fixture(scope='module')
def network():
    return Strided().eval()


@pytest.fixture(scope='module')
def pair():
    return small_pair(4, 72, 91)


# Names and loading

@pytest.fixture
def trained(tmp_path):
    "The path of a checkpoint with a small untrained wavelet network."
    from medfusion.wavelet_fusion import WaveletFusion
    torch.manual_seed(0)
    model = WaveletFusion(width=4)
    return save_checkpoint(tmp_path / 'mine.pt', method='trainable_wavelet_fusion', config=model.config,
                           state_dict=model.state_dict(), epoch=1, metrics={})


@pytest.mark.parametrize('name', methods())
def test_shipped_models_load_silently(name):
    assert shipped_models()[name].whole
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        model = load_model(name, device='cpu')
    assert not model.training and type(model).__name__ == methods()[name].cls


def test_a_dial_is_part_of_a_models_name(tmp_path, monkeypatch):
    from medfusion.wavelet_fusion import WaveletFusion
    monkeypatch.chdir(tmp_path)
    model = WaveletFusion(width=4, dial=True).eval()
    torch.nn.init.normal_(model.dial.ends[-1], std=1., generator=torch.Generator().manual_seed(0))
    path = save_checkpoint(tmp_path / 'mine.pt', method='trainable_wavelet_fusion', config=model.config, state_dict=model.state_dict(), epoch=1, metrics={})
    ct, mri = np.random.default_rng(0).random((2, 32, 32), dtype=np.float32)
    assert np.array_equal(fuse(ct, mri, f'{path}@1', 'cpu'), fuse(ct, mri, str(path), 'cpu', lesions=1))
    assert not np.array_equal(fuse(ct, mri, f'{path}@1', 'cpu'), fuse(ct, mri, str(path), 'cpu'))
    assert load_model(f'{path}@0.25', 'cpu').lesions == 0.25 and len({model_sha256(f'{path}{at}') for at in ('', '@0', '@1')}) == 3
    path.with_name('mine.pt@1').write_bytes(path.read_bytes())                 # a file of the whole name is that file
    assert find_model('mine.pt@1').lesions is None
    with pytest.raises(ValueError, match='no dial'):
        load_model('maximum@1')


def test_where_a_dial_stands_may_be_said_as_a_value(tmp_path, monkeypatch):
    "A file that is called like the turned network is not meant then."
    monkeypatch.chdir(tmp_path)
    for name, dial in (('net.pt', True), ('net.pt@1', False)):
        network = methods()['wavelet'].network_class()(width=4, dial=dial)
        save_checkpoint(tmp_path / name, method='trainable_wavelet_fusion', config=network.config, state_dict=network.state_dict(), epoch=1, metrics={})
    found = find_model('net.pt').turned(1.)
    assert found.spec == 'net.pt@1' and found.path == tmp_path / 'net.pt' and model_of(found, 'cpu').lesions == 1 and model_of('net.pt@1', 'cpu').dial is None
    assert model_sha256(found) not in (model_sha256('net.pt'), model_sha256('net.pt@1'))
    (tmp_path / 'net.pt@1').unlink()
    assert model_sha256(found) == model_sha256('net.pt@1')
    with pytest.raises(ValueError, match="'net.pt@1@0.5' says twice"):
        found.turned(0.5)


def test_the_dial_is_turned_by_its_name_or_by_lesions():
    slices = np.zeros((16, 16), np.uint8)
    with pytest.raises(ValueError, match="'wavelet@1@0.5' says twice where the dial is to stand"):
        fuse(slices, slices, 'wavelet@1', lesions=.5)
    assert not fuse(slices, slices, load_model('wavelet@1', device='cpu'), lesions=.5).any(), 'a network at hand is turned on'


def test_a_turned_dial_is_measured_once(monkeypatch):
    network = methods()['wavelet'].network_class()(width=4, dial=True).eval()
    monkeypatch.setattr(inference, 'receptive_radius', lru_cache(lambda model: 8))
    for _ in range(3):
        fuse(*np.random.default_rng(0).random((2, 64, 80), dtype=np.float32), network, tile=64, lesions=0.25)
    assert inference.receptive_radius.cache_info().misses == 1


@pytest.mark.parametrize('role', network_roles())
def test_a_rule_is_no_network_to_stand_on(role):
    given = SimpleNamespace(dial=0., lesions=.5, w_detection=0.)
    setattr(given, role, 'maximum')
    with pytest.raises(ValueError, match=f'{role} is maximum, a rule'):
        methods()['wavelet'].check(given)


def test_a_position_in_a_start_is_for_a_network_with_a_dial():
    plain = methods()['wavelet'].network_class()(**load_model('wavelet', 'cpu').config | {'dial': False})
    with pytest.raises(ValueError, match='wavelet@0.3 says where a dial is to stand, and the network that is to start from it has none'):
        start_from(plain, 'wavelet@0.3')


def test_what_a_network_of_ones_own_calls_a_dial_is_none():
    own = torch.nn.Module()
    own.dial = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match='no dial for lesions'):
        at_lesions(own, 0.5)


def test_a_folder_may_be_called_like_a_turned_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'wavelet@old').mkdir()
    shutil.copy(shipped_models()['wavelet'].path, tmp_path / 'wavelet@old/best.pt')
    assert in_place('wavelet@old/best.pt', Path('/there').joinpath) == '/there/wavelet@old/best.pt'
    assert typed_model('wavelet@old/best.pt@0.5') == str(tmp_path / 'wavelet@old/best.pt@0.5') and typed_model('wavelet@2') == 'wavelet@2'


def test_a_dial_is_turned_once_and_whole_names_come_first(tmp_path, monkeypatch):
    "A run or a folder may be called like a turned network; a shipped name means what it means, whatever is called so here."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('medfusion.runs.nbs_dir', lambda: tmp_path / 'nbs')
    for run in ('a', 'a@1'):
        folder = tmp_path / 'results/trainable_wavelet_fusion' / run
        config = {'width': 4, 'dial': True}
        best = folder / 'checkpoints/final/trainable_wavelet_fusion/wavelet_fusion_spatial_best.pt'
        best.parent.mkdir(parents=True)
        path = save_checkpoint(best, method='trainable_wavelet_fusion',
                               config=config, state_dict=methods()['wavelet'].network_class()(**config).state_dict(), epoch=1, metrics={})
        write_run(folder, method='trainable_wavelet_fusion', state='finished', started=0., checkpoints=[path],
                  parameters={'run': run, 'save_dir': str(folder.parent), 'checkpoint_dir': ''})
    assert [(find_model(spec).path.parts[-5], find_model(spec).lesions) for spec in ('run:a', 'run:a@1', 'run:a@0', 'run:wavelet/a@1', 'run:a@1@0')] == [
        ('a', None), ('a@1', None), ('a', 0), ('a@1', None), ('a@1', 0)]
    (tmp_path / 'wavelet@1').mkdir()                        # what was fused with it, say
    assert find_model('wavelet@1').lesions == 1
    for spec in ('wavelet@0.5@1', 'run:a@.5@1'):
        with pytest.raises(ValueError, match='says twice where the dial'):
            find_model(spec)
    for spec in ('wavelet@', 'wavelet@2', 'wavelet@-1', 'wavelet@nan', 'wavelet@1e-3', '@', '@x', '@1'):
        with pytest.raises(FileNotFoundError, match='a number from 0 to 1, as in wavelet@0.5'):
            find_model(spec)
    with pytest.raises(ValueError, match='lesions is 1.5'):
        load_model('wavelet@1.5')


def test_a_name_always_means_the_shipped_network(tmp_path, monkeypatch):
    "Neither a folder nor a file of that name, nor what was trained in the clone, changes what it means."
    monkeypatch.chdir(tmp_path)
    Path('wavelet').mkdir()
    Path('maximum').write_text('')
    assert find_model('wavelet').path == shipped_models()['wavelet'].path and find_model('maximum').rule
    with pytest.raises(FileNotFoundError, match='holds no checkpoint'):
        find_model('./wavelet')


@pytest.mark.parametrize('name, same', [('pyramid', 'laplacian_pyramid'), ('wavelet-max', 'wavelet_maximum'), ('guided', 'guided_filter')])
def test_rules_by_name(name, same, pair):
    assert load_model(name) is load_model(same)
    assert np.array_equal(fuse(*pair, model=name), fuse(*pair, model=load_model(name)))


def test_a_folder_means_the_best_in_it(trained, tmp_path):
    best = methods()['wavelet'].best_name
    for start in ('', 'final', 'checkpoints/final/trainable_wavelet_fusion'):
        place = tmp_path / f'run{len(start)}' / start
        place.mkdir(parents=True)
        (place / best).write_bytes(trained.read_bytes())
        (place / 'wavelet_fusion_spatial_final.pt').write_bytes(b'another')
        assert find_model(tmp_path / f'run{len(start)}').path == place / best
    (tmp_path / '._mine.pt').write_bytes(b'of macOS')
    assert find_model(tmp_path).path == trained                         # the only .pt
    (tmp_path / 'second.pt').write_bytes(b'')
    with pytest.raises(ValueError, match='holds 2 checkpoints .mine.pt, second.pt'):
        find_model(tmp_path)


def test_runs_by_name(trained, tmp_path, monkeypatch):
    "A run's network is the one whose hash its record holds."
    monkeypatch.setattr('medfusion.runs.nbs_dir', lambda: tmp_path / 'nbs')
    for method in ('trainable_wavelet_fusion', 'resnet_fusion'):
        folder = tmp_path / 'results' / method / 'a'
        path = folder / 'checkpoints' / 'final' / method / 'wavelet_fusion_spatial_best.pt'
        path.parent.mkdir(parents=True)
        path.write_bytes(trained.read_bytes())
        write_run(folder, method=method, state='finished', started=0., checkpoints=[path],
                  parameters={'run': 'a', 'save_dir': str(folder.parent), 'checkpoint_dir': ''})
        if method == 'trainable_wavelet_fusion':
            assert find_model('run:a').path == path
    with pytest.raises(ValueError, match='several methods'):
        find_model('run:a')
    assert find_model('run:wavelet/a').path == find_model('run:trainable_wavelet_fusion/a').path
    with pytest.raises(FileNotFoundError, match='no run b'):
        find_model('run:b')
    path.write_bytes(b'of a later run')
    with pytest.raises(ValueError, match='another run has replaced it'):
        find_model('run:resnet/a')


@pytest.mark.parametrize('spec, kind, words', [
    ('wavlet', FileNotFoundError, 'no model .wavlet.'), ('', ValueError, 'names no model'), (None, ValueError, 'names no model'),
    (7, ValueError, 'names no model'), ('~nosuchuser/x.pt', ValueError, 'nosuchuser/x.pt names a home folder')])
def test_names_of_nothing(spec, kind, words):
    with pytest.raises(kind, match=words):
        load_model(spec)


def test_a_checkpoint_is_compared_with_what_is_recorded_of_it(trained):
    metadata = trained.with_name('metadata.json')
    own = {'checkpoint': trained.name, 'sha256': sha256_of(trained)}
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for record in (None, own, {**own, 'checkpoint': 'other.pt', 'sha256': '0' * 64}):
            if record:
                metadata.write_text(json.dumps(record))
            load_model(trained)
    metadata.write_text(json.dumps({**own, 'sha256': '0' * 64}))
    with pytest.warns(UserWarning, match='is not the checkpoint that .* describes'):
        load_model(trained)
    metadata.write_text('[]')
    with pytest.raises(ValueError, match='metadata.json'):
        load_model(trained)


def test_new_file_under_the_same_name_is_noticed(trained, pair):
    before = fuse(*pair, model=trained)
    checkpoint = torch.load(trained, weights_only=True)
    changed = {name: 3 * tensor + 0.1 for name, tensor in checkpoint['state_dict'].items()}
    save_checkpoint(trained, method=checkpoint['method'], config=checkpoint['config'], state_dict=changed, epoch=2, metrics={})
    assert not np.array_equal(before, fuse(*pair, model=trained))


@pytest.mark.parametrize('change', [
    {'method': 'magic'}, {'config': {'width': 8}}, {'config': {'depth': 7}}, {'config': {'width': 'x'}}, {'config': {}},
    lambda state: dict(list(state.items())[1:]), lambda state: state | {'more': torch.zeros(1)},
    lambda state: {f'module.{name}': value for name, value in state.items()},
    lambda state: {name: value * torch.nan for name, value in state.items()}],
    ids=['method', 'width', 'config key', 'config type', 'no config', 'missing', 'extra', 'module.', 'NaN'])
def test_checkpoints_that_do_not_fit_are_a_sentence(trained, change):
    checkpoint = torch.load(trained, weights_only=True)
    changed = change if isinstance(change, dict) else {'state_dict': change(checkpoint['state_dict'])}
    torch.save(checkpoint | changed, trained)
    with pytest.raises(ValueError, match='mine.pt'):
        load_model(trained)


def test_a_foreign_file(tmp_path):
    (tmp_path / 'text.pt').write_text('no checkpoint')
    with pytest.raises(ValueError, match='text.pt'):
        load_model(tmp_path / 'text.pt')


@pytest.mark.parametrize('precision', [torch.float16, torch.bfloat16, torch.float64])
def test_networks_turned_to_another_precision(precision, pair):
    for name in methods():
        network = load_model(name, device='cpu').to(precision)
        assert np.abs(fuse(*pair, model=network) - fuse(*pair, model=name)).max() < 0.1


@pytest.mark.parametrize('name', ['warp', 'meta', 'xpu', 'hpu', 'mps', 'cuda:99', '', None])
def test_devices_that_are_not_here(name):
    with pytest.raises(ValueError, match=r"device|Apple"):
        load_model('wavelet', device=name)


@pytest.mark.parametrize('model', ['wavelet', 'maximum'])
def test_where_tensors_are_made_by_default_changes_nothing(model, pair):
    network, (ct, mri) = load_model(model, device='cpu'), pair
    warm = np.stack([mri, mri / 2, mri / 4], -1)
    wanted = fuse(ct, warm, network), fuse(ct, mri, network, tile=64)
    receptive_radius.cache_clear()
    with torch.device('meta'):      # where nothing can be computed; torch.set_default_device('cuda') where there is a GPU
        made = fuse(ct, warm, network), fuse(ct, mri, network, tile=64)
    assert all(map(np.array_equal, made, wanted))


@pytest.mark.parametrize('default', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', methods())
def test_a_network_has_the_precision_that_it_was_trained_in(name, default, pair):
    "Whatever numbers are by default: it is kept for later calls, when that may be over."
    wanted = fuse(*pair, load_model(name, device='cpu'))
    torch.set_default_dtype(default)
    try:
        network = load_model(name, device='cpu')
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(fuse(*pair, network), wanted)


# Kinds and depths

@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_come_back_in_their_depth(network, pair, dtype):
    ct, mri = (image.astype(dtype) if np.dtype(dtype).kind == 'f' else to_depth(image, dtype) for image in pair)
    fused = fuse(ct, mri, network)
    assert isinstance(fused, np.ndarray) and fused.shape == ct.shape and fused.dtype == dtype
    scale = 1 if np.dtype(dtype).kind == 'f' else np.iinfo(dtype).max
    assert np.abs(fused / scale - fuse(*pair, network)).max() < 2 / 255


@pytest.mark.parametrize('shape', [(72, 91), (1, 72, 91), (1, 1, 72, 91)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.uint8, torch.uint16])
def test_tensors_come_back_in_their_shape_and_type(pair, shape, dtype):
    scale = 1 if dtype.is_floating_point else torch.iinfo(dtype).max
    ct, mri = ((torch.from_numpy(image) * scale).reshape(shape).to(dtype) for image in pair)
    fused = fuse(ct, mri, maximum)
    assert fused.shape == shape and fused.dtype == dtype
    assert torch.equal(fused.double(), torch.maximum(ct.double(), mri.double()))


def test_a_batch_equals_its_slices(network):
    ct, mri = torch.rand(2, 3, 1, 32, 48)
    together = fuse(ct, mri, network)
    for i in range(3):
        assert (fuse(ct[i], mri[i], network) - together[i]).abs().max() < 1e-6


@pytest.mark.parametrize('mode', ['L', 'I;16', 'I', 'F', 'RGB', 'RGBA', 'P', '1', 'LA', 'CMYK', 'YCbCr', 'HSV', 'LAB', 'RGBX'])
def test_pil_images(pair, mode):
    srgb, lab = ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB')
    ct8 = to_depth(pair[0], np.uint8)
    if mode in ('I;16', 'I'):
        ct = Image.fromarray(to_depth(pair[0], np.uint16))
        ct = ct.convert('I') if mode == 'I' else ct
    else:
        ct = Image.fromarray(pair[0]) if mode == 'F' else Image.fromarray(ct8)
        ct = ImageCms.profileToProfile(ct.convert('RGB'), srgb, lab, outputMode='LAB') if mode == 'LAB' else ct.convert(mode)
    fused = fuse(ct, Image.fromarray(to_depth(pair[1], np.uint8)), maximum)
    assert fused.size == ct.size and fused.mode == (mode if mode in ('I;16', 'I', 'F') else 'L')
    if mode == 'I;16':
        assert np.asarray(fused).max() == np.maximum(np.asarray(ct), 257 * to_depth(pair[1], np.uint8).astype(int)).max()


def test_files_and_mixed_depths(pair, tmp_path):
    write_image(tmp_path / 'ct.png', to_depth(pair[0], np.uint16))
    write_image(tmp_path / 'mri.png', to_depth(pair[1], np.uint8))
    fused = fuse(str(tmp_path / 'ct.png'), tmp_path / 'mri.png', maximum)
    expected = np.maximum(to_depth(pair[0], np.uint16), 257 * to_depth(pair[1], np.uint8).astype(np.uint16))
    assert fused.dtype == np.uint16 and np.abs(fused.astype(int) - expected).max() <= 1
    assert fuse(pair[0], tmp_path / 'mri.png', maximum).dtype == np.float32


@pytest.mark.parametrize('size', [(16, 16), (17, 16), (31, 64), (100, 47)])
def test_any_size_from_16(size):
    assert fuse(*small_pair(3, *size)).shape == size


def test_black_and_non_contiguous_slices(network):
    black = np.zeros((32, 32), np.uint8)
    assert fuse(black, black, network).max() == 0
    image = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    assert np.array_equal(fuse(image[::2, ::-2], image[::2, ::-2], maximum), image[::2, ::-2])


@pytest.mark.parametrize('ct, mri, reason', [
    (np.zeros((32, 32), np.uint8), np.zeros((32, 33), np.uint8), '32×32 pixels and the MRI 32×33'),
    (np.zeros((8, 32), np.uint8), np.zeros((8, 32), np.uint8), 'at least 16'),
    (np.zeros((32, 32), np.int64), np.zeros((32, 32), np.uint8), 'no known range'),
    (np.full((32, 32), np.nan), np.zeros((32, 32)), 'finite'),
    (np.full((32, 32), 255.0), np.zeros((32, 32)), 'within'),
    (np.zeros((4, 32, 32), np.uint8), np.zeros((32, 32), np.uint8), 'no slice'),
    (np.zeros((0, 32), np.uint8), np.zeros((0, 32), np.uint8), 'no slice'),
    (torch.zeros(1, 1, 0, 32), torch.zeros(1, 1, 0, 32), 'no slice'),
    (np.zeros((32, 32), object), np.zeros((32, 32)), 'no known range'),
    (torch.zeros(2, 32, 32), torch.zeros(2, 32, 32), 'no slice'),
    (torch.zeros(2, 1, 32, 32), torch.zeros(3, 1, 32, 32), '2 CT slices and 3 MRI'),
    ([[0.0]], np.zeros((32, 32)), 'type list'),
])
def test_what_cannot_be_fused_is_a_sentence(ct, mri, reason):
    with pytest.raises(ValueError, match=reason):
        fuse(ct, mri, maximum)


@pytest.mark.parametrize('image', [np.ones((32, 32), bool), torch.ones(32, 32, dtype=torch.bool), torch.ones(32, 32, dtype=torch.complex64)])
@pytest.mark.parametrize('value_range', [None, (0, 1)])
def test_a_mask_is_made_grey_first(image, value_range):
    with pytest.raises(ValueError, match=r'no grey values; give floats in \[0, 1\], such as mask \* 1.0'):
        fuse(image, image, maximum, value_range=value_range)
    assert abs(fuse(abs(image * 1.0), abs(image * 1.0), maximum)).min() == 1


@pytest.mark.parametrize('kind', [np.int16, np.int32, np.uint32, np.uint64])
def test_values_of_wide_types_come_back_as_floats(kind):
    steps = (np.mgrid[:64, :64][0] * 60).astype(kind)
    fused = fuse(steps, steps, maximum, value_range=(0, 4095))
    assert fused.dtype == np.float32 and np.allclose(fused, steps / 4095, atol=1e-6)


@pytest.mark.parametrize('lesions', [np.array(0.5), np.array([0., 1.]), [0.5], 'all', 2])
@pytest.mark.parametrize('model', ['wavelet', 'resnet', 'maximum'])
def test_where_a_dial_cannot_stand(pair, model, lesions):
    with pytest.raises(ValueError, match='lesions is .* must be a number from 0'):
        fuse(*pair, model, lesions=lesions)


def test_numbers_of_numpy_are_numbers(pair):
    assert np.array_equal(fuse(*pair, lesions=np.float32(1), tile=np.int64(64)), fuse(*pair, lesions=1, tile=64))


def test_results_are_named_by_no_pattern(folders, tmp_path):
    with pytest.raises(ValueError, match='ends in a pattern of names.* name a folder alone'):
        fuse_folder(folders / 'CT', folders / 'MRI', tmp_path / '{name}_f.png', maximum)
    with pytest.raises(ValueError, match='fused.png is called like a slice, and what is written is a folder'):
        fuse_folder(folders / 'CT', folders / 'MRI', tmp_path / 'fused.png', maximum)


def test_a_file_that_cannot_be_fused_is_named(tmp_path):
    write_image(tmp_path / '34002.png', np.zeros((15, 15), np.uint8))
    with pytest.raises(ValueError, match=r'^34002\.png: A slice of 15×15'):
        fuse(tmp_path / '34002.png', tmp_path / '34002.png', maximum)


def test_big_endian_arrays_and_pages(pair, tmp_path):
    ct, mri = (to_depth(image, np.uint16) for image in pair)
    fused = fuse(ct.astype('>u2'), mri.astype('>f4') / 65535, maximum)
    assert fused.dtype == np.dtype('>u2') and np.abs(fused.astype(int) - fuse(ct, mri, maximum)).max() <= 1
    Image.fromarray(ct).save(tmp_path / 'stack.tif', save_all=True, append_images=[Image.fromarray(ct)] * 2)
    with Image.open(tmp_path / 'stack.tif') as stack, pytest.raises(ValueError, match='3 pages'):
        fuse(stack, mri, maximum)
    with Image.open(tmp_path / 'stack.tif') as stack:
        stack.seek(1)
        assert np.array_equal(np.asarray(fuse(stack.copy(), ct, maximum)), ct)


@pytest.mark.parametrize('tile', ['x', 0, 1024.0, -64, True])
def test_tiles_that_are_none(pair, tile):
    with pytest.raises(ValueError, match='multiple of 64'):
        fuse(*pair, maximum, tile=tile)


def test_what_a_network_must_return(pair):
    with pytest.raises(ValueError, match='NaN or infinite'):
        fuse(*pair, lambda ct, mri: ct * torch.nan)
    with pytest.raises(ValueError, match='the shape'):
        fuse(*pair, lambda ct, mri: ct[..., 1:])
    for wrong, told in (((), 'tuple'), (pair[0], 'ndarray of float32'), (torch.ones(1, 1, *pair[0].shape, dtype=torch.uint8), 'Tensor of torch.uint8')):
        with pytest.raises(ValueError, match=f'returned a {told}; it must return the fused slices alone'):
            fuse(*pair, lambda ct, mri: wrong)
        with pytest.raises(ValueError, match=f'returned a {told}; it must return the fused slices alone'):
            fuse(*pair, lambda ct, mri: wrong, tile=64)      # of which it is asked first how far the model looks
    with pytest.raises(ValueError, match='the shape'):
        fuse(*pair, lambda ct, mri: ct[0, 0], tile=64)


def test_range(pair, tmp_path):
    "12 bits in 16 are mapped like 16 bits; 8 bits beside them keep their own range; without a range there is a warning."
    ct, mri = (np.rint(image * 4095).astype(np.uint16) for image in pair)
    mri8 = to_depth(pair[1], np.uint8)
    mapped = fuse(ct, mri8, maximum, value_range=(0, 4095))
    assert mapped.dtype == np.uint16 and np.abs(mapped / 65535 - np.maximum(ct / 4095, mri8 / 255)).max() < 1e-4
    assert np.array_equal(fuse(ct.astype(np.int16), mri8, maximum, value_range=(0, 4095)).shape, ct.shape)
    write_image(tmp_path / 'ct.png', ct)
    write_image(tmp_path / 'mri.png', mri8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        from_files = fuse(tmp_path / 'ct.png', tmp_path / 'mri.png', maximum, value_range=(0, 4095))
    assert np.abs(from_files - mapped / 65535).max() < 1e-4
    units = (pair[0] * 300 - 100).astype(np.float32)       # Hounsfield units, of which 8 bits hold no negative ones
    Image.fromarray(units).save(tmp_path / 'ct.tif')
    for one, other in ((units, mri8), (tmp_path / 'ct.tif', tmp_path / 'mri.png'), (units.astype(np.int32), mri8)):
        assert np.abs(fuse(one, other, maximum, value_range=(-100, 200)) - np.maximum(pair[0], mri8 / 255)).max() < 0.01
    assert fuse(ct.astype(np.int16), mri8, maximum, value_range=(0, 40_000)).max() == mri8.max() / np.float32(255)
    with pytest.warns(UserWarning, match='ct.png: the largest value is .* --range 0,4095'):
        fuse(tmp_path / 'ct.png', tmp_path / 'mri.png', maximum)
    for bad in ((5, 5), (0, float('nan')), (1,), 5, 0, 'ab', (None, 4), ()):
        for one, other in ((ct, mri), (tmp_path / 'ct.png', tmp_path / 'mri.png')):
            with pytest.raises(ValueError, match='range of values'):
                fuse(one, other, maximum, value_range=bad)
        with pytest.raises(ValueError, match='range of values'):
            fuse_folder(tmp_path, tmp_path, tmp_path / 'out', 'maximum', value_range=bad)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.tif'])
def test_an_image_of_pil_lies_as_its_file_does(tmp_path, suffix):
    exif = Image.Exif()
    exif[274] = 6
    place, image = tmp_path / f'a{suffix}', Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40), np.uint8))
    image.save(place, **({'tiffinfo': {274: 6}, 'compression': 'tiff_lzw'} if suffix == '.tif' else {'exif': exif}))
    fused = fuse(Image.open(place), Image.open(place), maximum)
    assert np.array_equal(np.asarray(fused), fuse(place, place, maximum)) and fused.size == (24, 40)


def test_every_mode_of_pil(pair):
    "Fused, or refused by the name of the mode."
    for mode in ('1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F', 'LA', 'PA', 'RGBX', 'RGBa', 'La', 'I;16', 'I;16B'):
        try:
            image = Image.new(mode, (20, 20))
        except ValueError:
            continue        # not in this version of Pillow
        try:
            assert fuse(image, image, maximum).size == (20, 20)
        except ValueError as error:
            assert str(error).startswith(f'A PIL image of mode {mode} is no slice'), (mode, error)


def test_network_in_training_mode_is_refused(pair):
    with pytest.raises(ValueError, match='training mode'):
        fuse(*pair, Strided())


# Colour

def test_round_trip_and_grey(pair):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (72, 91, 3), dtype=np.uint8)
    luminance = np.round(colour @ [0.299, 0.587, 0.114] * 257).astype(np.uint16)
    back = fuse(luminance, colour, lambda ct, mri: mri)         # nothing changes: the colours come back
    assert back.dtype == np.uint16 and np.abs(back / 257 - colour.astype(float)).max() < 1
    assert np.array_equal(fuse(colour[..., 0], colour, lambda ct, mri: mri), colour)
    grey = np.repeat(to_depth(pair[1], np.uint8)[..., None], 3, axis=2)
    fused = fuse(to_depth(pair[0], np.uint8), grey, maximum)
    assert (fused == fused[..., :1]).all()


def test_colour_in_every_kind(pair, tmp_path):
    colour = np.stack([to_depth(pair[1], np.uint8), to_depth(pair[0], np.uint8), np.zeros((72, 91), np.uint8)], axis=2)
    ct = to_depth(pair[0], np.uint8)
    fused = fuse(ct, colour, maximum)
    assert fused.shape == (72, 91, 3)
    assert np.array_equal(np.asarray(fuse(Image.fromarray(ct), Image.fromarray(colour), maximum)), fused)
    as_tensor = fuse(torch.from_numpy(ct)[None], torch.from_numpy(colour).permute(2, 0, 1), maximum)
    assert np.abs(as_tensor.permute(1, 2, 0).numpy().astype(int) - fused).max() <= 1   # rounding of halves
    write_image(tmp_path / 'pet.png', colour)
    assert np.array_equal(fuse(ct, tmp_path / 'pet.png', maximum), fused)
    write_image(tmp_path / 'grey.png', np.repeat(ct[..., None], 3, axis=2))
    assert fuse(ct, tmp_path / 'grey.png', maximum).shape == ct.shape      # grey in three channels is grey
    assert fuse(np.stack([ct] * 3, axis=2), ct, maximum).shape == ct.shape  # a grey CT in three channels is grey
    with pytest.raises(ValueError, match='The first image is in colour .* other order'):
        fuse(colour, ct, maximum)


def hue_error(rgb, source):
    "The largest angle in degrees between the hues of two (N, 3) float images, where both have one."
    hues = [np.array([colorsys.rgb_to_hsv(*pixel) for pixel in image]) for image in (rgb, source)]
    seen = (np.ptp(rgb, 1) > 1e-3) & (np.ptp(source, 1) > 1e-3)
    turned = np.abs(hues[0][seen, 0] - hues[1][seen, 0]) * 360
    return np.minimum(turned, 360 - turned).max(initial=0)


def test_a_colour_at_any_luminance_loses_saturation_only():
    "Every colour of a grid at every luminance of a grid: the luminance asked for, the hue of the source, and no clipping."
    steps = torch.linspace(0, 1, 8)
    colours = torch.cartesian_prod(steps, steps, steps)                     # (512, 3)
    targets = torch.linspace(0, 1, 33)
    rgb = colours.T[None, :, :, None].expand(1, 3, 512, 33).double()
    painted = with_luminance(rgb, targets.expand(1, 1, 512, 33).double())
    assert 0 <= painted.min() and painted.max() <= 1
    assert (luminance(painted) - targets).abs().max() < 1e-9
    assert (luminance(torch.round(painted * 255)) - torch.round(targets * 255)).abs().max() <= 1      # rounded to 8 bits
    for column in range(33):
        assert hue_error(painted[0, :, :, column].T.numpy(), colours.double().numpy()) < 0.01
    same = with_luminance(rgb, luminance(rgb))
    assert (same - rgb).abs().max() < 1e-9                                  # where it fits, the saturation stays


COLOUR = Path(__file__).resolve().parents[2] / 'shared' / 'harvard_color'


@pytest.mark.skipif(not COLOUR.is_dir(), reason='the colour slices are not part of the repository')
@pytest.mark.parametrize('kind', ['PET', 'SPECT'])
def test_colours_of_real_slices(kind):
    root = COLOUR / f'{kind}-MRI'
    for name in sorted(path.name for path in (root / 'MRI').iterdir())[::4]:
        mri, colour = read_image(root / 'MRI' / name, quiet=True), read_image(root / kind / name, color=True, quiet=True)
        y = torch.maximum(*(luminance(torch.from_numpy(np.atleast_3d(image).transpose(2, 0, 1) / 255)[None]) for image in (mri, colour)))
        painted = with_luminance(torch.from_numpy(colour.transpose(2, 0, 1) / 255)[None], y)
        assert (luminance(painted) - y).abs().max() < 1e-9
        pixels, before = painted[0].flatten(1).T.numpy()[::7], colour.reshape(-1, 3)[::7] / 255
        assert hue_error(pixels, before) < 0.01
        fused = fuse(mri, colour, lambda one, other: torch.maximum(one, other))
        assert np.abs(np.rint(255 * y[0, 0].numpy()) - fused @ [0.299, 0.587, 0.114]).max() <= 1


# Tiles

@pytest.mark.parametrize('size', [(300, 200), (257, 130), (64, 321)])
def test_tiles_equal_the_whole(network, size):
    assert 0 < receptive_radius(network) <= 64
    ct, mri = torch.rand(2, 1, *size)
    assert (fuse(ct, mri, network, tile=64) - fuse(ct, mri, network)).abs().max() < 1e-5


def test_a_tile_sees_as_far_as_the_network_does():
    def far(ct, mri):
        return torch.maximum(mri, F.pad(ct, (70, 0, 70, 0))[..., :ct.shape[-2], :ct.shape[-1]])
    ct, mri = torch.rand(2, 1, 200, 330)
    assert receptive_radius(far) == 70 and (fuse(ct, mri, far, tile=64) - fuse(ct, mri, far)).abs().max() < 1e-5


@pytest.mark.parametrize('model', [maximum, 'maximum', 'average'])
def test_a_last_tile_of_a_few_pixels_is_fused(model):
    ct, mri = torch.rand(2, 1, 65, 143)
    assert torch.equal(fuse(ct, mri, model, tile=64), fuse(ct, mri, model))


def test_tiles_of_the_wavelet_network():
    head = phantom_slice('2', 4, size=(333, 270))
    assert np.abs(fuse(head.ct, head.mri, tile=64) - fuse(head.ct, head.mri)).max() < 1 / 255


def test_network_that_sees_everything_says_so():
    def stretched(ct, mri):
        return (ct + mri) / (ct + mri).amax((2, 3), keepdim=True)
    assert receptive_radius(stretched) is None
    with pytest.warns(UserWarning, match='whole image at once'):
        fuse(torch.rand(1, 128, 128), torch.rand(1, 128, 128), stretched, tile=64)


def test_tiles_off_the_grid_are_refused(pair):
    with pytest.raises(ValueError, match='multiple of 64'):
        fuse(*pair, maximum, tile=100)


# Folders

@pytest.fixture(scope='module')
def six_pairs(tmp_path_factory):
    "Six pairs of two sizes and depths."
    root = tmp_path_factory.mktemp('pairs')
    for folder in ('CT', 'MRI'):
        (root / folder).mkdir()
    for i in range(6):
        ct, mri = small_pair(i, *((48, 64) if i % 2 else (40, 40)))
        write_image(root / 'CT' / f'5{i:03d}.png', to_depth(ct, np.uint16 if i == 2 else np.uint8))
        write_image(root / 'MRI' / f'5{i:03d}.png', to_depth(mri, np.uint8))
    return root


@pytest.fixture
def folders(six_pairs, tmp_path):
    return Path(shutil.copytree(six_pairs, tmp_path, dirs_exist_ok=True))


def names_in(folder):
    return sorted(path.name for path in folder.glob('*.png'))


@pytest.mark.parametrize('batch_size', [1, 4, 10])
def test_folder_equals_its_pairs(folders, network, batch_size):
    report = fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', network, batch_size=batch_size, progress=False)
    names = names_in(folders / 'CT')
    assert report.ok and sorted(report.fused) == names == names_in(folders / 'out')
    for name in names:
        alone = fuse(folders / 'CT' / name, folders / 'MRI' / name, network)
        written = read_image(folders / 'out' / name)
        assert written.dtype == alone.dtype and np.abs(written.astype(int) - alone.astype(int)).max() <= 1


def test_pairs_that_failed_alike_share_a_line():
    report = FolderReport(Path('out'), failed={'2.png': 'swapped', '3.png': 'cut off', '1.png': 'swapped'})
    assert str(report).splitlines()[1:] == ['  1.png, 2.png: swapped', '  3.png: cut off']


def test_bad_pairs_do_not_stop_the_others(folders, network):
    names = names_in(folders / 'CT')
    (folders / 'MRI' / names[0]).unlink()
    (folders / 'CT' / names[1]).write_bytes((folders / 'CT' / names[1]).read_bytes()[:100])
    write_image(folders / 'MRI' / names[2], np.zeros((20, 20), np.uint8))
    (folders / 'CT' / names[3]).write_text('no picture')
    report = fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', network, progress=False)
    assert sorted(report.failed) == names[:4] and not report.ok
    assert report.fused == names[4:] == names_in(folders / 'out')
    assert 'no MRI slice' in report.failed[names[0]] and '20×20' in report.failed[names[2]]
    assert all(name in str(report) for name in names[:4]) and '4 failed' in str(report)
    assert not list((folders / 'out').glob('.*'))


def run(root, model='maximum', out='out', ct='CT', mri='MRI', **options):
    return fuse_folder(root / ct, root / mri, root / out, model, progress=False, **options)


def expected(root, name, model='maximum', ct='CT', mri='MRI'):
    return fuse(root / ct / name, root / mri / name, model)


def assert_right(root, names, model='maximum', **sides):
    for name in names:
        found = read_image(root / 'out' / name).astype(int)
        assert np.abs(found - expected(root, name, model, **sides).astype(int)).max() <= 1, name


def test_another_range_is_another_source(folders):
    names = names_in(folders / 'CT')
    assert run(folders).fused == names
    assert run(folders, value_range=(0, 100)).fused == names and run(folders, value_range=(0, 100)).skipped == names
    assert run(folders).fused == names


def test_a_record_that_was_tampered_with(folders):
    run(folders)
    record = folders / 'out' / 'fused.jsonl'
    with open(record, 'a') as file:
        file.write('{"file": null, "ct": "a", "mri": "b", "network": null, "sha256": "x"}\n' + '[' * 200_000 + '\n')
    assert run(folders).skipped == names_in(folders / 'CT')


def test_what_is_there_is_not_fused_again_and_what_is_not_is(folders):
    names = names_in(folders / 'CT')
    assert run(folders).fused == names
    again = run(folders)
    assert again.fused == [] and again.skipped == names
    out = folders / 'out'
    (out / names[0]).unlink()                                                    # gone
    (out / names[1]).write_bytes(b'')                                            # of 0 bytes
    (out / names[2]).write_bytes((out / names[2]).read_bytes()[:-9])             # cut off
    write_image(folders / 'MRI' / names[3], np.full((48, 64), 250, np.uint8))    # its source has changed
    report = run(folders)
    assert report.fused == names[:4] and report.replaced == names[1:4] and report.skipped == names[4:] and report.ok
    assert '3 in place of an older result' in str(report)
    assert_right(folders, names)
    again = run(folders, replace=True)
    assert again.fused == again.replaced == names


def test_what_fails_has_replaced_nothing(folders):
    names = names_in(folders / 'CT')
    run(folders)
    write_image(folders / 'MRI' / names[0], np.full((20, 20), 250, np.uint8))    # no longer of the CT's size
    write_image(folders / 'MRI' / names[1], np.full((48, 64), 250, np.uint8))
    (folders / 'out' / names[2]).unlink()
    report = run(folders, replace=True)
    assert list(report.failed) == names[:1] and report.fused == names[1:] and report.replaced == [names[1], *names[3:]]


def test_another_patient_with_the_same_names(folders):
    "Two data sets with equal file names, fused into one folder one after the other: what is there is of the second."
    names = names_in(folders / 'CT')
    for side in ('CT', 'MRI'):
        (folders / f'B{side}').mkdir()
        for name in names:
            write_image(folders / f'B{side}' / name, 255 - to_depth(read_image(folders / side / name) / 65535, np.uint8)[:40, :40])
    run(folders)
    report = run(folders, ct='BCT', mri='BMRI')
    assert report.fused == report.replaced == names
    assert_right(folders, names, ct='BCT', mri='BMRI')
    assert run(folders, ct='BCT', mri='BMRI').skipped == names


def test_what_is_somebody_elses_stays(folders):
    names = names_in(folders / 'CT')
    (folders / 'out').mkdir()
    (folders / 'out' / names[0]).write_bytes(b'holiday')
    (folders / 'out' / names[1]).mkdir()
    report = run(folders)
    assert sorted(report.failed) == names[:2] and all('move it away' in reason for reason in report.failed.values())
    assert (folders / 'out' / names[0]).read_bytes() == b'holiday' and report.fused == names[2:]
    assert names[0] not in (folders / 'out' / 'fused.jsonl').read_text()
    report = run(folders, replace=True)
    assert list(report.failed) == names[1:2] and names[0] in report.fused and report.replaced == names[2:]      # a photograph is no result


def test_a_folder_belongs_to_one_network(folders, network):
    names = names_in(folders / 'CT')
    run(folders)
    with pytest.raises(ValueError, match='fused with maximum, which is not known to be the same network as a Strided'):
        run(folders, network)
    assert_right(folders, names)
    assert run(folders, 'average', replace=True).fused == names and run(folders, 'average').skipped == names
    with pytest.raises(ValueError, match='fused with average'):
        run(folders)
    assert_right(folders, names, 'average')


class Scaled(nn.Module):
    "A network whose weights, of which it has none, do not say what it computes."

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, ct, mri):
        return self.factor * ct


def scaled(factor):
    large = [0] * 500 + [factor]
    return lambda ct, mri, *, factor=factor: large[-1] * ct


@pytest.mark.parametrize('make', [Scaled, scaled], ids=['attributes', 'defaults and closures'])
def test_an_object_is_never_taken_for_an_earlier_one(folders, make):
    "What it computes cannot be known from outside, so nothing is skipped: refused, or made anew."
    names = names_in(folders / 'CT')
    one, other = make(0.5).eval() if make is Scaled else make(0.5), make(0.25).eval() if make is Scaled else make(0.25)
    assert run(folders, one).fused == names
    for model in (one, other):
        with pytest.raises(ValueError, match='not known to be the same network'):
            run(folders, model)
    assert run(folders, other, replace=True).fused == names
    assert_right(folders, names, other)


def test_the_name_of_another_checkpoint_is_another_network(folders, trained, tmp_path):
    shutil.copy(shipped_models()['wavelet'].path, tmp_path / 'net.pt')
    assert run(folders, tmp_path / 'net.pt').ok
    assert run(folders, 'wavelet').skipped == names_in(folders / 'CT')      # the same file by another name
    shutil.copy(trained, tmp_path / 'net.pt')
    with pytest.raises(ValueError, match='fused with .*net.pt'):
        run(folders, tmp_path / 'net.pt')


class Killed(BaseException):
    "Stands for the end of the process: nothing that catches errors catches it."


@pytest.mark.fault('fuse', 'killed between two writes')
def test_replacing_that_was_killed_goes_on_with_the_new_network(folders, monkeypatch):
    names = names_in(folders / 'CT')
    run(folders)
    written = []

    def write_two(path, data, write=inference.write_atomically):
        if len(written) == 2:
            raise Killed
        written.append(path.name)
        return write(path, data)
    monkeypatch.setattr(inference, 'write_atomically', write_two)
    with pytest.raises(Killed):
        run(folders, 'average', replace=True, workers=1)
    monkeypatch.undo()
    report = run(folders, 'average')
    assert sorted(report.skipped) == sorted(written) and len(report.fused) == 4 and report.ok
    assert_right(folders, names, 'average')


@pytest.mark.fault('fuse', 'killed between two writes', points=7)
@pytest.mark.parametrize('door', ['append_line', 'write_atomically'])
@pytest.mark.parametrize('moment', ['before', 'after'])
def test_killed_between_any_two_writes(folders, door, moment, monkeypatch):
    "Whichever write is the last one: the next run makes what is missing, and only that, and all is right."
    names, real = names_in(folders / 'CT'), getattr(inference, door)
    for last in range(7):
        calls = []

        def dying(*arguments, **more):
            if moment == 'after':
                real(*arguments, **more)
            calls.append(arguments)
            if len(calls) > last:
                raise Killed
            return real(*arguments, **more) if moment == 'before' else None
        monkeypatch.setattr(inference, door, dying)
        try:
            run(folders, workers=1, batch_size=2)
        except Killed:
            pass
        monkeypatch.undo()
        finished = [name for name in names if (folders / 'out' / name).exists()]
        report = run(folders)
        assert report.ok and report.skipped == finished, (last, report)
        assert_right(folders, names)
        shutil.rmtree(folders / 'out')


@pytest.mark.fault('fuse', 'killed from outside')
def test_killed_for_real(folders):
    "SIGKILL while another process writes: whole files, no foreign ones, and the next run ends the work and tidies up."
    def slowly(real=inference.write_atomically):
        inference.write_atomically = lambda *given: (time.sleep(0.05), real(*given))
        run(folders, batch_size=1, workers=1)
    child = begin_child(slowly)
    while not names_in(folders / 'out'):
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    (folders / 'out' / f'.5000.png.{child}.tmp').write_bytes(b'half')
    names = names_in(folders / 'CT')
    report = run(folders, 'maximum')
    assert report.ok and sorted(report.fused + report.skipped) == names and report.skipped
    assert_right(folders, names)
    assert not list((folders / 'out').glob('.*'))


@pytest.mark.fault('fuse', 'stopped while it holds a lock')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_a_lock_is_taken_leaves_nobody_waiting(folders, number):
    "Between taking a lock that the threads share and the block that gives it back: they would wait for ever, and the stop for them."
    def stopped():
        def done(future, real=Future.done, stops=[]):
            future._condition.acquire()
            if threading.current_thread() is threading.main_thread() and not stops:
                stops.append(signal.raise_signal(number))
            future._condition.release()
            return real(future)
        Future.done = done
        signal.signal(number, signal.default_int_handler)       # SIGINT may be ignored, where a shell runs the tests in the background
        signal.alarm(20)
        try:
            run(folders, batch_size=1, workers=2)
        except KeyboardInterrupt:
            raise SystemExit(7) from None
    assert os.waitstatus_to_exitcode(in_child(stopped)) == 7
    assert len(run(folders).skipped) < 6 and run(folders).ok


def at_once(*tasks):
    "The results, or exceptions, of functions that begin at the same moment in threads."
    barrier, results = threading.Barrier(len(tasks)), [None] * len(tasks)

    def begin(number, task):
        barrier.wait()
        try:
            results[number] = task()
        except ValueError as error:
            results[number] = error
    threads = [threading.Thread(target=begin, args=given) for given in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def told_in(out, without=()):
    "What the record of a folder tells of its results, {file: what}, each of which it tells once."
    lines = [line for line in map(json.loads, (out / 'fused.jsonl').read_text().splitlines()) if 'file' in line]
    told = {line['file']: {name: value for name, value in line.items() if name not in without} for line in lines}
    assert len(lines) == len(told)
    return told


@pytest.mark.parametrize('model, levels, without', [('maximum', 0, ()), ('wavelet-lite', 1, ('sha256',))])
def test_shards_together_are_one_run(folders, model, levels, without):
    "Sixteen of them, side by side into one folder: each pair once, the same names and record; of a network to one grey level, for batches are others."
    for i in range(42):                                                      # of six kinds; by these names no shard stays empty
        for side in ('CT', 'MRI'):
            shutil.copy(folders / side / f'5{i % 6:03d}.png', folders / side / f'6{7 * i:03d}.png')
    (folders / 'MRI' / names_in(folders / 'MRI')[0]).unlink()                # one that fails fails in one shard only
    reports = at_once(*(partial(run, folders, model, shard=f'{k}/16') for k in range(1, 17)))
    whole = run(folders, model, 'whole')
    assert all(report.fused for report in reports)
    assert sorted(name for report in reports for name in report.fused) == whole.fused == names_in(folders / 'out') and len(whole.fused) == 47
    assert sorted(name for report in reports for name in report.failed) == list(whole.failed)
    assert told_in(folders / 'out', without) == told_in(folders / 'whole', without)
    for name in whole.fused:
        parts, one = (read_image(folders / out / name) for out in ('out', 'whole'))
        assert parts.dtype == one.dtype and np.abs(parts.astype(int) - one).max() <= levels, name


@pytest.mark.long
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is looked up in /proc')
def test_memory_of_ten_thousand_pairs(tmp_path):
    "The command takes no more than for 500, but for 32 MiB: names, and what is known of each result. (The slices would be 320 MB.)"
    memory = {}
    for number in (500, 10_000):
        root = write_slices(tmp_path / str(number), number, size=64)
        process = subprocess.Popen([sys.executable, '-m', 'medfusion', 'fuse', 'CT', 'MRI', '-o', 'out', '-m', 'maximum'], cwd=root, stdout=subprocess.DEVNULL)
        memory[number] = peak_memory(process)
        assert process.returncode == 0 and len(names_in(root / 'out')) == number
    assert memory[10_000] - memory[500] < 32, memory


@pytest.mark.parametrize('how', ['system', 'disk'])
def test_where_there_are_no_locks_the_threads_of_a_run_lose_no_line_of_the_record(folders, monkeypatch, how):
    "Two of them wrote at one place of fused.jsonl, and of a disk a warning told with every pair."
    cut = files.cut_torn_line
    monkeypatch.setattr(files, 'cut_torn_line', lambda file: (cut(file), time.sleep(.02))[0])
    if how == 'system':
        monkeypatch.setitem(sys.modules, 'fcntl', None)      # as on Windows
    else:
        import fcntl

        def fails(file, kind):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        files._without_locks.cache_clear()
        monkeypatch.setattr(fcntl, 'flock', fails)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always', UserWarning)         # as in the shell
        assert run(folders).ok
    assert len([one for one in told if 'has no locks' in str(one.message)]) == (how == 'disk')
    assert len((folders / 'out/fused.jsonl').read_text().splitlines()) == 1 + len(names_in(folders / 'out'))


@pytest.mark.parametrize('shard', ['0/4', '5/4', '3', 'a/b', '1/0', '-1/4'])
def test_what_is_no_shard(folders, shard):
    with pytest.raises(ValueError, match='is no shard; write 3/16'):
        run(folders, shard=shard)
    assert not (folders / 'out').exists()


@pytest.mark.fault('fuse', 'several at once')
def test_two_runs_at_once_into_one_folder(folders):
    "The same pairs, or other pairs: both are right, and the record knows every result."
    for side in ('CT', 'MRI'):
        (folders / f'more{side}').mkdir()
        for name in names_in(folders / side):
            write_image(folders / f'more{side}' / f'6{name}', read_image(folders / side / name))
    for report in at_once(lambda: run(folders), lambda: run(folders), lambda: run(folders, ct='moreCT', mri='moreMRI')):
        assert report.ok, report
    assert_right(folders, names_in(folders / 'CT'))
    assert_right(folders, names_in(folders / 'moreCT'), ct='moreCT', mri='moreMRI')
    assert len(run(folders).skipped) == len(run(folders, ct='moreCT', mri='moreMRI').skipped) == 6


@pytest.mark.fault('fuse', 'several at once')
def test_two_runs_at_once_with_the_same_names_from_other_slices(folders, monkeypatch):
    "One result stands there in the end; whoever's result does not is told so."
    names = names_in(folders / 'CT')
    slow = lambda *given, write=inference.write_atomically: (time.sleep(0.01), write(*given))
    monkeypatch.setattr(inference, 'write_atomically', slow)
    shutil.copytree(folders / 'MRI', folders / 'copy')
    one, other = at_once(lambda: run(folders, batch_size=1), lambda: run(folders, ct='MRI', mri='copy', batch_size=1))
    for name in names:
        found = read_image(folders / 'out' / name).astype(int)
        for report, sides in ((one, {}), (other, {'ct': 'MRI'})):
            is_its = found.shape == expected(folders, name, **sides).shape and np.abs(found - expected(folders, name, **sides)).max() <= 1
            assert is_its or name in report.failed or name not in report.fused, (name, report)
    assert len(one.failed) + len(other.failed) > 0


@pytest.mark.fault('fuse', 'several at once')
def test_two_networks_at_once(folders):
    "Only one of them owns the folder; the other is refused before it writes anything."
    results = at_once(lambda: run(folders), lambda: run(folders, minimum))
    refused = [result for result in results if isinstance(result, ValueError)]
    assert len(refused) == 1 and 'name another folder' in str(refused[0])
    assert_right(folders, names_in(folders / 'CT'), minimum if isinstance(results[0], ValueError) else 'maximum')


def test_records_that_are_damaged_or_none(folders):
    names, record = names_in(folders / 'CT'), folders / 'out' / 'fused.jsonl'
    run(folders)
    whole = record.read_text()
    record.write_text('{"file": "50\n7\n[]\n{"file": 3}\n' + whole + '{"file": "5000.png", "ct"')     # torn, and torn at its end
    assert run(folders).skipped == names
    for foreign in ('holiday\n', '[1, 2]\n', '{}\n'):
        record.write_text(foreign)
        with pytest.raises(ValueError, match='fused.jsonl is not a record'):
            run(folders)
    record.unlink()
    assert sorted(run(folders).failed) == names                               # unknown results are somebody's


class Counted(io.FileIO):
    "A file of which the bytes that are read are counted."
    calls = []

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.calls.append(('read by a run', count))
        return count


class CountingOs:
    "`os` as medfusion.files sees it; counts its calls, and the bytes of those that read and write."

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        def call(*given):
            answer = real(*given)
            self.calls.append((name, answer) if name in ('read', 'write') else name)
            return answer
        real = getattr(os, name)
        return call if name in ('open', 'read', 'write', 'lseek', 'fsync', 'ftruncate', 'replace', 'unlink', 'close') else real


def test_a_result_costs_a_line_however_many_there_are(folders, monkeypatch):
    "A folder of a hundred thousand pairs: the system calls, and their bytes, of one more result are those beside twenty; going on reads the record once."
    name, record = names_in(folders / 'CT')[0], folders / 'out/fused.jsonl'
    run(folders)
    begun, line = record.read_text(), json.dumps({'file': '5000.png', 'ct': 64 * '0', 'mri': 64 * '0', 'network': 64 * '0', 'sha256': 64 * '0'})
    pairs, costs = [pair for pair in list_pairs(folders / 'CT', folders / 'MRI') if pair.name == name], {}
    monkeypatch.setattr(inference, 'open', lambda path, mode: io.BufferedReader(Counted(path)), raising=False)
    for lines in (20, 10_000):
        record.write_text(begun + (line + '\n') * lines)
        (folders / 'out' / name).unlink()
        Counted.calls = calls = []
        job = inference.open_job('maximum', inference.model_of('maximum'), folders / 'out', (folders / 'CT', folders / 'MRI'))
        assert sum(count for _, count in calls) == record.stat().st_size
        with monkeypatch.context() as counted:
            counted.setattr('medfusion.files.os', CountingOs(calls))
            del calls[:]
            inference.run_job(job, pairs, 1, 1, False)
        costs[lines] = list(calls)
        assert job.report.fused == [name] and record.read_text().count('\n') == begun.count('\n') + lines + 1
        assert run(folders).skipped == names_in(folders / 'CT')
    written = [call[1] for call in costs[20] if call[0] == 'write']
    assert costs[20] == costs[10_000] and written == [len(line) + 1, (folders / 'out' / name).stat().st_size]


def test_a_bomb_among_the_files_stops_its_own_pair_only(folders):
    import zlib
    names = names_in(folders / 'CT')

    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    header = (60000).to_bytes(4, 'big') * 2 + bytes([8, 0, 0, 0, 0])
    bomb = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(10 ** 6))) + chunk(b'IEND', b'')
    (folders / 'CT' / names[0]).write_bytes(bomb)
    report = run(folders)
    assert list(report.failed) == names[:1] and names[0] in report.failed[names[0]] and report.fused == names[1:]


def test_files_that_are_no_slices_stop_nothing(folders):
    for side in ('CT', 'MRI'):
        (folders / side / 'Thumbs.db').write_bytes(b'x')
        (folders / side / '._5000.png').write_bytes(b'x')
        (folders / side / 'notes').mkdir()
    assert run(folders).ok


def test_a_network_that_fails_on_one_slice_fails_on_that_one_only(folders):
    names = names_in(folders / 'CT')
    write_image(folders / 'CT' / names[1], np.zeros((48, 64), np.uint8))
    picky = lambda ct, mri: ct / ct.amax((2, 3), keepdim=True)
    report = run(folders, picky)
    assert list(report.failed) == names[1:2] and 'NaN' in report.failed[names[1]] and len(report.fused) == 5


def test_twelve_bits_in_sixteen_are_said_once(folders):
    for name in names_in(folders / 'CT'):
        write_image(folders / 'CT' / name, (to_depth(read_image(folders / 'CT' / name) / 65535, np.uint16) // 16))
    with pytest.warns(UserWarning, match='CT: the largest value .* --range') as said:
        run(folders)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run(folders, replace=True, value_range=(0, 4095)).ok
    assert read_image(folders / 'out' / names_in(folders / 'out')[0]).dtype == np.uint16


@pytest.mark.parametrize('options', [{'batch_size': 0}, {'batch_size': -1}, {'batch_size': 2.5}, {'workers': 0}])
def test_batches_of_nothing(folders, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        run(folders, **options)
    assert not (folders / 'out').exists()


@pytest.mark.parametrize('out, suffixes', [
    ('CT', ()), ('CT/../CT', ()), ('linked', ()), ('', ()), (' ', ()), ('file.txt', ()), ('CT/5000.png', ('.png',)),
    ('link.png', ('.png',)), ('hard.png', ('.png',)), ('table.png', ('.csv',)), ('pipe.csv', ('.csv',)), ('gone.csv', ('.csv',)),
    ('CT', ('.png',)), ('/dev/null', ('.csv',)), ('folder.csv', ('.csv',))])
def test_outputs_that_would_destroy(folders, out, suffixes, monkeypatch):
    monkeypatch.chdir(folders)
    Path('linked').symlink_to('CT')
    Path('link.png').symlink_to('CT/5001.png')
    Path('hard.png').hardlink_to('MRI/5001.png')
    Path('gone.csv').symlink_to('nowhere/x.csv')
    Path('file.txt').write_text('')
    Path('folder.csv').mkdir()
    os.mkfifo('pipe.csv')
    with pytest.raises((ValueError, FileExistsError)):
        check_output(out, ['CT', Path('MRI')], suffixes)
    assert check_output('table.csv', ['CT', 'MRI'], ('.csv',)) == Path('table.csv')


def test_folders_that_cannot_be_used(folders, network):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        fuse_folder(folders / 'nowhere', folders / 'MRI', folders / 'out', network)
    (folders / 'empty').mkdir()
    with pytest.raises(ValueError, match='holds no slice'):
        fuse_folder(folders / 'CT', folders / 'empty', folders / 'out', network)
    with pytest.raises(ValueError, match='the slices themselves'):
        fuse_folder(folders / 'CT', folders / 'MRI', folders / 'CT', network)
    (folders / 'file').write_text('')
    with pytest.raises(FileExistsError, match='is no folder'):
        fuse_folder(folders / 'CT', folders / 'MRI', folders / 'file', network)


def test_names_that_would_share_a_file(folders):
    for side in ('CT', 'MRI'):
        write_image(folders / side / '5001.bmp', np.zeros((20, 20), np.uint8))
    report = run(folders)
    assert sorted(report.failed) == ['5001.bmp', '5001.png'] and 'are the same slice' in report.failed['5001.png']


def test_colour_folder(folders):
    names = names_in(folders / 'MRI')
    colour = np.zeros((40, 40, 3), np.uint8)
    colour[8:30, 8:30] = 200, 90, 10
    write_image(folders / 'MRI' / names[0], colour)
    report = run(folders)
    assert report.ok and read_image(folders / 'out' / names[0], color=True).shape == (40, 40, 3)
    assert read_image(folders / 'out' / names[2]).dtype == np.uint16


def test_colours_in_the_wrong_folder_are_refused(folders):
    name = names_in(folders / 'CT')[0]
    colour = np.zeros((*read_image(folders / 'CT' / name).shape, 3), np.uint8)
    colour[8:30, 8:30] = 200, 90, 10
    write_image(folders / 'CT' / name, colour)
    report = run(folders)
    assert list(report.failed) == [name] and 'in the other order' in report.failed[name]
    assert not (folders / 'out' / name).exists()


@pytest.mark.fault('fuse', 'disk full, or failing', points=6)
def test_a_full_disk_fails_the_pair_and_leaves_nothing(folders):
    "A limit on the size of files stands for the full disk; it holds for root too."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        report = run(folders)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(report.failed) == 6 and all('out' in reason for reason in report.failed.values())
    assert not names_in(folders / 'out') and not list((folders / 'out').glob('.*'))
    assert run(folders).fused == names_in(folders / 'CT')                     # with room again
