"""Tests of physics.py. The truth is C MuJoCo, stepped the way dm_control steps it."""
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

import physics

pytestmark = pytest.mark.usefixtures("optimised")  # some bounds depend on the last bits
SUBSTEPS = {"pendulum": 1, "cartpole": 1, "point_mass": 1, "reacher": 1, "ball_in_cup": 10, "finger_turn": 2,
            "finger_spin": 2}
# What the tasks lack: plane-capsule, sphere-capsule and sphere-sphere contacts of turning bodies on a slope,
# anchors off the body origin, a joint spring, armature, impratio.
SLED = """<mujoco>
<option timestep="0.004" cone="{cone}" impratio="3"/><default><geom friction="0.7"/></default>
<worldbody><geom type="plane" size="9 9 1" zaxis="-0.2 0 1"/>
<body name="sled" pos="0 0 .3">
 <joint name="x" type="slide" axis="1 0 0"/><joint name="z" type="slide" axis="0 0 1"/>
 <joint name="pitch" axis="0 1 0" armature=".01"/>
 <geom type="capsule" size=".05 .2" euler="0 90 0" density="500"/>
 <site name="pad" pos=".2 0 0" size=".08"/>
 <body name="arm" pos=".25 0 .1"><joint name="elbow" axis="0 -1 0" pos="0 0 -.05" range="-60 90"
  limited="true" stiffness="3" springref="20" damping=".05"/>
  <geom pos=".02 0 .2" size=".07" density="300"/></body>
</body>
<body name="puck" pos=".1 0 .7">
 <joint name="px" type="slide" axis="1 0 0"/><joint name="pz" type="slide" axis="0 0 1"/>
 <geom type="sphere" size=".06" density="700"/></body>
</worldbody>
<actuator>
 <motor joint="elbow" gear="2" ctrllimited="true" ctrlrange="-1 1"/><motor joint="x" gear="9"/></actuator>
<sensor><touch site="pad"/></sensor></mujoco>"""
# Out of plane, no contact: skew axes, a reference angle, off-centre inertia, a welded body, tendon limits.
ARM = """<mujoco><option timestep="0.005"><flag contact="disable"/></option><worldbody>
<body pos="0 0 1" euler="10 20 30"><joint name="a" axis="1 2 3" pos=".1 0 0" damping=".2" ref="15"/>
 <inertial pos=".1 .05 0" quat="1 .2 .3 .1" mass="2" diaginertia=".02 .03 .04"/><site name="s" pos="0 .1 .1"/>
 <body pos=".3 0 .1" euler="0 50 5">
  <joint name="b" axis="0 1 1" range="-40 40" limited="true" margin=".05"/>
  <joint name="c" type="slide" axis="1 0 1" frictionloss=".4" solimpfriction=".8 .9 .01"/>
  <geom type="box" size=".1 .05 .2"/>
  <body pos="0 .2 0"><geom type="sphere" size=".07"/><site name="t" pos="0 .1 0"/></body></body></body>
</worldbody>
<tendon><spatial limited="true" range="0 .62"><site site="s"/><site site="t"/></spatial>
 <fixed name="f" limited="true" range="-.4 .3" solreflimit="-400 -30"><joint joint="a" coef=".7"/>
 <joint joint="c" coef="-1.5"/></fixed></tendon>
<actuator>
 <motor tendon="f" gear="6" forcelimited="true" forcerange="-.8 .8"/><motor joint="b" gear="4"/></actuator>
</mujoco>"""


@functools.cache
def load(name):
    """A compiled model: a domain of dm_control, or one of the models above."""
    if name.startswith("sled"):
        return mujoco.MjModel.from_xml_string(SLED.format(cone=name.split("_")[1]))
    if name == "arm":
        return mujoco.MjModel.from_xml_string(ARM)
    root = Path(pytest.importorskip("dm_control").__path__[0]) / "suite"
    assets = {f"./common/{p.name}": p.read_bytes() for p in (root / "common").glob("*.xml")}
    domain = {"finger_turn": "finger", "finger_spin": "finger", "implicitfast": "reacher"}.get(name, name)
    model = mujoco.MjModel.from_xml_string((root / f"{domain}.xml").read_text(), assets)
    if name == "implicitfast":
        model.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    if name == "finger_spin":
        model.dof_damping[2] = 0.03  # as dm_control's Spin.initialize_episode sets it
    return model


