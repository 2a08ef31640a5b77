"""Tests of dmc.py: models, steps, rewards and starts against dm_control."""
import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "disable")  # before dm_control is imported: nothing is rendered
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import dmc

TASKS = tuple(dmc.TASKS)
KEY = jax.random.PRNGKey(0)
STARTS = {}  # of each task, the first task that starts like it
for name, task in dmc.TASKS.items():
    same = [t for t in STARTS if (dmc.TASKS[t].model, repr(dmc.TASKS[t].start)) == (task.model, repr(task.start))]
    STARTS[name] = same[0] if same else name


def make(task, backend="fused"):
    env = dmc.DMC(task, backend)
    return env, env.default_params


@functools.cache
def dm_env(task, seed=0):
    suite = pytest.importorskip("dm_control.suite")
    return suite.load(*task.split("-"), task_kwargs={"random": seed})


# ---- Models ------------------------------------------------------------------------------------------------
FIELDS = {
    "body": "parent weld pos quat ipos iquat mass inertia invweight0 subtreemass gravcomp",
    "jnt": "type body pos axis limited range stiffness margin solref solimp actfrclimited actgravcomp",
    "geom": "type body size pos quat friction margin gap solref solimp solmix condim contype conaffinity "
            "priority",
    "site": "type body size pos quat",
    "actuator": "trntype trnid gear ctrllimited ctrlrange forcelimited gaintype gainprm biastype biasprm "
                "dyntype",
    "tendon": "limited range solref_lim solimp_lim solref_fri solimp_fri margin stiffness damping "
              "frictionloss invweight0 length0 lengthspring",
    "sensor": "type objtype cutoff",
}
DOF_FIELDS = "damping armature frictionloss invweight0 M0 solref solimp"
OPTIONS = ("timestep integrator cone gravity wind density viscosity solver iterations ls_iterations "
           "tolerance ls_tolerance noslip_iterations impratio disableflags disableactuator o_margin o_solref "
           "o_solimp")
UNREAD_SITES, UNREACHED_GEOMS = {"tip", "target"}, {"ground", "proximal_decoration", "spinner_decoration"}
KINDS = {"jnt": "joint"}
TOUCH = {"finger": slice(7, 9), "hopper": slice(13, 15)}  # in the observation


def names_of(model, kind):
    kind = getattr(mujoco.mjtObj, f"mjOBJ_{KINDS.get(kind, kind).upper()}")
    count = sum(1 for i in range(200) if mujoco.mj_id2name(model, kind, i) is not None)
    return {mujoco.mj_id2name(model, kind, i): i for i in range(200 if count else 0)
            if mujoco.mj_id2name(model, kind, i) is not None}


def element(model, kind, index):
    """{field: value} of one element, references to bodies by name."""
    out = {}
    for field in FIELDS[kind].split():
        if field in ("body", "parent", "weld"):
            out[field] = model.body(getattr(model, f"{kind}_{field}id")[index]).name
        else:
            out[field] = np.array(getattr(model, f"{kind}_{field}")[index])
    if kind == "jnt":
        dof, q = model.jnt_dofadr[index], model.jnt_qposadr[index]
        out |= {field: np.array(getattr(model, f"dof_{field}")[dof]) for field in DOF_FIELDS.split()}
        out |= {"qpos0": model.qpos0[q], "qpos_spring": model.qpos_spring[q], "address": (dof, q)}
    return out


