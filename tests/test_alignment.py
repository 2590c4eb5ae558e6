"""What 22_alignment.ipynb does not show: sizes, depths, silence where nothing can be said, and what fuse and its folders say."""
import warnings

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from medfusion import alignment
from medfusion.alignment import Displacement, estimate_shift, out_of_register, register_sentence
from medfusion.cli import app
from medfusion.files import to_depth, write_image
from medfusion.inference import fuse, fuse_folder
from medfusion.phantom import phantom_slice


@pytest.fixture(scope='module')
def head():
    return phantom_slice(2, 4)


@pytest.mark.parametrize('size', [128, (200, 256), 512])
@pytest.mark.parametrize('down, right', [(0, 0), (7, 0), (-5, 5), (0, -11)])
def test_shifts_are_estimated_in_pixels_of_the_slice(size, down, right):
    cut = phantom_slice(1, 4, size=size)
    pixel = max(cut.ct.shape) / 256
    move = round(down * pixel), round(right * pixel)
    found = estimate_shift(cut.ct, np.roll(cut.mri, move, (0, 1)))
    assert np.hypot(found.down - move[0], found.right - move[1]) < 1.5 * pixel
    assert bool(out_of_register(cut.ct, np.roll(cut.mri, move, (0, 1)))) == (move != (0, 0))


def test_the_range_of_values_does_not_matter(head):
    moved = np.roll(head.mri, 6, 1)
    for gain in (1, .1, 255):
        assert np.isclose(estimate_shift(head.ct * gain, moved * gain).right, 6, atol=1)


@pytest.mark.parametrize('ct, mri', [(np.zeros((256, 256)), np.ones((256, 256))), (np.eye(100), np.eye(100)), (np.eye(16), np.eye(16)),
                                     (np.eye(300, 17), np.eye(300, 17))])
def test_nothing_is_said_of_empty_and_small_slices(ct, mri):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert estimate_shift(ct.astype(np.float32), mri.astype(np.float32)) is None


def test_noise_is_no_alarm():
    noise = np.random.default_rng(0).random((2, 256, 256), dtype=np.float32)
    assert out_of_register(*noise) is None


@pytest.mark.parametrize('gain, told', [(.007, (False, False)), (.015, (True, False)), (.03, (True, True))])
def test_where_the_head_is_cut_off_more_is_asked_for(head, monkeypatch, gain, told):
    monkeypatch.setattr(alignment, 'estimate_shift', lambda ct, mri: Displacement(5., 0., gain))
    part = np.s_[64:192, 64:192]
    assert (bool(out_of_register(head.ct, head.mri)), bool(out_of_register(head.ct[part], head.mri[part]))) == told


def test_sentences():
    shift = Displacement(2.8, -4.2, .1)
    assert str(shift) == '5 pixels (4 left, 3 down)' and str(Displacement(.2, 7, .1)) == '7 pixels (7 right)'
    assert 'against the CT: a.png by 5 pixels' in register_sentence({'a.png': shift}, 1)
    many = register_sentence({f'{number}.png': shift for number in range(9)}, 40)
    assert many.startswith('9 of 40 pairs') and '2.png by' in many and '3.png' not in many and 'and 6 more' in many


def test_fuse_warns_and_fuses_all_the_same(head):
    moved = np.roll(head.mri, 8, 1)
    with pytest.warns(UserWarning, match=r'displaced against the CT: MRI by 8 pixels \(8 right\); register'):
        assert np.array_equal(fuse(head.ct, moved, 'maximum'), np.maximum(head.ct, moved))
    batch = [torch.from_numpy(np.stack(images))[:, None] for images in ([head.ct, head.ct], [head.mri, moved])]
    with pytest.warns(UserWarning, match='1 of 2 pairs .* displaced: MRI 1 by 8'):
        fuse(*batch, 'maximum')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fuse(head.ct, head.mri, 'maximum')
        fuse(head.ct, np.stack([moved] * 3, 2), 'maximum')      # colour is not judged


def test_folders_have_one_sentence(head, tmp_path, monkeypatch):
    for kind in ('CT', 'MRI'):
        (tmp_path / kind).mkdir()
    for name, move in (('1001.png', 0), ('1002.png', 9), ('1003.png', -9)):
        write_image(tmp_path / 'CT' / name, to_depth(head.ct, np.uint8))
        write_image(tmp_path / 'MRI' / name, np.roll(to_depth(head.mri, np.uint8), move, 0))
    with pytest.warns(UserWarning, match='2 of 3 pairs .*1002.png by 9 pixels .9 down., 1003.png by 9 pixels .9 up.;') as said:
        assert fuse_folder(tmp_path / 'CT', tmp_path / 'MRI', tmp_path / 'out', 'maximum', progress=False).ok
    assert len(said) == 1
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ['fuse', 'CT/1002.png', 'MRI/1002.png', '-o', 'one.png', '-m', 'maximum'])
    assert result.exit_code == 0 and 'medfusion: The MRI seems to be displaced against the CT: 1002.png by 9 pixels' in result.stderr
