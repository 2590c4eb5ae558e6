"""Reading scans: every odd folder gives the right volume with a sentence, or a refusal that names series, place and remedy; never silence.

Files are made here, with values that are a linear function of the place in space. So wherever a voxel ends up, it says whether it is there by right:
interpolating does not change a linear function.
"""
import gzip
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.uid import (CTImageStorage, DeflatedExplicitVRLittleEndian, EnhancedCTImageStorage, EnhancedMRImageStorage, ExplicitVRBigEndian,
                         ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, generate_uid)

from scipy.ndimage import binary_erosion
from scipy.spatial.transform import Rotation

from medfusion import scans
from medfusion.scans import Scan, check_pair, decoded, dicom_header, list_series, read_scan, scan_table

AXIAL = [1, 0, 0, 0, 1, 0]
SHAPE = 12, 16      # rows, columns
SPACING = 1.5, 1.    # of rows, of columns: mm


def hounsfield(points):
    "The value at points (..., 3) in mm: linear in space, with air in it, and never −1000."
    return np.asarray(points) @ (5., 3., 8.) - 900.25


def axes(orientation):
    across, down = np.reshape(orientation, (2, 3)).astype(float)
    return np.stack([across, down, np.cross(across, down)], 1)


def slice_points(position, orientation, shape=SHAPE):
    "The points (rows, columns, 3) of the pixels of a slice."
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    return position + (columns[..., None] * SPACING[1]) * axes(orientation)[:, 0] + (rows[..., None] * SPACING[0]) * axes(orientation)[:, 1]


def made(position, orientation=AXIAL, slope=.25, intercept=-1300., values=None, **more):
    "A CT slice at a position; `values` (HU) are those of the place if not given. Further tags by keyword; None removes one."
    shape = SHAPE if values is None else values.shape
    values = hounsfield(slice_points(position, orientation)) if values is None else values
    one = pydicom.Dataset()
    one.update({'SOPClassUID': CTImageStorage, 'SOPInstanceUID': generate_uid(), 'Modality': 'CT', 'PatientID': 'P-4711', 'PatientName': 'Doe^Jane',
                'SeriesInstanceUID': '1.2.3', 'FrameOfReferenceUID': '1.2.4', 'SeriesDescription': 'head', 'ImageType': ['ORIGINAL', 'PRIMARY', 'AXIAL'],
                'ImagePositionPatient': [float(f'{x:.9g}') for x in position], 'ImageOrientationPatient': [float(f'{x:.9g}') for x in orientation],
                'PixelSpacing': list(SPACING), 'Rows': shape[0], 'Columns': shape[1], 'SamplesPerPixel': 1, 'PhotometricInterpretation': 'MONOCHROME2',
                'BitsAllocated': 16, 'BitsStored': 16, 'HighBit': 15, 'PixelRepresentation': 0, 'RescaleSlope': slope, 'RescaleIntercept': intercept})
    stored = np.rint((values - (intercept or 0)) / (slope or 1)).astype(np.int64)
    one.PixelData = (stored & 0xFFFF).astype('<u2').tobytes()
    for name, value in more.items():
        if value is None:
            delattr(one, name)
        else:
            setattr(one, name, value)
    for name in ('RescaleSlope', 'RescaleIntercept'):
        if one.get(name, 0) is None:
            delattr(one, name)
    return one


def save(one, path, syntax=ExplicitVRLittleEndian):
    one.file_meta = pydicom.dataset.FileMetaDataset()
    one.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        one.PixelData = np.frombuffer(one.PixelData, '<u2').astype('>u2').tobytes()
    one.save_as(path, enforce_file_format=True)


def stack_positions(count=6, step=3., orientation=AXIAL, start=(-8., -6., 0.)):
    return [np.array(start) + index * step * axes(orientation)[:, 2] for index in range(count)]


def write(folder, slices, syntax=ExplicitVRLittleEndian):
    "Writes slices under names and instance numbers that have nothing to do with their order."
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(len(slices))
    for one, name in zip(slices, order):
        one.InstanceNumber = int(order[-1 - name]) + 1
        save(one, folder / f'{len(list(folder.iterdir())):02d}-{name}', syntax)
    return folder


def assert_right(scan, tolerance=.5, least=.99, outside=-1000.):
    "Each voxel that was seen has the value of its place; at least a share of `least` was seen; the axes are right-handed."
    image, values = scan.image, sitk.GetArrayFromImage(scan.image)
    assert image.GetPixelID() == sitk.sitkFloat32
    direction = np.reshape(image.GetDirection(), (3, 3))
    assert np.linalg.det(direction) > 0
    index = np.moveaxis(np.indices(values.shape)[::-1], 0, -1) * image.GetSpacing()
    wanted = hounsfield(index @ direction.T + image.GetOrigin())
    seen = values != outside
    inner = seen if least > .98 else binary_erosion(seen, np.ones((1, 3, 1)))     # at the edge of what was seen, air is mixed in
    wrong = np.abs(values - wanted)[inner] > tolerance
    assert seen.mean() >= least and not wrong.any(), (seen.mean(), wrong.mean())
    return values, seen


def assert_refused(path, *words, **options):
    with pytest.raises(ValueError) as caught:
        read_scan(path, **options)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert 'Doe' not in text and '4711' not in text and '\n' not in text
    return text


def notes(scan):
    return ' '.join(scan.notes)


# Order and orientation

ORIENTATIONS = {'axial': AXIAL, 'coronal': [1, 0, 0, 0, 0, -1], 'sagittal': [0, 1, 0, 0, 0, -1], 'from below': [-1, 0, 0, 0, 1, 0],
                'oblique': [.8, .6, 0, -.36, .48, .8]}


