"""System identification in context: features that no random projection changes, as a resettable recurrence.

    state = sysid.start(o, action_size)                             # o (N, n), the first observation of a trial
    state = sysid.update(state, action, reward, o)                  # action (N, m), reward (N,), o (N, n) after it
    state = sysid.fit(state)                                        # every few steps: solve for the model
    x = sysid.features(state)                                       # (N, num_features(m)) float32

Under an unknown random matrix M, no single coordinate of an observation o = M s is informative: M is as likely as -M.
Inner products of observation vectors are: a random projection nearly preserves them (Johnson and Lindenstrauss 1984),
and every invertible projection preserves inner products in the metric of an inverse covariance. This file fits, by
ridge regression over the steps of the trial,

    o_{t+1} - o_t                       = A o_t + B a_t + c,
    (o_{t+1} - o_t) - (o_t - o_{t-1})   = ... + G_0 a_t + G_1 a_{t-1},      G = G_0 + G_1,
    r_t                                 = rho . o_t + sigma_0 . a_t + sigma_1 . a_{t-1} + tau

and returns all pairwise inner products, in three metrics, of these vectors of observation space:

    the observation, the centred observation, its last change
    the difference from the reward-weighted mean observation
    the predicted drift A o + c
    for each action, its immediate effect (a column of B), what that effect leads to (of A B), and the
    acceleration it causes when held (of G, in which velocities cancel)

These features describe the effects of the agent's actions on its observations, and have the same meaning in every
trial. A diagonal recurrence does not learn them easily: it must multiply actions by changes, average, and multiply the
average by observations again.

All sums are the recurrence of s5.py with matrices for b, x_t = a x_{t-1} + b_t with b_t = key value^T, and are reset
where a trial begins. Nothing is trained. Related: recursive least squares with forgetting; linear
attention as fast weights (Schlag et al., arXiv 2102.11174); the layer that solves a regression in context (von Oswald
et al., arXiv 2309.05858).
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORGETTING = 0.998  # the model is linear, so it holds locally: it averages over about 500 steps
RIDGE = 1e-3        # relative to the mean square, after many steps; 1/steps is added
FIT_EVERY = 4       # steps between two fits: a fit costs most of the work, and the model changes slowly


class Model(NamedTuple):
    """The model fitted to a trial's sums, zero before the first fit. Observations and changes are in their units."""

    unit: jax.Array         # (N, 1) root mean square of an observation's coordinates
    change_unit: jax.Array  # (N, 1) root mean square of a change's coordinates
    mean: jax.Array         # (N, n) observation
    drift: jax.Array        # (N, n + 1, n) A^T, and c
    effects: jax.Array      # (N, 3 m, n) of each action: B^T, (A B)^T, G^T
    slope: jax.Array        # (N, n + 2 m + 1) of the reward: rho, sigma_0, sigma_1, tau
    metrics: jax.Array      # (N, 2, n, n) inverse second moments of changes and of observations


class State(NamedTuple):
    """Sums over the steps of N trials; n observation dimensions, m action dimensions."""

    keys: jax.Array     # (N, n + 2 m + 1, n + 2 m + 1) sum of z z^T, z = [o, action, previous action, 1]
    targets: jax.Array  # (N, n + 2 m + 1, 2 n + 1) sum of z [change of o, its change, reward]^T
    changes: jax.Array  # (N, n, n) sum of changes' outer products
    rewarded: jax.Array  # (N, n) sum of reward * o, without forgetting
    reward: jax.Array   # (N, 1) sum of rewards, without forgetting
    steps: jax.Array    # (N, 1) sum of ones
    o: jax.Array        # (N, n) the last observation
    change: jax.Array   # (N, n) its change
    action: jax.Array   # (N, m) the action before it
    model: Model


def start(o: jax.Array, action_size: int) -> State:
    """State of trials whose first observations are o (N, n) float32."""
    (N, n), m = o.shape, action_size
    k = n + 2 * m + 1

    def zeros(*shape):
        return jnp.zeros((N, *shape), o.dtype)

    model = Model(zeros(1), zeros(1), zeros(n), zeros(n + 1, n), zeros(3 * m, n), zeros(k), zeros(2, n, n))
    return State(zeros(k, k), zeros(k, 2 * n + 1), zeros(n, n), zeros(n), zeros(1), zeros(1), o, zeros(n), zeros(m),
                 model)


def update(state: State, action: jax.Array, reward: jax.Array, o: jax.Array, dt: jax.Array | None = None) -> State:
    """State after a transition.

    Args:
      state: State before it.
      action: (N, m) float32, taken after observing state.o; one-hot if discrete.
      reward: (N,) float32, of the action.
      o: (N, n) float32, the observation after it.
      dt: (N,) float32, how long the action lasted, where that varies: changes and rewards are then per time.
    """
    action, reward, o = (x.astype(state.o.dtype) for x in (action, reward, o))
    change, reward = o - state.o, reward[:, None]
    if dt is not None:
        change, reward = change / dt[:, None], reward / dt[:, None]
    bend = jnp.where(state.steps > 0, change - state.change, 0.0)
    key = jnp.concatenate([state.o, action, state.action, jnp.ones_like(reward)], -1)
    target = jnp.concatenate([change, bend, reward], -1)
    return State(
        FORGETTING * state.keys + outer(key, key), FORGETTING * state.targets + outer(key, target),
        FORGETTING * state.changes + outer(change, change), state.rewarded + reward * o, state.reward + reward,
        FORGETTING * state.steps + 1.0, o, change, action, state.model)


