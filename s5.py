"""The resettable S5 layer: a diagonal state space model whose hidden state can be reset inside a parallel scan.

    from s5 import S5
    net = S5(features=128, state_size=128, layers=2)
    params = net.init(key, None, x)                             # x (T, batch, 128) float32
    state, y = net.apply(params, None, x, reset)                # a sequence, reset (T, batch) bool, y as x
    discrete = net.apply(params, method="discretise")           # once per rollout
    state, y = net.apply(params, discrete, state, x[0], reset[0], method="step")        # one acting step

Each layer has P states, of which one of each conjugate pair is stored (P/2 complex numbers), and H features:

    dx/dt = L x + B u,    y = 2 Re(C x) + D * u,    L diagonal, with Re(L) < 0 for all parameters
    x_t = Lbar x_{t-1} + Bbar u_t,    Lbar = exp(L dt),    Bbar = (Lbar - 1) / L * B      (zero-order hold)

A reset at t replaces x_{t-1} by the initial state before u_t enters. Pass dt, in units of its mean, where steps
do not last equally long: on some tasks an agent that receives dt keeps its return at lengths that were not trained
(results/README.md). Leave dt out where all steps last equally: dt costs time. Sources: Smith et al., "Simplified State
Space Layers for Sequence Modeling" (arXiv 2208.04933) for S5; Lu et al., "Structured State Space Models for
In-Context Reinforcement Learning" (arXiv 2303.03982) for resets. The implementation of Lu et al. has a second
LayerNorm, after the SSM, by default (do_gtrxl_norm=True): its outputs differ from ours by 3 with it, else by 1.5e-6.
The authors of S5 train decay, frequency, log_dt, B and the LayerNorm with a learning rate of their own, often
lower, and without weight decay (optax.multi_transform). train_s5.py uses one rate and no weight decay.

Licence: Apache-2.0. Origin: the project in-context-rl, file s5.py; please keep this line in copies.
"""
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SCANS, INITIALS = ("auto", "parallel", "sequential"), ("zero", "learned", "random")
DECAY_FLOOR = 1e-4   # Re(L) <= -DECAY_FLOOR; softplus alone underflows to 0, which never forgets
MAX_LOG_DT = 10.0    # a step of 22,000 forgets everything; exp(log_dt) must not overflow


# ---- The recurrence ------------------------------------------------------------------------------
def reset_operator(left, right):
    """Combine two neighbouring stretches of x_t = a_t * (0 if c_t else x_{t-1}) + b_t (Lu et al., section 4).

    This is the reference form, which the tests use. The layers use `linear_recurrence`, which is equal and
    cheaper. An element (a, b, c) stands for the map x -> a x + b if c = 0 and x -> b if c = 1. a and b are arrays
    (..., P), real or complex; c (bool or 0/1, broadcastable to them) says that the stretch holds a reset.

        e_i (+) e_j = (a_j a_i, a_j b_i + b_j, c_i)  if c_j = 0,      e_j  if c_j = 1        (i before j)

    It is associative. For any e_i, e_j, e_k:
      c_k = 1           (e_i (+) e_j) (+) e_k = e_k. And e_j (+) e_k = e_k, whose flag is set, so that
                        e_i (+) (e_j (+) e_k) = e_i (+) e_k = e_k.
      c_k = 0, c_j = 1  (e_i (+) e_j) (+) e_k = e_j (+) e_k. That element has inherited the flag c_j = 1, so
                        e_i (+) (e_j (+) e_k) = e_j (+) e_k.
      c_k = c_j = 0     both are (a_k a_j a_i, a_k a_j b_i + a_k b_j + b_k, c_i): the inner element on the
                        right has the flag c_j = 0, and on the left the outer rule asks c_k only.      QED
    """
    (a_i, b_i, c_i), (a_j, b_j, c_j) = left, right
    return jnp.where(c_j, a_j, a_j * a_i), jnp.where(c_j, b_j, a_j * b_i + b_j), jnp.where(c_j, c_j, c_i)


def linear_recurrence(a, b, x0, reset, scan="auto", unroll=1):
    """x_t = a_t * (0 if reset_t else x_{t-1}) + b_t for t = 0 ... T-1, with x_{-1} = x0.

    Returns x (T, ..., P) in the common dtype of a, b and x0. Differentiable in reverse mode only.
    a       (P,), the same at every step, or (T, ..., P); b (T, ..., P); x0 (..., P): real or complex floats
    reset   (T, ...) bool
    scan    "parallel" (logarithmic depth), "sequential", or "auto": sequential on a CPU, else parallel
    unroll  steps per iteration of the sequential loop, at least 1; 1 is best on a CPU
    Raises ValueError for another scan, unroll < 1 and shapes that do not fit.
    """
    if scan not in SCANS or unroll < 1:
        raise ValueError(f"scan must be one of {SCANS} and unroll at least 1, got {scan!r} and {unroll!r}")
    if reset.shape != b.shape[:-1] or x0.shape != b.shape[1:] or a.shape not in (b.shape, b.shape[-1:]):
        raise ValueError(f"shapes do not fit: a {a.shape}, b {b.shape}, x0 {x0.shape}, reset {reset.shape}")
    parallel = jax.default_backend() != "cpu" if scan == "auto" else scan == "parallel"
    a, b, x0 = (v.astype(jnp.result_type(a, b, x0)) for v in (a, b, x0))
    return _recurrence(parallel, unroll, a, b, x0, jnp.logical_not(reset)[..., None])


