"""sysid.py: sums, invariances, what it finds out about a known system; and how envs.Lanes shows it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import sysid

N, DIM, ACTIONS, STEPS = 3, 12, 2, 60


def live(seed=0, dims=5, steps=STEPS):
    """A linear system seen through a projection: observations (STEPS + 1, N, DIM), actions, rewards, A and B."""
    rng = np.random.default_rng(seed)
    drift = 0.05 * rng.normal(size=(dims, dims)) - 0.1 * np.eye(dims)
    effect = 0.2 * rng.normal(size=(dims, ACTIONS))
    project = rng.normal(size=(N, DIM, dims)) / np.sqrt(dims)
    actions = rng.choice([-1.0, 0.0, 1.0], size=(steps, N, ACTIONS))
    states = [rng.normal(size=(N, dims))]
    for action in actions:
        states.append(states[-1] @ (np.eye(dims) + drift).T + action @ effect.T)
    o = np.einsum("nij,tnj->tni", project, np.stack(states))
    rewards = np.stack(states)[1:, :, 0] > 0
    return o, actions, rewards.astype(float), np.einsum("nij,jk->nik", project, effect)


@jax.jit
def follow(o, actions, rewards):
    """(STEPS, N, features) after each transition, and the last state."""
    def step(state, x):
        state = sysid.fit(sysid.update(state, *x))
        return state, sysid.features(state)
    o, actions, rewards = (jnp.asarray(x, jnp.float32) for x in (o, actions, rewards))
    return jax.lax.scan(step, sysid.start(o[0], ACTIONS), (actions, rewards, o[1:]))


def test_sums_are_those_of_the_definition():
    o, actions, rewards, _ = live()
    state, _ = follow(o, actions, rewards)
    weight = sysid.FORGETTING ** np.arange(STEPS)[::-1]
    before = np.concatenate([np.zeros((1, N, ACTIONS)), actions[:-1]])
    keys = np.concatenate([o[:-1], actions, before, np.ones((STEPS, N, 1))], -1)
    change = np.diff(o, axis=0)
    bend = np.diff(change, axis=0, prepend=change[:1])
    targets = np.concatenate([change, bend, rewards[..., None]], -1)
    np.testing.assert_allclose(state.keys, np.einsum("t,tni,tnj->nij", weight, keys, keys), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.targets, np.einsum("t,tni,tnj->nij", weight, keys, targets), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.changes, np.einsum("t,tni,tnj->nij", weight, change, change), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.rewarded, np.einsum("tn,tni->ni", rewards, o[1:]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.steps[:, 0], weight.sum(), rtol=1e-5)


def test_features_do_not_change_with_the_frame_or_the_unit_of_observations():
    o, actions, rewards, _ = live()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))[0]
    plain = follow(o, actions, rewards)[1]
    assert plain.shape == (STEPS, N, sysid.num_features(ACTIONS)) and plain.dtype == jnp.float32
    assert np.isfinite(plain).all() and np.ptp(plain[-1], axis=0).max() > 0.1
    for changed in (o @ rotation, 7.0 * o):  # float32 solves with condition numbers up to 1e4
        np.testing.assert_allclose(follow(changed, actions, rewards)[1], plain, atol=0.02)


def test_the_effects_of_actions_are_found():
    """Their inner products with each other, in units of the change, are those of the true B."""
    o, actions, rewards, effect = live(steps=400)
    found = np.sinh(follow(o, actions, rewards)[1][-1])
    change = np.diff(o, axis=0)
    weight = sysid.FORGETTING ** np.arange(400)[::-1]
    unit = np.einsum("t,tni->n", weight, change ** 2) / weight.sum() / DIM
    i, j = np.triu_indices(5 + 3 * ACTIONS)
    for a, b in ((0, 0), (0, 1), (1, 1)):
        column = np.flatnonzero((i == 5 + a) & (j == 5 + b))[0]
        expected = np.einsum("ni,ni->n", effect[..., a], effect[..., b]) / unit
        np.testing.assert_allclose(found[:, column], expected, rtol=0.1, atol=0.2)


def test_a_trial_without_steps_has_found_nothing():
    assert not sysid.features(sysid.start(jnp.ones((N, DIM)), ACTIONS)).any()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_features_are_finite_and_of_moderate_size(scale):
    o, actions, rewards, _ = live(seed=2)
    found = follow(scale * o, 0.0 * actions, rewards)[1]  # actions that never vary, 7 of 12 directions never seen
    assert np.isfinite(found).all() and np.abs(found).max() < 20


# ---- What Lanes shows --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lanes():
    return envs.Lanes(["point_mass-easy"], 4, identify=True, episodes_per_trial=2,
                      env_kwargs=dict(max_steps_in_episode=6), stagger=False)


def test_lanes_show_what_is_found_and_forget_it_with_the_trial(lanes):
    state, inputs = lanes.reset(jax.random.PRNGKey(0))
    step, count = jax.jit(lanes.step), sysid.num_features(2)
    assert inputs.shape == (4, lanes.input_size) and lanes.input_size == 12 + 2 + 3 + count
    assert lanes.output_of_input[-count:] == (11,) * count and not inputs[:, -count:].any()
    for t in range(12):
        action = jax.random.normal(jax.random.PRNGKey(t), (4, 2))
        expected = sysid.update(state.identified, action, jnp.zeros(4), state.identified.o)
        state, inputs, out = step(state, action, t)
        assert out.final_input[:, -count:].any(-1).all()  # a value is bootstrapped from what is known
        assert (inputs[:, -count:].any(-1) == ~out.episode_end).all()  # 0 at episode starts
        np.testing.assert_allclose(state.identified.steps, 0.0 if t == 11 else expected.steps)
        for what in (state.identified.change, state.identified.action):  # no episode follows from the one before
            assert (what.any(-1) == ~out.episode_end).all()
        np.testing.assert_allclose(  # the observation that the next change is counted from is the one shown
            jnp.sign(state.identified.o) * jnp.log1p(jnp.abs(state.identified.o)), inputs[:, :12], rtol=1e-5, atol=1e-6)


def test_a_diverging_lane_leaves_no_trace(lanes):
    state, _ = lanes.reset(jax.random.PRNGKey(0))
    step = jax.jit(lanes.step)
    for t in range(4):
        action = jnp.full((4, 2), jnp.nan) if t == 1 else jnp.ones((4, 2))
        state, inputs, _ = step(state, action, t)
        assert np.isfinite(inputs).all() and all(np.isfinite(x).all() for x in jax.tree.leaves(state.identified))
    np.testing.assert_allclose(state.identified.steps, 1 + sysid.FORGETTING + sysid.FORGETTING**2, rtol=1e-6)


def test_which_discrete_action_pushes_which_way():
    """A push to the right moves the cart right and the pole left, whatever both look like and the push is called."""
    lanes = envs.Lanes(["popgym:StatelessCartPoleEasy"], 16, "orthogonal", obs_size=4, identify=True,
                       episodes_per_trial=100, stagger=False)
    state, inputs = lanes.reset(jax.random.PRNGKey(0))
    count = sysid.num_features(2)
    assert lanes.discrete and inputs.shape == (16, lanes.input_size) == (16, 4 + 2 + 3 + count)
    right = jnp.array([1.0, -1.5]) @ jnp.swapaxes(state.obs_matrix, 1, 2)  # 1.1 kg, half a metre
    step = jax.jit(lanes.step)
    for t in range(120):
        state, inputs, out = step(state, jax.random.randint(jax.random.PRNGKey(t), (16,), 0, 2), t)
    assert state.episode.min() > 0 and not out.trial_end.any() and inputs[:, -count:].any()
    bends = state.identified.model.effects[:, 4:]  # (16, 2, 4), of the actions as the agent calls them
    sign = 2.0 * state.act_matrix - 1.0  # what they are to the environment: left, right
    assert 0 < sign[:, 0].clip(0).sum() < 16
    length = jnp.linalg.norm(bends, axis=-1) * jnp.linalg.norm(right, axis=-1)[:, None]
    cosine = jnp.einsum("nmi,ni->nm", bends, right) / length
    assert (cosine * sign > 0.9).all()


def test_nothing_is_identified_where_nothing_is_hidden():
    for kwargs in (dict(tasks=["point_mass-easy"], projection="identity"),
                   dict(tasks=["CartPole-v1"], projection="none")):
        assert not envs.Lanes(num_lanes=2, identify=True, **kwargs).identify


# ---- The categorical policy over continuous actions --------------------------------------------------------
def test_binned_actions():
    logits = jax.random.normal(jax.random.PRNGKey(0), (50, 2, 5))
    policy = envs.continuous_policy("categorical", logits.reshape(50, 10), 2)
    action, log_prob = policy.sample_and_log_prob(seed=jax.random.PRNGKey(1))
    assert action.shape == (50, 2) and set(np.unique(action)) <= {-5.0, -1.25, 0.0, 1.25, 5.0}
    np.testing.assert_allclose(policy.log_prob(action), log_prob, rtol=1e-5)
    every = jnp.stack(jnp.meshgrid(policy.values, policy.values), -1).reshape(25, 1, 2)
    log_probs = jax.vmap(policy.log_prob)(jnp.broadcast_to(every, (25, 50, 2)))
    np.testing.assert_allclose(jnp.exp(log_probs).sum(0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(-(jnp.exp(log_probs) * log_probs).sum(0), policy.entropy(), rtol=1e-4)
    np.testing.assert_allclose(policy.log_prob(policy.mode()), log_probs.max(0), rtol=1e-5)


def test_a_normal_policy_cannot_collapse():
    outputs = jnp.array([[0.2, -1e3, 0.4, 1e3]])
    policy = envs.continuous_policy("gaussian", outputs, 2)
    np.testing.assert_allclose(policy.mean(), [[0.2, 0.4]])
    np.testing.assert_allclose(policy.stddev(), np.exp([[-1.2, 0.3]]), rtol=1e-5)
