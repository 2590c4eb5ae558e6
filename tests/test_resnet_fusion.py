"""What the notebook of ResNet fusion does not show: sizes, types of numbers, the cache in a step, configurations, splits."""
import hashlib
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.data import DataLoader

from medfusion.backbone import FeatureCache, TrainingPairs
from medfusion.data import CTMRIDataset
from medfusion.inference import at_lesions, load_model, start_from
from medfusion.phantom import write_phantom
from medfusion.resnet_fusion import (Config, ResNetFusion, begin_with, check_config, parameter_groups, perceptual_loss, training_sets,
                                     training_step)
from medfusion.runs import notebook_parameters, save_checkpoint
from medfusion.wavelet_fusion import WaveletFusion


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    network = ResNetFusion('none').eval()
    torch.nn.init.normal_(network.head.weight, std=0.3)      # an untrained head says the same everywhere
    return network


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    root = write_phantom(tmp_path_factory.mktemp('phantom') / 'Dataset', cases=3, slices=2, size=64)
    return CTMRIDataset(root / 'train' / 'CT', root / 'train' / 'MRI')


def pair(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


def as_batch(*images):
    return dict(zip(('ct', 'mri'), images))


# The network

@pytest.mark.parametrize('height, width', [(16, 16), (17, 33), (101, 83)])
def test_any_size(model, height, width):
    ct, mri = pair(1, 1, height, width)
    with torch.no_grad():
        fused = model(ct, mri)
    assert fused.shape == ct.shape and 0 <= fused.min() and fused.max() <= 1
    for name, weights in model.maps(ct, mri).items():
        assert weights.shape[:2] == (1, 1) and 0 <= weights.min() and weights.max() <= 1, name


@pytest.mark.parametrize('deepest, stages', [('stem', 1), ('layer4', 5)])
def test_other_depths(deepest, stages):
    network = ResNetFusion('none', deepest=deepest, widths=(8,) * stages).eval()
    with torch.no_grad():
        assert network(*pair(1, 1, 33, 40)).shape == (1, 1, 33, 40)
    assert len(network.maps(*pair(1, 1, 64, 64))) == 2 + stages
    with pytest.raises(ValueError, match='widths'):
        ResNetFusion('none', deepest=deepest, widths=(8,) * (stages - 1))


def test_slice_alone_equals_slice_in_batch(model):
    "Up to the rounding of products of another shape."
    ct, mri = pair(3, 1, 48, 80)
    with torch.no_grad():
        together = model(ct, mri)
        for index in range(3):
            assert (model(ct[index:index + 1], mri[index:index + 1]) - together[index:index + 1]).abs().max() < 1e-5


def test_background_stays_black(model):
    ct, mri = pair(1, 1, 64, 64)
    ct[..., :20], mri[..., :20] = 0, 0
    with torch.no_grad():
        assert model(ct, mri)[..., :20].max() == 0


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_type_fuses(model, kind):
    "bfloat16 has three digits; the decision loses some, the slices themselves none."
    ct, mri = pair(1, 1, 48, 48)
    other = ResNetFusion(**model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, found = model(ct, mri), other.to(kind)(ct, mri)
        own = other(ct.to(kind), mri.to(kind))
    assert found.dtype == ct.dtype and own.dtype == kind
    assert (found - expected).abs().mean() < (0.02 if kind == torch.bfloat16 else 0.005)


@pytest.mark.parametrize('shapes, reason', [(((1, 1, 15, 64),) * 2, 'slice of 15×64 .* at least 16'), (((1, 1, 32, 32), (1, 1, 32, 33)), 'one shape'),
                                            (((1, 3, 32, 32),) * 2, r'\(B, 1, H, W\)'), (((32, 32),) * 2, r'\(B, 1, H, W\)')])
def test_slices_that_do_not_fit(model, shapes, reason):
    with pytest.raises(ValueError, match=reason):
        model(*map(torch.rand, shapes))


def test_rebuilt_from_config_and_state(model):
    state = model.state_dict()
    assert not any(name.startswith('backbone') for name in state)
    torch.manual_seed(9)
    again = ResNetFusion(**model.config).eval()
    again.load_state_dict(state)
    ct, mri = pair(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(ct, mri), model(ct, mri))    # the same weights and shapes
    with pytest.raises(ValueError, match='train again'):
        ResNetFusion(**{**model.config, 'backbone_sha256': hashlib.sha256(b'').hexdigest()})
    with pytest.raises(RuntimeError):
        again.load_state_dict({name: tensor for name, tensor in state.items() if name != 'head.bias'})


def test_parameter_groups(model):
    groups = parameter_groups(model, 1.0, 0.5)
    assert [group['lr'] for group in groups] == [1.0, 0.5, 0.25, 0.125, 0.0625]
    assert [group['name'] for group in groups] == ['full resolution', 'stem', 'layer1', 'layer2', 'layer3']
    assert sum(len(group['params']) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_shares_end_where_the_slice_does(model):
    "They may be of a slice that was padded to a multiple of 16."
    shapes = {name: tuple(share.shape[-2:]) for name, share in model.maps(*pair(1, 1, 130, 99)).items()}
    assert shapes == {'ct': (130, 99), 'mri': (130, 99), 'stem': (65, 50), 'layer1': (33, 25), 'layer2': (17, 13), 'layer3': (9, 7)}


# The dial between what metrics like and every lesion

@pytest.fixture(scope='module')
def dialled(model):
    "The network of `model` with a second decoder whose masks depend on everything that it sees."
    network = ResNetFusion(**model.config | {'dial': True, 'white_bone': True}).eval()
    network.load_state_dict(network.state_dict() | model.state_dict())
    for weights in (network.dial.network.head.weight, *(join.weight for join in network.dial.joins)):
        torch.nn.init.normal_(weights, std=0.3, generator=torch.Generator().manual_seed(0))
    return network


@pytest.mark.parametrize('height, width', [(16, 16), (17, 33), (101, 83)])
def test_at_0_a_dial_changes_nothing(model, dialled, height, width):
    ct, mri = (image * 0.9 for image in pair(1, 1, height, width))
    with torch.no_grad():
        assert torch.equal(dialled(ct, mri, lesions=0), model(ct, mri)) and set(dialled.maps(ct, mri, lesions=0)) == set(model.maps(ct, mri))
        low, middle, high = (dialled(ct, mri, lesions=lesions) for lesions in (0, 0.5, 1))
        assert torch.allclose(middle, (low + 3 * high) / 4, atol=1e-6) and (high - low).abs().max() > 0.05
        assert torch.equal(dialled(ct, mri), dialled(ct, mri, lesions=0.5)) and torch.equal(at_lesions(dialled, 1)(ct, mri), high)
    for name, weights in dialled.maps(ct, mri).items():
        assert weights.shape[:2] == (1, 1) and 0 <= weights.min() and weights.max() <= 1, name


def test_what_is_certain_stays_so_with_the_dial_turned(dialled):
    ct, mri = pair(1, 1, 64, 64)
    ct[..., :20], mri[..., :20], ct[..., 40:] = 0, 0, 1
    with torch.no_grad():
        fused = dialled(ct, mri, lesions=1)
    assert fused[..., :20].max() == 0 and fused[..., 40:].min() == 1


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float64])
def test_a_dialled_network_of_another_type_fuses(dialled, kind):
    ct, mri = pair(1, 1, 48, 48)
    other = ResNetFusion(**dialled.config).eval()
    other.load_state_dict(dialled.state_dict())
    with torch.no_grad():
        found, own = other.to(kind)(ct, mri), other(ct.to(kind), mri.to(kind))
        assert (found - dialled(ct, mri)).abs().mean() < (0.03 if kind == torch.bfloat16 else 0.01)    # as without a dial, whose masks round too
    assert found.dtype == ct.dtype and own.dtype == kind


def test_the_second_decoder_sees_the_features(dialled):
    ct, mri = pair(1, 1, 32, 32)
    with torch.no_grad():
        features = {stage: 2 * of_stage for stage, of_stage in dialled.features(ct, mri).items()}
        assert not torch.allclose(dialled(ct, mri, features, lesions=1), dialled(ct, mri, lesions=1), atol=1e-3)


def test_only_the_second_decoder_is_trained(dialled):
    network = ResNetFusion(**dialled.config)
    network.load_state_dict(dialled.state_dict())
    network.requires_grad_(False).dial.requires_grad_(True)
    [group] = parameter_groups(network, 1e-3, 0.5)
    optimizer = torch.optim.Adam([group])
    training_step(network, as_batch(*pair(2, 1, 48, 48)), Config(w_vif=1., precision='bf16'))['loss'].backward()
    optimizer.step()
    moved = {name for name, weights in network.state_dict().items() if not torch.equal(weights, dialled.state_dict()[name])}
    assert moved == {name for name in network.state_dict() if name.startswith('dial.')}


def test_a_network_with_a_dial_starts_from_one_without(tmp_path):
    torch.manual_seed(1)
    before = ResNetFusion('none', deepest='layer2', widths=(4, 8, 8), dial=False).eval()
    torch.nn.init.normal_(before.head.weight, std=0.3)
    path = save_checkpoint(tmp_path / 'before.pt', method='resnet_fusion', config=before.config, state_dict=before.state_dict(), epoch=1, metrics={})
    model = ResNetFusion(**before.config | {'dial': True}).eval()
    drawn = {name: weights.clone() for name, weights in model.dial.state_dict().items()}
    start_from(model, str(path))
    with torch.no_grad():
        assert torch.equal(model(*pair(1, 1, 32, 32), lesions=0), before(*pair(1, 1, 32, 32)))
    assert all(torch.equal(drawn[name], weights) for name, weights in model.dial.state_dict().items())


def test_a_dial_is_added_to_nothing_but_the_network_that_was_there():
    with pytest.raises(ValueError, match="'follow_edges': False"):        # at 0 it would fuse otherwise
        start_from(ResNetFusion(**load_model('resnet', device='cpu').config | {'dial': True, 'follow_edges': False}), 'resnet')


def test_masks_end_where_the_slice_does(dialled):
    maps = dialled.maps(*pair(1, 1, 17, 33))
    assert all(maps[name].shape == (1, 1, 9, 17) for name in ('LL', 'LH', 'HL', 'HH'))      # as those of WaveletFusion


@pytest.mark.parametrize('network, said', [(WaveletFusion(width=8), 'width 8'), (WaveletFusion(width=32, shared_mask=True), 'with one mask'),
                                           (WaveletFusion(width=32, residual=0.1), 'residual 0.1; name one of width 32 with four masks and residual 0.25'),
                                           (ResNetFusion('none', deepest='stem', widths=(4,)), 'a ResNetFusion')])
def test_masks_of_another_network_are_refused(dialled, network, said):
    with pytest.raises(ValueError, match=said):
        begin_with(dialled.dial, network, 'mine')


def test_a_second_decoder_without_the_features_of_layer2_is_refused():
    with pytest.raises(ValueError, match='give layer2 or more'):
        ResNetFusion('none', deepest='layer1', dial=True)


def test_a_network_without_a_dial_says_so(model):
    with pytest.raises(ValueError, match='no dial'):
        model(*pair(1, 1, 32, 32), lesions=1)


# A training step

@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_a_step_trains_what_is_not_frozen(model, precision):
    model.train()
    assert not any(module.training for module in model.backbone.modules())
    cfg = Config(precision=precision, w_mse=1., w_qabf=1., w_vif=1., w_scd=1., w_sd=1., w_ssim_min=1.)
    terms = training_step(model, as_batch(*pair(2, 1, 48, 48)), cfg)
    terms['loss'].backward()
    assert set(terms) == {'loss', 'ssim', 'gradient', 'perceptual', 'mse', 'qabf', 'vif', 'scd', 'sd', 'ssim_min'}
    assert all(weights.grad is None for weights in model.backbone.parameters())
    assert all(weights.grad is not None and weights.grad.isfinite().all()
               for group in parameter_groups(model, 1e-3, 0.5) for weights in group['params'])
    model.zero_grad()
    model.eval()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='fp16 trains on a GPU only')
