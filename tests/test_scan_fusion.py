"""From two scans to a study: the command, what it writes and never writes, and what it refuses."""
import gzip
import html
import json
import os
import re
import resource
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import in_child, run_cells
from papermill.translators import PythonTranslator

pytest.importorskip('SimpleITK')
from typer.testing import CliRunner

from medfusion import studies
from medfusion.cli import app
from medfusion.phantom_volume import phantom_study, write_series
from medfusion.registration import Registration, write_transform
from medfusion.scans import Scan, pydicom, read_scan, sitk
from medfusion.studies import (
    check_replaceable,
    fill_study,
    fuse_study,
    new_folder_at,
    read_study,
    scan_fusion,
    scrubbed,
)

PLANTED = ['ZQWPATIENT', 'XKID8151', '17.04.1933',       # a date that DICOM writes in another way, which pydicom warns of
            '20190228', 'VVCLINIC', 'JJDOCTOR', '1.2.826.0.99.', 'zzfamilyname']
LONG = 'T1 gradient echo, 3D, sagittal, 1 mm, reformatted, with <Gd> & f'       # as long as a description may be


@pytest.fixture(scope='module')
def drawn():
    return phantom_study(12, ct_spacing=(4., 4., 6.), mri_spacing=(4., 4., 6.), pose=(8., 10.), fraction=.8)


@pytest.fixture(scope='module')
def scans(drawn):
    return Scan(drawn.ct, 'CT', 'thin bone', True), Scan(drawn.mri, 'MR', 't1 space')


@pytest.fixture(scope='module')
def study(drawn, scans):
    return scan_fusion(*scans, 'brain,480,2500', 'maximum', transform=drawn.truth)


@pytest.fixture(scope='module')
def patient(drawn, tmp_path_factory):
    "A folder whose name is a patient's, with a CT and an MRI series in DICOM that name him, and the true transform."
    folder = tmp_path_factory.mktemp('data') / 'zzfamilyname'
    folder.mkdir()
    uid = lambda number: f'1.2.826.0.99.{number}'
    shared = {'PatientName': 'ZQWPATIENT^HEINZ', 'PatientID': 'XKID8151', 'PatientBirthDate': '17.04.1933', 'StudyDate': '20190228', 'SeriesDate': '20190228',
              'InstitutionName': 'VVCLINIC', 'ReferringPhysicianName': 'JJDOCTOR', 'StudyInstanceUID': uid(1), 'SamplesPerPixel': 1, 'BitsAllocated': 16,
              'PhotometricInterpretation': 'MONOCHROME2', 'BitsStored': 16, 'HighBit': 15, 'PixelRepresentation': 0, 'RescaleSlope': 1}
    for number, (name, image, modality, intercept) in enumerate((('ct', drawn.ct, 'CT', -1024), ('mri', drawn.mri, 'MR', 0)), start=2):
        header = pydicom.Dataset()
        header.update(shared | {'Modality': modality, 'SeriesDescription': f'{name} axial' if name == 'ct' else LONG, 'SeriesInstanceUID': uid(number), 'FrameOfReferenceUID': uid(number + 10),
                                'RescaleIntercept': intercept, 'SOPClassUID': {'CT': pydicom.uid.CTImageStorage, 'MR': pydicom.uid.MRImageStorage}[modality]})
        write_series(folder / name, image, header)
    write_transform(folder / 'truth.tfm', drawn.truth)
    return folder


@pytest.fixture(scope='module')
def written(patient, tmp_path_factory):
    out = tmp_path_factory.mktemp('out') / 'study'
    words = ['scan', patient / 'ct', patient / 'mri', '-o', out, '-m', 'maximum', '--transform', patient / 'truth.tfm', '--dicom',
             '-p', 'ct_series=1.2.826.0.99.2', '-p', 'mri_series=[1.2.826.0.99.3]']
    result = CliRunner().invoke(app, list(map(str, words)), prog_name='medfusion')
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize('short', [1, 400])
def test_a_volume_that_does_not_fit_on_the_disk_ends_no_study_well(short, study, tmp_path):
    "SimpleITK says nothing of it. A limit on the size of files stands for the disk; of the largest, only the end is missing."
    for folder in ('whole', 'cut'):
        (tmp_path / folder).mkdir()
    fill_study(tmp_path / 'whole', study)
    largest = max((tmp_path / 'whole').iterdir(), key=lambda path: path.stat().st_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest.stat().st_size - short, hard))
    try:
        with pytest.raises(OSError, match=f'{largest.name} could not be written whole; free some space or choose another folder'):
            fill_study(tmp_path / 'cut', study)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_command_writes_a_whole_study(written):
    names = {path.name for path in written.iterdir()}
    assert names == {'ct.nii.gz', 'mri_on_ct.nii.gz', 'mask.nii.gz', 'fused_brain.nii.gz', 'mri_to_ct.tfm', 'slices_brain.csv', 'run.json', 'report.html',
                     'scan_fusion.ipynb', 'dicom_brain'}
    record = json.loads((written / 'run.json').read_text())
    assert record['verdict'] == 'given' and record['ct']['description'] == 'ct axial' and len(record['files_sha256']) == 8 and record['dicom'] == 'with its patient'
    page = (written / 'report.html').read_text()
    assert 'data:image/png' in page and 'src="http' not in page and 'href="http' not in page
    assert ' in axial slices; windows of the CT: brain (level 40, width 80 HU).' in page
    assert [path for path in written.parent.iterdir()] == [written]