def c_step(model, data, substeps):
    """dm_control's Physics.step: positions and velocities are fresh, forces those of the last substep."""
    if model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:
        mujoco.mj_step(model, data, substeps)
    else:
        mujoco.mj_step2(model, data)
        if substeps > 1:
            mujoco.mj_step(model, data, substeps - 1)
    mujoco.mj_step1(model, data)


def touch_adr(model):
    return model.sensor_adr[model.sensor_type == mujoco.mjtSensor.mjSENS_TOUCH]


def start(model, name, rng):
    """A random state that the tasks (or the test models) may start or get into."""
    data = mujoco.MjData(model)
    for j in range(model.njnt):
        lo, hi = model.jnt_range[j] if model.jnt_limited[j] else (-np.pi, np.pi)
        if model.jnt_type[j] == mujoco.mjtJoint.mjJNT_HINGE or model.jnt_limited[j]:
            data.qpos[model.jnt_qposadr[j]] = rng.uniform(lo, hi)
    if name == "ball_in_cup":  # over, in and beside the cup, also hanging low
        data.qpos[:2] = rng.uniform(-0.3, 0.3, 2)
        inside = rng.rand() < 0.6
        data.qpos[2:] = data.qpos[:2] + (rng.uniform([-0.02, 0.33], [0.02, 0.38]) if inside else
                                         rng.uniform([-0.2, 0.0], [0.2, 0.6]))
    data.qvel[:] = rng.randn(model.nv) * rng.choice([0.1, 1.0, 3.0])
    mujoco.mj_forward(model, data)
    return data


@functools.cache
def collect(name, states=3000, tolerance=None, seed=0):
    """(qpos, qvel, ctrl, next qpos, next qvel, touch, ncon) of random, bang-bang, periodic, held controls."""
    import copy
    model, rng, out = copy.copy(load(name)), np.random.RandomState(seed), []
    if tolerance is not None:
        model.opt.tolerance, model.opt.ls_tolerance = tolerance, 1e-6
    for t in range(states):
        if t % 100 == 0:
            data, mode = start(model, name, rng), rng.randint(4)
            phase, pace = rng.uniform(0, 6, model.nu), rng.uniform(0.02, 0.6)
            held = rng.choice([-1.0, 1.0], model.nu)
        if mode == 0:
            ctrl = rng.uniform(-1.5, 1.5, model.nu)  # also beyond the range
        elif mode == 1:
            ctrl = rng.choice([-1.0, 1.0], model.nu) if t % 10 == 0 else ctrl
        else:
            ctrl = np.sin(pace * t + phase) if mode == 2 else held
        data.ctrl[:] = ctrl
        before = data.qpos.copy(), data.qvel.copy(), ctrl.copy()
        c_step(model, data, SUBSTEPS.get(name, 2))
        touch = data.sensordata[touch_adr(model)].copy()
        out.append((*before, data.qpos.copy(), data.qvel.copy(), touch, data.ncon))
    return tuple(np.array(column) for column in zip(*out))


@functools.cache
def step(name, batch=True):
    step = physics.make_step(load(name), SUBSTEPS.get(name, 2))
    return jax.jit(jax.vmap(step)) if batch else step


def errors(name, dtype, **kwargs):
    """Largest error of each state (states,), for qpos, qvel and touch, of one control step."""
    qpos, qvel, ctrl, *after, _ = collect(name, **kwargs)
    with jax.enable_x64(dtype == "float64"):
        got = step(name)(*(jnp.asarray(x, dtype) for x in (qpos, qvel, ctrl)))
        assert all(x.dtype == dtype for x in got)
        return [np.abs(np.asarray(x) - y).max(axis=1, initial=0) for x, y in zip(got, after)]


# ---------------------------------------------------------------- parity with C MuJoCo, one control step

