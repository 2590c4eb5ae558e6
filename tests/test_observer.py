"""The model observer against known answers."""
import json
from pathlib import Path

import numpy as np
import pytest

from medfusion.observer import (area_under_curve, channel_outputs, detectability, detectability_of_area,
                                difference_of_gaussians, gabor, hotelling_template, interval, laguerre_gauss, observe,
                                search_channels, search_statistic)

REFERENCE = json.loads(Path(__file__).with_name('observer_reference.json').read_text())['rows']


@pytest.fixture(scope='module')
def backgrounds():
    "The images that the reference was made of, by the formula in its file."
    raw = np.random.default_rng(7).integers(-20, 21, (4, 200, 53, 53))
    sums = sum(raw[..., i:i + 49, j:j + 49] for i in range(5) for j in range(5))
    return {'white': raw[..., 2:-2, 2:-2], 'sum5': sums // 5}


@pytest.mark.parametrize('row', REFERENCE, ids=lambda row: '{noise}-{sigma}-{amplitude}-{width}'.format(**row))
def test_public_observer(row, backgrounds):
    axis = np.arange(49) - 24
    bell = np.exp(-(axis[:, None] ** 2 + axis ** 2) / (2 * row['sigma'] ** 2))
    signal = np.rint(100 * row['amplitude'] * bell) / 100
    channels = laguerre_gauss(49, row['width'])
    outputs = [channel_outputs(images + i % 2 * signal, channels) for i, images in enumerate(backgrounds[row['noise']])]
    found = observe(outputs[:2], outputs[2:])
    # the reference is printed with six decimals
    assert found.area == pytest.approx(row['auc'], abs=1e-5)
    assert found.detectability == pytest.approx(row['snr'], abs=1e-5)


def test_noise_lowers_detectability_as_theory_says():
    "White noise of twice the variance: d' falls by the square root of two."
    rng = np.random.default_rng(3)
    axis = np.arange(25) - 12
    signal = np.exp(-(axis[:, None] ** 2 + axis ** 2) / 8)
    channels = laguerre_gauss(25, 8)
    quiet = rng.standard_normal((4, 4000, 25, 25))
    loud = quiet + rng.standard_normal(quiet.shape)
    found = []
    for images in (quiet, loud):
        outputs = [channel_outputs(image + i % 2 * signal, channels) for i, image in enumerate(images)]
        found.append(observe(outputs[:2], outputs[2:]).detectability)
    # 4000 + 4000 patches: each d' has a standard error of about 1.3 %
    assert found[0] / found[1] == pytest.approx(np.sqrt(2), rel=.06)


def test_internal_noise_makes_the_template_less_sure():
    rng = np.random.default_rng(0)
    absent, present = rng.standard_normal((2, 300, 4)) @ rng.standard_normal((4, 4))
    present = present + [1, 0, 0, 0]
    strong, weak = (np.linalg.norm(hotelling_template(absent, present, noise)) for noise in (0, 1))
    assert weak < strong


def test_statistics():
    assert area_under_curve(np.zeros(3), np.zeros(4)) == .5
    assert detectability(np.ones(3), np.ones(3)) == 0
    assert detectability_of_area(.5) == pytest.approx(0, abs=1e-12)
    assert all(np.isnan(interval([.5])))


@pytest.mark.parametrize('level, errors', [(.95, 1.96), (.5, .674)])
def test_an_interval_is_as_wide_as_its_level_says(level, errors):
    "Of many normal values that of the mean is so many standard errors to each side."
    values = np.random.default_rng(0).standard_normal(400)
    low, high = interval(values, level=level)
    assert low < values.mean() < high and high - low == pytest.approx(2 * errors * values.std() / 20, rel=.07)


@pytest.mark.parametrize('channels', [laguerre_gauss(33, 10), difference_of_gaussians(33), gabor(33)], ids=['LG', 'DoG', 'Gabor'])
def test_every_kind_of_channel_sees_a_round_lesion(channels):
    rng = np.random.default_rng(1)
    axis = np.arange(33) - 16
    signal = np.exp(-(axis[:, None] ** 2 + axis ** 2) / 18)
    images = rng.standard_normal((4, 600, 33, 33))
    outputs = [channel_outputs(image + i % 2 * signal, channels) for i, image in enumerate(images)]
    ideal = np.linalg.norm(signal)
    assert observe(outputs[:2], outputs[2:]).detectability > .7 * ideal


@pytest.mark.parametrize('period', [4, 8, 16])
def test_a_gabor_channel_is_one_octave_wide(period):
    "Along its stripes' frequency the band is half as high at two frequencies, one of them twice the other."
    heights = abs(np.fft.rfft(gabor(129, periods=(period,), angles=1)[0].sum(0), 8192))
    band = np.flatnonzero(heights > heights.max() / 2) / 8192
    assert band[-1] / band[0] == pytest.approx(2, rel=.02) and band.mean() == pytest.approx(1 / period, rel=.01)


def test_one_channel_is_enough():
    "Its template is the difference of means over the variance."
    absent, present = np.random.default_rng(0).standard_normal((2, 50, 1)) + [[[0.]], [[1.]]]
    expected = (present.mean() - absent.mean()) / ((absent.var(ddof=1) + present.var(ddof=1)) / 2)
    assert hotelling_template(absent, present) == pytest.approx([expected])
    assert hotelling_template(absent, present, internal_noise=1) == pytest.approx([expected / 2])


def test_what_never_varies_tells_nothing():
    "Slices that are all black are alike with and without a lesion: chance, and no lack of an inverse."
    black = np.zeros((20, 6))
    found = observe((black, black), (black, black))
    assert (found.detectability, found.area) == (0, .5) and not found.weights.any()
    with pytest.raises(ValueError, match='has no inverse; show patches that vary more, or take fewer channels'):
        hotelling_template(black, black + 1)


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match='do not fit channels'):
        channel_outputs(np.zeros((2, 5, 5)), laguerre_gauss(7, 3))
    with pytest.raises(ValueError, match='too few'):
        hotelling_template(np.zeros((3, 6)), np.zeros((9, 6)))


def test_a_search_finds_the_best_position():
    "A single bright pixel off the middle: the answer of the template that is moved there."
    channels, weights = laguerre_gauss(9, 4), np.arange(6.)
    patch = np.zeros((1, 15, 15))
    patch[0, 5, 9] = 1
    outputs = channel_outputs(patch, search_channels(channels, reach=3)).reshape(1, 49, 6)
    template = np.tensordot(weights, channels, 1)
    assert search_statistic(outputs, weights)[0] == pytest.approx(template[1:8, 1:8].max())
    assert outputs[0, 24] == pytest.approx(channels[:, 5 - 3, 9 - 3])
