"""What a training step of the wavelet network is made of, and how it compares with the steps of an earlier commit, in one run.

    python benchmarks/step_speed.py --against b611665

The step is one of the recipe params/wavelet_table.yaml on one thread: a batch of four crops of the phantom, and the lesions' term. First all of it, at each commit in
turn, each in a process of its own that loads that commit's package, and here in mixed precision, too (`-p precision=bf16`); then, here, each part alone: the network, each term of the loss, forward and backward, the lesions'
term, the detectability term of the later recipes, the optimiser. Medians; the parts add up to less than the whole or more, for the whole shares work among them.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate.utils import convert_outputs_to_fp32


def recipe():
    "The values of the recipe, and its weights {term: weight}."
    values = yaml.safe_load((Path(__file__).resolve().parents[1] / 'params/wavelet_table.yaml').read_text(encoding='utf-8'))
    return values, {name.removeprefix('w_'): value for name, value in values.items() if name.startswith('w_')}


def median(function, repeats):
    "The median milliseconds of a call, after one that warms up."
    spent = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        spent.append(1000 * (time.perf_counter() - start))
    return statistics.median(spent[1:])


def prepared(folder):
    "The network, its optimiser, a batch and the lesions' term; and the training part of a small phantom, drawn into a folder."
    from medfusion.data import CTMRIDataset
    from medfusion.losses import LesionTerm
    from medfusion.phantom import write_phantom
    from medfusion.wavelet_fusion import WaveletFusion
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    values, _ = recipe()
    part = write_phantom(Path(folder, 'Dataset'), cases=3, slices=4) / 'train'
    pairs = CTMRIDataset(part / 'CT', part / 'MRI', crop=values['crop'])
    items = [pairs[i % len(pairs)] for i in range(values['batch_size'])]
    batch = {name: torch.stack([item[name] for item in items]) for name in ('ct', 'mri')}
    model = WaveletFusion(values['width'], cycle_spin=True, white_bone=True).train()
    return model, torch.optim.Adam(model.parameters(), values['lr']), batch, LesionTerm(), CTMRIDataset(part / 'CT', part / 'MRI')


def whole_step(model, optimizer, batch, lesions):
    "One step of training."
    from medfusion.wavelet_fusion import training_step
    values, weights = recipe()
    optimizer.zero_grad()
    training_step(model, batch, weights, values['gradient_gain'], lesions)['loss'].backward()
    optimizer.step()


def parts(model, optimizer, batch, lesions, data_set, repeats):
    "{part: milliseconds}, each alone."
    from medfusion.detectability import DetectionTerm
    from medfusion.losses import weighted_loss
    values, weights = recipe()

    def of_network():
        model(batch['ct'], batch['mri']).sum().backward()

    def of_term(term):
        fused = fixed.clone().requires_grad_()
        weighted_loss(fused, batch['ct'], batch['mri'], {term: 1.0}, values['gradient_gain'])['loss'].backward()

    fixed, detection = model(batch['ct'], batch['mri']).detach(), DetectionTerm(data_set)
    found = {'network, forward and backward': median(of_network, repeats)}
    found |= {f'term {term}': median(partial(of_term, term), repeats) for term, weight in (weights | {'invented': 1.0}).items() if weight and term != 'lesion'}
    found["lesions' term"] = median(lambda: lesions(model).backward(), repeats)
    found['detectability term (later recipes)'] = median(lambda: detection(model).backward(), repeats)
    return found | {'optimiser': median(optimizer.step, repeats)}


def in_bfloat16(model):
    "The model as accelerate prepares it for `precision=bf16`."
    model.forward = convert_outputs_to_fp32(torch.autocast('cpu', torch.bfloat16)(model.forward))


def by_process(folder, repeats, *more):
    "The milliseconds of a whole step by the package in a folder."
    done = subprocess.run([sys.executable, __file__, '--worker', '--repeats', str(repeats), *more], env=os.environ | {'PYTHONPATH': str(folder)},
                          capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--against', metavar='COMMIT', help='an earlier commit, whose steps are taken, too')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--bfloat16', action='store_true', help=argparse.SUPPRESS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.worker:
            *step, _ = prepared(scratch)
            if given.bfloat16:
                in_bfloat16(step[0])
            print(median(partial(whole_step, *step), given.repeats))
            return
        from machine import ROOT, heading, ratio
        from networks_speed import package_of
        print(heading())
        ways = {'here': (ROOT,), 'here, in bfloat16': (ROOT, '--bfloat16')}
        if given.against:
            ways[given.against] = package_of(given.against, Path(scratch, 'before')),
        took = {title: [] for title in ways}
        for _ in range(given.rounds):
            for title, (folder, *more) in ways.items():
                took[title].append(by_process(folder, given.repeats, *more))
        for title, spent in took.items():
            print(f'{"a step, " + title:<40}{min(spent):8.1f} ms')
        for name, spent in parts(*prepared(scratch), given.repeats).items():
            print(f'  {name:<38}{spent:8.1f} ms')
        if given.against:
            for way, title in (('', 'here'), (' in bfloat16', 'here, in bfloat16')):
                print(ratio(f'a training step of the wavelet network{way}, as fast as at {given.against}', min(took[given.against]) / min(took[title])))


if __name__ == '__main__':
    main()
