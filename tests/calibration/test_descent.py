"""The descent, held against scipy's on convex and on curved valleys."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize

from headprobe.calibration.descent import Descent

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


def quadratic(seed: int, dim: int = 16) -> Function:
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(2 * dim, dim)) * np.geomspace(1, 0.05, dim)
    centre = generator.normal(size=dim)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        off = root @ (x - centre)
        return float(off @ off), 2 * root.T @ off

    return value


def softmax(seed: int, dim: int = 8) -> Function:
    """Mean NLL of a linear classifier in its shared input: what a constant of the last layer is."""
    generator = np.random.default_rng(seed)
    weight, inputs = generator.normal(size=(5, dim)), generator.normal(size=(60, 5)) * 2
    labels = generator.integers(0, 5, 60)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits = inputs + weight @ x
        logits = logits - logits.max(1, keepdims=True)
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -np.log(chances[np.arange(60), labels]).mean()
        chances[np.arange(60), labels] -= 1
        return float(loss), weight.T @ chances.mean(0)

    return value


def descend(function: Function, start: np.ndarray, passes: int) -> Descent:
    descent = Descent(start)
    for _ in range(passes):
        if descent.converged:
            break
        descent.take(*function(descent.trial))
    return descent


@pytest.mark.parametrize("make", [quadratic, softmax])
@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_minimum_that_scipy_finds(make: Callable[[int], Function], seed: int) -> None:
    function = make(seed)
    dim = 16 if make is quadratic else 8
    found = descend(function, np.ones(dim), 200)
    best = minimize(function, np.ones(dim), jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-14})
    assert found.converged
    assert found.best_loss - best.fun < 1e-4
    assert found.best_loss == function(found.best)[0]


def test_the_best_so_far_is_never_worse_than_the_start() -> None:
    def upside_down(x: np.ndarray) -> tuple[float, np.ndarray]:
        return float("nan") if x[0] > 0.5 else -float(x @ x), -2 * x

    descent = descend(upside_down, np.full(3, 0.1), 20)
    assert descent.best_loss <= descent.start_loss
    assert np.isfinite(descent.best).all()


def test_a_start_at_the_minimum_has_converged_after_one_pass() -> None:
    descent = descend(lambda x: (float(x @ x), 2 * x), np.zeros(4), 5)
    assert descent.converged
    np.testing.assert_array_equal(descent.best, 0)
