"""Coupled rows in the compiled core by itself, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from test_native_lists import array, options, reader

from resnet_reg_ext import _C

pytestmark = [pytest.mark.sanitized]

COUPLED = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "l1": 0.02}


def plan(readings, of_groups, sets):
    """Sets: for each its members, rows, group_lasso k, and weights: one, or for each row."""
    weights = [np.array(w, np.float64) for *_, w in sets]
    described = [
        (members, rows, lasso, *((0.0, w.ctypes.data) if w.ndim else (w.item(), 0)))
        for (members, rows, lasso, _), w in zip(sets, weights, strict=True)
    ]
    steps = [(reading, of_group, {}) for reading, of_group in zip(readings, of_groups, strict=True)]
    return _C.RowPlan(steps, described), weights


def run(made, threads=1):
    _C.prox_sgd_rows_(reader(), made, threads)


def one_set(rows, thresholds, threads=1, num_zeros=None, start=None, **chosen):
    """One step on rows of one parameter, with a gradient of zero."""
    p = array(rows)
    zeros = 0 if num_zeros is None else num_zeros.ctypes.data
    starts = None if start is None else [array(start)]
    reading = reader().read([p], [array(np.zeros(p.shape))], None, None, zeros, starts)
    made, kept = plan([reading], [options(lr=1.0, **chosen)], [([(0, 0)], len(p), 1.0, thresholds)])
    run(made, threads)
    assert kept
    return p


@pytest.mark.parametrize("towards", ["zero", "start", "both"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_bits_of_the_reference(dtype, threads, towards):
    """Parameters of two groups, rows of more than a segment, a set of more than a piece.

    Both: the parameters of the second group have starts, and those of the first haven't.
    """
    rng = np.random.default_rng(11)
    has_start = {"zero": (False, False), "start": (True, True), "both": (False, True)}[towards]
    other = {**COUPLED, "l1": 0.0, "weight_decay": 0.2}
    of_groups = [(COUPLED, {}), (other, {"l2_mode": "proximal"})]
    rows_and_widths = [(5, [147, 1, 1100]), (70, [600, 1]), (3, [40_000, 17]), (600, [1, 2, 30])]
    lists: list[list[list]] = [[[], [], [], []], [[], [], [], []]]
    sets, expected = [], []
    for rows, widths in rows_and_widths:
        members, of_reference = [], []
        for n, width in enumerate(widths):
            group = n % 2
            drawn = [array(rng.standard_normal((rows, width)), dtype) for _ in range(4)]
            drawn[3][:: 2 + n] = drawn[0][:: 2 + n]  # at their start
            members.append((group, len(lists[group][0])))
            for tensors, values in zip(lists[group], drawn, strict=True):
                tensors.append(values)
            wide = np.float64 if dtype == "float64" else np.float32
            p, g, m, start = (np.array(values, wide) for values in drawn)
            chosen, mode = of_groups[group]
            more = {"start": start} if has_start[group] else {}
            of_reference.append((p, g, m, dtype, {**chosen, **mode, **more}))
        weights = rng.random(rows) * np.sqrt(sum(widths)) * 8
        weights[1] = 0.0
        sets.append((members, rows, 0.3 * ((1 - 0.0) / (1 - 0.9)), weights))
        result = reference.row_step(of_reference, weights, group_lasso=0.3)
        expected.append((members, result, of_reference))
    readings = [
        reader().read(p, g, m, None, 0, starts if with_start else None)
        for (p, g, m, starts), with_start in zip(lists, has_start, strict=True)
    ]
    native = [options(**chosen, proximal=bool(mode)) for chosen, mode in of_groups]
    made, kept = plan(readings, native, sets)
    run(made, threads)
    assert kept
    dead = 0
    for members, result, given in expected:
        for (group, index), (p, m), of_member in zip(members, result, given, strict=True):
            for found, wanted in ((lists[group][0][index], p), (lists[group][2][index], m)):
                reference.assert_same(np.array(found, wanted.dtype), wanted)
            dead += (p == of_member[4].get("start", 0)).all(1).sum()
    assert dead > 20


def test_a_group_at_its_threshold_is_zero():
    p = one_set([[-3.0, 4.0], [-3.0, 4.0], [3.0, -4.0]], [5.0, 4.0, 6.0])
    assert p.tolist() == [[0, 0], [-0.6000000238418579, 0.800000011920929], [0, 0]]
    assert not np.signbit(p[[0, 2]]).any()


def test_one_weight_may_stand_for_all_rows():
    p = one_set([[-3.0, 4.0], [-3.0, 4.5], [3.0, -4.0]], 5.0)
    assert (p == 0).all(1).tolist() == [True, False, True]


def test_a_nan_makes_its_group_nan():
    p = one_set([[np.nan, 4.0], [np.inf, 4.0], [1.0, 0.0]], [9.0, 9.0, 9.0])
    assert np.isnan(p[0]).all()
    assert p[1:].tolist() == [[np.inf, 4.0], [0.0, 0.0]]


def test_a_threshold_of_0_changes_nothing():
    p = one_set([[-0.0, 0.0], [np.nan, 1.0]], [0.0, 0.0])
    assert np.signbit(p[0]).tolist() == [True, False]
    assert p[1, 1] == 1.0


def test_zeros_of_zero_groups_are_counted():
    num_zeros = np.array([5], np.int64)
    one_set(np.ones((700, 3)), np.arange(700) % 2 * 9.0, 2, num_zeros)
    assert num_zeros[0] == 5 + 350 * 3


def test_a_group_at_its_threshold_is_its_start_to_the_bit():
    """The norm is that of the distance; the counter has what is there, and nothing that is zero."""
    rng = np.random.default_rng(12)
    start = rng.standard_normal((40, 70)).astype(np.float32)
    start[1, :6] = [0.0, 0.0, -0.0, -0.0, 1e-40, 3e38]
    away = rng.standard_normal(start.shape).astype(np.float32) * np.float32(0.1)
    norms = np.sqrt(reference.square_sums((start + away) - start))
    thresholds = np.where(np.arange(40) % 2, norms, 0.5 * norms)
    num_zeros = np.array([0], np.int64)
    p = one_set(start + away, thresholds, 2, num_zeros, start)
    reference.assert_same(p[1::2], start[1::2])
    assert (p[::2] != start[::2]).mean() > 0.9
    assert num_zeros[0] == (p == start).sum() >= 1400


def test_a_threshold_of_0_leaves_what_is_not_at_its_start():
    """start + (p - start) would round."""
    p, start = np.float32([[0.1, 1e-9, -0.0]]), np.float32([[0.7, 1.0, 0.0]])
    assert (start + (p - start) != p).any()
    reference.assert_same(one_set(p, [0.0], start=start), p)


def test_a_nan_makes_its_group_nan_also_towards_a_start():
    start = [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
    p = one_set([[np.nan, 2.0], [np.inf, 2.0], [1.5, 2.0]], [9.0, 9.0, 9.0], start=start)
    assert np.isnan(p[0]).all()
    assert p[1:].tolist() == [[np.inf, 2.0], [1.0, 2.0]]


def test_each_member_is_found_by_its_place_in_the_list():
    """Empty parameters, and those of another dtype, lie between."""
    params = [array(np.zeros((0, 2))), array([[1.0]] * 2, "float64"), array([[2.0]] * 2)]
    params += [array(np.zeros(0)), array([[3.0]] * 2)]
    reading = reader().read(params, [array(p * 0, p.dtype) for p in params], None, None, 0)
    made, kept = plan([reading], [options(lr=1.0)], [([(0, 4)], 2, 1.0, [9.0, 0.0])])
    run(made)
    assert kept
    assert [p.ravel().tolist() for p in params[1:]] == [[1.0, 1.0], [2.0, 2.0], [], [0.0, 3.0]]


def test_unlike_members_and_places_outside_are_refused():
    params = [array(np.ones((4, 3))), array(np.ones((4, 3)), "float64"), array(np.ones(5))]
    params.append(array(np.ones((0, 3))))
    reading = reader().read(params, [array(p, p.dtype) for p in params], None, None, 0)
    for members, rows, error in (
        ([(0, 0), (0, 1)], 4, ValueError),
        ([(0, 0), (0, 2)], 4, ValueError),
        ([(0, 3)], 4, ValueError),
        ([], 4, ValueError),
        ([(0, 0)], 0, ValueError),
        ([(0, 4)], 4, IndexError),
        ([(1, 0)], 4, IndexError),
        ([(0, -1)], 4, IndexError),
    ):
        with pytest.raises(error):
            plan([reading], [options(lr=1.0)], [(members, rows, 1.0, np.ones(4))])
    assert all((p == 1).all() for p in params)
    with pytest.raises(TypeError, match="tuples of a Reading, Options and a dict"):
        _C.RowPlan([reading], [])
