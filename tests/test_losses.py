"""What the losses notebook does not show: sizes, types, autocast, inference mode, weights, refusals; conv2d and skimage.

Numbers are compared with a tolerance: in single precision sums over an image keep five to six of seven digits."""
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

from medfusion import losses
from medfusion.losses import (check_weights, gradient_loss, loss_terms, mse_loss, scd_loss, sd_loss, ssim_loss, ssim_min_loss,
                              stronger_gradient, vif_loss, weighted_loss)
from medfusion.metrics import sobel, ssim, vif_of_pair

LOSSES = {**loss_terms(), 'mse_mean': lambda f, c, m: mse_loss(f, c, m, target='mean'),
          'mse_both': lambda f, c, m: mse_loss(f, c, m, target='both')}


@pytest.fixture(params=list(LOSSES))
def loss(request):
    return LOSSES[request.param]


def images(count, batch=2, height=43, width=47, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 1, height, width, generator=generator, dtype=dtype) for _ in range(count)]


# -- each term --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(16, 16), (17, 31), (201, 183)])
def test_ssim_is_that_of_scikit_image(size):
    f, c, m = images(3, 3, *size, dtype=torch.float64)
    f = 0.5 * f + 0.5 * c
    oracle = [[structural_similarity(a[0].numpy(), b[0].numpy(), gaussian_weights=True, sigma=1.5, data_range=1,
                                     use_sample_covariance=False) for b in pair] for a, *pair in zip(f, c, m)]
    oracle = torch.tensor(oracle)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        triple = [image.to(dtype) for image in (f, c, m)]
        assert abs(ssim_loss(*triple) - (1 - oracle.mean())) < tolerance
        assert abs(ssim_min_loss(*triple) - (1 - oracle.amin(1).mean())) < tolerance


def test_the_worse_source_of_each_pair_counts():
    f, c, m = images(3, 4)
    f[0] = c[0]
    worse = torch.minimum(ssim(f, c, window='gaussian'), ssim(f, m, window='gaussian'))
    assert torch.isclose(ssim_min_loss(f, c, m), 1 - worse.mean(), atol=1e-5)


def test_sobel_is_the_convolution():
    x, = images(1)
    kernel = torch.tensor([[[[-1., 0, 1], [-2, 0, 2], [-1, 0, 1]]]])
    gx, gy = sobel(x)
    assert torch.allclose(gx, F.conv2d(x, kernel), atol=1e-5)
    assert torch.allclose(gy, F.conv2d(x, kernel.mT), atol=1e-5)


def test_gradient_target_keeps_sign_and_the_stronger_side():
    ct, mri = torch.zeros(1, 1, 20, 40), torch.zeros(1, 1, 20, 40)
    ct[..., :10] = 1        # a falling edge, strong, in CT
    mri[..., 30:] = 0.5     # a rising edge, weaker, in MRI
    gx, gy = stronger_gradient(ct, mri)
    assert gx.min() == -4 and gx.max() == 2 and gy.abs().max() == 0  # sums of small whole numbers are exact
    assert gradient_loss(ct + mri, ct, mri) < 1e-6
    assert torch.isclose(gradient_loss(1 - ct - mri, ct, mri), 2 * gradient_loss(torch.zeros_like(ct), ct, mri))


def test_gradient_gain_scales_the_target():
    f, c, m = images(3)
    expected = sum((of_f - 1.5 * target).abs().mean() for of_f, target in zip(sobel(f), stronger_gradient(c, m))) / 2
    assert torch.isclose(gradient_loss(f, c, m, gain=1.5), expected)
    weighted = weighted_loss(f, c, m, {'gradient': 2}, gradient_gain=1.5)
    assert torch.isclose(weighted['gradient'], expected) and torch.isclose(weighted['loss'], 2 * expected)


def test_a_lost_source_costs_what_the_logarithm_says():
    f, c, m = images(3)
    expected = -sum(((0.01 + vif).log()).mean() for vif in vif_of_pair(f, c, m))
    assert torch.isclose(vif_loss(f, c, m), expected, rtol=1e-5)
    assert vif_loss(torch.zeros_like(f), c, m) == pytest.approx(-2 * math.log(0.01), rel=1e-4)


def test_vif_of_small_crops_is_refused_before_it_is_nan():
    with pytest.raises(ValueError, match='slice of 40×47 pixels is too small; it takes at least 41'):
        vif_loss(*images(3, height=40))


def test_contrast_is_asked_for_up_to_the_margin():
    f, c, m = images(3)
    assert sd_loss(1.5 * torch.maximum(c, m), c, m) == 0
    assert torch.isclose(sd_loss(0 * f, c, m), torch.ones(()))


# -- what every term should obey --------------------------------------------------------------------------------------