def test_a_step_in_half_precision_on_a_gpu(model):
    network = ResNetFusion(**model.config).cuda()
    terms = training_step(network, as_batch(*(image.cuda() for image in pair(2, 1, 64, 64))), Config(precision='fp16', w_qabf=1., w_vif=1.))
    terms['loss'].backward()
    assert all(value.isfinite() for value in terms.values())


def test_the_lesions_of_a_recipe_reach_the_loss(model, dataset):
    asked = []

    def lesions(network):
        asked.append(network)
        return torch.tensor(0.5)

    batch = next(iter(DataLoader(TrainingPairs(dataset), batch_size=2)))
    with torch.no_grad():
        plain = training_step(model, batch, Config())
        terms = training_step(model, batch, Config(w_lesion=2.0), lesions)
    assert asked == [model] and terms['lesion'] == 0.5 and torch.isclose(terms['loss'], plain['loss'] + 1)


def test_perceptual_loss_margin():
    sources = {'stem': torch.rand(1, 2, 64, 32, 32)}
    fused = sources['stem'].amax(1)
    fused[..., :8, :] += 1                     # 8 cells of the stem are 16 pixels
    assert perceptual_loss({'stem': fused}, sources, margin=16) == 0 < perceptual_loss({'stem': fused}, sources)
    with pytest.raises(ValueError, match='larger crops'):
        perceptual_loss({'stem': fused}, sources, margin=32)


