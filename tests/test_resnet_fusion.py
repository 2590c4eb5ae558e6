"""What the notebook of ResNet fusion does not show: sizes, downloads, damaged files, the cache, splits."""
import hashlib
import http.server
import json
import threading
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from torchvision.models import ResNet50_Weights, resnet50

from medfusion import resnet_fusion
from medfusion.data import CTMRIDataset
from medfusion.phantom import write_phantom
from medfusion.backbone import ResNetBackbone, find_backbone, load_backbone
from medfusion.resnet_fusion import (Config, FeatureCache, ResNetFusion, TrainingPairs, fusion_loss, parameter_groups,
                                     perceptual_loss, training_sets, training_step)
from medfusion.files import sha256_of
from medfusion.runs import notebook_parameters, open_parts


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    network = ResNetFusion('none').eval()
    torch.nn.init.normal_(network.head.weight, std=0.3)      # an untrained head says the same everywhere
    return network


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp('phantom') / 'Dataset', cases=6, slices=2, size=64)


@pytest.fixture(scope='module')
def dataset(root):
    return CTMRIDataset(root / 'train' / 'CT', root / 'train' / 'MRI')


def pair(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


# The backbone and its weights

def test_backbone_equals_torchvision():
    network = resnet50(weights=None).eval()
    backbone = ResNetBackbone('layer3')
    backbone.load_state_dict({name: tensor for name, tensor in network.state_dict().items()
                              if not name.startswith(('layer4', 'fc'))})
    image = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        transform = ResNet50_Weights.IMAGENET1K_V2.transforms(crop_size=64, resize_size=64, antialias=False)
        x = transform(image.expand(-1, 3, -1, -1))
        x = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(x)))))
        expected = network.layer3(network.layer2(x))
        found = backbone(image)
    assert torch.allclose(found['layer1'], x, atol=1e-4 * x.abs().max())
    assert torch.allclose(found['layer3'], expected, atol=1e-4 * expected.abs().max())


def test_backbone_stays_frozen(model):
    model.train()
    assert not any(module.training for module in model.backbone.modules())
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-3, 0.5))
    training_step(model, dict(zip(('ct', 'mri'), pair(2, 1, 32, 32))), Config())['loss'].backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(weights.grad is not None and weights.grad.isfinite().all()
               for group in optimizer.param_groups for weights in group['params'])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize('deepest, stages', [('stem', 1), ('layer1', 2), ('layer4', 5)])
def test_other_depths(deepest, stages):
    network = ResNetFusion('none', deepest=deepest, widths=(8,) * stages).eval()
    with torch.no_grad():
        assert network(*pair(1, 1, 33, 40)).shape == (1, 1, 33, 40)
    assert len(network.maps(*pair(1, 1, 64, 64))) == 2 + stages


def test_unknown_stage_and_widths():
    with pytest.raises(ValueError, match='layer5'):
        ResNetBackbone('layer5')
    with pytest.raises(ValueError, match='widths'):
        ResNetFusion('none', widths=(8, 8))


class _Server:
    "Sends one file from loopback, and counts how often it was asked."
    def __init__(self, data):
        server = self
        self.asked = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked += 1
                self.send_response(200)
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.http = http.server.HTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def url(self, name):
        return f'http://127.0.0.1:{self.http.server_port}/{name}'

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(scope='module')
def weights_file(tmp_path_factory):
    "A file like torchvision's, as far as layer1, with its hash in its name."
    path = tmp_path_factory.mktemp('weights') / 'resnet50.pth'
    torch.manual_seed(5)
    torch.save({**ResNetBackbone('layer1').state_dict(), 'fc.bias': torch.zeros(1000)}, path)
    return path.rename(path.with_name(f'resnet50-{sha256_of(path)[:8]}.pth'))


@pytest.fixture
def torch_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'torch'))
    return tmp_path / 'torch' / 'checkpoints'