@pytest.mark.parametrize("task", TASKS)
def test_model_equals_dm_control(task):
    """Every compiled field that physics reads: elements by name, joints and actuators also in order."""
    theirs_env = dm_env(task)
    theirs_env.reset()  # the spin task writes a damping at the first reset
    theirs, ours = theirs_env.physics.model.ptr, dmc.DMC(task).model
    no_contacts = mujoco.mjtDisableBit.mjDSBL_CONTACT | mujoco.mjtDisableBit.mjDSBL_CONSTRAINT
    contacts = not theirs.opt.disableflags & no_contacts
    checked = 0
    for kind in FIELDS:
        have, want = names_of(ours, kind), names_of(theirs, kind)
        if kind == "geom":  # masses, inertias and frames are compared per body; here: what can collide
            want = {n: i for n, i in want.items() if contacts and theirs.geom_contype[i]
                    and not (task.startswith("finger") and n in UNREACHED_GEOMS)}
            have = {n: i for n, i in have.items() if contacts}
        elif kind == "site":
            want = {n: i for n, i in want.items() if contacts and n not in UNREAD_SITES}
        elif kind == "sensor":
            want = {n: i for n, i in want.items() if theirs.sensor_type[i] == mujoco.mjtSensor.mjSENS_TOUCH}
        assert list(have) == list(want), kind
        for name in have:
            a, b = element(ours, kind, have[name]), element(theirs, kind, want[name])
            if kind == "site" and name in ("ball", "cup"):
                del a["size"], b["size"]  # ends of the string: points
            if kind == "actuator":
                a["trnid"], b["trnid"] = a["trnid"][0], b["trnid"][0]
            for field in a:
                if np.asarray(a[field]).dtype.kind in "US":
                    assert a[field] == b[field], (kind, name, field)
                else:
                    np.testing.assert_allclose(a[field], b[field], rtol=1e-12, atol=1e-14,
                                               err_msg=f"{kind} {name} {field}")
                checked += 1
    for field in OPTIONS.split():
        np.testing.assert_allclose(getattr(ours.opt, field), getattr(theirs.opt, field), err_msg=field)
    np.testing.assert_allclose(ours.wrap_prm, theirs.wrap_prm if task != "point_mass-hard" else [1, 0, 0, 1])
    np.testing.assert_array_equal(ours.wrap_type, theirs.wrap_type)
    np.testing.assert_allclose(ours.stat.meaninertia, theirs.stat.meaninertia, rtol=1e-12)
    for model in (ours, theirs):
        assert model.npair == model.nexclude == model.neq == 0
    assert checked > 50


# ---- Steps, rewards and starts against dm_control ----------------------------------------------------------
def extras(task, physics):
    """The task's per-episode values in dm_control's model, by the names of DMCState."""
    model = physics.named.model
    if task.startswith("finger-turn"):
        return {"target": np.array(model.site_pos["target", ["x", "z"]]) - [0.2, 0.4]}
    if task.startswith("reacher"):
        return {"target": np.array(model.geom_pos["target", ["x", "y"]])}
    return {"wrap_prm": physics.model.wrap_prm.copy()} if task == "point_mass-hard" else {}


def reward_near(task, physics, rng):
    """Moves dm_control to where the task pays, so that rewards are compared where they vary."""
    q, v, model = physics.data.qpos, physics.data.qvel, physics.named.model
    with physics.reset_context():
        if task == "ball_in_cup-catch":
            q[:] = [0, 0, rng.uniform(-0.01, 0.01), 0.355]
        elif task.startswith("finger-turn"):
            angle = -q[2] + rng.uniform(-0.3, 0.3)
            model.site_pos["target", ["x", "z"]] = 0.2 + 0.13 * np.sin(angle), 0.4 + 0.13 * np.cos(angle)
        elif task == "finger-spin":
            v[2] = -16.0
        elif task.startswith("reacher"):
            tip = physics.named.data.geom_xpos["finger", ["x", "y"]]
            model.geom_pos["target", ["x", "y"]] = tip + rng.uniform(-0.02, 0.02, 2)
        else:
            q[:] = rng.uniform(-0.03, 0.03, len(q))
            if task.startswith(("cheetah", "hopper", "walker")):  # at some speed
                v[list(physics.named.data.qpos.axes.row.names).index("rootx")] = rng.uniform(0, 12)


def tasks_like(task):
    """Tasks that differ in the reward only: one compiled step and one set of transitions does for all."""
    model = dmc.TASKS[task].model
    return [task] if task.startswith(("finger", "reacher")) else [t for t in TASKS if dmc.TASKS[t].model == model]


@functools.cache
def transitions(task):
    """dm_control's transitions: dict of (T, ...) float64 arrays; the first 1000 are one whole episode."""
    env, rng, out = dm_env(task, seed=1), np.random.default_rng(2), []
    env.physics.model.opt.tolerance = 0  # C's solver runs to the end; how early it may stop: tests/test_physics.py
    others = [dm_env(other).task for other in tasks_like(task)[1:]]
    nu, physics = env.physics.model.nu, env.physics

    def run(steps, actions):
        for t in range(steps):
            before = {"qpos": physics.data.qpos.copy(), "qvel": physics.data.qvel.copy()}
            before |= extras(task, physics)
            step = env.step(actions(t))
            obs = np.concatenate([np.ravel(x) for x in step.observation.values()])
            action, reward = np.array(physics.data.ctrl), float(step.reward)
            reward = [reward] + [float(other.get_reward(physics)) for other in others]
            out.append(before | {"action": action, "obs": obs, "reward": reward})
            assert step.last() == (len(out) == 1000) and step.discount == 1.0

    held = np.zeros(nu)

    def random_or_bang(t):  # alternates; beyond the limits too, which the actuators clip
        if t // 100 % 2 == 0:
            return rng.uniform(-1.3, 1.3, nu)
        if t % 10 == 0:
            held[:] = rng.choice([-1.0, 1.0], nu)
        return held

    env.reset()
    run(1000, random_or_bang)
    for _ in range(10):
        env.reset()
        reward_near(task, physics, rng)
        run(30, lambda t: rng.uniform(-0.3, 0.3, nu))
    return {k: np.array([x[k] for x in out]) for k in out[0]}


