"""Properties of the resettable S5 layer: the operator, the scans, their gradients, the layer, the stack."""
import ast
import itertools
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s5
from s5 import S5, hippo, linear_recurrence, reset_operator, zoh

T, B, H, P = 11, 3, 8, 12       # small, and T no power of two: the time goes into compiling
SCANS = ("parallel", "sequential")


def close(actual, expected, tolerance=1e-5):
    """Equal trees, within tolerance of the largest magnitude of each leaf."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected) > 0
    for got, want in zip(actual, expected):
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape and np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1e-3, np.abs(want).max()))


def complex_normal(rng, *shape):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


recur = jax.jit(linear_recurrence, static_argnums=4)


@partial(jax.jit, static_argnums=0)
def initialise(net, key):
    return net.init(key, net.zero_state(()), jnp.zeros((1, net.features)), jnp.zeros(1, bool))


@partial(jax.jit, static_argnums=0)
def run(net, params, state, x, reset, dt=None):
    return net.apply(params, state, x, reset, dt)


@partial(jax.jit, static_argnums=0)
def discretise(net, params):
    return net.apply(params, method="discretise")


@partial(jax.jit, static_argnums=0)
def run_steps(net, params, state, x, reset, dt=None):
    """The sequence by acting steps: no code in common with the recurrence."""
    discrete = net.apply(params, method="discretise")

    def step(s, now):
        return net.apply(params, discrete, s, *now, method="step")

    return jax.lax.scan(step, state, (x, reset, dt))


def make(seed=0, batch=(B,), p_reset=0.2, **fields):
    """A stack with random parameters (all, unlike at initialisation), a state, inputs and resets.

    Tests share its shapes where they can, because nearly all of their time is compilation.
    """
    net = S5(**{**dict(features=H, state_size=P, layers=1, scan="sequential"), **fields})
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(T, *batch, net.features)), jnp.float32)
    reset = jnp.asarray(rng.random((T, *batch)) < p_reset)
    state = tuple(jnp.asarray(complex_normal(rng, *s.shape), jnp.complex64) for s in net.zero_state(batch))
    typical = {"log_dt": (-2.5, 0.7), "frequency": (3.0, 3.0), "scale": (1.0, 0.3)}      # mean, deviation

    def draw(path, p):
        mean, deviation = typical.get(path[-1].key, (0.0, 0.4))
        return jnp.asarray(mean + deviation * rng.normal(size=p.shape), p.dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0), state, x, reset)
    return net, jax.tree_util.tree_map_with_path(draw, shapes), state, x, reset


def with_layer0(params, **changed):
    layer = {**params["params"]["stack_0"], **changed}
    return {"params": {**params["params"], "stack_0": layer}}


# ---- The operator ------------------------------------------------------------------------------------------

def elements(rng, flags):
    """Elements in complex128, which numpy's arguments keep: the flags (n,) become (n, 1)."""
    shape = (len(flags), 5)
    return complex_normal(rng, *shape), complex_normal(rng, *shape), np.array(flags)[:, None]


def combine(i, j):
    with jax.enable_x64(True):
        return tuple(np.asarray(v) for v in reset_operator(i, j))


def assert_same(left, right):
    for got, want in zip(left, right):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_operator_is_associative(flags):
    for seed in range(10):
        a, b, c = elements(np.random.default_rng(seed), flags)
        i, j, k = zip(a, b, c)
        assert_same(combine(combine(i, j), k), combine(i, combine(j, k)))


def test_operator_gives_the_same_for_every_bracketing():
    def random_bracketing(items, rng):
        if len(items) == 1:
            return items[0]
        cut = rng.integers(1, len(items))
        return combine(random_bracketing(items[:cut], rng), random_bracketing(items[cut:], rng))

    for seed in range(10):
        rng = np.random.default_rng(seed)
        a, b, c = elements(rng, rng.random(17) < 0.25)
        items = list(zip(a, b, c))
        expected = items[0]
        for item in items[1:]:
            expected = combine(expected, item)
        for _ in range(5):
            assert_same(random_bracketing(items, rng), expected)


