"""Pixels that need no decision, beside what the notebook shows: windows counted by brute force, borders, and half precision."""
import pytest
import torch

from medfusion.certain_pixels import both_constant, guided_by_both, keep_certain, only_at_edges, pad_to_multiple, square_mean


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


@pytest.mark.parametrize('which', [0, 1], ids=['CT', 'MRI'])
@pytest.mark.parametrize('axis', [-2, -1])
@pytest.mark.parametrize('step', [0.25, -0.25])
def test_a_long_edge_of_either_slice_is_seen_on_both_sides(which, axis, step):
    "A step up or down of either slice, along rows or columns, is nothing constant: of four pixels on the one side of it, of three on the other."
    pair = torch.full((2, 1, 1, 24, 24), 0.5)
    pair[which].narrow(axis, 12, 12).add_(step)
    found = both_constant(*pair).movedim(axis, -1)
    assert not found[..., 8:15].any() and found[..., :8].all() and found[..., 15:].all()


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


@pytest.mark.parametrize('reach', [1, 2, 8])
@pytest.mark.parametrize('shape', [(2, 3, 40, 29), (1, 1, 16, 16)])
def test_square_means_are_means_over_squares(reach, shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = torch.nn.functional.pad(image, (reach,) * 4, mode='replicate')
    assert torch.allclose(square_mean(image, reach), torch.nn.functional.avg_pool2d(padded, 2 * reach + 1, 1), atol=1e-12)


def test_decisions_that_are_a_combination_of_the_slices_pass_the_filter():
    ct, mri = torch.rand(2, 1, 1, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decisions = torch.cat([0.3 * ct + 0.5 * mri + 0.1, 1 - ct], 1)
    assert torch.allclose(guided_by_both(decisions, ct, mri, epsilon=1e-9), decisions, atol=1e-6)


def test_where_both_slices_are_even_so_are_the_decisions():
    ct, mri = torch.full((1, 1, 64, 64), 0.2), torch.full((1, 1, 64, 64), 0.7)
    ct[..., 40:] = 1.                                               # bone, where decisions are free
    jump = torch.zeros(1, 2, 64, 64)
    jump[..., 16:] = 1.
    jump[..., 40:] = 0.
    changed = only_at_edges(jump, ct, mri).diff(dim=-1).abs()
    assert changed[..., 8:24].max() < 0.1 and changed[..., 39].min() > 0.9
