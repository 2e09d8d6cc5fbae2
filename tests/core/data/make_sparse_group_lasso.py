"""Writes sparse_group_lasso.json: skglm's solutions of problems with groups of unequal sizes.

skglm isn't a dependency of the tests: it brings numba and llvmlite, and compiles when used.
Version 0.5, from the repository's root, in an environment of its own:

    pip install skglm==0.5
    python tests/core/data/make_sparse_group_lasso.py

The problem is minimise ½/n·‖X·w - y‖² + Σ_g weights_g·‖w_g‖₂ + l1·‖w‖₁ over groups of neighbours,
whose numbers the file holds too.
"""

import json
from pathlib import Path

import numpy as np

SIZES = [1, 5, 2, 9, 3, 3, 12, 1, 4]
L1 = 0.04
LASSO = 0.08


def problem():
    """X (90, 40) and y (90,), by chance, rounded so that the file can hold them."""
    generator = np.random.default_rng(7)
    x = generator.standard_normal((90, sum(SIZES)))
    x[:, 3:] += 0.5 * x[:, :-3]
    ends = np.cumsum(SIZES)
    truth = np.zeros(sum(SIZES))
    for g in (0, 1, 5, 6):
        truth[ends[g] - SIZES[g] : ends[g]] = generator.standard_normal(SIZES[g])
    truth[ends[6] - 6 : ends[6]] = 0
    return x.round(3), (x @ truth + 0.3 * generator.standard_normal(90)).round(3)


def solved(x, y, weights, l1):
    """The minimiser, by block coordinate descent."""
    from skglm.datafits import QuadraticGroup
    from skglm.penalties import WeightedGroupL2, WeightedL1GroupL2
    from skglm.solvers import GroupBCD
    from skglm.utils.data import grp_converter

    indices, pointers = grp_converter(SIZES, len(x[0]))
    if l1:
        # skglm 0.5 takes feature g's weight for all of group g: they must be equal.
        penalty = WeightedL1GroupL2(1.0, weights, np.full(len(x[0]), l1), pointers, indices)
    else:
        penalty = WeightedGroupL2(1.0, weights, pointers, indices)
    solver = GroupBCD(max_iter=10_000, max_epochs=10_000, tol=1e-13, ws_strategy="fixpoint")
    return solver.solve(x, y, QuadraticGroup(pointers, indices), penalty)[0]


def main():
    import skglm

    x, y = problem()
    weights = LASSO * np.sqrt(SIZES)
    solutions = {name: solved(x, y, weights, l1).tolist() for name, l1 in CASES.items()}
    file = Path(__file__).with_name("sparse_group_lasso.json")
    data = {
        "skglm": skglm.__version__,
        "sizes": SIZES,
        "weights": weights.tolist(),
        "x": x.tolist(),
        "y": y.tolist(),
        "solutions": solutions,
    }
    file.write_text(json.dumps(data) + "\n")


CASES = {"groups": 0.0, "sparse groups": L1}

if __name__ == "__main__":
    main()