@pytest.mark.parametrize("name, dtype, bound", [
    *((name, "float64", 1e-9)
      for name in (*SUBSTEPS, "sled_pyramidal", "sled_elliptic", "arm", "implicitfast")),
    *((name, "float32", 1e-3) for name in SUBSTEPS)])
def test_control_step_equals_c(name, dtype, bound):
    """C's solver runs to the end here (tolerance 0); the next test has dm_control's own tolerance."""
    for what, error in zip(("qpos", "qvel", "touch"), errors(name, dtype, tolerance=0.0)):
        print(f"{name} {dtype} {what}: p99.9 {np.quantile(error, 0.999):.1e}, max {error.max():.1e}")
        # Touch is in newtons, tens of them: float32 bounds it relative to that.
        assert np.quantile(error, 0.999) < bound * (10 if what == "touch" else 1), what


@pytest.mark.parametrize("name", SUBSTEPS)
def test_control_step_equals_c_with_its_default_tolerance(name):
    """C may stop early, from a warm start: the rail of cartpole then differs by about 1e-6."""
    qpos, qvel, _ = errors(name, "float64")
    p99, p999 = np.quantile(qvel, [0.99, 0.999])
    print(f"{name}: qvel p99 {p99:.1e}, p99.9 {p999:.1e}, max {qvel.max():.1e}")
    assert p99 < 1e-9 and p999 < (1e-6 if name == "cartpole" else 1e-9)
    assert np.quantile(qpos, 0.999) < (1e-8 if name == "cartpole" else 1e-9)


def test_hopper_equals_c_from_random_states():
    """Four physics steps of random postures, many of which are inside themselves.

    Excluded are states in which C's capsules meet one of their two special cases (physics.contact_geometry): axes
    that cross, so that the normal leaves the plane, or parallel ones, which C may give two contacts. A start in a
    hundred does; no later state of a trajectory was seen to cross.
    """
    import copy
    model, rng, rows = copy.copy(load("hopper")), np.random.RandomState(0), []
    model.opt.tolerance, model.opt.ls_tolerance = 0.0, 1e-6
    for _ in range(3000):
        data, special = start(model, "hopper", rng), False
        data.ctrl[:] = rng.uniform(-1.5, 1.5, model.nu)
        before = data.qpos.copy(), data.qvel.copy(), data.ctrl.copy()
        touching = data.ncon > 0
        for _ in range(4):
            pairs = [tuple(c.geom) for c in data.contact if (model.geom_type[c.geom] == physics.CAPSULE).all()]
            special |= len(set(pairs)) < len(pairs) or any(abs(c.frame[1]) > 0.5 for c in data.contact)
            c_step(model, data, 1)
        rows.append((*before, data.qpos.copy(), data.qvel.copy(), touching, special))
    qpos, qvel, ctrl, new_qpos, new_qvel, touching, special = (np.array(column) for column in zip(*rows))
    with jax.enable_x64(True):
        got = jax.jit(jax.vmap(physics.make_step(model, 4)), compiler_options={
            "xla_backend_optimization_level": 0})(*(jnp.asarray(x) for x in (qpos, qvel, ctrl)))
    error = np.maximum(np.abs(np.asarray(got[0]) - new_qpos).max(1), np.abs(np.asarray(got[1]) - new_qvel).max(1))
    print(f"hopper: {special.mean():.2%} special, up to {error[special].max():.1e}; others p99.9 "
          f"{np.quantile(error[~special], 0.999):.1e}, max {error[~special].max():.1e}")
    assert 0 < special.mean() < 0.02 and touching.mean() > 0.1
    assert np.quantile(error[~special], 0.999) < 1e-9


