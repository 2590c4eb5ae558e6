"""The parts of `make demo` that are no commands: fill an empty Dataset/ with the phantom, draw a head for two scanners, and judge what was trained."""
import shutil
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]


def fill_if_empty():
    "Write the default phantom into Dataset/ unless there is a data set already."
    from medfusion.data import inspect_dataset
    from medfusion.phantom import write_phantom
    folder = ROOT / 'Dataset'
    if (folder / 'train').is_dir():
        print(f'{folder.name}/ holds a data set already; the demonstration runs on it.')
    else:
        write_phantom(folder)
    print(inspect_dataset(folder))


def draw_scans():
    "A head as a CT and an MRI scanner saw it, in results/demo_scans, unless it is there."
    from medfusion.phantom_volume import phantom_study, write_study
    folder = ROOT / 'results/demo_scans'
    if not (folder / 'brain.json').is_file():      # written last
        shutil.rmtree(folder, ignore_errors=True)
        print(write_study(phantom_study(0, (2.2, 2.2, 4.), (2.2, 2.2, 4.)), folder).relative_to(ROOT))


def demo_runs():
    "The folders of the demonstration's runs, one for each method that has one."
    from medfusion.inference import methods
    folders = [ROOT / 'results' / method.directory / 'demo' for method in methods().values()]
    return [folder for folder in folders if (folder / 'run.json').is_file()]


def report():
    "Print tables and pictures; exit status 1 where the first trained network does not beat the average."
    from medfusion.runs import read_run
    folders = demo_runs()
    records = [read_run(folder) for folder in folders]
    numbers = [record['numbers'] for record in records]
    epochs = ', '.join(f'{record["method"]} for {record["parameters"].get("epochs", record["parameters"].get("num_epochs"))} epochs' for record in records)
    means, kept = ({name: row for run in numbers for name, row in (run[what] or {}).items()} for what in ('means', 'lesions_kept'))
    print(f'\nThe networks below were trained just now ({epochs}). Those that ship were trained much longer: -m wavelet and -m resnet fuse with them.')
    print('\nMeans over the test pairs; lower is better for invented, higher for the others (nbs/05_metrics.ipynb explains the columns):')
    print(pd.DataFrame(means).T.map('{:.4g}'.format).to_string())
    if kept:
        print('\nContrast-to-noise of the lesions, as a share of that in the source that shows them best:')
        print(pd.DataFrame(kept).T.round(2).to_string())
    print('\nPictures:')
    for folder in folders:
        for path in [*sorted(folder.glob('*.png')), folder / 'fused', folder / 'executed.ipynb']:
            print(f'  {path.relative_to(ROOT)}')
    study = ROOT / 'results/scan_fusion/demo/report.html'
    if study.is_file():
        print(f'Two scans of one head, brought together and fused (nbs/scan_fusion.ipynb):\n  {study.relative_to(ROOT)}')
    found = shortfalls(next(iter(means)), means, kept)
    for sentence in found:
        print(f'The trained network does not beat the average: {sentence}', file=sys.stderr)
    return 1 if found else 0


def shortfalls(network, means, kept):
    """Where a network does not beat the average: a list of sentences.

    Lesions count by the mean over their kinds: 20 epochs leave one kind a tenth higher or lower with another seed or processor."""
    found = [f'{column} is {means[network][column]:.3f}, that of the average {means["average"][column]:.3f}.'
             for column in ('SF', 'SD') if not means[network][column] > means['average'][column]]
    if kept:
        shares = {name: sum(kept[name].values()) / len(kept[name]) for name in (network, 'average')}
        if not shares[network] > shares['average']:
            found.append(f'lesions keep {shares[network]:.2f} of their contrast-to-noise in the mean over their kinds, '
                         f'in the average {shares["average"]:.2f}.')
    return found


if __name__ == '__main__':
    sys.exit({'fill': fill_if_empty, 'scans': draw_scans, 'report': report}[sys.argv[1]]())
