"""The network of a millisecond: small, any size, nothing where nothing is, a slice alone as in a batch; it learns to imitate."""
import pytest
import torch

from medfusion.wavelet_fusion import haar
from medfusion.wavelet_lite import WaveletLite, imitation_loss, training_step


def trained_like(**config):
    "A network whose maps are far from their initial values."
    torch.manual_seed(1)
    model = WaveletLite(**config).eval()
    torch.nn.init.normal_(model.network.head.weight, std=0.5)
    return model


def pair(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


def test_it_is_small():
    assert sum(weights.numel() for weights in WaveletLite().parameters()) <= 3000


@pytest.mark.parametrize('size', [(16, 16), (17, 31), (201, 183)])
def test_any_size_gives_the_same_size(size):
    model, (ct, mri) = trained_like(), pair(2, 1, *size)
    with torch.no_grad():
        fused = model(ct, mri)
        assert fused.shape == ct.shape and 0 <= fused.min() and fused.max() <= 1
        torch.testing.assert_close(model(ct[:1], mri[:1]), fused[:1], atol=1e-5, rtol=0)    # products of another shape
    for name, mask in model.maps(ct, mri).items():
        assert mask.shape == (2, 1, (size[0] + 1) // 2, (size[1] + 1) // 2), name
        assert 0 <= mask.min() and mask.max() <= 1


def test_even_slices_stay_even_and_white_bone_white():
    model = trained_like()
    with torch.no_grad():
        for level in (0., 85 / 255, 1.):
            even = torch.full((1, 1, 48, 48), level)
            assert torch.equal(model(even, torch.zeros_like(even)), even)
        ct, mri = pair(1, 1, 40, 40)
        ct[..., 10:20, 10:20] = 1
        assert (model(ct, mri)[ct == 1] == 1).all()


def test_without_a_gain_the_subbands_lie_between_their_sources():
    model, (ct, mri) = trained_like(gain=0.), pair(1, 1, 32, 32)
    with torch.no_grad():
        fused = model.mix(ct, mri)[0]
    low, high = torch.minimum(haar(ct), haar(mri)), torch.maximum(haar(ct), haar(mri))
    assert (fused >= low - 1e-6).all() and (fused <= high + 1e-6).all()


def test_it_learns_to_imitate():
    torch.manual_seed(0)
    model, (ct, mri) = WaveletLite(), pair(2, 1, 32, 32)

    def teacher(ct, mri):
        return (3 * ct + mri) / 4
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(30):
        terms = training_step(model, {'ct': ct, 'mri': mri}, teacher, {'imitation': 1.})
        optimizer.zero_grad()
        terms['loss'].backward()
        optimizer.step()
        losses.append(float(terms['imitation'].detach()))
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError):
        training_step(model, {'ct': ct, 'mri': mri}, teacher, {'imitation': -1.})
    assert imitation_loss(ct, ct) == 0