def test_operator_composes_the_maps_it_stands_for():
    rng = np.random.default_rng(0)
    for flags in itertools.product([False, True], repeat=2):
        a, b, c = elements(rng, flags)
        x = complex_normal(rng, 5)

        def apply(e, x):
            return np.where(e[2], 0, e[0] * x) + e[1]

        first, second = zip(a, b, c)
        expected = apply(second, apply(first, x))
        np.testing.assert_allclose(apply(combine(first, second), x), expected, atol=1e-12)


# ---- The recurrence ----------------------------------------------------------------------------------------

RESETS = {"none": [], "all": range(T), "first": [0], "last": [T - 1], "consecutive": [2, 3, 4, 8, 9]}


def recurrence_case(resets, varying, seed=0):
    rng = np.random.default_rng(seed)
    a = complex_normal(rng, *((T, B, P) if varying else (P,)))
    a = 0.95 * a / np.maximum(1, np.abs(a))
    reset = np.zeros((T, B), bool)
    reset[list(resets)] = True
    return a, complex_normal(rng, T, B, P), complex_normal(rng, B, P), reset


def numpy_recurrence(a, b, x0, reset):
    x, out = x0, []
    for t in range(len(b)):
        x = (a if a.ndim == 1 else a[t]) * np.where(reset[t][..., None], 0, x) + b[t]
        out.append(x)
    return np.stack(out)


@jax.jit
def operator_scan(a, b, x0, reset):
    """The recurrence by the public three-element operator, with the carried state as one more element."""
    a = jnp.concatenate([jnp.ones_like(b[:1]), jnp.broadcast_to(a, b.shape)])
    flags = jnp.concatenate([jnp.zeros_like(reset[:1]), reset])[..., None]
    return jax.lax.associative_scan(reset_operator, (a, jnp.concatenate([x0[None], b]), flags))[1][1:]


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("resets", RESETS)
def test_recurrence_equals_loop_and_operator(resets, varying):
    case = recurrence_case(RESETS[resets], varying)
    expected = numpy_recurrence(*case)
    case = [jnp.asarray(v) for v in case]
    close(operator_scan(*case), expected)
    for scan in SCANS:
        close(recur(*case, scan), expected)


def test_recurrence_on_random_resets_per_lane_and_real_numbers():
    a, b, x0, _ = recurrence_case([], False)
    for seed in range(5):
        reset = np.random.default_rng(seed).random((T, B)) < 0.3
        expected = numpy_recurrence(a, b, x0, reset)
        real = numpy_recurrence(a.real, b.real, x0.real, reset)
        for scan in SCANS:
            close(recur(*map(jnp.asarray, (a, b, x0, reset)), scan), expected)
            got = recur(*map(jnp.asarray, (a.real, b.real, x0.real, reset)), scan)
            assert got.dtype == jnp.float32
            close(got, real)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("scan", SCANS)
def test_recurrence_gradients(scan, varying):
    """The hand-written adjoint, in float64, against autodiff of the operator scan and finite differences."""
    with jax.enable_x64(True):
        case = recurrence_case([0, 3, 4, 9], varying, seed=3)
        weights = jnp.asarray(complex_normal(np.random.default_rng(9), T, B, P))
        reset = jnp.asarray(case[3])
        pairs = [jnp.stack([v.real, v.imag]) for v in case[:3]]        # real: no convention of conjugation

        def loss(recurrence, pairs):
            x = recurrence(*(jax.lax.complex(v[0], v[1]) for v in pairs), reset)
            return jnp.sum(jnp.tanh((x * weights).real)) + jnp.sum(jnp.abs(x[-1]) ** 2)

        def fast(*args):
            return linear_recurrence(*args, scan)

        gradient = jax.jit(jax.grad(lambda p: loss(fast, p)))(pairs)
        assert all(g.dtype == jnp.float64 for g in gradient)
        close(gradient, jax.jit(jax.grad(lambda p: loss(operator_scan, p)))(pairs), 1e-10)
        value = jax.jit(lambda p: loss(fast, p))
        rng, h = np.random.default_rng(1), 1e-6
        for _ in range(3):
            direction = [jnp.asarray(rng.normal(size=p.shape)) for p in pairs]

            def moved(s):
                return value([p + s * h * d for p, d in zip(pairs, direction)])

            slope = sum(jnp.sum(g * d) for g, d in zip(gradient, direction))
            np.testing.assert_allclose((moved(1) - moved(-1)) / (2 * h), slope, rtol=1e-6)


