"""The scan viewer, driven by its events: where a marked voxel is shown, what click, wheel, opacity and nudge do, what is saved."""
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('SimpleITK')
from typer.testing import CliRunner

from medfusion import scan_viewer
from medfusion.cli import app
from medfusion.explorer import fitted_box
from medfusion.files import read_json, sha256_of, write_json
from medfusion.registration import Registration, moved, read_transform
from medfusion.scan_viewer import Crosshair, extent_of, motion_of, view_scan, voxel_at
from medfusion.scans import sitk
from medfusion.studies import FusedSeries, Study, fill_study, frame_of, record_in

COUNTS = Crosshair(sagittal=20, coronal=24, axial=16)
MARK = Crosshair(sagittal=14, coronal=6, axial=11)            # on the left, in front, above the middle
STEPS = (3., 2., 4.)


def a_study(orientation='LPS', mark_ct=MARK, mark_mri=MARK, labels=('',), verdict='given'):
    "A study of air in which one voxel of each scan is marked; its lattice lies in any way to the body."
    def volume(background, mark, value):
        values = np.full((COUNTS.axial, COUNTS.coronal, COUNTS.sagittal), background, np.float32)
        if mark:
            values[mark.axial, mark.coronal, mark.sagittal] = value
        image = sitk.GetImageFromArray(values)
        image.SetSpacing(STEPS)
        image.SetOrigin((-30., -20., 10.))
        return sitk.DICOMOrient(image, orientation)
    ct, mri = volume(-1000, mark_ct, 1000), volume(0, mark_mri, 900)
    ones = np.ones(ct.GetSize()[::-1], np.float32)
    pose = motion_of((5, -3, 2), (4, 0, 10), (0, 0, 0))
    series = [FusedSeries(label, 'made by hand', sitk.GetArrayFromImage(mri) + 10 * number, (0., 1000.), ones, Registration(pose, verdict, ['so it was made']),
                          {'brain': np.full_like(ones, .25)}, 'hash', frame_of(mri)) for number, label in enumerate(labels)]
    told = {one.label: {'description': one.description, 'frame': one.frame, 'limits': one.limits, 'verdict': verdict, 'reasons': ['so it was made'], 'signs': {},
                        'voxels_sha256': '', 'notes': []} for one in series}
    record = {'format': 'medfusion study 1', 'grid': 'ct', 'plane': 'axial', 'mri': told, 'windows': [{'name': 'brain', 'level': 40, 'width': 80}]}
    return Study(sitk.Image(ct) > 2000, sitk.GetArrayFromImage(ct), ones, series, 'axial', {}, record)


def layers(viewer, **opacity):
    "The viewer with these opacities."
    with viewer.changes.together():
        for name, value in opacity.items():
            viewer.layers[name].opacity.value = value
    return viewer


def go_to(viewer, at):
    with viewer.changes.together():
        for plane, number in at._asdict().items():
            viewer.planes[plane].value = number + 1


def pixels(viewer):
    return np.asarray(Image.open(io.BytesIO(viewer.picture.value))).astype(int)


def tiles(viewer, picture):
    "The pictures {plane: (side, side, 3)} on the sheet, without captions."
    side, gap = viewer.sheet.side, viewer.sheet.gap
    return {plane: picture[24:24 + side, number * (side + gap):][:, :side] for number, plane in enumerate(viewer.planes)}


def marked_place(viewer, blank, plane='axial'):
    "Where (down, across of the tile, in pixels) a picture is brighter than that of a viewer without the mark."
    part = tiles(viewer, np.clip(pixels(viewer) - pixels(blank), 0, None))[plane][..., 2]
    return np.argwhere(part > max(part.max() / 2, 20)).mean(0)


def click(viewer, plane, down, across, kind='mousedown', **more):
    number = list(viewer.planes).index(plane)
    viewer.mouse.act({'type': kind, 'dataX': across + number * (viewer.sheet.side + viewer.sheet.gap), 'dataY': down + 24, 'buttons': 1} | more)