def test_no_word_of_a_report_is_cut_off(written):
    "Not by pandas, after 50 letters, and not at the edge of the window or of the paper, which no line of text without breaks may pass."
    page = (written / 'report.html').read_text()
    assert f'<td>{html.escape(LONG, quote=False)}</td>' in page and 'pre{white-space:pre-wrap' in page


def test_every_picture_of_a_report_says_what_it_shows(written):
    pictures = re.findall(r'<img[^>]*alt="([^"]*)"', (written / 'report.html').read_text())
    assert len(pictures) == 4 and not [alt for alt in pictures if 'No description' in alt] and 'brain' in pictures[2]


@pytest.mark.parametrize('stored', ['LPS', 'RAI', 'ASL', 'SRP'])
def test_a_picture_of_a_study_says_where_the_right_is(study, drawn, stored):
    "Whatever way the volumes are stored: what is bright on the patient's right is at the R."
    grid = sitk.DICOMOrient(study.grid, stored)
    everywhere = np.ones(grid.GetSize()[::-1], np.float32)
    oriented = replace(study, grid=grid, ct_weight=everywhere, series=[replace(study.series[0], weight=everywhere)])
    places = np.einsum('ij,jzyx->izyx', np.reshape(grid.GetDirection(), (3, 3)) * grid.GetSpacing(), np.indices(everywhere.shape)[::-1])       # LPS, mm
    ramps = {letter: sign * places[axis] for axis, letters in enumerate(('LR', 'PA', 'SI')) for letter, sign in zip(letters, (1, -1))}
    slices = {letter: studies.middle_slices(oriented, ramp) for letter, ramp in ramps.items()}
    for axis in studies.marked(studies.mosaic(slices['L']), oriented).axes:
        seen = {text.get_text(): text.get_position() for text in axis.texts}
        assert len(seen) == (4 if axis.get_title() else 0)
        for letter, (across, up) in seen.items():
            picture = slices[letter][axis.get_title()]
            assert picture[round((1 - up) * (len(picture) - 1)), round(across * (picture.shape[1] - 1))] > picture.mean() + 10


def test_nothing_but_the_dicom_series_knows_the_patient(written, patient):
    secrets = [*PLANTED, str(patient), str(written), str(written.parent)]
    for path in written.rglob('*'):
        if path.is_file() and path.suffix != '.dcm':
            data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
            for secret in secrets:
                assert secret.encode() not in data and secret.encode('utf-16-le') not in data, f'{secret} stands in {path.name}'


def test_an_anonymous_study_says_nothing_in_words_of_its_sources(patient, tmp_path):
    "A description is free text, in which names are found; the basic profile of PS3.15 takes it away."
    out = tmp_path / 'study'
    words = ['scan', patient / 'ct', patient / 'mri', '-o', out, '-m', 'maximum', '--transform', patient / 'truth.tfm', '--anonymous', '-p', 'mri_series=[gradient echo]']
    result = CliRunner().invoke(app, list(map(str, words)), prog_name='medfusion')
    assert result.exit_code == 0, result.output
    for path in (path for path in out.rglob('*') if path.is_file()):
        data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        assert not [word for word in (*PLANTED, 'ct axial', 'gradient echo', '&lt;Gd', '<Gd') if word.encode() in data], path.name
    assert '()' not in (out / 'report.html').read_text()


def test_the_derived_series_belongs_to_its_study(written, drawn):
    files = sorted((written / 'dicom_brain').iterdir())
    headers = [pydicom.dcmread(path) for path in files]
    one = headers[3]
    assert (one.SOPClassUID, one.Modality, list(one.ImageType[:2]), one.ScanningSequence) == (pydicom.uid.MRImageStorage, 'MR', ['DERIVED', 'SECONDARY'], 'RM')
    assert (one.PatientID, one.StudyInstanceUID, one.FrameOfReferenceUID) == ('XKID8151', '1.2.826.0.99.1', '1.2.826.0.99.12')
    assert one.BurnedInAnnotation == 'NO' and 'RescaleSlope' not in one and 'RescaleIntercept' not in one and (one.WindowCenter, one.WindowWidth) == (2048, 4096)
    assert 'maximum' in one.DerivationDescription and 'sha256' in one.DerivationDescription and len({header.SOPInstanceUID for header in headers}) == len(files)
    assert one.SourceImageSequence[0].ReferencedSOPClassUID == pydicom.uid.CTImageStorage and not one.SeriesInstanceUID.startswith('1.2.826.0.99.')
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(written / 'dicom_brain')))
    image = reader.Execute()
    for there, here in ((image.GetOrigin(), drawn.ct.GetOrigin()), (image.GetSpacing(), drawn.ct.GetSpacing()), (image.GetDirection(), drawn.ct.GetDirection())):
        assert np.allclose(there, here, atol=1e-4)


def test_a_study_is_replaced_only_if_asked_and_fused_again(written):
    words = ['scan', '--study', str(written), '-o', str(written), '-m', 'average', '--window', 'bone']
    result = CliRunner().invoke(app, words, prog_name='medfusion')
    assert result.exit_code == 1 and '--replace' in result.output and (written / 'fused_brain.nii.gz').is_file()