def test_an_accelerators_program_gives_the_same_numbers(monkeypatch):
    """There the solver's turns are unrolled."""
    inputs = collect("finger_turn")[:3]
    with jax.enable_x64(True):
        here = step("finger_turn")(*inputs)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        there = jax.jit(jax.vmap(physics.make_step(load("finger_turn"), SUBSTEPS["finger_turn"])),
                        compiler_options={"xla_backend_optimization_level": 0})(*inputs)
        for a, b in zip(there, here):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def test_the_collected_states_are_the_interesting_ones():
    def beyond(name, joint):
        qpos, (lo, hi) = collect(name, tolerance=0.0)[0][:, joint], load(name).jnt_range[joint]
        return (qpos < lo).sum(), (qpos > hi).sum()

    assert min(beyond("cartpole", 0)) > 5 and min(beyond("reacher", 1)) > 5
    assert min(*beyond("point_mass", 0), *beyond("point_mass", 1)) > 5
    assert sum(beyond("finger_turn", 0)) > 5 and sum(beyond("finger_turn", 1)) > 5
    qpos, *_, ncon = collect("ball_in_cup", tolerance=0.0)
    string = np.linalg.norm(qpos[:, 2:] - qpos[:, :2] + [0, 0.2 - 0.6 + 0.108], axis=1)
    assert (string > 0.3).sum() > 100 and (ncon > 0).sum() > 100 and (ncon > 1).sum() > 10
    for name in ("finger_turn", "finger_spin"):
        *_, touch, ncon = collect(name, tolerance=0.0)
        assert (ncon > 0).sum() > 50 and (touch > 0).sum(axis=0).min() > 5
    for name in ("sled_pyramidal", "sled_elliptic"):
        *_, touch, ncon = collect(name, tolerance=0.0)
        assert (ncon > 2).sum() > 100 and (touch > 0).sum() > 50
    qpos, *_ = collect("arm", tolerance=0.0)
    assert (np.abs(qpos[:, 1]) > np.radians(40)).sum() > 50


def test_c_step_is_dm_controls_step():
    control = pytest.importorskip("dm_control.suite").load("finger", "spin", task_kwargs={"random": 3})
    physics_ = control.physics
    control.reset()
    model, data = physics_.model.ptr, mujoco.MjData(physics_.model.ptr)
    data.qpos[:], data.qvel[:] = physics_.data.qpos, physics_.data.qvel
    mujoco.mj_forward(model, data)
    rng, touched = np.random.RandomState(0), 0
    for _ in range(300):
        data.ctrl[:] = rng.uniform(-1, 1, 2)
        physics_.set_control(data.ctrl)
        physics_.step(2)
        c_step(model, data, 2)
        np.testing.assert_array_equal(data.sensordata, physics_.data.sensordata)
        touched += (data.sensordata[touch_adr(model)] > 0).any()
    assert touched > 0


@pytest.mark.parametrize("name", [name for name in SUBSTEPS if name != "finger_spin"])
def test_open_loop_drift(name):
    """200 control steps in float64; ball_in_cup swings gently on its string, because impacts are chaotic."""
    model, rng, steps = load(name), np.random.RandomState(1), 200
    data = mujoco.MjData(model)
    data.qpos[:] += rng.uniform(-0.1, 0.1, model.nq) * (name != "ball_in_cup")
    mujoco.mj_forward(model, data)
    ctrl = rng.uniform(-1, 1, (steps, model.nu)) * (0.2 if name == "ball_in_cup" else 1)
    with jax.enable_x64(True):
        def body(state, u):
            state = step(name, batch=False)(*state, u)[:2]
            return state, state[0]
        _, qpos = jax.jit(lambda q, v, u: jax.lax.scan(body, (q, v), u))(
            *(jnp.asarray(x) for x in (data.qpos, data.qvel, ctrl)))
    truth = []
    for u in ctrl:
        data.ctrl[:] = u
        c_step(model, data, SUBSTEPS[name])
        truth.append(data.qpos.copy())
    drift = np.abs(np.asarray(qpos) - truth).max()
    print(f"{name}: {drift:.1e}")
    assert drift < 1e-6


# ---------------------------------------------------------------- kinematics, distances, contact pairs

@pytest.mark.parametrize("name", ["reacher", "ball_in_cup", "finger_turn", "arm"])
def test_kinematics_equals_c(name):
    model = load(name)
    qpos = collect(name, tolerance=0.0)[0][:50]
    with jax.enable_x64(True):
        got = jax.jit(jax.vmap(physics.make_kinematics(model)))(jnp.asarray(qpos))
    assert got.xmat.shape == (50, model.nbody, 3, 3) and got.site_xpos.shape == (50, model.nsite, 3)
    data = mujoco.MjData(model)
    for i, q in enumerate(qpos):
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        for field in got._fields:
            ours, truth = getattr(got, field)[i].ravel(), getattr(data, field).ravel()
            np.testing.assert_allclose(ours, truth, atol=1e-12)


