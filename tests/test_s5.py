"""Properties of the resettable S5 layer and the stack. What is beneath them: test_recurrence.py."""
import ast
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_recurrence import SCANS, B, P, T, close, complex_normal

import s5
from s5 import S5, hippo

H = 8


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


@pytest.mark.parametrize("scan, initial", [("parallel", "zero"), ("sequential", "learned")])
def test_nan_before_a_reset_is_gone_after_it(scan, initial):
    """In the state before a sequence, in its inputs and in acting steps; a state that is dropped has no gradient."""
    net, params, state, x, _ = make(layers=2, initial=initial, scan=scan)
    reset = jnp.zeros((T, B), bool).at[0, 0].set(True).at[4].set(True)
    bad_state = jax.tree.map(lambda s: s.at[0].set(jnp.nan), state)
    bad_x = x.at[2, 1].set(jnp.nan)
    last, y = run(net, params, state, x, reset)
    for call in (run, run_steps):
        got_last, got = call(net, params, bad_state, bad_x, reset)
        assert np.isnan(got[2:4, 1]).all() and np.isfinite(np.delete(got, 1, 1)).all()
        close((got_last, got[4:], got[:, [0, 2]]), (last, y[4:], y[:, [0, 2]]), 2e-5)

    def loss(params, state):
        return jnp.sum(jnp.sin(run(net, params, state, x, reset)[1]))

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    dropped = jax.tree.map(lambda s: s.at[0].set(0), state)
    close(gradient(params, bad_state), gradient(params, dropped))


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


# ---- Initial values ------------------------------------------------------------------------

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


# ---- dt ----------------------------------------------------------------------------------------------------

def test_dt_one_is_none_and_two_doubles_the_step_sizes():
    net, params, state, x, reset = make(initial="learned")
    ones = jnp.ones((T, B))
    close(run(net, params, state, x, reset, ones), run(net, params, state, x, reset), 2e-5)
    doubled = jax.tree_util.tree_map_with_path(
        lambda path, p: p + np.log(2) if path[-1].key == "log_dt" else p, params)
    close(run(net, params, state, x, reset, 2 * ones), run(net, doubled, state, x, reset), 2e-5)


def test_dt_can_be_a_few_values_and_the_index_of_each_step():
    """The same outputs and gradients as with a number for each step, also in acting."""
    net, params, state, x, reset = make()
    values, index = jnp.array([0.0, 0.5, 1.0, 3.0]), jax.random.randint(jax.random.key(8), (T, B), 0, 4)
    pair, numbers = (values, index), values[index]
    close(run(net, params, state, x, reset, pair), run(net, params, state, x, reset, numbers), 1e-6)
    close(run_steps(net, params, state, x, reset, (jnp.tile(values, (T, 1)), index)),
          run_steps(net, params, state, x, reset, numbers), 1e-6)

    def gradient(dt):
        return jax.jit(jax.grad(lambda p: jnp.sin(run(net, p, state, x, reset, dt)[1]).sum()))(params)

    close(gradient(pair), gradient(numbers), 1e-4)


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


@pytest.fixture(scope="module")
def pushed():
    """{push: (params, first state, last state, y, gradient)}, 10,000 steps of each in one call."""
    net, params, state, x, _ = make()
    steps = 10_000                                  # a constant input, which is what integrates up, and noise
    x = jnp.linspace(-1, 1, H) + jax.random.normal(jax.random.key(3), (steps, B, H))

    def push(name):
        tree = initialise(net, jax.random.key(0)) if name == "none" else params
        layers = {layer: dict(old) for layer, old in tree["params"].items()}
        for path, by in PUSHES[name].items():
            for layer in layers.values():
                layer[path] = jnp.zeros_like(layer[path]) if by is None else layer[path] + by
        return {"params": layers}

    def loss(params):
        new, y = net.apply(params, state, x, jnp.zeros((steps, B), bool))
        return jnp.mean(y[-100:] ** 2), (new, y)

    every = [push(name) for name in PUSHES]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)
    (_, (new, y)), gradient = jax.jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))(stacked)
    return {name: (every[i], state, *jax.tree.map(lambda leaf: np.asarray(leaf[i]), (new, y, gradient)))
            for i, name in enumerate(PUSHES)}


@pytest.mark.parametrize("push", PUSHES)
def test_stable_for_10000_steps(push, pushed):
    params, state, new, y, gradient = pushed[push]
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((new, y, gradient)))
    for discrete, old, last in zip(discretise(make()[0], params), state, new, strict=True):
        assert (discrete["lam"].real < 0).all() and (np.abs(discrete["a"]) <= 1 + 1e-6).all()
        # |u| <= sqrt(H) after the norm, so |x| <= |x_0| + max|B u| / |Re L|, mode by mode
        B_ = np.abs(discrete["B"])
        drive = 4 * np.sqrt(H) * (B_[:, :P // 2] + B_[:, P // 2:]).sum(0)
        assert (np.abs(last) <= 1.01 * np.abs(old) + drive / -discrete["lam"].real).all()
    if push == "none":
        assert np.abs(y[-2000:]).max() < 1.5 * np.abs(y[1000:3000]).max()


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


def test_dtypes_are_as_documented_when_float64_is_enabled():
    """Parameters, states and outputs, whatever the arguments: float64, complex128, and those of `zero_state`."""
    with jax.enable_x64(True):
        net = S5(H, P, 1, initial="random")
        params = initialise(net, jax.random.key(0))
        assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
        x, reset, dt = jnp.ones((2, B, H), jnp.float64), jnp.zeros((2, B), bool), jnp.ones((2, B), jnp.float64)
        state = tuple(s.astype(jnp.complex128) for s in net.zero_state((B,)))
        discrete = discretise(net, params)
        for result in (run(net, params, state, x, reset, dt),
                       net.apply(params, discrete, state, x[0], reset[0], dt[0], method="step")):
            assert [v.dtype for v in jax.tree.leaves(result)] == [jnp.complex64, jnp.float32]


@pytest.mark.parametrize("initial", ("zero", "learned"))
def test_what_is_left_out_has_a_default(initial):
    """No state begins at the initial state, no reset is none, dt may be one number."""
    net, params, _, x, _ = make(initial=initial)
    none, zeros = jnp.zeros((T, B), bool), net.zero_state((B,))
    expected = run(net, params, zeros, x, none.at[0].set(True))
    close(run(net, params, None, x, None), expected, 1e-6)
    close(run(net, params, expected[0], x, None), run(net, params, expected[0], x, none), 1e-6)
    discrete = discretise(net, params)
    state, y = net.apply(params, discrete, None, x[0], method="step")
    close(y, expected[1][0], 2e-5)
    close(net.apply(params, discrete, state, x[1], method="step")[1], expected[1][1], 2e-5)
    halves = jnp.full((T, B), 0.5)
    close(run(net, params, zeros, x, none, 0.5), run(net, params, zeros, x, none, halves), 1e-6)
    close(net.apply(params, discrete, zeros, x[0], dt=0.5, method="step")[1],
          run(net, params, zeros, x, none, halves)[1][0], 2e-5)
    shapes = jax.eval_shape(net.init, jax.random.key(0), None, x)
    assert jax.tree.map(lambda p: p.shape, shapes) == jax.tree.map(lambda p: p.shape, params)


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
    assert len(source.splitlines()) < 330  # 320 before dt could be a few values and indices