@pytest.mark.parametrize('orientation', ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize('feet_first', [False, True])
def test_slices_are_sorted_by_their_place(tmp_path, orientation, feet_first):
    places = stack_positions(orientation=orientation)[::-1 if feet_first else 1]
    scan = read_scan(write(tmp_path, [made(place, orientation, PatientPosition='FFS' if feet_first else 'HFS') for place in places]))
    assert_right(scan)
    assert scan.image.GetSize() == (16, 12, 6) and scan.is_hu and scan.modality == 'CT' and scan.description == 'head' and not scan.notes
    np.testing.assert_allclose(scan.image.GetSpacing(), (1, 1.5, 3), atol=1e-6)
    assert [np.allclose(one.ImagePositionPatient, place, atol=1e-6) for one, place in
            zip(scan.reference, sorted(places, key=lambda place: place @ axes(orientation)[:, 2]))] == [True] * 6


def test_an_orientation_of_three_decimals_is_one(tmp_path):
    "As some scanners write it; of those of heads one in fourteen was called no valid orientation."
    orientation = [.893, -.41, .185, .449, .805, -.386]
    assert_right(read_scan(write(tmp_path / 'a', [made(place, orientation) for place in stack_positions(orientation=orientation)])))
    assert_refused(write(tmp_path / 'b', [made(place, [1, 0, 0, .004, 1, 0]) for place in stack_positions()]), 'no valid ImageOrientationPatient')


def test_an_orientation_of_three_decimals_does_not_lean(tmp_path):
    "Over a whole head its rounding moves the last slice by more than 0.1 mm: the stack was said to lean by 0.0°, and resampled."
    exact = Rotation.from_euler('xyz', (21, -19, -1), degrees=True).as_matrix()
    slices = [made(np.array([-8., -6., 0.]) + 5. * index * exact[:, 2], (*exact[:, 0], *exact[:, 1])) for index in range(40)]
    for one in slices:
        one.ImageOrientationPatient = [round(float(x), 3) for x in one.ImageOrientationPatient]
    scan = read_scan(write(tmp_path, slices))
    assert_right(scan)
    assert scan.image.GetSize() == (16, 12, 40) and not scan.notes
    np.testing.assert_allclose(np.reshape(scan.image.GetDirection(), (3, 3))[:, 2], exact[:, 2], atol=1e-6)


def test_other_files_are_ignored_and_the_folder_is_searched_whole(tmp_path):
    write(tmp_path / 'a' / 'deep', [made(place) for place in stack_positions()])
    (tmp_path / 'notes.txt').write_text('DICM is not at its place')
    (tmp_path / 'empty').touch()
    structures = pydicom.Dataset()
    structures.update({'SOPClassUID': '1.2.840.10008.5.1.4.1.1.481.3', 'SOPInstanceUID': '1.2', 'Modality': 'RTSTRUCT'})
    save(structures, tmp_path / 'structures.dcm')
    save(made((-8., -6., 2.), Modality='SEG'), tmp_path / 'segmentation.dcm')
    directory = pydicom.Dataset()
    directory.update({'FileSetID': 'X', 'SOPClassUID': '1.2.840.10008.1.3.10', 'SOPInstanceUID': '1.3'})
    save(directory, tmp_path / 'DICOMDIR')
    scan = read_scan(tmp_path)
    assert_right(scan)
    assert 'RTSTRUCT' in notes(scan) and 'SEG' in notes(scan) and 'no scans' in notes(scan)


def test_links_to_folders_are_followed_and_each_file_is_read_once(tmp_path):
    "As in a data lake, or an annex: the series is elsewhere, linked by folder and by file, and a link leads back up."
    lake, study = tmp_path / 'lake', tmp_path / 'study'
    write(lake / 'ct', [made(place) for place in stack_positions()])
    nifti(lake / 'a.nii', turned())
    study.mkdir()
    (study / 'head').symlink_to(lake, target_is_directory=True)
    (study / 'zz again').symlink_to(lake / 'ct', target_is_directory=True)
    (study / 'one slice').symlink_to(next((lake / 'ct').iterdir()))
    (lake / 'back').symlink_to(study, target_is_directory=True)
    (lake / 'gone').symlink_to(tmp_path / 'nowhere')
    (lake / 'up').symlink_to(tmp_path, target_is_directory=True)
    write(tmp_path / 'somebody else', [made(place, SeriesInstanceUID='1.2.9') for place in stack_positions()])
    scan = read_scan(study)
    assert_right(scan)
    assert notes(scan) == '1 file(s) beside it could not be read and were left out.'
    assert [row['size'] for row in scan_table(study)] == ['16×12×6', '16×12×6'] and 'gone is a link to a file that is not there' in scan_table(study)[0]['notes']


def test_a_folder_that_may_not_be_looked_into_is_told(tmp_path, monkeypatch):
    "On a server of many users; what is in it was missing without a word."
    write(tmp_path / 'seen', [made(place) for place in stack_positions()])
    write(tmp_path / 'closed', [made(place, SeriesInstanceUID='1.2.9') for place in stack_positions()])

    def scandir(place, look=os.scandir):
        if str(place).endswith('closed'):
            raise PermissionError(13, 'Permission denied', str(place))
        return look(place)
    monkeypatch.setattr(os, 'scandir', scandir)
    assert 'closed is a folder that may not be looked into' in scan_table(tmp_path)[0]['notes']
    scan = read_scan(tmp_path)
    assert_right(scan)
    assert notes(scan) == '1 file(s) beside it could not be read and were left out.'
    assert_refused(tmp_path / 'closed', 'holds no DICOM images', 'closed is a folder that may not be looked into')


def test_a_folder_whose_files_may_be_listed_and_not_opened_is_told(tmp_path, monkeypatch):
    "With the right to read and none to enter: the table of the whole folder was an error that was not foreseen."
    write(tmp_path / 'seen', [made(place) for place in stack_positions()])
    write(tmp_path / 'closed', [made(place, SeriesInstanceUID='1.2.9') for place in stack_positions()])
    ask = os.access
    monkeypatch.setattr(os, 'access', lambda place, mode: not str(place).endswith('closed') and ask(place, mode))
    assert 'closed is a folder that may not be looked into; see to it that you may enter it' in scan_table(tmp_path)[0]['notes']
    assert_right(read_scan(tmp_path))
    assert_refused(tmp_path / 'closed', 'holds no DICOM images', 'closed is a folder that may not be looked into')


def test_links_that_lead_nowhere_are_told(tmp_path):
    "As in an annex of which nothing was fetched."
    (tmp_path / 'a.nii.gz').symlink_to(tmp_path / 'nowhere')
    assert 'Unpack' not in assert_refused(tmp_path, 'a.nii.gz is a link to a file that is not there')


def test_a_jitter_of_micrometres_is_no_gap(tmp_path):
    jitter = np.random.default_rng(1).uniform(-4e-3, 4e-3, 6)
    assert_right(read_scan(write(tmp_path, [made(place + (0, 0, by)) for place, by in zip(stack_positions(), jitter)])))


def test_places_rounded_to_a_tenth_of_a_millimetre_are_no_gaps(tmp_path):
    rng = np.random.default_rng(2)
    for step, count in ((1.25, 24), (.625, 24), (3., 5), (2.43, 40)):
        for kind in ('rounded', 'jitter'):
            at = [step * index for index in range(count)]
            at = np.round(at, 1) if kind == 'rounded' else at + rng.uniform(-.04, .04, count)
            scan = read_scan(write(tmp_path / f'{kind} {step}', [made((-8., -6., place)) for place in at]))
            assert scan.image.GetSize()[2] == count and abs(scan.image.GetSpacing()[2] - step) < .03 and not scan.notes
    gap = [np.round(1.25 * index, 1) for index in range(24) if index != 9]
    assert_refused(write(tmp_path / 'gap', [made((-8., -6., place)) for place in gap]), 'missing or uneven')


# Tilted gantry

@pytest.mark.parametrize('tag', [None, 18.5])
@pytest.mark.parametrize('sign', [1, -1])
def test_a_tilted_gantry_is_set_upright(tmp_path, tag, sign):
    angle = np.deg2rad(18.5) * sign
    orientation = [1, 0, 0, 0, np.cos(angle), np.sin(angle)]
    slices = [made(np.array([-8., -6., 3. * index]), orientation, GantryDetectorTilt=tag) if tag else made(np.array([-8., -6., 3. * index]), orientation)
              for index in range(6)]
    scan = read_scan(write(tmp_path, slices))
    assert_right(scan, least=.6)                                  # .5 HU are .05 mm
    assert 'leans by 18.5°' in notes(scan) and scan.image.GetSize()[1] > 12


def test_a_tag_of_tilt_that_the_geometry_denies_is_said(tmp_path):
    assert 'positions show none' in notes(read_scan(write(tmp_path, [made(place, GantryDetectorTilt=12) for place in stack_positions()])))


# Gaps

@pytest.mark.parametrize('kept, words', [
    ([0, 1, 3, 4, 5], ['6.00 mm from 3.0 to 9.0 mm']),
    ([0, 1, 3, 4, 5, 6, 9, 10, 11], ['from 3.0 to 9.0', '9.00 mm from 18.0 to 27.0 mm']),
])
def test_missing_slices_are_refused_by_place_and_filled_on_demand(tmp_path, kept, words):
    places = stack_positions(12)
    write(tmp_path, [made(places[index]) for index in kept])
    assert_refused(tmp_path, 'Series 1', 'head', 'missing', 'fill_gaps=True', *words)
    scan = read_scan(tmp_path, fill_gaps=True)
    assert_right(scan)
    assert scan.image.GetSize()[2] == kept[-1] + 1 and 'interpolated' in notes(scan)
    assert 'missing' in scan_table(tmp_path)[0]['notes']


def test_steps_of_3_then_5_mm(tmp_path):
    heights = [0, 3, 6, 9, 14, 19, 24]
    write(tmp_path, [made(np.array([-8., -6., z])) for z in heights])
    assert_refused(tmp_path, '5.00 mm from 9.0 to 14.0 mm')
    scan = read_scan(tmp_path, fill_gaps=True)
    assert_right(scan)
    assert scan.image.GetSpacing()[2] == 3 and scan.image.GetSize()[2] == 9


@pytest.mark.parametrize('heights, step, count', [
    ([0, 3, 6, 6.05, 9, 12, 15], 2.95, 6),                       # a slice that was made twice, at nearly one place
    ([0, 3, 6, 9.4, 12, 15, 18], 2.6, 7),                        # one that is displaced
    ([0, .1, 3, 3.1, 6, 6.1, 9, 9.1], 2.9, 4),                   # two passes
    ([0, 3, 9, 12, 18, 21], 3, 8), ([0, 5, 8, 11, 14, 24, 34, 44, 54, 64], 3, 22),
], ids=['twice', 'displaced', 'two passes', 'every third missing', 'finer in part'])
def test_a_slice_too_many_makes_no_grid_of_thousands(tmp_path, heights, step, count):
    scan = read_scan(write(tmp_path, [made(np.array([-8., -6., z])) for z in heights]), fill_gaps=True)
    assert_right(scan)
    assert scan.image.GetSpacing()[2] == pytest.approx(step, abs=1e-6) and scan.image.GetSize()[2] == count


def test_a_gap_in_a_tilted_stack(tmp_path):
    orientation = [1, 0, 0, 0, np.cos(.3), np.sin(.3)]
    write(tmp_path, [made(np.array([-8., -6., 3. * index]), orientation) for index in (0, 1, 2, 4, 5)])
    assert_refused(tmp_path, 'missing')
    scan = read_scan(tmp_path, fill_gaps=True)
    assert scan.image.GetSize()[2] == 6 and 'leans' in notes(scan) and 'interpolated' in notes(scan)


def test_a_slice_beside_the_line_is_refused(tmp_path):
    places = stack_positions()
    places[3] = places[3] + (4., 0, 0)
    assert_refused(write(tmp_path, [made(place) for place in places]), '9.0 mm', 'beside the line')


# One position twice

def test_slices_beside_each_other_are_no_tilted_gantry(tmp_path):
    assert_refused(write(tmp_path, [made(np.array([-8. + 9 * index, -6., 3. * index])) for index in range(4)]), 'beside each other', '72°')


def test_copies_are_dropped_with_a_word(tmp_path):
    places = stack_positions()
    scan = read_scan(write(tmp_path, [made(place) for place in [*places, places[2], places[2]]]))
    assert_right(scan)
    assert scan.image.GetSize()[2] == 6 and '2 of its slices were copies' in notes(scan)


def test_a_copy_that_was_compressed_is_a_copy(tmp_path):
    write(tmp_path, [made(place) for place in stack_positions()])
    for index, path in enumerate(sorted(tmp_path.iterdir())[:3]):
        packed = pydicom.dcmread(path)
        packed.compress(RLELossless, generate_instance_uid=False)
        packed.save_as(tmp_path / f'packed{index}', enforce_file_format=True)
    scan = read_scan(tmp_path)
    assert_right(scan)
    assert scan.image.GetSize()[2] == 6 and '3 of its slices were copies' in notes(scan)


def test_slices_at_one_place_are_read_once_each(tmp_path, monkeypatch):
    "Sixty directions of diffusion were compared in pairs, and each file read as often."
    class Print(int):
        __hash__ = int.__hash__

        def __eq__(self, other):
            return compared.append(other) or int.__eq__(self, other)
    slices = [made(place, EchoTime=time, slope=1., values=np.full(SHAPE, time)) for place in stack_positions(3) for time in range(8)]
    write(tmp_path, slices)
    looked, compared, own = [], [], scans.fingerprint
    monkeypatch.setattr(scans, 'fingerprint', lambda one: looked.append(one.path) or Print(own(one)[0], 16))
    assert len(list_series(tmp_path)[0]) == 8 and len(looked) == len(set(looked)) == 24
    assert len(compared) <= 2 * len(looked)


def test_a_file_of_many_frames_at_one_place_is_read_once(tmp_path, monkeypatch):
    "A file of diffusion or of a dynamic holds hundreds to thousands of frames; it was read anew for each of them."
    places, read, own = stack_positions(3), [], scans.dicom_header
    echoes = [{'EffectiveEchoTime': 10. + time} for time in range(8) for _ in places]
    for name in ('one.dcm', 'copy.dcm'):
        save(enhanced(places * 8, modality='MR', slopes=[.25 + time / 10 for time in range(8) for _ in places], MREchoSequence=echoes), tmp_path / name)
    monkeypatch.setattr(scans, 'dicom_header', lambda path, pixels=False: (read.append(path.name) if pixels else None, own(path, pixels))[1])
    assert [len(one.slices) for one in list_series(tmp_path)[0]] == [3] * 8 and sorted(read) == ['copy.dcm', 'one.dcm']


def test_different_slices_at_one_place_are_refused(tmp_path):
    places = stack_positions()
    write(tmp_path, [*(made(place) for place in places), made(places[2], values=np.zeros(SHAPE))])
    assert_refused(tmp_path, '6.0 mm', 'twice', 'head')


@pytest.mark.parametrize('tag, one, other', [
    ('EchoTime', 10, 80), ('ImageType', ['ORIGINAL', 'PRIMARY', 'M'], ['ORIGINAL', 'PRIMARY', 'P']), ('ConvolutionKernel', 'H30', 'H70'),
    ('AcquisitionNumber', 1, 2), ('TemporalPositionIdentifier', 1, 2), ('SequenceName', '*ep_b0', '*ep_b1000t'),
    ('SliceThickness', 1, 5),
])
def test_two_volumes_in_one_series_are_told_apart(tmp_path, tag, one, other):
    slices = [made(place, **{tag: value}) for value in (one, other) for place in stack_positions()]
    for index, slice_ in enumerate(slices[6:]):
        slice_.PixelData = (np.frombuffer(slice_.PixelData, '<u2') + 4).astype('<u2').tobytes()
    write(tmp_path, slices)
    assert_refused(tmp_path, '2 volumes', tag, 'series=1')
    found = [sitk.GetArrayFromImage(read_scan(tmp_path, series=number).image) for number in (1, 2)]
    np.testing.assert_allclose(np.abs(found[0] - found[1]), 1)


@pytest.mark.parametrize('again', [range(4, 8), [5]], ids=['a rotation', 'a slice'])
def test_a_volume_is_not_split_into_its_rotations_because_one_was_repeated(tmp_path, again):
    "As a sequential CT after the head moved: it was called three volumes of four slices each, to choose one of."
    places = stack_positions(12)
    slices = [made(place, AcquisitionNumber=index // 4) for index, place in enumerate(places)]
    repeated = [made(places[index], slope=.5, AcquisitionNumber=3) for index in again]
    assert_refused(write(tmp_path, slices + repeated), f'{len(again)} of its places are taken twice', f'the first at {3 * again[0]:.1f} mm')


@pytest.mark.parametrize('tag, one, other', [('SeriesNumber', 4, 5), ('SeriesDescription', 'plain', 'contrast')])
def test_two_series_of_one_uid_are_told_apart(tmp_path, tag, one, other):
    "As a program leaves them that makes headers anonymous: no tag told them apart, the sentence said."
    slices = [made(place, **{tag: value}, slope=slope) for value, slope in ((one, .25), (other, .5)) for place in stack_positions()]
    assert_refused(write(tmp_path, slices), '2 volumes', f'{tag} {one}', f'{tag} {other}')
    assert_right(read_scan(tmp_path, series=2))


@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=lambda syntax: syntax.name)
def test_magnitude_phase_and_both_parts_of_ge_are_told_apart(tmp_path, syntax):
    "Which a slice is stands in a tag of GE's own; in those of the standard all four are the same."
    slices = []
    for kind in range(4):
        for place in stack_positions():
            slices.append(made(place, Modality='MR', slope=.25 + .05 * kind))
            slices[-1].private_block(0x43, 'GEMS_PARM_01', create=True).add_new(0x2f, 'SS', kind)
    assert_refused(write(tmp_path, slices, syntax), '4 volumes', *(f'ComplexImageComponent {kind}' for kind in ('MAGNITUDE', 'PHASE', 'REAL', 'IMAGINARY')))
    scan = read_scan(tmp_path, series='MAGNITUDE')
    assert_right(scan)
    assert {float(one.RescaleSlope) for one in scan.reference} == {.25}


def test_two_stacks_of_other_thickness_that_share_a_slice_are_told_apart(tmp_path):
    "As a CT of the head: finer in the posterior fossa."
    fossa = [made(np.array([-8., -6., 2.5 * index]), SliceThickness=2.5) for index in range(7)]
    vertex = [made(np.array([-8., -6., 15 + 5. * index]), SliceThickness=5., slope=.5) for index in range(6)]
    assert_refused(write(tmp_path, fossa + vertex), '2 volumes', 'SliceThickness 2.5', 'SliceThickness 5')
    assert read_scan(tmp_path, series='SliceThickness 5').image.GetSpacing()[2] == 5


@pytest.mark.parametrize('each', [0, .125], ids=['a volume at once', 'slice by slice'])
def test_volumes_one_after_the_other_are_told_apart_by_their_time(tmp_path, each):
    "As a CT perfusion whose volumes no other tag tells apart; what to do, the sentence said, was to remove the others by hand."
    moments = [(volume, index, place) for volume in range(3) for index, place in enumerate(stack_positions())]
    slices = [made(place, slope=.25 * (volume + 1), AcquisitionTime=f'1012{5 * volume + each * index:06.3f}') for volume, index, place in moments]
    assert_refused(write(tmp_path / 'perfusion', slices), '3 volumes', '1 of 3 by AcquisitionTime', '3 of 3 by AcquisitionTime')
    scan = read_scan(tmp_path / 'perfusion', series='2 of 3')
    assert_right(scan)
    assert {float(one.RescaleSlope) for one in scan.reference} == {.5}
    assert_refused(write(tmp_path / 'less', slices[:-1]), 'no tag tells them apart')
    for one in slices[6:]:
        one.AcquisitionTime = '101200.000'
    assert_refused(write(tmp_path / 'mixed', slices), 'no tag tells them apart')


def test_of_many_volumes_in_one_series_each_tells_of_a_few(tmp_path):
    for number in range(7):
        write(tmp_path / str(number), [made(place, values=np.full(SHAPE, 9. * number), EchoTime=10 + number) for place in stack_positions(3)])
    rows = scan_table(tmp_path)
    assert len(rows) == 7 and all(row['notes'].count('left aside') == 4 for row in rows)
    assert rows[6]['notes'].endswith('9 slice(s) of its series were left aside (3 more such parts).')


def test_empty_slices_of_two_volumes_are_no_copies(tmp_path):
    "As above a head in a series that was made, or from which the skull was taken."
    def of_echo(time, index, place):
        return made(place, EchoTime=time, Modality='MR', values=np.full(SHAPE, -1300.) if index in (0, 3) else hounsfield(slice_points(place, AXIAL)) + time)
    slices = [of_echo(time, index, place) for time in (10, 80) for index, place in enumerate(stack_positions())]
    folder = write(tmp_path, [*slices, of_echo(10, 0, stack_positions()[0])])
    for series in (1, 2):
        scan = read_scan(folder, series=series)
        assert scan.image.GetSize()[2] == 6 and scan.image.GetOrigin()[2] == 0 and '1 of its slices were copies' in notes(scan)


@pytest.mark.parametrize('tag, one, other, shift', [('EchoTime', 10, 80, 1.5), ('ContrastBolusAgent', '', 'one', 1.5), ('ContrastBolusAgent', '', 'one', 1.), ('AcquisitionNumber', 1, 2, 1.)])
def test_volumes_whose_slices_lie_between_each_other_are_told_apart(tmp_path, tag, one, other, shift):
    "As two acquisitions between which the table moved: they became one volume, which was half without and half with contrast."
    early = [made(place, **{tag: one}) for place in stack_positions()]
    late = [made(place, **{tag: other}) for place in stack_positions(7, start=(-8., -6., shift))]
    folder = write(tmp_path, early + late)
    assert_refused(folder, '2 volumes', f'{tag} {one}'.strip(), f'{tag} {other}', '7 slices')
    scan = read_scan(folder, series=1)
    assert_right(scan)
    assert scan.image.GetSize()[2] == 7 and '6 slice(s) of its series were left aside' in notes(scan)


@pytest.mark.parametrize('tag, values', [('AcquisitionNumber', (1, 2)), ('SliceThickness', (3, 2.9999)), ('SequenceName', ('*tse2d1_15', '*tse2d1_16'))])
def test_a_volume_that_was_acquired_in_turns_is_one(tmp_path, tag, values):
    "Every other slice in another acquisition, or of a thickness that is rounded otherwise; also where the last but one is missing, which is then said."
    slices = [made(place, **{tag: values[index % 2]}) for index, place in enumerate(stack_positions(10))]
    scan = read_scan(write(tmp_path / 'whole', slices))
    assert_right(scan)
    assert scan.image.GetSize()[2] == 10
    assert_refused(write(tmp_path / 'gap', slices[:7] + slices[8:9]), 'slices are missing', 'from 18.0 to 24.0 mm')


def test_slices_at_one_place_only(tmp_path):
    write(tmp_path, [made(stack_positions()[0], AcquisitionNumber=number, values=np.full(SHAPE, number)) for number in range(4)])
    assert_refused(tmp_path, 'all its slices are at one place')


# Several things in one folder

@pytest.mark.parametrize('told', [['ORIGINAL', 'PRIMARY', 'LOCALIZER'], 'LOCALIZER'])
def test_a_localiser_in_the_series_is_left_aside(tmp_path, told):
    localisers = [made((-8., -6., 5.), [0, 1, 0, 0, 0, -1]), made((-8., -6., 50.), ImageType=told)]
    scan = read_scan(write(tmp_path, [*localisers, *(made(place) for place in stack_positions())]))
    assert_right(scan)
    assert scan.image.GetSize()[2] == 6 and 'localiser' in notes(scan) and 'left aside' in notes(scan)


@pytest.mark.parametrize('tag, value', [('SeriesInstanceUID', '1.9'), ('PatientID', 'P-4712'), ('FrameOfReferenceUID', '1.8')])
def test_two_of_something_in_a_folder_are_listed_and_chosen(tmp_path, tag, value):
    write(tmp_path, [made(place, SeriesDescription='bone') for place in stack_positions(7)])
    write(tmp_path, [made(place, **{tag: value}) for place in stack_positions()])
    assert_refused(tmp_path, '2 volumes', '1: CT bone, 7 slices', '2: CT head, 6 slices', 'series=1')
    for wanted in (2, '2', 'head'):
        scan = read_scan(tmp_path, series=wanted)
        assert_right(scan)
        assert scan.description == 'head' and scan.image.GetSize()[2] == 6
    assert_refused(tmp_path, 'means none', series='knee')
    rows = scan_table(tmp_path)
    assert [(row['series'], row['what'], row['size'], row['spacing'], row['plane']) for row in rows] == [
        (1, 'CT bone', '16×12×7', '1×1.5×3', 'axial'), (2, 'CT head', '16×12×6', '1×1.5×3', 'axial')]


def test_a_number_that_no_series_has_is_not_looked_for_in_their_names(tmp_path):
    "5, the number of another list, chose 'HEAD 5.0'."
    for number, name in enumerate(('HEAD 5.0', 'BONE 1.0')):
        write(tmp_path / name, [made(place, SeriesInstanceUID=f'1.2.9.{number}', SeriesDescription=name) for place in stack_positions()])
    assert_refused(tmp_path, 'series=5 means none', 'HEAD 5.0', series='5')
    assert read_scan(tmp_path, series='5.0').description == 'HEAD 5.0'


@pytest.mark.parametrize('raised', [0, 1.5], ids=['at one place', 'between each other'])
@pytest.mark.parametrize('lost, more', [('1.2.3', {'Modality': 'MR'}), (None, {'Modality': 'MR', 'SeriesDescription': None}), (None, {'SeriesNumber': 2}),
                                        (None, {'SeriesDescription': 'neck'}), (None, {'StudyInstanceUID': '1.8'})], ids=str)
def test_series_whose_number_was_made_anonymous_are_not_mixed(tmp_path, lost, more, raised):
    "Slices of a CT and an MRI without a SeriesInstanceUID, each between two of the other, were one volume without a word."
    places = stack_positions()
    first = [made(place, SeriesInstanceUID=lost, FrameOfReferenceUID=None) for place in places]
    other = [made(place + (0, 0, raised), slope=.5, **{'SeriesInstanceUID': lost, 'FrameOfReferenceUID': None} | more) for place in places]
    series, _ = list_series(write(tmp_path, [*first, *other]))
    assert [(len(one.slices), one.fault, len({float(each.header.RescaleSlope) for each in one.slices})) for one in series] == [(6, '', 1)] * 2
    assert not any(one.notes for one in series)


def test_slices_of_two_patients_are_never_one_volume(tmp_path):
    places = stack_positions(8)
    write(tmp_path, [made(place, PatientID=f'P-{index // 4}', PatientName='X') for index, place in enumerate(places)])
    assert_refused(tmp_path, '2 volumes')


OWN_NUMBERS = [('SeriesInstanceUID',), ('FrameOfReferenceUID',), ('SeriesInstanceUID', 'FrameOfReferenceUID', 'StudyInstanceUID')]


@pytest.mark.parametrize('tags', OWN_NUMBERS, ids=str)
def test_slices_with_a_number_of_their_own_each_are_joined_where_they_are_a_stack(tmp_path, tags):
    "As a program leaves them that makes headers anonymous file by file; each was one slice, and the sentence said to name the folder that holds the others."
    slices = [made(place, **{tag: f'1.7.{number}.{index}' for number, tag in enumerate(tags)}) for index, place in enumerate(stack_positions())]
    scan = read_scan(write(tmp_path / 'whole', slices))
    assert_right(scan)
    assert scan.image.GetSize()[2] == 6 and 'Each of its 6 slices has' in notes(scan) and all(tag in notes(scan) for tag in tags[:2]) and len(scan.notes) == 1
    assert_refused(write(tmp_path / 'gap', slices[:3] + slices[4:]), 'it is one slice', tags[0], 'anonymous', 'keep')
    assert len(scan_table(tmp_path / 'gap')) == 5 and 'left aside' not in scan_table(tmp_path / 'gap')[0]['notes']


@pytest.mark.parametrize('tag, told', [('PatientID', True), ('SeriesDescription', False), ('SeriesNumber', False), ('SOPInstanceUID', False)])
def test_slices_of_other_patients_or_series_are_not_joined(tmp_path, tag, told):
    values = [11 + index for index in range(6)] if tag == 'SeriesNumber' else [f'1.{index}' for index in range(6)]
    folder = write(tmp_path, [made(place, **{'SeriesInstanceUID': f'1.7.{index}', tag: values[index]}) for index, place in enumerate(stack_positions())])
    if tag == 'SOPInstanceUID':
        assert_right(read_scan(folder))
        for mixed in ('PatientID', 'FrameOfReferenceUID', 'StudyInstanceUID'):
            assert_refused(write(tmp_path / mixed, [made(place, **{'SeriesInstanceUID': f'1.8.{index}', mixed: f'1.9.{index % 2}'}) for index, place in enumerate(stack_positions())]), 'it is one slice')
    else:
        text = assert_refused(folder, 'it is one slice')
        assert (text.count('it is one slice') == 1 and 'CT head, 6 × 1 slice(s)' in text) == (tag != 'SeriesDescription')
        assert ('PatientID' in text) == told


def test_a_series_that_is_wanted_where_there_is_none_is_told_why(tmp_path):
    assert_refused(write(tmp_path / 'one', [made(stack_positions()[0])]), 'it is one slice', series='head')
    (tmp_path / 'two').mkdir()
    path = nifti(tmp_path / 'two/a.nii.gz', turned())
    assert_refused(tmp_path / 'two', 'Name one of its files: a.nii.gz', series=2)
    assert_refused(path, 'a.nii.gz', 'one volume', 'leave series=2 out', series=2)


def test_two_patients_are_not_fused_unawares(tmp_path):
    ct = read_scan(write(tmp_path / 'a', [made(place) for place in stack_positions()]))
    same = read_scan(write(tmp_path / 'b', [made(place, Modality='MR', PatientID='P-4711 ') for place in stack_positions()]))
    other = read_scan(write(tmp_path / 'c', [made(place, Modality='MR', SeriesDescription='T1', PatientID='P-4712') for place in stack_positions()]))
    assert check_pair(ct, same) == []
    with pytest.raises(ValueError, match='different_patients=True') as caught:
        check_pair(ct, other)
    assert '4711' not in str(caught.value) and 'head' in str(caught.value) and 'T1' in str(caught.value)
    assert 'allowed' in check_pair(ct, other, different_patients=True)[0]
    assert 'cannot be told' in check_pair(ct, Scan(ct.image))[0]
    for second in (ct, Scan(ct.image, 'CT', 'head'), Scan(ct.image, '', 'head', is_hu=True)):
        with pytest.raises(ValueError, match='head.*order is CT, then MRI'):
            check_pair(ct, second, different_patients=True)


def test_nothing_that_is_shown_names_the_patient(tmp_path):
    scan = read_scan(write(tmp_path, [made(place) for place in stack_positions()]))
    shown = repr(scan) + repr(list_series(tmp_path)[0]) + str(scan_table(tmp_path)) + str(scan.protocol) + str(scan.notes) + scan.patient
    assert 'Doe' not in shown and '4711' not in shown and '1.2.4' not in repr(scan)
    assert scan.reference[0].PatientName == 'Doe^Jane' and 'PixelData' not in scan.reference[0]


def test_a_description_with_a_backslash_is_shown_as_it_is_written(tmp_path):
    "DICOM parts values there, and the table showed a list of Python's."
    scan = read_scan(write(tmp_path, [made(place, SeriesDescription=['head', 'neck']) for place in stack_positions()]))
    assert scan.description == 'head\\neck' and scan_table(tmp_path)[0]['what'] == 'CT head\\neck'


# No volume

@pytest.mark.parametrize('tags, words', [
    ({'ImagePositionPatient': None}, ['has no ImagePositionPatient', 'export']),
    ({'ImageOrientationPatient': None}, ['no valid ImageOrientationPatient', 'export']),
    ({'PixelSpacing': None}, ['no PixelSpacing', 'export']),
    ({'SamplesPerPixel': 3, 'PhotometricInterpretation': 'RGB', 'PlanarConfiguration': 0}, ['in colour']),
    ({'PhotometricInterpretation': 'PALETTE COLOR'}, ['in colour']),
    ({'ModalityLUTSequence': [pydicom.Dataset({pydicom.tag.Tag('LUTData'): pydicom.DataElement('LUTData', 'US', [7, 9])})]}, ['a table (ModalityLUTSequence)', 'RescaleSlope']),
])
def test_what_is_no_volume_is_refused(tmp_path, tags, words):
    assert_refused(write(tmp_path, [made(place, **tags) for place in stack_positions()]), 'CT head', *words)
    assert words[0] in scan_table(tmp_path)[0]['notes']


@pytest.mark.parametrize('count', [1, 3])
def test_mosaics_are_no_slices(tmp_path, count):
    "Of Siemens' functional and diffusion series: each picture is a volume, its slices side by side."
    tags = {'Modality': 'MR', 'slope': 1., 'intercept': 0., 'ImageType': ['ORIGINAL', 'PRIMARY', 'M', 'ND', 'MOSAIC']}
    places = stack_positions(count, step=.5)                    # a head that moved a little, with the scanner after it
    assert_refused(write(tmp_path, [made(place, values=np.full((24, 32), 9.), **tags) for place in places]), 'mosaic', 'NIfTI')


def test_one_slice_is_no_volume(tmp_path):
    write(tmp_path, [made(stack_positions()[0])])
    for path in (tmp_path, next(tmp_path.iterdir())):
        assert_refused(path, 'one slice', 'name the folder')


def test_a_video_is_no_volume(tmp_path):
    video = made((0., 0., 0.), SOPClassUID='1.2.840.10008.5.1.4.1.1.77.1.1.1', Modality='ES', NumberOfFrames=9, SamplesPerPixel=3,
                 ImagePositionPatient=None, ImageOrientationPatient=None)
    video.PixelData = pydicom.encaps.encapsulate([b'\0' * 100])
    video['PixelData'].is_undefined_length = True
    save(video, tmp_path / 'video', pydicom.uid.MPEG4HP41)
    assert_refused(tmp_path, 'video')


@pytest.mark.parametrize('syntax', ['1.2.840.113619.5.99', '1.2.840.10008.1.2.9'], ids=['of one maker', 'not yet known'])
def test_a_way_of_packing_that_is_not_known_hides_no_other_series(tmp_path, syntax):
    "The table of the whole folder was one sentence, that a UID is no transfer syntax."
    write(tmp_path / 'known', [made(position, SeriesInstanceUID='1.2.9') for position in stack_positions()])
    for path in write(tmp_path / 'other', [made(position) for position in stack_positions()]).iterdir():
        path.write_bytes(path.read_bytes().replace(ExplicitVRLittleEndian.encode(), syntax.encode(), 1))
    whole, refused = scan_table(tmp_path)
    assert whole['notes'] == 'whole' and syntax in refused['notes'] and 'export' in refused['notes']
    assert_right(read_scan(tmp_path))
    assert_refused(tmp_path / 'other', 'CT head', syntax, 'export')


@pytest.mark.parametrize('make, words', [
    (lambda folder: None, ['holds no DICOM images', 'Give a folder']),
    (lambda folder: (folder / 'a.txt').write_text('nothing'), ['holds no DICOM images']),
    (lambda folder: sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkInt16), str(folder / 'a.nii')), ['Name one of its files: a.nii']),
    (lambda folder: (folder / 'a.dcm.gz').write_bytes(b''), ['Unpack a.dcm.gz']),
    (lambda folder: sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkInt16), str(folder / 'a.hdr')), ['a.hdr', 'a.img', 'pair', 'one file (.nii)']),
])
def test_a_folder_without_dicom(tmp_path, make, words):
    make(tmp_path)
    assert_refused(tmp_path, *words)
    with nullcontext() if 'Name' in words[0] else pytest.raises(ValueError, match='holds no DICOM images'):
        (tmp_path / '._a.nii').write_bytes(b'of macOS')
        assert [row['where'] for row in scan_table(tmp_path)] == ['a.nii']


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / 'scan.zip').write_bytes(b'PK')
    assert_refused(tmp_path / 'scan.zip', 'Unpack scan.zip')


