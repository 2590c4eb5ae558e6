"""Figures: every kind of slice by the range of its type, odd sizes, bad input, and what is really drawn."""
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from medfusion.figures import (Box, as_picture, blend, checkerboard, chosen_boxes, comparison, difference, difference_figure,
                               largest_disagreement, map_overlay, maps_figure, mosaic, overlay, palette, panel, save_figure,
                               training_curves, window_level)
from medfusion.files import luminance, write_image

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


def test_an_image_of_pil_lies_as_its_file_does(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.arange(24 * 40, dtype=np.uint16).reshape(24, 40).astype(np.uint8)).save(tmp_path / 'a.jpg', exif=exif)
    with Image.open(tmp_path / 'a.jpg') as image:
        assert as_picture(image).shape == (40, 24) and np.array_equal(as_picture(image), as_picture(tmp_path / 'a.jpg'))


def test_an_image_of_pil_is_what_fuse_takes_it_for(tmp_path):
    red = Image.new('RGB', (24, 20), (255, 0, 0))
    for mode in ('YCbCr', 'HSV', 'CMYK', 'P', 'RGBA'):
        assert np.abs(as_picture(red.convert(mode)) - (1, 0, 0)).max() < 0.01, mode
    assert np.array_equal(as_picture(Image.new('I', (24, 20), 65535)), np.ones((20, 24))) and as_picture(Image.new('LA', (24, 20))).ndim == 2
    red.save(tmp_path / 'a.tif', save_all=True, append_images=[red])
    with Image.open(tmp_path / 'a.tif') as stack, pytest.raises(ValueError, match='2 pages'):
        as_picture(stack)


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
    figures = [panel(ct, mri, fused), panel(ct, mri, two, window=0.3), comparison({'CT': ct, 'MRI': mri} | two, size=8),
               comparison({'CT': ct, 'MRI': mri, 'c': fused}, size=8), maps_figure(ct, mri, {'one': ct[..., ::2, ::2]}),
               difference_figure({'CT': ct, 'MRI': mri} | two), mosaic({'rgb': overlay(ct, mri)})]
    for figure in figures:
        assert isinstance(figure, Figure) and all(np.ptp(image) > 0 for image in drawn(figure).values())
        figure.canvas.draw()


@pytest.mark.parametrize('names, words', [(['LL'], 'from the CT'), (['ct', 'mri'], "in 'mri' 1: from the MRI")])
def test_the_colour_bar_of_maps_says_what_its_ends_mean(names, words):
    ct, mri, weights = random_slices((16, 16))
    assert words in maps_figure(ct, mri, dict.fromkeys(names, weights)).axes[-1].get_ylabel()


def test_the_colour_bar_of_a_difference_has_ends():
    ct, mri, fused = random_slices((64, 64))
    figure = difference_figure({'CT': ct, 'MRI': mri, 'net': fused}, span=0.3, boxes=0, width=3)
    axis = figure.axes[-1]
    assert np.allclose(axis.get_xticks()[[0, -1]], (-.3, .3)) and 'ends: ±0.3 or more' in ' '.join(axis.get_xlabel().split())
    FigureCanvasAgg(figure).draw()
    told, paper = axis.xaxis.label.get_window_extent(), figure.bbox
    assert paper.x0 <= told.x0 and told.x1 <= paper.x1 and paper.y0 <= told.y0, 'the sentence along it is on the paper'


def test_frames_are_seen_on_white_and_on_black():
    import matplotlib
    for colour in list(palette().values())[:2]:
        colour = np.array(matplotlib.colors.to_rgb(colour))
        assert np.ptp(colour) > .5 and .3 < luminance(colour[None, None].astype(np.float32)) < .8     # no grey, neither dark nor bright


def pixels(figure):
    "A figure as it is written to a PNG, (H, W, 3) in [0, 1]."
    data = BytesIO()
    figure.savefig(data, format='png', dpi='figure')
    return np.asarray(Image.open(data).convert('RGB'), np.float32) / 255


