"""The explorer: from a view to a picture, and what happens when controls and mouse change it."""
import base64
import json
import threading
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from medfusion.baselines import average, maximum
from medfusion.data import CTMRIDataset
from medfusion.explorer import (Explorer, PairList, SliceStore, View, asked_of, caption, contact_sheet, explore, legend, look_at,
                                png_bytes, save_view, show_view, view_call, view_modes, view_tiles)
from medfusion.figures import largest_disagreement
from medfusion.files import Pair
from medfusion.inference import at_lesions
from medfusion.phantom import write_phantom
from medfusion.wavelet_fusion import WaveletFusion

NBS = Path(__file__).resolve().parents[1] / 'nbs'
SHAPES = [(16, 16), (33, 20), (64, 81)]


def random_slices(shape, count=3, seed=0):
    return list(np.random.default_rng(seed).random((count, *shape), np.float32))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp('explorer') / 'phantom', cases=6, slices=3, size=64)


@pytest.fixture
def explorer(root):
    datasets = {part: CTMRIDataset(root / part / 'CT', root / part / 'MRI') for part in ('train', 'test')}
    calls = []

    def mean(ct, mri):
        calls.append(ct.shape)
        return (ct + mri) / 2
    explorer = explore(datasets, {'mean': mean, 'larger': torch.maximum, 'ct': lambda ct, mri: ct},
                       maps={'mean': lambda ct, mri: {'half': ct[..., ::2, ::2]}})
    explorer.calls = calls
    return explorer


def shown(explorer):
    "The picture of the explorer as an array."
    return cv2.imdecode(np.frombuffer(explorer.picture.value, np.uint8), cv2.IMREAD_COLOR)


def test_a_network_is_given_slices_where_it_is(root):
    "On a GPU, or, as here, in double precision."
    class Mean(torch.nn.Conv2d):
        def forward(self, ct, mri):
            return super().forward(torch.cat([ct, mri], 1))

        def maps(self, ct, mri):
            return {'mean': self(ct, mri)}
    network = Mean(2, 1, 1, bias=False).double().eval()
    network.weight.data.fill_(.5)
    explorer = explore({'test': CTMRIDataset(root / 'test/CT', root / 'test/MRI')}, {'network': network, 'average': average}, {'network': network.maps})
    slices = explorer.slices
    assert np.abs(slices['network'] - slices['average']).max() < 1e-6
    explorer.controls['mode'].value = 'maps'
    assert shown(explorer).any()


def test_two_pairs_of_one_file_name_are_two_slices(tmp_path):
    pairs = [(tmp_path / folder / 'ct.png', tmp_path / folder / 'mri.png') for folder in ('a', 'b')]
    for level, (folder, _) in enumerate(pairs):
        folder.parent.mkdir()
        for name in ('ct.png', 'mri.png'):
            Image.fromarray((np.add.outer(np.arange(48), np.arange(48)) + 100 * level).astype(np.uint8)).save(folder.with_name(name))
    explorer = explore({'mine': pairs}, {'larger': torch.maximum})
    assert len(set(explorer.store.datasets['mine'].names)) == 2
    explorer.controls['slice'].value = 2
    call = view_call(explorer)
    explorer.controls['slice'].value = 1
    eval(call)
    assert explorer.controls['slice'].value == 2 and explorer.slices['CT'].max() > .5


def test_no_method_is_called_like_a_source(root):
    with pytest.raises(ValueError, match='CT and MRI are the sources'):
        explore({'test': CTMRIDataset(root / 'test/CT', root / 'test/MRI')}, {'average': average, 'MRI': maximum})


# From a view to a PNG

@pytest.mark.parametrize('mode', view_modes())
@pytest.mark.parametrize('shape', SHAPES)
def test_every_view_is_composed(mode, shape):
    ct, mri, fused = random_slices(shape)
    view = View(mode, window=0.6, zoom=2.5, centre=(0, 1))
    tiles = view_tiles(ct, mri, {'net': fused}, {'net: mask': mri[::2], 'net': mri}, view)
    sheet = contact_sheet(tiles)
    assert sheet.dtype == np.uint8 and sheet.any()
    assert np.array_equal(cv2.imdecode(np.frombuffer(png_bytes(sheet), np.uint8), cv2.IMREAD_COLOR)[..., ::-1], sheet)


def test_every_sign_of_the_captions_has_a_picture():
    missing = caption('\N{REPLACEMENT CHARACTER}\uFFFF', 60)[:, 20:]
    signs = {sign: caption(sign, 60) for sign in '−×↑↓±ö'}
    assert len({strip.tobytes() for strip in signs.values()}) == len(signs)
    assert all(strip.any() for strip in signs.values()) and missing.any()


