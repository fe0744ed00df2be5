"""Minimises a function of each head's constant, all heads in step: L-BFGS with backtracking, one evaluation a pass.

One pass over the calibration images gives the loss of every head's trial constant and its gradient, all at once. So
every head has a descent of its own, and all heads propose their next trial together. Nothing is random.

Source: Nocedal & Wright, 2006, Numerical Optimization, algorithms 7.4 and 3.1.
"""

import numpy as np

from headprobe.metrics.arrays import FloatArray

MEMORY = 10  # pairs of steps and gradient changes that the curvature is taken from
SUFFICIENT = 1e-4  # of the decrease that the slope promises (Armijo)
GAIN = 1e-6  # nats: a head is done where no step of several in a row promises more
SMALL_STEPS = 3  # in a row
FIRST_STEP = 0.1  # of the length of the start, where nothing is known of the curvature


class Descent:
    """The descent of one head's constant.

    Attributes:
        best: The best constant so far `[head_dim]`; the start is one of them.
        best_loss: Its loss; infinite before the first pass.
        start_loss: The loss of the start.
        converged: No further step promises as much as `GAIN`.
    """

    def __init__(self, start: FloatArray) -> None:
        self.best = start.copy()
        self.best_loss = self.start_loss = np.inf
        self.converged = False
        self._scale = max(float(np.linalg.norm(start)), 1e-3)
        self._point, self._loss, self._gradient = start.copy(), np.inf, np.zeros_like(start)
        self._direction, self._step = np.zeros_like(start), 0.0
        self._pairs: list[tuple[FloatArray, FloatArray]] = []
        self._small = 0

    @property
    def trial(self) -> FloatArray:
        """The constant to evaluate in the next pass."""
        return self._point + self._step * self._direction

    def take(self, loss: float, gradient: FloatArray) -> None:
        """Take the loss of the trial and its gradient `[head_dim]`, and choose the next trial."""
        if self.converged:
            return
        trial = self.trial
        if loss < self.best_loss:
            self.best, self.best_loss = trial, loss
        if np.isinf(self._loss):  # the start
            self.start_loss = loss
            self._accept(trial, loss, gradient)
            return

        slope = float(self._gradient @ self._direction)
        if np.isfinite(loss) and loss <= self._loss + SUFFICIENT * self._step * slope:
            self._accept(trial, loss, gradient)
            return
        # the minimum of the parabola through both losses and the slope, kept within a tenth and a half of the step
        curve = 2 * (loss - self._loss - self._step * slope)
        least = -slope * self._step**2 / curve if np.isfinite(curve) and curve > 0 else 0.0
        self._step = float(np.clip(least, 0.1 * self._step, 0.5 * self._step))
        if -slope * self._step < GAIN:
            self.converged = True

    def _accept(self, point: FloatArray, loss: float, gradient: FloatArray) -> None:
        """Go on from a point, in the direction that the last gradients give."""
        moved, changed = point - self._point, gradient - self._gradient
        # a pair of negative curvature would turn the direction uphill
        if np.isfinite(self._loss) and float(moved @ changed) > 1e-12 * float(changed @ changed):
            self._pairs = [*self._pairs, (moved, changed)][-MEMORY:]
        self._point, self._loss, self._gradient = point, loss, gradient
        self._direction = _direction(gradient, self._pairs)
        length = float(np.linalg.norm(self._direction))
        self._step = 1.0 if self._pairs else min(1.0, FIRST_STEP * self._scale / max(length, 1e-12))

        promised = -float(gradient @ self._direction) / 2 * (1.0 if self._pairs else 2 * self._step)
        # one small step may be a poor direction; several in a row are the end
        self._small = self._small + 1 if promised < GAIN else 0
        if not np.isfinite(loss) or self._small == SMALL_STEPS or not float(np.abs(gradient).max()) > 0:
            self.converged = True


def _direction(gradient: FloatArray, pairs: list[tuple[FloatArray, FloatArray]]) -> FloatArray:
    """Return minus the inverse curvature times the gradient, by the two loops over the last pairs."""
    found = gradient.copy()
    weights = []
    for moved, changed in reversed(pairs):
        weight = float(moved @ found) / float(moved @ changed)
        found = found - weight * changed
        weights.append(weight)
    if pairs:
        moved, changed = pairs[-1]
        found = found * (float(moved @ changed) / float(changed @ changed))
    for (moved, changed), weight in zip(pairs, reversed(weights), strict=True):
        found = found + moved * (weight - float(changed @ found) / float(moved @ changed))
    return -found
