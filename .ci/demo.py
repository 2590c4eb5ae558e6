"""The two ends of `make demo`: fill an empty Dataset/ with the phantom, and judge what was trained on it."""
import json
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
RUNS = {'wavelet fusion': ROOT / 'results/trainable_wavelet_fusion/demo', 'ResNet fusion': ROOT / 'results/resnet_fusion/demo'}


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


def shortfalls(numbers):
    "Where the trained wavelet network does not beat the average: a list of sentences."
    found = []
    table = numbers['metrics']
    for column in ('SF', 'SD'):
        ours, average = table['wavelet fusion'][column], table['average'][column]
        if not ours > average:
            found.append(f'{column} is {ours:.3f}, that of the average {average:.3f}.')
    kept = numbers['lesions_kept'] or {}
    for lesion, average in kept.get('average', {}).items():
        if not kept['wavelet fusion'][lesion] > average:
            found.append(f'{lesion} keeps {kept["wavelet fusion"][lesion]:.2f} of its contrast-to-noise, in the average {average:.2f}.')
    return found


def report():
    "Print tables and pictures; exit status 1 if the wavelet network does not beat the average."
    numbers = {name: json.loads((folder / 'run.json').read_text())['numbers'] for name, folder in RUNS.items()}
    table = numbers['wavelet fusion']['metrics'] | {'ResNet fusion': numbers['ResNet fusion']['metrics']['ResNet fusion']}
    print('\nMeans over the test pairs (cvpr conventions; the ResNet network has had only a few epochs):')
    print(pd.DataFrame(table).T.round(3).to_string())
    kept = numbers['wavelet fusion']['lesions_kept']
    if kept:
        print('\nContrast-to-noise of the lesions, as a fraction of that in the source that shows them best:')
        print(pd.DataFrame(kept).T.round(2).to_string())
    print('\nPictures:')
    for folder in RUNS.values():
        for path in [*sorted(folder.glob('*.png')), folder / 'fused', folder / 'executed.ipynb']:
            print(f'  {path.relative_to(ROOT)}')
    found = shortfalls(numbers['wavelet fusion'])
    for sentence in found:
        print(f'The trained network does not beat the average: {sentence}', file=sys.stderr)
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit({'fill': fill_if_empty, 'report': report}[sys.argv[1]]())
