"""A resettable layer with the recurrence of S5, which stores vectors and reads them out by regression.

    net = VectorS5(features=64, scalars=3, vectors=2, size=12, actions=2)
    state = net.zero_state((batch,))
    params = net.init(key, state, s, v, reset)
    state, y = net.apply(params, state, s, v, reset)                               # a sequence
    state, y = net.apply(params, state, s[0], v[0], reset[0], method="step")       # one step

Shapes: s (T, batch, 3), v (T, batch, 2, 12), reset (T, batch) bool, y (T, batch, 64). Needs s5.py.

Why. A random projection is as likely as any rotation of it, so only relations between vectors can be learned.
This layer stores products of vectors v (the observation and its change) and scalars s (the last action, the
reward). Only inner products of vectors are read out: no rotation changes the output (tested).

States. V vectors have n numbers each, there are K keys and J values. Each state h, which
resets set to 0, follows the recurrence of S5, h_t = a h_{t-1} + b_t with a = exp(-dt), dt > 0 learned. Left: b_t.

    (1 - a) B s, (1 - a) v   traces p and w, the zero-order hold of dh/dt = u - h
    z z^T    K x K           keys z_t = [1, s_t, p_{t-1}]
    z x^T    K x J vectors   values x_t = C [v_t, w_{t-1}], J = V + 1
    g x, g   of the first x  g_t = exp(f . s_t), so that sum g x / sum g is attention
    v v^T    V x n x n       the second moments of the vectors

B, C and f are learned. Ridge regression over the trial so far estimates how each key moves each value,
W = (sum z z^T + ridge)^-1 sum z x^T. Without the inverse this is linear attention, with it the mesa layer
of von Oswald et al. (arXiv 2309.05858). A learned matrix mixes the K J vectors of W into Q vectors u_q.

Read-out. y is a dense layer of inner products: of the u_q with each other, with x_t, with the error
x_t - W^T z_t, and with the first value minus the goal, which is the attention above (at first, f weights
observations by their reward). Inner products are taken in J metrics: the plain one, and for each v its inverse
second moment, in which every invertible projection preserves them. Each u_q has length 1 in each metric, and
x_t is in units of its root mean square. The logarithms of these units and of the number of steps enter y too.

W and the metrics are computed in every `stride`-th step, counted from `zero_state`, and held in between. A
sequence must begin at a step that computes them. A reset clears W and the metrics too, and y is 0 until they
are computed again: for up to stride - 1 steps.
"""
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from s5 import linear_recurrence


class Held(NamedTuple):
    """What is computed in every stride-th step, with the batch axes first."""
    unit: Any  # (..., J) one over the root mean square of a value's numbers; 0 if nothing is held
    weights: Any  # (..., K, J n) W, of values in these units
    dual: Any  # (..., Q J, n) u_q times each metric, scaled to length 1
    found: Any  # (..., H) the part of y that depends on the u_q alone
    goal: Any  # (..., n) mean of the first value, weighted by g


class Sums(NamedTuple):
    """Sums over steps, of which older ones count less, with the batch axes first."""
    products: Any  # (..., K (K + J n) + J) of z [z, x]^T and |x|^2
    attended: Any  # (..., n + 1) of g x and g
    moments: Any  # (..., V n n) of v v^T


class State(NamedTuple):
    """The hidden state, float32, with the batch axes first."""
    traces: Any  # (..., P) p
    lagged: Any  # (..., V n) w
    sums: Sums
    held: Held
    phase: Any  # (...,) int32, steps since W was computed


def cleared(tree, mask):
    """Leaves (*mask.shape, ...) of tree, 0 where mask."""
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(mask, range(mask.ndim, x.ndim)), 0, x), tree)


def matmul(a, b):
    """Matrix product in full float32, also on a GPU: an inverse magnifies rounding errors."""
    return jnp.matmul(a, b, precision="highest")


@jax.custom_vjp
def inverse(m):
    """Inverse of symmetric positive definite m (..., k, k) by Gauss-Jordan elimination, no pivots."""
    k = m.shape[-1]
    eye = jnp.eye(k, dtype=m.dtype)[..., None]

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


def bounded(x):
    """Vectors x (..., n), shortened to a root mean square of 5: units are tiny before anything has moved."""
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).mean(-1, keepdims=True) / 25, 1))


