"""sysid.py: sums, invariances, what it finds out about a known system; and what envs.Trials observes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import compiled, point_mass, rollout

import envs
import sysid

N, DIM, ACTIONS, STEPS = 3, 12, 2, 60


def simulate(seed=0, dims=5, steps=STEPS):
    """A linear system observed through a projection: observations (STEPS + 1, N, DIM), actions, rewards, A and B."""
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


def test_dtypes_stay_float32_when_float64_is_enabled():
    """Inside a scan, whose carry must not change its dtypes."""
    o, actions, rewards, _ = simulate(steps=3)
    with jax.enable_x64(True):
        state, found = jax.eval_shape(follow.__wrapped__, o, actions, rewards)
    assert {x.dtype for x in jax.tree.leaves((state, found))} == {jnp.dtype(jnp.float32)}


def test_sums_are_those_of_the_definition():
    o, actions, rewards, _ = simulate()
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
    o, actions, rewards, _ = simulate()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))[0]
    plain = follow(o, actions, rewards)[1]
    assert plain.shape == (STEPS, N, sysid.num_features(ACTIONS)) and plain.dtype == jnp.float32
    assert np.isfinite(plain).all() and np.ptp(plain[-1], axis=0).max() > 0.1
    for changed in (o @ rotation, 7.0 * o):  # float32 solves with condition numbers up to 1e4
        np.testing.assert_allclose(follow(changed, actions, rewards)[1], plain, atol=0.02)


def test_the_effects_of_actions_are_found():
    """Their inner products with each other, in units of the change, are those of the true B."""
    o, actions, rewards, effect = simulate(steps=400)
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
    o, actions, rewards, _ = simulate(seed=2)
    found = follow(scale * o, 0.0 * actions, rewards)[1]  # actions that never vary, 7 of 12 directions never seen
    assert np.isfinite(found).all() and np.abs(found).max() < 20


# ---- What Trials observe --------------------------------------------------------------------------
def test_features_are_observed_and_the_sums_end_with_the_trial():
    out = rollout(point_mass(), 18)
    count, end = sysid.num_features(2), out.transition.episode_end
    assert not out.before_any.sysid.any() and out.after.sysid.shape == (18, 16, count)
    assert (out.after.sysid.any(-1) == ~end).all()  # 0 at episode starts
    after = jax.tree.map(lambda before, last: np.concatenate([before[1:], np.array(last)[None]]),
                         out.state.sysid, out.last.sysid)
    steps = 0
    for t in range(18):
        steps = 0 if t == 17 else sysid.FORGETTING * steps + 1
        np.testing.assert_allclose(after.steps[t], steps, rtol=1e-6)
    assert (after.change.any(-1) == ~end).all()  # no episode follows from the one before
    values = np.array(envs.action_values())[out.action]
    np.testing.assert_allclose(after.action, np.where(end[..., None], 0, values), rtol=1e-6)
    # the observation that the next change is counted from is the one observed
    np.testing.assert_allclose(np.sign(after.o) * np.log1p(np.abs(after.o)), out.after.projected,
                               rtol=1e-5, atol=1e-6)


def test_a_diverged_step_leaves_no_trace():
    reset, step = compiled(point_mass())
    state, _ = reset(jax.random.PRNGKey(0), False)
    for t in range(4):
        if t == 1:
            qvel = state.env[0].qvel
            state = state.replace(env=(state.env[0].replace(qvel=qvel.at[:2].set(jnp.nan)),))
        before = state.sysid
        state, observation, transition = step(state, jnp.full((16, 2), 6), t)
        np.testing.assert_array_equal(transition.diverged, (np.arange(16) < 2) & (t == 1))
        assert np.isfinite(observation.sysid).all()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.sysid))
        if t == 1:
            for name in ("keys", "targets", "changes", "rewarded", "reward", "steps"):
                found, expected = (getattr(x, name)[:2] for x in (state.sysid, before))
                np.testing.assert_array_equal(found, expected)
    three = 1 + sysid.FORGETTING + sysid.FORGETTING**2
    np.testing.assert_allclose(state.sysid.steps[:2], three, rtol=1e-6)
    np.testing.assert_allclose(state.sysid.steps[2:], 1 + sysid.FORGETTING * three, rtol=1e-6)


def test_which_discrete_action_pushes_which_way():
    """A push to the right moves the cart right and the pole left, however all three are observed."""
    trials = envs.Trials(["popgym:StatelessCartPoleEasy"], 16, projection="orthogonal", obs_size=4, sysid=True,
                         episodes_per_trial=100, observe_change=False, privileged=False)
    assert trials.discrete
    out = rollout(trials, 120)
    matrix, permutation = np.array(out.last.obs_matrix), np.array(out.last.act_matrix)
    assert out.last.counters.episode.min() > 0 and not out.transition.trial_end.any()
    assert out.after.sysid[-1].any()
    right = np.array([1.0, -1.5]) @ matrix.swapaxes(1, 2)  # 1.1 kg, half a metre
    bends = np.array(out.last.sysid.model.effects)[:, 4:]  # (16, 2, 4), of the actions as they are observed
    sign = 2.0 * permutation - 1.0  # what they are to the environment: left, right
    assert 0 < sign[:, 0].clip(0).sum() < 16
    length = np.linalg.norm(bends, axis=-1) * np.linalg.norm(right, axis=-1)[:, None]
    cosine = np.einsum("nmi,ni->nm", bends, right) / length
    assert (cosine * sign > 0.9).all()