@pytest.mark.parametrize('scan,orientation', [('CT', 'LPS'), ('MRI', 'RAI'), ('CT', 'SAR'), ('MRI', 'PIL')])
def test_a_marked_voxel_is_shown_where_the_letters_say(scan, orientation):
    show = {'CT': 1. * (scan == 'CT'), 'MRI': 1. * (scan == 'MRI'), 'fused': 0.}
    viewer, blank = (layers(view_scan(a_study(orientation, mark, mark)), **show) for mark in (MARK, None))
    for one in (viewer, blank):
        go_to(one, MARK)
    places, side = {plane: marked_place(viewer, blank, plane) for plane in viewer.planes}, viewer.sheet.side
    left_of = {plane: place[1] < side / 2 for plane, place in places.items()}
    above = {plane: place[0] < side / 2 for plane, place in places.items()}
    assert left_of == {'axial': False, 'coronal': False, 'sagittal': True}         # R|L, R|L, A|P
    assert above == {'axial': True, 'coronal': True, 'sagittal': True}             # A over P, S over I
    for plane, (down, across) in places.items():
        box, pixel = fitted_box(extent_of(viewer.scans.grid, plane), side), MARK.pixel(plane, COUNTS)
        shape = viewer.scans.at(plane, 0, 'brain')['CT'].shape
        wanted = [start + (at + .5) / count * length for start, at, count, length in zip((box.top, box.left), pixel, shape, (box.height, box.width))]
        assert np.abs(np.subtract((down, across), wanted)).max() < 6
        go_to(viewer, Crosshair(0, 0, 0)._replace(**{plane: getattr(MARK, plane)}))
        click(viewer, plane, down, across)
        assert viewer.crosshair == MARK                                            # and all three planes follow
    point = viewer.scans.grid.TransformIndexToPhysicalPoint(voxel_at(viewer.scans.grid, MARK))
    assert np.allclose(point, np.array((-30, -20, 10)) + np.array(STEPS) * (MARK.sagittal, MARK.coronal, MARK.axial), atol=1e-4)
    assert viewer.values.value.startswith('L 12.0, A 8.0, S 54.0 mm: CT 1000 HU, MRI 900')


def test_proportions_are_those_of_the_body():
    viewer = view_scan(a_study())
    assert extent_of(viewer.scans.grid, 'axial') == (48., 60.) and extent_of(viewer.scans.grid, 'sagittal') == (64., 48.)
    shown = tiles(viewer, pixels(layers(viewer, fused=1.)))['axial'][..., 2] > 40
    down, across = (np.flatnonzero(shown[60:-60, 60:-60].any(axis)).size for axis in (1, 0))
    height = np.flatnonzero(shown[:, 100]).size
    assert abs(height / viewer.sheet.side - 48 / 60) < .02 and across >= down


def test_the_wheel_goes_through_the_slices_and_stops_at_the_last():
    viewer = view_scan(a_study())
    go_to(viewer, MARK)
    click(viewer, 'coronal', 100, 100, 'wheel', deltaY=-3)
    assert viewer.crosshair == MARK._replace(coronal=MARK.coronal + 1)
    for _ in range(40):
        click(viewer, 'axial', 100, 100, 'wheel', deltaY=3)
    assert viewer.crosshair.axial == 0
    before = viewer.crosshair
    click(viewer, 'axial', -10, 100)                          # on the caption
    click(viewer, 'axial', 200, 200, 'mousemove', buttons=0)  # the mouse passes by
    assert viewer.crosshair == before


def test_the_values_under_the_mouse_are_told_without_a_click():
    viewer, blank = (layers(view_scan(a_study('LPS', mark, mark)), CT=1., MRI=0., fused=0.) for mark in (MARK, None))
    for one in (viewer, blank):
        go_to(one, MARK)
    places = {plane: marked_place(viewer, blank, plane) for plane in viewer.planes}
    for plane, (down, across) in places.items():
        away = Crosshair(0, 0, 0)._replace(**{plane: getattr(MARK, plane)})
        go_to(viewer, away)
        beside = viewer.values.value
        click(viewer, plane, down, across, 'mousemove', buttons=0)
        assert viewer.values.value.startswith('L 12.0, A 8.0, S 54.0 mm: CT 1000 HU, MRI 900') and viewer.crosshair == away
        click(viewer, plane, down, across, 'mouseleave', buttons=0)
        assert viewer.values.value == beside, 'that of the crosshair again'