class VectorS5(nn.Module):
    """The layer described at the top of this file."""

    features: int  # H, size of the output
    scalars: int  # S, of which the first `actions` are the last action
    vectors: int  # V
    size: int  # n, dimensions of a vector
    actions: int
    queries: int = 10  # Q, number of vectors u_q
    lags: tuple = (0.05, 0.8)  # decays at first: of each action a trace per lag, of each vector one with lags[0]
    horizon: float = 500.0  # steps that the sums remember at first
    ridge: float = 1e-3  # of the mean square, after many steps; more after few
    stride: int = 8  # steps between two regressions
    scan: str = "auto"  # see s5.linear_recurrence

    @property
    def sizes(self):
        """K, J, V, Q and n of the description at the top of this file."""
        keys = 1 + self.scalars + self.actions * len(self.lags)
        return keys, self.vectors + 1, self.vectors, self.queries, self.size

    @nn.nowrap
    def zero_state(self, batch):
        """State of trials that have not begun, leaves (*batch, ...)."""
        K, J, V, Q, n = self.sizes

        def zeros(*shape):
            return jnp.zeros((*batch, *shape), jnp.float32)

        held = Held(zeros(J), zeros(K, J * n), zeros(Q * J, n), zeros(self.features), zeros(n))
        sums = Sums(zeros(K * (K + J * n) + J), zeros(n + 1), zeros(V * n * n))
        return State(zeros(K - 1 - self.scalars), zeros(V * n), sums, held, jnp.zeros(batch, jnp.int32))

    def setup(self):
        K, J, V, Q, n = self.sizes

        def param(name, start, noise=0.0):
            random = nn.initializers.normal(noise, jnp.float32)
            return self.param(name, lambda key: random(key, start.shape) + jnp.asarray(start, jnp.float32))

        values = np.eye(J, 2 * V)  # v, and below it the last of v minus its trace
        values[V] = values[V - 1] - np.eye(2 * V)[-1]
        self.trace_dt = param("trace_dt", np.log(-np.log(np.repeat(self.lags, self.actions))))
        self.lagged_dt = param("lagged_dt", np.log(-np.log(np.full(V, self.lags[0]))))
        self.sums_dt = param("sums_dt", np.log([1 / self.horizon]))
        self.B = param("B", np.tile(np.eye(self.scalars, self.actions), len(self.lags)))
        self.C = param("C", values)
        self.focus = param("focus", 1.5 * np.eye(self.scalars)[self.actions])  # f
        self.mix = param("mix", self._mix(), 0.02)
        # y is 0 at first: many inner products would drown the other inputs before an agent can use them
        self.alone = param("alone", np.zeros((J * (Q * Q + Q) + J + 1, self.features)))
        self.crossed = param("crossed", np.zeros(((2 * J + 1) * Q * J, self.features)))
        self.lengths = param("lengths", np.zeros((J * J + J + 1, self.features)))
        self.bias = param("bias", np.zeros(self.features))

    def _mix(self):
        """The u_q at first, (Q, K J): what an action does to the last of v at once, later, and to its bend; what
        it does to the first of v later; and the mean of the first of v, weighted by the other scalars."""
        K, J, V, Q, n = self.sizes
        S, A = self.scalars, self.actions
        action, first_trace, last_trace = range(1, 1 + A), range(1 + S, 1 + S + A), range(K - A, K)  # keys
        pairs = [[(k, V - 1)] for k in action]  # of keys and values
        pairs += [[(k, V), (trace, V)] for k, trace in zip(action, first_trace)]
        pairs += [[(k, V - 1)] for k in last_trace] + [[(k, 0)] for k in last_trace]
        pairs += [[(k, 0)] for k in (*range(1 + A, 1 + S), 0)]
        mix = np.zeros((Q, K, J))
        for q, chosen in enumerate(pairs[:Q]):
            mix[(q, *np.transpose(chosen))] = 1
        return mix.reshape(Q, K * J)

    def _traces(self, s, v):
        """Decays and drives of p, then of w."""
        a = jnp.exp(-jnp.exp(self.trace_dt))
        lag = jnp.repeat(jnp.exp(-jnp.exp(self.lagged_dt)), self.size)
        return a, (1 - a) * (s @ self.B), lag, (1 - lag) * v.reshape(*v.shape[:-2], -1)

    def _keys_and_values(self, s, v, p, w):
        """z (..., K), x (..., J, n); p, w: traces of one step earlier."""
        z = jnp.concatenate([jnp.ones_like(s[..., :1]), s, p], -1)
        return z, jnp.einsum("jv,...vn->...jn", self.C, jnp.concatenate([v, w.reshape(v.shape)], -2))

    def _drives(self, weight, s, v, z, x):
        """Drives of Sums, added over c steps with weight (..., c).

        As matrix products: a sum over c of outer products would store each of them.
        """
        lead = weight.shape[:-1]
        right = jnp.concatenate([z, x.reshape(*weight.shape, -1)], -1)
        products = matmul((weight[..., None] * z).mT, right)
        squares = (weight[..., None] * jnp.square(x).sum(-1)).sum(-2)
        g = weight * jnp.exp(jnp.clip(s @ self.focus, -15, 15))
        first = jnp.concatenate([x[..., 0, :], jnp.ones_like(z[..., :1])], -1)
        v = v.swapaxes(-3, -2)
        moments = matmul((weight[..., None, :, None] * v).mT, v)
        return Sums(jnp.concatenate([products.reshape(*lead, -1), squares], -1),
                    matmul(g[..., None, :], first)[..., 0, :], moments.reshape(*lead, -1))

    def _decays(self, steps):
        """Of Sums in that many steps, (1,) each."""
        a = jnp.exp(-jnp.exp(self.sums_dt) * steps)
        return Sums(a, a, lax.stop_gradient(a))

    def _advance(self, sums, reset, inputs):
        """Sums after one more step, inputs (..., 1, .)."""
        drives = self._drives(jnp.ones((*reset.shape, 1), jnp.float32), *inputs)
        return jax.tree.map(lambda a, x, b: cleared(a * x, reset) + b, self._decays(1), sums, drives)

    def _advance_blocks(self, sums, reset, inputs, length):
        """Sums before each block of c steps, and after the last, whose length may be less.

        sums (N, .), reset (blocks, N, c), inputs (blocks, N, c, .). The steps of a block are added first, so
        that the recurrence has one step per block.
        """
        B, N, c = reset.shape
        left = np.full((B, 1, c), range(c - 1, -1, -1), np.float32)  # how many steps of the block follow
        left[-1] -= c - length
        later = jnp.cumsum(reset[..., ::-1], -1)[..., ::-1] > reset  # a reset follows in the block
        weight = jnp.where(later | (left < 0), 0, self._decays(np.maximum(left, 0)).products)
        drives, restart = self._drives(weight, *cleared(inputs, later)), reset.any(-1)

        def recur(a, x0, b):
            x = linear_recurrence(jnp.broadcast_to(a, b.shape[-1:]), b, x0, restart, self.scan)
            return jnp.concatenate([x0[None], x[:-1]])

        before = jax.tree.map(recur, self._decays(c), sums, drives)
        after = jax.tree.map(lambda a, x, b: cleared(a * x[-1], restart[-1]) + b[-1],
                             self._decays(length), before, drives)
        return before, after

    def _hold(self, sums):
        """W, the metrics, the goal and what follows from these alone."""
        K, J, V, Q, n = self.sizes
        products, attended, moments = sums
        lead = products.shape[:-1]
        eye = np.eye(n, dtype=np.float32)
        squares, products = products[..., -J:], products[..., :-J].reshape(*lead, K, K + J * n)
        zz, zx = products[..., :K], products[..., K:].reshape(*lead, K, J, n)
        count = lax.stop_gradient(products[..., 0, :1])
        ridge = (self.ridge + 1 / count)[..., None]
        unit = lax.rsqrt(lax.stop_gradient(squares) / (n * count) + 1e-12)
        weights = inverse(zz / count[..., None] + 0.3 * ridge * np.eye(K, dtype=np.float32))
        weights = matmul(weights, (zx * (unit / count)[..., None, :, None]).reshape(*lead, K, J * n))
        moments = moments.reshape(*lead, V, n, n)
        moments = moments * n / ((moments * eye).sum((-2, -1), keepdims=True) + 1e-9)
        metrics = lax.stop_gradient(inverse(moments + 3 * ridge[..., None] * eye))
        metrics = jnp.concatenate([jnp.broadcast_to(eye, (*lead, 1, n, n)), metrics], -3)

        u = jnp.einsum("qk,...kn->...qn", self.mix, weights.reshape(*lead, K * J, n))
        dual = matmul(u, metrics.swapaxes(-3, -2).reshape(*lead, n, J * n)).reshape(*lead, Q * J, n)
        inner = matmul(dual, u.mT).reshape(*lead, Q, J, Q)
        square = (inner * np.eye(Q, dtype=np.float32)[:, None]).sum(-1) + 1e-4  # (..., Q, J)
        scale = lax.rsqrt(square)
        cosine = inner * scale[..., None] * scale.mT[..., None, :, :]
        found = [squash(2 * cosine), 1 + 0.3 * jnp.log(square), 0.3 * jnp.log(unit), 0.3 * jnp.log(count)]
        found = jnp.concatenate([y.reshape(*lead, -1) for y in found], -1) @ self.alone + self.bias
        goal = attended[..., :-1] / (attended[..., -1:] + 1e-9)
        return Held(unit, weights, dual * (scale.reshape(*lead, Q * J, 1) * n ** -0.5), found, goal)

    def _read(self, held, z, x):
        """held (..., .), z (..., c, K), x (..., c, J, n) -> y (..., c, H): c steps that share what is held."""
        *lead, c, J, n = x.shape
        away = bounded((x[..., 0, :] - held.goal[..., None, :]) * held.unit[..., None, :1])[..., None, :]
        x = x * held.unit[..., None, :, None]
        error = x - matmul(z, held.weights).reshape(x.shape)
        x, error = bounded(x), bounded(error)
        both = jnp.concatenate([x, error, away], -2).reshape(*lead, c * (2 * J + 1), n)
        crossed = squash(2 * matmul(both, held.dual.mT).reshape(*lead, c, -1)) @ self.crossed
        lengths = [matmul(x, x.mT).reshape(*lead, c, J * J), jnp.square(error).sum(-1), jnp.square(away).sum(-1)]
        lengths = squash(jnp.concatenate(lengths, -1) / n) @ self.lengths
        y = held.found[..., None, :] + crossed + lengths
        return jnp.where(held.unit[..., None, :1] > 0, y, 0.0)

    def __call__(self, state, s, v, reset):
        """s (T, N, S), v (T, N, V, n), reset (T, N) bool -> (State, y (T, N, H)); see `stride`."""
        (T, N), c = reset.shape, self.stride
        s, v = jnp.asarray(s, jnp.float32), jnp.asarray(v, jnp.float32)

        def run(a, b, x0):
            """The states after each step, and those before it, cleared by the reset."""
            x = linear_recurrence(a, b, x0, reset, self.scan)
            return x[-1], cleared(jnp.concatenate([x0[None], x[:-1]]), reset)

        def blocks(x):  # (T, N, ...) -> (ceil(T / c), N, c, ...)
            x = jnp.pad(x, [(0, -T % c)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(-1, c, *x.shape[1:]).swapaxes(1, 2)

        a, b, lag, d = self._traces(s, v)
        (p, earlier_p), (w, earlier_w) = run(a, b, state.traces), run(lag, d, state.lagged)
        inputs = [blocks(x) for x in (s, v, *self._keys_and_values(s, v, earlier_p, earlier_w))]
        restart = blocks(reset)
        before, sums = self._advance_blocks(state.sums, restart, inputs, T - (len(restart) - 1) * c)
        held = self._hold(self._advance(before, restart[..., 0], [x[:, :, :1] for x in inputs]))
        gone = jnp.cumsum(restart.at[..., 0].set(False), 2) > 0
        y = cleared(self._read(held, *inputs[2:]), gone).swapaxes(1, 2)
        last = cleared(jax.tree.map(lambda x: x[-1], held), gone[-1, :, -1])
        state = State(p, w, sums, last, jnp.full(N, T % c, jnp.int32))
        return state, y.reshape(-1, N, self.features)[:T]

    def step(self, state, s, v, reset):
        """s (N, S), v (N, V, n), reset (N,) bool -> (State, y (N, H)), the same result as `__call__`."""
        s, v = jnp.asarray(s, jnp.float32), jnp.asarray(v, jnp.float32)
        old = cleared(state._replace(phase=None), reset)
        a, b, lag, d = self._traces(s, v)
        inputs = [x[:, None] for x in (s, v, *self._keys_and_values(s, v, old.traces, old.lagged))]
        sums = self._advance(old.sums, reset, inputs)
        due = state.phase == 0
        new = lax.cond(due.any(), lambda: self._hold(sums), lambda: old.held)
        held = jax.tree.map(jnp.add, cleared(new, ~due), cleared(old.held, due))
        state = State(a * old.traces + b, lag * old.lagged + d, sums, held, (state.phase + 1) % self.stride)
        return state, self._read(held, *inputs[2:])[:, 0]
