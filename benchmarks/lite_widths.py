"""Quality against time for wavelet-lite networks of several widths, and for the shipped wavelet network beside them, in one run.

    medfusion sweep wavelet-lite -f params/wavelet-lite_shipped.yaml -p teacher=results/recorded/cross_validation/wavelet_shipped-without-34-41@0.35 \
        -p width=8,12,16,24,32 -p epochs=55 -p test_cases='"34,41"' --name curve
    python benchmarks/lite_widths.py results/wavelet_lite/curve+width=*

The teacher is the network of the fold that left the test pairs out. Times are those of one thread for a 256×256 pair of the phantom, in turn,
the median of 31; the means are those of each run's metrics.csv, on its test pairs.
Writes results/recorded/lite_widths.csv, which nbs/91_ablation.ipynb shows.
"""
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from medfusion.evaluation import reported_columns
from medfusion.inference import load_model
from medfusion.phantom import phantom_slice

RECORD = Path(__file__).resolve().parents[1] / 'results/recorded/lite_widths.csv'


def milliseconds(networks, times=31):
    "The median time of each of {name: network}, all called in turn, on one thread."
    head, spent = phantom_slice(12, 4), {name: [] for name in networks}
    pair = [torch.as_tensor(image)[None, None].float() for image in (head.ct, head.mri)]
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(times):
            for name, network in networks.items():
                began = time.thread_time()
                network(*pair)
                spent[name].append(1000 * (time.thread_time() - began))
    return pd.DataFrame(spent).median()


def main(folders):
    if not folders:
        raise SystemExit(__doc__)
    networks = {Path(folder).name: load_model(folder, 'cpu') for folder in folders}
    rows, measured = [], milliseconds(networks | {'wavelet': load_model('wavelet', 'cpu')})
    for folder, (name, network) in zip(folders, networks.items()):
        table = pd.read_csv(Path(folder, 'metrics.csv'), comment='#')
        means = table[table.method == table.method.iloc[0]][reported_columns()].mean()      # the run's own network stands first
        rows.append({'width': network.config['width'], 'weights': sum(weight.numel() for weight in network.parameters()),
                     'ms': round(measured[name], 2), 'faster than wavelet': round(measured['wavelet'] / measured[name], 1)} | means.round(4).to_dict())
    pd.DataFrame(rows).sort_values('width').to_csv(RECORD, index=False, lineterminator='\n')
    print(RECORD.read_text())


if __name__ == '__main__':
    main(sys.argv[1:])
