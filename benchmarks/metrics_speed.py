"""How long medfusion.metrics takes for one 256 x 256 pair, beside scikit-image and SciPy written the direct way.

    python benchmarks/metrics_speed.py

One thread, the eight columns of the usual tables, phantom slices. Every figure is the best of several runs. The last
lines are the peak memory of a batch of 64, from a process of its own, and the rate on a GPU where there is one.
"""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

if __name__ == '__main__':  # before NumPy and torch start their threads; the tests import the direct forms
    for variable in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
        os.environ[variable] = '1'

import numpy as np
import torch

from medfusion.metrics import invented_edges, measure, qabf, scd, spatial_frequency, ssim_of_pair, vif_of_pair
from medfusion.phantom import phantom_slices

COLUMNS = ('EN', 'SD', 'SF', 'MI', 'SCD', 'VIF', 'Qabf', 'SSIM')


def direct_entropy(counts):
    from scipy.stats import entropy
    return entropy(counts.ravel())


def direct_information(fused, source):
    counts = np.histogram2d(fused.ravel(), source.ravel(), bins=256, range=[[0, 256], [0, 256]])[0]
    return direct_entropy(counts.sum(1)) + direct_entropy(counts.sum(0)) - direct_entropy(counts)


def direct_vif(fused, source, noise=2, tiny=1e-10):
    "VIF of one source by 2-D convolutions and masks, guard after guard."
    from scipy.signal import convolve2d
    offered = held = 0
    for scale in range(1, 5):
        size = 2 ** (5 - scale) + 1
        offset = np.arange(size) - size // 2
        window = np.exp(-(offset[:, None] ** 2 + offset ** 2) / (2 * (size / 5) ** 2))
        window /= window.sum()
        if scale > 1:
            fused, source = (convolve2d(image, window, 'valid')[::2, ::2] for image in (fused, source))
        mean_s, mean_f = (convolve2d(image, window, 'valid') for image in (source, fused))
        var_s = np.maximum(convolve2d(source ** 2, window, 'valid') - mean_s ** 2, 0)
        var_f = np.maximum(convolve2d(fused ** 2, window, 'valid') - mean_f ** 2, 0)
        covariance = convolve2d(source * fused, window, 'valid') - mean_s * mean_f
        gain = covariance / (var_s + tiny)
        residual = var_f - gain * covariance
        flat = var_s < tiny
        gain[flat], residual[flat], var_s[flat] = 0, var_f[flat], 0
        flat = var_f < tiny
        gain[flat], residual[flat] = 0, 0
        negative = gain < 0
        residual[negative], gain[negative] = var_f[negative], 0
        residual[residual <= tiny] = tiny
        offered += np.log(1 + gain ** 2 * var_s / (residual + noise)).sum()
        held += np.log(1 + var_s / noise).sum()
    return offered / held if held else 1.0


def direct_edges(image):
    from scipy.signal import convolve2d
    across = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    # Rows count downwards and the gradient upwards.
    sx, sy = convolve2d(image, across, 'same'), convolve2d(image, -across.T, 'same')
    angle = np.full(image.shape, np.pi / 2)
    angle[sx != 0] = np.arctan(sy[sx != 0] / sx[sx != 0])
    return np.hypot(sx, sy), angle


def direct_qabf(fused, ct, mri):
    strength_f, angle_f = direct_edges(fused)
    kept = weight = 0
    for strength, angle in map(direct_edges, (ct, mri)):
        ratio = strength_f.copy()
        weaker, stronger = strength_f < strength, strength_f > strength
        ratio[weaker] = strength_f[weaker] / strength[weaker]
        ratio[stronger] = strength[stronger] / strength_f[stronger]
        alike = 1 - np.abs(angle - angle_f) / (np.pi / 2)
        mark = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + np.exp(-22 * (alike - 0.8)))
        kept, weight = kept + (mark * strength).sum(), weight + strength.sum()
    return kept / weight


