"""Lesions of the phantom in metrics and losses: contrast to noise, crops around lesions, the lesion loss."""
import numpy as np
import pytest
import torch

from medfusion.losses import LesionCrops, LesionTerm, lesion_loss
from medfusion.metrics import contrast_to_noise, lesion_contrast
from medfusion.phantom import phantom_slice


def test_contrast_to_noise_by_hand():
    labels = np.full((256, 256), 8, np.uint8)
    labels[100:140, 100:140] = 17
    image = np.indices(labels.shape).sum(0) % 2 * .2          # a chequerboard: mean 0.1, standard deviation 0.1
    image[labels == 17] = .6
    assert np.isclose(contrast_to_noise(image, labels, 'tumour'), 5, rtol=1e-2)
    assert np.isclose(contrast_to_noise(2 * image + 3, labels, 'tumour'), contrast_to_noise(image, labels, 'tumour'))
    assert np.isclose(contrast_to_noise(torch.from_numpy(image)[None, None], torch.from_numpy(labels), 'tumour'), 5, rtol=1e-2)
    assert np.isnan(contrast_to_noise(image, labels, 'oedema'))
    assert np.isnan(contrast_to_noise(image, np.full_like(labels, 17), 'tumour'))
    assert all(np.isnan(contrast_to_noise(np.full(labels.shape, level), labels, 'tumour')) for level in (0, 0.1, 0.3, 0.7))
    with pytest.raises(ValueError, match='not a kind of lesion'):
        contrast_to_noise(image, labels, 'cyst')


def test_lesion_contrast_table():
    cut = phantom_slice(12, 4)
    table = lesion_contrast(cut.ct, cut.mri, cut.ct, cut.labels)
    assert list(table.columns) == ['lesion', 'ct', 'mri', 'fused'] and len(table) >= 1
    assert np.allclose(table['fused'], table['ct'])  # the CT was given as the fused slice
    empty = lesion_contrast(cut.ct, cut.mri, cut.ct, np.zeros_like(cut.labels))
    assert list(empty.columns) == list(table.columns) and len(empty) == 0


@pytest.fixture(scope='module')
def crops():
    return LesionCrops(size=48, cases=4, slices=4)


def test_lesion_crops_hold_a_lesion_and_its_surroundings(crops):
    drawn = crops.draw(32, torch.Generator().manual_seed(0))
    assert {name: tuple(part.shape) for name, part in drawn.items()} == dict.fromkeys(drawn, (32, 1, 48, 48))
    assert all(0 <= part.min() and part.max() <= 1 for part in drawn.values())
    assert (drawn['lesion'].sum((1, 2, 3)) > 0).all() and (drawn['lesion'] * drawn['ring']).max() == 0
    assert (drawn['ring'].sum((1, 2, 3)) > 0).float().mean() > .9


@pytest.mark.parametrize('arguments, words', [
    (dict(size=300), 'Crops of 300 pixels'), (dict(cases=0), 'None of the 0 × 6 slices')])
def test_lesion_crops_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        LesionCrops(**arguments)


def test_lesion_crops_follow_the_random_states_that_a_run_saves(crops):
    torch.manual_seed(3)
    one, other = crops.draw(4), crops.draw(4)
    torch.manual_seed(3)
    again = crops.draw(4)
    assert all((one[name] == again[name]).all() for name in one) and (one['ct'] != other['ct']).any()


def test_lesion_loss_has_finite_gradients_also_on_constant_images(crops):
    drawn = crops.draw(4, torch.Generator().manual_seed(1))
    for fused in (torch.zeros_like(drawn['ct']), torch.ones_like(drawn['ct']), drawn['ct'].clone()):
        loss = lesion_loss(fused.requires_grad_(), **drawn)
        loss.backward()
        assert 0 <= loss <= 1 and fused.grad.isfinite().all()
    empty = dict.fromkeys(drawn, torch.zeros(1, 1, 16, 16))
    assert lesion_loss(torch.rand(1, 1, 16, 16), **empty).isfinite()


def test_lesion_term_validates_on_the_same_crops_and_trains_on_others():
    class Brighter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, ct, mri):
            return self.gain * torch.maximum(ct, mri)

    term, model = LesionTerm(cases=3), Brighter()
    model.eval()
    assert term(model) == term(model)
    model.train()
    assert len({float(term(model).detach()) for _ in range(4)}) == 4
