"""How long the whole wavelet loss takes on a CPU, ours beside the same loss written with conv2d, in one run.

    python benchmarks/losses_speed.py --threads 2

The loss is MSE + SSIM to two sources + gradient, forward and backward, on 2 x 1 x 256 x 256. The direct version has one
2-D convolution per moment and source for SSIM and one per direction and image for Sobel; both give the same value and
the same gradient, which is checked first. The two are timed in turn, so that a busy machine slows both; medians.
"""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from medfusion.losses import gradient_loss, mse_loss, ssim_loss


def wavelet_loss(fused, ct, mri):
    "MSE + SSIM + gradient as medfusion computes them."
    return mse_loss(fused, ct, mri) + ssim_loss(fused, ct, mri) + gradient_loss(fused, ct, mri)


def direct_ssim(x, y, window):
    "SSIM with one 2-D convolution per moment."
    mu_x, mu_y = F.conv2d(x, window), F.conv2d(y, window)
    var_x = F.conv2d(x * x, window) - mu_x ** 2
    var_y = F.conv2d(y * y, window) - mu_y ** 2
    cov = F.conv2d(x * y, window) - mu_x * mu_y
    return (((2 * mu_x * mu_y + 0.01 ** 2) * (2 * cov + 0.03 ** 2))
            / ((mu_x ** 2 + mu_y ** 2 + 0.01 ** 2) * (var_x + var_y + 0.03 ** 2))).mean()


def direct_loss(fused, ct, mri):
    "The same loss with F.conv2d for every window and every Sobel derivative."
    offsets = torch.arange(-5, 6, dtype=fused.dtype, device=fused.device)
    taps = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    taps = taps / taps.sum()
    window = (taps[:, None] * taps)[None, None]
    smooth, edge = fused.new_tensor([1, 2, 1]), fused.new_tensor([-1, 0, 1])
    gradient = 0
    for kernel in (smooth[:, None] * edge, edge[:, None] * smooth):
        of_fused, of_ct, of_mri = (F.conv2d(image, kernel[None, None]) for image in (fused, ct, mri))
        target = torch.where(of_ct.abs() >= of_mri.abs(), of_ct, of_mri)
        gradient = gradient + (of_fused - target).abs().mean() / 2
    structure = 1 - (direct_ssim(fused, ct, window) + direct_ssim(fused, mri, window)) / 2
    return F.mse_loss(fused, torch.maximum(ct, mri)) + structure + gradient


def step(loss, fused, ct, mri):
    "Value and gradient of one forward and backward pass."
    fused = fused.detach().requires_grad_()
    value = loss(fused, ct, mri)
    value.backward()
    return value.detach(), fused.grad


def milliseconds(losses, images, repeats):
    "Median time of a step of each loss, the losses taking turns."
    times = [[] for _ in losses]
    for i in range(repeats + 3):
        for loss, record in zip(losses, times):
            start = time.perf_counter()
            step(loss, *images)
            if images[0].is_cuda:
                torch.cuda.synchronize()
            if i >= 3:  # the first rounds warm up
                record.append(1000 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(args.batch, 1, args.size, args.size, generator=generator).to(args.device) for _ in range(3)]

    for ours, direct in zip(step(wavelet_loss, *images), step(direct_loss, *images)):
        torch.testing.assert_close(ours, direct, rtol=1e-3, atol=1e-7)
    ours, direct = milliseconds((wavelet_loss, direct_loss), images, args.repeats)
    print(f'wavelet loss, forward + backward, {args.batch}x1x{args.size}x{args.size}, '
          f'{args.threads} threads, {args.device}, median of {args.repeats}')
    print(f'  medfusion.losses   {ours:8.1f} ms')
    print(f'  direct, conv2d     {direct:8.1f} ms')
    print(f'  ratio              {direct / ours:8.1f}')


if __name__ == '__main__':
    main()