def test_a_pipe_or_a_device_is_no_scan(tmp_path):
    "Nothing is read from it: it might never end."
    os.mkfifo(tmp_path / 'pipe')
    os.mkfifo(tmp_path / 'pipe.nii.gz')
    for path in (tmp_path / 'pipe', tmp_path / 'pipe.nii.gz', '/dev/zero'):
        for read in (read_scan, scan_table):
            with pytest.raises(FileNotFoundError, match='is no folder or file'):
                read(path)
    assert_refused(tmp_path, 'holds no DICOM images')


def test_a_path_that_is_not_there(tmp_path):
    for path in (tmp_path / 'none', tmp_path / 'none.nii.gz'):
        with pytest.raises(FileNotFoundError, match='none'):
            read_scan(path)


# What numbers mean

def test_slope_and_intercept_of_each_slice(tmp_path):
    slices = [made(place, slope=.25 + .01 * index, intercept=-1100. - index) for index, place in enumerate(stack_positions())]
    assert_right(read_scan(write(tmp_path, slices)))


@pytest.mark.parametrize('tag', ['RescaleSlope', 'RescaleIntercept'])
def test_a_slice_that_lost_what_the_others_have_is_named(tmp_path, tag):
    slices = [made(place) for place in stack_positions()]
    delattr(slices[3], tag)
    write(tmp_path, slices)
    name = next(path.name for path in tmp_path.iterdir() if tag not in pydicom.dcmread(path))
    assert_refused(tmp_path, name, '9.0 mm', f'no {tag}')


