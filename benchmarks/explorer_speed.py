"""How long the explorer takes to answer a change: median and worst per kind of change, in milliseconds.

    python benchmarks/explorer_speed.py [--chromium] [--threads 2] [--size 256] [--pause 0.4] [--models wavelet resnet]

With --chromium it is the time from a key to the picture on the page: JupyterLab runs the explorer, and Chromium presses
the arrow keys, as tests/test_browser.py does, which knows how to find both. Without it, a change is timed from setting a control's value
to the end of drawing (reading, fusing, measuring, composing, PNG), as the kernel does it. Between two changes the
reader looks for --pause seconds, in which the explorer prepares the next slice; a jump goes to a slice that is not
prepared. The column `cpu` is the median of the processor time that was used meanwhile: where it is far below `median`,
the machine was busy with something else. Without --models two rules without learning fuse, with --models the shipped
networks of these names."""
import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from medfusion.baselines import laplacian_pyramid, maximum
from medfusion.data import CTMRIDataset
from medfusion.inference import load_model
from medfusion.phantom import write_phantom
from medfusion.explorer import explore


def methods_of(models):
    "The functions to fuse with and their maps, by name."
    if not models:
        return {'maximum': maximum, 'laplacian': laplacian_pyramid}, None
    networks = {name: load_model(name, device='cpu') for name in models}
    return networks, {name: network.maps for name, network in networks.items()}


def changes(explorer):
    "The changes to time: (kind, control, value), in the order in which they are made."
    def turn(name, values):
        return [(name, explorer.controls[name], value) for value in values]
    yield from [('slice, next', *change) for _, *change in turn('slice', range(2, 11))]
    yield from [('slice, jump', *change) for _, *change in turn('slice', (13, 16, 19, 22))]
    yield from [('slice, seen before', *change) for _, *change in turn('slice', (*range(10, 1, -1), *range(1, 11)))]
    for mode in explorer.controls['mode'].options[1:]:
        yield f'view: {mode}', explorer.controls['mode'], mode
        name = {'blend': 'alpha', 'checkerboard': 'tile'}.get(mode, 'window')
        control = explorer.controls[name]
        yield from [(f'{name} in {mode}', control, control.value - steps * control.step) for steps in range(1, 6)]
    yield 'view: slices', explorer.controls['mode'], 'slices'
    yield from turn('window', [0.9 - 0.05 * i for i in range(8)])
    yield from turn('level', [0.3 + 0.05 * i for i in range(8)])
    yield from turn('zoom', [2, 3, 4, 5, 6, 7, 8])
    yield from turn('across', [0.3 + 0.05 * i for i in range(8)])
    last = list(explorer.methods.values())[-1]
    yield from [('method', last, ticked) for ticked in (False, True) * 3]


def explorer_of(options, root):
    "An explorer of a phantom, which is written into the folder `root`."
    torch.set_num_threads(options.threads)
    write_phantom(root, cases=6, slices=24, size=options.size)
    return explore({'test': CTMRIDataset(root / 'test/CT', root / 'test/MRI')}, *methods_of(options.models))


def in_kernel(options):
    "A row {'change', 'wall', 'cpu'} for each change, in seconds."
    rows = []
    with TemporaryDirectory() as scratch:
        for kind, control, value in changes(explorer_of(options, Path(scratch, 'phantom'))):
            time.sleep(options.pause)
            start, work = time.perf_counter(), time.process_time()
            control.value = value
            rows.append({'change': kind, 'wall': time.perf_counter() - start, 'cpu': time.process_time() - work})
    return rows


def in_chromium(options):
    "A row {'change', 'wall'} for each key, in seconds."
    here = Path(__file__).resolve()
    sys.path.insert(0, str(here.parents[1] / 'tests'))
    from playwright.sync_api import sync_playwright
    from test_browser import CHROMIUM_ARGS, chromium, jupyterlab, open_notebook, press, run_all, wait_for
    keys = [('slice, next', 'ArrowRight')] * 9 + [('slice, seen before', key) for key in ('ArrowLeft', 'ArrowRight') for _ in range(9)]
    keys += [('slice, jump', key) for key in ('PageUp', 'PageUp', 'End')]
    with TemporaryDirectory() as home, sync_playwright() as playwright:
        nbs = Path(home, 'work/nbs')
        nbs.mkdir(parents=True)
        code = (f'import sys\nfrom argparse import Namespace\nfrom pathlib import Path\nsys.path.insert(0, {str(here.parent)!r})\n'
                f'from explorer_speed import explorer_of\nexplorer_of(Namespace(**{vars(options)!r}), Path("phantom"))')
        cell = {'cell_type': 'code', 'id': 'explorer', 'source': code, 'metadata': {}, 'outputs': [], 'execution_count': None}
        (nbs / 'speed.ipynb').write_text(json.dumps({'cells': [cell], 'metadata': {'kernelspec': {'name': 'python3', 'display_name': 'Python 3'}}, 'nbformat': 4, 'nbformat_minor': 5}))
        with jupyterlab(Path(home)) as (process, url, token):
            wait_for(process, url, token, Path(home, 'server.log'))
            browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGS)
            page = browser.new_page(viewport={'width': 1440, 'height': 1100})
            open_notebook(page, url, token, 'speed.ipynb')
            run_all(page, seconds=200)
            rows = []
            for kind, key in keys:
                page.wait_for_timeout(1000 * options.pause)
                rows.append({'change': kind, 'wall': press(page, key)})
            browser.close()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--pause', type=float, default=0.4)
    parser.add_argument('--models', nargs='*', default=[])
    parser.add_argument('--chromium', action='store_true')
    options = parser.parse_args()
    rows = in_chromium(options) if options.chromium else in_kernel(options)
    kinds = pd.DataFrame(rows).groupby('change', sort=False)
    seconds = pd.DataFrame({'median': kinds['wall'].median(), 'worst': kinds['wall'].max(),
                            **({} if options.chromium else {'cpu': kinds['cpu'].median()})})
    table = (1000 * seconds).round(1).assign(changes=kinds.size())
    print(f'{options.size}x{options.size}, {options.threads} threads, methods: {", ".join(options.models) or "maximum, laplacian"}')
    print(table.to_string())


if __name__ == '__main__':
    main()