def test_step_with_and_without_cache(model, dataset):
    "Half precision of the features is all that the cache changes."
    cache = FeatureCache(model.backbone, dataset, mirrored=False)
    with torch.no_grad():
        with_cache, without = (training_step(model, next(iter(DataLoader(TrainingPairs(dataset, one), batch_size=2))), Config())
                               for one in (cache, None))
    for name, value in without.items():
        assert abs(with_cache[name] - value) < 2e-3, name


def test_odd_sizes_in_the_cache(model, tmp_path):
    root = write_phantom(tmp_path / 'odd', cases=3, slices=1, size=(75, 66))
    parts = [CTMRIDataset(root / part / 'CT', root / part / 'MRI') for part in ('train', 'val')]
    train, val = training_sets(model, *parts, Config(save_dir=str(tmp_path / 'results')))
    with torch.no_grad():
        assert training_step(model, next(iter(DataLoader(train, 1))), Config())['loss'].isfinite()


# Configurations

def test_config_and_parameters_cell_agree():
    declared = notebook_parameters('resnet_based_fusion.ipynb')
    assert {name: parameter.default for name, parameter in declared.items()} == asdict(Config())
    cfg = Config()
    cfg.ct_dir = '../Dataset/CT-MRI/CT'
    assert cfg.ct_dir.endswith('CT') and (cfg.batch_size, cfg.epochs, cfg.lr) == (4, 100, 2e-4)