def test_a_slice_without_a_slope_of_one_is_as_the_others(tmp_path):
    slices = [made(place, slope=1., values=np.round(hounsfield(slice_points(place, AXIAL)))) for place in stack_positions()]
    del slices[2].RescaleSlope
    assert_right(read_scan(write(tmp_path, slices)), tolerance=.6)


@pytest.mark.parametrize('tag, value', [('RescaleSlope', [1, 1]), ('RescaleIntercept', [0, 1]), ('GantryDetectorTilt', [1, 2]), ('SamplesPerPixel', [1, 1]),
                                        ('NumberOfFrames', [1, 1]), ('Rows', [12, 12]), ('Columns', [16, 16]), ('BitsStored', [16, 16]),
                                        ('PhotometricInterpretation', ['MONOCHROME2', 'RGB']), ('SeriesInstanceUID', ['1.2.3', '1.2.4']),
                                        ('StudyInstanceUID', ['1.2.3', '1.2.4']), ('FrameOfReferenceUID', ['1.2.3', '1.2.4'])])
def test_two_values_where_one_belongs(tmp_path, tag, value):
    slices = [made(place) for place in stack_positions()]
    setattr(slices[5], tag, value)
    write(tmp_path, slices)
    name = next(path.name for path in tmp_path.iterdir() if isinstance(pydicom.dcmread(path).get(tag), (list, pydicom.multival.MultiValue)))
    assert read_scan(tmp_path).image.GetSize()[2] == 5
    assert_refused(tmp_path / name, name, tag, 'several')
    assert scan_table(tmp_path)


@pytest.mark.parametrize('tag, right, wrong', [('GantryDetectorTilt', b'-18.5', b'-18,5'), ('RescaleSlope', b'0.25', b'0,25'), ('RescaleIntercept', b'-1300.0', b'nan    '),
                                               ('NumberOfFrames', b'\x08\x00IS\x02\x001', b'\x08\x00IS\x02\x00I')])
def test_text_where_a_number_belongs(tmp_path, tag, right, wrong):
    "A decimal comma, as programs of some countries write: the table of the whole folder was lost for it, or no file was named."
    write(tmp_path / 'other', [made(place, SeriesInstanceUID='1.2.9') for place in stack_positions()])
    for path in write(tmp_path / 'text', [made(place, GantryDetectorTilt=-18.5, NumberOfFrames=1) for place in stack_positions()]).iterdir():
        data = path.read_bytes()
        assert data.count(right) == 1
        path.write_bytes(data.replace(right, wrong))
    assert_right(read_scan(tmp_path))
    assert len(scan_table(tmp_path)) == 1
    assert_refused(tmp_path / 'text', path.name, tag, 'no number', 'export it again')


