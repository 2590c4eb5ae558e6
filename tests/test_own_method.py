"""A third method is a notebook and a line: what 70_your_own_method.ipynb asks for, done in a copy of the clone."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from medfusion.phantom import write_phantom
from medfusion.runs import notebook_parameters

ROOT = Path(__file__).resolve().parents[1]
LINE = "MethodInfo('pixel', 'pixel_weight.ipynb', 'pixel_weight', 'medfusion.pixel_weight', 'PixelWeight', 'pixel_weight_best.pt'),"


def sources(path):
    "The cells of a notebook file, and a function that writes them back."
    notebook = json.loads(path.read_text(encoding='utf-8'))

    def write(target):
        target.write_text(json.dumps(notebook), encoding='utf-8')
    return notebook['cells'], write


def change(cells, old, new):
    "Replaces a text that exactly one cell holds."
    [cell] = [cell for cell in cells if cell['cell_type'] == 'code' and old in ''.join(cell['source'])]
    cell['source'] = ''.join(cell['source']).replace(old, new)


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A copy of the clone with a small phantom in Dataset/, to which the notebook and the line were added."
    root = tmp_path_factory.mktemp('clone')
    for part in ('nbs', 'medfusion', 'params'):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__', 'resnet50_backbone.pt'))
    shutil.copy(ROOT / 'settings.ini', root)
    write_phantom(root / 'Dataset', cases=4, slices=3, size=64)
    cells, write = sources(root / 'nbs' / '70_your_own_method.ipynb')
    assert any(LINE in ''.join(cell['source']) for cell in cells), 'the chapter prints the line that is tested here'
    change(cells, "'70_your_own_method.ipynb'", "'pixel_weight.ipynb'")
    for cell in cells:
        if ''.join(cell['source']).startswith(('# default_exp', '# export')) and cell['cell_type'] == 'code':
            cell['source'] = '#|' + ''.join(cell['source'])[1:]
    write(root / 'nbs' / 'pixel_weight.ipynb')
    cells, write = sources(root / 'nbs' / '20_inference.ipynb')
    change(cells, "'ResNetFusion', 'resnet_fusion_best.pt'),", f"'ResNetFusion', 'resnet_fusion_best.pt'),\n        {LINE}")
    write(root / 'nbs' / '20_inference.ipynb')
    export = "from nbdev.export import nb_export; [nb_export(f'nbs/{name}.ipynb', 'medfusion') for name in ('pixel_weight', '20_inference')]"
    done(root, 'python', '-c', export)
    return root


def done(root, program, *arguments):
    "What a program of this environment printed, run in the copy with the copy's package."
    environment = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'IN_TEST': '', 'MPLBACKEND': 'agg'}
    process = subprocess.run([Path(sys.executable).with_name(program), *map(str, arguments)], cwd=root, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return process.stdout


def test_the_notebook_takes_what_the_tools_give_every_method():
    "`medfusion train --range`, and the cases that a cross-validation leaves out."
    assert {'value_range', 'val_cases', 'test_cases'} <= notebook_parameters('70_your_own_method.ipynb').keys()


@pytest.mark.long
def test_a_notebook_and_a_line_make_a_method(clone):
    done(clone, 'medfusion', 'train', 'pixel', '--run', 'first', '-p', 'epochs=2')
    record = json.loads((clone / 'results/pixel_weight/first/run.json').read_text())
    assert record['method'] == 'pixel_weight' and record['state'] == 'finished' and record['parameters']['epochs'] == 2
    assert set(record['numbers']['means']) == {'pixel weight', 'average', 'maximum'} and record['numbers']['lesions_kept']
    test = clone / 'Dataset/test'
    done(clone, 'medfusion', 'fuse', test / 'CT', test / 'MRI', '-o', clone / 'fused', '-m', 'run:first')
    assert [path.name for path in sorted((clone / 'fused').glob('*.png'))] == [path.name for path in sorted((test / 'CT').iterdir())]
    done(clone, 'medfusion', 'benchmark', '--run', 'first', '-p', 'checkpoints=[run:first]', '-p', 'rules=[]')
    summary = pd.read_csv(clone / 'results/benchmark/first/summary.csv', index_col='method')
    assert summary.kind['first'] == 'network' and summary.parameters['first'] == 8 * 2 * 9 + 8 + 8 * 9 + 1
    assert summary.EN['first'] == pytest.approx(record['numbers']['means']['pixel weight']['EN'], abs=1e-4)


@pytest.mark.long
def test_the_method_is_cross_validated(clone):
    (clone / 'params' / 'pixel_short.yaml').write_text('epochs: 1\n')
    done(clone, 'papermill', 'nbs/92_cross_validation.ipynb', 'out.ipynb', '--no-progress-bar', '-p', 'make', 'missing', '-p', 'records', str(clone / 'records'),
         '-y', "recipes: [pixel_short]\ncases: ['1']\nrivals: [maximum]\nchosen_by: []")
    record = json.loads((clone / 'records/pixel_short-without-1.json').read_text())
    assert record['method'] == 'pixel' and record['trained_on'] == ['2', '3', '4'] and set(record['numbers']['1']) > {'network', 'maximum'}
