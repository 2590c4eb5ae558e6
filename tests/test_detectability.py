"What the notebook of the detectability term does not show: the same draws in validation, the state, and refusals."

import numpy as np
import pytest
import torch
from torch import nn

from medfusion.data import CTMRIDataset
from medfusion.detectability import DetectionTerm, brain_region, detection_term, draw_spot, fused_detectability, mean_covariance, random_places, spot, spot_channels, spot_sizes
from medfusion.phantom import write_phantom
from medfusion.runs import load_checkpoint
from medfusion.training import Average, TrainingState, restore_state, save_state


class Mixture(nn.Module):
    "ct · share + mri · (1 - share), with a share that can be trained."

    def __init__(self, share=0.5):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, ct, mri):
        return self.share * ct + (1 - self.share) * mri


@pytest.fixture(scope='module')
def data_set(tmp_path_factory):
    part = write_phantom(tmp_path_factory.mktemp('detectability') / 'Dataset', cases=6, slices=3) / 'train'
    return CTMRIDataset(part / 'CT', part / 'MRI')


def test_validation_draws_the_same_spots_and_learns_nothing(data_set):
    term, model = DetectionTerm(data_set), Mixture().eval()
    with torch.no_grad():
        torch.manual_seed(1)
        first = term(model)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        again = term(model)
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())    # the same call, the same shapes
    assert term.state_dict() == {}
    term(model.train())
    assert len(term.state_dict()) == 1


def test_the_validation_of_a_network_that_stays_the_same_stays_the_same(data_set):
    "Its covariances are of the validation itself: those of the training grow, so that the first epoch was the best of every run."
    term, model = DetectionTerm(data_set), Mixture()
    with torch.no_grad():
        before = term(model.eval())
        for _ in range(10):
            term(model.train())
        assert term.state_dict() and torch.equal(term(model.eval()), before) and before > 0


def test_a_copy_pays_for_what_it_lost(data_set):
    "A copy of the MRI loses what is painted into the CT alone, a copy of the CT the other half."
    paid = {}
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        term, model = DetectionTerm(data_set), Mixture(share)
        paid[share] = np.mean([term(model).item() for _ in range(40)])
    assert paid[0.5] < paid[0.0] and paid[0.5] < paid[1.0]


def test_the_term_takes_another_default_of_numbers(data_set):
    spot.cache_clear(), spot_channels.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert spot(2.0).dtype == spot_channels(2.0).dtype == torch.float32
        assert DetectionTerm(data_set)(Mixture().float()).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
        spot.cache_clear(), spot_channels.cache_clear()


def test_the_gradient_is_that_of_the_hotelling_observer():
    "Where the running covariance is the batch's own, equation 1 has value and gradient of mean' K^-1 mean."
    generator = torch.Generator().manual_seed(0)
    absent, present, first, second = (torch.randn(40, 6, generator=generator, dtype=torch.float64) for _ in range(4))

    def parts(t):
        return absent + t * first, present + 1 + t * second

    def exact(t):
        without, found = parts(t)
        mean = (found - without).mean(0)
        return (mean @ torch.linalg.solve(mean_covariance(without, found), mean)).item()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = fused_detectability(*parts(t), mean_covariance(*parts(0.)))
    value.backward()
    assert value.item() == pytest.approx(exact(0.), rel=1e-4)    # the ridge of 1e-6 is all that differs
    assert t.grad.item() == pytest.approx((exact(1e-5) - exact(-1e-5)) / 2e-5, rel=1e-3)


def test_a_training_goes_on_with_the_running_covariances(data_set, tmp_path):
    def state(term):
        model = Mixture()
        optimizer = torch.optim.Adam(model.parameters())
        facts = {'method': 'toy', 'config': {}}
        return TrainingState(model, optimizer, None, Average(model, None), facts, {}, 2, companion=term,
                             history=[{'epoch': 1, 'train_loss': 1.}])
    term = DetectionTerm(data_set)
    for _ in range(5):
        term(Mixture().train())
    checkpoint = load_checkpoint(save_state(tmp_path / 'epoch_1.pt', state(term)))
    other = DetectionTerm(data_set)
    restore_state(state(other), checkpoint, 'epoch_1.pt')
    assert term.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(term.state_dict()[index], other.state_dict()[index]) for index in term.state_dict())


