"""Figures: every kind of slice by the range of its type, odd sizes, bad input, and what is really drawn."""
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from medfusion.figures import (Box, as_picture, blend, checkerboard, difference, difference_figure, framed,
                               inset, largest_disagreement, map_overlay, maps_figure, mosaic, overlay, panel,
                               training_curves, window_level)
from medfusion.files import write_image

SHAPES = [(16, 16), (33, 20)]


def random_slices(shape, count=3, seed=0):
    return list(np.random.default_rng(seed).random((count, *shape), np.float32))


def drawn(figure):
    "The pictures in the axes of a figure, by title."
    return {axis.get_title(): axis.images[0].get_array() for axis in figure.axes if axis.images}


KINDS = ['u1', '<u2', '>u2', '<f4', '>f4', '<f8', '>f8', '<f2', '?']


@pytest.mark.parametrize('kind', KINDS)
def test_an_array_of_every_kind_is_scaled_by_its_type(kind):
    kind = np.dtype(kind)
    image = np.array([[0, 1], [1, 0]]) * (np.iinfo(kind).max if kind.kind == 'u' else 1)
    picture = as_picture(image.astype(kind))
    assert picture.dtype == np.float32 and picture.dtype.isnative and np.array_equal(picture, [[0, 1], [1, 0]])


@pytest.mark.parametrize('kind', [torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_tensor_of_every_kind_is_scaled_by_its_type(kind):
    image = (torch.tensor([[0, 1], [1, 0]]) * (255 if kind == torch.uint8 else 1)).to(kind)[None, None]
    picture = as_picture(image.requires_grad_(kind.is_floating_point))
    assert picture.dtype == np.float32 and np.array_equal(picture, [[0, 1], [1, 0]])


@pytest.mark.parametrize('colour', [False, True])
@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_a_file_an_array_a_tensor_and_a_pil_image_are_one_picture(tmp_path, kind, colour):
    pixels = (np.random.default_rng(0).random((20, 24, 3) if colour else (20, 24)) * np.iinfo(kind).max).astype(kind)
    path = tmp_path / 'slice.png'
    write_image(path, pixels)
    floats = torch.from_numpy(pixels.astype(np.float32) / np.iinfo(kind).max)
    ways = [path, str(path), pixels, floats.permute(2, 0, 1)[None] if colour else floats[None, None]]
    if kind == np.uint8:  # PIL has no colours of 16 bits
        ways.append(Image.fromarray(pixels))
    pictures = [as_picture(way) for way in ways]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures) and pictures[0].shape == pixels.shape
    whole = panel(path, path, path)
    assert all(np.array_equal(image, pictures[0]) for image in drawn(whole).values())


def test_a_palette_is_resolved():
    image = Image.fromarray(np.full((16, 16, 3), (255, 128, 0), np.uint8)).quantize(4)
    assert np.allclose(as_picture(image), [1, 128 / 255, 0], atol=.02)


@pytest.mark.parametrize('shape', [(5,), (2, 16, 16), (16, 16, 4), (2, 1, 16, 16), (2, 16, 16, 3)])
def test_what_is_not_one_slice_is_refused(shape):
    with pytest.raises(ValueError, match='One slice is wanted'):
        as_picture(np.zeros(shape))


@pytest.mark.parametrize('kind', [np.int16, np.uint32, np.int64])
def test_numbers_without_a_range_are_refused(kind):
    with pytest.raises(ValueError, match='window'):
        mosaic({'CT': np.zeros((16, 16), kind)})


def test_mosaic_draws_grey_and_colour_of_8_bits_in_one_scale():
    grey = np.full((16, 16), 51, np.uint8)
    pictures = drawn(mosaic({'grey': grey, 'colour': grey[..., None].repeat(3, axis=2), 'too bright': np.full((8, 8), 7.)}))
    assert np.allclose(pictures['grey'], .2) and np.allclose(pictures['colour'], .2) and (pictures['too bright'] == 1).all()
    with pytest.raises(ValueError, match='nothing to show'):
        mosaic({})


@pytest.mark.parametrize('shape', SHAPES)
def test_arrays_keep_the_shape(shape):
    ct, mri, fused = random_slices(shape)
    for grey in (window_level(ct, 0.5, 0.3), checkerboard(ct, mri, 5), blend(ct, mri, 0.2)):
        assert grey.shape == shape and 0 <= grey.min() and grey.max() <= 1
    for colour in (overlay(ct, mri), difference(fused, ct), map_overlay(ct, mri[::2, ::2])):
        assert colour.shape == (*shape, 3) and 0 <= colour.min() and colour.max() <= 1


@pytest.mark.parametrize('shape', SHAPES)
def test_figures_are_drawn_for_any_shape(shape):
    ct, mri, fused = (torch.from_numpy(image)[None, None] for image in random_slices(shape))
    two = {'a': fused, 'b': ct}
    figures = [panel(ct, mri, fused), panel(ct, mri, two, window=0.3), inset(ct, mri, two),
               inset(ct, mri, fused, size=8), maps_figure(ct, mri, {'one': ct[..., ::2, ::2]}),
               difference_figure(ct, mri, two), mosaic({'rgb': overlay(ct, mri)})]
    for figure in figures:
        assert isinstance(figure, Figure) and all(np.ptp(image) > 0 for image in drawn(figure).values())
        figure.canvas.draw()


@pytest.mark.parametrize('names, words', [(['LL'], 'from the CT'), (['ct', 'mri'], "in 'mri' 1: from the MRI")])
def test_the_colour_bar_of_maps_says_what_its_ends_mean(names, words):
    ct, mri, weights = random_slices((16, 16))
    assert words in maps_figure(ct, mri, dict.fromkeys(names, weights)).axes[-1].get_ylabel()


def test_the_frame_of_an_inset_is_seen_on_white_and_on_black():
    for image in (np.zeros((64, 64)), np.ones((64, 64))):
        frame = framed(image, Box(8, 8, 16, 16))[8, 8]
        assert np.abs(frame - image[0, 0]).max() > .9 and np.ptp(frame) > .9  # another colour than any grey


def test_a_box_can_be_named():
    ct, mri, fused = random_slices((64, 64))
    assert np.array_equal(drawn(inset(ct, mri, fused, box=Box(3, 5, 8, 9)))['CT, magnified'], ct[3:11, 5:14])


def test_figures_do_not_pile_up():
    import matplotlib.pyplot as plt
    plt.close('all')  # those of other tests
    panel(*random_slices((16, 16)))
    assert plt.get_fignums() == []


@pytest.mark.parametrize('make', [overlay, checkerboard, blend, difference, lambda a, b: panel(a, b, a),
                                  lambda a, b: inset(a, b, a), lambda a, b: largest_disagreement([a, b])])
def test_slices_of_two_sizes_are_refused(make):
    with pytest.raises(ValueError, match=r'\(16, 16\), \(16, 17\).*register'):
        make(np.zeros((16, 16)), np.zeros((16, 17)))


def test_checkerboard_alternates():
    board = checkerboard(np.zeros((4, 6)), np.ones((4, 6)), tile=2)
    assert np.array_equal(board[::2, ::2], [[0, 1, 0], [1, 0, 1]])


@pytest.mark.parametrize('call, words', [(lambda x: window_level(x, window=0), 'above zero'),
                                         (lambda x: checkerboard(x, x, 0), 'one pixel'),
                                         (lambda x: blend(x, x, 1.5), 'alpha'),
                                         (lambda x: difference(x, x, span=0), 'above zero')])
def test_impossible_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.zeros((16, 16)))


