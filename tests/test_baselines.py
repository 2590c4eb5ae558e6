"""What the baselines notebook does not show: sizes, wavelets, batches, refusals; PyWavelets, OpenCV and SciPy."""
import cv2
import numpy as np
import pytest
import pywt
import torch
from scipy import ndimage

from medfusion import baselines as module
from medfusion.baselines import baselines, guided_filter, laplacian_pyramid, wavelet_maximum


def pair(batch=2, height=40, width=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 1, height, width, generator=generator, dtype=dtype) for _ in range(2)]


@pytest.fixture(params=list(baselines()))
def rule(request):
    return baselines()[request.param]


@pytest.mark.parametrize('size, dtype', [((16, 16), torch.float64), ((201, 183), torch.float32)])
def test_shape_type_and_range(rule, size, dtype):
    ct, mri = pair(1, *size, dtype=dtype)
    before = ct.clone(), mri.clone()
    fused = rule(ct, mri)
    assert fused.shape == ct.shape and fused.dtype == dtype and fused.data_ptr() not in (ct.data_ptr(), mri.data_ptr())
    assert 0 <= fused.min() and fused.max() <= 1
    assert torch.equal(ct, before[0]) and torch.equal(mri, before[1])  # nothing was computed in place


def test_a_slice_fused_with_itself_comes_back(rule):
    for ct in (pair(2, 33, 50)[0], torch.zeros(1, 1, 20, 27), torch.ones(1, 1, 20, 27)):
        assert torch.allclose(rule(ct, ct), ct, atol=1e-5)


def test_a_batch_is_its_slices(rule):
    "Products of another shape may differ in their last bits."
    ct, mri = pair(3)
    whole = rule(ct, mri)
    for i in range(3):
        assert torch.allclose(whole[i:i + 1], rule(ct[i:i + 1], mri[i:i + 1]), atol=1e-5)


def test_rules_have_no_favourite_source():
    ct, mri = pair()
    for name in ('average', 'maximum', 'laplacian', 'wavelet', 'guided'):
        rule = baselines()[name]
        assert torch.allclose(rule(ct, mri), rule(mri, ct), atol=1e-5), name


# What differs between wavelets is the length of their filters, even or odd, and whether they are orthogonal.
@pytest.mark.parametrize('wavelet', ['haar', 'db38', 'coif17', 'sym7', 'bior1.3', 'bior6.8', 'rbio3.9'])
def test_every_kind_of_wavelet_reconstructs(wavelet):
    ct, _ = pair(1, 17, 22)
    assert torch.allclose(wavelet_maximum(ct, ct, levels=2, wavelet=wavelet), ct, atol=1e-4)


@pytest.mark.filterwarnings('ignore:Level value')
@pytest.mark.parametrize('wavelet, levels, base', [('haar', 1, 'max'), ('db2', 3, 'mean'), ('bior4.4', 4, 'max')])
def test_wavelet_maximum_is_that_of_pywavelets(wavelet, levels, base):
    ct, mri = pair(1, 65, 48, dtype=torch.float64)
    of_ct, of_mri = (pywt.wavedec2(image[0, 0].numpy(), wavelet, 'symmetric', levels) for image in (ct, mri))
    low = np.maximum(of_ct[0], of_mri[0]) if base == 'max' else (of_ct[0] + of_mri[0]) / 2
    details = [tuple(np.where(abs(a) >= abs(b), a, b) for a, b in zip(bands_ct, bands_mri))
               for bands_ct, bands_mri in zip(of_ct[1:], of_mri[1:])]
    expected = pywt.waverec2([low, *details], wavelet, 'symmetric')[:65, :48].clip(0, 1)
    fused = wavelet_maximum(ct, mri, levels, wavelet, base)[0, 0].numpy()
    assert np.abs(fused - expected).max() < 1e-6  # the filters of pytorch-wavelets are stored in float32