def our_step(task, data):
    """Observations (T, .) of our step from dm_control's states and actions, rewards (T, tasks like this)."""
    env, params = make(task)
    state = {k: jnp.asarray(data[k]) for k in ("qpos", "qvel", "target", "wrap_prm") if k in data}
    count = len(data["obs"])
    touch = jnp.zeros((count, 2)) if task.split("-")[0] in TOUCH else None
    state = dmc.DMCState(**state, time=jnp.zeros(count, jnp.int32), touch=touch)

    def step(state, action):
        obs, after, reward, terminated, _ = env.step_env(KEY, state, action, params)
        assert obs.dtype == reward.dtype == jnp.float32
        others = [dmc.TASKS[other].reward(after, action, env) for other in tasks_like(task)[1:]]
        return obs, jnp.stack([reward, *others]), terminated

    obs, reward, terminated = jax.jit(jax.vmap(step))(state, jnp.asarray(data["action"]))
    assert not terminated.any()
    return np.array(obs), np.array(reward)


@pytest.mark.parametrize("task", [task for task in TASKS if tasks_like(task)[0] == task])
def test_step_equals_dm_control(task):
    """Next observation and rewards from the same state and action, in float64 and in float32 arithmetic.

    Observations leave in float32, so the float64 bound is float32's rounding. C joins or splits a contact of
    two parallel capsules (a state in thousands), hence percentiles.
    """
    data = transitions(task)
    assert data["obs"].shape[1] == dmc.TASKS[task].obs_dim
    assert (data["reward"].std(0) > 0.01).all(), "the transitions do not exercise the reward"
    domain = task.split("-")[0]
    if domain in TOUCH:
        assert (data["obs"][:, TOUCH[domain]] > 0.5).any(0).all(), "the transitions do not exercise touch"
    with jax.enable_x64(True):
        precise = our_step(task, data)
    for (obs, reward), bound, name in ((precise, 2e-7, "float64"), (our_step(task, data), 1e-4, "float32")):
        error = (np.abs(obs - data["obs"]) / (1 + np.abs(data["obs"]))).max(1)
        reward_error = np.abs(reward - data["reward"])
        print(f"{task} {name}: p99.8 {np.quantile(error, 0.998):.1e} max {error.max():.1e} "
              f"reward {np.quantile(reward_error, 0.998):.1e} {reward_error.max():.1e}")
        assert np.quantile(error, 0.998) < bound and np.quantile(reward_error, 0.998) < bound
        assert error.max() < 0.1


def dm_starts(task, count):
    """State, observation and target (count, .) of dm_control's resets."""
    env, starts = dm_env(task, seed=3), []
    for _ in range(count):
        obs = env.reset().observation
        physics = env.physics
        starts.append({"qpos": physics.data.qpos.copy(), "qvel": physics.data.qvel.copy(),
                       "obs": np.concatenate([np.ravel(x) for x in obs.values()])} | extras(task, physics))
        assert task.startswith(MAY_TOUCH) or physics.data.ncon == 0
    return {k: np.array([x[k] for x in starts]) for k in starts[0]}


def assert_same_distribution(ours, theirs):
    """Two-sample Kolmogorov-Smirnov test of every coordinate."""
    stats = pytest.importorskip("scipy.stats")
    for name in theirs:
        for k in range(theirs[name].shape[1]):
            a, b = (np.round(np.array(x[name][:, k], np.float64), 6) + 0.0 for x in (ours, theirs))
            assert stats.ks_2samp(a, b).pvalue > 1e-4, (name, k)


MAY_TOUCH = ("cheetah", "hopper", "walker")  # at the start


@pytest.mark.parametrize("task", [task for task in TASKS if STARTS[task] == task and task != "cheetah-run"])
def test_starts_distributed_as_in_dm_control(task):
    theirs = dm_starts(task, 2000 if task.startswith(MAY_TOUCH) else 600)
    env, params = make(task)
    obs, state = jax.jit(jax.vmap(env.reset_env, (0, None)))(jax.random.split(KEY, 2000), params)
    if not task.startswith(MAY_TOUCH):
        assert (np.array(jax.jit(jax.vmap(env.min_distance))(state.qpos)) >= 0).all()
    assert not np.array(state.time).any()
    ours = {"obs": obs} | {k: getattr(state, k) for k in theirs if k != "obs"}
    if "wrap_prm" in theirs:  # how the two directions lie to one another
        for x in (ours, theirs):
            x["cosine"] = (x["wrap_prm"][:, :2] * x["wrap_prm"][:, 2:]).sum(1, keepdims=True)
        assert np.abs(ours["cosine"]).max() <= 0.9 + 1e-6
    assert_same_distribution(ours, theirs)
    if task.startswith("hopper"):
        assert (theirs["obs"][:, TOUCH["hopper"]] > 0).any(), "no foot touches at the start"