@pytest.mark.parametrize('change, word', [
    ({'crop': 40}, 'multiple of 16'), ({'crop': 32}, '48 or more'), ({'crop': 48, 'deepest': 'layer4'}, 'multiple of 32'),
    ({'deepest': 'layer5'}, 'layer5'), ({'perceptual_stages': 'layer9'}, 'layer9'), ({'perceptual_stages': ''}, 'name some'),
    ({'perceptual_stages': 'layer3', 'deepest': 'layer1'}, 'stem layer1'), ({'schedule': 'cosinus'}, 'cosinus'),
    ({'masks': 'wavelet'}, 'give start'), ({'masks': 'wavelet', 'start': 'resnet', 'w_detection': 1., 'lesions': 0.}, 'above 0'),
    ({'masks': 'wavelet', 'start': 'resnet', 'w_detection': 1., 'deepest': 'layer1', 'perceptual_stages': 'stem'}, 'layer2 or more'),
    ({'synthetic_pairs': 0.1}, 'synthetic_pairs is 0.1; .* cache_gb 0'), ({'synthetic_pairs': 0.1, 'cache_gb': 0., 'crop': 320}, '256 pixels'),
    ({'lesions': 0.75}, 'no dial'), ({'lesions': 2.}, 'from 0')])
def test_what_cannot_be_trained_is_refused(change, word):
    check_config(replace(Config(), crop=160))
    with pytest.raises(ValueError, match=word):
        check_config(replace(Config(), **change))
