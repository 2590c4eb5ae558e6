"""Quality against time for wavelet-lite networks of several widths, and for the shipped wavelet network beside them, in one run.

    medfusion sweep wavelet-lite -f params/wavelet-lite_shipped.yaml -p teacher=results/recorded/cross_validation/wavelet_shipped-without-34-41@0.35 \
        -p width=8,12,16,24,32 -p epochs=55 -p test_cases='"34,41"' --name curve
    python benchmarks/lite_widths.py results/wavelet_lite/curve+width=*
    python benchmarks/lite_widths.py        the times alone, of the widths that are recorded

The teacher is the network of the fold that left the test pairs out. Times are those of one thread for a 256×256 pair of the phantom, in turn,
the fastest of 31, of networks of these widths that nothing has trained; the means are those of each run's metrics.csv, on its test pairs.
Writes results/recorded/lite_widths.csv, which nbs/91_ablation.ipynb shows.
"""
import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from machine import ROOT, heading

from medfusion.evaluation import reported_columns
from medfusion.inference import load_model
from medfusion.phantom import phantom_slice
from medfusion.wavelet_lite import WaveletLite

RECORD = ROOT / 'results/recorded/lite_widths.csv'


def milliseconds(networks, times=31):
    "The shortest time of each of {name: network}, all called in turn, on one thread."
    head, spent = phantom_slice(12, 4), {name: [] for name in networks}
    pair = [torch.as_tensor(image)[None, None].float() for image in (head.ct, head.mri)]
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(times):
            for name, network in networks.items():
                began = time.perf_counter()
                network(*pair)
                spent[name].append(1000 * (time.perf_counter() - began))
    return pd.DataFrame(spent).min()


def qualities(folders):
    "The means of the runs in these folders, a row for each width."
    rows = {}
    for folder in folders:
        network, table = load_model(folder, 'cpu'), pd.read_csv(Path(folder, 'metrics.csv'), comment='#')
        of_network = table[table.method == table.method.iloc[0]]      # the run's own network stands first
        rows[network.config['width']] = {'weights': sum(weight.numel() for weight in network.parameters())} | of_network[reported_columns()].mean().round(4).to_dict()
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('width').sort_index()


def main(folders):
    print(heading())
    table = qualities(folders) if folders else pd.read_csv(RECORD, index_col='width')
    measured = milliseconds({'wavelet': load_model('wavelet', 'cpu')} | {width: WaveletLite(width).eval() for width in table.index})
    table = table.drop(columns=['ms', 'faster than wavelet'], errors='ignore')
    table.insert(1, 'ms', measured[table.index].astype(float).round(2))
    table.insert(2, 'faster than wavelet', (measured['wavelet'] / table.ms).round(1))
    table.to_csv(RECORD, lineterminator='\n')
    print(table.iloc[:, :3].to_string())


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='*', help='runs of wavelet-lite, one of each width')
    main(parser.parse_args().folders)