def test_parallel_gradient_stores_only_the_states():
    """What the backward pass keeps is of the size of x, whatever the depth of the scan."""
    a, b, x0, reset = map(jnp.asarray, recurrence_case([3], False))

    def saved(f):
        return jax.eval_shape(lambda *v: jax.vjp(lambda *v: f(*v, reset), *v)[1], a, b, x0)

    ours, plain = saved(lambda *v: linear_recurrence(*v, "parallel")), saved(operator_scan)
    def size(tree):
        return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(tree))

    assert size(ours) < 1.3 * b.size * b.dtype.itemsize < size(plain) / 2


def test_recurrence_rejects_what_does_not_fit():
    a, b, x0, reset = map(jnp.asarray, recurrence_case([], False))
    with pytest.raises(ValueError, match="scan"):
        linear_recurrence(a, b, x0, reset, "fast")
    with pytest.raises(ValueError, match="unroll"):
        linear_recurrence(a, b, x0, reset, "sequential", 0)
    for wrong in ((a[1:], b, x0, reset), (a, b, x0[1:], reset), (a, b, x0, reset[1:])):
        with pytest.raises(ValueError, match="shapes"):
            linear_recurrence(*wrong)


# ---- HiPPO and the discretisation --------------------------------------------------------------------------

@pytest.mark.parametrize("size, blocks", [(2, 1), (12, 1), (64, 1), (48, 4)])
def test_hippo_is_the_spectrum_of_the_normal_part(size, blocks):
    lam, vectors = hippo(size, blocks)
    n = np.arange(size // blocks)
    legs = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1.0)      # HiPPO-LegS itself
    normal = np.kron(np.eye(blocks), legs + np.outer(np.sqrt(n + 0.5), np.sqrt(n + 0.5)))
    assert lam.shape == (size // 2,) and (lam.imag > 0).all() and (lam.real == -0.5).all()
    np.testing.assert_allclose(normal @ vectors, vectors * lam, atol=1e-9 * size)
    both = np.concatenate([vectors, vectors.conj()], 1)
    np.testing.assert_allclose(both @ both.conj().T, np.eye(size), atol=1e-10)


def test_initial_values_are_those_of_hippo():
    net = S5(H, P, 1, blocks=2)
    for discrete in discretise(net, initialise(net, jax.random.key(0))):
        close(discrete["lam"], hippo(P, 2)[0].astype(np.complex64), 1e-6)
        assert (discrete["step"] > 0.999e-3).all() and (discrete["step"] < 1.001e-1).all()


def test_layer_is_the_real_system_it_stands_for():
    """At initialisation: the dense real system dx/dt = A x + B u, y = C x + D u of P states, held exactly."""
    net = S5(5, 6, 1, dt_min=0.03, dt_max=0.03)
    state, x = net.zero_state((B,)), jax.random.normal(jax.random.key(5), (T, B, 5))
    reset = jnp.zeros((T, B), bool)
    params = initialise(net, jax.random.key(4))
    p = jax.tree.map(np.asarray, params["params"]["stack_0"])
    lam, V = hippo(6)
    full, lam = np.concatenate([V, V.conj()], 1), np.concatenate([lam, lam.conj()])
    half = (p["B"][:, :3] + 1j * p["B"][:, 3:]).T
    B_ = full @ np.concatenate([half, half.conj()])
    half = (p["C"][:3] - 1j * p["C"][3:]).T / 2
    C_ = np.concatenate([half, half.conj()], 1) @ full.conj().T
    A_ = full @ np.diag(lam) @ full.conj().T
    assert max(np.abs(m.imag).max() for m in (A_, B_, C_)) < 1e-6
    A_, B_, C_ = A_.real, B_.real, C_.real
    parts = 4000                                                       # second order inside each step
    small = 0.03 / parts * A_
    transition = np.linalg.matrix_power(np.eye(6) + small + small @ small / 2, parts)
    held = np.linalg.solve(A_, transition - np.eye(6)) @ B_
    u = np.asarray(x, np.float64)
    u = (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-6)
    z, y = np.zeros((B, 6)), []
    for t in range(T):
        z = z @ transition.T + u[t] @ held.T
        y.append(z @ C_.T + p["D"] * u[t])
    y = np.stack(y)
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y ** 3)))
    value, gate = np.split(y @ p["gate"], 2, -1)
    close(run(net, params, state, x, reset)[1], np.asarray(x) + value / (1 + np.exp(-gate)), 1e-5)


