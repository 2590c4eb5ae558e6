"""The wavelet networks, the large and the small: any size, any type of numbers, black stays black, a slice alone equals the slice in a batch."""
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medfusion import wavelet_lite
from medfusion.inference import at_lesions, load_model, start_from
from medfusion.runs import save_checkpoint
from medfusion.subbands import haar, inverse_haar
from medfusion.wavelet_fusion import WaveletFusion, check_config, dial_step, training_step
from medfusion.wavelet_lite import WaveletLite


def trained_like(network=WaveletFusion, **config):
    "A network whose maps are far from their initial values."
    torch.manual_seed(1)
    model = network(**config).eval()
    torch.nn.init.normal_(model.network.head.weight, std=0.5)
    return model


def pair(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


@pytest.mark.parametrize('size', [(16, 16), (17, 31), (201, 183)])
@pytest.mark.parametrize('config', [{}, {'cycle_spin': True}, {'network': WaveletLite}], ids=str)
def test_any_size_gives_the_same_size(size, config):
    model = trained_like(width=8, **config)
    ct, mri = pair(2, 1, *size)
    with torch.no_grad():
        fused = model(ct, mri)
        assert fused.shape == ct.shape and 0 <= fused.min() and fused.max() <= 1
        torch.testing.assert_close(model(ct[:1], mri[:1]), fused[:1], atol=1e-5, rtol=0)    # products of another shape
    for name, mask in model.maps(ct, mri).items():
        assert mask.shape == (2, 1, (size[0] + 1) // 2, (size[1] + 1) // 2), name
        assert 0 <= mask.min() and mask.max() <= 1


@pytest.mark.parametrize('cycle_spin', [False, True])
def test_black_stays_black_and_equal_slices_stay_as_they_are(cycle_spin):
    black = torch.zeros(1, 1, 48, 48)
    assert trained_like(width=8, residual=1., cycle_spin=cycle_spin)(black, black).max() == 0
    image, _ = pair(1, 1, 48, 48)
    with torch.no_grad():
        same = trained_like(width=8, residual=0., cycle_spin=cycle_spin)(image, image)
    torch.testing.assert_close(same, image, atol=1e-5, rtol=0)


def test_white_bone_stays_white_and_nothing_else_changes():
    ct, mri = pair(1, 1, 40, 40)
    ct = ct * 0.9
    ct[..., 10:20, 10:20] = 1
    plain, white = trained_like(width=8), trained_like(width=8, white_bone=True)
    white.load_state_dict(plain.state_dict())
    with torch.no_grad():
        one, other = plain(ct, mri), white(ct, mri)
    bone = ct == 1
    assert (other[bone] == 1).all() and (one[bone] < 1).any() and (one[~bone] == other[~bone]).all()


def test_haar_transform_keeps_energy_and_inverts():
    image = pair(3, 1, 34, 58)[0]
    bands = haar(image)
    assert bands.shape == (3, 4, 17, 29)
    torch.testing.assert_close(inverse_haar(bands), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(bands.square().sum(), image.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_type_fuses(kind):
    "bfloat16 has three digits: the masks lose some, the transform none."
    ct, mri = pair(1, 1, 48, 48)
    model, other = trained_like(width=8), trained_like(width=8).to(kind)
    with torch.no_grad():
        expected, found = model(ct, mri), other(ct, mri)
        own = other(ct.to(kind), mri.to(kind))
    assert found.dtype == ct.dtype and own.dtype == kind
    assert (found - expected).abs().mean() < (0.02 if kind == torch.bfloat16 else 0.005)


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_mixed_precision_meets_the_transform(kind):
    ct, mri = pair(2, 1, 48, 48)
    model = trained_like(width=8, cycle_spin=True)
    expected = model(ct, mri)
    with torch.autocast('cpu', kind):
        fused = model(ct, mri)
    fused.mean().backward()
    assert (fused - expected).abs().mean() < 0.02
    assert all(weight.grad.isfinite().all() for weight in model.network.parameters())


def test_one_mask_for_all_subbands():
    model = trained_like(width=8, shared_mask=True)
    ct, mri = pair(1, 1, 32, 32)
    first, *others = model.maps(ct, mri).values()
    assert all(torch.equal(first, other) for other in others) and model.network.head.out_channels == 5
    of_old = dict(trained_like(width=8).config)
    of_old.pop('shared_mask')                        # checkpoints from before this argument have no such entry
    assert WaveletFusion(**of_old).network.head.out_channels == 8


@pytest.mark.parametrize('shared_mask', [False, True])
def test_a_network_is_rebuilt_from_its_config(shared_mask):
    model = trained_like(width=12, residual=0.1, cycle_spin=True, shared_mask=shared_mask)
    again = WaveletFusion(**model.config)
    again.load_state_dict(model.state_dict())
    ct, mri = pair(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(ct, mri), model(ct, mri))    # the same weights and shapes


@pytest.mark.parametrize('shapes, reason', [(((1, 1, 32, 32), (1, 1, 32, 30)), 'one shape'), (((1, 3, 32, 32), (1, 3, 32, 32)), r'\(B, 1, H, W\)'),
                                            (((1, 1, 8, 8), (1, 1, 8, 8)), 'slice of 8×8 .* at least 16')])
def test_wrong_shapes_get_a_sentence(shapes, reason):
    with pytest.raises(ValueError, match=reason):
        WaveletFusion(8)(*(torch.rand(shape) for shape in shapes))


def test_every_term_of_the_loss_has_finite_gradients_also_on_black():
    terms = dict.fromkeys(('mse', 'ssim', 'gradient', 'qabf', 'vif', 'scd', 'sd', 'ssim_min'), 1.)
    for ct in (pair(2, 1, 64, 64)[0], torch.zeros(2, 1, 64, 64)):
        model, mri = trained_like(width=8), pair(2, 1, 64, 64)[1] * (ct > 0)
        values = training_step(model, {'ct': ct, 'mri': mri}, terms)
        assert set(values) == {'loss', *terms}
        values['loss'].backward()
        assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_the_lesions_of_a_recipe_reach_the_loss():
    model, (ct, mri) = trained_like(width=8), pair(1, 1, 32, 32)
    with torch.no_grad():
        values = training_step(model, {'ct': ct, 'mri': mri}, {'mse': 1., 'lesion': 2.}, lesions=lambda network: torch.tensor(0.5))
    assert torch.isclose(values['loss'], values['mse'] + 1)
    with pytest.raises(ValueError, match='lesion'):
        training_step(model, {'ct': ct, 'mri': mri}, {'lesion': 2.})


def test_an_unknown_term_gets_a_sentence():
    with pytest.raises(ValueError, match="no term 'msse'"):
        training_step(trained_like(width=8), dict(zip(('ct', 'mri'), pair(1, 1, 32, 32))), {'msse': 1.})


# The small one

def test_the_small_one_is_small():
    assert sum(weights.numel() for weights in WaveletLite().parameters()) <= 3000


def test_even_slices_stay_even_and_white_bone_white():
    model = trained_like(WaveletLite)
    with torch.no_grad():
        for level in (0., 85 / 255, 1.):
            even = torch.full((1, 1, 48, 48), level)
            assert torch.equal(model(even, torch.zeros_like(even)), even)
        ct, mri = pair(1, 1, 40, 40)
        ct[..., 10:20, 10:20] = 1
        assert (model(ct, mri)[ct == 1] == 1).all()


def test_without_a_gain_the_subbands_lie_between_their_sources():
    model, (ct, mri) = trained_like(WaveletLite, gain=0.), pair(1, 1, 32, 32)
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
        terms = wavelet_lite.training_step(model, {'ct': ct, 'mri': mri}, teacher, {'imitation': 1.})
        optimizer.zero_grad()
        terms['loss'].backward()
        optimizer.step()
        losses.append(float(terms['imitation'].detach()))
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError):
        wavelet_lite.training_step(model, {'ct': ct, 'mri': mri}, teacher, {'imitation': -1.})


# The dial between what metrics like and every lesion

def dialled(**config):
    model = trained_like(width=8, dial=True, **config)
    for number, ends in enumerate(model.dial.ends):
        torch.nn.init.normal_(ends, std=0.3, generator=torch.Generator().manual_seed(number))
    return model


def test_the_middle_of_the_dial_is_the_network_without_it():
    model, ct, mri = dialled(), *pair(1, 1, 32, 48)
    plain = WaveletFusion(width=8).eval()
    plain.load_state_dict({name: weights for name, weights in model.state_dict().items() if not name.startswith('dial')})
    with torch.no_grad():
        assert torch.allclose(model(ct, mri), plain(ct, mri), atol=1e-6) and torch.equal(model(ct, mri), model(ct, mri, lesions=0.5))
        fused = [model(ct, mri, lesions) for lesions in (0, 0.5, 1)]
    assert min((a - b).abs().max() for a, b in zip(fused, fused[1:])) > 0.01


def test_a_copy_whose_dial_stands_elsewhere_shares_the_weights():
    model, ct, mri = dialled(lesions=0.25), *pair(1, 1, 32, 32)
    turned = at_lesions(model, 1)
    with torch.no_grad():
        assert torch.equal(turned(ct, mri), model(ct, mri, lesions=1)) and torch.equal(model(ct, mri), model(ct, mri, lesions=0.25))
        assert not torch.equal(turned.maps(ct, mri)['LL'], model.maps(ct, mri)['LL'])
    assert turned.network is model.network and at_lesions(model, None) is model


def test_two_threads_turn_the_dial_each_for_itself():
    model, ct, mri = dialled(), *pair(1, 1, 32, 32)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    alone, both = [model(ct, mri, lesions=lesions).detach() for lesions in (0., 1.)], Barrier(2, timeout=60)

    def meet(*_):
        both.wait()     # both have turned it, and neither has computed
    model.network.encode1.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        at_once = list(threads.map(lambda lesions: model(ct, mri, lesions=lesions).detach(), (0., 1.)))
    assert all(map(torch.equal, at_once, alone))
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


@pytest.mark.parametrize('lesions', [-0.1, 1.1, '1', True, float('nan')])
def test_a_dial_takes_numbers_from_0_to_1(lesions):
    for make in (lambda: dialled()(*pair(1, 1, 32, 32), lesions=lesions), lambda: WaveletFusion(width=8, dial=True, lesions=lesions)):
        with pytest.raises(ValueError, match='a number from 0'):
            make()


def test_a_network_without_a_dial_says_so():
    with pytest.raises(ValueError, match='no dial'):
        trained_like(width=8)(*pair(1, 1, 32, 32), lesions=1)
    with pytest.raises(ValueError, match='no dial'):
        at_lesions(torch.maximum, 1)


def test_only_the_dial_is_trained_at_both_ends():
    model = dialled().train()
    model.network.requires_grad_(False)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    ct, mri = pair(2, 1, 32, 32)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    for _ in range(12):                 # both ends are drawn, but for one time in 2,000
        optimizer.zero_grad()
        dial_step(model, {'ct': ct, 'mri': mri}, {'mse': 1.}, dial=4.)['loss'].backward()
        optimizer.step()
    moved = {name for name, weights in model.state_dict().items() if not torch.equal(weights, before[name])}
    assert moved == {f'dial.ends.{number}' for number in range(6)} and model.lesions == 0.5
    assert all((model.dial.ends[0][end] != before['dial.ends.0'][end]).any() for end in (0, 1))


@pytest.mark.parametrize('wrong, said', [({'dial': -1.}, 'above 1'), ({'dial': 0.5}, 'above 1'), ({'dial': float('nan')}, 'above 1'), ({'dial': 4.}, 'give start'),
                                         ({'dial': 4., 'start': 'wavelet'}, 'give start'), ({'lesions': 0.75}, 'no dial'), ({'lesions': 3.}, 'from 0')])
def test_parameters_of_a_dial_that_cannot_be_trained(wrong, said):
    with pytest.raises(ValueError, match=said):
        check_config(SimpleNamespace(**{'dial': 0., 'lesions': 0.5, 'start': '', 'w_detection': 0.} | wrong))


def test_a_step_that_fails_leaves_the_dial_where_it_stood():
    model, (ct, mri) = dialled().train(), pair(1, 1, 32, 32)
    with pytest.raises(ValueError, match='no term'):
        dial_step(model, {'ct': ct, 'mri': mri}, {'unknown': 1.}, dial=4.)
    assert model.lesions == 0.5


@pytest.mark.parametrize('dial', [False, True])
def test_a_network_with_and_without_a_dial_starts_from_the_shipped_one(dial):
    shipped = load_model('wavelet', device='cpu')
    model = start_from(WaveletFusion(**shipped.config | {'dial': dial, 'lesions': 0.5}), 'wavelet').eval()
    with torch.no_grad():
        assert torch.allclose(model(*pair(1, 1, 32, 32)), shipped(*pair(1, 1, 32, 32), lesions=0.5), atol=1e-6)
    assert not dial or torch.equal(model.dial.ends[0], shipped.dial.ends[0])


def test_a_position_of_any_number_can_be_saved(tmp_path):
    network = WaveletFusion(width=4, dial=True, lesions=np.float32(0.25))
    save_checkpoint(tmp_path / 'a.pt', method='trainable_wavelet_fusion', config=network.config, state_dict=network.state_dict(), epoch=1, metrics={})
    assert load_model(str(tmp_path / 'a.pt'), device='cpu').lesions == 0.25