def test_download_from_loopback(weights_file, torch_cache, monkeypatch):
    server = _Server(weights_file.read_bytes())
    monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V2.value, 'url', server.url(weights_file.name))
    first = load_backbone('IMAGENET1K_V2', 'layer1')
    second = load_backbone('IMAGENET1K_V2', 'layer1')
    server.close()
    assert server.asked == 1 and first.sha256 == second.sha256 == sha256_of(weights_file)
    expected = torch.load(weights_file, weights_only=True)['conv1.weight']
    assert torch.equal(second.backbone.conv1.weight, expected)
    cached = torch_cache / weights_file.name
    cached.write_bytes(cached.read_bytes()[:-100])
    with pytest.raises(ValueError, match='delete it and fetch it again|no file of weights'):
        load_backbone('IMAGENET1K_V2', 'layer1')


def test_download_with_wrong_hash(weights_file, torch_cache, monkeypatch):
    server = _Server(weights_file.read_bytes())
    monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V2.value, 'url', server.url('resnet50-00000000.pth'))
    with pytest.raises(ValueError, match="backbone_weights='medfusion'"):
        load_backbone('IMAGENET1K_V2', 'layer1')
    server.close()
    assert not list(torch_cache.glob('*.pth'))


def test_no_network(torch_cache, monkeypatch):
    server = _Server(b'')
    url = server.url('resnet50-11ad3fa6.pth')
    server.close()
    monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V2.value, 'url', url)
    with pytest.raises(FileNotFoundError) as error:
        load_backbone('IMAGENET1K_V2', 'layer1')
    for said in (url, str(torch_cache / 'resnet50-11ad3fa6.pth'), "backbone_weights='medfusion'"):
        assert said in str(error.value)


def test_weights_from_a_path(weights_file, tmp_path):
    assert load_backbone(str(weights_file), 'layer1').sha256 == sha256_of(weights_file)
    with pytest.raises(ValueError, match='layer2'):
        load_backbone(str(weights_file), 'layer2')
    lying = tmp_path / 'resnet50-00000000.pth'
    lying.write_bytes(weights_file.read_bytes())
    with pytest.raises(ValueError, match='hash that its name promises'):
        load_backbone(str(lying), 'layer1')
    text = tmp_path / 'weights.pth'
    text.write_text('not weights')
    with pytest.raises(ValueError, match='no file of weights'):
        load_backbone(str(text), 'layer1')
    with pytest.raises(FileNotFoundError, match='IMAGENET1K_V2'):
        load_backbone(str(tmp_path / 'absent.pth'), 'layer1')


def test_find_backbone(tmp_path, monkeypatch, weights_file):
    folder = tmp_path / 'final' / 'resnet50_backbone'
    monkeypatch.setenv('MEDFUSION_CHECKPOINTS', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='80_pretraining'):
        find_backbone()
    folder.mkdir(parents=True)
    path = folder / 'resnet50_backbone.pt'
    path.write_bytes(weights_file.read_bytes())
    (folder / 'metadata.json').write_text(json.dumps({'sha256': sha256_of(path)}))
    assert find_backbone() == find_backbone(folder) == path.resolve()
    assert load_backbone('medfusion', 'layer1').sha256 == sha256_of(path)
    path.write_bytes(b'another file')
    with pytest.raises(ValueError, match='SHA-256'):
        find_backbone()


# The network

@pytest.mark.parametrize('height, width', [(16, 16), (16, 47), (17, 33), (31, 64), (101, 83)])
def test_any_size(model, height, width):
    ct, mri = pair(1, 1, height, width)
    with torch.no_grad():
        fused = model(ct, mri)
    assert fused.shape == ct.shape and 0 <= fused.min() and fused.max() <= 1
    for name, weights in model.maps(ct, mri).items():
        assert weights.shape[:2] == (1, 1) and 0 <= weights.min() and weights.max() <= 1, name


def test_slice_alone_equals_slice_in_batch(model):
    ct, mri = pair(5, 1, 48, 80)
    with torch.no_grad():
        together = model(ct, mri)
        for index in range(5):
            assert (model(ct[index:index + 1], mri[index:index + 1]) - together[index:index + 1]).abs().max() < 1e-6


def test_background_stays_black(model):
    ct, mri = pair(1, 1, 64, 64)
    ct[..., :20], mri[..., :20] = 0, 0
    with torch.no_grad():
        assert model(ct, mri)[..., :20].max() == 0


@pytest.mark.parametrize('shapes', [((1, 1, 15, 64),) * 2, ((1, 1, 32, 32), (1, 1, 32, 33)), ((1, 3, 32, 32),) * 2,
                                    ((32, 32),) * 2])