def test_zoh_is_accurate_and_differentiable_for_tiny_and_huge_arguments():
    sizes = 10.0 ** np.arange(-30, 6, 0.125)
    lam = np.concatenate([-sizes + 0j, -1e-4 + 1j * sizes, 1j * sizes, [0]]).astype(np.complex64)

    def total(re, im, step):
        a, hold = zoh(jax.lax.complex(re, im), step)
        return jnp.sum(a.real + a.imag + hold.real + hold.imag)
    gradients, fast_zoh = jax.jit(jax.grad(total, (0, 1, 2))), jax.jit(zoh)
    for step in (0.0, 1e-12, 1e-3, 0.1, 10.0):
        z = lam.astype(np.complex128) * np.float64(np.float32(step))
        series = sum(z ** k / float(np.prod(np.arange(1.0, k + 2))) for k in range(8))
        with np.errstate(all="ignore"):
            ratio = np.where(np.abs(z) < 0.1, series, (np.exp(z) - 1) / np.where(z == 0, 1, z))
        a, hold = fast_zoh(jnp.asarray(lam), jnp.float32(step))
        moderate = np.abs(z) < 30                  # sin and cos of larger float32 numbers are ill-posed
        np.testing.assert_allclose(np.asarray(a)[moderate], np.exp(z)[moderate], atol=3e-6)
        np.testing.assert_allclose(np.asarray(hold)[moderate], (step * ratio)[moderate], rtol=1.5e-6, atol=0)
        assert np.isfinite(a).all() and np.isfinite(hold).all() and (np.abs(a) < 1 + 1e-6).all()
        for gradient in gradients(lam.real, lam.imag, jnp.full(len(lam), step, jnp.float32)):
            assert np.isfinite(gradient).all()


# ---- The stack ---------------------------------------------------------------------------------------------

INITIALS = ("zero", "learned", "random")


@pytest.mark.parametrize("initial, with_dt", [("zero", False), ("random", True)])
def test_parallel_sequential_and_single_steps_agree(initial, with_dt):
    net, params, state, x, reset = make(layers=2, initial=initial)
    dt = jax.random.uniform(jax.random.key(8), (T, B), minval=0.0, maxval=3.0) if with_dt else None
    expected = run_steps(net, params, state, x, reset, dt)
    for scan in SCANS:
        close(run(net.clone(scan=scan), params, state, x, reset, dt), expected, 2e-5)


@pytest.mark.parametrize("scan, initial", [("parallel", "learned"), ("sequential", "zero"),
                                           ("sequential", "random")])
def test_packed_sequences_equal_separate_ones(scan, initial):
    net, params, state, x, _ = make(initial=initial, scan=scan)
    starts = [0, 1, 2, 6, 7, T]                                         # lengths 1, 1, 4, 1, 4
    reset = jnp.zeros((T, B), bool).at[jnp.array(starts[:-1])].set(True)
    last, packed = run(net, params, state, x, reset)
    for begin, end in zip(starts, starts[1:]):
        alone = jnp.zeros((end - begin, B), bool).at[0].set(True)
        new, y = run(net, params, net.zero_state((B,)), x[begin:end], alone)
        close(packed[begin:end], y, 2e-5)
    close(last, new, 2e-5)


@pytest.mark.parametrize("scan", SCANS)
def test_state_carries_over_from_piece_to_piece(scan):
    net, params, state, x, reset = make(initial="learned" if scan == "parallel" else "zero", scan=scan)
    expected, ys = run(net, params, state, x, reset), []
    for begin, end in [(0, 4), (4, 5), (5, 9), (9, 10), (10, T)]:
        state, y = run(net, params, state, x[begin:end], reset[begin:end])
        ys.append(y)
    close((state, jnp.concatenate(ys)), expected, 2e-5)