@pytest.mark.parametrize("name", ["finger_turn", "ball_in_cup", "sled_pyramidal", "pendulum"])
def test_min_distance_equals_c(name):
    """Anywhere, not only where trajectories lead: also shows that no pair that can collide was pruned."""
    model, rng = load(name), np.random.RandomState(0)
    qpos = rng.uniform(-3, 3, (3000, model.nq))
    if name != "finger_turn":  # slides: near enough to touch
        slides = model.jnt_type == mujoco.mjtJoint.mjJNT_SLIDE
        qpos[:, slides] *= 0.1
    with jax.enable_x64(True):
        got = np.asarray(jax.jit(jax.vmap(physics.make_min_distance(model)))(jnp.asarray(qpos)))
    data, touching = mujoco.MjData(model), 0
    for q, distance in zip(qpos, got):
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        mujoco.mj_collision(model, data)
        assert (data.ncon == 0) == (distance >= 0)
        if data.ncon:
            touching += 1
            assert abs(data.contact.dist.min() - distance) < 1e-9
    if name == "pendulum":  # its contacts are disabled
        assert np.isinf(got).all() and touching == 0
    else:
        assert 50 < touching < 3000


# ---------------------------------------------------------------- the interface

@pytest.mark.parametrize("backend", ["fused", "mjx"])
def test_wrap_prm_replaces_the_tendon_coefficients(backend):
    """point_mass hard draws actuator directions in every episode."""
    import copy
    model, rng = copy.copy(load("point_mass")), np.random.RandomState(0)
    qpos, qvel, ctrl = rng.uniform(-0.2, 0.2, 2), rng.randn(2), rng.uniform(-1, 1, 2)
    wraps = rng.randn(3, 4)
    got, _, touch = jax.jit(jax.vmap(physics.make_step(model, 1, backend), (None, None, None, 0)))(
        *(jnp.asarray(x, jnp.float32) for x in (qpos, qvel, ctrl, wraps)))
    assert touch.shape == (3, 0)
    for i in range(3):
        model.wrap_prm[:] = wraps[i]
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:], data.ctrl[:] = qpos, qvel, ctrl
        mujoco.mj_forward(model, data)
        c_step(model, data, 1)
        np.testing.assert_allclose(got[i], data.qpos, atol=1e-6)
        assert np.abs(data.qpos - qpos).max() > 1e-3