@pytest.mark.parametrize('tag, kind, value', [('Rows', 'LO', 'abc'), ('Columns', 'LO', '16'), ('SamplesPerPixel', 'LO', 'abc'), ('BitsStored', 'LO', 'abc'), ('HighBit', 'LO', 'abc'),
                                               ('ImageType', 'FD', 1.5), ('ImageType', 'OB', b'ORIGINAL')])
def test_a_tag_of_another_kind_than_it_has(tmp_path, tag, kind, value):
    "As a damaged header has it: the table of the whole folder was lost for it."
    write(tmp_path / 'other', [made(place, SeriesInstanceUID='1.2.9') for place in stack_positions()])
    slices = [made(place) for place in stack_positions()]
    for one in slices:
        del one[tag]
        one.add_new(pydicom.datadict.tag_for_keyword(tag), kind, value)
    write(tmp_path / 'kind', slices)
    assert {row['where'] for row in scan_table(tmp_path)} >= {'other'}
    assert_right(read_scan(tmp_path, series='1.2.9'))
    if tag == 'ImageType':
        assert_right(read_scan(tmp_path / 'kind'))
    else:
        assert_refused(tmp_path / 'kind', tag, 'no whole number', 'export it again')


@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, RLELossless], ids=lambda syntax: syntax.name)
@pytest.mark.parametrize('tag, value', [('BitsAllocated', 65535), ('BitsStored', 0), ('BitsStored', 17)])
@pytest.mark.parametrize('padding', [{}, {'PixelPaddingValue': 0}], ids=['', 'padding'])
def test_bits_that_cannot_be_are_refused(tmp_path, syntax, tag, value, padding):
    "Of compressed pixels the bits were pushed out without a word, so that every voxel had one value."
    for index, place in enumerate(stack_positions(3)):
        one = made(place, **padding)
        save(one, tmp_path / f'IM{index}')
        if syntax == RLELossless:
            one.compress(RLELossless)
        one[tag].value = value
        one.save_as(tmp_path / f'IM{index}')
    assert_refused(tmp_path, 'IM0', '0.0 mm', 'bits', str(value), 'export it again')


@pytest.mark.parametrize('kind', ['<u2', '<i2'])
def test_twelve_bits_in_the_upper_part_of_sixteen(tmp_path, kind):
    "With four bits of something else below them."
    slices = []
    for place in stack_positions():
        one = made(place, intercept=-1300. if kind == '<u2' else 0., BitsStored=12, HighBit=15, PixelRepresentation=int(kind == '<i2'), slope=1.)
        one.PixelData = ((np.frombuffer(one.PixelData, kind) << 4) + 5).astype(kind).tobytes()
        slices.append(one)
    assert_right(read_scan(write(tmp_path, slices)))
    for one in slices:
        one.compress(RLELossless)
    assert_refused(write(tmp_path / 'packed', slices, RLELossless), 'HighBit (15)', 'without compression')


@pytest.mark.parametrize('padding, limit', [(63536, None), (0, 3), (65535, None)])
def test_unsigned_with_padding(tmp_path, padding, limit):
    slices = []
    for place in stack_positions():
        one = made(place, intercept=-1200., PixelPaddingValue=padding)
        values = np.frombuffer(one.PixelData, '<u2').copy()
        values[:10] = padding if limit is None else np.arange(10) % (limit + 1)
        one.PixelData = values.tobytes()
        if limit is not None:
            one.PixelPaddingRangeLimit = limit
        slices.append(one)
    scan = read_scan(write(tmp_path, slices))
    assert (assert_right(scan, least=.9)[0][:, 0, :10] == -1000).all()
    assert '60 voxels of padding' in notes(scan) and scan.is_hu


def test_signed_with_signed_padding_and_twelve_bits(tmp_path):
    slices = [made(place, slope=1, intercept=0, PixelRepresentation=1, BitsStored=12, HighBit=11, PixelPaddingValue=-2000) for place in stack_positions()]
    for one in slices:                                           # the upper four bits hold something else, as overlays did
        values = np.frombuffer(one.PixelData, '<u2').copy()
        one.PixelData = ((values & 0x0FFF) | 0x5000).astype('<u2').tobytes()
    assert_right(read_scan(write(tmp_path, slices)))


@pytest.mark.parametrize('padding, signed', [(63536, 0), (-2000, 0), (-32768, 1)])
def test_padding_beyond_the_bits_that_are_stored(tmp_path, padding, signed):
    "Cut down to twelve bits it was bone, or soft tissue."
    slices = []
    for place in stack_positions():
        one = made(place, slope=1., intercept=0. if signed else -1300., PixelRepresentation=signed, BitsStored=12, HighBit=11)
        one.add_new('PixelPaddingValue', 'SS' if padding < 0 else 'US', padding)
        values = np.frombuffer(one.PixelData, '<u2').copy()
        values[:10] = padding % 65536
        one.PixelData = values.tobytes()
        slices.append(one)
    scan = read_scan(write(tmp_path, slices))
    assert (assert_right(scan, least=.9)[0][:, 0, :10] == -1000).all() and '60 voxels of padding' in notes(scan)


@pytest.mark.parametrize('tags', [{'intercept': None}, {'intercept': 0.}, {'RescaleType': 'OD'}])
def test_a_ct_without_its_intercept_is_said_to_be_not_in_hu(tmp_path, tags):
    wrong = {'RescaleType': 'OD'} if 'RescaleType' in tags else tags
    base = [made(place, slope=1, intercept=-1100.) for place in stack_positions()]
    for one in base:
        if 'RescaleType' in wrong:
            one.RescaleType = 'OD'
        elif wrong['intercept'] is None:
            del one.RescaleIntercept
        else:
            one.RescaleIntercept = 0
    scan = read_scan(write(tmp_path, base))
    assert not scan.is_hu and 'not in HU' in notes(scan)


@pytest.mark.parametrize('padding, values', [(0, (0., 1024.)), (-1000, (0., 1024.)), (None, (-1000., 24.)), (-2000, (-1000., 24.))])
def test_padding_is_no_air_that_tells_hounsfield_units(tmp_path, padding, values):
    "A CT without rescale tags is in HU where its own values have air near −1000, and not because its padding has."
    grid = np.full(SHAPE, values[1])
    grid[:, :5] = values[0]
    grid[:2] = values[0] if padding is None else padding
    tags = {'PixelRepresentation': 1} | ({} if padding is None else {'PixelPaddingValue': padding})
    scan = read_scan(write(tmp_path, [made(place, slope=None, intercept=None, values=grid, **tags) for place in stack_positions()]))
    assert scan.is_hu == (values[0] == -1000) and ('not in HU' in notes(scan)) != scan.is_hu


def test_padding_that_its_rescale_values_make_air_is_air(tmp_path):
    grid = np.full(SHAPE, 40.)
    grid[:, :5] = -1024
    scan = read_scan(write(tmp_path, [made(place, slope=1, intercept=-1024., values=grid, PixelPaddingValue=0) for place in stack_positions()]))
    assert scan.is_hu and set(np.unique(sitk.GetArrayViewFromImage(scan.image))) == {-1024, 40}


def test_monochrome1_keeps_what_is_meant(tmp_path):
    scan = read_scan(write(tmp_path, [made(place, PhotometricInterpretation='MONOCHROME1') for place in stack_positions()]))
    assert_right(scan)
    assert 'MONOCHROME1' in notes(scan)


# Transfer syntaxes

@pytest.mark.parametrize('syntax', [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
                         ids=lambda syntax: syntax.name)
def test_uncompressed_syntaxes(tmp_path, syntax):
    assert_right(read_scan(write(tmp_path, [made(place) for place in stack_positions()], syntax)))


def test_a_file_without_preamble(tmp_path):
    folder = write(tmp_path, [made(place) for place in stack_positions()], ImplicitVRLittleEndian)
    for path in folder.iterdir():
        one = pydicom.dcmread(path)
        pydicom.dcmwrite(path, pydicom.Dataset({element.tag: element for element in one}), implicit_vr=True, little_endian=True)
        assert path.read_bytes()[128:132] != b'DICM'
    assert_right(read_scan(folder))


@pytest.mark.parametrize('first', ['FileMetaInformationGroupLength', 'InstanceCreationDate', 'SOPInstanceUID', 'Modality'])
def test_a_file_without_preamble_may_begin_with_any_tag(tmp_path, first):
    folder = write(tmp_path, [made(place) for place in stack_positions()], ExplicitVRLittleEndian)
    for path in folder.iterdir():
        one = pydicom.dcmread(path)
        if first.startswith('File'):
            path.write_bytes(path.read_bytes()[132:])
        else:
            one.InstanceCreationDate = '20200101'
            bare = pydicom.Dataset({element.tag: element for element in one if element.tag >= pydicom.tag.Tag(first)})
            pydicom.dcmwrite(path, bare, implicit_vr=first == 'Modality', little_endian=True)
    assert_right(read_scan(folder))


def test_other_files_are_no_dicom(tmp_path):
    nifti(tmp_path / 'a.hdr', turned())
    plt = b'\x89PNG\r\n\x1a\n' + bytes(200)
    for name, data in {'a.png': plt, 'a.txt': b'a letter', 'empty': b'', 'short': b'\x08\0', 'raw': np.arange(8, 600, dtype='<i2').tobytes(),
                       'raw2': np.tile(np.array([2, 3, 8, 5], '<i2'), 99).tobytes(), 'zeros': b'\2' + bytes(999)}.items():
        (tmp_path / name).write_bytes(data)
    folder = list_series(tmp_path)[1]
    assert not folder.slices and not folder.others and not folder.broken
    assert all(dicom_header(path) is None for path in tmp_path.iterdir())


@pytest.mark.parametrize('compressor', ['JPEG', 'JPEG2000', 'RLE'])
@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('photometric', ['MONOCHROME2', 'MONOCHROME1'])
def test_compressed_syntaxes(tmp_path, compressor, signed, photometric):
    slices = [made(place, intercept=0. if signed else -1300., PixelRepresentation=int(signed), PhotometricInterpretation=photometric)
              for place in stack_positions()]
    for index, one in enumerate(slices):
        if compressor == 'RLE':
            save(one, tmp_path / f'{index}')
            one.compress(RLELossless)
            one.save_as(tmp_path / f'{index}', enforce_file_format=True)
            continue
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(tmp_path / 'one.dcm'))
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
        writer.Execute(sitk.GetImageFromArray(np.frombuffer(one.PixelData, '<i2' if signed else '<u2').reshape(1, *SHAPE)))
        packed = pydicom.dcmread(tmp_path / 'one.dcm')
        one.PixelData = packed.PixelData
        one['PixelData'].is_undefined_length = True
        (tmp_path / 'one.dcm').unlink()
        save(one, tmp_path / f'{index}', packed.file_meta.TransferSyntaxUID)
    scan = read_scan(tmp_path)
    assert_right(scan)
    assert 'loss' not in notes(scan)


@pytest.mark.parametrize('tag', ['BitsAllocated', 'BitsStored', 'HighBit', 'PixelRepresentation'])
@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, RLELossless], ids=lambda syntax: syntax.name)
@pytest.mark.parametrize('empty', [False, True])
def test_a_header_that_does_not_say_how_its_pixels_are_stored(tmp_path, tag, syntax, empty):
    "HighBit is what the others say; without another of them the pixels mean nothing."
    for index, place in enumerate(stack_positions(3)):
        one = made(place)
        save(one, tmp_path / f'IM{index}')
        if syntax == RLELossless:
            one.compress(RLELossless)
        if empty:
            one[tag].value = None
        else:
            delattr(one, tag)
        one.save_as(tmp_path / f'IM{index}')
    if tag == 'HighBit':
        assert_right(read_scan(tmp_path))
    else:
        assert_refused(tmp_path, 'IM0', '0.0 mm', f'no {tag}', 'export it again')


