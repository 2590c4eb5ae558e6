"""What a GPU refuses and a CPU lets pass, asked without one: tensors of two devices in one operation, arrays made of tensors that lie elsewhere.

Run by itself (`python tests/test_devices.py`) this file makes a device that computes on the CPU and refuses the same, and trains and fuses on it.
"""
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]


def test_what_computes_elsewhere_does_it_as_on_the_cpu():
    "In a process of its own, for a device stays as long as the process does."
    if not hasattr(backend_registration, '_setup_privateuseone_for_python_backend'):
        pytest.skip('this version of torch makes no device in Python')
    asked = {'PYTHONPATH': str(ROOT), 'ACCELERATE_TORCH_DEVICE': 'elsewhere:0', 'MEDFUSION_PROGRESS': 'none', 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, __file__], env=os.environ | asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_on_apples_processors_is_on_the_cpu(monkeypatch):
    "accelerate chooses their GPU, which has no double precision; the networks that a network learns from, and device_name, are on the CPU."
    from accelerate.state import AcceleratorState

    from medfusion.processes import connect
    monkeypatch.setenv('PYTORCH_ENABLE_MPS_FALLBACK', '1')    # accelerate sets it, for good
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr('accelerate.state.is_mps_available', lambda: True)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert connect().device.type == connect().device.type == 'cpu'
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# ---- the device -----------------------------------------------------------------------------------------------------

class Elsewhere(torch.Tensor):
    "A tensor that says that it lies on the device `elsewhere`, and is `held` on the CPU."

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                                                   dtype=held.dtype, device='elsewhere:0')

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return computed(operation, *args, **(kwargs or {}))

    def __matmul__(self, other):    # torch's changes a shape in place, which a tensor as this one cannot
        return torch.mv(other.T, self) if (self.dim(), other.dim()) == (1, 2) else torch.matmul(self, other)

    def tolist(self):
        return self.cpu().tolist()


def computed(operation, *args, **kwargs):
    "What an operation gives, elsewhere if its tensors are there or it is asked for that; RuntimeError where a GPU raises it."
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there, name, device = [value for value in tensors if isinstance(value, Elsewhere)], operation._schema.name, kwargs.get('device')
    moves = name in ('aten::copy_', 'aten::_to_copy')
    indices = tree_leaves(args[1]) if 'index' in name and len(args) > 1 else []      # which may lie on the CPU
    for value in tensors:
        if there and not moves and value.dim() and not isinstance(value, Elsewhere) and not any(value is index for index in indices):
            raise RuntimeError(f'Expected all tensors to be on the same device: {name} got one of {tuple(value.shape)} on the CPU.')
    if kwargs.get('generator') is not None and device is not None and torch.device(device).type != 'cpu':
        raise RuntimeError(f'Expected a generator of this device: {name} got one of the CPU.')
    place = there if device is None else torch.device(device).type != 'cpu'
    kwargs |= {} if device is None else {'device': 'cpu'}
    held = {id(value.held): value for value in there}      # what is changed in place stays the same tensor
    args, kwargs = tree_map(lambda value: value.held if isinstance(value, Elsewhere) else value, (args, kwargs))
    result = operation(*args, **kwargs)
    if name == 'aten::copy_':
        return tensors[0]
    return tree_map(lambda value: (held[id(value)] if id(value) in held else Elsewhere(value)) if isinstance(value, torch.Tensor) and place else value, result)


class Module:
    "What torch asks of a device's module."
    is_available = is_initialized = staticmethod(lambda: True)
    device_count, current_device = staticmethod(lambda: 1), staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = set_device = synchronize = empty_cache = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16, torch.float32])


def make_device():
    "There is a device `elsewhere` from now on."
    backend_registration._setup_privateuseone_for_python_backend('elsewhere', backend_module=Module())
    library, made = torch.library.Library('_', 'IMPL'), torch.tensor
    library.fallback(computed, dispatch_key='PrivateUse1')
    library.fallback(torch.library.fallthrough_kernel, dispatch_key='AutocastPrivateUse1')
    torch.tensor = lambda data, *, device=None, **more: made(data, **more) if device is None else made(data, **more).to(device)
    return library


# ---- what is done there ---------------------------------------------------------------------------------------------

def networks():
    "Each method's network, small, far from its initial values."
    from medfusion.resnet_fusion import ResNetFusion
    from medfusion.wavelet_fusion import WaveletFusion
    from medfusion.wavelet_lite import WaveletLite
    torch.manual_seed(0)
    made = {'wavelet': WaveletFusion(8, cycle_spin=True, white_bone=True, dial=True), 'wavelet-lite': WaveletLite(),
            'resnet': ResNetFusion('none', deepest='layer2', widths=(8, 8, 8), white_bone=True, follow_edges=True, dial=True)}
    for network in made.values():
        torch.nn.init.normal_(getattr(network, 'network', network).head.weight, std=0.3)
    return {name: network.eval() for name, network in made.items()}


