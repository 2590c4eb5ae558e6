"""The house rules of notebooks: clean, in sync with the package, and with one parameters cell where papermill runs them."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
PARAMETERISED = ['80_pretraining.ipynb', '90_benchmark.ipynb', 'resnet_based_fusion.ipynb', 'trainable-wavelet-fusion.ipynb']


def cells(path):
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def source(cell):
    return ''.join(cell['source'])


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the notebooks and settings, cleaned and exported anew."
    copy = tmp_path_factory.mktemp('clone')
    shutil.copytree(ROOT / 'nbs', copy / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    for name in ('settings.ini', 'setup.py', 'README.md'):
        shutil.copy(ROOT / name, copy / name)
    (copy / 'medfusion').mkdir()
    shutil.copy(ROOT / 'medfusion/__init__.py', copy / 'medfusion')
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True, capture_output=True)
    return copy


def test_notebooks_are_clean(exported):
    dirty = [path.name for path in NOTEBOOKS if path.read_text() != (exported / 'nbs' / path.name).read_text()]
    assert not dirty, f'run `make export`: {dirty} would be changed by nbdev_clean'


def test_package_is_what_the_notebooks_export(exported):
    made = {path.name: path.read_text() for path in (exported / 'medfusion').glob('*.py')}
    here = {path.name: path.read_text() for path in (ROOT / 'medfusion').glob('*.py')}
    assert sorted(made) == sorted(here)
    assert not [name for name in made if made[name] != here[name]], 'run `make export`'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_one_parameters_cell_where_papermill_runs_and_none_elsewhere(path):
    tagged = [cell for cell in cells(path) if 'parameters' in cell['metadata'].get('tags', [])]
    assert len(tagged) == (path.name in PARAMETERISED)
    for cell in tagged:
        for statement in ast.parse(source(cell)).body:
            assert isinstance(statement, ast.AnnAssign), f'a parameter without a type: {ast.unparse(statement)}'
            ast.literal_eval(statement.value)
        assert all('#' in line for line in source(cell).splitlines() if line.strip()), 'each parameter has a comment'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_reads_well(path):
    content = cells(path)
    assert len(content) <= 60
    assert source(content[0]).startswith('# ') and '\n> ' in source(content[0])
    assert path.stat().st_size < 1_500_000
    text = path.read_text()
    for trace in ('/home/', '/root/', '/tmp/', 'Traceback (most recent call last)', 'application/vnd.jupyter.widget-view'):
        assert not any(trace in json.dumps(cell.get('outputs', [])) for cell in content), f'{trace} in an output of {path.name}'
    assert 'eval: false' not in text, 'cells are not gated with directives but with parameters'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_show(path):
    "Each notebook carries outputs: it reads well on a web page."
    assert any(cell.get('outputs') for cell in cells(path) if cell['cell_type'] == 'code'), 'run `make notebooks`'