@pytest.mark.parametrize('window, dicom, lost', [('bone', '', ['brain', '480_2500']), ('brain,480,2500,bone', '', []), ('brain,480,2500', 'with its patient', ['DICOM series'])])
def test_a_study_is_fused_again_in_its_own_folder_and_what_goes_is_told_before(study, tmp_path, monkeypatch, window, dicom, lost):
    "Without -o: not in ./study, which may be another one."
    monkeypatch.chdir(tmp_path)
    for name in ('study', 'kept'):
        with new_folder_at(name) as folder:
            fill_study(folder, replace(study, record=study.record | {'dicom': dicom}))
    places = []

    def execute(notebook, executed, given):
        places.append(Path(given['out_dir']).name)
        raise ValueError('stopped here')
    monkeypatch.setattr('medfusion.cli.execute', execute)
    result = CliRunner().invoke(app, ['scan', '--study', 'kept', '--window', window, '-m', 'maximum', '--replace'], prog_name='medfusion')
    assert result.exit_code == 1 and 'kept' in places[0]
    assert ('kept is replaced as a whole' in result.output) == bool(lost) and all(name in result.output for name in lost)


def test_a_fault_of_the_scans_is_told_without_the_notebook(patient, tmp_path):
    words = ['scan', patient / 'mri', patient / 'ct', '-o', tmp_path / 'study', '-m', 'maximum']
    result = CliRunner().invoke(app, list(map(str, words)), prog_name='medfusion')
    assert result.exit_code == 1 and 'the order is CT, then MRI' in result.output and 'ipynb' not in result.output


@pytest.fixture
def signed(drawn, tmp_path):
    "An MRI of signed values (PSIR) in a file that names no modality, which reaches down to what is air in a CT."
    values = sitk.GetArrayFromImage(drawn.mri)
    mri = sitk.GetImageFromArray((values / values.max() * 3000 - 1000).astype(np.float32))
    mri.CopyInformation(drawn.mri)
    for name, image in (('ct', drawn.ct), ('psir', mri)):
        sitk.WriteImage(image, str(tmp_path / f'{name}.nii.gz'))
    return tmp_path


def test_an_mri_that_looks_like_a_ct_is_refused_and_taken_on_demand(signed, patient):
    words = ['scan', signed / 'ct.nii.gz', signed / 'psir.nii.gz', '-o', signed / 'study', '-m', 'maximum', '--transform', patient / 'truth.tfm']
    refused = CliRunner().invoke(app, list(map(str, words)), prog_name='medfusion')
    assert refused.exit_code == 1 and 'looks like a CT' in refused.output and '--signed-mri' in refused.output and not (signed / 'study').exists()
    result = CliRunner().invoke(app, [*map(str, words), '--signed-mri'], prog_name='medfusion')
    assert result.exit_code == 0, result.output
    notes = ' '.join(json.loads((signed / 'study' / 'run.json').read_text())['mri']['']['notes'])
    assert 'said to be an MRI' in notes and 'is a CT' not in notes


def test_an_mri_that_is_filled_as_air_is_taken_on_demand(signed):
    values = sitk.GetArrayFromImage(sitk.ReadImage(signed / 'psir.nii.gz')) + 1000
    values[:, :3] = -1024
    filled = studies.as_mri(Scan(sitk.GetImageFromArray(values), 'CT', is_hu=True))
    assert not filled.is_hu and filled.modality == '' and 0 <= sitk.GetArrayFromImage(filled.image).min() < 1 and '-1024' in ' '.join(filled.notes)


def test_a_ct_whose_header_says_so_is_no_signed_mri(patient):
    ct = read_scan(patient / 'ct')
    assert studies.as_mri(ct) is ct
    with pytest.raises(ValueError, match='order is CT, then MRI') as caught:
        scan_fusion(ct, replace(ct, image=ct.image + 1), model='maximum', registered=True, signed_mri=True)
    assert 'signed_mri' not in str(caught.value)


def test_what_is_no_scan_is_told(scans):
    ct, mri = scans
    for wrong, sentence in (([mri], 'dict {label: MRI}'), ({}, 'is empty'), ({'t1': None}, 'NoneType')):
        with pytest.raises(ValueError, match=sentence):
            scan_fusion(ct, wrong, model='maximum')


def test_fusing_again_needs_no_registration(study, tmp_path):
    with new_folder_at(tmp_path / 'study') as folder:
        fill_study(folder, study)
    again = fuse_study(read_study(tmp_path / 'study'), 'brain', 'maximum')
    assert np.abs(again.series[0].fused['brain'] - study.series[0].fused['brain']).max() < .01
    assert again.record['windows'][0]['name'] == 'brain' and len(again.record['windows']) == 1


def test_a_crash_leaves_nothing(tmp_path, study):
    with pytest.raises(RuntimeError), new_folder_at(tmp_path / 'study') as folder:
        fill_study(folder, study)
        raise RuntimeError('the disk is full')
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'letter.txt').write_text('dear')
    with pytest.raises(FileExistsError, match='no study'), new_folder_at(tmp_path / 'mine', replace=True):
        pass


def test_what_only_the_ct_shows_is_the_ct(study):
    one = study.series[0]
    alone = one.weight == 0
    assert alone.mean() > .1 and np.array_equal(one.fused['brain'][alone], studies.windows()['brain'].of(study.ct)[alone])
    grey = studies.windows()['brain'].of(study.ct)
    border = (one.weight[1:] == 0) != (one.weight[:-1] == 0)
    assert np.abs(np.diff(one.fused['brain'] - grey, axis=0))[border].mean() < .05