def test_opacity_window_and_colours_of_each_layer():
    viewer = layers(view_scan(a_study()), CT=0., MRI=0., fused=1.)
    middle = lambda: tiles(viewer, pixels(viewer))['axial'][100, 100]
    assert np.abs(middle() - .25 * 255).max() < 2
    viewer.layers['fused'].window.value = (0., .5)
    assert np.abs(middle() - .5 * 255).max() < 2
    viewer.layers['fused'].opacity.value = .5
    assert np.abs(middle() - .25 * 255).max() < 2
    viewer.layers['fused'].colours.value = 'hot'
    red, _, blue = middle()
    assert red > blue + 50
    assert middle().max() > 0 and layers(viewer, fused=0.) and middle().max() == 0
    layers(viewer, CT=1.)
    viewer.layers['CT'].window.value = (-1024., -976.)        # air is the middle of it
    assert np.abs(middle() - 128).max() < 3
    viewer.layers['CT'].source.value = 'bone'
    assert viewer.layers['CT'].window.value == (-770., 1730.) and middle().max() == 0


def test_a_nudge_moves_the_mri_and_the_pose_by_as_much():
    viewer, blank = (layers(view_scan(a_study(mark_mri=mark)), CT=0., MRI=1., fused=0.) for mark in (MARK, None))
    registered = viewer.scans.mri.study_pose
    go_to(blank, MARK)
    go_to(viewer, MARK)
    before = marked_place(viewer, blank)
    for one in (viewer, blank):
        one.nudge.set((-6., 4., 0.))
    there = marked_place(viewer, blank) - before
    assert np.allclose(there * 60 / viewer.sheet.side, (4, -6), atol=.3)      # mm: back is down, right is left
    for values in (((-6., 4., 0.), (0., 0., 0.)), ((3., 1., -7.), (10., -5., 20.))):
        viewer.nudge.set(*values)
        motion = motion_of(*values, viewer.scans.centre)
        points = np.array([(0., 0., 0.), (30., -20., 50.), (-10., 40., 5.)])
        assert np.allclose(moved(viewer.scans.mri.pose, moved(motion, points)), moved(registered, points), atol=1e-3)
    assert 'by hand' in viewer.status.value and 'not judged' in viewer.status.value
    viewer.nudge.reset.click()
    assert viewer.nudge.values == ((0, 0, 0), (0, 0, 0)) and not viewer.scans.mri.is_moved
    blank.nudge.reset.click()
    assert np.allclose(marked_place(viewer, blank), before, atol=1)


def test_the_checkerboard_follows_and_the_stale_fused_volume_is_not_shown():
    viewer = view_scan(a_study())
    go_to(viewer, MARK)
    viewer.mode.value = 'checkerboard'
    before = pixels(viewer)
    assert 'fused' in viewer.values.value
    viewer.nudge.mm[1].value = 5.
    assert not np.array_equal(pixels(viewer), before)
    viewer.mode.value = 'layers'
    assert 'fused' not in viewer.values.value and 'fused volume is not shown' in viewer.status.value


def test_what_is_saved_is_read_back_and_replaces_nothing(tmp_path):
    viewer = view_scan(fill_study(tmp_path, a_study()))
    present = {path.name for path in tmp_path.iterdir()}
    viewer.nudge.set((0, 0, 3), (2, 0, 0))
    viewer.nudge.save.click()
    viewer.nudge.save.click()
    assert {path.name for path in tmp_path.iterdir()} - present == {'mri_to_ct_nudged.tfm', 'mri_to_ct_nudged1.tfm'}
    points = np.array([(0., 0., 0.), (30., -20., 50.)])
    assert np.allclose(moved(read_transform(tmp_path / 'mri_to_ct_nudged.tfm'), points), moved(viewer.scans.mri.pose, points), atol=1e-6)
    assert 'medfusion scan CT MRI --transform' in viewer.status.value and viewer.nudge.refine.disabled