@pytest.mark.parametrize("scan", SCANS)
def test_reset_forgets_and_nothing_else_does(scan):
    net, params, state, x, _ = make(scan=scan)
    other = jax.tree.map(lambda s: s + 1, state)
    for first in (False, True):
        reset = jnp.zeros((T, B), bool).at[0].set(first)
        ours, theirs = (run(net, params, s, x, reset)[1] for s in (state, other))
        assert (np.abs(ours - theirs).max() < 1e-6) == first
    reset = jnp.zeros((T, B), bool).at[5, 1].set(True)
    ours, theirs = (np.asarray(run(net, params, s, x, reset)[1]) for s in (state, other))
    np.testing.assert_array_equal(ours[5:, 1], theirs[5:, 1])
    difference = np.abs(ours - theirs)
    assert (difference[:5].max((0, 2)) > 1e-4).all() and difference[-1, 0].max() > 1e-6
    changed = np.asarray(run(net, params, state, x.at[7].multiply(-1.0), reset)[1])      # causality
    np.testing.assert_allclose(changed[:7], ours[:7], atol=1e-6)
    assert np.abs(changed[8:] - ours[8:]).max() > 1e-4


def test_gradients_agree_between_scans_steps_and_differences():
    net, params, state, x, reset = make(initial="learned")
    dt = jax.random.uniform(jax.random.key(8), (T, B), minval=0.5, maxval=2.0)

    def loss(call):
        def value(params, state, x, dt):
            new, y = call(params, state, x, dt)
            return jnp.mean(jnp.sin(y)) + sum(jnp.mean(jnp.abs(s) ** 2) for s in new)
        return value

    def stepped(p, s, x, dt):
        return run_steps(net, p, s, x, reset, dt)

    expected = jax.jit(jax.grad(loss(stepped), (0, 1, 2, 3)))(params, state, x, dt)
    for scan in SCANS:
        def scanned(p, s, x, dt):
            return run(net.clone(scan=scan), p, s, x, reset, dt)

        close(jax.jit(jax.grad(loss(scanned), (0, 1, 2, 3)))(params, state, x, dt), expected, 1e-4)
    value, h = jax.jit(lambda p: loss(stepped)(p, state, x, dt)), 1e-2
    gradient = expected[0]["params"]["stack_0"]
    for name in ("decay", "frequency", "log_dt", "B", "C", "D", "x_init"):     # float32: coarse
        size = jnp.linalg.norm(gradient[name])
        old = params["params"]["stack_0"][name]
        moved = [value(with_layer0(params, **{name: old + by * gradient[name] / size})) for by in (h, -h)]
        np.testing.assert_allclose((moved[0] - moved[1]) / (2 * h), size, rtol=0.05)


