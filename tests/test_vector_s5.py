"""vector_s5.py: a step is the sequence, resets cut the past, rotations change nothing."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vector_s5 import VectorS5, inverse

T, N, S, V, n = 35, 5, 3, 2, 12

def apply(net, params, *inputs):
    return jax.jit(net.apply)(params, *inputs)


@pytest.fixture(scope="module")
def case():
    net = VectorS5(features=16, scalars=S, vectors=V, size=n, actions=2)
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    s, v = jax.random.normal(keys[0], (T, N, S)), 10 * jax.random.normal(keys[1], (T, N, V, n))
    reset = (jax.random.uniform(keys[2], (T, N)) < 0.08).at[0].set(True)
    state = net.zero_state((N,))
    params = jax.jit(net.init)(keys[3], state, s, v, reset)
    # at first the layer is silent
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(keys[3], x.shape), params)
    return net, params, state, s, v, reset


def close(a, b, tol=2e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tol, rtol=tol), a, b)


def test_inverse():
    x = jax.random.normal(jax.random.PRNGKey(1), (7, 5, 9))
    m = x @ x.mT + 0.1 * jnp.eye(5)
    close(inverse(m), jnp.linalg.inv(m))
    gradient = jax.grad(lambda f, m: (jnp.sin(f(m)) * x[..., :5]).sum(), 1)
    close(gradient(inverse, m), gradient(jnp.linalg.inv, m), 1e-3)


@pytest.mark.parametrize("T", [2, 32, 35], ids=lambda T: f"{T} steps")
def test_step_is_sequence(case, T):
    net, params, state, *inputs = case
    s, v, reset = (x[:T] for x in inputs)
    end, y = apply(net, params, state, s, v, reset)
    step, ys = jax.jit(lambda *x: net.apply(params, *x, method="step")), []
    for t in range(T):
        state, now = step(state, s[t], v[t], reset[t])
        ys.append(now)
    close(jnp.stack(ys), y)
    close(state, end)


def test_sequence_in_two_parts(case):
    net, params, state, s, v, reset = case
    y = apply(net, params, state, s, v, reset)[1]
    state, first = apply(net, params, state, s[:16], v[:16], reset[:16])
    close(jnp.concatenate([first, apply(net, params, state, s[16:], v[16:], reset[16:])[1]]), y)


def test_parallel(case):
    net, params, *x = case
    y = [apply(net.clone(scan=scan), params, *x)[1] for scan in ("sequential", "parallel")]
    close(*y)


def test_reset_cuts_the_past(case):
    net, params, state, s, v, reset = case
    reset = jnp.zeros_like(reset).at[16].set(True)
    y = apply(net, params, state, s, v, reset)[1]
    fresh = apply(net, params, state, s[16:], v[16:], reset[16:])[1]
    close(y[16:], fresh)
    assert abs(apply(net, params, state, s, v, jnp.zeros_like(reset))[1][16:] - fresh).max() > 0.1


@pytest.mark.parametrize("scan", ["sequential", "parallel"])
def test_nan_before_a_reset_is_gone_after_it(case, scan):
    """In the state before a sequence and in its inputs; environments do not touch each other."""
    net, params, state, s, v, reset = case
    reset = jnp.zeros_like(reset).at[0].set(True).at[10, 0].set(True)
    dirty = jax.tree.map(lambda x: x.at[1].set(jnp.nan) if x.dtype == jnp.float32 else x, state)
    net = net.clone(scan=scan)
    end, y = apply(net, params, state, s, v, reset)
    dirty_end, got = apply(net, params, dirty, s.at[4, 0].set(jnp.nan), v.at[7, 0, 1].set(jnp.inf), reset)
    assert not (np.isfinite(got[8, 0]) & (got[8, 0] != 0)).any()
    assert np.isfinite(got[10:]).all() and np.isfinite(got[:, 1:]).all()
    close(got[10:], y[10:])
    close(got[:, 1:], y[:, 1:])
    close(dirty_end, end)


def test_float64_inputs_of_x64_change_no_dtype(case):
    """A step inside lax.scan keeps the dtypes of `zero_state`."""
    net, _, _, s, v, reset = case
    with jax.enable_x64(True):
        s, v = (jnp.asarray(x[:2], jnp.float64) for x in (s, v))
        state = net.zero_state((N,))
        params = jax.jit(net.init)(jax.random.PRNGKey(0), state, s, v, reset[:2])
        end, y = jax.eval_shape(lambda p: jax.lax.scan(
            lambda state, x: net.apply(p, state, *x, method="step"), state, (s, v, reset[:2])), params)
        again = jax.eval_shape(net.apply, params, state, s, v, reset[:2])
    assert {x.dtype for x in jax.tree.leaves((params, y, again[1]))} == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(lambda x: x.dtype, end) == jax.tree.map(lambda x: x.dtype, again[0])


def test_rotation_changes_nothing(case):
    net, params, state, s, v, reset = case
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.PRNGKey(2), (n, n)))[0]
    close(apply(net, params, state, s, v @ rotation, reset)[1], apply(net, params, state, s, v, reset)[1], 1e-3)


def test_the_goal_is_attention_with_logits_from_the_scalars(case):
    """The mean of the first value over the trial, weighted by softmax; older steps count less."""
    net, params, state, s, v, reset = case
    reset = jnp.zeros_like(reset).at[12].set(True)
    goal = apply(net, params, state, s, v, reset)[0].held.goal  # computed last in step 32
    p = params["params"]
    values = jax.jit(lambda *x: net.apply(params, *x, method=lambda net, *x: net._keys_and_values(*x)[1]))
    w = state.lagged
    found = []
    for t in range(33):
        w = jnp.where(reset[t][:, None], 0.0, w)
        found.append(values(s[t], v[t], state.traces, w)[:, 0])
        lag = jnp.repeat(jnp.exp(-jnp.exp(p["lagged_dt"])), n)
        w = lag * w + (1 - lag) * v[t].reshape(N, -1)
    logits = s[12:33] @ p["focus"] - jnp.exp(p["sums_dt"]) * jnp.arange(20, -1, -1)[:, None]
    close(goal, (jax.nn.softmax(logits, 0)[..., None] * jnp.stack(found)[12:]).sum(0), 1e-3)


@pytest.mark.parametrize("first", [0.0, 1e-7])
def test_output_is_bounded_when_motion_begins(case, first):
    """The first change of a trial is nothing, so the next is large in units of those so far."""
    net, params, state, s, v, reset = case
    v = v.at[0, :, 1].multiply(first)
    assert abs(apply(net, params, state, s, v, jnp.zeros_like(reset))[1]).max() < 20


def test_gradients_are_finite(case):
    net, params, *x = case
    gradient = jax.jit(jax.grad(lambda p: jnp.square(net.apply(p, *x)[1]).sum()))(params)
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(gradient))
