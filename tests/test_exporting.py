"""A network as an ONNX file and as safetensors: what is made of it, and what is refused."""
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from medfusion.cli import app
from medfusion.evaluation import cases_trained_on
from medfusion.exporting import export_network, export_onnx, onnx_facts, onnx_session
from medfusion.files import read_json, sha256_of, write_json
from medfusion.inference import fuse, load_model, model_sha256, shipped_models
from medfusion.phantom import phantom_slice


@pytest.mark.parametrize('name', shipped_models())
def test_files_from_outside_are_fused_alike(name, tmp_path):
    "16 bits, odd sizes, several at once: what `fuse` writes, to one of 65,535 levels."
    session = onnx_session(export_onnx(name, tmp_path / 'network.onnx'))
    cut = phantom_slice(12, 4, size=(101, 77))
    ct, mri = (np.rint(image * 65535).astype(np.uint16) for image in (cut.ct, cut.mri))
    given = [np.stack([image, image[::-1]])[:, None].astype(np.float32) / 65535 for image in (ct, mri)]
    fused, = session.run(None, dict(zip(('ct', 'mri'), given)))
    for number, pair in enumerate(((ct, mri), (ct[::-1], mri[::-1]))):
        wanted = fuse(*pair, model=name)
        assert np.abs(np.rint(fused[number, 0].astype(float) * 65535) - wanted).max() <= 1
    facts = session.get_modelmeta().custom_metadata_map
    assert facts['checkpoint_sha256'] == sha256_of(shipped_models()[name].path) and facts['name'] == name and 'not for diagnosis' in facts['limits']
    made = onnx.load(tmp_path / 'network.onnx')
    onnx.checker.check_model(made)
    assert [entry.version for entry in made.opset_import if not entry.domain] == [17]
    assert [axis.dim_param for axis in made.graph.input[0].type.tensor_type.shape.dim] == ['batch', '', 'height', 'width']
    assert [axis.dim_param or axis.dim_value for axis in made.graph.output[0].type.tensor_type.shape.dim] == ['batch', 1, 'height', 'width']


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('there.onnx').write_text('mine')
    Path('folder').mkdir()
    for words, sentence in ((('maximum', 'a.onnx'), 'a rule without weights'), (('wavelet', 'there.onnx'), 'is there already'),
                            (('wavelet', 'a.pt'), '.onnx'), (('wavelet', 'none/a.onnx'), 'no folder'), (('nobody', 'a.onnx'), "no model 'nobody'"),
                            (('wavelet', 'folder'), '.onnx')):
        result = CliRunner().invoke(app, ['export', *words])
        assert result.exit_code == 1 and sentence in result.stderr and result.stderr.count('\n') == 1, (words, result.output)
    assert Path('there.onnx').read_text() == 'mine' and sorted(path.name for path in Path().iterdir()) == ['folder', 'there.onnx']
    result = CliRunner().invoke(app, ['export', 'wavelet', 'there.onnx', '--replace'])
    assert result.exit_code == 0 and onnx.load('there.onnx').graph.output[0].name == 'fused'


@pytest.mark.parametrize('opset', [9, 24])
def test_an_opset_that_cannot_be(opset, tmp_path):
    with pytest.raises(ValueError, match=f'from 13 to 20, not in {opset}'):
        export_onnx('wavelet', tmp_path / 'a.onnx', opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('opset', [13, 20])
def test_the_first_opset_and_the_last(opset, tmp_path):
    for name in shipped_models():
        export_onnx(name, tmp_path / f'{name}.onnx', opset)             # which compares with the network


def test_where_the_packages_are_missing(tmp_path, monkeypatch):
    for package in ('onnx', 'onnxruntime'):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=r'pip install "medfusion\[onnx\]"'):
                export_onnx('wavelet', tmp_path / 'a.onnx')
    assert not list(tmp_path.iterdir())


