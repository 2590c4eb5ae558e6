"""The house rules of notebooks: clean, in sync with the package, short exported cells with examples, and one parameters cell where papermill runs them."""
import ast
import base64
import inspect
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pytest
from medfusion.evaluation import reported_columns
from medfusion.inference import methods, network_roles
from medfusion.subbands import MaskNetwork
from medfusion.tables import render
from PIL import Image
from notebook_rule import MEDIAN, NINTH_DECILE, exported_cells, ninth_decile, source, unused_imports

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)

# Exported cells that may break the rule: notebook and public name -> reason. At most five.
EXCEPTIONS = {
    ('resnet_based_fusion', 'Config'): 'one line a parameter: a table, which two cells would hide',
    ('02_data', 'CTMRIDataset'): 'a data set is its item, its length and its repr: one class that fits a screen',
}

# What no committed output holds: folders of the machine it was made on, failures, widgets that show nothing on a web page.
TRACES = ('/home/', '/root/', '/tmp/', 'Traceback (most recent call last)', 'application/vnd.jupyter.widget-view')


def cells(path):
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def is_tagged(cell):
    return 'parameters' in cell['metadata'].get('tags', [])


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the notebooks and settings, cleaned and exported anew."
    copy = tmp_path_factory.mktemp('clone')
    shutil.copytree(ROOT / 'nbs', copy / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md'):
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
    assert (exported / 'pyproject.toml').read_text() == (ROOT / 'pyproject.toml').read_text()


@each_notebook
def test_exported_cells_keep_the_rule(path):
    found = [str(cell) for cell in exported_cells(path) if cell.faults and (path.stem, cell.names[:1]) not in allowed()]
    assert not found, 'one public name, at most 30 lines, an example right after it (`make count` shows all):\n' + '\n'.join(found)


@each_notebook
def test_exported_cells_import_what_they_use(path):
    assert unused_imports(path) == [], 'imports of examples belong in a cell that is not exported'


def imported(module):
    "The modules of the package that a module imports, inside of functions, too."
    nodes = [node for node in ast.walk(ast.parse((ROOT / f'medfusion/{module}.py').read_text(encoding='utf-8'))) if isinstance(node, ast.ImportFrom)]
    named = {(node.module or '').removeprefix('medfusion').strip('.') for node in nodes if node.level or node.module.startswith('medfusion.')}
    return {name for name in named if name} | {alias.name for node in nodes if not node.module and node.level or node.module == 'medfusion' for alias in node.names}


def test_nobody_imports_a_method():
    "What two of them need stands in a notebook before them; whoever needs a network asks `methods()`."
    of_methods = {info.module.rpartition('.')[2] for info in methods().values()}
    modules = {path.stem for path in (ROOT / 'medfusion').glob('[a-z]*.py')}
    assert of_methods <= modules and {module: found for module in modules if (found := imported(module) & of_methods)} == {}


def test_the_source_that_a_notebook_shows_is_that_of_the_package():
    outputs = [output for cell in json.loads((ROOT / 'nbs/trainable-wavelet-fusion.ipynb').read_text(encoding='utf-8'))['cells'] for output in cell.get('outputs', [])]
    shown = [text for output in outputs if (text := ''.join(output.get('data', {}).get('text/markdown', ''))).startswith('```python')]
    assert shown == [f'```python\n{inspect.getsource(MaskNetwork)}```']


def shown_by(notebook, words):
    "What the one cell of a notebook with these words in its source shows, as text."
    cell, = [cell for cell in cells(ROOT / 'nbs' / notebook) if cell.get('outputs') and words in source(cell)]
    return '\n'.join(''.join(output.get('text', output.get('data', {}).get('text/html', ''))) for output in cell['outputs'])


def test_the_benchmark_notebook_shows_the_networks_that_ship():
    "Its slices are those of the record of the synthetic head, and it was executed after the last network changed."
    shown = shown_by('90_benchmark.ipynb', 'print(render(means[reported_columns()]').splitlines()
    recorded = pd.read_csv(ROOT / 'results/recorded/phantom/summary.csv', index_col='method').loc[['wavelet', 'resnet'], reported_columns()]
    rows = render(recorded, bold=recorded.index).splitlines()[2:]
    assert [row for row in rows if row not in shown] == [], 'run `.ci/execute_notebooks.py 90_benchmark.ipynb`'


def test_the_ablation_notebook_shows_the_record_of_widths():
    shown = shown_by('91_ablation.ipynb', "pd.read_csv(resolve_path('../results/recorded/lite_widths.csv')")
    recorded = pd.read_csv(ROOT / 'results/recorded/lite_widths.csv')
    assert [row for row in zip(recorded.weights, recorded.ms) if f'<td>{row[0]:.0f}</td>\n      <td>{row[1]:.2f}</td>' not in shown] == []


def test_imports_run_one_way():
    modules = {path.stem for path in (ROOT / 'medfusion').glob('[a-z]*.py')}
    order = [*TopologicalSorter({module: imported(module) & modules for module in modules}).static_order()]    # CycleError, with its path, where there is a circle
    assert order.index('files') < order.index('runs') < order.index('inference') < order.index('cli')


def allowed():
    return [(notebook, [name]) for notebook, name in EXCEPTIONS]


def test_exported_cells_are_short_on_the_whole():
    lines = [cell.lines for path in NOTEBOOKS for cell in exported_cells(path)]
    assert median(lines) <= MEDIAN and ninth_decile(lines) <= NINTH_DECILE, \
        f'median {median(lines):g} (at most {MEDIAN}), ninth decile {ninth_decile(lines):g} (at most {NINTH_DECILE}) lines; see `make count`'


def test_exceptions_are_few_and_needed():
    needed = [(path.stem, cell.names[:1]) for path in NOTEBOOKS for cell in exported_cells(path) if cell.faults]
    assert len(EXCEPTIONS) <= 5
    assert not [key for key in allowed() if key not in needed], 'an exception that keeps the rule is taken from the list'


def notebook(*sources):
    return {'cells': [{'cell_type': 'code', 'metadata': {}, 'source': text, 'outputs': []} if not text.startswith('# ') else
                      {'cell_type': 'markdown', 'metadata': {}, 'source': text} for text in sources]}


ONE = '#| export\ndef half(x):\n    return x / 2'


@pytest.mark.parametrize('sources, fault', [
    ([ONE, 'assert half(2) == 1'], None),
    ([ONE, '# prose', 'half(2)'], None),
    (['#| export\nimport math\nfrom os import path', ONE, 'half(2)'], None),
    (['#|export\n_two = 2\ndef half(x):\n    return x / _two', 'half(2)'], None),
    ([ONE, ONE, 'half(2)'], 'no visible example'),
    ([ONE], 'no visible example'),
    ([ONE, '# | nothing but prose'], 'no visible example'),
    ([ONE, '#| hide\nhalf(2)'], 'no visible example'),
    ([ONE, '#| eval: true\n# only a comment'], 'no visible example'),
    ([ONE + '\nclass Whole: pass', 'half(2)'], '2 public names'),
    (['#| export\ndef _half(x):\n    return x / 2', '_half(2)'], '0 public names'),
    ([ONE + '\nimport math', 'half(2)'], 'imports belong'),
    ([ONE + '\n    pass' * 28, 'half(2)'], '31 lines'),
    ([ONE + '\ndef _other():' + '\n    pass' * 10, 'half(2)'], 'private helpers of 11 lines'),
])
def test_the_rule_sees(tmp_path, sources, fault):
    path = tmp_path / 'a.ipynb'
    path.write_text(json.dumps(notebook(*sources)))
    faults = [text for cell in exported_cells(path) for text in cell.faults]
    assert not faults if fault is None else any(fault in text for text in faults), faults


@each_notebook
def test_parameters(path):
    "At most one cell of parameters: literals with a type and a comment each, which papermill's reader understands."
    tagged = [cell for cell in cells(path) if is_tagged(cell)]
    assert len(tagged) <= 1
    for cell in tagged:
        for statement in ast.parse(source(cell)).body:
            assert isinstance(statement, ast.AnnAssign), f'a parameter without a type: {ast.unparse(statement)}'
            ast.literal_eval(statement.value)
        for line in filter(str.strip, source(cell).splitlines()):
            assert '#' in line, f'a parameter without a comment: {line}'


def test_notebooks_that_papermill_runs_have_parameters():
    "The methods (no number) and what is numbered from 80 up; a lost tag would silently run the defaults."
    lost = [path.name for path in NOTEBOOKS if not '00' <= path.name[:2] < '80' and not any(map(is_tagged, cells(path)))]
    assert not lost, f'no cell tagged `parameters` in {lost}'


@each_notebook
def test_notebook_reads_well(path):
    content = cells(path)
    assert source(content[0]).startswith('# ') and '\n> ' in source(content[0])
    assert path.stat().st_size < 1_500_000
    assert 'eval: false' not in path.read_text(), 'cells are not gated with directives but with parameters'


@each_notebook
def test_a_model_that_is_a_parameter_is_found_from_nbs(path):
    "As every path among the parameters is: from where the kernel was started, `../checkpoints/mine.pt` is another file, or none."
    code = '\n'.join(source(cell) for cell in cells(path) if cell['cell_type'] == 'code')
    roles = '|'.join(('model', *network_roles()))
    wrong = re.findall(rf'(?:find_model|load_model|start_from|fuse_study|scan_fusion)\((?!in_place)(?:[^()\n]*[ ,])?(?:p|cfg|parameters)\.(?:{roles})\b.*', code)
    assert not wrong, f'in_place(..., resolve_path) is missing: {wrong}'


def test_every_figure_passes_one_door():
    "There it gets colours that colour-blind readers tell apart."
    assert [path.stem for path in NOTEBOOKS if any('pyplot' in source(cell) and cell['cell_type'] == 'code' for cell in cells(path))] == ['01_figures']


@each_notebook
def test_committed_outputs_show(path):
    "Each notebook carries outputs, so that it reads well on a web page, and no trace of the machine that made them."
    made = [cell['outputs'] for cell in cells(path) if cell.get('outputs')]
    assert made, 'run `make notebooks`'
    assert not [trace for trace in TRACES if trace in json.dumps(made)], f'a trace of the machine in an output of {path.name}'


def test_a_committed_picture_is_made_smaller_unless_its_colours_fall_into_patches():
    smaller = runpy.run_path(str(ROOT / '.ci/execute_notebooks.py'))['smaller']
    red, green = np.random.default_rng(0).integers(0, 256, (2, 256, 256), np.uint8)
    for image, stays in ((np.dstack([red] * 3), False), (np.dstack([red, green, 255 - red]), True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, 'PNG', compress_level=1)
        written = base64.b64encode(png.getvalue()).decode()
        assert (smaller(written) == written) == stays


@pytest.mark.parametrize('method', methods().values(), ids=methods())
def test_what_a_method_prints_is_of_its_own_run(method):
    "`medfusion train` shows what is printed above the table of the run: numbers of the shipped network, or code, are shown in the notebook alone."
    printed = ''.join(''.join(output['text']) for cell in cells(ROOT / 'nbs' / method.notebook) for output in cell.get('outputs', []) if output['output_type'] == 'stream')
    assert 'never saw it' not in printed and 'class ' not in printed
