"""How exact is registration, and is its verdict right? Rows are written as they come; what stands in the file already is not computed again.

    python benchmarks/scan_registration.py poses 40    results/recorded/registration_poses.csv: heads never used for tuning (18 CPU minutes)
    python benchmarks/scan_registration.py signs 15    results/recorded/registration_signs.csv: the heads by which the verdict was calibrated (10 CPU minutes)
    python benchmarks/scan_registration.py stretches 8    results/recorded/registration_stretches.csv: spacings that headers tell wrongly (6 CPU minutes)
    python benchmarks/scan_registration.py optimisers 3    results/recorded/registration_optimisers.csv: what climbs best to a pose (6 CPU minutes for 3)

The number says how many heads; remove the file to begin anew. A stopped run goes on with the next head.
"""
import argparse
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from medfusion.phantom_volume import phantom_study
from medfusion.registration import (
    ScanPyramid,
    descend,
    distance_between,
    half_disagreement,
    judge,
    mirror_ratio,
    mirrored,
    moved,
    one_thread,
    pose_of,
    quarter_turns,
    register,
    rigid,
    search_pose,
    seen_mm,
    seen_share,
    stretches,
)
from medfusion.scans import sitk

RECORDS = Path(__file__).resolve().parents[1] / 'results/recorded'
HARDER = {'5 mm slices': {'mri_spacing': (1.5, 1.5, 5.)}, 'noise 8 %': {'noise': .08}, 'bias 40 %': {'bias': .4}, 'a third missing': {'fraction': .67}}
LITTLE = {'a third, in the middle': {'fraction': (.33, .67)}, 'the neck': {'fraction': (0, .25)}}        # of the MRI's field of view, from below


@lru_cache(maxsize=3)
def head(seed, harder=''):
    "A study of the head with the seed, in a pose up to 40° and 60 mm away."
    usual = dict(contrast=('T1', 'T2', 'FLAIR')[seed % 3], ct_spacing=(1.6, 1.6, 3.2), mri_spacing=(1.5, 1.5, 4.), pose=(40., 60.))
    return phantom_study(seed, **usual | (HARDER | LITTLE).get(harder, {}))


# How exact

def turned(study, matrix):
    "The MRI of a study as if its head had lain turned by a matrix, and the truth for it."
    middle = np.array(study.mri.TransformContinuousIndexToPhysicalPoint([(count - 1) / 2 for count in study.mri.GetSize()]))
    mri = sitk.Image(study.mri)
    mri.SetDirection((matrix @ np.reshape(mri.GetDirection(), (3, 3))).ravel().tolist())
    mri.SetOrigin((matrix @ (np.array(mri.GetOrigin()) - middle) + middle).tolist())
    return mri, rigid(sitk.CompositeTransform([pose_of(matrix, middle, middle), study.truth]))


def seen_in_a_mirror(study):
    "The MRI of a study as a mirror shows it that stands between left and right."
    return mirrored(study.mri, moved(study.truth, study.brain.mean(0)[None])[0], np.reshape(study.truth.GetMatrix(), (3, 3))[:, 0])


def pose_row(study, ct, mri, truth):
    "How far off a registration is, and what is said of it."
    began = time.process_time()
    found = register(ct, mri)
    signs = {name: round(found.signs[name], 3) for name in ('halves_mm', 'mirror_ratio', 'seen_share')}
    return {'contrast': study.contrast, 'error_mm': round(distance_between(found.transform, truth, study.brain), 3),
            'verdict': found.verdict, **signs, 'cpu_seconds': round(time.process_time() - began, 1)}, found


def there_and_back(study):
    "How far registering from MRI to CT is from the inverse of the other way, on the mean over the brain."
    found = register(study.ct, study.mri)
    row, back = pose_row(study, study.mri, study.ct, rigid(study.truth.GetInverse()))
    error = np.linalg.norm(moved(back.transform, moved(found.transform, study.brain)) - study.brain, axis=1).mean()
    return row | {'error_mm': round(float(error), 3)}


