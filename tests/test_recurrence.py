"""The recurrence of s5.py: the operator, the scans, their gradients, HiPPO and the discretisation."""
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s5 import hippo, linear_recurrence, reset_operator, zoh

T, B, P = 11, 3, 12       # small, and T no power of two: the time goes into compiling
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
        x = np.where(reset[t][..., None], 0, (a if a.ndim == 1 else a[t]) * x) + b[t]
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


def pairs_of(values):
    return [jnp.stack([v.real, v.imag]) for v in values]              # real: no convention of conjugation


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("scan", SCANS)
def test_recurrence_gradients(scan, varying):
    """The hand-written adjoint, in float64, against autodiff of the operator scan and finite differences."""
    with jax.enable_x64(True):
        case = recurrence_case([0, 3, 4, 9], varying, seed=3)
        weights = jnp.asarray(complex_normal(np.random.default_rng(9), T, B, P))
        reset = jnp.asarray(case[3])
        pairs = pairs_of(case[:3])

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


# ---- What is not finite before a reset ---------------------------------------------------------------------

@pytest.mark.parametrize("scan", SCANS)
def test_a_reset_stops_nan_in_the_values_and_in_the_gradient(scan):
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2))
    def grad(a, b, x0, reset, first):
        x = linear_recurrence(a, b, x0, reset, scan)
        return jnp.where((jnp.arange(6) >= first)[:, None], x, 0).sum()

    a, b, x0 = jnp.array([0.9]), jnp.ones((6, 1)), jnp.zeros(1)
    value, gradient = grad(a, b.at[1].set(jnp.nan), x0, jnp.arange(6) == 3, 3)
    np.testing.assert_allclose(value, 5.61, rtol=1e-6)                              # 1 + 1.9 + 2.71
    np.testing.assert_allclose(np.concatenate(gradient, None), [3.8, 0, 0, 0, 2.71, 1.9, 1, 0], rtol=1e-6)
    close(grad(a, b, x0 * jnp.nan, jnp.arange(6) == 0, 0), grad(a, b, x0, jnp.arange(6) == 0, 0), 1e-6)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("scan", SCANS)
def test_only_what_depends_on_nan_is_nan(scan, varying):
    """NaN and infinity anywhere in a, b and x0, in float64.

    The values are those of a loop that selects. The gradient of what is finite is that of the same inputs
    with ordinary numbers instead, since it does not depend on them.
    """
    def values(pairs, reset):
        return linear_recurrence(*(jax.lax.complex(v[0], v[1]) for v in pairs), reset, scan)

    def loss(recurrence, pairs, weights, reset):
        x = recurrence(*(jax.lax.complex(v[0], v[1]) for v in pairs), reset)
        return jnp.sum(jnp.where(weights != 0, x * weights, 0).real)

    with jax.enable_x64(True):
        forward = jax.jit(values)
        ours = jax.jit(jax.grad(lambda *x: loss(partial(linear_recurrence, scan=scan), *x)))
        plain = jax.jit(jax.grad(lambda *x: loss(operator_scan, *x)))
        seen = []
        for seed in range(30):
            rng = np.random.default_rng(seed)
            clean = recurrence_case([], varying, seed)[:3]
            reset = rng.random((T, B)) < 0.25
            bad = [(rng.random(v.shape) < chance) * (v.ndim > 1) for v, chance in zip(clean, (0.03, 0.05, 0.2))]
            dirty = [np.where(m, rng.choice([np.nan, np.inf]), v) for m, v in zip(bad, clean)]
            with np.errstate(invalid="ignore"):
                expected = numpy_recurrence(*dirty, reset)
            finite = np.isfinite(expected)
            got = np.asarray(forward(pairs_of(dirty), reset))
            np.testing.assert_array_equal(np.isfinite(got), finite)
            np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-10, atol=1e-10)
            weights = np.where(finite, complex_normal(rng, T, B, P), 0)
            close(ours(pairs_of(dirty), weights, reset), plain(pairs_of(clean), weights, reset), 1e-10)
            seen.append((finite.mean(), sum(m.sum() for m in bad)))
        assert 0.5 < np.mean(seen, 0)[0] < 0.95 and min(np.array(seen)[:, 1]) > 0


@pytest.mark.parametrize("scan", SCANS)
def test_a_reset_stops_nan_in_cotangents(scan):
    """NaN in the gradient of a later state does not reach what stands before a reset."""
    a, b, x0, _ = recurrence_case([], False)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        reset, dx = rng.random((T, B)) < 0.3, complex_normal(rng, T, B, P)
        dx[rng.random(dx.shape) < 0.1] = np.nan
        later = np.roll(reset, -1, 0)[::-1]            # of the reversed recurrence, whose first state is 0
        expected = numpy_recurrence(a, dx[::-1], 0 * x0, later)[::-1]
        db = np.asarray(pull_back(jnp.asarray(b), jnp.asarray(dx), a, x0, reset, scan))
        np.testing.assert_array_equal(np.isnan(db), np.isnan(expected))
        np.testing.assert_allclose(db, expected, rtol=1e-4, atol=1e-4)
        assert 0.1 < np.isnan(db).mean() < 0.9


@partial(jax.jit, static_argnums=5)
def pull_back(b, dx, a, x0, reset, scan):
    return jax.vjp(lambda b: linear_recurrence(a, b, x0, reset, scan), b)[1](dx)[0]


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


def test_a_bare_real_part_would_not_be_stable():
    """What the parametrisation is for: pushed as far, eigenvalues used as they are overflow."""
    a, _ = zoh(jnp.asarray(hippo(P)[0] + 0.6, jnp.complex64), jnp.float32(0.1))
    b, reset = jnp.ones((10_000, P // 2)), jnp.zeros(10_000, bool)
    assert not np.isfinite(recur(a, b, jnp.zeros(P // 2), reset, "sequential")).all()


def test_auto_is_one_of_the_scans():
    a, b, x0, reset = map(jnp.asarray, recurrence_case([3], False))

    def program(scan):
        return str(jax.make_jaxpr(lambda a: linear_recurrence(a, b, x0, reset, scan))(a))

    assert program("auto") == program("sequential" if jax.default_backend() == "cpu" else "parallel")
    assert program("parallel") != program("sequential")