@pytest.mark.parametrize('unit', [1e-12, 1e-6, 1e6])
def test_an_mri_in_any_unit_is_seen(scans, unit):
    "A map of diffusion in m²/s has values of a billionth; it came out black, as if there were no MRI."
    low, high = studies.mri_limits(scans[1].image * unit)
    assert low < high and abs(high / unit - studies.mri_limits(scans[1].image)[1]) < 50


def test_an_mri_of_one_value_has_limits_that_differ(scans):
    low, high = studies.mri_limits(scans[1].image * 0 + 1e12)
    assert low < high


def test_a_failed_registration_fuses_nothing_unless_forced(scans, monkeypatch):
    monkeypatch.setattr(studies, 'register', lambda ct, mri, **more: Registration(sitk.Euler3DTransform(), 'failed', ['halves lie 30 mm apart']))
    assert scan_fusion(*scans, model='maximum').series[0].fused == {}
    forced = scan_fusion(*scans, model='maximum', force=True)
    assert list(forced.series[0].fused) == ['brain']
    assert studies.fused_planes(forced)._suptitle.get_text() == 'REGISTRATION FAILED'


def test_the_grid_of_the_mri_keeps_its_voxels(scans, drawn):
    found = scan_fusion(*scans, model='maximum', grid='mri', transform=drawn.truth)
    assert found.grid.GetSize() == drawn.mri.GetSize()
    assert np.allclose(found.series[0].mri[1:-1, 1:-1, 1:-1], sitk.GetArrayFromImage(drawn.mri)[1:-1, 1:-1, 1:-1], atol=.5)


@pytest.mark.parametrize('first', [0, 1])
def test_sagittal_scans_are_fused_however_many_slices_a_batch_is_left_with(first):
    drawn = phantom_study(12, ct_spacing=(4., 4., 6.), mri_spacing=(4., 4., 6.), pose=(8., 10.), plane='sagittal')
    mri = drawn.mri[:, :, first:]
    for size in (1, 2):
        found = scan_fusion(drawn.ct, Scan(mri, 'MR'), model='maximum', transform=drawn.truth, grid='mri', batch_size=size)
        assert found.plane == 'sagittal' and found.series[0].fused['brain'].shape == mri.GetSize()[::-1]


def test_several_series_onto_one_ct(scans, drawn, tmp_path):
    ct, mri = scans
    other = Scan(mri.image * 1.5, 'MR', 't2 tse')
    found = scan_fusion(ct, {'t1': mri, 't2': other}, model='maximum', transform=drawn.truth, plane='coronal', spacing=6.)
    fill_study(tmp_path, found)
    assert {'fused_t1_brain.nii.gz', 'fused_t2_brain.nii.gz', 'mri_to_ct_t2.tfm'} <= {path.name for path in tmp_path.iterdir()}
    assert found.plane == 'coronal' and np.allclose(found.grid.GetSpacing(), 6)
    assert 'taken for every MRI' in ' '.join(found.record['notes'])


def test_a_label_that_begins_another_keeps_its_own_volumes(scans, drawn, tmp_path):
    ct, mri = scans
    found = scan_fusion(ct, {'t1': mri, 't1_gd': Scan(mri.image * 1.5, 'MR', 't1 with gadolinium')}, model='maximum', transform=drawn.truth, spacing=8.)
    read = read_study(fill_study(tmp_path, found))
    assert [[*one.fused] for one in read.series] == [['brain'], ['brain']]


def test_each_series_has_its_own_verdict_and_its_own_middle(scans, drawn, patient, tmp_path, monkeypatch):
    "The pictures of a good series were headed by the failure of another, and laid through the middle of the first."
    ct, mri = scans
    verdicts = iter(('failed', 'good'))
    monkeypatch.setattr(studies, 'register', lambda *_, **__: Registration(drawn.truth, next(verdicts), ['as said']))
    found = scan_fusion(ct, {'t1': mri, 'slab': Scan(mri.image[:, :, -8:], 'MR', 'uppermost')}, model='maximum', force=True)
    for picture in (studies.checkerboards, studies.bone_contours, studies.fused_planes):
        one, other = (picture(found, label=label) for label in ('t1', 'slab'))
        assert one.get_suptitle() == 'REGISTRATION FAILED' and not other.get_suptitle()
        assert other.axes[0].images[0].get_array().max() > 0
    for grid, words in (('ct', ['FAILED fused brain t1', 'fused brain slab']), ('mri', ['FAILED fused brain t1', 'FAILED fused brain slab'])):
        found.record['grid'], found.series[0].frame = grid, studies.frame_of(found.grid)
        studies.write_dicom(tmp_path / grid, found, read_scan(patient / 'ct').reference)
        assert [pydicom.dcmread(tmp_path / grid / f'dicom_{label}_brain' / '0001.dcm').SeriesDescription for label in ('t1', 'slab')] == words


