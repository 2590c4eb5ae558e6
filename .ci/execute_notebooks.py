"""Execute notebooks in place for the outputs that are committed: on the default phantom, at default parameters.

They run in a temporary copy of the clone, so that neither Dataset/ nor the shipped checkpoints are touched.
Usage: execute_notebooks.py [NAME.ipynb ...]   (all of nbs/ without a name)
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).resolve().parents[1]
# The two exceptions: the backbone that needs no download, and mixed precision, which halves the time.
PARAMETERS = {'resnet_based_fusion.ipynb': {'backbone_weights': 'medfusion', 'precision': 'bf16'}}


def execute(source, workplace):
    "The notebook with its outputs, executed in `workplace`."
    notebook = load_notebook_node(str(source))
    if source.name in PARAMETERS:
        notebook = parameterize_notebook(notebook, PARAMETERS[source.name], kernel_name='python3', language='python')
    NotebookClient(notebook, timeout=None, store_widget_state=False,
                   resources={'metadata': {'path': str(workplace / 'nbs')}}).execute()
    notebook.cells = [cell for cell in notebook.cells if 'injected-parameters' not in cell.metadata.get('tags', [])]
    for cell in notebook.cells:
        if not cell.metadata.get('tags'):
            cell.metadata.pop('tags', None)  # papermill adds empty ones
        for output in cell.get('outputs', []):
            output.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)  # a page has no kernel to talk to
            for place in (str(workplace), str(ROOT), str(Path.home())):
                if place in str(output):
                    raise SystemExit(f'{source.name}: an output holds the path {place}; print relative paths.')
    return notebook


def main(names):
    from medfusion.phantom import write_phantom
    os.environ |= {'MEDFUSION_PROGRESS': 'none', 'PYTHONWARNINGS': 'ignore', 'TQDM_DISABLE': '1'}
    with tempfile.TemporaryDirectory() as folder:
        workplace = Path(folder, 'medfusion')
        for part in ('nbs', 'params', 'checkpoints/final'):
            shutil.copytree(ROOT / part, workplace / part)
        shutil.copy(ROOT / 'settings.ini', workplace)
        write_phantom(workplace / 'Dataset')
        for source in [ROOT / 'nbs' / name for name in names] or sorted((ROOT / 'nbs').glob('*.ipynb')):
            print(source.name, flush=True)
            nbformat.write(execute(source, workplace), source)
    subprocess.run([Path(sys.executable).with_name('nbdev_clean')], cwd=ROOT, check=True)


if __name__ == '__main__':
    main(sys.argv[1:])