def test_slices_that_do_not_fit(model, shapes):
    with pytest.raises(ValueError, match='one shape'):
        model(*map(torch.rand, shapes))


def test_rebuilt_from_config_and_state(model):
    state = model.state_dict()
    assert not any(name.startswith('backbone') for name in state)
    torch.manual_seed(9)
    again = ResNetFusion(**model.config).eval()
    again.load_state_dict(state)
    ct, mri = pair(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(ct, mri), model(ct, mri))
    with pytest.raises(ValueError, match='train again'):
        ResNetFusion(**{**model.config, 'backbone_sha256': hashlib.sha256(b'').hexdigest()})
    with pytest.raises(RuntimeError):
        again.load_state_dict({name: tensor for name, tensor in state.items() if name != 'head.bias'})


def test_parameter_groups(model):
    groups = parameter_groups(model, 1.0, 0.5)
    assert [group['lr'] for group in groups] == [1.0, 0.5, 0.25, 0.125, 0.0625]
    assert [group['name'] for group in groups] == ['full resolution', 'stem', 'layer1', 'layer2', 'layer3']
    assert sum(len(group['params']) for group in groups) == sum(p.requires_grad for p in model.parameters())


# The loss

def test_every_term_on_black_and_on_equal_images():
    weights = {name: 1.0 for name in ('ssim', 'gradient', 'intensity', 'qabf', 'vif', 'scd', 'sd', 'ssim_min')}
    for image in (torch.zeros(1, 1, 64, 64), torch.rand(1, 1, 64, 64)):
        fused = image.clone().requires_grad_()
        terms = fusion_loss(fused, image, image, weights)
        terms['loss'].backward()
        assert all(value.isfinite() for value in terms.values()) and fused.grad.isfinite().all()


def test_a_term_of_weight_zero_is_not_computed():
    def never():
        raise AssertionError
    images = torch.rand(3, 1, 1, 32, 32)
    assert set(fusion_loss(*images, {'ssim': 1.0, 'perceptual': 0.0, 'vif': 0.0}, never)) == {'loss', 'ssim'}


def test_the_lesions_of_a_recipe_reach_the_loss(model, dataset):
    asked = []

    def lesions(network):
        asked.append(network)
        return torch.tensor(0.5)

    batch = next(iter(torch.utils.data.DataLoader(TrainingPairs(dataset), batch_size=2)))
    with torch.no_grad():
        plain = training_step(model, batch, Config())
        terms = training_step(model, batch, Config(w_lesion=2.0), lesions)
    assert asked == [model] and terms['lesion'] == 0.5 and torch.isclose(terms['loss'], plain['loss'] + 1)


def test_perceptual_loss_margin():
    sources = {'stem': torch.rand(1, 2, 64, 32, 32)}
    fused = sources['stem'].amax(1)
    fused[..., :8, :] += 1                     # 8 cells of the stem are 16 pixels
    assert perceptual_loss({'stem': fused}, sources, margin=16) == 0 < perceptual_loss({'stem': fused}, sources)


def test_unknown_perceptual_stage(model):
    with pytest.raises(ValueError, match='layer9'):
        training_step(model, dict(zip(('ct', 'mri'), pair(1, 1, 32, 32))), Config(perceptual_stages='layer9'))


# Features computed once

@pytest.mark.parametrize('budget', [1.0, 0.0])
def test_cache_holds_the_features(model, dataset, tmp_path, budget):
    cache = FeatureCache(model.backbone, dataset, True, budget, tmp_path)
    assert (cache.scratch is None) == (budget > 0)
    for index in (0, len(dataset) - 1):
        item = dataset[index]
        for mirror in (0, 1):
            ct, mri = (item[modality][None].flip(-1) if mirror else item[modality][None] for modality in ('ct', 'mri'))
            for stage, feature in model.features(ct, mri).items():
                kept = cache.get(index, mirror)[stage].permute(0, 3, 1, 2)
                assert (kept - feature[0]).abs().max() < 1e-3 * feature.abs().max()
    del cache
    assert not list(tmp_path.iterdir())        # the file is gone