def test_scalar_of_both_sources_alike(loss):
    f, c, m = images(3)
    value = loss(f, c, m)
    assert value.shape == () and value.isfinite()
    assert torch.isclose(loss(f, m, c), value, rtol=1e-4, atol=1e-6)


def test_a_perfect_image_costs_nothing():
    f, c, m = images(3)
    for name in ('mse', 'ssim', 'ssim_min', 'gradient'):
        assert LOSSES[name](c, c, c).abs() < 1e-5, name
    assert scd_loss(c + m, c, m).abs() < 1e-4


def test_gradcheck(loss):
    f, c, m = images(3, batch=1, height=41, width=42, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, c, m), f.requires_grad_(), eps=1e-7, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize('level', [0.0, 0.5, 1.0])
def test_finite_on_constant_images(loss, level):
    flat = torch.full((2, 1, 43, 41), level)
    fused = flat.clone().requires_grad_()
    loss(fused, flat, torch.zeros_like(flat)).backward()
    assert fused.grad is None or fused.grad.isfinite().all()


def test_losses_after_inference_mode_still_train(loss):
    f, c, m = images(3)
    with torch.inference_mode():
        before = loss(f, c, m).item()
    value = loss(f.requires_grad_(), c, m)
    value.backward()
    assert value.item() == pytest.approx(before, rel=1e-5) and f.grad.isfinite().all()


def test_precision_under_autocast_and_in_half():
    f, c, m = images(3)
    for name, loss in loss_terms().items():
        exact = loss(f, c, m)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert torch.isclose(loss(f, c, m), exact, rtol=1e-5), name
    half = ssim_loss(f.bfloat16().requires_grad_(), c.bfloat16(), m.bfloat16())
    assert half.dtype == torch.float32 and abs(half - ssim_loss(f, c, m)) < 0.01


def test_gradients_reach_every_argument():
    f, c, m = [x.requires_grad_() for x in images(3)]
    weighted_loss(f, c, m, dict.fromkeys(loss_terms(), 1.0))['loss'].backward()
    assert all(x.grad.abs().sum() > 0 and x.grad.isfinite().all() for x in (f, c, m))


def test_bad_images_are_refused(loss):
    f, c, m = images(3)
    for bad, words in [
        (f[0], r'\(B, 1, H, W\)'),
        (f.expand(-1, 3, -1, -1), r'not \(2, 3, 43, 47\)'),
        (f[..., :-1], 'one shape'),
        (f[:0], r'not \(0, 1, 43, 47\)'),
        ((255 * f).byte(), 'uint8'),
    ]:
        with pytest.raises(ValueError, match=words):
            loss(bad, c, m)


def test_unknown_target_brightness():
    with pytest.raises(ValueError, match="'max', 'mean' or 'both', not 'min'"):
        mse_loss(*images(3), target='min')


# -- weighing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('weights, words', [
    ({'ssimm': 1}, "no term 'ssimm'; its terms are mse, ssim"),
    ({'perceptual': 1}, "no term 'perceptual'"),
    ({'mse': -0.5}, "'mse' must be a number from 0 up, not -0.5"),
    ({'mse': math.nan}, 'not nan'), ({'mse': math.inf}, 'not inf'), ({'mse': '1'}, "not '1'"), ({'mse': None}, 'not None'),
    ({'mse': 0, 'ssim': 0.0}, r'All weights are 0 \(mse, ssim\)'), ({}, 'All weights are 0')])
def test_weights_that_cannot_be_trained_with(weights, words):
    with pytest.raises(ValueError, match=words):
        check_weights(weights)
    with pytest.raises(ValueError, match=words):
        weighted_loss(*images(3), weights)


def test_own_terms_are_called_where_their_weight_is_not_zero():
    f, c, m = images(3)
    terms = weighted_loss(f, c, m, {'mse': 1, 'perceptual': 0.5, 'lesion': 0}, perceptual=f.mean,
                          lesion=lambda: pytest.fail('a term of weight 0 was computed'))
    assert list(terms) == ['loss', 'mse', 'perceptual']
    assert torch.isclose(terms['loss'], terms['mse'] + 0.5 * f.mean())
    weighted_loss(f, c, m, {'mse': 1, 'lesion': 0}, lesion=None)
    with pytest.raises(ValueError, match="'lesion' has the weight 1.5, but no function"):
        weighted_loss(f, c, m, {'mse': 1, 'lesion': 1.5}, lesion=None)


def test_a_term_is_a_public_function_of_its_name():
    "One function and one row of the table make a term."
    for name, function in loss_terms().items():
        assert function is getattr(losses, f'{name}_loss')
        assert list(inspect.signature(function).parameters)[:3] == ['fused', 'ct', 'mri']
