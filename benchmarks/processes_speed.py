"""Training steps on two processes with one thread each against one process with one thread, in one run.

    python benchmarks/processes_speed.py --method wavelet
    python benchmarks/processes_speed.py --method resnet --rounds 8 --pairs 4

torch's launcher starts two processes, joined by gloo over loopback. In turn, the first takes a few steps alone, each on
`--pairs` pairs of the phantom; both take as many at the same time without a word to each other; and both take as many
together, on twice the pairs, with the gradients averaged. So whatever else the machine does slows all three. Printed are
the pairs a second of the fastest round, and what part of twice one that is: two that do not talk show what the machine
has for a second process (two threads of one core, a common cache), two together what talking costs. Beside it the same
by CPU time, of the slower process, in the median over rounds, which a busy machine changes less, and in which the work
of exchanging counts and waiting for the other does not; and how long an average of as many bytes as the gradients have
takes where both are ready, in the median. At the end a calculation, no measurement, for 8 and 64 GPUs.
"""
import argparse
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from machine import heading, ratio


def method_parts(method, folder):
    "What trains the network that ships, by the loss of its notebook's defaults: network, step, data set and optimiser."
    from medfusion import resnet_fusion, wavelet_fusion
    from medfusion.data import CTMRIDataset
    from medfusion.inference import load_model, start_from
    train, model = CTMRIDataset(folder / 'train/CT', folder / 'train/MRI'), load_model(method, device='cpu')
    if method == 'wavelet':
        step = partial(wavelet_fusion.training_step, weights={'mse': 1.0, 'ssim': 1.0, 'gradient': 1.0})
        return model, step, train, torch.optim.Adam(model.parameters(), lr=1e-4)
    model = start_from(resnet_fusion.ResNetFusion(**model.config | {'dial': False}), method).eval()    # as the first recipe trains it, all of it
    cfg = resnet_fusion.Config(save_dir=str(folder), augment=False)
    train, _ = resnet_fusion.training_sets(model, train, None, cfg)
    return model, partial(resnet_fusion.training_step, cfg=cfg), train, torch.optim.Adam(resnet_fusion.parameter_groups(model, 1e-4, 0.8))


def timed(model, step, optimizer, accelerator, loader, together, share=None):
    """Wall seconds and CPU seconds of a step, the mean of a pass over a loader; `together`: of the slower of two processes,
    which share the steps if each has a `share` of them."""
    from medfusion.processes import Share
    from medfusion.training import optimise
    start, cpu = time.perf_counter(), time.process_time()
    for steps, batch in enumerate(loader, start=1):
        with Share(share):
            loss = step(model, batch)['loss']
        optimise(model, loss, optimizer, accelerator, clip=1.0)
    seconds = torch.tensor([time.perf_counter() - start, time.process_time() - cpu]) / steps
    if together:
        torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
    return seconds.tolist()


def averaging(size, repeats=30):
    "The median of the seconds that an average over processes of `size` numbers takes, when all are ready."
    numbers, times = torch.zeros(size), []
    for _ in range(repeats):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(numbers)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def work(method, folder, rounds, pairs):
    "What each of the two processes does."
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from medfusion.processes import Process, connect, this_process
    from medfusion.training import EpochSampler, SharedBatches
    torch.set_num_threads(1)
    connect()
    model, step, train, optimizer = method_parts(method, folder)
    model.train()
    own = copy.deepcopy(model)
    own_optimizer = torch.optim.Adam(own.parameters(), lr=1e-4)
    accelerator = Accelerator()
    network, optimizer = accelerator.prepare(model, optimizer)
    network.broadcast_buffers = False
    one, two = ([DataLoader(train, batch_sampler=SharedBatches(EpochSampler(length, seed=0), size, process))
                 for length, size, process in ((2 * pairs, pairs, Process()), (4 * pairs, 2 * pairs, this_process()))])
    rows = {'one': [], 'two apart': [], 'two together': []}
    for _ in range(rounds + 1):
        torch.distributed.barrier()
        if this_process().number == 0:
            rows['one'].append(timed(own, step, own_optimizer, accelerator, one, together=False))
        torch.distributed.barrier()
        rows['two apart'].append(timed(own, step, own_optimizer, accelerator, one, together=True))
        torch.distributed.barrier()
        rows['two together'].append(timed(network, step, optimizer, accelerator, two, together=True, share=1 / this_process().count))
    size = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    exchange = averaging(size)
    if this_process().number == 0:
        report(method, pairs, {name: of_name[1:] for name, of_name in rows.items()}, size, exchange)    # the first round warms up


