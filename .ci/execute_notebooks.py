"""Execute notebooks in place for the outputs that are committed: on the default phantom, at default parameters.

They run in a temporary copy of the clone, so that neither Dataset/ nor what was trained is touched. Where a file of params/ is
named below, its values replace the defaults, and the notebook says so in its first lines.
Usage: execute_notebooks.py [NAME.ipynb ...]   (all of nbs/ without a name)
"""
import base64
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = {'resnet_based_fusion.ipynb': 'params/resnet_notebook.yaml', '80_pretraining.ipynb': 'params/pretraining_notebook.yaml'}


def smaller(png):
    "A picture (PNG, base64) with a palette of 256 colours, which is a third of the size; the picture itself if that gains nothing, or if its colours would fall into patches."
    packed = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
    flat = image.quantize(256, dither=Image.Dither.NONE)
    flat.save(packed, 'PNG', optimize=True)
    patchy = max(ImageStat.Stat(ImageChops.difference(image, flat.convert('RGB'))).mean) > 4    # levels: 8 where a picture holds all hues, 2 at most elsewhere
    return png if patchy else min(base64.b64encode(packed.getvalue()).decode(), png, key=len)


def joined(outputs):
    "The outputs of a cell, what was printed in a row in one of them: in how many pieces a kernel sends it is chance."
    found = []
    for output in outputs:
        if found and output['output_type'] == 'stream' and found[-1].get('name') == output['name']:
            found[-1]['text'] += output['text']
        else:
            found.append(output)
    return found


def execute(source, workplace):
    "The notebook with its outputs, executed in `workplace`."
    notebook = load_notebook_node(str(source))
    if source.name in PARAMETERS:
        parameters = yaml.safe_load((ROOT / PARAMETERS[source.name]).read_text(encoding='utf-8'))
        notebook = parameterize_notebook(notebook, parameters, kernel_name='python3', language='python')
    NotebookClient(notebook, timeout=None, store_widget_state=False,
                   resources={'metadata': {'path': str(workplace / 'nbs')}}).execute()
    notebook.cells = [cell for cell in notebook.cells if 'injected-parameters' not in cell.metadata.get('tags', [])]
    for cell in notebook.cells:
        if not cell.metadata.get('tags'):
            cell.metadata.pop('tags', None)  # papermill adds empty ones
        if 'outputs' in cell:
            cell['outputs'] = joined(cell['outputs'])
        for output in cell.get('outputs', []):
            if 'text' in output:      # a reader has other temporary folders
                output['text'] = re.sub(rf'{tempfile.gettempdir()}/[\w.-]+', '...', output['text'])
            data = output.get('data', {})
            data.pop('application/vnd.jupyter.widget-view+json', None)  # a page has no kernel to talk to
            if 'image/png' in data:
                data['image/png'] = smaller(data['image/png'])
            for place in (tempfile.gettempdir() + '/', str(ROOT), str(Path.home())):
                if place in str(output):
                    raise SystemExit(f'{source.name}: an output holds the path {place}; print relative paths.')
    return notebook


def main(names):
    from medfusion.phantom import write_phantom
    os.environ |= {'MEDFUSION_PROGRESS': 'none', 'PYTHONWARNINGS': 'ignore', 'TQDM_DISABLE': '1'}
    with tempfile.TemporaryDirectory() as folder:
        workplace = Path(folder, 'medfusion')
        for part in ('nbs', 'params', 'results/recorded', 'results/published'):
            shutil.copytree(ROOT / part, workplace / part)
        shutil.copy(ROOT / 'settings.ini', workplace)
        write_phantom(workplace / 'Dataset')
        for source in [ROOT / 'nbs' / name for name in names] or sorted((ROOT / 'nbs').glob('*.ipynb')):
            print(source.name, flush=True)
            nbformat.write(execute(source, workplace), source)
    subprocess.run([Path(sys.executable).with_name('nbdev_clean')], cwd=ROOT, check=True)


if __name__ == '__main__':
    main(sys.argv[1:])
