"""The frozen backbone: equal to torchvision's, its weights found, downloaded and checked, its features kept once."""
import errno
import http.server
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from torchvision.models import ResNet50_Weights, resnet50

import medfusion
from medfusion import backbone as module
from medfusion.backbone import (FeatureCache, OnFrozenBackbone, ResNetBackbone, TrainingPairs, find_backbone, frozen_features, half_storage,
                                load_backbone)
from medfusion.data import CTMRIDataset
from medfusion.files import sha256_of
from medfusion.phantom import write_phantom


@pytest.fixture(scope='module')
def small():
    "A frozen backbone with random weights, as deep as two scales."
    return load_backbone('none', 'layer1').backbone


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    root = write_phantom(tmp_path_factory.mktemp('phantom') / 'Dataset', cases=3, slices=2, size=64)
    return CTMRIDataset(root / 'train' / 'CT', root / 'train' / 'MRI')


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


def test_unknown_stage():
    with pytest.raises(ValueError, match='layer5'):
        ResNetBackbone('layer5')


# Where weights come from

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


@pytest.mark.parametrize('written', [b'hello', b'(text', b'G', b'\x80\x02\x8a\nlm'])
def test_a_file_of_anything_is_no_file_of_weights(tmp_path, written):
    text = tmp_path / 'weights.pth'
    text.write_bytes(written)
    with pytest.raises(ValueError, match='weights.pth is no file of weights'):
        load_backbone(str(text), 'layer1')


@pytest.mark.parametrize('change, said', [
    ({'layer1.0.conv1.weight': torch.zeros(128, 64, 1, 1)}, r'layer1.0.conv1.weight is \(128, 64, 1, 1\) where the network has \(64, 64, 1, 1\)'),   # of a wide ResNet
    ({'layer1.3.conv1.weight': torch.zeros(64, 256, 1, 1)}, 'layer1.3.conv1.weight is too much'),                                             # of a deeper one
    ({'bn1.weight': torch.full((64,), float('nan'))}, 'bn1.weight is not finite')])
def test_weights_of_another_network_are_refused(weights_file, tmp_path, change, said):
    path = tmp_path / 'other.pth'
    torch.save(torch.load(weights_file, weights_only=True) | change, path)
    with pytest.raises(ValueError, match=f'other.pth .*{said}.*choose other weights'):
        load_backbone(str(path), 'layer1')


# What ships is found by its record, what one trains oneself by its hash

@pytest.fixture
def places(tmp_path, monkeypatch, weights_file):
    "A package and a clone in which each place of a backbone holds another file."
    package, clone = tmp_path / 'package', tmp_path / 'clone'
    for folder, data in ((package / 'shipped', weights_file.read_bytes()), (clone / 'checkpoints/final', b'trained here')):
        (folder / 'resnet50_backbone').mkdir(parents=True)
        path = folder / 'resnet50_backbone/resnet50_backbone.pt'
        path.write_bytes(data)
        path.with_name('metadata.json').write_text(json.dumps({'sha256': sha256_of(path)}))
    monkeypatch.setattr(medfusion, '__file__', str(package / '__init__.py'))
    monkeypatch.setattr(module, 'nbs_dir', lambda: clone / 'nbs')
    return package / 'shipped/resnet50_backbone/resnet50_backbone.pt', clone / 'checkpoints/final/resnet50_backbone/resnet50_backbone.pt'


def test_a_backbone_is_found_by_its_hash_in_both_places(places):
    shipped, own = places
    assert find_backbone() == shipped and find_backbone(sha256_of(shipped)) == shipped and find_backbone(sha256_of(own)) == own
    own.unlink()
    with pytest.raises(FileNotFoundError, match='train again'):
        find_backbone('0' * 64)


def test_a_package_without_a_clone(places, monkeypatch):
    def nowhere():
        raise FileNotFoundError
    monkeypatch.setattr(module, 'nbs_dir', nowhere)
    assert find_backbone() == places[0]
    with pytest.raises(FileNotFoundError, match='train again'):
        find_backbone(sha256_of(places[1]))


def test_a_damaged_package(places):
    places[0].write_bytes(b'another file')
    with pytest.raises(ValueError, match='SHA-256'):
        find_backbone()


