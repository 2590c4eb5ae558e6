"""What the losses notebook does not show: sizes, types, autocast, inference mode, refusals; conv2d and skimage."""
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

from medfusion.losses import gradient_loss, intensity_loss, sobel, ssim, ssim_loss, stronger_gradient

LOSSES = {
    'ssim': ssim_loss, 'gradient': gradient_loss, 'max': intensity_loss,
    'mean': lambda f, c, m: intensity_loss(f, c, m, target='mean'),
    'both': lambda f, c, m: intensity_loss(f, c, m, target='both'),
}


@pytest.fixture(params=list(LOSSES))
def loss(request):
    return LOSSES[request.param]


def images(count, batch=2, height=40, width=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 1, height, width, generator=generator, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize('size', [(16, 16), (17, 31), (64, 50), (201, 183)])
def test_ssim_is_that_of_scikit_image(size):
    x, y = images(2, 3, *size, dtype=torch.float64)
    y = 0.5 * x + 0.5 * y
    ours = ssim(x, y)
    assert ours.shape == (3,) and ours.dtype == torch.float64
    for value, a, b in zip(ours, x[:, 0].numpy(), y[:, 0].numpy()):
        oracle = structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                       data_range=1)
        assert abs(value.item() - oracle) < 1e-6
    assert torch.allclose(ssim(x.float(), y.float()).double(), ours, atol=1e-5)


def test_ssim_identity_symmetry_range():
    x, y = images(2)
    assert torch.allclose(ssim(x, x), torch.ones(2))
    assert torch.allclose(ssim(x, y), ssim(y, x))
    assert ssim(x, 1 - x).min() >= -1 and ssim(x, 1 - x).max() < 0
    black, white = torch.zeros_like(x), torch.ones_like(x)
    assert torch.allclose(ssim(black, black), torch.ones(2)) and ssim(black, white).max() < 1e-3


def test_ssim_loss_of_the_worse_source_of_each_pair():
    f, c, m = torch.rand(3, 4, 1, 40, 40)
    f[0] = c[0]
    worse = torch.minimum(ssim(f, c), ssim(f, m))
    assert torch.isclose(ssim_loss(f, c, m, of='min'), 1 - worse.mean(), atol=1e-6)
    with pytest.raises(ValueError, match="'mean' or 'min', not 'max'"):
        ssim_loss(f, c, m, of='max')


def test_ssim_loss_is_the_mean_over_sources_and_batch():
    f, c, m = images(3)
    expected = 1 - (ssim(f, c) + ssim(f, m)).mean() / 2
    assert torch.allclose(ssim_loss(f, c, m), expected, atol=1e-6)
    assert torch.allclose(ssim_loss(f, c, m), ssim_loss(f, m, c), atol=1e-6)


def test_sobel_is_the_convolution():
    x, = images(1)
    kernel = torch.tensor([[[[-1., 0, 1], [-2, 0, 2], [-1, 0, 1]]]])
    gx, gy = sobel(x)
    assert torch.allclose(gx, F.conv2d(x, kernel), atol=1e-6)
    assert torch.allclose(gy, F.conv2d(x, kernel.mT), atol=1e-6)


def test_gradient_target_keeps_sign_and_the_stronger_side():
    ct, mri = torch.zeros(1, 1, 20, 40), torch.zeros(1, 1, 20, 40)
    ct[..., :10] = 1        # a falling edge, strong, in CT
    mri[..., 30:] = 0.5     # a rising edge, weaker, in MRI
    gx, gy = stronger_gradient(ct, mri)
    assert gx.min() == -4 and gx.max() == 2 and gy.abs().max() == 0
    assert gradient_loss(ct + mri, ct, mri) == 0
    assert gradient_loss(1 - ct - mri, ct, mri) == 2 * gradient_loss(torch.zeros_like(ct), ct, mri)


def test_gradient_gain_scales_the_target():
    f, c, m = images(3)
    edges = stronger_gradient(c, m)
    expected = sum((of_f - 1.5 * target).abs().mean() for of_f, target in zip(sobel(f), edges)) / 2
    assert torch.allclose(gradient_loss(f, c, m, gain=1.5), expected)


def test_identity_range_and_scalar(loss):
    f, c, m = images(3)
    value = loss(f, c, m)
    assert value.shape == () and 0 < value <= 8
    assert loss(c, c, c).abs() < 1e-6
    assert torch.allclose(loss(f, c, m), loss(f, m, c), atol=1e-6)


def test_gradcheck(loss):
    f, c, m = images(3, batch=2, height=16, width=17, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, c, m), f.requires_grad_())


@pytest.mark.parametrize('level', [0.0, 0.5, 1.0])
def test_finite_on_constant_images(loss, level):
    flat = torch.full((2, 1, 33, 16), level)
    fused = flat.clone().requires_grad_()
    loss(fused, flat, torch.zeros_like(flat)).backward()
    assert fused.grad.isfinite().all()


def test_losses_after_inference_mode_still_train(loss):
    f, c, m = images(3)
    with torch.inference_mode():
        before = loss(f, c, m).item()
    f.requires_grad_()
    value = loss(f, c, m)
    value.backward()
    assert value.item() == before and f.grad.abs().sum() > 0


def test_ssim_keeps_its_precision_under_autocast():
    f, c, m = images(3)
    exact = ssim_loss(f, c, m)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(ssim_loss(f, c, m), exact)
    half = ssim_loss(f.bfloat16().requires_grad_(), c, m)
    assert half.dtype == torch.float32 and abs(half - exact) < 0.01


def test_gradients_reach_every_argument():
    f, c, m = [x.requires_grad_() for x in images(3)]
    (ssim_loss(f, c, m) + gradient_loss(f, c, m) + intensity_loss(f, c, m)).backward()
    assert all(x.grad.abs().sum() > 0 for x in (f, c, m))


def test_bad_images_are_refused(loss):
    f, c, m = images(3)
    for bad, words in [
        (f[0], r'\(B, 1, H, W\)'),
        (f.expand(-1, 3, -1, -1), r'\(B, 1, H, W\)'),
        (f[..., :15, :], 'from 16 up'),
        (f[..., :-1], 'one shape'),
        (f[:1], 'one shape'),
        ((255 * f).byte(), 'floats'),
    ]:
        with pytest.raises(ValueError, match=words):
            loss(bad, c, m)


def test_unknown_target_brightness():
    with pytest.raises(ValueError, match="'max', 'mean' or 'both', not 'min'"):
        intensity_loss(*images(3), target='min')