def test_a_transform_that_cannot_be_saved_is_told(tmp_path):
    "JupyterLab shows nothing of what a button raises."
    (tmp_path / 'study').mkdir()
    viewer = view_scan(fill_study(tmp_path / 'study', a_study()))
    shutil.rmtree(tmp_path / 'study')
    (tmp_path / 'study').write_text('no folder any more')
    viewer.nudge.save.click()
    assert 'study' in viewer.status.value and 'Saved' not in viewer.status.value and viewer.status.value.startswith('<b>')


def test_refine_begins_where_the_mri_was_moved_to(monkeypatch):
    study, asked = a_study(), []
    found = Registration(motion_of((1, 1, 1), (0, 0, 0), (0, 0, 0)), 'doubtful', ['halves lie 5 mm apart'])
    monkeypatch.setattr(scan_viewer, 'register', lambda ct, mri, start: asked.append(start) or found)
    viewer = view_scan(study, study.grid, {'': study.grid})
    viewer.nudge.set((7, 0, 0))
    start = viewer.scans.mri.pose
    viewer.nudge.refine.click()
    assert np.allclose(asked[0].TransformPoint((1., 2., 3.)), start.TransformPoint((1., 2., 3.)))
    assert viewer.scans.mri.pose is found.transform and viewer.nudge.values == ((0, 0, 0), (0, 0, 0)) and 'halves lie 5 mm apart' in viewer.status.value
    monkeypatch.setattr(scan_viewer, 'register', lambda *scans, start: (_ for _ in ()).throw(ValueError('No head was found.')))
    viewer.nudge.refine.click()
    assert 'No head was found.' in viewer.status.value


@pytest.mark.parametrize('verdict,red', [('good', False), ('given', False), ('doubtful', True), ('failed', True)])
def test_the_verdict_stands_on_the_picture(verdict, red):
    viewer = view_scan(a_study(verdict=verdict))
    strip = pixels(viewer)[-24:].max((0, 1))
    assert (strip[0] > strip[1] + 80) == red and strip[0] > 200
    assert verdict in viewer.status.value and verdict in repr(viewer)


def test_a_window_in_which_was_fused_is_shown_as_wide_as_it_is():
    study = a_study()
    study.record['windows'] = [{'name': '480_8000', 'level': 480, 'width': 8000}]
    assert view_scan(study).layers['CT'].window.value == (-3520, 4480)


def test_a_study_in_which_nothing_was_fused_is_shown(tmp_path):
    study = a_study(verdict='failed')
    study.series[0].fused.clear()
    study.record['windows'] = [{'name': '30_100', 'level': 30., 'width': 100.}]
    viewer = view_scan(fill_study(tmp_path, study))
    assert viewer.layers['fused'].look.opacity == 0 and viewer.layers['CT'].window.value == (-20., 80.)
    assert 'fused' not in viewer.values.value and 'fused volume is not shown' in viewer.status.value


def test_several_series_are_chosen_by_name(tmp_path):
    viewer = view_scan(fill_study(tmp_path, a_study(labels=('T1', 'T2'))))
    viewer.nudge.mm[0].value = 4.
    assert 'MRI 0' in viewer.values.value
    viewer.layers['MRI'].source.value = 'T2'
    assert viewer.scans.mri.series.label == 'T2' and viewer.nudge.values[0] == (0, 0, 0) and 'MRI 10' in viewer.values.value
    viewer.nudge.save.click()
    assert (tmp_path / 'mri_to_ct_T2_nudged.tfm').is_file()


def test_scans_to_refine_have_the_names_of_the_series():
    study, scan = a_study(labels=('T1', 'T2')), a_study().grid
    for mri in (scan, {'T1': scan}, {'t1': scan, 't2': scan}):
        with pytest.raises(ValueError, match="holds the series 'T1', 'T2'; give their scans by these names"):
            view_scan(study, scan, mri)
    assert not view_scan(study, scan, {'T1': scan, 'T2': scan}).nudge.refine.disabled
    assert not view_scan(a_study(labels=('T1',)), scan, scan).nudge.refine.disabled