def test_what_is_refused_is_refused_in_a_sentence(scans):
    for label in ('t1/gd', 't1\\gd', 'x' * 300, 1):
        with pytest.raises(ValueError, match='part of file names'):
            scan_fusion(*scans[:1], {'t2': 'nowhere', label: 'nowhere either'})
    ct, mri = scans
    for wrong, words in (({'window': 'lung'}, 'no window'), ({'grid': 'pet'}, "'ct' or 'mri'"), ({'model': 'none'}, 'no model'), ({'plane': 'tilted'}, 'no plane'),
                         ({'spacing': 90.}, 'spacing')):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            scan_fusion(ct, mri, **{'model': 'maximum', 'registered': True} | wrong)
    for pair, words in (((mri, mri), 't1 space.*Hounsfield.*order is CT, then MRI'), ((mri, ct), 't1 space.*order is CT, then MRI'),
                        ((ct, ct), 'thin bone.*order is CT, then MRI'), ((Scan(mri.image, '', 'x'), ct), 'order is CT, then MRI'),
                        ((Scan(mri.image, 'CT', 'x'), mri), 'export it with its rescale values, and neither cut out nor clipped to a window: air near −1000 is looked for'),
                        ((Scan(sitk.Clamp(ct.image, sitk.sitkFloat32, 0, 90), '', 'brain alone'), mri), 'no air.*set what is around it to −1000'),
                        ((ct, {'t1': mri, 't2': Scan(mri.image, 'MR', 'copy')}), 't1 .t1 space. and t2 .copy. .*one and the same')):
        with pytest.raises(ValueError, match=words):
            scan_fusion(*pair, model='maximum', registered=True)
    one, other = (Scan(scan.image, scan.modality, is_hu=scan.is_hu, patient=key) for scan, key in ((ct, 'a'), (mri, 'b')))
    with pytest.raises(ValueError, match='different patients'):
        scan_fusion(one, other, registered=True)


def test_an_image_that_is_no_volume_of_numbers_is_refused_and_one_with_nan_mended(scans, drawn):
    "A SimpleITK image has gone through no reader."
    ct, mri = (one.image for one in scans)
    for wrong, words in ((mri[:, :, 5], '2 dimensions'), (sitk.Compose(mri, mri), '2 numbers a voxel')):
        with pytest.raises(ValueError, match=f'image has {words}|image is in colour or has {words}'):
            scan_fusion(ct, wrong, model='maximum', transform=drawn.truth)
    values = sitk.GetArrayFromImage(mri)
    values[0, 0, 0] = np.nan
    holed = sitk.GetImageFromArray(values)
    holed.CopyInformation(mri)
    assert 'NaN' in scan_fusion(ct, holed, model='maximum', transform=drawn.truth).series[0].notes[0]


def test_a_given_transform_is_checked(scans, drawn):
    ct, mri = scans
    found = studies.brought_together(ct, mri, drawn.truth)
    assert found.verdict == 'given' and found.signs['seen_share'] > .3 and 'other way' not in found.sentence
    away = lambda mm: sitk.TranslationTransform(3, (0., 0., mm))
    with pytest.raises(ValueError, match='0% of the head') as caught:
        studies.brought_together(ct, mri, away(900.))
    assert 'other way' not in str(caught.value)
    apart = sitk.Image(mri.image)                                        # the MRI's table stood elsewhere
    apart.SetOrigin([x + y for x, y in zip(apart.GetOrigin(), (0., 0., 90.))])
    half = studies.brought_together(ct, Scan(apart, 'MR'), away(0.))
    assert 'other way' not in half.sentence
    with pytest.raises(ValueError, match='other way'):
        studies.brought_together(ct, Scan(apart, 'MR'), away(-90.))
    apart.SetOrigin([x + y for x, y in zip(mri.image.GetOrigin(), (0., 0., 40.))])
    assert 'other way' in studies.brought_together(ct, Scan(apart, 'MR'), away(-40.)).sentence


def test_scans_that_are_said_to_be_registered_are_checked(scans):
    ct, mri = scans
    assert studies.brought_together(ct, mri, registered=True).signs['seen_share'] > .3
    apart = sitk.Image(mri.image)
    apart.SetOrigin([x + y for x, y in zip(mri.image.GetOrigin(), (400., 0., 0.))])
    with pytest.raises(ValueError, match='said to be registered.*0% of the head.*leave that out'):
        scan_fusion(ct, Scan(apart, 'MR'), model='maximum', registered=True)


def test_what_no_voxel_shows_twice_is_no_study(scans, monkeypatch):
    ct, mri = scans
    monkeypatch.setattr(studies, 'register', lambda *_, **__: Registration(sitk.Euler3DTransform((0., 0., 0.), 0., 0., 0., (0., 0., 900.)), 'failed', ['it leads away']))
    with pytest.raises(ValueError, match='t1 space.*share no voxel.*it leads away'):
        scan_fusion(ct, mri, model='maximum', force=True)
    assert scan_fusion(ct, mri, model='maximum').series[0].fused == {}
    monkeypatch.undo()
    for pair in ((ct, Scan(mri.image[:, :, 9:11], 'MR', 'two')), (Scan(ct.image[:, :, 9:11], 'CT', 'two', True), mri)):
        with pytest.raises(ValueError, match='two. has 2 slices'):
            scan_fusion(*pair, model='maximum', registered=True)


def test_a_frame_of_reference_is_not_believed_unchecked(drawn):
    "The phantom's MRI in place, and 7 mm aside, under the CT's frame of reference."
    ct = studies.shrunk(drawn.ct, 7)     # quicker
    there = studies.resampled(drawn.mri, ct, drawn.truth)
    aside = sitk.Image(there)
    aside.SetOrigin([x + y for x, y in zip(there.GetOrigin(), (6., 0., 4.))])
    found = [studies.brought_together(Scan(ct, 'CT', is_hu=True, frame_of_reference='1.2'), Scan(mri, 'MR', frame_of_reference='1.2')) for mri in (there, aside)]
    assert [one.verdict for one in found] == ['given', 'doubtful'] and 'moves by' in found[1].sentence
    assert all(np.allclose(one.transform.TransformPoint((1., 2., 3.)), (1, 2, 3)) for one in found)