def test_a_network_is_not_exported_over_itself_or_what_is_known_of_it(tmp_path):
    "Its metadata.json would be another file's."
    file = export_network('wavelet', tmp_path / 'shared.safetensors')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for spec, out in ((file, file), (tmp_path, file), (file, tmp_path / 'other.safetensors')):
        with pytest.raises(ValueError, match='is what is read'):
            export_network(str(spec), out, replace=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_alone_are_a_folder_that_load_model_reads(tmp_path):
    "The same bits, the same facts; a folder or a file, and a sentence where one of the two files is missing, torn or another's."
    file = export_network('resnet', tmp_path / 'shared.safetensors')
    told, before = read_json(tmp_path / 'metadata.json'), shipped_models()['resnet'].metadata
    assert told['sha256'] == sha256_of(file) and {name: fact for name, fact in told.items() if name not in ('checkpoint', 'sha256')} == \
        {name: fact for name, fact in before.items() if name not in ('checkpoint', 'sha256')}
    assert cases_trained_on(file) == cases_trained_on(shipped_models()['resnet'].path)
    cut = phantom_slice(12, 4, size=64)
    assert all(np.array_equal(fuse(cut.ct, cut.mri, model=str(place)), fuse(cut.ct, cut.mri, model='resnet')) for place in (tmp_path, file))
    with pytest.raises(FileExistsError, match='is there already'):
        export_network('wavelet', file)
    with pytest.raises(FileExistsError, match='tells of shared.safetensors, which lies there, too'):
        export_network('wavelet', tmp_path / 'other.safetensors')
    export_network('wavelet', file, replace=True)
    assert type(load_model(tmp_path, device='cpu')).__name__ == 'WaveletFusion'
    write_json(tmp_path / 'metadata.json', told)
    with pytest.raises(ValueError, match='do not fit ResNetFusion'):
        load_model(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match='truncated, damaged'):
        load_model(tmp_path)
    (tmp_path / 'metadata.json').unlink()
    with pytest.raises(ValueError, match='put the metadata.json beside it'):
        load_model(tmp_path)


def test_a_folder_holds_what_is_known_of_one_network(tmp_path):
    "A second network would change what the first one means."
    file = export_network('wavelet', tmp_path / 'a.safetensors')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match='tells of a.safetensors, which lies there, too; export into another folder'):
        export_network('wavelet@1', tmp_path / 'b.safetensors', replace=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    renamed = file.rename(tmp_path / 'b.safetensors')
    with pytest.raises(ValueError, match='tells of a.safetensors, not of b.safetensors; give the file that name again'):
        load_model(renamed)


def test_a_dial_that_was_turned_stays_there(tmp_path):
    "In both kinds of files; numbers of the network's own position are not told of another, and a folder of results is not taken for another position's."
    cut = phantom_slice(12, 4, size=64)
    for at in ('0', '1'):
        (tmp_path / at).mkdir()
        file = export_network(f'wavelet@{at}', tmp_path / at / 'a.safetensors')
        assert np.array_equal(fuse(cut.ct, cut.mri, str(file), 'cpu'), fuse(cut.ct, cut.mri, f'wavelet@{at}', 'cpu'))
        told = read_json(file.with_name('metadata.json'))
        assert told['config']['lesions'] == float(at) and 'numbers' not in told and told['cases'] == shipped_models()['wavelet'].metadata['cases']
    assert (tmp_path / '0/a.safetensors').read_bytes() == file.read_bytes() and model_sha256(str(tmp_path / '0')) != model_sha256(str(tmp_path / '1'))
    assert [onnx_facts(f'{shipped_models()["wavelet"].path}{at}')['lesions'] for at in ('', '@1')] == ['0.5', '1'] and 'lesions' not in onnx_facts('wavelet-lite')


def test_the_numbers_of_a_networks_own_position_are_told_of_it(tmp_path):
    told = read_json(export_network('wavelet@0.5', tmp_path / 'a.safetensors').with_name('metadata.json'))
    assert told['numbers'] == shipped_models()['wavelet'].metadata['numbers']


@pytest.mark.fault('export', 'killed, stopped or disk full between two files', points=4)
def test_weights_and_what_is_known_of_them_change_together(tmp_path, monkeypatch):
    file = export_network('resnet', tmp_path / 'a.safetensors')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for number, fault in itertools.product((1, 2), (KeyboardInterrupt, OSError(28, 'No space left on device'))):
        calls = []

        def fails(*given, real=os.replace):
            calls.append(given)
            if len(calls) == number:
                raise fault
            return real(*given)
        with monkeypatch.context() as patched:
            patched.setattr('medfusion.files.os.replace', fails)
            with pytest.raises((KeyboardInterrupt, OSError)):
                export_network('wavelet', file, replace=True)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
