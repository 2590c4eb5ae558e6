"""How exact is registration, and is its verdict right? Writes results/recorded/registration_signs.csv and registration_poses.csv.

Usage: python benchmarks/scan_registration.py [HEADS]    (15 heads for the signs, 6 and 6 for the poses; an hour and more on one core)
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from medfusion.phantom_volume import phantom_study
from medfusion.registration import (ScanPyramid, descend, distance_between, half_disagreement, mirror_ratio, mirrored, moved, pose_of, quarter_turns, register,
                                    rigid, search_pose)
from medfusion.scans import sitk

RECORDS = Path(__file__).resolve().parents[1] / 'results/recorded'


def head(seed):
    "A study of the head with the seed, in a pose up to 40° and 60 mm away."
    return phantom_study(seed, contrast=('T1', 'T2', 'FLAIR')[seed % 3], ct_spacing=(1.6, 1.6, 3.2), mri_spacing=(1.5, 1.5, 4.), pose=(40., 60.))


def signs(pyramid, pose, truth, brain):
    "What is recorded of a pose, refined."
    pose, information = descend(pyramid, 2, pose, 1., .005, 60, .15)
    return {'error_mm': round(distance_between(pose, truth, brain), 3), 'halves_mm': round(float(np.median(half_disagreement(pyramid, pose))), 2),
            'mirror_ratio': round(mirror_ratio(pyramid, pose), 3), 'mutual_information': round(information, 4)}


def settled(pyramid, start):
    "The best pose near a start, at 8 and at 4 mm."
    return descend(pyramid, 4, descend(pyramid, 8, start, 8., .1, 60)[0])[0]


def cases(seed):
    "The right pose, the best wrong one, a mirrored MRI and another head's MRI: {case: signs}."
    study, other = head(seed), head(seed + 3)
    pyramid = ScanPyramid.of(study.ct, study.mri)
    right, tried = search_pose(pyramid)
    middle = pyramid.points.mean(0)
    wrong = settled(pyramid, pose_of(quarter_turns()[tried[1][0]], middle, pyramid.mri_middle))
    seen = mirrored(study.mri, moved(right, middle[None])[0], np.reshape(right.GetMatrix(), (3, 3))[:, 0])
    found = {'right': signs(pyramid, right, study.truth, study.brain), 'wrong turn': signs(pyramid, wrong, study.truth, study.brain)}
    for case, mri, start in (('mirrored', seen, study.truth), ('other head', other.mri, other.truth)):
        stranger = ScanPyramid.of(study.ct, mri)
        found[case] = signs(stranger, settled(stranger, start), start, study.brain)
    if found['wrong turn']['error_mm'] < 1:      # the second start led to the right pose too
        del found['wrong turn']
    return [{'seed': seed, 'case': case} | row for case, row in found.items()]


def turned(study, matrix):
    "The MRI of a study as if its head had lain turned by a matrix, and the truth for it."
    middle = np.array(study.mri.TransformContinuousIndexToPhysicalPoint([(count - 1) / 2 for count in study.mri.GetSize()]))
    mri = sitk.Image(study.mri)
    mri.SetDirection((matrix @ np.reshape(mri.GetDirection(), (3, 3))).ravel().tolist())
    mri.SetOrigin((matrix @ (np.array(mri.GetOrigin()) - middle) + middle).tolist())
    return mri, rigid(sitk.CompositeTransform([pose_of(matrix, middle, middle), study.truth]))


def pose_row(seed, turn):
    "How far off a registration of the head with the seed is, its MRI turned by quarter turn number `turn`."
    study = head(seed)
    mri, truth = turned(study, quarter_turns()[turn])
    found = register(study.ct, mri)
    return {'seed': seed, 'turned': turn > 0, 'turn': turn, 'error_mm': round(distance_between(found.transform, truth, study.brain), 3), 'verdict': found.verdict,
            'halves_mm': round(found.signs['halves_mm'], 2), 'mirror_ratio': round(found.signs['mirror_ratio'], 3), 'seconds': round(found.seconds)}


if __name__ == '__main__':
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    rows = [row for seed in range(1003, 1003 + count) for row in cases(seed)]
    pd.DataFrame(rows).to_csv(RECORDS / 'registration_signs.csv', index=False, lineterminator='\n')
    turns = [(1018 + k, 0) for k in range(6)] + [(1006, 13)] + list(zip(range(1007, 1013), (5, 9, 20, 8, 17, 23)))
    pd.DataFrame([pose_row(*one) for one in turns]).to_csv(RECORDS / 'registration_poses.csv', index=False, lineterminator='\n')