def test_a_derived_slice_names_the_source_that_lies_where_it_does(drawn, patient, tmp_path):
    "Where slices are missing and filled, there are fewer sources; a gap is filled from the side that is nearer."
    reference = [header for number, header in enumerate(read_scan(patient / 'ct').reference) if number not in (2, 3)]
    files = studies.write_derived(tmp_path, np.zeros((7, *drawn.ct.GetSize()[1::-1])), drawn.ct[:, :, :7], reference, 'Fused', 'fused')
    places = {header.SOPInstanceUID: float(header.ImagePositionPatient[2]) for header in reference}
    away = [places[one.SourceImageSequence[0].ReferencedSOPInstanceUID] - float(one.ImagePositionPatient[2]) for one in map(pydicom.dcmread, files)]
    assert np.allclose(away, [0, 0, -6, 6, 0, 0, 0], atol=1e-3)


@pytest.mark.parametrize('lost', ['SOPClassUID', 'SOPInstanceUID'])
def test_a_derived_slice_names_no_source_that_has_no_name(drawn, patient, tmp_path, lost):
    reference = [pydicom.Dataset(header) for header in read_scan(patient / 'ct').reference]
    delattr(reference[1], lost)
    files = studies.write_derived(tmp_path, np.zeros((3, *drawn.ct.GetSize()[1::-1])), drawn.ct[:, :, :3], reference, 'Fused', 'fused')
    assert ['SourceImageSequence' in pydicom.dcmread(path) for path in files] == [True, False, True]


@pytest.mark.parametrize('number', ['1.2.826.0.99.2', ''])
def test_derived_series_of_a_source_without_numbers_lie_in_a_study_that_has_one(study, patient, tmp_path, number):
    "Archives and viewers take no series without a StudyInstanceUID, and lay series over each other by their frame of reference."
    reference = [pydicom.Dataset(header) for header in read_scan(patient / 'ct').reference]
    for header in reference:
        del header.StudyInstanceUID, header.FrameOfReferenceUID
        header.SeriesInstanceUID = number
    studies.write_dicom(tmp_path, study, reference)
    found = [pydicom.dcmread(path) for path in tmp_path.rglob('*.dcm')]
    assert {len({one[keyword].value for one in found}) for keyword in ('StudyInstanceUID', 'FrameOfReferenceUID')} == {1 if number else 2}
    assert all(pydicom.uid.UID(one[keyword].value).is_valid for one in found for keyword in ('StudyInstanceUID', 'FrameOfReferenceUID'))
    assert not number or number not in {found[0].StudyInstanceUID, found[0].FrameOfReferenceUID}


def test_derived_series_have_a_number_each_and_say_what_was_once_compressed_with_loss(study, patient, tmp_path):
    reference = [pydicom.Dataset(header) for header in read_scan(patient / 'ct').reference]
    studies.write_dicom(tmp_path / 'plain', study, reference)
    reference[0].LossyImageCompression, reference[0].LossyImageCompressionRatio = '01', '12.5'
    studies.write_dicom(tmp_path / 'lossy', study, reference)
    for folder, lossy in (('plain', None), ('lossy', '01')):
        found = [pydicom.dcmread(path) for path in (tmp_path / folder).rglob('*.dcm')]
        assert {one.get('LossyImageCompression') for one in found} == {lossy}
        assert {one.SeriesNumber for one in found} == {9001, 9002} and len({(one.SeriesNumber, one.SeriesInstanceUID) for one in found}) == 2


def test_an_anonymous_series_names_nobody(study, patient, tmp_path):
    reference = read_scan(patient / 'ct').reference
    for path in studies.write_derived(tmp_path, study.series[0].fused['brain'][:2], study.grid, reference, 'Fused', 'fused', anonymous=True):
        data = path.read_bytes()
        assert not [secret for secret in PLANTED if secret.encode() in data]
        assert 'SourceImageSequence' not in pydicom.dcmread(path)
    studies.write_dicom(tmp_path / 'whole', study, reference, anonymous=True)
    told = {pydicom.dcmread(path).DerivationDescription for path in (tmp_path / 'whole').rglob('*.dcm')}
    assert len(told) == 2 and not [text for text in told if 't1 space' in text or 'sha256' not in text]
    series = [pydicom.dcmread(path) for path in (tmp_path / 'whole').rglob('*.dcm')]
    assert [len({one[keyword].value for one in series}) for keyword in ('StudyInstanceUID', 'FrameOfReferenceUID', 'SeriesInstanceUID')] == [1, 1, 2]
    assert not [text for one in series for text in (one.StudyDate, one.PatientBirthDate, one.get('SpecificCharacterSet')) if text]