def fit(state: State) -> State:
    """State with the model fitted to its sums."""
    n, m, k = state.o.shape[1], state.action.shape[1], state.keys.shape[1]
    steps = jnp.maximum(state.steps, 1e-3)[..., None]
    keys, targets, changes = state.keys / steps, state.targets / steps, state.changes / steps
    # in units of root mean squares, so that neither the ridge nor the features depend on the scale of o
    unit = jnp.sqrt(jnp.trace(keys[:, :n, :n], axis1=1, axis2=2)[:, None] / n + 1e-12)
    change_unit = jnp.sqrt(jnp.trace(changes, axis1=1, axis2=2)[:, None] / n + 1e-12)
    key_units = jnp.concatenate([jnp.repeat(unit, n, 1), jnp.ones((len(unit), k - n), unit.dtype)], 1)
    target_units = jnp.concatenate([jnp.repeat(change_unit, 2 * n, 1), jnp.ones_like(unit)], 1)
    keys, targets = keys / outer(key_units, key_units), targets / outer(key_units, target_units)
    changes = changes / outer(change_unit, change_unit)

    ridge = RIDGE + 1.0 / steps
    weights = solve(keys + 0.3 * ridge * jnp.eye(k, dtype=unit.dtype), targets)  # (N, k, 2 n + 1)
    A, B, c = weights[:, :n, :n], weights[:, n:n + m, :n], weights[:, -1:, :n]
    bend = weights[:, n:n + m, n:-1] + weights[:, n + m:n + 2 * m, n:-1]
    bend = bend * jax.lax.rsqrt((bend**2).sum((1, 2), keepdims=True) + 1e-8)  # small against changes: only directions
    effects = jnp.concatenate([B, matmul(B * (change_unit / unit)[..., None], A), bend], 1)
    moments = jnp.stack([changes, keys[:, :n, :n]], 1) + 3 * ridge[:, None] * jnp.eye(n, dtype=unit.dtype)
    metrics = solve(moments, jnp.broadcast_to(jnp.eye(n, dtype=unit.dtype), moments.shape))
    return state._replace(model=Model(unit, change_unit, keys[:, :n, -1], jnp.concatenate([A, c], 1), effects,
                                      weights[..., -1], metrics))


def num_features(action_size: int) -> int:
    """Size of the features for actions of this size."""
    vectors = 5 + 3 * action_size
    return 3 * vectors * (vectors + 1) // 2 + vectors + 2 * action_size + 1


def features(state: State) -> jax.Array:
    """Inner products that are nearly independent of the projection.

    Returns:
      (N, num_features(m)) float32, compressed by arcsinh; zero before the first fit of a trial. A rotation or
      scaling of all observations of a trial leaves them unchanged.
    """
    n, model = state.o.shape[1], state.model
    fitted = model.unit > 0
    unit, change_unit = (jnp.where(fitted, x, 1.0) for x in (model.unit, model.change_unit))
    o, change = state.o / unit, state.change / change_unit
    goal = jnp.where(state.reward > 0, state.rewarded / (state.reward + 1e-3) / unit, o)
    drift = (o[:, :, None] * model.drift[:, :n]).sum(1) + model.drift[:, n]
    vectors = jnp.concatenate([jnp.stack([o, o - model.mean, change, goal - o, drift], 1), model.effects], 1)
    duals = jnp.concatenate([vectors[:, None], matmul(vectors[:, None], model.metrics)], 1)  # in three metrics
    i, j = np.triu_indices(vectors.shape[1])
    pairs = matmul(vectors[:, None], duals.mT)[..., i, j].reshape(len(o), -1)
    found = jnp.concatenate([pairs, (vectors * model.slope[:, None, :n]).sum(-1), model.slope[:, n:]], -1)
    return jnp.where(fitted, jnp.arcsinh(found), 0.0)


def outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """(N, i), (N, j) -> (N, i, j)."""
    return x[:, :, None] * y[:, None, :]


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """(N, i, k), (N, k, j) -> (N, i, j) in full float32.

    By default a GPU multiplies with ten bits of mantissa, and an inverse covariance magnifies the rounding.
    """
    return jnp.matmul(a, b, precision="highest")


def solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^{-1} b for symmetric positive definite a (..., k, k) and b (..., k, j), by Gauss-Jordan without pivots.

    LAPACK would deadlock: on a CPU each of jaxlib's batched routines holds a thread of XLA's pool while it waits for
    other threads of the pool, so as many concurrent calls as there are threads wait forever.
    """
    k = a.shape[-1]

    def eliminate(i, m):
        row = m[..., i, :] / m[..., i, i, None]
        return (m - m[..., :, i, None] * row[..., None, :]).at[..., i, :].set(row)

    return jax.lax.fori_loop(0, k, eliminate, jnp.concatenate([a, b], -1))[..., k:]