def test_a_study_that_is_made_anew_is_not_mixed_with_the_one_that_is_shown(tmp_path):
    study = a_study()
    study.series[0].fused['bone'] = study.series[0].fused['brain'] / 2
    study.record['windows'].append({'name': 'bone', 'level': 480, 'width': 2500})
    viewer = view_scan(fill_study(tmp_path, study))
    (tmp_path / 'fused_bone.nii.gz').write_bytes((tmp_path / 'fused_brain.nii.gz').read_bytes())
    viewer.layers['fused'].source.value = 'bone'
    assert 'fused_bone.nii.gz is not that of the study' in viewer.status.value and 'view the study again' in viewer.status.value
    assert viewer.picture.value == b'' and viewer.picture.layout.display == 'none' and viewer.values.value == ''
    (tmp_path / 'fused_bone.nii.gz').unlink()
    viewer.planes['axial'].value = 1
    assert 'fused_bone.nii.gz is not that of the study' in viewer.status.value
    viewer.planes['axial'].value = MARK.axial
    viewer.layers['fused'].source.value = 'brain'
    assert viewer.picture.value and viewer.picture.layout.display is None


def test_the_notebook_keeps_no_picture_unless_asked():
    study = a_study()
    assert set(view_scan(study)._repr_mimebundle_()) == {'text/plain', 'application/vnd.jupyter.widget-view+json'}
    assert 'image/png' in view_scan(study, keep_picture=True)._repr_mimebundle_()


def test_what_is_no_study_is_told_in_a_sentence(tmp_path):
    run = lambda: CliRunner().invoke(app, ['view', str(tmp_path)], prog_name='medfusion')
    assert run().exit_code == 1 and 'no study that medfusion scan wrote' in run().output and 'medfusion scan CT MRI -o STUDY' in run().output
    (tmp_path / 'run.json').write_text('{"format": "something else"}')
    assert run().exit_code == 1 and 'no study' in run().output
    fill_study(tmp_path, a_study())
    for name in ('report.html', 'scan_fusion.ipynb'):         # which nobody reads: the one may go, and JupyterLab saves the other
        (tmp_path / name).write_text('as it was')
    write_json(tmp_path / 'run.json', (record := read_json(tmp_path / 'run.json')) | {'files_sha256': record['files_sha256'] | {
        name: sha256_of(tmp_path / name) for name in ('report.html', 'scan_fusion.ipynb')}})
    (tmp_path / 'report.html').unlink(), (tmp_path / 'scan_fusion.ipynb').write_text('saved again')
    assert set(record_in(tmp_path)['files_sha256']) > {'ct.nii.gz', 'report.html'}
    (tmp_path / 'ct.nii.gz').unlink()
    with pytest.raises(ValueError, match='has lost ct.nii.gz'):
        view_scan(tmp_path)
    with pytest.raises(FileNotFoundError, match='There is no folder .*/nowhere.* medfusion scan CT MRI -o STUDY'):
        view_scan(tmp_path / 'nowhere')
    for wrong in (a_study().grid, np.zeros((2, 3, 4)), None):
        with pytest.raises(ValueError, match='is of the type .* no study; give the folder that medfusion scan wrote, or what scan_fusion returned'):
            view_scan(wrong)


def test_the_command_opens_a_notebook_that_vanishes(tmp_path, monkeypatch):
    fill_study(tmp_path, a_study())
    seen = []

    class Lab:
        def __init__(self, words, **how):
            seen.append((words[-1], json.loads(scan_viewer.Path(words[-1]).read_text())))
        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None
        wait, terminate = lambda self: 0, lambda self: None
    monkeypatch.setattr(scan_viewer.subprocess, 'Popen', Lab)
    assert CliRunner().invoke(app, ['view', str(tmp_path)], prog_name='medfusion').exit_code == 0
    path, notebook = seen[0]
    assert str(tmp_path) in notebook['cells'][1]['source'] and not scan_viewer.Path(path).exists()
    monkeypatch.setattr(scan_viewer, 'find_spec', lambda name: None)
    result = CliRunner().invoke(app, ['view', str(tmp_path)], prog_name='medfusion')
    assert result.exit_code == 1 and 'pip install jupyterlab' in result.output and 'view_scan(' in result.output