def test_initial_states():
    x, reset = jnp.zeros((T, B, H)), jnp.ones((T, B), bool)
    state = S5(H, P, 1).zero_state((B,))
    start = jax.random.normal(jax.random.key(2), (P,))
    net, params = make()[:2]
    params = with_layer0(params, norm={"scale": jnp.ones(H), "bias": jnp.zeros(H)})      # no input at all
    assert "x_init" not in params["params"]["stack_0"]
    assert (run(net, params, state, x, reset)[0][0] == 0).all()
    for initial in ("learned", "random"):
        net = S5(H, P, 1, initial=initial, scan="sequential")
        params = [initialise(net, jax.random.key(k)) for k in (1, 1, 2)]
        reached = [run(net, p, state, x, reset)[0][0] for p in params]
        if initial == "learned":                                        # starts as "zero"
            assert (reached[0] == 0).all()
        else:
            assert (reached[0] == reached[1]).all() and (reached[0] != reached[2]).all()
        moved = with_layer0(params[0], x_init=start)
        expected = discretise(net, moved)[0]["a"] * jax.lax.complex(start[:P // 2], start[P // 2:])
        close(run(net, moved, state, x, reset)[0][0], jnp.broadcast_to(expected, (B, P // 2)))
        slope = jax.jit(jax.grad(lambda p: jnp.sum(run(net, p, state, x, reset)[1] ** 2)))(moved)
        slope = slope["params"]["stack_0"]["x_init"]
        assert (slope != 0).all() if initial == "learned" else (slope == 0).all()


# ---- dt ----------------------------------------------------------------------------------------------------

def test_dt_one_is_none_and_two_doubles_the_step_sizes():
    net, params, state, x, reset = make(initial="learned")
    ones = jnp.ones((T, B))
    close(run(net, params, state, x, reset, ones), run(net, params, state, x, reset), 2e-5)
    doubled = jax.tree_util.tree_map_with_path(
        lambda path, p: p + np.log(2) if path[-1].key == "log_dt" else p, params)
    close(run(net, params, state, x, reset, 2 * ones), run(net, doubled, state, x, reset), 2e-5)


def test_dt_zero_keeps_the_state():
    net, params, state, x, reset = make(p_reset=0, initial="learned")
    close(run(net, params, state, x, reset, jnp.zeros((T, B)))[0], state, 1e-6)


def test_a_held_input_can_be_split_at_any_time():
    """One step of dt = 1 with a constant input is any number of steps whose dt sum to 1."""
    net, params, state, x, _ = make()
    for parts in ([0.25, 0.25, 0.5], [0.1, 0.2, 0.7], [0.0, 1e-4, 0.9999]):
        dt = jnp.broadcast_to(jnp.array(parts)[:, None], (len(parts), B))
        split = run(net, params, state, jnp.stack([x[0]] * len(parts)), jnp.zeros(dt.shape, bool), dt)
        whole = run(net, params, state, x[:1], jnp.zeros((1, B), bool))
        close((split[0], split[1][-1]), (whole[0], whole[1][-1]))


# ---- Stability ---------------------------------------------------------------------------------------------

PUSHES = {"none": {}, "decay up": {"decay": 1e3}, "decay far up": {"decay": 1e6},
          "decay down": {"decay": -1e3}, "frequency up": {"frequency": 1e3},
          "frequency to zero": {"frequency": None},
          "steps up": {"log_dt": 100.0}, "steps down": {"log_dt": -100.0},
          "no decay, long steps": {"decay": -1e3, "log_dt": 100.0}, "B, C large": {"B": 100.0, "C": 100.0}}


@partial(jax.jit, static_argnums=0)
def loss_states_gradient(net, params, state, x, reset):
    def loss(params):
        new, y = net.apply(params, state, x, reset)
        return jnp.mean(y[-100:] ** 2), (new, y)
    (_, states), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return states, gradient


@pytest.mark.parametrize("push", PUSHES)
def test_stable_for_10000_steps(push):
    net, params, state, x, reset = make()
    if push == "none":
        params = initialise(net, jax.random.key(0))
    for path, by in PUSHES[push].items():
        for layer in params["params"].values():
            layer[path] = jnp.zeros_like(layer[path]) if by is None else layer[path] + by
    steps = 10_000                                  # a constant input, which is what integrates up, and noise
    x = jnp.linspace(-1, 1, H) + jax.random.normal(jax.random.key(3), (steps, B, H))
    (new, y), gradient = loss_states_gradient(net, params, state, x, jnp.zeros((steps, B), bool))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((new, y, gradient)))
    for discrete, old, last in zip(discretise(net, params), state, new):
        assert (discrete["lam"].real < 0).all() and (np.abs(discrete["a"]) <= 1 + 1e-6).all()
        # |u| <= sqrt(H) after the norm, so |x| <= |x_0| + max|B u| / |Re L|, mode by mode
        B_ = np.abs(discrete["B"])
        drive = 4 * np.sqrt(H) * (B_[:, :P // 2] + B_[:, P // 2:]).sum(0)
        assert (np.abs(last) <= 1.01 * np.abs(old) + drive / -discrete["lam"].real).all()
    if push == "none":
        assert np.abs(y[-2000:]).max() < 1.5 * np.abs(y[1000:3000]).max()


def test_a_bare_real_part_would_not_be_stable():
    """What the parametrisation is for: pushed as far, eigenvalues used as they are overflow."""
    a, _ = zoh(jnp.asarray(hippo(P)[0] + 0.6, jnp.complex64), jnp.float32(0.1))
    b, reset = jnp.ones((10_000, P // 2)), jnp.zeros(10_000, bool)
    assert not np.isfinite(recur(a, b, jnp.zeros(P // 2), reset, "sequential")).all()


# ---- Types, transformations, house rules -------------------------------------------------------------------

def test_bfloat16_matmuls():
    net, params, state, x, reset = make()
    half = net.clone(dtype=jnp.bfloat16)
    exact, rounded = run(net, params, state, x, reset), run(half, params, state, x, reset)
    assert [v.dtype for v in jax.tree.leaves(rounded)] == [v.dtype for v in jax.tree.leaves(exact)]
    error = np.abs(rounded[1] - exact[1]).max() / np.abs(exact[1]).max()
    assert 1e-5 < error < 0.03
    assert {d["B_bar"].dtype for d in discretise(half, params)} == {jnp.dtype(jnp.bfloat16)}
    close(run_steps(half, params, state, x, reset), rounded, 0.02)

    def loss(p, net):
        return jnp.mean(run(net, p, state, x, reset)[1] ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for a, b in zip(jax.tree.leaves(gradient(params, half)), jax.tree.leaves(gradient(params, net))):
        assert a.dtype == b.dtype == jnp.float32 and np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes_and_dtypes(batch):
    net, params, state, x, reset = make(layers=2, batch=batch)
    new, y = run(net, params, state, x, reset)
    assert y.shape == (T, *batch, H) and y.dtype == jnp.float32
    for states in (new, net.zero_state(batch)):
        assert [(s.shape, s.dtype) for s in states] == [((*batch, P // 2), jnp.complex64)] * 2
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    close(run_steps(net, params, state, x, reset), (new, y), 2e-5)


def test_parameters_stay_float32_when_float64_is_enabled():
    with jax.enable_x64(True):
        net = S5(H, P, 1, initial="random")
        params = initialise(net, jax.random.key(0))
        assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_auto_is_one_of_the_scans():
    a, b, x0, reset = map(jnp.asarray, recurrence_case([3], False))

    def program(scan):
        return str(jax.make_jaxpr(lambda a: linear_recurrence(a, b, x0, reset, scan))(a))

    assert program("auto") == program("sequential" if jax.default_backend() == "cpu" else "parallel")
    assert program("parallel") != program("sequential")


def test_initial_state_buffers_can_be_donated():
    net = S5(H, P, 3)
    state = net.zero_state((B,))
    jax.jit(lambda s: jax.tree.map(lambda v: v + 1, s), donate_argnums=0)(state)


def test_vmap_over_seeds():
    net, _, state, x, reset = make()

    def stack(*leaves):
        return jnp.stack(leaves)

    params = jax.tree.map(stack, *[make(seed)[1] for seed in range(3)])
    def loss(p, scan):
        return jnp.mean(run(net.clone(scan=scan), p, state, x, reset)[1] ** 2)

    alone = jax.jit(jax.value_and_grad(partial(loss, scan="sequential")))
    expected = [alone(jax.tree.map(lambda p: p[i], params)) for i in range(3)]
    assert len({float(value) for value, _ in expected}) == 3
    for scan in SCANS:
        together = jax.jit(jax.vmap(jax.value_and_grad(partial(loss, scan=scan))))(params)
        close(together, jax.tree.map(stack, *expected), 1e-4)


def test_inside_an_actor_critic():
    class Agent(nn.Module):
        def setup(self):
            self.embed, self.head, self.memory = nn.Dense(H), nn.Dense(2), S5(H, P, 2, initial="learned")

        def __call__(self, state, x, reset):
            state, y = self.memory(state, self.embed(x), reset)
            return state, self.head(y)

        def discretise(self):
            return self.memory.discretise()

        def act(self, discrete, state, x, reset):
            state, y = self.memory.step(discrete, state, self.embed(x), reset)
            return state, self.head(y)

    agent, state = Agent(), S5(H, P, 2).zero_state((B,))
    x, reset = jax.random.normal(jax.random.key(0), (T, B, 5)), jnp.zeros((T, B), bool).at[4].set(True)
    params = jax.jit(agent.init)(jax.random.key(1), state, x, reset)
    expected = jax.jit(agent.apply)(params, state, x, reset)
    discrete = discretise(agent, params)

    def act(s, now):
        return agent.apply(params, discrete, s, *now, method="act")

    close(jax.jit(lambda s: jax.lax.scan(act, s, (x, reset)))(state), expected, 2e-5)


@pytest.mark.parametrize("wrong", [dict(state_size=7), dict(blocks=4), dict(blocks=0), dict(scan="fast"),
                                   dict(initial="ones"), dict(dt_min=0.0), dict(dt_min=1.0)])
def test_wrong_settings_are_rejected(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        initialise(S5(**{**dict(features=H, state_size=P, layers=2), **wrong}), jax.random.key(0))


def test_imports_only_jax_numpy_and_flax():
    source = Path(s5.__file__).read_text()
    names = {(node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
             for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))
             for alias in node.names}
    assert names <= {"jax", "numpy", "flax", "functools", "typing"}
    assert len(source.splitlines()) < 300