def frame_of(name):
    "The stored numbers of a compressed file that pydicom ships, decoded here, and its header."
    header = dicom_header(get_testdata_file(name), pixels=True)
    return decoded(header, next(pydicom.encaps.generate_frames(header.PixelData, number_of_frames=1))), header


@pytest.mark.parametrize('name', ['MR_small_jpeg_ls_lossless.dcm', 'MR_small_jp2klossless.dcm', 'MR_small_RLE.dcm'])
def test_lossless_files_of_others(name):
    plain = pydicom.dcmread(get_testdata_file('MR_small.dcm')).pixel_array
    np.testing.assert_array_equal(frame_of(name)[0], plain)


def test_lossy_jpeg_of_12_bits_is_right_within_its_loss(tmp_path):
    "The file of 12 bits beside the same picture in JPEG 2000, which has 16 bits."
    (jpeg, header), (other, _) = frame_of('JPEG-lossy.dcm'), frame_of('JPEG2000.dcm')
    assert header.BitsStored == 12 and jpeg.max() > 255
    coarse = [picture.reshape(128, 8, 32, 8).mean((1, 3)).ravel() for picture in (jpeg.astype(float), other.astype(float))]
    assert np.corrcoef(*coarse)[0, 1] > .95 and np.median(np.abs(jpeg - other.astype(float))) <= 3
    for place in stack_positions(3):
        one = made(place, values=np.zeros(jpeg.shape), BitsStored=12, HighBit=11, PixelData=header.PixelData)
        one['PixelData'].is_undefined_length = True
        save(one, tmp_path / f'{place[2]}', header.file_meta.TransferSyntaxUID)
    scan = read_scan(tmp_path)
    np.testing.assert_allclose(sitk.GetArrayFromImage(scan.image)[1], jpeg * .25 - 1300)
    assert 'with loss' in notes(scan)


# Many frames in one file

def enhanced(places, orientation=AXIAL, slopes=None, modality='CT', **of_frame):
    "An enhanced file with a frame at each place; `of_frame` are sequences by name with a list of tags a frame."
    slopes = slopes or [.25] * len(places)
    frames = [made(place, orientation, slope=slope) for place, slope in zip(places, slopes)]
    whole = made(places[0], orientation)
    for name in ('ImagePositionPatient', 'ImageOrientationPatient', 'PixelSpacing', 'RescaleSlope', 'RescaleIntercept'):
        delattr(whole, name)
    whole.update({'SOPClassUID': EnhancedCTImageStorage if modality == 'CT' else EnhancedMRImageStorage, 'Modality': modality,
                  'NumberOfFrames': len(places), 'PixelData': b''.join(frame.PixelData for frame in frames)})

    def group(**tags):
        inner = pydicom.Dataset()
        inner.update(tags)
        return [inner]

    shared = pydicom.Dataset()
    shared.update({'PlaneOrientationSequence': group(ImageOrientationPatient=frames[0].ImageOrientationPatient),
                   'PixelMeasuresSequence': group(PixelSpacing=list(SPACING), SliceThickness=3)})
    whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = [shared], []
    for index, (frame, slope) in enumerate(zip(frames, slopes)):
        own = pydicom.Dataset()
        own.update({'PlanePositionSequence': group(ImagePositionPatient=frame.ImagePositionPatient), 'FrameContentSequence': group(StackID='1'),
                    'PixelValueTransformationSequence': group(RescaleSlope=slope, RescaleIntercept=-1300, RescaleType='HU' if modality == 'CT' else 'US')})
        for name, values in of_frame.items():
            own.update({name: group(**values[index])})
        whole.PerFrameFunctionalGroupsSequence.append(own)
    return whole


@pytest.mark.parametrize('modality', ['CT', 'MR'])
@pytest.mark.parametrize('orientation', [AXIAL, ORIENTATIONS['oblique']], ids=['axial', 'oblique'])
def test_enhanced_files(tmp_path, modality, orientation):
    "Frames out of order, each with a slope of its own; read by the path of the file and by its folder."
    places = [stack_positions(orientation=orientation)[index] for index in (3, 0, 5, 1, 4, 2)]
    save(enhanced(places, orientation, slopes=[.25, .3, .2, .25, .4, .25], modality=modality), tmp_path / 'all.dcm')
    for path in (tmp_path, tmp_path / 'all.dcm'):
        scan = read_scan(path)
        assert_right(scan)
        assert scan.modality == modality and scan.image.GetSize() == (16, 12, 6) and scan.is_hu == (modality == 'CT') and len(scan.reference) == 1


def test_enhanced_files_with_a_frame_missing_or_tilted(tmp_path):
    places = stack_positions()
    save(enhanced([places[index] for index in (0, 1, 2, 4, 5)]), tmp_path / 'gap.dcm')
    assert_refused(tmp_path / 'gap.dcm', 'from 6.0 to 12.0 mm')
    assert_right(read_scan(tmp_path / 'gap.dcm', fill_gaps=True))
    orientation = [1, 0, 0, 0, np.cos(.3), np.sin(.3)]
    save(enhanced([np.array([-8., -6., 3. * index]) for index in range(6)], orientation), tmp_path / 'tilted.dcm')
    assert 'leans by 17.2°' in notes(read_scan(tmp_path / 'tilted.dcm'))


def test_two_echoes_in_an_enhanced_file(tmp_path):
    places = stack_positions(4)
    echoes = [{'EffectiveEchoTime': time} for time in (10, 80) for _ in places]
    save(enhanced([*places, *places], slopes=[.25] * 4 + [.5] * 4, modality='MR', MREchoSequence=echoes), tmp_path / 'echoes.dcm')
    assert_refused(tmp_path, '2 volumes', 'EchoTime 10', 'EchoTime 80')
    assert_right(read_scan(tmp_path, series='EchoTime 80'))


def test_volumes_of_one_file_that_nothing_tells_apart_are_to_be_exported_one_by_one(tmp_path):
    "As directions of diffusion; frames were to be removed, which are no files."
    places = stack_positions(4)
    save(enhanced([*places, *places], slopes=[.25] * 4 + [.5] * 4, modality='MR'), tmp_path / 'both.dcm')
    assert 'remove' not in assert_refused(tmp_path, '4 of its places are taken twice', 'export the volume that is meant as a series of its own')


def test_what_a_maker_keeps_of_a_frame_for_itself_is_not_believed(tmp_path):
    "Philips repeats tags of the standard in a sequence of its own, where the place of a frame is that of another point of it."
    whole = enhanced(stack_positions(), modality='MR')
    for index, frame in enumerate(whole.PerFrameFunctionalGroupsSequence):
        own = pydicom.Dataset()
        own.update({'ImagePositionPatient': [-8.5, -6., 3. * index + .5], 'RescaleSlope': 2., 'RescaleIntercept': 7., 'PixelSpacing': [1, 1], 'SOPInstanceUID': generate_uid()})
        frame.private_block(0x2005, 'Philips MR Imaging DD 005', create=True).add_new(0x0f, 'SQ', [own])
    save(whole, tmp_path / 'all.dcm')
    assert_right(read_scan(tmp_path))


def test_two_acquisitions_in_an_enhanced_file(tmp_path):
    places = stack_positions(4)
    numbers = [{'FrameAcquisitionNumber': number, 'StackID': '1'} for number in (1, 2) for _ in places]
    save(enhanced([*places, *places], slopes=[.25] * 4 + [.5] * 4, modality='MR', FrameContentSequence=numbers), tmp_path / 'both.dcm')
    assert_refused(tmp_path, '2 volumes', 'FrameAcquisitionNumber 1', 'FrameAcquisitionNumber 2')
    assert_right(read_scan(tmp_path, series=2))


def test_magnitude_and_phase_in_an_enhanced_file(tmp_path):
    "As Philips writes them: their FrameType is the same."
    places = stack_positions(4)
    kinds = [{'FrameType': ['ORIGINAL', 'PRIMARY', 'T1', 'NONE'], 'ComplexImageComponent': kind} for kind in ('MAGNITUDE', 'PHASE') for _ in places]
    save(enhanced([*places, *places], slopes=[.25] * 4 + [.5] * 4, modality='MR', MRImageFrameTypeSequence=kinds), tmp_path / 'both.dcm')
    assert_refused(tmp_path, '2 volumes', 'ComplexImageComponent MAGNITUDE', 'ComplexImageComponent PHASE')
    assert_right(read_scan(tmp_path, series='MAGNITUDE'))


def test_frames_that_their_header_does_not_tell_apart(tmp_path):
    whole = enhanced(stack_positions())
    del whole.PerFrameFunctionalGroupsSequence[-1]
    save(whole, tmp_path / 'fewer.dcm')
    assert_refused(tmp_path / 'fewer.dcm', 'fewer.dcm', '6 frames', '5')
    whole = enhanced(stack_positions())
    del whole.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence
    save(whole, tmp_path / 'fewer.dcm')
    assert_refused(tmp_path, 'fewer.dcm', '6.0 mm', 'no RescaleSlope')


def test_frames_without_positions(tmp_path):
    many = made((0., 0., 0.), NumberOfFrames=3, ImagePositionPatient=None)
    many.PixelData = many.PixelData * 3
    save(many, tmp_path / 'many.dcm')
    assert_refused(tmp_path, 'frames have no positions')


# Broken files

def test_of_many_broken_files_a_few_are_named(tmp_path):
    "As on a scratched CD: each row of the table had hundreds of sentences."
    write(tmp_path, [made(place) for place in stack_positions()])
    for index in range(40):
        (tmp_path / f'bad{index:02d}.dcm').write_bytes(b'')
    told = scan_table(tmp_path)[0]['notes']
    assert told.count('is no DICOM file') == 3 and 'bad00.dcm' in told and told.endswith('37 more files cannot be read.')
    assert notes(read_scan(tmp_path)) == '40 file(s) beside it could not be read and were left out.'
    for one in tmp_path.glob('0*'):
        one.unlink()
    assert '37 more files cannot be read.' in assert_refused(tmp_path, 'holds no DICOM images', 'bad02.dcm')


@pytest.mark.parametrize('content', [b'', b'\0' * 4096], ids=['empty', 'zeros'])
def test_a_file_that_is_named_as_the_slices_beside_it_and_is_none_is_told(tmp_path, content):
    "As a copy that was broken off leaves it; where it was the last slice, that was missing without a word."
    for index, place in enumerate(stack_positions()):
        save(made(place), tmp_path / f'IM{index:04d}')
    for name in ('IM0006', 'DONE', 'notes1', 'IM0006.txt'):
        (tmp_path / name).write_bytes(content)
    assert 'IM0006 is no DICOM file, though it is named as those beside it are; copy it again' in scan_table(tmp_path)[0]['notes']
    assert notes(read_scan(tmp_path)) == '1 file(s) beside it could not be read and were left out.'


@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, RLELossless])
def test_a_file_cut_off_in_its_pixels_is_named(tmp_path, syntax):
    slices = [made(place) for place in stack_positions()]
    for index, one in enumerate(slices):
        save(one, tmp_path / f'IM{index}')
        if syntax == RLELossless:
            one.compress(RLELossless)
            one.save_as(tmp_path / f'IM{index}', enforce_file_format=True)
    whole = (tmp_path / 'IM3').read_bytes()
    (tmp_path / 'IM3').write_bytes(whole[:-150])
    assert_refused(tmp_path, 'head', 'IM3', '9.0 mm', 'copy')


