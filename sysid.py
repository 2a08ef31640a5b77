"""System identification in context: what a random projection cannot hide, as a resettable recurrence.

    state = sysid.start(o, action_size)                             # o (N, n), the first observation of a trial
    state = sysid.update(state, action, reward, o)                  # action (N, m), reward (N,), o (N, n) after it
    x = sysid.features(state)                                       # (N, num_features(m)) float32

An agent that meets observations o = M s through an unknown random matrix M can trust no single number of o: M is as
likely as -M. What it can trust are inner products of observation vectors, which a random projection nearly keeps
(Johnson and Lindenstrauss 1984), and inner products in the metric of an inverse covariance, which every invertible
projection keeps. So this file fits, by ridge regression over the steps of the trial,

    o_{t+1} - o_t = A o_t + B a_t + c,      r_t = rho . o_t + sigma . a_t + tau

and gives the inner products of these vectors of observation space, all pairs, in three metrics: the centred
observation, its last change, the predicted drift A o + c, the way to the reward-weighted mean observation, what each
action does (the columns of B) and what that leads to (those of A B). They tell what the agent's own actions do to its
own observations, in numbers that mean the same in every trial. A diagonal recurrence cannot learn this easily: it has
to multiply actions by changes, average, and multiply the average by observations again.

All sums are the recurrence of s5.py with matrices for b, x_t = a x_{t-1} + b_t with b_t = key value^T, and are cleared
with the memory. There is nothing to train. Related: recursive least squares with forgetting; linear attention as
fast weights (Schlag et al., arXiv 2102.11174); the layer that solves a regression in context (von Oswald et al.,
arXiv 2309.05858).
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

FORGETTING = 0.998  # a linear model holds near where the trial is: the last five hundred steps count
RIDGE = 1e-3        # of the mean square, after many steps; more when there are few


class State(NamedTuple):
    """Sums over the steps of N running trials; n observation dimensions, m action dimensions."""

    keys: jax.Array     # (N, n + m + 1, n + m + 1) sum of z z^T, z = [o, a, 1]
    targets: jax.Array  # (N, n + m + 1, n + 1) sum of z [change of o, reward]^T
    changes: jax.Array  # (N, n, n) sum of changes' outer products
    rewarded: jax.Array  # (N, n) sum of reward * o, never forgotten
    reward: jax.Array   # (N,) sum of rewards, never forgotten
    steps: jax.Array    # (N,) sum of ones
    o: jax.Array        # (N, n) the last observation ...
    change: jax.Array   # (N, n) ... and its change


def start(o: jax.Array, action_size: int) -> State:
    """The state of trials that begin with the observations o (N, n) float32."""
    N, n = o.shape
    k = n + action_size + 1
    return State(jnp.zeros((N, k, k)), jnp.zeros((N, k, n + 1)), jnp.zeros((N, n, n)), jnp.zeros((N, n)), jnp.zeros(N),
                 jnp.zeros(N), o, jnp.zeros_like(o))


def update(state: State, action: jax.Array, reward: jax.Array, o: jax.Array) -> State:
    """Take in a transition: action (N, m) float32 in state.o gave reward (N,) and o (N, n)."""
    change = o - state.o
    key = jnp.concatenate([state.o, action, jnp.ones_like(reward)[:, None]], -1)
    target = jnp.concatenate([change, reward[:, None]], -1)
    return State(
        FORGETTING * state.keys + outer(key, key), FORGETTING * state.targets + outer(key, target),
        FORGETTING * state.changes + outer(change, change), state.rewarded + reward[:, None] * o,
        state.reward + reward, FORGETTING * state.steps + 1.0, o, change)


def num_features(action_size: int) -> int:
    """How many numbers `features` gives."""
    vectors = 4 + 2 * action_size
    return 3 * vectors * (vectors + 1) // 2 + vectors + action_size + 1


def features(state: State) -> jax.Array:
    """Inner products that mean the same under (nearly) every projection.

    Returns:
      (N, num_features(m)) float32, compressed by arcsinh; zero for a trial without any step. Rotating all
      observations of a trial changes nothing, nor does their unit.
    """
    n, k = state.o.shape[1], state.keys.shape[1]
    steps = jnp.maximum(state.steps, 1e-3)[:, None, None]
    keys, targets, changes = state.keys / steps, state.targets / steps, state.changes / steps
    # observations and changes in units of their root mean square, so that the ridge and the features have none
    unit = jnp.sqrt(jnp.trace(keys[:, :n, :n], axis1=1, axis2=2) / n + 1e-12)[:, None]
    change_unit = jnp.sqrt(jnp.trace(changes, axis1=1, axis2=2) / n + 1e-12)[:, None]
    key_units = jnp.concatenate([jnp.broadcast_to(unit, state.o.shape), jnp.ones((len(unit), k - n))], -1)
    target_units = jnp.concatenate([jnp.broadcast_to(change_unit, state.o.shape), jnp.ones_like(unit)], -1)
    keys, targets = keys / outer(key_units, key_units), targets / outer(key_units, target_units)
    changes = changes / outer(change_unit, change_unit)
    ridge = RIDGE + 1.0 / steps
    weights = solve(keys + 0.3 * ridge * jnp.eye(k), targets)                  # (N, k, n + 1)

    o, mean = state.o / unit, keys[:, :n, -1]
    goal = jnp.where(state.reward[:, None] > 0, state.rewarded / (state.reward[:, None] + 1e-3) / unit, o)
    effect = weights[:, n:-1, :n]                                              # (N, m, n): B^T
    drift = jnp.concatenate([o[:, None], effect * (change_unit / unit)[..., None]], 1) @ weights[:, :n, :n]
    drift = drift.at[:, 0].add(weights[:, -1, :n])                             # A o + c and (A B)^T
    vectors = jnp.concatenate(
        [jnp.stack([o - mean, state.change / change_unit, goal - o], 1), effect, drift], 1)

    def whiten(moments):  # vectors (N, vectors, n) times the inverse of moments (N, n, n)
        return solve(moments + 3 * ridge * jnp.eye(n), vectors.mT).mT

    i, j = jnp.triu_indices(vectors.shape[1])
    in_three_metrics = [(vectors[:, i] * dual[:, j]).sum(-1)
                        for dual in (vectors, whiten(changes), whiten(keys[:, :n, :n]))]
    slope = weights[..., n]                                                    # of the reward: rho, sigma, tau
    found = jnp.concatenate([*in_three_metrics, (vectors * slope[:, None, :n]).sum(-1), slope[:, n:]], -1)
    return jnp.where(state.steps[:, None] > 0, jnp.arcsinh(found), 0.0)


def outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """(N, i), (N, j) -> (N, i, j)."""
    return x[:, :, None] * y[:, None, :]


def solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^{-1} b for symmetric positive definite a (N, k, k) and b (N, k, j)."""
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a), True), b)
