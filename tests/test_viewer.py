"""The viewer: its pictures on odd sizes and bad input, and what the explorer does when its controls change."""
import json
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from medfusion.data import CTMRIDataset
from medfusion.phantom import write_phantom
from medfusion.explorer import Explorer, SliceStore, View, contact_sheet, explore, png_bytes, view_modes, view_tiles
from medfusion.figures import (Box, as_array, blend, checkerboard, difference, inset, largest_disagreement,
                               map_overlay, maps_figure, mosaic, overlay, panel, training_curves, window_level)

NBS = Path(__file__).resolve().parents[1] / 'nbs'
SHAPES = [(16, 16), (33, 20), (64, 81)]


def random_slices(shape, count=3, seed=0):
    return list(np.random.default_rng(seed).random((count, *shape), np.float32))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp('viewer') / 'phantom', cases=6, slices=3, size=64)


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


# Pictures

@pytest.mark.parametrize('kind', [np.uint8, np.uint16, np.float64, torch.float32, torch.float16, torch.bfloat16])
def test_as_array_takes_every_kind_of_slice(kind):
    image = np.array([[0, 1], [1, 0]])
    if isinstance(kind, torch.dtype):
        image = torch.from_numpy(image)[None, None].to(kind).requires_grad_()
    else:
        image = (image * (np.iinfo(kind).max if kind in (np.uint8, np.uint16) else 1)).astype(kind)
    array = as_array(image)
    assert array.dtype == np.float32 and np.array_equal(array, [[0, 1], [1, 0]])


@pytest.mark.parametrize('shape', [(5,), (2, 16, 16), (16, 16, 3), (2, 1, 16, 16)])
def test_as_array_refuses_what_is_not_one_slice(shape):
    with pytest.raises(ValueError, match='One grey slice is wanted'):
        as_array(np.zeros(shape))


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
               mosaic({'rgb': overlay(ct, mri)})]
    for figure in figures:
        assert isinstance(figure, Figure)
        figure.canvas.draw()


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
                                         (lambda x: blend(x, x, 1.5), 'alpha')])
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


# From a view to a PNG

@pytest.mark.parametrize('mode', view_modes())
@pytest.mark.parametrize('shape', SHAPES)
def test_every_view_is_composed(mode, shape):
    ct, mri, fused = random_slices(shape)
    view = View(mode, window=0.6, zoom=2.5, centre=(0, 1))
    tiles = view_tiles(ct, mri, {'net': fused}, {'net: mask': mri[::2]}, view)
    sheet = contact_sheet(tiles)
    assert sheet.dtype == np.uint8 and sheet.any()
    assert np.array_equal(cv2.imdecode(np.frombuffer(png_bytes(sheet), np.uint8), cv2.IMREAD_COLOR)[..., ::-1], sheet)


@pytest.mark.parametrize('zoom', [1, 2, 3, 7.5, 100])
@pytest.mark.parametrize('centre', [(0, 0), (0.5, 0.5), (1, 1), (0.02, 0.98)])
def test_zoom_stays_inside_the_slice(zoom, centre):
    box = View(zoom=zoom, centre=centre).box((64, 51))
    assert min(box) >= 0 and min(box.height, box.width) >= 1
    assert box.top + box.height <= 64 and box.left + box.width <= 51


def test_magnified_pixels_stay_pixels():
    tile = np.array([[0, 1], [1, 0]], np.float32)
    assert set(np.unique(contact_sheet({'': tile})[20:])) == {0, 255}


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
    assert explorer.controls['mode'].options == view_modes() and len(pictures) == len(view_modes())


@pytest.mark.parametrize('name, value', [('slice', 2), ('window', 0.3), ('level', 0.2), ('zoom', 3), ('case', '2'),
                                         ('dataset', 'test')])
def test_every_control_changes_the_picture(explorer, name, value):
    before = explorer.picture.value
    explorer.controls[name].value = value
    assert explorer.picture.value != before


@pytest.mark.parametrize('mode, name, value', [('blend', 'alpha', 0.9), ('checkerboard', 'tile', 8),
                                               ('slices', 'across', 0.1), ('slices', 'down', 0.1)])
def test_controls_of_one_view_are_seen_only_there(explorer, mode, name, value):
    assert explorer.controls[name].layout.display == 'none'
    explorer.controls['mode'].value, explorer.controls['zoom'].value = mode, 2
    assert explorer.controls[name].layout.display is None
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
                assert dataset[explorer.index]['case'] == case
                assert dataset.names[explorer.index] in explorer.status.value


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
    monkeypatch.setattr('medfusion.explorer.contact_sheet', lambda tiles: draws.append(1) or sheet(tiles))
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
    ct, mri, fused = explorer._slices()
    wanted = largest_disagreement(list(fused.values()), size=16)
    box = explorer.view.box(ct.shape)
    assert box[2:] == (16, 16) and abs(box.top - wanted.top) <= 1 and abs(box.left - wanted.left) <= 1


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