def test_a_study_does_not_name_the_files_that_broke_off(drawn, patient, tmp_path):
    shutil.copytree(patient / 'ct', tmp_path / 'ct')
    last = max((tmp_path / 'ct').iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    (tmp_path / 'ct' / 'zzfamilyname.dcm').write_bytes(last.read_bytes()[:420])
    found = scan_fusion(tmp_path / 'ct', patient / 'mri', model='maximum', transform=drawn.truth)
    notes = json.dumps(found.record)
    assert '1 file(s) beside it' in notes and 'zzfamilyname' not in notes


# What is there

def test_only_a_study_and_nothing_else_is_replaced(tmp_path):
    "A training's folder, a study with somebody's files in it, and a good study that a failed one would follow stay as they are."
    def study(folder, verdict='good', forced=False):
        folder.mkdir(exist_ok=True)
        (folder / 'run.json').write_text(json.dumps({'format': 'medfusion study 1', 'verdict': verdict, 'forced': forced, 'files_sha256': {}}))
        return folder
    study(tmp_path / 'study')
    (tmp_path / 'study/raw').mkdir()
    (tmp_path / 'study/raw/1.dcm').write_text('the source')
    (tmp_path / 'training').mkdir()
    (tmp_path / 'training/run.json').write_text('{"format": "medfusion run 1"}')
    for name, words in (('study', 'holds raw/1.dcm, which is no part of its study'), ('training', 'is no study')):
        with pytest.raises(FileExistsError, match=words), new_folder_at(tmp_path / name, replace=True):
            raise AssertionError('never begun')
    (tmp_path / 'study/raw/1.dcm').unlink()
    (tmp_path / 'study/.ipynb_checkpoints').mkdir()                    # JupyterLab's copies
    (tmp_path / 'study/.ipynb_checkpoints/report-checkpoint.html').write_text('')
    with pytest.raises(FileExistsError, match='the study in .* stays as it was'), new_folder_at(tmp_path / 'study', replace=True) as folder:
        study(folder, 'failed')
    assert json.loads((tmp_path / 'study/run.json').read_text())['verdict'] == 'good'
    with new_folder_at(tmp_path / 'study', replace=True) as folder:
        study(folder, 'failed', forced=True)
    assert json.loads((tmp_path / 'study/run.json').read_text())['verdict'] == 'failed'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['study', 'training']


def test_stopped_between_the_two_renames(tmp_path, monkeypatch):
    (tmp_path / 'study').mkdir()
    (tmp_path / 'study/run.json').write_text('{"format": "medfusion study 1", "files_sha256": {}}')
    moved = []

    def stops(source, target, real=os.replace):
        moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        real(source, target)
    with pytest.raises(KeyboardInterrupt), new_folder_at(tmp_path / 'study', replace=True) as folder:
        (folder / 'run.json').write_text('{"format": "medfusion study 1", "verdict": "good"}')
        monkeypatch.setattr('medfusion.studies.os.replace', stops)
    assert [path.name for path in tmp_path.iterdir()] == ['study'] and 'verdict' not in (tmp_path / 'study/run.json').read_text()


def a_study(folder, told):
    (folder / 'run.json').write_text(json.dumps({'format': 'medfusion study 1', 'verdict': told, 'files_sha256': {}}))


def test_the_place_of_a_disk_is_no_place_for_a_study(tmp_path, monkeypatch):
    "As a volume of a container: that was told after minutes, as a device that is busy."
    (tmp_path / 'volume').mkdir()
    (tmp_path / 'link').symlink_to('volume')
    monkeypatch.setattr(os.path, 'ismount', lambda path: str(path) == f'{tmp_path}/volume')
    for place in ('volume', 'link'):
        with pytest.raises(FileExistsError, match='volume is where a disk is mounted, .* name a new folder in it'), new_folder_at(tmp_path / place, replace=True):
            pytest.fail('work for nothing')
    with pytest.raises(FileExistsError, match='where a disk is mounted'):       # the notebook looks before it registers
        check_replaceable(tmp_path / 'link')
    with new_folder_at(tmp_path / 'volume/study') as folder:
        (folder / 'run.json').write_text('{}')
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['link', 'run.json', 'study', 'volume']


@pytest.mark.parametrize('full', [False, True])
def test_a_linked_folder_stays_a_link(tmp_path, full):
    "The study goes where the link leads."
    (tmp_path / 'disk/mine').mkdir(parents=True)
    (tmp_path / 'study').symlink_to('disk/mine')
    if full:
        a_study(tmp_path / 'disk/mine', 'old')
    with new_folder_at(tmp_path / 'study', replace=True) as folder:
        a_study(folder, 'new')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['disk', 'study'] and (tmp_path / 'study').is_symlink()
    assert [path.name for path in (tmp_path / 'disk').iterdir()] == ['mine'] and 'new' in (tmp_path / 'disk/mine/run.json').read_text()


@pytest.mark.fault('scan', 'killed between two writes')
@pytest.mark.parametrize('place, moment', [('study', 1), ('study', 2), ('study', 3), ('new/study', 1), ('new/study', 2)])
def test_a_killed_study_is_whole_or_absent_and_disturbs_nobody(tmp_path, place, moment):
    "Killed as it is written, or before or between the two renames: the old one, or the new one; the next run clears what was left."
    path, there = tmp_path / place, place == 'study'
    if there:
        path.mkdir()
        a_study(path, 'old')

    def killed():
        calls, real = [], os.replace

        def dies(*given):
            calls.append(given)
            if len(calls) == moment - 1:
                os._exit(9)
            real(*given)
        with new_folder_at(path, replace=True) as folder:
            a_study(folder, 'new')
            if moment == 1:
                os._exit(9)
            os.replace = dies
    assert os.waitstatus_to_exitcode(in_child(killed)) == 9
    with pytest.raises(FileExistsError) if there else nullcontext(), new_folder_at(path) as folder:
        a_study(folder, 'last')
    assert [one.name for one in tmp_path.iterdir()] == [place.split('/')[0]] and [one.name for one in path.iterdir()] == ['run.json']
    assert json.loads((path / 'run.json').read_text())['verdict'] == ('old' if there else 'last')


@pytest.mark.fault('scan', 'several at once')
def test_a_study_that_another_run_made_meanwhile_stays(tmp_path):
    def other():
        with new_folder_at(tmp_path / 'study') as quick:
            a_study(quick, 'quick')
    with pytest.raises(FileExistsError, match='holds a study already'), new_folder_at(tmp_path / 'study') as slow:
        a_study(slow, 'slow')
        assert in_child(other) == 0
    assert [one.name for one in tmp_path.iterdir()] == ['study'] and 'quick' in (tmp_path / 'study/run.json').read_text()


def test_bars_of_progress_stay_out_of_reports():
    bar = {'output_type': 'stream', 'name': 'stderr', 'text': '\rtrying:   0%|          | 0/24\rtrying: 100%|###| 24/24 [00:03]\nMind the gap\n'}
    notebook = {'cells': [{'cell_type': 'code', 'id': 'a', 'metadata': {}, 'source': '', 'outputs': [bar]}], 'metadata': {}}
    assert scrubbed(notebook, [])['cells'][0]['outputs'][0]['text'] == 'Mind the gap\n'


def test_a_short_name_of_a_folder_garbles_no_report():
    "What was typed is taken out as whole words, and never out of what a notebook is made of."
    output = {'output_type': 'display_data', 'data': {'text/plain': ['Patient plum in /home/plum/scans']}, 'metadata': {}}
    notebook = {'cells': [{'cell_type': 'code', 'id': 'data', 'metadata': {}, 'source': 'display(study)', 'outputs': [output]}], 'metadata': {}}
    clean = scrubbed(notebook, ['plum', 'study', 'data', '/home/plum/scans'])
    assert clean['cells'][0]['source'] == 'display(study)' and clean['cells'][0]['id'] == 'data'
    assert clean['cells'][0]['outputs'][0]['output_type'] == 'display_data' and clean['cells'][0]['outputs'][0]['data']['text/plain'] == ['Patient … in …']


def test_a_folder_that_is_called_by_a_number_takes_no_digits_out_of_others():
    output = {'output_type': 'stream', 'name': 'stdout', 'text': 'case 512: 0.512, 512.5 and 1,512 of 512×512×40 voxels; 512. In /data/512/ct'}
    notebook = {'cells': [{'cell_type': 'code', 'id': 'a', 'metadata': {}, 'source': '', 'outputs': [output]}], 'metadata': {}}
    clean = scrubbed(notebook, ['/data/512/ct', '/data/512/mri'])['cells'][0]['outputs'][0]['text']
    assert clean == 'case …: 0.512, 512.5 and 1,512 of 512×512×40 voxels; …. In …'


def test_a_folder_with_letters_beyond_ascii_is_taken_out_of_the_cell_of_parameters(tmp_path):
    "papermill writes them there by their numbers (\\xfc), and a quotation mark with a backslash."
    typed = {'ct': '/data/Müller_Jürgen/ct', 'mri': ['/data/山田太郎/mri', '/data/Sean "O\'Brien"/mri']}
    source = PythonTranslator.codify(typed)
    notebook = {'metadata': {}, 'cells': [{'cell_type': 'code', 'id': name, 'metadata': {'tags': [name]}, 'source': text, 'outputs': []}
                                          for name, text in (('parameters', 'mri = []'), ('injected-parameters', source))]}
    clean = scrubbed(notebook, [typed['ct'], *typed['mri']])['cells'][1]['source']
    assert r'M\xfcller' in source and clean.split('\n')[1:3] == ['ct = "…"', 'mri = ["…", "…"]']


def test_the_notebook_refuses_a_folder_with_a_study_before_it_works(written):
    notebook = Path(__file__).parents[1] / 'nbs' / 'scan_fusion.ipynb'
    with pytest.raises(FileExistsError, match='holds a study already'):
        run_cells(notebook, {'out_dir': str(written), 'model': 'maximum'}, until='scans')


@pytest.mark.parametrize('given, words', [({'ct': 'cd', 'mri': ['cd'], 'ct_series': '1', 'mri_series': ['2', '3']}, r'names 2 series \(2, 3\) and mri 1 .* once for each'),
                                          ({'study': 'done', 'ct_series': '2'}, 'leave out ct_series'),
                                          ({'study': 'done', 'dicom': True}, 'leave dicom out, or'), ({'study': 'done', 'dicom': True, 'anonymous': True}, 'leave anonymous and dicom out, or'),
                                          ({'spacing': 2., 'dicom': True, 'anonymous': True}, 'leave anonymous and dicom out, or'),
                                          ({'study': 'done', 'different_patients': True, 'signed_mri': True}, 'leave out different_patients, signed_mri')])
def test_nothing_that_is_asked_of_scans_is_left_out_without_a_word(given, words):
    notebook = Path(__file__).parents[1] / 'nbs' / 'scan_fusion.ipynb'
    with pytest.raises(ValueError, match=words):
        run_cells(notebook, given | {'model': 'maximum', 'out_dir': ''}, until='scans')