def _scan(parallel, unroll, a, b, x0, keep, reverse=False):
    """The recurrence itself. A reset, or reversed a cotangent of 0, selects: 0 times NaN would be NaN."""
    def decay(keep, a, x):
        return jnp.where(keep & (x != 0) if reverse else keep, a * x, 0)

    if parallel:   # `reset_operator` without resets in the product of a, which is then small if a is constant
        first = -1 if reverse else 0
        a = jnp.broadcast_to(a, (len(b), *(1,) * (b.ndim - 2), *a.shape)) if a.ndim == 1 else a
        b = b.at[first].add(decay(keep[first], a[first], x0))
        return lax.associative_scan(lambda i, j: (j[0] * i[0], decay(j[2], j[0], i[1]) + j[1], j[2] & i[2]),
                                    (a, b, keep), reverse=reverse)[1]

    def step(x, inputs):
        a_t, b_t, keep_t = inputs
        x = decay(keep_t, a if a_t is None else a_t, x) + b_t
        return x, x
    return lax.scan(step, x0, (None if a.ndim == 1 else a, b, keep), reverse=reverse, unroll=unroll)[1]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(parallel, unroll, a, b, x0, keep):
    return _scan(parallel, unroll, a, b, x0, keep)


def _recurrence_fwd(parallel, unroll, a, b, x0, keep):
    x = _scan(parallel, unroll, a, b, x0, keep)
    return x, (a, x0, keep, x)


def _recurrence_bwd(parallel, unroll, saved, dx):
    """The adjoint is one reversed recurrence, g_t = dx_t + a_{t+1} keep_{t+1} g_{t+1}. Only x is stored.

    Then db = g and da_t = keep_t x_{t-1} g_t. No conjugates: jax's complex cotangents multiply plainly.
    """
    a, x0, keep, x = saved
    constant = a.ndim == 1
    a_later = a if constant else jnp.roll(a, -1, 0)
    g = _scan(parallel, unroll, a_later, dx, jnp.zeros_like(x0), jnp.roll(keep, -1, 0), reverse=True)
    used = keep & (g != 0)   # as in `_scan`
    da = jnp.where(used, jnp.concatenate([x0[None], x[:-1]]) * g, 0)
    dx0 = jnp.where(used[0], (a if constant else a[0]) * g[0], 0)
    return da.sum(range(da.ndim - 1)) if constant else da, g, dx0, None


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