def direct(fused, ct, mri):
    "The eight columns under the cvpr preset, of grey levels 0..255 as float64 arrays (H, W)."
    from scipy.stats import pearsonr
    from skimage.metrics import structural_similarity

    def correlation(x, y):
        return pearsonr(x.ravel(), y.ravel()).statistic

    return {
        'EN': direct_entropy(np.bincount(fused.astype(int).ravel(), minlength=256)) / np.log(2),
        'SD': fused.std(),
        'SF': np.sqrt((np.diff(fused, axis=0) ** 2).mean() + (np.diff(fused, axis=1) ** 2).mean()),
        'MI': direct_information(fused, ct) + direct_information(fused, mri),
        'SCD': correlation(fused - mri, ct) + correlation(fused - ct, mri),
        'VIF': direct_vif(fused, ct) + direct_vif(fused, mri),
        'Qabf': direct_qabf(fused, ct, mri),
        'SSIM': sum(structural_similarity(fused, source, data_range=2) for source in (ct, mri)),
    }


def example(pairs):
    "Fused images (pixel maximum), CT and MRI, (pairs, 1, 256, 256), of different phantom slices."
    slices = [piece for piece, _ in zip(phantom_slices(cases=4, slices=8), range(16))]
    ct, mri = (torch.stack([torch.from_numpy(getattr(piece, name))[None] for piece in slices])
               for name in ('ct', 'mri'))
    ct, mri = (image.repeat(-(-pairs // 16), 1, 1, 1)[:pairs] for image in (ct, mri))
    return torch.maximum(ct, mri), ct, mri


def milliseconds(call, runs):
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def report_columns():
    "The table: each column alone and all eight together, single, in a batch of 16, and the direct way."
    single, batch = example(1), example(16)
    levels = [(image[0, 0] * 255).round().double().numpy() for image in single]
    ours, theirs = measure(*single, names=COLUMNS), direct(*levels)
    print('ms per 256 x 256 pair, one thread')
    print(f'{"":14}{"single":>9}{"batch 16":>10}{"relative difference":>21}')
    for name in COLUMNS:
        alone = milliseconds(lambda: measure(*single, names=[name]), 10)
        together = milliseconds(lambda: measure(*batch, names=[name]), 3) / 16
        print(f'{name:14}{alone:9.2f}{together:10.2f}{abs(ours[name].item() / theirs[name] - 1):21.1e}')
    alone = milliseconds(lambda: measure(*single, names=COLUMNS), 20)
    together = milliseconds(lambda: measure(*batch, names=COLUMNS), 5) / 16
    reference = milliseconds(lambda: direct(*levels), 3)
    print(f'{"all eight":14}{alone:9.2f}{together:10.2f}')
    print(f'scikit-image + SciPy, all eight: {reference:.0f} ms; ratio {reference / alone:.0f} (single), '
          f'{reference / together:.0f} (batch 16)')


def report_training():
    "Forward and backward pass of the differentiable forms, with both sources."
    fused, ct, mri = example(4)
    fused.requires_grad_()
    forms = {'VIF': lambda: sum(vif_of_pair(fused, ct, mri)), 'Qabf': lambda: qabf(fused, ct, mri),
             'SSIM': lambda: sum(ssim_of_pair(fused, ct, mri)), 'SF': lambda: spatial_frequency(fused),
             'SCD': lambda: scd(fused, ct, mri), 'invented': lambda: invented_edges(fused, ct, mri).mean((1, 2, 3))}
    times = {name: milliseconds(lambda: form().sum().backward(), 5) / 4 for name, form in forms.items()}
    print('forward + backward, ms per pair: ' + ', '.join(f'{name} {value:.1f}' for name, value in times.items()))


def peak_mebibytes():
    "Peak resident memory of this process alone; getrusage would count the parent it was forked from."
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) // 1024


def report_memory():
    "Peak resident memory of a fresh process that measures all columns of 64 pairs."
    code = (f'import runpy; script = runpy.run_path({__file__!r}); before = script["peak_mebibytes"](); '
            'script["measure"](*script["example"](64)); print(before, script["peak_mebibytes"]())')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    before, after = run.stdout.split()
    print(f'batch of 64, all columns: peak {after} MiB resident, {before} MiB of them before the first image')


def report_gpu():
    if not torch.cuda.is_available():
        print('no GPU here')
        return
    images = [image.cuda() for image in example(1024)]

    def call():
        measure(*images, names=COLUMNS)
        torch.cuda.synchronize()

    print(f'{torch.cuda.get_device_name()}: {1024 / milliseconds(call, 5) * 1000:.0f} pairs a second, all eight')


if __name__ == '__main__':
    torch.set_num_threads(1)
    report_columns()
    report_training()
    report_memory()
    report_gpu()
