"""What the inference notebook cannot show on a page: every kind of input, tiles against the whole, faults in a folder."""
import json
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from medfusion import inference
from medfusion.files import read_image, to_depth, write_image
from medfusion.inference import fuse, fuse_folder, load_model, receptive_radius, shipped_models
from medfusion.phantom import phantom_slice
from medfusion.files import sha256_of
from medfusion.runs import save_checkpoint


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


@pytest.fixture(scope='module')
def network():
    return Strided().eval()


@pytest.fixture(scope='module')
def pair():
    return small_pair(4, 72, 91)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    "A folder of checkpoints with an untrained wavelet network in it, as a clone would hold it."
    from medfusion.wavelet_fusion import WaveletFusion
    folder = tmp_path / 'checkpoints' / 'final' / 'trainable_wavelet_fusion'
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = WaveletFusion()
    path = folder / 'wavelet_fusion_spatial_best.pt'
    save_checkpoint(path, method='trainable_wavelet_fusion', config=model.config, state_dict=model.state_dict(),
                    epoch=1, metrics={})
    (folder / 'metadata.json').write_text(json.dumps({'sha256': sha256_of(path), 'shipped': True}))
    monkeypatch.setenv('MEDFUSION_CHECKPOINTS', str(tmp_path / 'checkpoints'))
    return path


# Loading

def test_shipped_model_loads_silently(shipped):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        model = load_model('wavelet', device='cpu')
    assert not model.training and next(model.parameters()).device.type == 'cpu'
    assert shipped_models()['wavelet'].path == shipped


def test_folder_that_holds_checkpoints_is_understood_too(shipped, monkeypatch):
    monkeypatch.setenv('MEDFUSION_CHECKPOINTS', str(shipped.parents[3]))
    assert shipped_models()['wavelet'].path == shipped


def test_other_file_under_a_shipped_name_is_said(shipped):
    metadata = shipped.parent / 'metadata.json'
    metadata.write_text(json.dumps({'sha256': '0' * 64, 'shipped': True}))
    with pytest.warns(UserWarning, match='not the shipped checkpoint'):
        load_model('wavelet')
    for record in ({'shipped': False}, {}):   # a training run of one's own, and a record that does not say
        metadata.write_text(json.dumps({'sha256': sha256_of(shipped), **record}))
        with pytest.warns(UserWarning, match='not the shipped checkpoint'):
            load_model('wavelet')
    metadata.unlink()
    with pytest.warns(UserWarning, match='not the shipped checkpoint'):
        load_model('wavelet')


def test_path_of_a_checkpoint(shipped, tmp_path):
    copy = tmp_path / 'mine.pt'
    copy.write_bytes(shipped.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        by_path, by_name = load_model(copy), load_model('wavelet')
    assert all(torch.equal(a, b) for a, b in zip(by_path.state_dict().values(), by_name.state_dict().values()))


def test_a_path_is_compared_with_what_is_recorded_of_it(shipped):
    metadata = shipped.parent / 'metadata.json'
    own = {'checkpoint': shipped.name, 'sha256': sha256_of(shipped), 'shipped': False}
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for record in (own, {**own, 'checkpoint': 'other.pt', 'sha256': '0' * 64}):
            metadata.write_text(json.dumps(record))
            load_model(shipped)
    metadata.write_text(json.dumps({**own, 'sha256': '0' * 64}))
    with pytest.warns(UserWarning, match='not the shipped checkpoint'):
        load_model(shipped)


def test_new_file_under_the_same_name_is_noticed(shipped, pair):
    before = fuse(*pair)
    checkpoint = torch.load(shipped, weights_only=True)
    changed = {name: 3 * tensor + 0.1 for name, tensor in checkpoint['state_dict'].items()}
    save_checkpoint(shipped, method=checkpoint['method'], config=checkpoint['config'], state_dict=changed, epoch=2, metrics={})
    with pytest.warns(UserWarning, match='not the shipped checkpoint'):
        after = fuse(*pair)
    assert not np.array_equal(before, after)


@pytest.mark.parametrize('name, reason', [('wavlet', "neither 'wavelet' nor 'resnet'"), ('resnet', 'has no checkpoint at')])
def test_model_that_is_not_there(shipped, name, reason):
    with pytest.raises(FileNotFoundError, match=reason):
        load_model(name)


def test_foreign_and_unknown_checkpoints(shipped, tmp_path):
    (tmp_path / 'text.pt').write_text('no checkpoint')
    with pytest.raises(ValueError, match='text.pt'):
        load_model(tmp_path / 'text.pt')
    save_checkpoint(tmp_path / 'other.pt', method='magic', config={}, state_dict={}, epoch=1, metrics={})
    with pytest.raises(ValueError, match="method 'magic'"):
        load_model(tmp_path / 'other.pt')


def test_outside_a_clone_there_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv('MEDFUSION_CHECKPOINTS', raising=False)

    def no_clone():
        raise FileNotFoundError('no clone')
    monkeypatch.setattr(inference, 'nbs_dir', no_clone)
    with pytest.raises(FileNotFoundError, match='MEDFUSION_CHECKPOINTS'):
        load_model('wavelet')
    monkeypatch.setenv('MEDFUSION_CHECKPOINTS', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='holds no folder final'):
        load_model('wavelet')


def test_unknown_device(shipped):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='sees no GPU'):
            load_model('wavelet', device='cuda')
    with pytest.raises(ValueError, match='no device'):
        load_model('wavelet', device='warp')


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