def poses(number):
    "What is tried with head `number`, counted from 0, {case: what makes its row}: any pose, and for some heads a harder case."
    seed, quarters = 3001 + number, [matrix for matrix in quarter_turns() if np.trace(matrix) in (1, -1)]       # by 90° or 180°
    study, row = lambda: head(seed), lambda study, mri, truth: pose_row(study, study.ct, mri, truth)[0]
    cases = {'any pose': lambda: row(study(), study().mri, study().truth)}
    if number % 4 == 0:
        cases['turned'] = lambda: row(study(), *turned(study(), quarters[(7 * number // 4) % len(quarters)]))
    if number % 5 == 1:
        cases['mirrored'] = lambda: row(study(), seen_in_a_mirror(study()), study().truth)
    if number % 5 == 2:
        cases['other head'] = lambda: row(study(), head(seed - 1).mri, head(seed - 1).truth)
    if number % 13 == 3:
        cases['MRI to CT'] = lambda: there_and_back(study())
    for case in [list(HARDER)[number // 3 % 4]] * (number % 3 == 1) + [list(LITTLE)[number // 4 % 2]] * (number % 4 == 3):
        cases[case] = lambda case=case: row(head(seed, case), head(seed, case).mri, head(seed, case).truth)
    return cases


# Is the verdict right

def signs_of(pyramid, pose, truth, brain):
    "What is recorded of a pose, refined."
    pose, information = descend(pyramid, 2, pose, 1., .005, 60, .15)
    return {'error_mm': round(distance_between(pose, truth, brain), 3), 'halves_mm': round(float(np.median(half_disagreement(pyramid, pose))), 2),
            'mirror_ratio': round(mirror_ratio(pyramid, pose), 3), 'mutual_information': round(information, 4)}


def settled(pyramid, start):
    "The best pose near a start, at 8 and at 4 mm."
    return descend(pyramid, 4, descend(pyramid, 8, start, 8., .1, 60)[0])[0]


def signs(number):
    "What was found with a head, {case: what gives its row}: the right pose, the best wrong one, a mirrored MRI and another head's MRI."
    seed = 1003 + number
    study, other = head(seed), head(seed + 1)
    pyramid = ScanPyramid.of(study.ct, study.mri)
    right, tried = search_pose(pyramid)
    wrong = settled(pyramid, pose_of(quarter_turns()[tried[1][0]], pyramid.points.mean(0), pyramid.mri_points.mean(0)))
    found = {'right': signs_of(pyramid, right, study.truth, study.brain), 'wrong turn': signs_of(pyramid, wrong, study.truth, study.brain)}
    for case, mri, start in (('mirrored', seen_in_a_mirror(study), study.truth), ('other head', other.mri, other.truth)):
        stranger = ScanPyramid.of(study.ct, mri)
        found[case] = signs_of(stranger, settled(stranger, start), start, study.brain)
    if found['wrong turn']['error_mm'] < 1:      # the second start led to the right pose too
        del found['wrong turn']
    return {case: lambda row=row: row for case, row in found.items()}


# Is a wrong spacing noticed

SPACINGS = {'slices ×.83': (1, 1, .83), 'slices ×.9': (1, 1, .9), 'slices ×.94': (1, 1, .94), 'slices ×1.06': (1, 1, 1.06), 'slices ×1.1': (1, 1, 1.1), 'slices ×1.15': (1, 1, 1.15),
            'pixels ×.9': (.9, .9, 1), 'pixels ×1.1': (1.1, 1.1, 1)}
PARTS = {'MRI, upper two thirds': {'fraction': .67}, 'MRI, lower half': {'fraction': (0, .5)}, 'MRI, middle third': {'fraction': (.33, .67)}, 'sagittal MRI': {'plane': 'sagittal', 'mri_spacing': (1., 1., 5.)},
         'slices of 7 mm': {'mri_spacing': (1., 1., 7.)}, 'noise 8 %': {'noise': .08}, 'bias 40 %': {'bias': .4}, 'CT, lower half': slice(0, 35), 'CT, upper half': slice(34, None), 'CT, 80 mm': slice(22, 47)}


@lru_cache(maxsize=2)
def seen_head(seed, part=''):
    "A study of the head with the seed, of which one scan shows a part, or is worse."
    how = PARTS.get(part, {})
    usual = dict(contrast=('T1', 'T2', 'FLAIR')[seed % 3], ct_spacing=(1.6, 1.6, 3.2), mri_spacing=(1.5, 1.5, 4.), pose=(40., 60.))
    study = phantom_study(seed, **usual | ({} if isinstance(how, slice) else how))
    return replace(study, ct=study.ct[:, :, how]) if isinstance(how, slice) else study


def stretch_row(study, factors=(1, 1, 1)):
    "What is measured, and said with it and without, where the header of the MRI tells its spacings `factors` times too large; registered from near the truth."
    mri, turn, middle = sitk.Image(study.mri), np.reshape(study.mri.GetDirection(), (3, 3)), study.brain.mean(0)
    mri.SetSpacing([step * factor for step, factor in zip(mri.GetSpacing(), factors)])
    place, origin = moved(study.truth, middle[None])[0], np.array(mri.GetOrigin())
    place = origin + turn @ np.diag(factors) @ turn.T @ (place - origin)
    pyramid = ScanPyramid.of(study.ct, mri)
    start = pose_of(np.reshape(study.truth.GetMatrix(), (3, 3)), middle, place + (2, -2, 2))
    pose, _ = descend(pyramid, 2, descend(pyramid, 4, start, 1.)[0], 1., .005, 60, .15)
    began = time.process_time()
    shares, gain = stretches(pyramid, pose)
    seconds = time.process_time() - began
    seen = (study.ct, mri, pose, pyramid.points, pyramid.mri_points)
    signs = {'halves_mm': float(np.median(half_disagreement(pyramid, pose))), 'mirror_ratio': mirror_ratio(pyramid, pose),
             'seen_share': seen_share(*seen), 'seen_mm': seen_mm(*seen)}
    named = {name: round(float(share), 4) for name, share in zip(('stretch_rows', 'stretch_columns', 'stretch_slices'), shares)}
    return {'contrast': study.contrast} | {name: round(value, 3) for name, value in signs.items()} | named | {
        'gain': round(gain, 3), 'without': judge(signs)[0], 'verdict': judge(signs | (named if gain > 1.1 else {}))[0], 'cpu_seconds': round(seconds, 2)}


def stretched(number):
    "What is tried with head `number`, counted from 0, {case: what makes its row}: as it is, with wrong spacings, and as other scans, by turns, show it."
    seed, parts = 5001 + number, [list(PARTS)[(number + step) % len(PARTS)] for step in (0, 3, 5, 6)]
    cases = {'as it is': (), **{part: (part,) for part in parts}}
    rows = {case: lambda part=part: stretch_row(seen_head(seed, *part)) for case, part in cases.items()}
    return rows | {case: lambda factors=factors: stretch_row(seen_head(seed), factors) for case, factors in SPACINGS.items()}


# What climbs best

ASCENTS = {'descend': None,        # as the package does it
           'the same, on ITK\'s smoothed slope': lambda method, mm: method.SetOptimizerAsRegularStepGradientDescent(mm, mm / 100, 60, .6, 1e-8),
           'conjugate gradients': lambda method, mm: method.SetOptimizerAsConjugateGradientLineSearch(1., 60),
           'LBFGS2': lambda method, mm: method.SetOptimizerAsLBFGS2(1e-6, 60),
           'Powell': lambda method, mm: method.SetOptimizerAsPowell(20, 50, mm / 8, .01, 1e-4)}


def ascended(pyramid, start, ascent, smoothed):
    "The pose that another optimiser of SimpleITK finds from a start, on voxels of 8 mm and then of 4 mm; all else as in `descend`."
    middle = pyramid.points.mean(0)
    for mm in (8, 4):
        method, small = sitk.ImageRegistrationMethod(), sitk.Euler3DTransform()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetMetricFixedMask(pyramid.mask[mm])
        method.SetMetricUseFixedImageGradientFilter(smoothed)
        method.SetMetricUseMovingImageGradientFilter(smoothed)
        ascent(method, mm)
        method.SetOptimizerScales([80. ** 2] * 3 + [1.] * 3)
        small.SetCenter(middle.tolist())
        method.SetMovingInitialTransform(start)
        method.SetInitialTransform(small, True)
        try:
            with one_thread():
                method.Execute(pyramid.ct[mm], pyramid.mri[mm])
        except RuntimeError:      # it left the MRI
            return start
        start = rigid(sitk.CompositeTransform([start, small]), middle)
    return start


def optimisers(number):
    "What each finds from three poses beside the right one of a head, {case: what makes its row}."
    seed = 1003 + number
    study, axis = head(seed), np.roll([1., 0, 0], number)
    pyramid, middle = ScanPyramid.of(study.ct, study.mri), study.brain.mean(0)

    def row(degrees, name):
        nudge = sitk.VersorRigid3DTransform(axis.tolist(), float(np.deg2rad(degrees)), (10., -10., 10.), middle.tolist())
        start, began = rigid(sitk.CompositeTransform([study.truth, nudge])), time.process_time()
        if ASCENTS[name] is None:
            pose = descend(pyramid, 4, descend(pyramid, 8, start, 8., .08, 60)[0], 4., .04, 60)[0]
        else:
            pose = ascended(pyramid, start, ASCENTS[name], 'smoothed' in name)
        return {'optimiser': name, 'degrees': degrees, 'error_mm': round(distance_between(pose, study.truth, study.brain), 3),
                'cpu_seconds': round(time.process_time() - began, 1)}
    return {f'{name}, {degrees}': lambda degrees=degrees, name=name: row(degrees, name) for degrees in (15, 30, 60) for name in ASCENTS}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', choices=('poses', 'signs', 'stretches', 'optimisers'))
    parser.add_argument('heads', type=int)
    options = parser.parse_args()
    make, first = {'poses': (poses, 3001), 'signs': (signs, 1003), 'stretches': (stretched, 5001), 'optimisers': (optimisers, 1003)}[options.table]
    path = RECORDS / f'registration_{options.table}.csv'
    rows = pd.read_csv(path).to_dict('records') if path.is_file() else []
    for number in range(options.heads):
        done = {row['case'] for row in rows if row['seed'] == first + number}
        if options.table == 'signs' and done:           # its cases come together
            continue
        for case, make_row in make(number).items():
            if case not in done:
                rows.append({'case': case, 'seed': first + number} | make_row())
                pd.DataFrame(rows).to_csv(path, index=False, lineterminator='\n')
                print(rows[-1], flush=True)
