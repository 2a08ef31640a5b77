"""A resettable S5 layer whose states are vectors of observation space, read out by regression.

    net = VectorS5(features=64, scalars=3, vectors=2, size=12, actions=2)
    state = net.zero_state((batch,))
    params = net.init(key, state, s, v, reset)
    state, y = net.apply(params, state, s, v, reset)                               # a sequence
    state, y = net.apply(params, state, s[0], v[0], reset[0], method="step")       # one step

Shapes: s (T, batch, 3), v (T, batch, 2, 12), reset (T, batch) bool, y (T, batch, 64). jax and flax only.

Why. Under a random projection the coordinates of an observation mean nothing: a Gaussian matrix is as
likely as any rotation of it. What an agent can learn are relations between vectors. So this layer is
linear in the vectors v (the observation and its change), the scalars s (the last action, the reward)
decide what is stored, and only inner products are read out. Rotating all vectors of a trial changes no
output (tested).

States. Each is the recurrence of S5, x_t = a x_{t-1} + b_t with a = exp(-dt), a learned dt > 0, and is
cleared where reset_t:

    p, w     traces of B s and of v          b = (1 - a) u, the zero-order hold of dx/dt = u - x
    z z^T    K x K                           keys z_t = [1, s_t, p_{t-1}]
    z x^T    K x J vectors                   values x_t = C [v_t, w_{t-1}]
    v v^T    V matrices n x n                the second moments of the vectors

Read-out. Ridge regression over the trial so far estimates how each key moves each value,
W = (sum z z^T + ridge)^-1 sum z x^T. Without the inverse this is linear attention, with it the mesa layer
of von Oswald et al. (arXiv 2309.05858). A learned matrix mixes the K J vectors of W into Q vectors u_q.
At initialisation they are what an action does to the last of v at once, later, and to its bend; what it
does to the first of v later; and the mean of the first of v, weighted by the other scalars. The u_q are
compared with each other, with x_t and with the error x_t - W^T z_t by inner products in V + 1 metrics:
the plain one, and the inverse second moment of each of v, which every invertible projection preserves.
In each metric u_q has length 1. A dense layer maps the inner products to y.

W and the metrics are computed in every `stride`-th step, counted from `zero_state`, and held in between.
A sequence must begin at such a step. A reset clears what is held as well; y is 0 until the next such step.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Held(NamedTuple):
    """What is computed in every stride-th step, with the batch axes first; J = M = V + 1."""

    unit: Any  # (..., J) one over the root mean square of a value's numbers; 0 if nothing is held
    weights: Any  # (..., K, J n) W, of values in these units
    dual: Any  # (..., Q M, n) u_q times each metric, scaled to length 1
    found: Any  # (..., H) the part of y that depends on the u_q alone


class State(NamedTuple):
    """The hidden state, with the batch axes first."""

    traces: Any  # (..., P) p
    lagged: Any  # (..., V n) w
    sums: Any  # (..., K K + K J n + J) of z z^T, z x^T and |x|^2
    moments: Any  # (..., V n n) sum of v v^T
    held: Held
    phase: Any  # (...,) int32, steps since W was computed


def recurrence(a, b, x0, reset, parallel):
    """x_t = a (0 if reset_t else x_{t-1}) + b_t, with x_{-1} = x0.

    Args:
      a: (P,) decays.
      b: (T, ..., P) drives.
      x0: (..., P).
      reset: (T, ...) bool. A reset is a_t = 0, under which the operator stays associative (see s5.py).
      parallel: logarithmic depth instead of a loop.

    Returns:
      (T, ..., P) states.
    """
    keep = jnp.logical_not(reset)[..., None]
    if parallel:
        a = jnp.where(keep, a, 0.0)
        b = b.at[0].add(a[0] * x0)

        def combine(i, j):
            return j[0] * i[0], j[0] * i[1] + j[1]

        return lax.associative_scan(combine, (jnp.broadcast_to(a, b.shape), b))[1]

    def step(x, inputs):
        x = a * jnp.where(inputs[1], x, 0.0) + inputs[0]
        return x, x

    return lax.scan(step, x0, (b, keep))[1]


def earlier(x, x0, reset):
    """x (T, ..., P) one step earlier: x0 before it, 0 where reset (T, ...)."""
    return jnp.where(reset[..., None], 0.0, jnp.concatenate([x0[None], x[:-1]]))


def cleared(tree, mask):
    """Leaves (*mask.shape, ...) of tree, 0 where mask."""

    def clear(x):
        return jnp.where(jnp.expand_dims(mask, tuple(range(mask.ndim, x.ndim))), 0, x)

    return jax.tree.map(clear, tree)


def matmul(a, b):
    """Matrix product in full float32, also on a GPU: an inverse magnifies rounding errors."""
    return jnp.matmul(a, b, precision="highest")


@jax.custom_vjp
def inverse(m):
    """Inverse of symmetric positive definite m (..., k, k) by Gauss-Jordan elimination, no pivots."""
    k = m.shape[-1]
    eye = jnp.eye(k)[..., None]

    def eliminate(i, m):
        row, column = m[i], lax.dynamic_index_in_dim(m, i, 1, keepdims=False)
        pivot = lax.dynamic_index_in_dim(row, i, 0, keepdims=False)
        return m - (column - eye[i])[:, None] * ((row + eye[i]) / pivot)

    batch_last = jnp.moveaxis(m.reshape(-1, k, k), 0, -1)
    return jnp.moveaxis(lax.fori_loop(0, k, eliminate, batch_last), -1, 0).reshape(m.shape)


inverse.defvjp(lambda m: (inverse(m),) * 2, lambda inv, g: (-matmul(matmul(inv, g), inv),))


def squash(x):
    """An odd function that grows like a square root."""
    return x * lax.rsqrt(1 + jnp.abs(x))


class VectorS5(nn.Module):
    """The layer described at the top of this file.

    Args:
      features: H, size of the output.
      scalars: S, of which the first `actions` are the last action.
      vectors: V.
      size: n, dimensions of a vector.
      queries: Q, number of vectors u_q.
      lags: initial decays a of the traces; each action has one trace per lag, each vector one with lags[0].
      horizon: steps that the sums remember at initialisation.
      ridge: of the mean square, after many steps; more after few.
      stride: steps between two regressions.
      parallel: scan with logarithmic depth, or a loop; None: a loop on a CPU.
    """
    features: int
    scalars: int
    vectors: int
    size: int
    actions: int
    queries: int = 10
    lags: tuple = (0.05, 0.8)
    horizon: float = 500.0
    ridge: float = 1e-3
    stride: int = 4
    parallel: Any = None

    @property
    def num_traces(self):
        return self.actions * len(self.lags)  # P

    @property
    def num_keys(self):
        return 1 + self.scalars + self.num_traces  # K

    @property
    def num_values(self):
        return self.vectors + 1  # J, which is also the number M of metrics

    @nn.nowrap
    def zero_state(self, batch):
        """State of trials that have not begun, leaves (*batch, ...) float32."""
        K, J, V, n = self.num_keys, self.num_values, self.vectors, self.size

        def zeros(*shape):
            return jnp.zeros((*batch, *shape))

        held = Held(zeros(J), zeros(K, J * n), zeros(self.queries * J, n), zeros(self.features))
        return State(zeros(self.num_traces), zeros(V * n), zeros(K * K + K * J * n + J),
                     zeros(V * n * n), held, jnp.zeros(batch, jnp.int32))

    def setup(self):
        J, V, Q, H = self.num_values, self.vectors, self.queries, self.features
        count = J * (Q * Q + Q + 2 * Q * J) + J * J + J  # inner products

        def log_dt(a):
            return lambda key: jnp.log(-jnp.log(jnp.asarray(a, jnp.float32)))

        def normal(key, shape):
            return jax.random.normal(key, shape) * count ** -0.5

        def copies(key):
            return jnp.tile(jnp.eye(self.scalars, self.actions), (1, len(self.lags)))

        def values(key):  # v, and the last of v minus its trace
            last, trace = np.arange(2 * V) == V - 1, np.arange(2 * V) == 2 * V - 1
            return jnp.asarray(np.r_[np.eye(V, 2 * V), [last - 1.0 * trace]], jnp.float32)

        self.trace_dt = self.param("trace_dt", log_dt(np.repeat(self.lags, self.actions)))
        self.lagged_dt = self.param("lagged_dt", log_dt(np.full(V, self.lags[0])))
        self.sums_dt = self.param("sums_dt", log_dt([np.exp(-1 / self.horizon)]))
        self.B = self.param("B", copies)
        self.C = self.param("C", values)
        self.mix = self.param("mix", self._mix)
        self.alone = self.param("alone", normal, (J * (Q * Q + Q), H))
        self.crossed = self.param("crossed", normal, (2 * J * Q * J, H))
        self.lengths = self.param("lengths", normal, (J * J + J, H))
        self.bias = self.param("bias", nn.initializers.zeros, (H,))

    def _mix(self, key):
        """(Q, K J), how the u_q are mixed of W at first; see the top of this file."""
        K, S, A, V = self.num_keys, self.scalars, self.actions, self.vectors
        action = [1 + i for i in range(A)]  # keys of the last action ...
        previous = [1 + S + i for i in range(A)]  # ... of its first trace ...
        held = [K - A + i for i in range(A)]  # ... and of its last
        entries = [[(k, V - 1)] for k in action]
        entries += [[(k, V), (lagged, V)] for k, lagged in zip(action, previous)]
        entries += [[(k, V - 1)] for k in held] + [[(k, 0)] for k in held]
        entries += [[(k, 0)] for k in (*range(1 + A, 1 + S), 0)]
        mix = 0.02 * jax.random.normal(key, (self.queries, K, self.num_values))
        for q, entry in enumerate(entries[:self.queries]):
            for k, j in entry:
                mix = mix.at[q, k, j].add(1.0)
        return mix.reshape(self.queries, -1)

    def _traces(self, s, v):
        """Decays and drives of p, then of w."""
        a = jnp.exp(-jnp.exp(self.trace_dt))
        lag = jnp.repeat(jnp.exp(-jnp.exp(self.lagged_dt)), self.size)
        return a, (1 - a) * (s @ self.B), lag, (1 - lag) * v.reshape(*v.shape[:-2], -1)

    def _sums(self, s, v, p, w):
        """z (..., K), x (..., J, n), decays and drives of sums and of moments; p, w: one step earlier."""
        lead = s.shape[:-1]
        z = jnp.concatenate([jnp.ones_like(s[..., :1]), s, p], -1)
        x = jnp.einsum("jv,...vn->...jn", self.C, jnp.concatenate([v, w.reshape(v.shape)], -2))
        products = [(z[..., :, None] * y[..., None, :]).reshape(*lead, -1)
                    for y in (z, x.reshape(*lead, -1))]
        sums = jnp.concatenate([*products, jnp.square(x).sum(-1)], -1)
        moments = (v[..., :, :, None] * v[..., :, None, :]).reshape(*lead, -1)
        a = jnp.exp(-jnp.exp(self.sums_dt))
        a_moments = lax.stop_gradient(jnp.broadcast_to(a, moments.shape[-1:]))
        return z, x, jnp.broadcast_to(a, sums.shape[-1:]), sums, a_moments, moments

    def _hold(self, sums, moments):
        """W, the metrics and what follows from them alone, from the sums and moments."""
        K, J, V, Q, n = self.num_keys, self.num_values, self.vectors, self.queries, self.size
        lead, M = sums.shape[:-1], J
        eye = np.eye(n, dtype=np.float32)
        zz = sums[..., :K * K].reshape(*lead, K, K)
        zx = sums[..., K * K:-J].reshape(*lead, K, J, n)
        count = lax.stop_gradient(sums[..., :1])
        ridge = (self.ridge + 1 / count)[..., None]
        unit = lax.rsqrt(lax.stop_gradient(sums[..., -J:]) / (n * count) + 1e-12)
        weights = inverse(zz / count[..., None] + 0.3 * ridge * np.eye(K, dtype=np.float32))
        zx = zx * (unit / count)[..., None, :, None]
        weights = matmul(weights, zx.reshape(*lead, K, J * n))
        moments = moments.reshape(*lead, V, n, n)
        moments = moments * n / ((moments * eye).sum((-2, -1), keepdims=True) + 1e-9)
        metrics = lax.stop_gradient(inverse(moments + 3 * ridge[..., None] * eye))
        metrics = jnp.concatenate([jnp.broadcast_to(eye, (*lead, 1, n, n)), metrics], -3)

        u = jnp.einsum("qk,...kn->...qn", self.mix, weights.reshape(*lead, K * J, n))
        side_by_side = jnp.swapaxes(metrics, -3, -2).reshape(*lead, n, M * n)
        dual = matmul(u, side_by_side).reshape(*lead, Q * M, n)
        square = (dual.reshape(*lead, Q, M, n) * u[..., None, :]).sum(-1) + 1e-4  # (..., Q, M)
        scale = lax.rsqrt(square)
        cosine = matmul(dual, u.mT).reshape(*lead, Q, M, Q)
        cosine = cosine * scale[..., None] * scale.mT[..., None, :, :]
        found = [squash(2 * cosine), 1 + 0.3 * jnp.log(square)]
        found = jnp.concatenate([y.reshape(*lead, -1) for y in found], -1) @ self.alone + self.bias
        return Held(unit, weights, dual * (scale.reshape(*lead, Q * M, 1) * n ** -0.5), found)

    def _read(self, held, z, x):
        """held (B, ...), z (B, c, K), x (B, c, J, n) -> (B, c, H): c steps that share what is held."""
        B, c, J, n = x.shape
        x = x * held.unit[:, None, :, None]
        error = x - matmul(z, held.weights).reshape(x.shape)
        both = jnp.concatenate([x, error], -2).reshape(B, c * 2 * J, n)
        crossed = matmul(both, held.dual.mT).reshape(B, c, -1)
        lengths = [(x[..., i, None, :] * x).sum(-1) for i in range(J)] + [jnp.square(error).sum(-1)]
        found = held.found[:, None] + squash(2 * crossed) @ self.crossed
        found += squash(jnp.concatenate(lengths, -1) / n) @ self.lengths
        return jnp.where(held.unit[:, None, :1] > 0, found, 0.0)

    def __call__(self, state, s, v, reset):
        """s (T, N, S), v (T, N, V, n), reset (T, N) bool -> (State, y (T, N, H)); see `stride`."""
        (T, N), c = reset.shape, self.stride
        parallel = self.parallel if self.parallel is not None else jax.default_backend() != "cpu"

        def run(a, b, x0):
            return recurrence(a, b, x0, reset, parallel)

        a, b, lag, d = self._traces(s, v)
        p, w = run(a, b, state.traces), run(lag, d, state.lagged)
        z, x, a, b, a_moments, d = self._sums(
            s, v, earlier(p, state.traces, reset), earlier(w, state.lagged, reset))
        sums, moments = run(a, b, state.sums), run(a_moments, d, state.moments)

        def flat(x):
            return x.reshape(-1, *x.shape[2:])

        def chunks(x):  # (T, N, ...) -> (ceil(T / c) N, c, ...)
            x = jnp.pad(x, [(0, -T % c)] + [(0, 0)] * (x.ndim - 1))
            return flat(jnp.swapaxes(x.reshape(-1, c, *x.shape[1:]), 1, 2))

        held = self._hold(flat(sums[::c]), flat(moments[::c]))
        gone = jnp.cumsum(chunks(reset.at[::c].set(False)), 1) > 0
        y = jnp.where(gone[..., None], 0.0, self._read(held, chunks(z), chunks(x)))
        y = jnp.swapaxes(y.reshape(-1, N, c, self.features), 1, 2)
        y = y.reshape(-1, N, self.features)[:T]
        held = cleared(jax.tree.map(lambda x: x[-N:], held), gone[-N:, -1])
        return State(p[-1], w[-1], sums[-1], moments[-1], held, jnp.full(N, T % c, jnp.int32)), y

    def step(self, state, s, v, reset):
        """s (N, S), v (N, V, n), reset (N,) bool -> (State, y (N, H)), the same result as `__call__`."""
        old = cleared(state._replace(phase=None), reset)
        a, b, lag, d = self._traces(s, v)
        z, x, a_sums, b_sums, a_moments, b_moments = self._sums(s, v, old.traces, old.lagged)
        sums, moments = a_sums * old.sums + b_sums, a_moments * old.moments + b_moments
        due = state.phase == 0
        new = lax.cond(due.any(), lambda: self._hold(sums, moments), lambda: old.held)
        held = jax.tree.map(jnp.add, cleared(new, ~due), cleared(old.held, due))
        y = self._read(held, z[:, None], x[:, None])[:, 0]
        return State(a * old.traces + b, lag * old.lagged + d, sums, moments, held,
                     (state.phase + 1) % self.stride), y