@pytest.mark.parametrize('mode', ['L', 'I;16', 'I', 'F', 'RGB', 'RGBA', 'P', '1', 'LA'])
def test_pil_images(pair, mode):
    ct8 = to_depth(pair[0], np.uint8)
    if mode in ('I;16', 'I'):
        ct = Image.fromarray(to_depth(pair[0], np.uint16))
        ct = ct.convert('I') if mode == 'I' else ct
    else:
        ct = Image.fromarray(pair[0]) if mode == 'F' else Image.fromarray(ct8).convert(mode)
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
def test_any_size_from_16(shipped, size):
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
    (torch.zeros(2, 32, 32), torch.zeros(2, 32, 32), 'no slice'),
    (torch.zeros(2, 1, 32, 32), torch.zeros(3, 1, 32, 32), '2 CT slices and 3 MRI'),
    ([[0.0]], np.zeros((32, 32)), 'type list'),
])
def test_what_cannot_be_fused_is_a_sentence(ct, mri, reason):
    with pytest.raises(ValueError, match=reason):
        fuse(ct, mri, maximum)


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


# Tiles

@pytest.mark.parametrize('size', [(300, 200), (257, 130), (64, 321)])
def test_tiles_equal_the_whole(network, size):
    assert 0 < receptive_radius(network) <= 64
    ct, mri = torch.rand(2, 1, *size)
    assert (fuse(ct, mri, network, tile=64) - fuse(ct, mri, network)).abs().max() < 1e-5


def test_tiles_of_the_wavelet_network(shipped):
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

@pytest.fixture
def folders(tmp_path):
    "Six pairs of two sizes and depths."
    for folder in ('CT', 'MRI'):
        (tmp_path / folder).mkdir()
    for i in range(6):
        ct, mri = small_pair(i, *((48, 64) if i % 2 else (40, 40)))
        write_image(tmp_path / 'CT' / f'5{i:03d}.png', to_depth(ct, np.uint16 if i == 2 else np.uint8))
        write_image(tmp_path / 'MRI' / f'5{i:03d}.png', to_depth(mri, np.uint8))
    return tmp_path


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


def test_what_is_done_is_skipped(folders, network):
    fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', network, progress=False)
    names = names_in(folders / 'out')
    (folders / 'out' / names[0]).unlink()
    (folders / 'out' / names[1]).write_bytes(b'mine')
    report = fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', network, progress=False)
    assert report.fused == names[:1] and report.skipped == names[1:]
    assert (folders / 'out' / names[1]).read_bytes() == b'mine'
    assert fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', network, replace=True, progress=False).fused


def test_a_folder_belongs_to_one_network(folders, network):
    fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', maximum, progress=False)
    with pytest.raises(ValueError, match='another network'):
        fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', network, progress=False)
    assert fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', network, replace=True, progress=False).ok


def test_folders_that_cannot_be_used(folders, network):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        fuse_folder(folders / 'nowhere', folders / 'MRI', folders / 'out', network)
    (folders / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='no MRI slices'):
        fuse_folder(folders / 'CT', folders / 'empty', folders / 'out', network)
    with pytest.raises(ValueError, match='the slices themselves'):
        fuse_folder(folders / 'CT', folders / 'MRI', folders / 'CT', network)
    (folders / 'file').write_text('')
    with pytest.raises(FileExistsError, match='is a file'):
        fuse_folder(folders / 'CT', folders / 'MRI', folders / 'file', network)


def test_names_that_would_share_a_file(folders, network):
    for side in ('CT', 'MRI'):
        write_image(folders / side / '5001.bmp', np.zeros((20, 20), np.uint8))
    report = fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', network, progress=False)
    assert list(report.failed) == ['5001.png'] and 'same file' in report.failed['5001.png']


def test_colour_folder(folders):
    names = names_in(folders / 'MRI')
    colour = np.zeros((40, 40, 3), np.uint8)
    colour[8:30, 8:30] = 200, 90, 10
    write_image(folders / 'MRI' / names[0], colour)
    report = fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', maximum, progress=False)
    assert report.ok and read_image(folders / 'out' / names[0], color=True).shape == (40, 40, 3)
    assert read_image(folders / 'out' / names[2]).dtype == np.uint16


def test_colours_in_the_wrong_folder_are_refused(folders):
    name = names_in(folders / 'CT')[0]
    colour = np.zeros((*read_image(folders / 'CT' / name).shape, 3), np.uint8)
    colour[8:30, 8:30] = 200, 90, 10
    write_image(folders / 'CT' / name, colour)
    report = fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', maximum, progress=False)
    assert list(report.failed) == [name] and 'in the other order' in report.failed[name]
    assert not (folders / 'out' / name).exists()


def test_a_full_disk_fails_the_pair_and_leaves_nothing(folders):
    "A limit on the size of files stands for the full disk; it holds for root too."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        report = fuse_folder(folders / 'CT', folders / 'MRI', folders / 'out', maximum, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(report.failed) == 6 and all('out' in reason for reason in report.failed.values())
    assert list((folders / 'out').iterdir()) == [folders / 'out' / 'fused_with.json']


# Real colour slices

def test_spect_keeps_its_hue():
    root = Path(__file__).resolve().parents[2] / 'shared' / 'harvard_color' / 'SPECT-MRI'
    if not root.is_dir():
        pytest.skip(f'{root} is not here: the colour slices are not part of the repository')
    name = sorted(path.name for path in (root / 'MRI').iterdir())[0]
    mri, spect = read_image(root / 'MRI' / name), read_image(root / 'SPECT' / name, color=True)
    fused = fuse(mri, root / 'SPECT' / name, lambda ct, other: 0.5 * (ct + other)).astype(float)
    inside = (fused > 0).all(2) & (fused < 255).all(2)
    for a, b in ((0, 2), (1, 2)):                              # chroma: differences of the channels
        kept = (fused[..., a] - fused[..., b]) - (spect[..., a].astype(float) - spect[..., b])
        assert inside.any() and np.abs(kept[inside]).max() <= 1