def test_nested_vmap_and_substeps():
    """vmap(vmap) = vmap; several substeps = as many single ones."""
    qpos, qvel, ctrl = (jnp.asarray(x[:24], jnp.float32) for x in collect("cartpole", tolerance=0.0)[:3])
    one, two = (physics.make_step(load("cartpole"), substeps) for substeps in (1, 2))
    flat = jax.jit(jax.vmap(two))(qpos, qvel, ctrl)
    nested = jax.jit(jax.vmap(jax.vmap(two)))(*(x.reshape(4, 6, -1) for x in (qpos, qvel, ctrl)))
    middle = jax.jit(jax.vmap(one))(qpos, qvel, ctrl)
    single = jax.jit(jax.vmap(one))(*middle[:2], ctrl)
    for a, b, c in zip(flat, nested, single):
        np.testing.assert_allclose(a, b.reshape(24, -1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ball_in_cup", "finger_turn"])
def test_a_diverged_lane_returns_and_does_not_spread(name):
    qpos, qvel, ctrl = (jnp.asarray(x, jnp.float32) for x in collect(name, tolerance=0.0)[:3])
    good = step(name)(qpos, qvel, ctrl)
    bad = step(name)(qpos, qvel.at[1].set(1e30).at[2].set(jnp.nan).at[3].set(1e8), ctrl)
    for x, y in zip(good, bad):
        np.testing.assert_array_equal(np.delete(x, [1, 2, 3], 0), np.delete(y, [1, 2, 3], 0))
    assert np.isnan(bad[1][2]).any() and not (np.abs(bad[1][1]) < 1e6).all()


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        physics.make_step(load("arm"), backend="bullet")


def test_mjx_backend():
    """The other backend has the same interface and physics, touch included."""
    pytest.importorskip("mujoco.mjx")
    model = mujoco.MjModel.from_xml_string("""<mujoco><option timestep=".005"><flag energy="enable"/></option>
      <worldbody><geom type="plane" size="1 1 1"/><body pos="0 0 .0499">
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint type="slide" axis="0 0 1"/><geom size=".05"/><site name="s" size=".06"/></body></worldbody>
      <actuator><motor joint="x" gear="2"/></actuator><sensor><touch site="s"/></sensor></mujoco>""")
    state = jnp.zeros(2), jnp.array([0.5, -0.3]), jnp.array([0.7])
    fused, mjx = (jax.jit(physics.make_step(model, 3, backend))(*state) for backend in ("fused", "mjx"))
    data = mujoco.MjData(model)
    data.qvel[:], data.ctrl[:] = state[1], state[2]
    mujoco.mj_forward(model, data)
    c_step(model, data, 3)
    for got in (fused, mjx):
        assert [x.shape for x in got] == [(2,), (2,), (1,)] and got[2][0] > 1
        for x, y, tolerance in zip(got, (data.qpos, data.qvel, data.sensordata), (1e-6, 1e-4, 1e-2)):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- refusals

BODY = '<body name="b"><joint name="j" axis="0 1 0"/><geom name="g" size=".1"/>{}</body>'
SLIDERS = ('<geom name="floor" type="plane" size="1 1 1"/><body name="b" pos="0 0 1">'
           '<joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 0 1"/>'
           '<geom name="g" size=".1" {}/></body>')
MOTOR = '<actuator><{} name="act" joint="j" {}/></actuator>'
TENDON = ('<tendon><fixed name="t" {}><joint joint="j" coef="1"/></fixed></tendon>')
REFUSED = {
    # feature and element that the message must name: (worldbody, rest of the model)
    ("equality", "'e'"): (BODY.format(""), '<equality><joint name="e" joint1="j"/></equality>'),
    ("ball and free", "'ball'"): ('<body><joint name="ball" type="ball"/><geom size=".1"/></body>', ""),
    ("ball and free", "'root'"): ('<body><freejoint name="root"/><geom size=".1"/></body>', ""),
    ("mocap", "'m'"): (BODY.format("") + '<body name="m" mocap="true"><geom size=".1"/></body>', ""),
    ("fluid", "density"): (BODY.format(""), '<option density="1.2"/>'),
    ("fluid", "viscosity"): (BODY.format(""), '<option viscosity="1e-3"/>'),
    ("fluid", "wind"): (BODY.format(""), '<option wind="1 0 0"/>'),
    ("integrator", "mjINT_IMPLICIT"): (BODY.format(""), '<option integrator="implicit"/>'),
    ("flag", "EULERDAMP"): (BODY.format(""), '<option><flag eulerdamp="disable"/></option>'),
    ("flag", "OVERRIDE"): (BODY.format(""), '<option><flag override="enable"/></option>'),
    ("noslip", "noslip"): (BODY.format(""), '<option noslip_iterations="3"/>'),
    ("gravity compensation", "'up'"): ('<body name="up" gravcomp="1"><joint/><geom size=".1"/></body>', ""),
    ("pairs", "'p'"): (BODY.format("") + '<geom name="h" pos="9 0 0" size=".1"/>',
                       '<contact><pair name="p" geom1="g" geom2="h"/></contact>'),
    ("biases", "'act'"): (BODY.format(""), MOTOR.format("position", "")),
    ("activations", "'act'"): (BODY.format(""), MOTOR.format("intvelocity", 'actrange="-1 1"')),
    ("gains", "'act'"): (BODY.format(""), MOTOR.format("damper", 'ctrlrange="0 1"')),
    ("transmissions", "'act'"): (BODY.format('<site name="s"/>'),
                                 '<actuator><motor name="act" site="s"/></actuator>'),
    ("tendon stiffness", "'t'"): (BODY.format(""), TENDON.format('stiffness="1"')),
    ("tendon damping", "'t'"): (BODY.format(""), TENDON.format('damping="1"')),
    ("tendon frictionloss", "'t'"): (BODY.format(""), TENDON.format('frictionloss="1"')),
    ("tendon armature", "'t'"): (BODY.format(""), TENDON.format('armature="1"')),
    ("wrapping", "'t'"): (BODY.format('<site name="s1" pos="0 0 -1"/>') + '<site name="s2" pos="0 0 2"/>',
                          '<tendon><spatial name="t"><site site="s1"/><geom geom="g"/><site site="s2"/>'
                          '</spatial></tendon>'),
    ("force limits", "'j'"): ('<body><joint name="j" actuatorfrcrange="-1 1"/><geom size=".1"/></body>', ""),
    ("both sides", "'j'"): ('<body><joint name="j" range="-1 1" limited="true" margin="2"/>'
                                        '<geom size=".1"/></body>', ""),
    ("touch zones", "'s'"): (BODY.format('<site name="zone" type="box" size="1 1 1"/>'),
                             '<sensor><touch name="s" site="zone"/></sensor>'),
    ("cutoffs", "'s'"): (BODY.format('<site name="zone"/>'),
                         '<sensor><touch name="s" site="zone" cutoff="5"/></sensor>'),
    ("condim", "'g'"): (SLIDERS.format('condim="6"'), ""),
    ("mjGEOM_MESH", "'g'"): (SLIDERS.format('type="mesh" mesh="tetra"'),
                             '<asset><mesh name="tetra" vertex="0 0 0 1 0 0 0 1 0 0 0 1"/></asset>'),
    ("mjGEOM_BOX", "'g'"): (SLIDERS.replace('size=".1"', 'type="box" size=".1 .1 .1"').format(""), ""),
    ("gaps", "'g'"): (SLIDERS.format('gap=".01"'), ""),
    ("x-z plane", "'y'"): ('<geom type="plane" size="1 1 1"/><body pos="0 0 1"><joint name="y" type="slide" '
                           'axis="0 1 0"/><geom size=".1"/></body>', ""),
    ("x-z plane", "'turn'"): ('<geom type="plane" size="1 1 1"/><body pos="0 0 1"><joint name="turn" '
                              'axis="1 0 0"/><geom type="capsule" size=".1 2"/></body>', ""),
    ("tangents", "'floor'"): (SLIDERS.replace('size="1 1 1"', 'size="1 1 1" zaxis="0 1 1"').format(""), ""),
    ("normals", "'off'"): (SLIDERS.split("/>", 1)[1].format("") + '<body pos="0 .05 0"><joint type="slide"/>'
                         '<geom name="off" size=".1"/></body>', ""),
}


@pytest.mark.parametrize("named", REFUSED, ids="-".join)
def test_refusals_name_feature_and_element(named):
    world, rest = REFUSED[named]
    model = mujoco.MjModel.from_xml_string(f"<mujoco>{rest}<worldbody>{world}</worldbody></mujoco>")
    with pytest.raises(NotImplementedError) as error:
        physics.make_step(model)
    assert all(word in str(error.value) for word in named) and 'backend="mjx"' in str(error.value)


@pytest.mark.parametrize("task, named", [
    ("swimmer-swimmer6", "fluid forces"), ("humanoid-stand", "joint 'root'"), ("quadruped-walk", "joint 'root'"),
    ("fish-swim", "joint 'root'")])
def test_what_dm_control_has_besides_the_planar_suite_is_refused(task, named):
    model = pytest.importorskip("dm_control.suite").load(*task.split("-")).physics.model.ptr
    with pytest.raises(NotImplementedError, match=f'{named}.*use backend="mjx"'):
        physics.make_step(model)


def test_a_model_without_the_refused_features_is_accepted():
    """The refusals above are not caused by their surroundings."""
    for world in (BODY.format(""), SLIDERS.format("")):
        model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{world}</worldbody></mujoco>")
        qpos, qvel, _ = physics.make_step(model)(jnp.zeros(model.nq), jnp.ones(model.nv), jnp.zeros(0))
        assert np.isfinite(qpos).all() and np.isfinite(qvel).all()