def check_fusing():
    "Slices and maps of each network, its dial turned, and the measures of what it fuses, are those of the CPU."
    from medfusion.explorer import maps_of
    from medfusion.inference import fuse, has_dial
    from medfusion.metrics import measure
    pair = torch.rand(2, 2, 1, 50, 61, generator=torch.Generator().manual_seed(11))     # no fused value lies within 1e-4 of the middle of two grey levels, where the last bit decides
    pair[..., 30:] *= pair[..., 30:] > 0.4
    for name, network in networks().items():
        for dial in [{'lesions': 0.}, {}, {'lesions': 1.}] if has_dial(network) else [{}]:
            with torch.no_grad():
                wanted, found = network.cpu()(*pair, **dial), network.to('elsewhere')(*pair.to('elsewhere'), **dial)
            assert found.device.type == 'elsewhere' and (found.cpu() - wanted).abs().max() < 1e-5, name
            here = fuse(*(np.rint(255 * one[0, 0].numpy()).astype(np.uint8) for one in pair), network, **dial)
            there = fuse(*((255 * one[:1]).round().to(torch.uint8).to('elsewhere') for one in pair), network, **dial)
            assert there.device.type == 'elsewhere' and np.array_equal(there.cpu().numpy()[0, 0], here)
        maps, wanted = maps_of(name, network.maps, *pair[:, :1]), maps_of(name, network.cpu().maps, *pair[:, :1])
        assert all(np.abs(maps[one] - wanted[one]).max() < 1e-5 for one in wanted)
    wanted, there = measure(found.cpu(), *pair), measure(found, *pair.to('elsewhere'))
    assert all(torch.allclose(there[column].cpu(), wanted[column], equal_nan=True) for column in wanted)


def train(name, sets, lesions, folder, epochs=1, resume=False):
    "The history of a training of a method with every term of its loss, as its notebook does it."
    from medfusion import losses, resnet_fusion, training, wavelet_fusion, wavelet_lite
    from medfusion.backbone import FeatureCache, TrainingPairs
    from medfusion.detectability import DetectionTerm
    from medfusion.runs import CheckpointFiles
    network, terms = networks()[name], {'lesions': lesions, 'detection': DetectionTerm(sets[0])}
    weights = dict.fromkeys([*losses.loss_terms(), 'lesion', 'detection'], 1.)
    if name == 'resnet':
        cfg = resnet_fusion.Config(deepest='layer2', **{f'w_{term}': weight for term, weight in weights.items()})
        network.to('elsewhere')
        sets = [TrainingPairs(one, FeatureCache(network.backbone, one, mirrored=False)) for one in sets]
        step = partial(resnet_fusion.training_step, cfg=cfg, **terms)
    elif name == 'wavelet-lite':
        teacher = networks()['wavelet'].to('elsewhere')
        step = partial(wavelet_lite.training_step, teacher=teacher, weights=weights | {'imitation': 1.}, **terms)
    else:
        step = partial(wavelet_fusion.dial_step, dial=4., weights=weights, **terms)
    optimizer = torch.optim.Adam([one for one in network.parameters() if one.requires_grad], lr=1e-3)
    files = CheckpointFiles(folder / 'intermediate', folder, 'epoch_{epoch}.pt', 'best.pt')
    history = training.fit(network, step, *sets, files, epochs=epochs, batch_size=2, optimizer=optimizer, method=name, config=network.config,
                           clip=1., ema=0.9, companion=terms['detection'], resume=resume)
    assert next(network.parameters()).device.type == 'elsewhere'
    return history


def check_training(folder):
    "Each method trains there, and keeps what it learnt on the CPU; a training goes on from its checkpoint."
    from medfusion.data import CTMRIDataset
    from medfusion.losses import LesionTerm
    from medfusion.phantom import write_phantom
    root, lesions = write_phantom(folder / 'Dataset', cases=3, slices=2, size=128), LesionTerm(cases=2)
    sets = [CTMRIDataset(root / part / 'CT', root / part / 'MRI') for part in ('train', 'val')]
    histories = {name: train(name, sets, lesions, folder / name) for name in networks()}
    assert all(type(one) is torch.Tensor for history in histories.values() for one in history.best['state_dict'].values())
    assert len(train('wavelet', sets, lesions, folder / 'wavelet', 2, resume=True)) == 2


if __name__ == '__main__':
    library = make_device()
    check_fusing()
    with tempfile.TemporaryDirectory() as made:
        check_training(Path(made))