def test_a_share_of_the_spots_lies_in_synthetic_heads(data_set):
    asked = {}
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        term, model = DetectionTerm(data_set, synthetic=share), Mixture().train()
        for _ in range(12):
            term(model)
        asked[share] = {ground for ground, *_ in term.state_dict()}
    assert asked == {0.0: {0}, 0.5: {0, 1}, 1.0: {1}}    # 0: the training slices, 1: synthetic heads, each with covariances of its own
    with pytest.raises(ValueError, match='synthetic_spots is 1.5; it must be a share from 0 to 1'):
        DetectionTerm(data_set, synthetic=1.5)
    for weight, share in ((3.0, 1.5), (3.0, -0.1), (0.0, 0.5)):
        with pytest.raises(ValueError, match=f'synthetic_spots is {share}; .* needs w_detection'):
            detection_term(data_set, weight, share)


def test_places_keep_their_distance_on_every_shape():
    allowed = torch.ones(3, 1, 61, 130, dtype=torch.bool)
    allowed[1] = False
    places = random_places(allowed, most=9, generator=torch.Generator().manual_seed(0))
    assert {image for image, _, _ in places} == {0, 2}
    assert all(24 <= row < 61 - 24 and 24 <= column < 130 - 24 for _, row, column in places)
    for a in places:
        assert all(max(abs(a[1] - b[1]), abs(a[2] - b[2])) >= 34 for b in places if b != a and b[0] == a[0])
    assert random_places(torch.ones(1, 1, 40, 40, dtype=torch.bool)) == []    # no patch of 49 pixels fits


def test_the_brain_is_what_bone_encloses():
    ct = np.zeros((128, 128), np.float32)
    rows, columns = np.mgrid[:128, :128]
    radius = np.hypot(rows - 64, columns - 64)
    ct[radius < 50], ct[(radius > 44) & (radius < 50)] = 0.3, 1.0
    ct[60:64, :30] = 0.3                                   # a gap in the bone
    region = brain_region(ct, margin=6)
    assert region[64, 64] and not region[radius > 41].any() and region[radius < 34].all()
    assert not brain_region(np.zeros((64, 64))).any()


def test_no_gap_and_no_margin_are_none(data_set):
    "A margin of 0 leaves the whole region, a gap of 0 closes nothing."
    ct = data_set[4]['ct'][0]
    whole, within = brain_region(ct, margin=0), brain_region(ct, margin=1)
    assert whole.sum() > within.sum() > .9 * whole.sum() and (whole & within).sum() == within.sum()
    disc = np.hypot(*(np.mgrid[:96, :96] - 47.5))
    ring = np.select([disc < 30, disc < 36], [.4, 1.])
    region = brain_region(ring, gap=0, margin=0)
    assert region.shape == (96, 96) and not region[disc >= 30].any() and region.sum() > .98 * (disc < 30).sum()


def test_size_goes_with_modality():
    drawn = [draw_spot(torch.Generator().manual_seed(seed), by_size=1.0) for seed in range(300)]
    for index, (ct, mri) in drawn:
        if ct > .9:
            assert spot_sizes()[index] <= 3
        if mri > .9:
            assert spot_sizes()[index] >= 3


def test_too_little_brain_gets_a_sentence(tmp_path):
    part = write_phantom(tmp_path / 'Dataset', cases=3, slices=1, size=64) / 'train'
    with pytest.raises(ValueError, match='No slice in'):
        DetectionTerm(CTMRIDataset(part / 'CT', part / 'MRI'))