def test_cheetahs_start_as_in_dm_control():
    """They fall for 200 steps: from the same random joint positions into the same state, and so distributed."""
    theirs = dm_env("cheetah-run", seed=4)
    env, model, random = make("cheetah-run")[0], theirs.physics.model, np.random.RandomState(4)
    limited = model.jnt_limited.astype(bool)
    low, high = model.jnt_range[limited].T
    u, rest = np.random.default_rng(0).random((2000, dmc.NUM_UNIFORM)), []
    for i in range(20):
        theirs.reset()
        rest.append(np.concatenate([theirs.physics.data.qpos, theirs.physics.data.qvel]))
        u[i, 7:13] = (random.uniform(low, high) - low) / (high - low)
    assert (np.abs(np.array(rest)[:, 9:]).max(1) > 1e-6).all()  # dm_control leaves it moving, if hardly
    with jax.enable_x64(True):
        state = jax.jit(jax.vmap(lambda u: dmc.cheetah_start(u, env)))(jnp.array(u))
        obs = jax.jit(jax.vmap(env.get_obs))(state)
    error = np.abs(np.concatenate([state.qpos, state.qvel], 1)[:20] - rest).max(1)
    print(f"cheetah: median {np.median(error):.1e}, max {error.max():.1e}")
    assert np.median(error) < 1e-8 and error.max() < 1e-3
    ours = {"qpos": state.qpos, "qvel": state.qvel, "obs": obs}
    assert_same_distribution(ours, dm_starts("cheetah-run", 2000))


def test_time_limit_through_gymnax_step():
    """1000 steps, then truncation with the final observation in info and a fresh state; never termination."""
    env, params = make("pendulum-swingup")

    def step(carry, key):
        obs, state = carry
        obs, state, reward, terminated, truncated, info = env.step(key, state, jnp.zeros(1), params)
        return (obs, state), (obs, reward, terminated, truncated, info["final_observation"], state.time)

    obs, _, terminated, truncated, final, time = jax.lax.scan(step, env.reset(KEY, params),
                                                              jax.random.split(KEY, 2000))[1]
    assert not terminated.any() and list(np.flatnonzero(truncated)) == [999, 1999]
    assert time[998] == 999 and time[999] == 0
    same = np.isclose(obs, final, atol=1e-6).all(1)
    assert same[:999].all() and not same[999]
    for task in TASKS:
        assert make(task)[1].max_steps_in_episode == 1000 and dm_env(task)._step_limit == 1000


# together they have every field of DMCState and every kind of constraint
@pytest.mark.parametrize("task", ["cartpole-swingup", "finger-turn_easy", "point_mass-hard", "ball_in_cup-catch"])
def test_dtypes_under_x64(task):
    """A step inside a scan keeps the float64 state; observation and reward are float32."""
    env, params = make(task)

    def step(state, key):
        obs, state, reward, *_ = env.step(key, state, jnp.zeros(env.model.nu), params)
        return state, (obs, reward)

    def run(key):
        obs, state = env.reset(key, params)
        return obs, jax.lax.scan(step, state, jax.random.split(key, 3))

    with jax.enable_x64(True):
        first, (state, outputs) = jax.eval_shape(run, KEY)
    assert {x.dtype for x in (first, *outputs)} == {jnp.dtype(jnp.float32)}
    assert state.qpos.dtype == state.qvel.dtype == jnp.float64


def test_mjx_backend_agrees():
    env, params = make("point_mass-hard", backend="mjx")
    fused, _ = make("point_mass-hard")
    obs, state = jax.jit(jax.vmap(env.reset_env, (0, None)))(jax.random.split(KEY, 8), params)
    action = jax.random.uniform(KEY, (8, env.model.nu), minval=-1, maxval=1)
    a, b = (jax.jit(jax.vmap(e.step_env, (None, 0, 0, None)))(KEY, state, action, params) for e in (env, fused))
    np.testing.assert_allclose(a[0], b[0], atol=1e-5)
    np.testing.assert_allclose(a[2], b[2], atol=1e-4)
    assert np.abs(np.array(a[1].qvel)).max() > 1e-3