def test_reduction_is_that_of_opencv_inside():
    ct, _ = pair(1, 40, 37, dtype=torch.float64)
    rows, columns = (module.reduce_matrix(size, ct) for size in ct.shape[-2:])
    ours = (rows @ ct @ columns.T)[0, 0].numpy()
    assert np.abs(ours - cv2.pyrDown(ct[0, 0].numpy()))[1:-1, 1:-1].max() < 1e-12


@pytest.mark.parametrize('levels, base', [(1, 'mean'), (7, 'max')])
def test_pyramid_of_any_depth(levels, base):
    ct, mri = pair(1, 16, 25)
    assert laplacian_pyramid(ct, mri, levels, base).isfinite().all()
    assert torch.allclose(laplacian_pyramid(ct, ct, levels, base), ct, atol=1e-5)


def direct_guided_fusion(ct, mri):
    "Guided-filter fusion written with scipy.ndimage from the paper."
    def box(x, radius):
        size = 2 * radius + 1
        return (ndimage.uniform_filter(x, size, mode='constant')
                / ndimage.uniform_filter(np.ones_like(x), size, mode='constant'))

    def filtered(p, guide, radius, eps):
        variance = box(guide ** 2, radius) - box(guide, radius) ** 2
        a = (box(p * guide, radius) - box(p, radius) * box(guide, radius)) / (variance + eps)
        b = box(p, radius) - a * box(guide, radius)
        return (box(a, radius) * guide + box(b, radius)).clip(0, 1)

    def saliency(x):
        return ndimage.gaussian_filter(np.abs(ndimage.laplace(x, mode='nearest')), 5, mode='nearest', radius=5)

    mask = (saliency(ct) >= saliency(mri)).astype(float)
    bases = [box(x, 15) for x in (ct, mri)]
    fused = 0
    for layers, radius, eps in ((bases, 45, 0.3), ([ct - bases[0], mri - bases[1]], 7, 1e-6)):
        weights = [filtered(mask, ct, radius, eps), filtered(1 - mask, mri, radius, eps)]
        fused = fused + sum(w * layer for w, layer in zip(weights, layers)) / sum(weights)
    return fused.clip(0, 1)


def test_guided_filter_is_that_of_the_paper():
    ct, mri = (ndimage.gaussian_filter(x.numpy(), (0, 0, 1, 1)) for x in pair(1, 120, 101, dtype=torch.float64))
    fused = guided_filter(torch.from_numpy(ct), torch.from_numpy(mri))[0, 0].numpy()
    assert np.abs(fused - direct_guided_fusion(ct[0, 0], mri[0, 0])).max() < 1e-8  # in double precision


def test_bad_pairs_are_refused(rule):
    ct, mri = pair()
    for bad, words in [
        ((ct, mri[:1]), 'one shape'),
        ((ct[0], mri[0]), r'\(B, 1, H, W\)'),
        ((ct.expand(-1, 3, -1, -1), mri.expand(-1, 3, -1, -1)), r'\(B, 1, H, W\)'),
        ((ct[..., :15], mri[..., :15]), 'at least 16'),
        (((255 * ct).byte(), (255 * mri).byte()), 'floats'),
        ((ct[:0], mri[:0]), r'not \(0, 1, 40, 37\)'),
    ]:
        with pytest.raises(ValueError, match=words):
            rule(*bad)


def test_bad_settings_are_refused():
    ct, mri = pair()
    for call, words in [
        (lambda: wavelet_maximum(ct, mri, levels=5), '1 to 4 levels, not 5'),
        (lambda: wavelet_maximum(ct, mri, wavelet='db99'), "'db99' is not a discrete wavelet"),
        (lambda: wavelet_maximum(ct, mri, wavelet='morl'), "'morl' is not a discrete wavelet"),
        (lambda: wavelet_maximum(ct, mri, base='min'), "'max' or 'mean', not 'min'"),
        (lambda: laplacian_pyramid(ct, mri, base='sum'), "'max' or 'mean', not 'sum'"),
        (lambda: laplacian_pyramid(ct, mri, levels=0), 'at least one level, not 0'),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