def test_a_network_finds_a_backbone_that_was_moved(places):
    assert OnFrozenBackbone('/elsewhere/weights.pt', sha256_of(places[0]), 'layer1').backbone_sha256 == sha256_of(places[0])


# Features computed once

@pytest.mark.parametrize('budget', [1.0, 0.0])
def test_cache_holds_the_features(small, dataset, tmp_path, budget):
    cache = FeatureCache(small, dataset, True, budget, tmp_path)
    assert (cache.scratch is None) == (budget > 0)
    for index in (0, len(dataset) - 1):
        for mirror in (0, 1):
            for stage, feature in frozen_features(small, dataset[index], mirror).items():
                assert (cache.get(index, mirror)[stage] - feature).abs().max() < 1e-3 * feature.abs().max()
    assert not list(tmp_path.iterdir())        # the file has no name, so that a killed training leaves nothing


def test_a_disk_that_keeps_a_mapped_file_stops_no_training(tmp_path, monkeypatch):
    "NFS gives a file that is removed and mapped another name, so that its folder cannot go."
    def full(path, **_):
        raise OSError(errno.ENOTEMPTY, 'Directory not empty', path)
    monkeypatch.setattr(os, 'rmdir', full)
    assert len(half_storage(1000, 0, tmp_path)[0]) == 1000


def test_no_room_for_the_cache(small, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: type('Usage', (), {'free': 10}))
    with pytest.raises(OSError, match='cache_gb=0'):
        FeatureCache(small, dataset, True, 0.0, tmp_path)


def test_training_pairs(small, dataset):
    cache = FeatureCache(small, dataset)
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
        features = [cache.get(1, mirror)['layer1'][:, row // 4:row // 4 + 8, column // 4:column // 4 + 8]
                    for mirror, row, column in places]
        assert any(torch.equal(item['features']['layer1'], feature) for feature in features)
        seen.append(places[0])
    assert len(set(seen)) > 1
    with pytest.raises(ValueError, match='multiple of 16'):
        TrainingPairs(dataset, crop=40)
    told = [TrainingPairs(dataset, one, crop=crop).features.split(' (')[0] for crop in (32, 0) for one in (cache, None)]
    assert told == ['of whole slices', 'of crops', 'of whole slices', 'of whole slices']    # which a run that goes on must share


def test_training_pairs_of_others(small, dataset):
    "A share of the crops is of other heads; without a share nothing is drawn, so that the crops stay those they were."
    other = np.full((64, 80), 0.5, np.float32), np.full((64, 80), 0.25, np.float32)
    pairs = TrainingPairs(dataset, crop=32, mirror=True, seed=3, others=[other], share=0.5)
    items = []
    for epoch in range(12):
        pairs.set_epoch(epoch)
        items += [pairs[index] for index in range(len(pairs))]
    shown = [item for item in items if item['name'] == 'of others']
    assert 0.25 < len(shown) / len(items) < 0.75
    assert all((item['ct'] == 0.5).all() and (item['mri'] == 0.25).all() and item['ct'].shape == (1, 32, 32) and item['case'] == '' for item in shown)
    assert {item['name'] for item in items} == {'of others', *dataset.names}
    without = TrainingPairs(dataset, crop=32, mirror=True, seed=3, others=[other])
    assert torch.equal(without[1]['ct'], TrainingPairs(dataset, crop=32, mirror=True, seed=3)[1]['ct'])
    assert len([*pairs]) == len(pairs) and pairs[-1]['name'] == pairs[len(pairs) - 1]['name']
    for wrong in ({'crop': 0}, {'crop': 32, 'cache': FeatureCache(small, dataset)}, {'crop': 32, 'others': ()}, {'crop': 80}):
        with pytest.raises(ValueError, match='share is 0.5; .* slices of others, a crop .* no cache'):
            TrainingPairs(dataset, **({'others': [other], 'share': 0.5} | wrong))


def test_half_precision_has_room(dataset):
    "Activations beyond the largest number of half precision are kept as that number, not as infinity."
    backbone = ResNetBackbone('stem')
    backbone.bn1.weight.data.fill_(1e7)
    cache = FeatureCache(backbone, dataset, mirrored=False)
    assert np.isfinite(cache.storage.numpy()).all() and cache.storage.max() == 65504
