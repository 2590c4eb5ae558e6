"""Time per 256×256 pair of the shipped networks, on one and on two threads, beside the Laplacian pyramid, in one run.

python benchmarks/networks_speed.py
"""
import statistics
import time

import torch

from medfusion.baselines import laplacian_pyramid
from medfusion.inference import load_model
from medfusion.phantom import phantom_slice


def milliseconds(fuse, ct, mri, runs=15):
    "The median time of a call after three calls that do not count."
    times = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        fuse(ct, mri)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def main():
    made = phantom_slice(12, 4)
    ct, mri = (torch.as_tensor(image)[None, None].float() for image in (made.ct, made.mri))
    methods = {'wavelet': load_model('wavelet', 'cpu'), 'wavelet-lite': load_model('wavelet-lite', 'cpu'), 'resnet': load_model('resnet', 'cpu'), 'laplacian': laplacian_pyramid}
    print(f'{"method":<12} {"1 thread":>10} {"2 threads":>10}   parameters, trainable + frozen')
    for name, fuse in methods.items():
        row = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                row.append(milliseconds(fuse, ct, mri))
        counts = ''
        if isinstance(fuse, torch.nn.Module):
            frozen = sum(weights.numel() for part, weights in fuse.named_parameters() if part.startswith('backbone.'))
            counts = f'{sum(weights.numel() for weights in fuse.parameters()) - frozen:,} + {frozen:,}'
        print(f'{name:<12} {row[0]:>7.1f} ms {row[1]:>7.1f} ms   {counts}')


if __name__ == '__main__':
    main()