def report(method, pairs, rows, size, exchange):
    "Prints the table and the ratios."
    wall = {name: min(seconds for seconds, _ in rounds) for name, rounds in rows.items()}
    print(f'{method}: {size:,} weights, {pairs} pairs of 256 x 256 a step and process, one thread each, {len(rows["one"])} rounds')
    print(f'{"processes":<14}{"pairs/s":>10}{"of n times one":>16}{"CPU ms/pair":>14}{"by CPU time":>14}')
    for name, rounds in rows.items():
        count = 1 if name == 'one' else 2
        cpu = statistics.median(cpu for _, cpu in rounds)
        worth = statistics.median(one / other for (_, one), (_, other) in zip(rows['one'], rounds))    # round by round
        print(f'{name:<14}{count * pairs / wall[name]:>10.2f}{wall["one"] / wall[name]:>16.0%}{1000 * cpu / pairs:>14.1f}{worth:>14.0%}')
    print(f'averaging {4 * size / 1e6:.2f} MB of gradients takes '
          f'{1000 * exchange:.2f} ms, {exchange / wall["two together"]:.1%} of a step')
    print(calculation(size))
    print(ratio(f'training {method}, two processes of twice one', wall['one'] / wall['two together'], percent=True))
    print(ratio(f'training {method}, two processes that average gradients of two that do not', wall['two apart'] / wall['two together'], percent=True), flush=True)


def calculation(size, steps=(0.003, 0.01, 0.03)):
    """The share of a step that is left beside averaging the gradients, for many GPUs, as lines: calculated, not measured.

    A ring of n passes 2 (n - 1) / n times the bytes through each link, in 2 (n - 1) messages; a tree needs 2 log2(n) messages.
    Assumed are links of 200 GB/s and 5 us within a machine of 8, of 25 GB/s and 15 us between machines."""
    lines = [f'calculated for {4 * size / 1e6:.2f} MB of gradients:' + ''.join(f'{f"step of {1000 * step:g} ms":>18}' for step in steps)]
    for count, rate, delay, messages in ((8, 200e9, 5e-6, 2 * 7), (64, 25e9, 15e-6, 2 * 6)):
        seconds = 2 * (count - 1) / count * 4 * size / rate + messages * delay
        lines.append(f'{count:>4} GPUs, averaging takes {1e6 * seconds:4.0f} us'.ljust(len(lines[0]) - 18 * len(steps))
                     + ''.join(f'{step / (step + seconds):>18.0%}' for step in steps))
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--method', choices=['wavelet', 'resnet'], default='wavelet')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--pairs', type=int, default=2, help='of a step and process')
    parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        from medfusion.processes import leave_to_first
        work(given.method, given.folder, given.rounds, given.pairs)
        gc.collect()    # what holds the group of processes goes first, so that its threads end before the interpreter does
        return leave_to_first()
    print(heading(), flush=True)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from medfusion.phantom import write_phantom
    os.environ['OMP_NUM_THREADS'] = '1'
    with tempfile.TemporaryDirectory() as scratch:
        os.environ['TMPDIR'] = tempfile.tempdir = scratch
        folder = write_phantom(Path(scratch, 'Dataset'), cases=6, slices=max(2, given.pairs))
        config = LaunchConfig(1, 1, 2, run_id='speed', rdzv_backend='c10d', rdzv_endpoint='127.0.0.1:0', local_addr='127.0.0.1', max_restarts=0)
        elastic_launch(config, sys.executable)(__file__, *sys.argv[1:], '--folder', str(folder))


if __name__ == '__main__':
    main()