def test_files_whose_pixels_were_taken_out_are_named(tmp_path):
    "As an archive hands out headers alone: the tag is there and holds nothing."
    slices = [made(place, PixelData=b'') for place in stack_positions(3)]
    assert_refused(write(tmp_path / 'once', slices), '0.0 mm', 'breaks off before its pixels')
    assert_refused(write(tmp_path / 'twice', slices * 2), '0.0 mm', 'breaks off before its pixels')


def test_a_file_cut_off_in_its_header_is_named(tmp_path):
    folder = write(tmp_path, [made(place) for place in stack_positions()])
    *_, middle, _, last = sorted(folder.iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    last.write_bytes(last.read_bytes()[:420])                     # the topmost, so that it leaves no gap
    scan = read_scan(folder)
    assert scan.image.GetSize()[2] == 5 and '1 file(s) beside it' in notes(scan) and last.name not in notes(scan)
    assert last.name in scan_table(folder)[0]['notes']
    middle.write_bytes(middle.read_bytes()[:420])
    assert_refused(folder, 'from 6.0 to 12.0 mm', middle.name, last.name)


@pytest.mark.skipif(not os.path.exists('/proc/self/mem'), reason='no file here that opens and gives an error')
@pytest.mark.parametrize('name', ['IM9', 'a.nii', 'a.nii.gz', 'a.nrrd', 'a.mha'])
def test_a_file_that_cannot_be_read_is_named_and_hides_no_other(tmp_path, name):
    "As on a scratched CD, or where a right is missing: the table of the whole folder was one sentence that named no file."
    write(tmp_path, [made(place) for place in stack_positions()])
    (tmp_path / name).symlink_to('/proc/self/mem')
    assert f'{name} cannot be read (Input/output error)' in scan_table(tmp_path)[0]['notes']
    scan = read_scan(tmp_path)
    assert_right(scan)
    assert notes(scan) == '1 file(s) beside it could not be read and were left out.'
    assert_refused(tmp_path / name, name, 'cannot be read')


@pytest.mark.parametrize('name', ['IM9.dcm', 'IM9.IMA'])
@pytest.mark.parametrize('size', [0, 5000])
def test_a_file_that_is_called_dicom_and_is_empty_is_told(tmp_path, name, size):
    "As where copying stopped: the last slice was missing without a word. What macOS puts beside a file is none."
    write(tmp_path, [made(place) for place in stack_positions()])
    (tmp_path / f'._{name}').write_bytes(b'\0\5\x16\7')
    assert scan_table(tmp_path)[0]['notes'] == 'whole'
    (tmp_path / name).write_bytes(bytes(size))
    assert f'{name} is no DICOM file' in scan_table(tmp_path)[0]['notes']
    assert notes(read_scan(tmp_path)) == '1 file(s) beside it could not be read and were left out.'
    assert_refused(tmp_path / name, f'{name} is no DICOM file', 'copy it again')


def test_notes_of_a_scan_name_no_file_beside_it(tmp_path):
    folder = write(tmp_path, [made(place) for place in stack_positions()])
    save(made(stack_positions()[0], values=np.zeros((5, 7)), ImagePositionPatient=None), folder / 'doe-jane')
    assert 'left aside' in notes(read_scan(folder)) and 'doe-jane' not in notes(read_scan(folder))


def test_an_archive_of_a_nifti_that_breaks_off(tmp_path):
    image = sitk.Image(16, 12, 6, sitk.sitkFloat32)
    sitk.WriteImage(image, str(tmp_path / 'a.nii'))
    (tmp_path / 'b.nii').write_bytes((tmp_path / 'a.nii').read_bytes()[:900])
    (tmp_path / 'c.nii.gz').write_bytes(gzip.compress((tmp_path / 'a.nii').read_bytes())[:-30])
    damaged = bytearray(gzip.compress((tmp_path / 'a.nii').read_bytes() + np.random.default_rng(0).bytes(64)))
    damaged[-40] ^= 1
    (tmp_path / 'f.nii.gz').write_bytes(damaged)
    (tmp_path / 'd.nii').write_bytes(b'nothing')
    (tmp_path / 'e.mha').write_bytes(b'nothing')
    for name in ('b.nii', 'c.nii.gz', 'd.nii', 'e.mha', 'f.nii.gz'):
        assert_refused(tmp_path / name, name, 'copy it again')


@pytest.mark.parametrize('frames', ['one a file', 'all in one file'])
@pytest.mark.filterwarnings('ignore')
def test_a_damaged_header_is_read_or_refused_in_a_sentence(tmp_path, frames):
    "Bytes are changed at random; whatever pydicom makes of them, no other error comes out."
    rng, places = np.random.default_rng(5), stack_positions(3)
    if frames == 'one a file':
        damaged = sorted(write(tmp_path, [made(place) for place in places]).iterdir())[1]
    else:
        damaged = tmp_path / 'all'
        save(enhanced(places), damaged)
    whole = damaged.read_bytes()
    for _ in range(40):
        broken = bytearray(whole)
        for at in rng.integers(132, len(whole) - 390, 2):
            broken[at] = rng.integers(256)
        damaged.write_bytes(broken)
        try:
            read_scan(tmp_path)
        except ValueError as error:
            assert str(error)


# NIfTI, NRRD, MetaImage

def nifti(path, affine, values=None, sform=1, qform=1, other=None, unit=2, kind=np.float32, offset=352):
    "Writes a NIfTI file by hand, so that sform and qform (`other`, if given) are what the test wants: RAS, as nibabel has it."
    if values is None:
        index = np.moveaxis(np.indices((16, 12, 6)), 0, -1)
        values = hounsfield((index @ affine[:3, :3].T + affine[:3, 3]) * (-1, -1, 1) * (1000 if unit == 1 else 1))
    header = nibabel.Nifti1Header()
    header.set_data_shape(values.shape)
    header.set_data_dtype(kind)
    header.set_qform(affine if other is None else other, 1, strip_shears=True)
    header.set_sform(affine, 1)
    header['qform_code'], header['sform_code'], header['xyzt_units'], header['vox_offset'], header['magic'] = qform, sform, unit, offset, b'n+1'
    data = header.binaryblock + b'\0' * 4 + np.asarray(values, kind).tobytes('F')
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


RAS = np.array([[1., 0, 0, -8], [0, 1.5, 0, -6], [0, 0, 3, 0], [0, 0, 0, 1]])


def turned(flip=(1, 1, 1), angle=.2):
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = RAS.copy()
    affine[:3, :3] = turn @ RAS[:3, :3] @ np.diag(flip)
    return affine


@pytest.mark.parametrize('name', ['a.nii', 'a.nii.gz'])
@pytest.mark.parametrize('flip', [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, -1)], ids=str)
@pytest.mark.parametrize('forms', [{'sform': 1, 'qform': 0}, {'sform': 0, 'qform': 1}, {}], ids=['sform', 'qform', 'both'])
def test_nifti_in_any_handedness(tmp_path, name, flip, forms):
    "A marked voxel, the left ear, is where nibabel says, and so is every other."
    path = nifti(tmp_path / name, turned(flip), **forms)
    scan = read_scan(path)
    assert_right(scan, tolerance=.01)
    assert scan.is_hu and scan.modality == 'CT'
    known = nibabel.load(path)
    ear = (known.affine @ (2, 5, 3, 1))[:3] * (-1, -1, 1)
    at = scan.image.TransformPhysicalPointToIndex(ear.tolist())
    assert abs(scan.image[at] - known.get_fdata()[2, 5, 3]) < 1e-3


def test_nifti_whose_forms_are_apart(tmp_path):
    moved = turned()
    moved[0, 3] += 7
    scan = read_scan(nifti(tmp_path / 'a.nii', turned(), other=moved))
    assert_right(scan, tolerance=.01)
    assert '7.0 mm apart; the sform was believed' in notes(scan)
    assert_refused(nifti(tmp_path / 'b.nii', turned(), other=turned((-1, 1, 1))), 'b.nii', 'disagree about left and right')


def test_nifti_that_does_not_say_where_it_is(tmp_path):
    assert_refused(nifti(tmp_path / 'a.nii', turned(), sform=0, qform=0), 'a.nii', 'left might be right', 'DICOM')


def test_nifti_that_is_sheared(tmp_path):
    sheared = RAS.copy()
    sheared[1, 2] = .9
    for forms in ({'qform': 0}, {}):
        assert_refused(nifti(tmp_path / 'a.nii', sheared, **forms), 'a.nii', 'right angles')


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('form, at', [('sform', 280), ('sform', 292), ('qform', 256), ('qform', 268)])
def test_nifti_whose_geometry_is_no_numbers(tmp_path, form, at, value):
    path = nifti(tmp_path / 'a.nii', turned(), sform=int(form == 'sform'), qform=int(form == 'qform'))
    data = bytearray(path.read_bytes())
    data[at:at + 4] = np.float32(value).tobytes()
    path.write_bytes(data)
    assert_refused(path, 'a.nii', form, 'no geometry')


@pytest.mark.parametrize('axis', [1, 2, 3])
def test_nifti_whose_qform_is_mirrored_by_a_voxel_size_below_0(tmp_path, axis):
    "The standard knows none, and programs differ: nibabel refuses it, others take its absolute value, so left might be right."
    path = nifti(tmp_path / 'a.nii', turned(), sform=0)
    data = bytearray(path.read_bytes())
    data[76 + 4 * axis:80 + 4 * axis] = (-np.frombuffer(data, '<f4', 1, 76 + 4 * axis)).tobytes()
    path.write_bytes(data)
    assert_refused(path, 'a.nii', 'voxel size below 0', 'left might be right')


def test_nifti_whose_quaternion_is_too_long(tmp_path):
    path = nifti(tmp_path / 'a.nii', turned(), sform=0)
    data = bytearray(path.read_bytes())
    data[256:268] = np.array([0, 0, 1.5], '<f4').tobytes()
    path.write_bytes(data)
    assert_refused(path, 'a.nii', 'qform', 'no geometry')


@pytest.mark.parametrize('count', [0, -1, 1, 2, 6, 9])
def test_nifti_of_other_dimensions(tmp_path, count):
    path = nifti(tmp_path / 'a.nii', turned())
    data = bytearray(path.read_bytes())
    data[40:56] = np.array([count, 16, 12, 6, 1, 1, 2, 1], '<i2').tobytes()
    path.write_bytes(data + data[352:])
    assert_refused(path, 'a.nii', 'dimensions' if count != 6 else '2 volumes')
    nifti(tmp_path / 'b.nii', turned())
    assert len(scan_table(tmp_path)) == 2


def test_nifti_in_metres(tmp_path):
    scan = read_scan(nifti(tmp_path / 'a.nii', np.diag([.001, .001, .001, 1]) @ turned(), unit=1))
    assert_right(scan, tolerance=.05)
    np.testing.assert_allclose(scan.image.GetSpacing(), (1, 1.5, 3), rtol=1e-5)


def test_nifti_with_millimetres_that_are_metres(tmp_path):
    assert 'unit may be wrong' in notes(read_scan(nifti(tmp_path / 'a.nii', np.diag([.001, .001, .001, 1]) @ turned())))


@pytest.mark.parametrize('suffix', ['nrrd', 'mha'])
def test_other_formats_with_millimetres_that_are_micrometres(tmp_path, suffix):
    image = sitk.GetImageFromArray(np.random.default_rng(0).uniform(0, 900, (6, 12, 16)).astype(np.float32))
    for spacing in (.4, 400.):
        image.SetSpacing((spacing, spacing, spacing))
        sitk.WriteImage(image, str(tmp_path / f'a.{suffix}'))
        assert ('unit may be wrong' in notes(read_scan(tmp_path / f'a.{suffix}'))) == (spacing == 400)