@pytest.mark.parametrize('width', [3, 7])
def test_every_pixel_is_on_the_paper_in_whole_dots(width):
    ct, mri, fused = random_slices((60, 64))
    figure = comparison({'CT': ct, 'MRI': mri, 'net': fused}, boxes=0, width=width)
    paper, tile = pixels(figure), drawn(figure)['net']
    assert abs(figure.get_size_inches()[0] - width) < 1e-6 and paper.shape[1] == round(width * figure.dpi)
    axis = figure.axes[2].get_window_extent()
    left, right, low, high = (round(side) for side in (axis.x0, axis.x1, axis.y0, axis.y1))
    assert (right - left) % 64 == 0 and (high - low) % 60 == 0
    dots = (right - left) // 64
    part = paper[::-1][low:high, left:right][::-1][dots // 2::dots, dots // 2::dots, 0]
    assert np.abs(part - tile).max() < .01


@pytest.mark.parametrize('inside', [False, True])
def test_named_boxes_are_enlarged_in_every_tile(inside):
    rows = {f'pair {i}': dict(zip(('CT', 'MRI', 'a', 'b'), random_slices((64, 64), 4, seed=i))) for i in range(2)}
    boxes = [Box(3, 5, 8, 9), Box(40, 30, 16, 10)]
    figure = comparison(rows, boxes, inside=inside)
    shown = drawn_all(figure)
    wanted = [image for row in rows.values() for slice_ in row.values() for image in (slice_, *(box.crop(slice_) for box in boxes))]
    assert len(shown) == len(wanted) and all(np.array_equal(one, other) for one, other in zip(shown, wanted))
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert len(texts) == 2 and texts[0].startswith('× ')      # once a row


def test_boxes_are_found_where_the_methods_differ():
    ct, mri, fused = random_slices((64, 64))
    other = fused.copy()
    other[8:16, 40:48], other[50:58, 2:10] = 1 - fused[8:16, 40:48], .5
    found = chosen_boxes({'CT': ct, 'MRI': mri, 'a': fused, 'b': other}, 2, size=8)
    assert found[0] == Box(8, 40, 8, 8) and found[1] == Box(50, 2, 8, 8)
    assert chosen_boxes({'CT': ct, 'MRI': mri, 'a': fused}, 1, size=8) == [largest_disagreement([ct, mri], size=8)]


@pytest.mark.parametrize('draw', [comparison, difference_figure])
def test_boxes_are_given_for_each_row(draw):
    rows = {label: dict(zip(('CT', 'MRI', 'net'), random_slices((64, 48), seed=seed))) for seed, label in enumerate('ab')}
    given = {'a': [Box(3, 2, 8, 8)], 'b': [Box(40, 30, 8, 8)]}
    parts = [image.get_array().shape[:2] for axis in draw(rows, boxes=given).axes for image in axis.images]
    assert parts.count((8, 8)) == parts.count((64, 48)) == (6 if draw is comparison else 4)
    assert len(draw(rows, boxes={'a': [], 'b': 1}).axes) < len(draw(rows, boxes=1).axes)


def test_both_differences_of_a_pair_have_one_layout():
    "Whatever is dark in them: what is enlarged inside lies in the same corners."
    rng = np.random.default_rng(3)
    ct, mri, fused = rng.random((3, 64, 64), dtype=np.float32)
    ct[:32, :32], mri[32:, 32:], fused[:32, 32:] = 0, 0, 0
    figure = difference_figure({'CT': ct, 'MRI': mri, 'm': fused}, boxes=[Box(28, 4, 8, 8), Box(28, 52, 8, 8)], inside=True)
    tiles = [axis.get_position() for axis in figure.axes[:6]]
    assert np.allclose(*([(one.x0 - row[0].x0, one.y0 - row[0].y0) for one in row] for row in (tiles[:3], tiles[3:])), atol=.02)


def test_boxes_do_not_lie_over_each_other():
    images = dict(enumerate(random_slices((64, 64), 4)))
    boxes = chosen_boxes(images, 3, size=20)
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            assert abs(one.top - other.top) >= 20 or abs(one.left - other.left) >= 20


def test_rows_may_differ_in_size_and_colour():
    grey, colour = random_slices((64, 48), 3), random_slices((32, 32, 3), 3)
    figure = comparison({'grey': dict(zip('abc', grey)), 'colour': dict(zip('abc', colour))}, size=8)
    assert [image.shape[2:] for image in drawn_all(figure)[::6]] == [(), (3,)]


def drawn_all(figure):
    return [axis.get_images()[0].get_array() for axis in figure.axes]


@pytest.mark.parametrize('wrong, words', [
    ({'boxes': [Box(60, 0, 8, 8)]}, 'not inside a slice of 64 × 64'), ({'scale': 9, 'size': 16}, 'can be enlarged 4 times'),
    ({'scale': 9, 'size': 16, 'inside': True}, 'can be enlarged 3 times'), ({'width': 1}, 'larger width'),
    ({'scale': 0, 'size': 16}, 'not 0 times; give a scale above 0'), ({'width': np.inf}, 'inf inches'), *(({'dpi': dpi}, 'dots an inch') for dpi in (0, -5, np.nan, np.inf))])
def test_what_does_not_fit_is_said(wrong, words):
    with pytest.raises(ValueError, match=words):
        comparison(dict(zip(('CT', 'MRI', 'a', 'b'), random_slices((64, 64), 4))), **wrong)
    with pytest.raises(ValueError, match='nothing to show'):
        comparison({})


@pytest.mark.parametrize('ending', ['pdf', 'svg', 'png'])
def test_text_is_text_and_the_same_figure_the_same_file(tmp_path, ending):
    rows = dict(zip(('CT', 'MRI', 'Tübingen − 3'), random_slices((32, 32), 3)))
    files = [save_figure(difference_figure(rows, width=3), tmp_path / f'{i}.{ending}').read_bytes() for i in range(2)]
    assert files[0] == files[1]
    if ending == 'svg':
        assert '>Tübingen − 3</text>' in files[0].decode()
    if ending == 'pdf':
        assert b'/FontFile2' in files[0] and b'/Type3' not in files[0]
    with pytest.raises(ValueError, match='endings'):
        save_figure(comparison(rows), tmp_path / 'figure.gif')


def test_figures_do_not_pile_up():
    import matplotlib.pyplot as plt
    plt.close('all')  # those of other tests
    panel(*random_slices((16, 16)))
    assert plt.get_fignums() == []


@pytest.mark.parametrize('make', [overlay, checkerboard, blend, difference, lambda a, b: panel(a, b, a),
                                  lambda a, b: comparison({'CT': a, 'MRI': b}), lambda a, b: largest_disagreement([a, b])])
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


def test_a_history_of_one_epoch_is_seen():
    [line] = training_curves([{'epoch': 1, 'train_loss': 1.0}]).axes[0].lines
    assert line.get_marker() == 'o' and line.get_markersize() > 0
    figure = training_curves({'short': [{'epoch': 1, 'val_loss': 1.0}], 'none': []}, ['loss'])
    assert [(line.get_marker(), line.get_label()) for line in figure.axes[0].lines] == [('s', 'short')]


@pytest.mark.parametrize('history', [[], {}, {'stopped': []}])
def test_no_epoch_is_no_history(history):
    with pytest.raises(ValueError, match="No history has 'loss'; there is not a single epoch"):
        training_curves(history)


def test_an_unknown_quantity_is_named():
    with pytest.raises(ValueError, match="No history has 'ssin'; there is loss, ssim"):
        training_curves({'a': [{'epoch': 1, 'train_loss': 1.0, 'val_ssim': 0.5, 'lr': 0.1}]}, ['ssin'])


@pytest.mark.parametrize('label', ['1000: worst slice of wavele', '1000: worst slice of resnet', '41000: the worst slice of wavelet-lite', 'patient_1001_axial_slice_of_the_first_visit', 'x' * 200])
def test_labels_of_rows_stay_at_their_rows(label):
    "They ran over each other and over the ends of the paper; of one that has no room in two lines the middle is left out."
    image = np.zeros((64, 64), np.float32)
    rows = {f'{number}{label}{number}': dict.fromkeys('abcdef', image) for number in range(2)}
    figure = comparison(rows, boxes=0, width=1.25 * 6, dpi=90)
    FigureCanvasAgg(figure).draw()
    labelled = [axis for axis in figure.axes if axis.get_ylabel()]
    for number, axis in enumerate(labelled):
        told, place = axis.yaxis.label.get_window_extent(), axis.get_window_extent()
        assert told.x0 >= 0 and told.height <= place.height and told.x1 <= place.x0
        text = axis.get_ylabel().replace('\n', '')
        assert text.startswith(str(number)) and text.endswith(str(number)) and ('…' in text) == (len(label) > 100)
    assert len(labelled) == 2