def test_no_room_for_the_cache(model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(resnet_fusion.shutil, 'disk_usage', lambda folder: type('Usage', (), {'free': 10}))
    with pytest.raises(OSError, match='cache_gb=0'):
        FeatureCache(model.backbone, dataset, True, 0.0, tmp_path)


def test_training_pairs(model, dataset):
    cache = FeatureCache(model.backbone, dataset)
    pairs, bare = (TrainingPairs(dataset, one, crop=32, mirror=True, seed=3) for one in (cache, None))
    seen = []
    for epoch in range(4):
        pairs.set_epoch(epoch)
        bare.set_epoch(epoch)
        item = pairs[1]
        assert item['ct'].shape == (1, 32, 32)
        assert torch.equal(item['ct'], bare[1]['ct']) and torch.equal(item['ct'], pairs[1]['ct'])
        whole = dataset[1]['ct'], dataset[1]['ct'].flip(-1)
        places = [(mirror, row, column) for mirror in (0, 1) for row in range(0, 33, 16) for column in range(0, 33, 16)
                  if torch.equal(whole[mirror][:, row:row + 32, column:column + 32], item['ct'])]
        features = [cache.get(1, mirror)['layer2'][:, row // 8:row // 8 + 4, column // 8:column // 8 + 4]
                    for mirror, row, column in places]
        assert any(torch.equal(item['features']['layer2'], feature) for feature in features)
        seen.append(places[0])
    assert len(set(seen)) > 1
    with pytest.raises(ValueError, match='multiple of 16'):
        TrainingPairs(dataset, crop=40)


def test_step_with_and_without_cache(model, dataset):
    "Half precision of the features is all that the cache changes."
    cache = FeatureCache(model.backbone, dataset, mirrored=False)
    load = partial(torch.utils.data.DataLoader, batch_size=2)
    with torch.no_grad():
        with_cache, without = (training_step(model, next(iter(load(TrainingPairs(dataset, one)))), Config())
                               for one in (cache, None))
    for name, value in without.items():
        assert abs(with_cache[name] - value) < 2e-3, name


def test_odd_sizes_in_the_cache(model, tmp_path):
    root = write_phantom(tmp_path / 'odd', cases=6, slices=1, size=(75, 66))
    pairs = {part: CTMRIDataset(root / part / 'CT', root / part / 'MRI') for part in ('train', 'val')}
    train, val = training_sets(model, pairs, Config(save_dir=str(tmp_path / 'results')))
    with torch.no_grad():
        assert training_step(model, next(iter(torch.utils.data.DataLoader(train, 2))), Config())['loss'].isfinite()


# Parameters and data

def test_config_and_parameters_cell_agree():
    declared = notebook_parameters('resnet_based_fusion.ipynb')
    assert {name: parameter.default for name, parameter in declared.items()} == asdict(Config())
    cfg = Config()
    cfg.ct_dir = '../Dataset/CT-MRI/CT'
    assert cfg.ct_dir.endswith('CT') and (cfg.batch_size, cfg.epochs, cfg.lr) == (4, 100, 2e-4)


def _flat(root, tmp_path):
    for modality in ('CT', 'MRI'):
        (tmp_path / modality).mkdir()
        for file in root.glob(f'*/{modality}/*.png'):
            (tmp_path / modality / file.name).write_bytes(file.read_bytes())
    return {'ct_dir': str(tmp_path / 'CT'), 'mri_dir': str(tmp_path / 'MRI')}


def test_flat_folder_is_split_by_case(root, tmp_path):
    sides = [set(part.cases) for part in open_parts(Config(**_flat(root, tmp_path)))]
    assert [len(side) for side in sides] == [4, 1, 1] and len(set.union(*sides)) == 6


def test_a_case_on_two_sides(root, tmp_path):
    flat = _flat(root, tmp_path)
    folders = {f'{modality}_{part}_dir': str(root / part / modality.upper())
               for part in ('val', 'test') for modality in ('ct', 'mri')}
    with pytest.raises(ValueError, match='is in .* and in .*; split by case'):
        open_parts(Config(**flat, **folders))


def test_half_precision_has_room(dataset):
    "Activations beyond the largest number of half precision are kept as that number, not as infinity."
    backbone = ResNetBackbone('stem')
    backbone.bn1.weight.data.fill_(1e7)
    cache = FeatureCache(backbone, dataset, mirrored=False)
    assert np.isfinite(cache.storage.numpy()).all() and cache.storage.max() == 65504
