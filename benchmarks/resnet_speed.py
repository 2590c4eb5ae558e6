"""How long an epoch of ResNet fusion takes with and without the cache of frozen features, and what its forward costs.

    python benchmarks/resnet_speed.py --threads 2 --precision bf16

Prints one table: seconds on the clock and of the processor for a training epoch without and with the cache (the
smallest of --repeats each, taken in turn, so that other work on the machine disturbs both alike), the seconds to fill
the cache, and the forward pass of the whole network over that of its frozen backbone. Slices are those of the phantom,
256 x 256; weights are random, which makes no difference to the time.
"""
import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from medfusion.backbone import FeatureCache, TrainingPairs
from medfusion.data import CTMRIDataset
from medfusion.phantom import write_phantom
from medfusion.resnet_fusion import Config, ResNetFusion, parameter_groups, training_step
from medfusion.runs import seed_everything


def measured(task, repeats):
    "The smallest (clock, processor) seconds of each of several tasks {name: function}, run in turn."
    best = {name: (float('inf'), float('inf')) for name in task}
    for name in task:
        task[name]()
    for _ in range(repeats):
        for name in task:
            clock, processor = time.perf_counter(), time.process_time()
            task[name]()
            spent = time.perf_counter() - clock, time.process_time() - processor
            best[name] = tuple(map(min, best[name], spent))
    return best


def epoch(model, pairs, cfg, optimizer):
    "Trains on all pairs once."
    for batch in DataLoader(pairs, cfg.batch_size):
        optimizer.zero_grad()
        training_step(model, batch, cfg)['loss'].backward()
        optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--pairs', type=int, default=16, help='pairs in an epoch')
    parser.add_argument('--crop', type=int, default=0)
    parser.add_argument('--precision', default='no', choices=['no', 'bf16'])
    parser.add_argument('--repeats', type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seed_everything(0)
    cfg = Config(crop=given.crop, precision=given.precision)
    model = ResNetFusion('none')
    optimizer = torch.optim.Adam(parameter_groups(model, cfg.lr, cfg.layer_decay))
    with tempfile.TemporaryDirectory() as folder:
        root = write_phantom(Path(folder) / 'Dataset', cases=3, slices=given.pairs)
        dataset = CTMRIDataset(root / 'train' / 'CT', root / 'train' / 'MRI')
        start = time.perf_counter(), time.process_time()
        cache = FeatureCache(model.backbone, dataset, precision=cfg.precision)
        filling = time.perf_counter() - start[0], time.process_time() - start[1]
        sets = {'without cache': TrainingPairs(dataset, None, cfg.crop, mirror=True),
                'with cache': TrainingPairs(dataset, cache, cfg.crop, mirror=True)}
        epochs = measured({name: partial(epoch, model, pairs, cfg, optimizer) for name, pairs in sets.items()},
                          given.repeats)
    ct, mri = torch.rand(2, 1, 1, 256, 256)
    model.eval()
    with torch.no_grad():
        forward = measured({'backbone': lambda: model.features(ct, mri), 'whole network': lambda: model(ct, mri)},
                           3 * given.repeats)
    print(f'{len(dataset)} pairs of 256 x 256, crop {cfg.crop or "none"}, precision {cfg.precision}, '
          f'{given.threads} threads')
    print(f'{"":32}clock s   processor s')
    for name, spent in (*((f'epoch {name}', spent) for name, spent in epochs.items()), ('filling the cache', filling),
                        *((f'forward of one pair, {name}', spent) for name, spent in forward.items())):
        print(f'{name:32}{spent[0]:7.3f}   {spent[1]:7.3f}')
    for index, kind in enumerate(('clock', 'processor')):
        gain = epochs['without cache'][index] / epochs['with cache'][index]
        ratio = forward['whole network'][index] / forward['backbone'][index]
        print(f'{kind}: the cache makes an epoch {gain:.2f} times as fast; whole network / backbone {ratio:.2f}')
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f'parameters: trainable {trainable:,}, frozen {sum(p.numel() for p in model.backbone.parameters()):,}')


if __name__ == '__main__':
    main()