# ---- Parameters and discretisation ---------------------------------------------------------------
@lru_cache
def hippo(state_size, blocks=1):
    """Eigenvalues (P/2,) and eigenvectors (P, P/2) of the normal part of HiPPO-LegS, numpy complex128.

    The normal part is S - I/2, S skew with S_nk = -sqrt((2n + 1)(2k + 1))/2 for n > k (S5 paper, section
    3.2); `blocks` of these, of size P/blocks, stand on the diagonal. Of each conjugate pair the member with
    Im > 0 is given; the eigenvectors are orthonormal. Raises ValueError unless 2 * blocks divides P > 0.
    """
    if state_size < 1 or blocks < 1 or state_size % (2 * blocks):
        raise ValueError(f"2 * blocks must divide state_size > 0, got {state_size=} and {blocks=}")
    root = np.sqrt(2 * np.arange(state_size // blocks) + 1)
    lower = np.tril(np.outer(root, root) / 2, -1)
    frequency, vectors = np.linalg.eigh(-1j * (lower.T - lower))   # S is skew, so -iS is Hermitian
    half = len(root) // 2
    return np.tile(-0.5 + 1j * frequency[half:], blocks), np.kron(np.eye(blocks), vectors[:, half:])


def zoh(lam, step):
    """Zero-order hold: exp(lam * step) and (exp(lam * step) - 1) / lam, complex64 of the broadcast shape.

    lam complex64 with Re <= 0 (1/time), step float32 >= 0 (time). Accurate, with finite gradients, down to 0.
    """
    re, im = lam.real * step, lam.imag * step
    z, a = lax.complex(re, im), lax.complex(jnp.exp(re) * jnp.cos(im), jnp.exp(re) * jnp.sin(im))
    small = re ** 2 + im ** 2 < 1e-2                        # there a - 1 cancels, and z^5 / 720 is left out
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    return a, step * jnp.where(small, series, (a - 1) / jnp.where(small, 1, z))


def _matmul(x, w):
    """x (..., M) @ w (M, N) in the dtype of w, the result in float32."""
    # flattened, because XLA on a CPU is half as fast at a weight gradient that contracts two axes (T, B)
    return (x.astype(w.dtype).reshape(-1, len(w)) @ w).astype(jnp.float32).reshape(*x.shape[:-1], -1)


def _join(x):
    """complex (..., P/2) -> real (..., P), [Re|Im] on the last axis; `_halves` is the inverse."""
    return jnp.concatenate([x.real, x.imag], -1)


def _halves(x):
    return lax.complex(*jnp.split(x, 2, axis=-1))


# ---- The layers ----------------------------------------------------------------------------------
class S5Layer(nn.Module):
    """LayerNorm -> SSM -> GELU -> gated linear unit -> residual. Fields, arguments and shapes as in `S5`."""
    features: int
    state_size: int
    blocks: int
    initial: str
    scan: str
    dt_min: float
    dt_max: float
    dtype: Any

    def setup(self):
        H, P = self.features, self.state_size
        lam, basis = hippo(P, self.blocks)
        basis = np.concatenate([basis.real, -basis.imag], 1).astype(np.float32)    # x (P) -> [Re|Im] V^H x
        decay = np.log(np.expm1(-lam.real - DECAY_FLOOR))                          # the inverse of softplus
        normal = partial(jax.random.normal, dtype=jnp.float32)
        self.decay = self.param("decay", lambda key: jnp.asarray(decay, jnp.float32))
        self.frequency = self.param("frequency", lambda key: jnp.asarray(lam.imag, jnp.float32))
        self.log_dt = self.param("log_dt", lambda key: jax.random.uniform(
            key, (P // 2,), jnp.float32, np.log(self.dt_min), np.log(self.dt_max)))
        # B and C are real LeCun-normal in the basis of HiPPO, here changed to its eigenbasis and stored as the
        # real products that use them: u (H) -> [Re|Im] B u (P), and [Re|Im] x (P) -> 2 Re(C x) (H).
        self.B = self.param("B", lambda key: normal(key, (H, P)) @ (basis * np.float32(H ** -0.5)))
        self.C = self.param("C", lambda key: (basis * np.float32(2 * P ** -0.5)).T @ normal(key, (P, H)))
        self.D = self.param("D", lambda key: normal(key, (H,)))
        self.norm = nn.LayerNorm()
        self.gate = self.param("gate", lambda key: normal(key, (H, 2 * H)) * np.float32(H ** -0.5))
        self.gate_bias = self.param("gate_bias", lambda key: jnp.zeros(2 * H, jnp.float32))
        if self.initial == "learned":
            self.x_init = self.param("x_init", lambda key: jnp.zeros(P, jnp.float32))
        elif self.initial == "random":
            self.x_init = self.param("x_init", lambda key: normal(key, (P,)) @ basis)

    def discretise(self):
        cast = partial(jnp.asarray, dtype=self.dtype or jnp.float32)
        lam = lax.complex(-nn.softplus(self.decay) - DECAY_FLOOR, self.frequency)
        step = jnp.exp(jnp.minimum(self.log_dt, MAX_LOG_DT))
        a, hold = zoh(lam, step)
        init = None if self.initial == "zero" else _halves(self.x_init)
        init = lax.stop_gradient(init) if self.initial == "random" else init
        return dict(lam=lam, step=step, a=a, init=init, B=cast(self.B), C=cast(self.C),
                    gate=cast(self.gate), B_bar=cast(_join(hold * _halves(self.B))))

    def _drive(self, discrete, x, dt):
        """x (..., H) -> normed input u (..., H), Lbar (P/2,) or (..., P/2), Bbar u (..., P/2)."""
        u = self.norm(x)
        if dt is None:
            return u, discrete["a"], _halves(_matmul(u, discrete["B_bar"]))
        values, index = dt if isinstance(dt, tuple) else (dt, None)
        a, hold = zoh(discrete["lam"], discrete["step"] * jnp.asarray(values, jnp.float32)[..., None])
        if index is not None:  # as products: the gradient of a[index] would be a scatter
            chosen = jax.nn.one_hot(index, len(values), dtype=jnp.float32)
            chosen = partial(jnp.matmul, chosen, precision="highest")
            a, hold = (lax.complex(chosen(y.real), chosen(y.imag)) for y in (a, hold))
        return u, a, hold * _halves(_matmul(u, discrete["B"]))

    def _readout(self, discrete, x, u, states):
        y = nn.gelu(_matmul(_join(states), discrete["C"]) + self.D * u)
        value, gate = jnp.split(_matmul(y, discrete["gate"]) + self.gate_bias, 2, axis=-1)
        return x + value * nn.sigmoid(gate)

    def __call__(self, state, x, reset, dt=None):
        discrete = self.discretise()
        u, a, drive = self._drive(discrete, x, dt)
        if self.initial != "zero":
            drive += jnp.where(reset[..., None], a * discrete["init"], 0)
        states = linear_recurrence(a, drive, state, reset, self.scan)
        return states[-1], self._readout(discrete, x, u, states)

    def step(self, discrete, state, x, reset, dt=None):
        u, a, drive = self._drive(discrete, x, dt)
        init = 0 if self.initial == "zero" else discrete["init"]
        state = a * jnp.where(reset[..., None], init, state) + drive
        return state, self._readout(discrete, x, u, state)


class S5(nn.Module):
    """`layers` resettable S5 blocks of width H. The caller embeds inputs to that width.

    features        H
    state_size      P, even: P/2 complex numbers are stored per layer
    layers          number of blocks
    blocks          diagonal blocks of the HiPPO matrix; 2 * blocks divides P
    initial         the state after a reset: "zero"; "learned" (a parameter, zero at first); "random" (a normal
                    draw, stored as a parameter with zero gradient: exclude it from weight decay)
    scan            see `linear_recurrence`
    dt_min, dt_max  initial step sizes are log-uniform in between
    dtype           of the matrix products, such as jnp.bfloat16. All else is float32 and complex64, whatever
                    the dtypes of the arguments, and also where jax_enable_x64 is set
    Raises ValueError for sizes that do not divide, unknown names, and dt_min, dt_max out of order.
    """
    features: int
    state_size: int
    layers: int
    blocks: int = 1
    initial: str = "zero"
    scan: str = "auto"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dtype: Any = None

    def setup(self):
        if self.initial not in INITIALS or self.scan not in SCANS:
            raise ValueError(f"{self.initial=}, {self.scan=}: must be one of {INITIALS}, one of {SCANS}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"0 < dt_min <= dt_max must hold, got {self.dt_min} and {self.dt_max}")
        self.stack = [S5Layer(self.features, self.state_size, self.blocks, self.initial, self.scan,
                              self.dt_min, self.dt_max, self.dtype) for _ in range(self.layers)]

    @nn.nowrap
    def zero_state(self, batch_shape):
        """Per layer a complex64 zero array (*batch_shape, P/2). A first step with a reset begins at `initial`."""
        return tuple(jnp.zeros((*batch_shape, self.state_size // 2), jnp.complex64) for _ in range(self.layers))

    def __call__(self, state, x, reset=None, dt=None):
        """A sequence -> (state after it, y (T, ..., H) float32).

        state  from `zero_state` or a call before; None begins at the initial state
        x      (T, ..., H) float
        reset  (T, ...) bool, whether the state is reset before that step; None: never
        dt     (T, ...) or one number, >= 0: multiplies all step sizes of that step; None: 1. Or a pair: the few
               values that occur, (m,), and the index of each step's value, (T, ...) int, which is faster
        """
        state, x, reset, dt = self._arguments(state, x, reset, dt, x.shape[1:-1])
        new = []
        for layer, old in zip(self.stack, state, strict=True):
            last, x = layer(old, x, reset, dt)
            new.append(last)
        return tuple(new), x

    def discretise(self):
        """What `step` needs that depends on the parameters alone, a dict per layer. Once per rollout."""
        return tuple(layer.discretise() for layer in self.stack)

    def step(self, discrete, state, x, reset=None, dt=None):
        """One acting step, x (..., H), reset and dt (...): the same result as `__call__`."""
        state, x, reset, dt = self._arguments(state, x, reset, dt, x.shape[:-1])
        new = []
        for layer, d, old in zip(self.stack, discrete, state, strict=True):
            last, x = layer.step(d, old, x, reset, dt)
            new.append(last)
        return tuple(new), x

    def _arguments(self, state, x, reset, dt, batch_shape):
        """Arrays of the documented dtypes, also in place of None and of a number."""
        steps = x.shape[:-1]
        reset = jnp.zeros(steps, bool) if reset is None else jnp.asarray(reset)
        if state is None:
            state, first = self.zero_state(batch_shape), () if steps == batch_shape else 0
            reset = reset.at[first].set(True)
        state = tuple(jnp.asarray(s, jnp.complex64) for s in state)
        if dt is not None and not isinstance(dt, tuple):
            dt = jnp.broadcast_to(jnp.asarray(dt, jnp.float32), steps)
        return state, jnp.asarray(x, jnp.float32), reset, dt