@pytest.mark.parametrize('text', ['a', 'a method with quite a long name − MRI (× 8)', 'x' * 200])
def test_captions_are_as_wide_as_their_tile(text):
    assert caption(text, 256).shape == (24, 256, 3)


@pytest.mark.parametrize('mode', ['difference', 'invented', 'maps'])
def test_colours_have_a_legend_as_wide_as_the_sheet(mode):
    ct, mri, fused = random_slices((64, 64))
    for count in range(1, 6):
        methods = {f'net {number}': fused for number in range(count)}
        tiles = view_tiles(ct, mri, methods, {name: mri for name in methods}, View(mode))
        plain = contact_sheet(tiles)
        sheet = contact_sheet(tiles, strip=legend(View(mode), plain.shape[1]))
        assert sheet.shape[1] == plain.shape[1] and len(sheet) > len(plain)
    assert legend(View('slices'), 400) is None


@pytest.mark.parametrize('place', [(0, 0), (.3, .8), (.99, .01)])
@pytest.mark.parametrize('shape', SHAPES)
def test_a_pixel_is_brought_to_a_place(shape, place):
    pixel = [side // 2 for side in shape]
    box = look_at(View(), shape, pixel, place, zoom=4).box(shape)
    for at, fraction, start, side, whole in zip(pixel, place, box[:2], box[2:], shape):
        assert abs(at - (start + fraction * side)) <= 1.5 or start in (0, whole - side)  # as near as whole pixels and edges allow


@pytest.mark.parametrize('zoom', [1, 2, 3, 7.5, 100])
@pytest.mark.parametrize('centre', [(0, 0), (0.5, 0.5), (1, 1), (0.02, 0.98)])
def test_zoom_stays_inside_the_slice(zoom, centre):
    box = View(zoom=zoom, centre=centre).box((64, 51))
    assert min(box) >= 0 and min(box.height, box.width) >= 1
    assert box.top + box.height <= 64 and box.left + box.width <= 51


def test_magnified_pixels_stay_pixels():
    tile = np.array([[0, 1], [1, 0]], np.float32)
    assert set(np.unique(contact_sheet({'': tile})[24:])) == {0, 255}


def test_unknown_view_and_nothing_to_show_are_said():
    ct, mri, fused = random_slices((16, 16))
    with pytest.raises(ValueError, match="no view mode 'sepia'"):
        view_tiles(ct, mri, {'net': fused}, {}, View('sepia'))
    with pytest.raises(ValueError, match='nothing to show'):
        contact_sheet(view_tiles(ct, mri, {}, {}, View('difference')))


# The explorer

def test_explorer_draws_every_view(explorer):
    pictures = set()
    for mode in explorer.controls['mode'].options:
        explorer.controls['mode'].value = mode
        pictures.add(explorer.picture.value)
    assert tuple(explorer.controls['mode'].options) == view_modes() and len(pictures) == len(view_modes())


@pytest.mark.parametrize('name, value', [('slice', 2), ('window', 0.3), ('level', 0.2), ('zoom', 3), ('case', '2'),
                                         ('dataset', 'test')])
def test_every_control_changes_the_picture(explorer, name, value):
    before = explorer.picture.value
    explorer.controls[name].value = value
    assert explorer.picture.value != before


@pytest.mark.parametrize('mode, name, value', [('blend', 'alpha', 0.9), ('checkerboard', 'tile', 8),
                                               ('slices', 'across', 0.1), ('slices', 'down', 0.1)])
def test_controls_of_one_view_are_seen_only_there(explorer, mode, name, value):
    layout, seen = explorer.controls[name].layout, ('visibility', 'hidden') if mode == 'slices' else ('display', 'none')     # the wheel must not move the picture
    assert getattr(layout, seen[0]) == seen[1]
    explorer.controls['mode'].value, explorer.controls['zoom'].value = mode, 2
    assert getattr(layout, seen[0]) is None
    before = explorer.picture.value
    explorer.controls[name].value = value
    assert explorer.picture.value != before


def test_ticked_methods_are_shown_and_measured(explorer):
    assert explorer.shown == ['mean', 'larger']
    explorer.methods['ct'].value = True
    explorer.methods['mean'].value = False
    assert explorer.shown == ['larger', 'ct']
    assert '<th>larger</th>' in explorer.numbers.value and '<th>mean</th>' not in explorer.numbers.value


def test_cases_are_those_of_the_data_set(explorer):
    for name, dataset in explorer.store.datasets.items():
        explorer.controls['dataset'].value = name
        assert explorer.controls['case'].options == tuple(dataset.cases)
        for case in dataset.cases:
            explorer.controls['case'].value = case
            for number in range(1, explorer.controls['slice'].max + 1):
                explorer.controls['slice'].value = number
                assert dataset[explorer.picker.index]['case'] == case
                assert dataset.names[explorer.picker.index] in explorer.status.value


def test_a_new_case_starts_at_its_first_slice(explorer):
    explorer.controls['slice'].value = 3
    explorer.controls['case'].value = '2'
    assert explorer.controls['slice'].value == 1


def test_a_slice_is_fused_once(explorer):
    for number in (1, 2, 3, 2, 1):
        explorer.controls['slice'].value = number
    explorer.controls['mode'].value = 'difference'
    explorer.controls['window'].value = 0.4
    assert explorer.calls == [(1, 1, 64, 64)] * 3


def test_a_change_draws_once(explorer, monkeypatch):
    draws, sheet = [], contact_sheet
    monkeypatch.setattr('medfusion.explorer.contact_sheet', lambda *args, **more: draws.append(1) or sheet(*args, **more))
    explorer.controls['slice'].value = 3
    assert len(draws) == 1
    explorer.controls['case'].value = '2'
    assert len(draws) == 2
    explorer.controls['dataset'].value = 'test'
    assert len(draws) == 3
    explorer.controls['find'].click()
    assert len(draws) == 4


def test_largest_disagreement_is_zoomed_to(explorer):
    explorer.controls['find'].click()
    wanted = largest_disagreement([explorer.slices[name] for name in explorer.shown], size=16)
    box = explorer.panel.view.box((64, 64))
    assert box[2:] == (16, 16) and abs(box.top - wanted.top) <= 1 and abs(box.left - wanted.left) <= 1


def point(explorer, tile, down, across):
    "The point of the picture at a place of a tile, as the mouse events have it."
    side, sheet = explorer.sheet.side, explorer.sheet
    return dict(dataX=int((tile % sheet.columns) * (side + sheet.gap) + across * side),
                dataY=int((tile // sheet.columns) * (side + sheet.gap + sheet.caption) + sheet.caption + down * side))


@pytest.mark.parametrize('tile', [0, 1, 3])
def test_the_wheel_zooms_at_the_mouse_in_every_tile(explorer, tile):
    for _ in range(6):
        explorer.mouse.act(dict(type='wheel', deltaY=-1, **point(explorer, tile, .25, .5)))
    box = explorer.panel.view.box((64, 64))
    assert 3.5 < explorer.panel.view.zoom < 4.5 and abs(box.top + .25 * box.height - 16) <= 2
    for _ in range(9):
        explorer.mouse.act(dict(type='wheel', deltaY=1, **point(explorer, tile, .25, .5)))
    assert explorer.panel.view.box((64, 64)) == (0, 0, 64, 64)


def test_dragging_moves_every_tile_and_ends_at_the_edge(explorer):
    explorer.controls['zoom'].value = 4
    before = explorer.panel.view.box((64, 64))
    explorer.mouse.act(dict(type='mousedown', buttons=1, **point(explorer, 0, .5, .5)))
    explorer.mouse.act(dict(type='mousemove', buttons=1, **point(explorer, 0, .75, .5)))
    box = explorer.panel.view.box((64, 64))
    assert box.top == before.top - 4 and abs(box.left - before.left) <= 1
    explorer.mouse.act(dict(type='mousemove', buttons=0, **point(explorer, 0, .1, .5)))
    assert explorer.panel.view.box((64, 64)) == box  # the button is up


def test_the_levels_under_the_mouse_are_those_of_the_slices(explorer):
    explorer.mouse.act(dict(type='mousemove', buttons=0, **point(explorer, 2, .5, .25)))
    ct, mri = (image[0, 0] for image in explorer.store.pair('train', 0))
    assert 'row 32, column 16' in explorer.levels.value or 'row 31, column 15' in explorer.levels.value
    line = explorer.levels.value
    row, column = (int(word) for word in line.replace(',', '').replace(':', '').split()[1:4:2])
    assert f'CT {ct[row, column]:.3f}, MRI {mri[row, column]:.3f}, mean {(ct + mri)[row, column] / 2:.3f}' in line


def test_the_levels_told_are_of_the_slice_that_is_shown():
    first, second = random_slices((48, 48), 2), random_slices((42, 64), 2, seed=1)
    explorer = explore({'mine': [first, second, (first[0], second[1])]}, {'larger': torch.maximum})
    for row in (10, 45):
        explorer.controls['slice'].value = 1
        explorer.mouse.act(dict(type='mousemove', buttons=0, **point(explorer, 0, (row + .5) / 48, .5)))
        assert f'row {row}, column 24: CT {first[0][row, 24]:.3f}' in explorer.levels.value
        explorer.controls['slice'].value = 2
        assert explorer.levels.value == (f'row 10, column 24: CT {second[0][10, 24]:.3f}, MRI {second[1][10, 24]:.3f}, larger '
                                         f'{max(one[10, 24] for one in second):.3f}' if row == 10 else '')
    explorer.controls['slice'].value = 1
    assert explorer.levels.value and explorer.picture.layout.display is None
    explorer.controls['slice'].value = 3
    assert explorer.levels.value == '' and explorer.picture.layout.display == 'none'


@pytest.mark.parametrize('where', [dict(dataX=5, dataY=5), dict(dataX=-3, dataY=50), dict(dataX=5000, dataY=50)])
def test_the_mouse_beside_the_tiles_does_nothing(explorer, where):
    before = explorer.picture.value, explorer.levels.value
    for kind in ('wheel', 'mousedown', 'mousemove', 'mouseleave'):
        explorer.mouse.act(dict(type=kind, deltaY=-1, buttons=1, **where))
    assert (explorer.picture.value, explorer.levels.value) == before


def test_a_saved_view_holds_the_call_that_makes_it_again(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    show_view(explorer, 'test', explorer.store.datasets['test'].names[1], ['larger', 'ct'], View('difference', .4, zoom=2.0))
    explorer.controls['save'].click()
    explorer.controls['save'].click()
    first, second = sorted((tmp_path / 'explorer_views').iterdir())
    assert str(second) in explorer.status.value and first.read_bytes() == second.read_bytes()
    picture, call = explorer.picture.value, Image.open(first).text['call']
    assert np.array_equal(Image.open(first), Image.open(BytesIO(picture))) and call == view_call(explorer)
    show_view(explorer, 'train', explorer.store.datasets['train'].names[0], ['mean'], View())
    exec(call)
    assert explorer.picture.value == picture


def test_a_saved_view_stays_whatever_was_removed_before_it(tmp_path):
    explorer = explore({'mine': PairList([tuple(random_slices((48, 48), 2))])}, {'larger': torch.maximum})
    explorer.store.datasets['mine'].names[0] = 'a[1].png'
    first, *later = [save_view(explorer, tmp_path) for _ in range(3)]
    first.unlink()
    assert save_view(explorer, tmp_path) == first and save_view(explorer, tmp_path) not in later and len(list(tmp_path.iterdir())) == 4


def test_a_pair_that_cannot_be_shown_has_no_picture_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ct, mri = random_slices((48, 48), 2)
    explorer = explore({'mine': [(ct, mri), (ct, mri[:40])]}, {'larger': torch.maximum})
    before = explorer.picture.value, explorer.numbers.value
    explorer.controls['slice'].value = 2
    assert 'register both to one grid' in explorer.status.value and (explorer.picture.value, explorer.numbers.value) == (b'', '')
    explorer.controls['save'].click()
    assert 'no picture of this view' in explorer.status.value and not list(tmp_path.iterdir())
    explorer.controls['slice'].value = 1
    assert (explorer.picture.value, explorer.numbers.value) == before


def test_a_view_that_cannot_be_saved_says_why(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'explorer_views').write_text('a file')
    explorer.controls['save'].click()
    assert explorer.status.value.startswith('<b>The folder ') and 'explorer_views cannot be made' in explorer.status.value


def test_what_cannot_be_shown_is_named(explorer):
    with pytest.raises(ValueError, match='no slice 9999.png'):
        show_view(explorer, 'test', '9999.png', ['mean'], View())
    with pytest.raises(ValueError, match="no method 'net'"):
        show_view(explorer, 'test', explorer.store.datasets['test'].names[0], ['net'], View())
    before = view_call(explorer)
    with pytest.raises(ValueError, match="no data set 'vali'; it has train, test"):
        show_view(explorer, 'vali', '1000.png', ['mean'], View())
    with pytest.raises(ValueError, match="no view mode 'sepia'; it has slices"):
        show_view(explorer, 'train', explorer.store.datasets['train'].names[0], ['mean'], View('sepia'))
    assert view_call(explorer) == before


def test_pairs_of_files_arrays_and_colours_are_explored(tmp_path):
    ct, mri = ((image * 65535).astype(np.uint16) for image in random_slices((48, 56), 2))
    cv2.imwrite(str(tmp_path / 'ct.png'), ct)
    cv2.imwrite(str(tmp_path / 'mri.png'), mri)
    colour = np.stack([mri, mri // 2, mri // 3], axis=-1)
    pairs = [(tmp_path / 'ct.png', tmp_path / 'mri.png'), (ct, mri), (ct.astype('>u2'), mri.astype('>u2')), (ct, colour)]
    explorer = explore({'mine': pairs}, {'larger': torch.maximum})
    pictures = []
    for number in range(1, 5):
        explorer.controls['slice'].value = number
        pictures.append(shown(explorer))
    assert all(np.array_equal(pictures[0], picture) for picture in pictures[1:3])
    assert np.ptp(pictures[3].astype(int), axis=-1).max() > 40  # in colour
    for mode in view_modes()[:-1]:
        explorer.controls['mode'].value = mode
        assert '48 × 56' in explorer.status.value


def test_pairs_of_two_sizes_are_named():
    with pytest.raises(ValueError, match='pair 2: The CT has 16×16 pixels and the MRI 16×17'):
        PairList([(np.zeros((16, 16)), np.zeros((16, 16))), (np.zeros((16, 16)), np.zeros((16, 17)))])[1]


def test_a_pair_that_fuse_refuses_is_named():
    grey, colour = np.zeros((64, 64)), np.zeros((64, 64, 3))
    colour[4:9, :, 0] = 1
    for pair, said in (((colour, grey), 'pair 1: The first image is in colour'), ((grey[:9], grey[:9]), 'pair 1: A slice of 9×64 pixels is too small'),
                       ((grey * np.nan, grey), 'pair 1: Pixels .* from nan'), ((grey, grey + 9), 'pair 1: Pixels .* from 9')):
        with pytest.raises(ValueError, match=said):
            explore({'mine': [pair]}, {'larger': torch.maximum})
    explorer = explore({'mine': [(colour, colour)]}, {'larger': torch.maximum, 'average': average})
    assert np.ptp(tile(explorer, 1), axis=-1).max() > 40 and not np.ptp(tile(explorer, 0), axis=-1).any()


@pytest.mark.parametrize('data, said', [(('a.png', 'b.png'), 'Pair 1 is of the type str'), ((np.zeros((32, 32)), np.zeros((32, 32))), 'Pair 1 is of the type ndarray'),
                                        ([(np.zeros((32, 32)), np.zeros((32, 32))), Pair('1.png', 'a', 'b')], 'Pair 2 is of the type Pair'),
                                        ('Dataset/test', "'mine' is of the type str"), (np.zeros((2, 32, 32)), "'mine' is of the type ndarray"), (Path('a'), "'mine' is of")])
def test_what_is_no_list_of_pairs_is_told(data, said):
    with pytest.raises(ValueError, match=said + r'.* a list \[\(ct, mri\), \.\.\.\]'):
        explore({'mine': data}, {'larger': torch.maximum})


def test_without_a_method_the_reason_is_said_and_the_explorer_recovers(explorer):
    explorer.controls['mode'].value = 'difference'
    for box in explorer.methods.values():
        box.value = False
    assert 'tick a method' in explorer.status.value
    explorer.methods['ct'].value = True
    assert '64 × 64 pixels' in explorer.status.value


def test_a_vanished_file_is_said_in_place(explorer, root, tmp_path):
    name = explorer.store.datasets['train'].names[2]
    (root / 'train/CT' / name).rename(tmp_path / name)
    try:
        explorer.controls['slice'].value = 3
        assert name in explorer.status.value
    finally:
        (tmp_path / name).rename(root / 'train/CT' / name)


def test_numbers_are_those_of_the_metrics_module(explorer):
    from medfusion.metrics import measure
    ct, mri = explorer.store.pair('train', 0)
    numbers = explorer.store.numbers('train', 0, 'larger')
    wanted = measure(torch.maximum(ct, mri), ct, mri, names=tuple(numbers))
    assert numbers == pytest.approx({name: wanted[name].item() for name in numbers}, nan_ok=True)


# Edges that neither source has

def flat_pair():
    "A CT with one upright edge and an MRI without any, 64 × 64, of whole grey levels."
    ct = np.full((64, 64), 60 / 255, np.float32)
    ct[:, 10:] = 140 / 255
    return ct, np.full((64, 64), 100 / 255, np.float32)


def painted(ct, mri):
    "The average, with a faint square and a bright one that neither source has."
    fused = average(ct, mri)
    fused[..., 20:30, 30:40] += 20 / 255
    fused[..., 44:54, 30:40] = 1.0
    return fused


def excess_by_opencv(fused, *sources):
    "The map of invented edges as METRICS defines it, by OpenCV."
    def steepness(image):
        smooth = cv2.GaussianBlur(np.rint(255 * image).astype(np.float64), (0, 0), 1)
        return np.hypot(cv2.Sobel(smooth, cv2.CV_64F, 1, 0), cv2.Sobel(smooth, cv2.CV_64F, 0, 1)) / 8
    nearby = cv2.dilate(np.maximum(*map(steepness, sources)), np.ones((5, 5)))
    return np.maximum(steepness(fused) - nearby - 6, 0)


def tile(explorer, number):
    "A tile of a sheet of four, which shows each pixel of a slice of 64 × 64 as 4 × 4: RGB (64, 64, 3)."
    left = number * (explorer.sheet.side + explorer.sheet.gap)
    return shown(explorer)[24:24 + 256, left:left + 256][::4, ::4, ::-1].astype(int)


def test_invented_edges_are_marked_where_they_are_and_as_steep_as_they_are():
    ct, mri = flat_pair()
    explorer = explore({'flat': [(ct, mri)]}, {'average': average, 'painted': painted})
    explorer.controls['mode'].value = 'invented'
    wanted = excess_by_opencv(explorer.slices['painted'], ct, mri)
    assert wanted[:40].max() < 1 and 20 < (wanted > 10).sum() < (wanted > 0).sum() < 300 and not wanted[:, :25].any()   # both squares, not the CT's own edge
    for window in (1.0, 0.3):                                                                 # a window moves the grey, not the marks
        explorer.controls['window'].value = window
        marks = tile(explorer, 3)
        assert np.array_equal(np.ptp(marks, axis=-1) > 0, wanted > 0)
        assert (abs(marks - 255 * np.stack([wanted > 0, np.minimum(wanted / 10, 1), 0 * wanted], -1))[wanted > 0] <= 2).all()
        assert all(np.ptp(tile(explorer, number), axis=-1).max() == 0 for number in range(3)) # CT, MRI, and a rule without any
    assert f'<td>{100 * (wanted > 0).mean():.4f}%</td>' in explorer.numbers.value and '<td>0.0000%</td>' in explorer.numbers.value
    assert f'<td>{wanted.max():.3f}</td>' in explorer.numbers.value


def test_what_is_marked_is_what_the_table_counts(explorer):
    explorer.controls['mode'].value = 'invented'
    for method in explorer.methods:
        found, = explorer.store.maps('train', 0, method, 'invented').values()
        numbers = explorer.store.numbers('train', 0, method)
        assert numbers['invented'] == pytest.approx((found > 0).mean()) and numbers['invented_max'] == pytest.approx(found.max())


def test_invented_edges_are_sought_only_where_they_are_shown_and_once(monkeypatch):
    from medfusion.explorer import where_invented
    calls = []
    monkeypatch.setattr('medfusion.explorer.where_invented', lambda *images: calls.append(1) or where_invented(*images))
    explorer = explore({'flat': [flat_pair()]}, {'average': average, 'painted': painted, 'maximum': maximum})
    for mode in view_modes()[:-1]:
        if mode != 'invented':
            explorer.controls['mode'].value = mode
    assert calls == []
    explorer.controls['mode'].value = 'invented'
    assert len(calls) == 2  # of the two methods that are ticked
    explorer.controls['zoom'].value, explorer.controls['level'].value = 3, 0.4
    assert len(calls) == 2


def test_neighbours_are_prepared_with_what_is_laid_over_them(root, monkeypatch):
    from medfusion.explorer import where_invented
    store, made = SliceStore({'train': CTMRIDataset(root / 'train/CT', root / 'train/MRI')}, {'average': average}), threading.Event()
    monkeypatch.setattr('medfusion.explorer.where_invented', lambda *images: made.set() or where_invented(*images))
    store.prepare('train', [1], ['average'], 'invented')
    assert made.wait(10)
    monkeypatch.setattr('medfusion.explorer.where_invented', None)   # it is not asked again
    assert store.maps('train', 1, 'average', 'invented')['average'].shape == (64, 64)


def test_invented_edges_of_a_network_with_a_dial_and_of_colours():
    ct, mri = flat_pair()
    colour = np.stack([mri, mri / 2, mri / 3], axis=-1)
    explorer = explore({'flat': [(ct, colour)]}, {'dialled': WaveletFusion(width=8, dial=True).eval(), 'painted': painted})
    explorer.controls['mode'].value = 'invented'
    assert '64 × 64 pixels' in explorer.status.value and 'invented' in view_call(explorer)
    assert np.ptp(tile(explorer, 3), axis=-1).max() > 40 and np.ptp(tile(explorer, 1), axis=-1).max() > 40  # marks; the source keeps its colours


def test_representation_in_a_notebook_is_short(explorer):
    assert len(repr(explorer)) < 110 and 'run this cell in JupyterLab' in repr(explorer)
    assert 'medfusion-explorer' in explorer._dom_classes


def test_without_maps_there_is_no_maps_view(root):
    dataset = CTMRIDataset(root / 'test/CT', root / 'test/MRI')
    assert 'maps' not in explore({'test': dataset}, {'larger': torch.maximum}).controls['mode'].options


@pytest.mark.filterwarnings('ignore:VIF is undefined')
def test_unequal_sizes_between_slices(tmp_path):
    "Each slice of a data set may have a size of its own."
    for kind in ('CT', 'MRI'):
        (tmp_path / kind).mkdir()
        for name, shape in (('1001.png', (40, 64)), ('1002.png', (64, 33))):
            cv2.imwrite(str(tmp_path / kind / name), (random_slices(shape, 1)[0] * 255).astype(np.uint8))
    explorer = explore({'mixed': CTMRIDataset(tmp_path / 'CT', tmp_path / 'MRI')}, {'larger': torch.maximum})
    explorer.controls['slice'].value = 2
    assert '64 × 33 pixels' in explorer.status.value


def test_explore_names_what_is_missing(root):
    dataset = CTMRIDataset(root / 'test/CT', root / 'test/MRI')
    with pytest.raises(ValueError, match='data sets'):
        explore({}, {'larger': torch.maximum})
    with pytest.raises(ValueError, match='methods by name'):
        explore({'test': dataset}, {})
    with pytest.raises(ValueError, match="the method 'mine' is 'wavelet', no function; give load_model"):
        explore({'test': dataset}, {'mine': 'wavelet'})
    with pytest.raises(ValueError, match='data sets by name'):
        explore([(np.zeros((32, 32)), np.zeros((32, 32)))], {'larger': torch.maximum})
    with pytest.raises(ValueError, match="'wavelt'"):
        explore({'test': dataset}, {'wavelet': torch.maximum}, maps={'wavelt': torch.maximum})


def test_store_keeps_only_the_last_slices(root):
    calls = []
    store = SliceStore({'train': CTMRIDataset(root / 'train/CT', root / 'train/MRI')},
                       {'larger': lambda ct, mri: calls.append(1) or torch.maximum(ct, mri)}, keep=2)
    for index in (0, 1, 2, 0):
        store.fused('train', index, 'larger')
    assert len(calls) == 4


def test_neighbours_are_prepared_and_give_way(root):
    began, started, going = [], threading.Event(), threading.Event()

    def slow(ct, mri):
        began.append(1)
        started.set()
        assert going.wait(10)
        return ct
    data = CTMRIDataset(root / 'train/CT', root / 'train/MRI')
    store = SliceStore({'train': data}, {'slow': slow})
    store.prepare('train', [1, 2], ['slow'])  # returns while the first of the two is being fused
    assert started.wait(10)
    threading.Timer(0.1, going.set).start()
    store.fused('train', 0, 'slow')
    assert len(began) == 2  # slice 1 had begun, slice 2 gave way to slice 0
    store.fused('train', 1, 'slow')
    assert len(began) == 2
    store.fused('train', 2, 'slow')
    assert len(began) == 3


def test_what_failed_is_tried_again(root):
    def fail_once(ct, mri, calls=[]):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError('out of memory')
        return ct
    store = SliceStore({'train': CTMRIDataset(root / 'train/CT', root / 'train/MRI')}, {'net': fail_once})
    with pytest.raises(RuntimeError, match='out of memory'):
        store.fused('train', 0, 'net')
    assert store.fused('train', 0, 'net').shape == (64, 64)


def test_two_explorers_do_not_share_what_they_hold(root):
    datasets = {'test': CTMRIDataset(root / 'test/CT', root / 'test/MRI')}
    one, other = explore(datasets, {'net': torch.maximum}), explore(datasets, {'net': torch.minimum})
    assert not np.array_equal(shown(one), shown(other))
    assert isinstance(one, Explorer)


# What is committed

@pytest.mark.parametrize('path', sorted(NBS.glob('*.ipynb')), ids=lambda path: path.name)
def test_committed_notebooks_hold_no_widget_state(path):
    notebook = json.loads(path.read_text(encoding='utf-8'))
    assert 'widgets' not in notebook['metadata'], f'{path.name} holds widgets; execute with store_widget_state=False'
    for cell in notebook['cells']:
        for output in cell.get('outputs', []):
            if 'application/vnd.jupyter.widget-view+json' in output.get('data', {}):
                assert len(json.dumps(output)) < 1000


def test_a_page_without_a_kernel_has_the_picture(explorer):
    shown = explorer._repr_mimebundle_()
    assert base64.b64decode(shown['image/png']) == explorer.picture.value
    assert 'application/vnd.jupyter.widget-view+json' in shown and 'methods' in shown['text/plain']


@pytest.fixture
def two_positions():
    "One network twice, its dial at .5 and at 0."
    network = WaveletFusion(width=8, dial=True).eval()
    network.dial.ends[-1].data[0, 1] = 9.
    return {'half': network, 'none': at_lesions(network, 0.)}


def test_a_dial_stands_where_its_network_says_until_the_slider_is_moved(two_positions):
    explorer = explore({'flat': [random_slices((48, 48), 2), random_slices((48, 48), 2, seed=1)]}, two_positions)
    assert asked_of(explorer) == {'half': ('half', 0.5), 'none': ('none', 0.)} and not np.array_equal(explorer.slices['half'], explorer.slices['none'])
    call, before = view_call(explorer), explorer.picture.value
    explorer.controls['lesions'].value = 0.8
    assert {*asked_of(explorer).values()} == {('half', 0.8), ('none', 0.8)} and np.array_equal(explorer.slices['half'], explorer.slices['none'])
    assert view_call(explorer).endswith('lesions=0.8)')
    exec(call, {'explorer': explorer, 'show_view': show_view, 'View': View})
    assert explorer.picture.value == before and view_call(explorer) == call
    show_view(explorer, 'flat', explorer.store.datasets['flat'].names[0], ['half'], View(), lesions=0.5)        # where the slider stands already
    assert explorer.dials == {'half': 0.5, 'none': 0.5}
    show_view(explorer, 'flat', explorer.store.datasets['flat'].names[0], ['half'], View(), lesions={'none': 0.2})      # the other stays
    assert explorer.dials == {'half': 0.5, 'none': 0.2}


@pytest.mark.parametrize('lesions, said', [(5, 'lesions is 5'), ({'half': -1}, 'lesions is -1'), ({'nobody': 0.5}, 'nobody has no dial')])
def test_a_position_that_is_none_is_refused(two_positions, lesions, said):
    explorer = explore({'flat': [random_slices((48, 48), 2)]}, two_positions)
    with pytest.raises(ValueError, match=said):
        show_view(explorer, 'flat', explorer.store.datasets['flat'].names[0], ['half'], View(), lesions=lesions)
    assert explorer.dials == {'half': 0.5, 'none': 0.}


def test_no_slider_stands_between_two_of_its_steps(two_positions):
    "JupyterLab moves it to one of them, and tells that as if the reader had: all dials turned to where the slider of one of them stood."
    methods = {'a': at_lesions(two_positions['half'], 0.33), 'b': two_positions['none']}
    explorer = explore({'flat': [random_slices((48, 64), 2)]}, methods)

    def stands():
        steps = [(one.value - one.min) / one.step for one in explorer.controls.values() if hasattr(one, 'step')]
        return len(steps) == 9 and np.allclose(steps, np.round(steps), rtol=0, atol=1e-6)
    assert stands() and explorer.dials == {'a': 0.33, 'b': 0.}
    show_view(explorer, 'flat', 'pair 1', ['a', 'b'], View('blend', .33, .3333, 3.3, (.3333, .7777), .1234, 30), lesions={'a': .77, 'b': .11})
    assert stands() and explorer.dials == {'a': .77, 'b': .11} and explorer.panel.view.zoom == 3.25
    for act in (explorer.controls['find'].click, *[lambda: explorer.mouse.act(dict(type='wheel', deltaY=-1, **point(explorer, 0, .3, .6)))] * 9):
        act()
        assert stands()
    call, before = view_call(explorer), explorer.picture.value
    show_view(explorer, 'flat', 'pair 1', ['a'], View())
    exec(call, {'explorer': explorer, 'show_view': show_view, 'View': View})
    assert explorer.picture.value == before and explorer.panel.view.zoom == 16


def test_maps_of_two_slices_alone(two_positions):
    network = two_positions['half']
    explorer = explore({'flat': [random_slices((48, 48), 2)]}, two_positions, maps={'half': lambda ct, mri: network.maps(ct, mri), 'none': network.maps})
    explorer.controls['mode'].value = 'maps'
    assert 'numbers of the whole slice' in explorer.status.value


def test_what_a_network_of_ones_own_calls_a_dial_gets_no_slider():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dial = torch.nn.Linear(1, 1)

        def forward(self, ct, mri):
            return (ct + mri) / 2
    assert 'lesions' not in explore({'flat': [random_slices((48, 48), 2)]}, {'mine': Mine().eval()}).controls
