"""Pairs a second of a network over batch sizes, and how near that comes to what the device allows at best (its roofline).

python benchmarks/gpu_speed.py                      # the shipped wavelet network at 256×256, on a GPU where there is one
python benchmarks/gpu_speed.py -m resnet --size 512 --batches 1 8
python benchmarks/gpu_speed.py --device cpu --batches 1 4 --rounds 3

The roofline is that of this device, measured in the same run: the rate of multiplying and adding of a large matrix product or of a
convolution of 3×3 pixels and 64 channels (on a CPU another library, and on some processors twice as fast), in the type of the weights or
in single precision, whichever is fastest (on a GPU with TF32 units by those, which its convolutions use too), and the bytes a second of copying. A convolution takes at best the longer of both times, for its products and for reading its input and weights
and writing its output once; everything else is taken as free, but for reading both slices and writing the fused one. So 100 % is out of
reach. Ways: `eager` as the library calls the network, `compile` by torch.compile (where a compiler is), and either as one CUDA `graph`.
Rounds of all ways alternate and the best of each counts.
"""
import argparse
import math
import time

import torch
from machine import heading, ratio

from medfusion.dial import without_dial
from medfusion.inference import load_model


def seconds_of(call, device, calls=3):
    "The seconds of one call, of several in a row, when the device has done them."
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - start) / calls


def product_rate(device, dtype):
    "Multiplications with addition a second of a large matrix product or a convolution in this type, whichever is faster."
    side, batch = (8192, 64) if device.type == 'cuda' else (1024, 4)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    layer = torch.nn.Conv2d(64, 64, 3, padding=1, bias=False, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    maps = torch.randn(batch, 64, 64, 64, device=device).to(dtype, memory_format=torch.channels_last)
    calls = {lambda: a @ b: side ** 3, lambda: layer(maps): maps.numel() * layer.weight[0].numel()}
    with torch.inference_mode():
        return max(count / min(seconds_of(call, device, calls=1) for _ in range(9)) for call, count in calls.items())


def copy_rate(device):
    "Bytes a second that are read and written by a copy."
    many = 2 ** 28 if device.type == 'cuda' else 2 ** 25
    source, target = (torch.empty(many, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * many / min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))


def peaks_of(device, dtype):
    "What the device reaches at best: products a second (a type that it has no units for may be computed in single precision), bytes a second."
    return max(product_rate(device, kind) for kind in {dtype, torch.float32}), copy_rate(device)


def least_seconds(network, ct, mri, dtype, peaks):
    "The roofline: the seconds that a batch takes at best, and its products in 10⁹; by what the convolutions read, compute and write."
    products, moved, total = [], [], 3 * ct.numel() * ct.element_size() / peaks[1]

    def note(layer, inputs, output):
        products.append(output.numel() * layer.weight[0].numel())
        moved.append((inputs[0].numel() + output.numel() + layer.weight.numel()) * dtype.itemsize)
    hooks = [layer.register_forward_hook(note) for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    network(ct, mri)
    for hook in hooks:
        hook.remove()
    return total + sum(max(count / peaks[0], size / peaks[1]) for count, size in zip(products, moved)), sum(products) / 1e9


def as_graph(network, ct, mri):
    "A call that replays the network on these slices as one CUDA graph."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):    # what is allocated once is allocated before the capture
        for _ in range(3):
            network(ct, mri)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(ct, mri)
    return graph.replay


def ways_of(network, ct, mri, device, compiled):
    "{name: call without arguments} of the ways in which this batch can be fused here."
    ways = {'eager': lambda: network(ct, mri)}
    if device.type == 'cuda':
        ways['graph'] = as_graph(network, ct, mri)
    if compiled:
        fast = torch.compile(network, dynamic=False)    # one compilation for each size of batch
        ways['compile'] = lambda: fast(ct, mri)
        if device.type == 'cuda':
            ways['compile, graph'] = as_graph(fast, ct, mri)
    return ways


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-m', '--model', default='wavelet', help='the network, as -m of the command takes it')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--size', type=int, default=256, help='side of the slices in pixels')
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 4, 16, 64])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--compile', action='store_true', help='torch.compile, too')
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32    # the products that are counted, as convolutions compute them
    print(heading(torch.cuda.get_device_name() if device.type == 'cuda' else ''))
    print(f'{given.model}, {given.size}×{given.size}, {"on a GPU" if device.type == "cuda" else "one thread of the CPU"}')
    shares = {}
    print(f'{"weights":<9} {"batch":>5} {"way":<15} {"pairs/s":>9} {"roofline":>9} {"share":>6}   10⁹ products a pair')
    for dtype in (torch.float32, torch.bfloat16):
        network, peaks = without_dial(load_model(given.model, device)).to(dtype), peaks_of(device, dtype)
        for batch in given.batches:
            ct, mri = torch.rand(2, batch, 1, given.size, given.size, device=device)
            with torch.inference_mode():
                least, products = least_seconds(network, ct, mri, dtype, peaks)
                ways, best = ways_of(network, ct, mri, device, given.compile), {}
                for _ in range(given.rounds + 1):    # the first round warms up
                    for name, call in ways.items():
                        took = seconds_of(call, device, calls=max(1, math.ceil(16 / batch)))
                        best[name] = min(best.get(name, took), took)
            for name, seconds in best.items():
                shares[dtype] = max(shares.get(dtype, 0), least / seconds)
                print(f'{str(dtype).removeprefix("torch."):<9} {batch:>5} {name:<15} {batch / seconds:>9.1f} {batch / least:>9.1f} {least / seconds:>6.0%}   {products / batch:.2f}',
                      flush=True)
        print(f'{"":9} measured here: {peaks[0] / 1e12:.3g} · 10¹² products, {peaks[1] / 1e9:.3g} GB a second')
    for dtype, share in shares.items():
        print(ratio(f'{given.model} in {str(dtype).removeprefix("torch.")}, of the roofline' + ' of one thread' * (given.device == 'cpu'), share, percent=True))


if __name__ == '__main__':
    main()
