"""How soon is a network better than the pixel maximum? A record that others can beat.

    python benchmarks/training_record.py --data Dataset
    python benchmarks/training_record.py --data Dataset --method wavelet-lite --enter

Trains from random weights on `train/` of a data set (`medfusion data harvard`) with one thread, and measures `val/`, which is case 34, after each epoch. What is
counted is the processor's seconds in training, reading slices among it, until the means of the slices of `val/` beat those of the maximum in five of the eight
columns of the tables; measuring is not counted. The terms of the loss, crop and rate are those of a recipe of `params/`, without what only pays in long
trainings: averaged weights, a teacher, and the terms that paint lesions. `--enter` adds a row with the date to training_record.csv.
"""
import argparse
import datetime
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import yaml
from accelerate import Accelerator
from machine import ROOT, heading, processor

from medfusion import wavelet_fusion, wavelet_lite
from medfusion.baselines import maximum
from medfusion.data import CTMRIDataset
from medfusion.evaluation import evaluate, reported_columns
from medfusion.runs import seed_everything
from medfusion.training import loaders, run_epoch

RECORD = Path(__file__).with_name('training_record.csv')
LEFT_OUT = ('w_lesion', 'w_detection', 'w_imitation')
METHODS = {'wavelet': ('wavelet_table', lambda recipe: wavelet_fusion.WaveletFusion(recipe['width'], cycle_spin=True, white_bone=True), wavelet_fusion.training_step),
           'wavelet-lite': ('wavelet-lite_shipped', lambda recipe: wavelet_lite.WaveletLite(), partial(wavelet_lite.training_step, teacher=None))}


def better_columns(model, val, of_maximum):
    "The columns, of the eight, in which the means of a network on a data set are higher than the maximum's."
    with torch.inference_mode():
        means = evaluate(val, {'network': model.eval()}, list(of_maximum.index))[of_maximum.index].mean()
    return [name for name in of_maximum.index if means[name] > of_maximum[name]]


def train_until_better(method, data, epochs, lr, seed, wanted=5):
    "(processor seconds, epochs, columns) of a training that ends when `wanted` columns are better than the maximum's, or after `epochs`."
    name, make, step = METHODS[method]
    recipe = yaml.safe_load((ROOT / 'params' / f'{name}.yaml').read_text(encoding='utf-8'))
    weights = {key.removeprefix('w_'): 0. if key in LEFT_OUT else value for key, value in recipe.items() if key.startswith('w_')}
    seed_everything(seed)
    train, val = (CTMRIDataset(data / part / 'CT', data / part / 'MRI', **options) for part, options in
                  (('train', {'augment': True, 'crop': recipe['crop'], 'seed': seed}), ('val', {})))
    of_maximum = evaluate(val, {'maximum': maximum}, reported_columns()[:8])[reported_columns()[:8]].mean()
    model, accelerator = make(recipe), Accelerator(cpu=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr or recipe['lr'])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(wavelet_fusion.warm_cosine, epochs=epochs))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loaders(train, None, recipe['batch_size'], seed)[0])
    step, seconds = partial(step, weights=weights, gradient_gain=recipe['gradient_gain']), 0.
    for epoch in range(1, epochs + 1):
        began = time.process_time()
        run_epoch(model, step, loader, accelerator, epoch, optimizer, clip=1.)
        schedule.step()
        seconds += time.process_time() - began
        columns = better_columns(model, val, of_maximum)
        print(f'epoch {epoch}: {seconds:.1f} s, better than the maximum in {len(columns)} of {len(of_maximum)}: {", ".join(columns)}', flush=True)
        if len(columns) >= wanted:
            break
    return seconds, epoch, columns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='a folder with train/ and val/')
    parser.add_argument('--method', choices=METHODS, default='wavelet')
    parser.add_argument('--epochs', type=int, default=8, help='planned: the rate has fallen to 0 after these')
    parser.add_argument('--lr', type=float, help='the rate, if not that of the recipe')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--enter', action='store_true', help=f'add a row to {RECORD.name}')
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(heading())
    seconds, epoch, columns = train_until_better(options.method, options.data, options.epochs, options.lr, options.seed)
    if len(columns) < 5:
        raise SystemExit(f'Not better than the maximum in five columns after {epoch} epochs; give it more (--epochs).')
    if options.enter:
        row = {'date': datetime.date.today().isoformat(), 'method': options.method, 'seconds': round(seconds, 1), 'epochs': epoch, 'planned': options.epochs,
               'lr': options.lr or '', 'seed': options.seed, 'columns': ' '.join(columns), 'torch': torch.__version__, 'processor': processor()}
        before = pd.read_csv(RECORD).to_dict('records') if RECORD.is_file() else []
        pd.DataFrame([*before, row]).sort_values('seconds').to_csv(RECORD, index=False, lineterminator='\n')


if __name__ == '__main__':
    main()
