"""The surfaces of the anatomy, and where its parts come to lie."""
import numpy as np
import pytest

from medfusion.anatomy import (Ellipsoid, Tube, brain_parts, case_kinds, case_sequence, cut_plane, draw_head, face_parts,
                               label_names, lesion_kinds, on_plane, paint_head, share_inside, tissues)

NUMBER = {name: value for value, name in label_names().items()}


@pytest.fixture(scope='module')
def plane():
    "The plane through the eyes of a head, painted."
    p = cut_plane(draw_head(3, 0), -.34, (192, 192))
    paint_head(p)
    return p


def grid(size):
    return np.meshgrid(*2 * [np.linspace(-1, 1, size, dtype=np.float32)])


@pytest.mark.parametrize('size', [48, 200])
@pytest.mark.parametrize('turn', [0, .7])
def test_an_ellipsoid_fills_its_area_at_every_size_and_turn(size, turn):
    x, y = grid(size)
    share = share_inside(Ellipsoid((.1, -.1, 0), (.6, .3, 1), turn).inside(x, y, 0))
    assert np.isclose(share.sum() * (2 / (size - 1)) ** 2, np.pi * .6 * .3, rtol=.01)  # partial volume is of first order


def test_a_tube_is_a_distance():
    x, y = grid(101)
    f = Tube((-.5, 0, 0), (.5, 0, 0), .2, .2).inside(x, y, 0)
    assert np.allclose(f[:, 50], .2 - np.abs(y[:, 50]), atol=1e-5) and f[50, 100] == pytest.approx(-.3, abs=1e-5)


@pytest.mark.parametrize('name, tissue', [('globe', 'eye'), ('sphenoid sinus', 'air')])
def test_what_the_tables_name_lies_where_they_say(plane, name, tissue):
    inside = on_plane(face_parts()[name], plane, mirrored=name == 'globe') > .04
    assert inside.any() and (plane.labels[inside] == NUMBER[tissue]).mean() > .95


def test_parts_off_the_midline_are_on_both_sides(plane):
    eyes = plane.labels == NUMBER['eye']
    assert (eyes & (plane.x < 0)).sum() == pytest.approx((eyes & (plane.x > 0)).sum(), rel=.3)  # the plane is tilted


def test_every_tissue_is_painted_somewhere():
    seen = set()
    for case in range(1, 5):
        for level in (-.34, -.2, .08, .2):
            p = cut_plane(draw_head(case, 0), level, (160, 160))
            paint_head(p)
            seen |= set(np.unique(p.labels))
    assert seen == set(NUMBER.values())


def test_painting_mixes_by_share_and_leaves_the_rest():
    p = cut_plane(draw_head(1, 0), 0, (64, 64))
    share = np.zeros((64, 64), np.float32)
    share[:32], share[32] = 1, .4
    p.paint(share, 'skull', ct=100)
    bone = tissues()['skull'].ct + 100
    assert (p.ct[:32] == bone).all() and np.allclose(p.ct[32], .4 * bone - 600) and (p.ct[33:] == -1000).all()
    assert (p.labels[:32] == NUMBER['skull']).all() and (p.labels[32:] == 0).all()  # the larger share has the label


def test_cases_share_out_lesions_and_sequences():
    for seed in range(3):
        for first in (1, 7, 13):
            assert set(case_kinds(first, seed)) | set(case_kinds(first + 1, seed)) == set(lesion_kinds())
            assert sorted(case_sequence(first + i, seed) for i in range(6)) == [0, 0, 0, 0, 1, 2]


def test_shapes_of_the_brain_lie_in_the_brain_case():
    for name, part in brain_parts().items():
        centre = part.centre if isinstance(part, Ellipsoid) else part.end
        assert np.hypot(centre[0] / .51, centre[1] / .70) < 1, name  # the smallest brain case that is drawn
