"""Pixels that need no decision, beside what the notebook shows: windows counted by brute force, borders, and half precision."""
import pytest
import torch

from medfusion.certain_pixels import both_constant, keep_certain, pad_to_multiple


def test_what_is_called_constant_is_constant():
    "Every pixel that is found has a constant window of 7 x 7 in both slices; a pixel with a constant one of 9 x 9 is found."
    torch.manual_seed(0)
    ct, mri = (torch.rand(2, 2, 1, 24, 21) > 0.99).float()
    found = both_constant(ct, mri)

    def constant(reach, n, row, column):
        windows = (x[n, 0, max(row - reach, 0):row + reach + 1, max(column - reach, 0):column + reach + 1] for x in (ct, mri))
        return all(window.min() == window.max() for window in windows)

    for n in range(2):
        for row in range(24):
            for column in range(21):
                if found[n, 0, row, column]:
                    assert constant(3, n, row, column)
                elif constant(4, n, row, column):
                    raise AssertionError((n, row, column))
    assert found.any() and not found.all()


def test_one_pixel_in_a_batch_changes_its_own_slice_only():
    ct, mri = torch.zeros(2, 2, 1, 32, 32)
    ct[0, 0, 16, 16] = 1e-3
    found = both_constant(ct, mri)
    assert found[1].all() and not found[0, 0, 13:20, 13:20].any() and found[0, 0, :12].all()


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(kind):
    ct = torch.full((1, 1, 16, 16), 0.25, dtype=kind)
    assert (keep_certain(torch.rand(1, 1, 16, 16), ct, ct / 2) == 0.25).all()


def test_no_padding_where_none_is_needed():
    image = torch.rand(1, 2, 32, 48)
    assert pad_to_multiple(image, 16) is image