def test_nifti_of_four_dimensions(tmp_path):
    values = np.zeros((8, 8, 8, 3))
    assert_refused(nifti(tmp_path / 'a.nii', RAS, values), 'a.nii', '3 volumes', 'save the one')
    assert read_scan(nifti(tmp_path / 'b.nii', RAS, values[..., :1])).image.GetSize() == (8, 8, 8)
    assert_refused(nifti(tmp_path / 'c.nii', RAS, values[:, :, :1, 0]), 'one slice')


@pytest.mark.parametrize('kind', [np.int64, np.uint64])
def test_nifti_of_wide_integers(tmp_path, kind):
    values = np.arange(512).reshape(8, 8, 8)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(nifti(tmp_path / 'a.nii', RAS, values, kind=kind)).image).T, values)
    assert_refused(nifti(tmp_path / 'b.nii', RAS, values, kind=np.complex64), 'b.nii', 'colours or complex numbers')


@pytest.mark.parametrize('offset', [0, 352])
def test_nifti_that_does_not_say_where_its_values_begin(tmp_path, offset):
    assert_right(read_scan(nifti(tmp_path / 'a.nii', turned(), offset=offset)), tolerance=.01)


@pytest.mark.parametrize('there, called', [('a.nii', 'b.nii.gz'), ('a.nii.gz', 'b.nii')])
def test_nifti_that_is_packed_otherwise_than_its_name_says(tmp_path, there, called):
    assert_right(read_scan(nifti(tmp_path / there, turned()).rename(tmp_path / called)), tolerance=.01)


def test_nifti_with_nan(tmp_path):
    values = np.ones((8, 8, 8))
    values[0, 0, :3] = np.nan, np.inf, -np.inf
    scan = read_scan(nifti(tmp_path / 'a.nii', RAS, values))
    assert '3 voxels were no numbers' in notes(scan) and (sitk.GetArrayFromImage(scan.image) == 1).all()


@pytest.mark.parametrize('fill', [-9999, -32768, 32767, 65535, 1e20, -3.4e38])
@pytest.mark.parametrize('scale', [1, 8])
def test_what_fills_an_mri_beyond_what_was_seen_is_0(tmp_path, fill, scale):
    values = np.random.default_rng(0).uniform(1, 800, (16, 12, 6)) * scale
    outside = np.zeros(values.shape, bool)
    outside[:2] = True
    scan = read_scan(nifti(tmp_path / 'a.nii', turned(), np.where(outside, fill, values)))
    found = sitk.GetArrayFromImage(scan.image).T
    assert f'144 voxels of {fill:g} stand apart from all others' in notes(scan) and (found[outside] == values.astype('f4').min()).all() and not scan.is_hu
    np.testing.assert_allclose(found[~outside], values[~outside], rtol=1e-6)


@pytest.mark.parametrize('values', [
    lambda draw: np.where(draw < .2, 0, 900 + 100 * draw),                     # a brain that was cut out, on 0
    lambda draw: np.minimum(draw * 70000, 65535),                              # what was too bright
    lambda draw: np.where(draw < .001, 0, 1) * draw,
    lambda draw: np.where(draw < .5, -1, draw * 4 - 3),                        # in units of the spread
    lambda draw: np.where(draw < .5, 0, 1), lambda draw: np.where(draw > .9999, 50000, draw),
    lambda draw: np.where(draw > .99, 4095, 900 * draw),                       # fibres of a plan, drawn into it
    lambda draw: np.where(draw < .2, 8, 900 + 100 * draw)], ids=range(8))      # a brain on a dark grey
def test_values_that_were_measured_are_no_filling(tmp_path, values):
    values = values(np.random.default_rng(0).uniform(0, 1, (16, 12, 60))).astype(np.float32)
    scan = read_scan(nifti(tmp_path / 'a.nii', turned(), values))
    assert (sitk.GetArrayFromImage(scan.image).T == values).all() and 'stand apart' not in notes(scan)


@pytest.mark.parametrize('count', [2, 40, 200])
def test_a_file_of_labels_is_no_mri_without_a_word(tmp_path, count):
    "A mask lies beside the scan that it was drawn on, and its name is much the same; it was registered well, and fused."
    values = np.arange(32 * 12 * 6).reshape(6, 12, 32) // 4 % count
    scan = read_scan(nifti(tmp_path / 'a.nii', turned(), values.T, kind=np.int16))
    assert (f'It has {count} values' in notes(scan) and 'a mask or labels' in notes(scan)) == (count < 50)


def test_an_mri_of_few_grey_levels_is_not_called_labels(tmp_path):
    values = np.random.default_rng(0).normal(20, 4, (16, 12, 6)).clip(0, 40).round()
    assert 'labels' not in notes(read_scan(nifti(tmp_path / 'a.nii', turned(), values, kind=np.uint8)))


def test_filling_in_dicom_that_no_header_tells(tmp_path):
    "Of signed pixels; where PixelPaddingValue tells it, it is known already."
    values = np.random.default_rng(0).integers(0, 900, (12, 16)).astype(float)
    values[:2], values[2] = -32768, 0
    scan = read_scan(write(tmp_path, [made(place, Modality='MR', slope=1., intercept=0., values=values, PixelRepresentation=1) for place in stack_positions()]))
    assert '192 voxels of -32768 stand apart from all others' in notes(scan) and sitk.GetArrayFromImage(scan.image).min() == 0


@pytest.mark.parametrize('suffix', ['nrrd', 'mha', 'mhd'])
@pytest.mark.parametrize('flip', [1, -1])
def test_nrrd_and_metaimage(tmp_path, suffix, flip):
    direction = np.diag([flip, 1., 1.])
    index = np.moveaxis(np.indices((6, 12, 16))[::-1], 0, -1) * (1, 1.5, 3)
    image = sitk.GetImageFromArray(hounsfield(index @ direction.T).astype(np.float32))
    image.SetSpacing((1, 1.5, 3))
    image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / f'a.{suffix}'))
    scan = read_scan(tmp_path / f'a.{suffix}')
    assert_right(scan)
    assert scan.is_hu


HEADERS = {
    'nrrd': 'NRRD0004\ntype: float\ndimension: 3\nsizes: 16 12 6\nencoding: raw\nendian: little\n{}\n\n',
    'mha': 'ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n{}\nDimSize = 16 12 6\nElementSpacing = 1 1.5 3\n'
           'ElementType = MET_FLOAT\nElementDataFile = LOCAL\n'}
UPRIGHT = '\nspace directions: (1,0,0) (0,1.5,0) (0,0,3)\nspace origin: (0,0,0)'


@pytest.mark.parametrize('suffix, told, words', [
    ('nrrd', 'space: left-posterior-superior' + UPRIGHT, []), ('nrrd', 'space: LPS' + UPRIGHT, []), ('mha', 'TransformMatrix = 1 0 0 0 1 0 0 0 1', []),
    ('nrrd', 'spacings: 1 1.5 3', ['left might be right']), ('nrrd', 'space dimension: 3' + UPRIGHT, ['left might be right']),
    ('nrrd', 'space: scanner-xyz' + UPRIGHT, ['left might be right']), ('nrrd', 'space: LPS', ['left might be right']), ('mha', 'Comment = none', ['left might be right']),
    ('nrrd', 'space: LPS\nspace directions: (1,0,0) (0,1.5,0) (0,1,3)\nspace origin: (0,0,0)', ['right angles']),
    ('mha', 'TransformMatrix = 1 0 0 0 1 0 0 .3 .95', ['right angles'])])
def test_nrrd_and_metaimage_say_how_they_lie(tmp_path, suffix, told, words):
    index = np.moveaxis(np.indices((6, 12, 16))[::-1], 0, -1) * (1, 1.5, 3)
    path = tmp_path / f'a.{suffix}'
    path.write_bytes(HEADERS[suffix].format(told).encode() + hounsfield(index).astype('<f4').tobytes())
    if words:
        assert_refused(path, path.name, *words)
    else:
        assert_right(read_scan(path))


@pytest.mark.parametrize('sizes, kinds, directions', [('1 16 12 6', 'list domain domain domain', 'none (1,0,0) (0,1.5,0) (0,0,3)'),
                                                       ('16 12 6 1', 'domain domain domain list', '(1,0,0) (0,1.5,0) (0,0,3) none')])
def test_nrrd_with_a_list_of_one_volume(tmp_path, sizes, kinds, directions):
    "As a sequence of 3D Slicer with one frame; the table of the whole folder was lost for it."
    header = HEADERS['nrrd'].format(f'space: LPS\nspace directions: {directions}\nspace origin: (0,0,0)').replace('dimension: 3', 'dimension: 4').replace('16 12 6', f'{sizes}\nkinds: {kinds}')
    index = np.moveaxis(np.indices((6, 12, 16))[::-1], 0, -1) * (1, 1.5, 3)
    (tmp_path / 'a.nrrd').write_bytes(header.encode() + hounsfield(index).astype('<f4').tobytes())
    assert_right(read_scan(tmp_path / 'a.nrrd'))
    assert len(scan_table(tmp_path)) == 1


def test_metaimage_without_a_spacing(tmp_path):
    "It was taken for 1 mm."
    header = HEADERS['mha'].format('TransformMatrix = 1 0 0 0 1 0 0 0 1')
    for name, text in (('a.mha', header.replace('ElementSpacing = 1 1.5 3\n', '')), ('b.mha', header.replace('ElementSpacing', 'ElementSize'))):
        index = np.moveaxis(np.indices((6, 12, 16))[::-1], 0, -1) * (1, 1.5, 3)
        (tmp_path / name).write_bytes(text.encode() + hounsfield(index).astype('<f4').tobytes())
    assert_refused(tmp_path / 'a.mha', 'a.mha', 'ElementSpacing')
    assert_right(read_scan(tmp_path / 'b.mha'))


def test_colour_is_no_volume(tmp_path):
    sitk.WriteImage(sitk.Image((4, 4, 4), sitk.sitkVectorUInt8, 3), str(tmp_path / 'a.nrrd'))
    assert_refused(tmp_path / 'a.nrrd', 'a.nrrd', 'in colour')


# The table

def test_the_table_lists_everything(tmp_path):
    write(tmp_path / 'dicom', [made(place) for place in stack_positions()])
    write(tmp_path / 'dicom', [made((-8., -6., 5.), [0, 1, 0, 0, 0, -1], SeriesInstanceUID='1.7', SeriesDescription='scout')])
    nifti(tmp_path / 'a.nii.gz', turned())
    (tmp_path / 'more').mkdir()
    nifti(tmp_path / 'more/b.nii.gz', turned(), sform=0, qform=0)
    rows = scan_table(tmp_path)
    assert [(row['series'], row['where']) for row in rows] == [(1, 'dicom'), (2, 'dicom/06-0'), ('', 'a.nii.gz'), ('', 'more/b.nii.gz')]
    assert rows[0]['notes'] == 'whole' and 'one slice' in rows[1]['notes'] and rows[2]['size'] == '16×12×6' and 'left might' in rows[3]['notes']


def test_a_folder_may_be_read_twice_and_is_not_changed(tmp_path):
    folder = write(tmp_path / 'a', [made(place) for place in stack_positions()])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    one, other = (sitk.GetArrayFromImage(read_scan(folder).image) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    shutil.copytree(folder, tmp_path / 'b')
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and Path(tmp_path / 'b').is_dir()