def test_difference_has_a_sign_and_a_fixed_scale():
    zero = np.zeros((16, 16), np.float32)
    above, below = difference(zero + 0.2, zero)[0, 0], difference(zero, zero + 0.2)[0, 0]
    assert above[0] > above[2] and below[2] > below[0]  # red and blue
    assert np.array_equal(difference(zero + 0.1, zero, span=0.25), difference(zero + 0.2, zero, span=0.5))
    assert np.array_equal(difference(zero + 0.9, zero), difference(zero + 0.5, zero))  # clipped at the span


@pytest.mark.parametrize('top, left', [(0, 0), (20, 3), (56, 56), (0, 56)])
def test_largest_disagreement_is_found(top, left):
    image = np.zeros((64, 64), np.float32)
    image[top:top + 8, left:left + 8] = 1
    assert largest_disagreement([image, 0 * image], size=8) == Box(top, left, 8, 8)


def test_largest_disagreement_fits_small_slices():
    assert largest_disagreement(random_slices((16, 20)), size=48) == Box(0, 0, 16, 20)


def test_training_curves_with_gaps_and_without_validation():
    history = [{'epoch': e, 'train_loss': 1.0, 'val_loss': float('nan') if e % 2 else 1.0, 'train_ssim': 0.5, 'lr': 0.1}
               for e in range(1, 5)]
    assert [axis.get_title() for axis in training_curves(history).axes] == ['loss', 'ssim']
    assert len(training_curves([{'epoch': 1, 'train_loss': 1.0}]).axes[0].lines) == 1
