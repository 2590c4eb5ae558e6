"""The wavelet network: any size, black stays black, a slice alone equals the slice in a batch, and its size and gradients."""
import pytest
import torch

from medfusion.wavelet_fusion import HaarTransform, WaveletFusion, wavelet_loss

torch.manual_seed(0)


def trained_like(**config):
    "A network whose maps are far from their initial values."
    torch.manual_seed(1)
    model = WaveletFusion(**config).eval()
    torch.nn.init.normal_(model.network.head.weight, std=0.5)
    return model


@pytest.mark.parametrize('size', [(16, 16), (17, 31), (64, 40), (201, 183)])
@pytest.mark.parametrize('cycle_spin', [False, True])
def test_any_size_gives_the_same_size(size, cycle_spin):
    model = trained_like(width=8, cycle_spin=cycle_spin)
    ct, mri = torch.rand(2, 1, *size), torch.rand(2, 1, *size)
    with torch.no_grad():
        fused = model(ct, mri)
        assert fused.shape == ct.shape and 0 <= fused.min() and fused.max() <= 1
        torch.testing.assert_close(model(ct[:1], mri[:1]), fused[:1], atol=1e-6, rtol=0)
    for name, mask in model.maps(ct, mri).items():
        assert mask.shape == (2, 1, (size[0] + 1) // 2, (size[1] + 1) // 2), name
        assert 0 <= mask.min() and mask.max() <= 1


@pytest.mark.parametrize('cycle_spin', [False, True])
def test_black_stays_black_and_equal_slices_stay_as_they_are(cycle_spin):
    black = torch.zeros(1, 1, 48, 48)
    assert trained_like(width=8, residual=1., cycle_spin=cycle_spin)(black, black).max() == 0
    image = torch.rand(1, 1, 48, 48)
    with torch.no_grad():
        same = trained_like(width=8, residual=0., cycle_spin=cycle_spin)(image, image)
    torch.testing.assert_close(same, image, atol=1e-5, rtol=0)


def test_white_bone_stays_white_and_nothing_else_changes():
    ct, mri = torch.rand(1, 1, 40, 40) * 0.9, torch.rand(1, 1, 40, 40)
    ct[..., 10:20, 10:20] = 1
    plain, white = trained_like(width=8), trained_like(width=8, white_bone=True)
    white.load_state_dict(plain.state_dict())
    with torch.no_grad():
        one, other = plain(ct, mri), white(ct, mri)
    bone = ct == 1
    assert (other[bone] == 1).all() and (one[bone] < 1).any() and (one[~bone] == other[~bone]).all()


def test_haar_transform_keeps_energy_and_inverts():
    image, haar = torch.rand(3, 1, 34, 58), HaarTransform()
    bands = haar(image)
    assert bands.shape == (3, 4, 17, 29)
    torch.testing.assert_close(haar.inverse(bands), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(bands.square().sum(), image.square().sum(), rtol=1e-5, atol=0)


def test_a_network_is_rebuilt_from_its_config():
    model = trained_like(width=12, residual=0.1, cycle_spin=True)
    again = WaveletFusion(**model.config)
    again.load_state_dict(model.state_dict())
    ct, mri = torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(ct, mri), model(ct, mri))


@pytest.mark.parametrize('shapes', [((1, 1, 32, 32), (1, 1, 32, 30)), ((1, 3, 32, 32), (1, 3, 32, 32)), ((1, 1, 8, 8), (1, 1, 8, 8))])
def test_wrong_shapes_get_a_sentence(shapes):
    with pytest.raises(ValueError, match='B, 1, H, W'):
        WaveletFusion(8)(*(torch.rand(shape) for shape in shapes))


def test_every_term_of_the_loss_has_finite_gradients_also_on_black():
    terms = dict.fromkeys(('mse', 'ssim', 'gradient', 'qabf', 'vif', 'scd', 'sd', 'ssim_min'), 1.)
    for ct in (torch.rand(2, 1, 64, 64), torch.zeros(2, 1, 64, 64)):
        model, mri = trained_like(width=8), torch.rand(2, 1, 64, 64) * (ct > 0)
        values = wavelet_loss(model(ct, mri), ct, mri, terms)
        assert set(values) == {'loss', *terms}
        values['loss'].backward()
        assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_an_unknown_term_gets_a_sentence():
    image = torch.rand(1, 1, 32, 32)
    with pytest.raises(ValueError, match="no term 'msse'"):
        wavelet_loss(image, image, image, {'msse': 1.})
