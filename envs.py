"""Tasks: DeepMind Control on fused physics, gymnax, brax; and `Lanes`, the batched in-context view of them.

    env, params = make("dmc:finger-spin")            # also make("CartPole-v1"), make("brax:ant")
    obs, state = env.reset(key, params)              # gymnax 1.x interface throughout
    obs, state, reward, terminated, truncated, info = env.step(key, state, action, params)

    lanes = Lanes(TRAIN_TASKS, num_lanes=192)        # many tasks, random projections, trials
    state, inputs = lanes.reset(key)
    state, inputs, out = lanes.step(state, action, t)

The reference is dm_control itself: its models (physics only, in this file), control step, observation order,
reward and initial states. It is not needed to run: with `physics.py` beside it this file wants jax, mujoco
and gymnax only (brax for brax tasks). After Lu et al. 2023 (arXiv 2303.03982), an agent meets a task through
*random linear projections* of observation and action, fresh ones in every trial: see Lanes.
"""
import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

import physics

# ---------------------------------------------------------------------------------------------------------
# Models (metres, kilograms, seconds, radians; angles in the text in degrees)
# ---------------------------------------------------------------------------------------------------------
BALL_IN_CUP = """<mujoco>
  <default>
    <default class="cup">
      <joint type="slide" stiffness="20" damping="3"/>
      <geom type="capsule" size=".008"/>
    </default>
    <motor gear="5" ctrlrange="-1 1"/>
  </default>
  <worldbody>
    <geom name="ground" type="plane" size=".6 .2 10"/>
    <body name="cup" pos="0 0 .6">
      <joint name="cup_x" class="cup" axis="1 0 0"/>
      <joint name="cup_z" class="cup" axis="0 0 1"/>
      <geom name="cup_part_0" class="cup" fromto="-.05 0 0  -.05 0 -.075"/>
      <geom name="cup_part_1" class="cup" fromto="-.05 0 -.075  -.025 0 -.1"/>
      <geom name="cup_part_2" class="cup" fromto="-.025 0 -.1  .025 0 -.1"/>
      <geom name="cup_part_3" class="cup" fromto=".025 0 -.1  .05 0 -.075"/>
      <geom name="cup_part_4" class="cup" fromto=".05 0 -.075  .05 0 0"/>
      <site name="cup" pos="0 0 -.108"/>
    </body>
    <body name="ball" pos="0 0 .2">
      <joint name="ball_x" type="slide" axis="1 0 0"/>
      <joint name="ball_z" type="slide" axis="0 0 1"/>
      <geom name="ball" size=".025"/>
      <site name="ball"/>
    </body>
  </worldbody>
  <tendon>
    <spatial name="string" limited="true" range="0 .3"><site site="ball"/><site site="cup"/></spatial>
  </tendon>
  <actuator><motor name="x" joint="cup_x"/><motor name="z" joint="cup_z"/></actuator>
</mujoco>"""

CARTPOLE = """<mujoco>
  <option timestep=".01" integrator="RK4"><flag contact="disable"/></option>
  <worldbody>
    <body name="cart" pos="0 0 1">
      <joint name="slider" type="slide" axis="1 0 0" range="-1.8 1.8" solreflimit=".08 1" damping="5e-4"/>
      <geom name="cart" type="box" size=".2 .15 .1" mass="1"/>
      <body name="pole_1">
        <joint name="hinge_1" axis="0 1 0" damping="2e-6"/>
        <geom name="pole_1" type="capsule" fromto="0 0 0  0 0 1" size=".045" mass=".1"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="slide" joint="slider" gear="10" ctrlrange="-1 1"/></actuator>
</mujoco>"""

# The cylinders weigh but do not collide here: one is out of reach of the spinner, the other inside it. The
# ground is out of the finger's reach. The hinge damping is .5, but .03 in the spin task.
FINGER = """<mujoco>
  <option timestep=".01" cone="elliptic" iterations="200"><flag gravity="disable"/></option>
  <default>
    <geom type="capsule" solimp="0 .9 .01"/>
    <joint axis="0 -1 0"/>
    <default class="weight"><geom contype="0" conaffinity="0"/></default>
  </default>
  <worldbody>
    <body name="proximal" pos="-.2 0 .4">
      <joint name="proximal" range="-110 110" ref="-90" damping="2.5"/>
      <geom class="weight" type="cylinder" fromto="0 -.033 0  0 .033 0" size=".034"/>
      <geom name="proximal" fromto="0 0 0  0 0 -.17" size=".03"/>
      <body name="distal" pos="0 0 -.18">
        <joint name="distal" range="-110 110" damping="2.5"/>
        <geom class="weight" fromto="0 0 0  0 0 -.16" size=".028"/>
        <geom name="fingertip" fromto="0 0 -.13  0 0 -.161" size=".03"/>
        <site name="touchtop" type="ellipsoid" size=".025 .03 .025" pos=".01 0 -.17"/>
        <site name="touchbottom" type="ellipsoid" size=".025 .03 .025" pos="-.01 0 -.17"/>
      </body>
    </body>
    <body name="spinner" pos=".2 0 .4">
      <joint name="hinge" frictionloss=".1" damping="HINGE_DAMPING"/>
      <geom name="cap1" size=".04 .09" pos=".02 0 0"/>
      <geom name="cap2" size=".04 .09" pos="-.02 0 0"/>
      <geom class="weight" type="cylinder" fromto="0 -.045 0  0 .045 0" size=".02"/>
    </body>
  </worldbody>
  <actuator>
    <motor name="proximal" joint="proximal" gear="30" ctrlrange="-1 1"/>
    <motor name="distal" joint="distal" gear="15" ctrlrange="-1 1"/>
  </actuator>
  <sensor><touch name="touchtop" site="touchtop"/><touch name="touchbottom" site="touchbottom"/></sensor>
</mujoco>"""

PENDULUM = """<mujoco>
  <option timestep=".02"><flag contact="disable"/></option>
  <worldbody>
    <body name="pole" pos="0 0 .6">
      <joint name="hinge" axis="0 1 0" damping=".1"/>
      <geom name="mass" size=".05" pos="0 0 .5" mass="1"/>
    </body>
  </worldbody>
  <actuator><motor name="torque" joint="hinge" ctrlrange="-1 1"/></actuator>
</mujoco>"""

POINT_MASS = """<mujoco>
  <option timestep=".02"><flag contact="disable"/></option>
  <default><joint type="slide" range="-.29 .29" damping="1"/><motor gear=".1" ctrlrange="-1 1"/></default>
  <worldbody>
    <body name="pointmass" pos="0 0 .01">
      <joint name="root_x" axis="1 0 0"/>
      <joint name="root_y" axis="0 1 0"/>
      <geom name="pointmass" size=".01" mass=".3"/>
    </body>
  </worldbody>
  <tendon>
    <fixed name="t1"><joint joint="root_x" coef="1"/><joint joint="root_y" coef="0"/></fixed>
    <fixed name="t2"><joint joint="root_x" coef="0"/><joint joint="root_y" coef="1"/></fixed>
  </tendon>
  <actuator><motor name="t1" tendon="t1"/><motor name="t2" tendon="t2"/></actuator>
</mujoco>"""

REACHER = """<mujoco>
  <option timestep=".02"><flag contact="disable"/></option>
  <default><joint axis="0 0 1" damping=".01"/><geom size=".01"/><motor gear=".05" ctrlrange="-1 1"/></default>
  <worldbody>
    <body name="arm" pos="0 0 .01">
      <joint name="shoulder"/>
      <geom name="arm" type="capsule" fromto="0 0 0  .12 0 0"/>
      <body name="hand" pos=".12 0 0">
        <joint name="wrist" range="-160 160"/>
        <geom name="hand" type="capsule" fromto="0 0 0  .1 0 0"/>
        <body name="finger" pos=".12 0 0"><geom name="finger"/></body>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="shoulder" joint="shoulder"/><motor name="wrist" joint="wrist"/></actuator>
</mujoco>"""


# ---------------------------------------------------------------------------------------------------------
# The eleven tasks: initial state, observation and reward, each as in the dm_control file named beside it
# ---------------------------------------------------------------------------------------------------------
@struct.dataclass
class DMCState:
    """State of one DMControl task. Fields that a task does not have are None (no leaf in the pytree)."""

    qpos: jax.Array  # (nq,) metres, radians
    qvel: jax.Array  # (nv,) per second
    time: jax.Array  # () int32, control steps since the episode's start
    touch: Any = None  # (2,) newtons (finger)
    target: Any = None  # (2,) metres, in the plane (finger turn: from the hinge; reacher: from the shoulder)
    wrap_prm: Any = None  # (4,) the two actuators' directions (point_mass hard)


def tolerance(x, lower=0.0, upper=0.0, margin=0.0, quadratic=False):
    """1 where lower <= x <= upper, else falling with distance / margin (dm_control utils/rewards.py).

    The fall is Gaussian, 0.1 at the margin, or a parabola that is 0 from the margin on. Margin 0 is a step.
    """
    distance = jnp.maximum(lower - x, x - upper)
    if margin == 0.0:
        return (distance <= 0).astype(x.dtype)
    distance = jnp.maximum(distance, 0.0) / margin
    return jnp.maximum(1 - distance**2, 0.0) if quadratic else jnp.exp(math.log(0.1) * distance**2)


def direction(angle):
    """(2,) unit vector (sin, cos): dm_control counts target angles from the second axis."""
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)])


# Every start is a function of NUM_UNIFORM uniform random numbers in (0, 1), because one draw of many numbers
# compiles far faster than many draws of a few. The first four are for targets and the like.
CANDIDATES = 20
NUM_UNIFORM = 4 + 3 * CANDIDATES


def between(u, low, high):
    return low + (high - low) * u


def random_joints(u, model):
    """Joint positions, uniform within limits and in [-pi, pi] without (suite/utils/randomizers.py)."""
    low, high = np.where(model.jnt_limited[:, None], model.jnt_range, [-np.pi, np.pi]).T
    return between(u[4:4 + model.nq], low, high)


def first_free(qpos, min_distance):
    """The first of CANDIDATES positions (., nq) in which nothing touches: rejection sampling without a loop.

    One candidate touches with probability 0.10 (finger) or 0.18 (ball_in_cup), all with less than 1e-14.
    """
    return qpos[jnp.argmax(jax.vmap(min_distance)(qpos) >= 0)]


def cup_start(u, env):  # suite/ball_in_cup.py
    ball = u[4:4 + 2 * CANDIDATES].reshape(CANDIDATES, 2)
    ball = between(ball, jnp.array([-0.2, 0.2]), jnp.array([0.2, 0.5]))
    return DMCState(first_free(jnp.pad(ball, ((0, 0), (2, 0))), env.min_distance), jnp.zeros(4), 0)


def cup_reward(s, ctrl):
    cup = s.qpos[:2] + jnp.array([0, 0.55])  # the centre of its inner square
    ball = s.qpos[2:] + jnp.array([0, 0.2])
    return (jnp.abs(cup - ball) < 0.05 - 0.025).all()


def positions(s):
    return [s.qpos, s.qvel]


def cartpole_start(u, env, swingup):  # suite/cartpole.py
    normal = jax.scipy.special.ndtri(u[:4])
    if swingup:
        qpos = jnp.array([0, jnp.pi]) + 0.01 * normal[:2]
    else:
        qpos = jnp.array([0.1, 0.034]) * between(u[:2], -1, 1)
    return DMCState(qpos, 0.01 * normal[2:], 0)


def cartpole_observe(s):
    return [s.qpos[:1], jnp.cos(s.qpos[1:]), jnp.sin(s.qpos[1:]), s.qvel]


def cartpole_reward(s, ctrl):
    upright = (jnp.cos(s.qpos[1]) + 1) / 2
    centred = (1 + tolerance(s.qpos[0], margin=2.0)) / 2
    small_control = (4 + tolerance(ctrl[0], margin=1.0, quadratic=True)) / 5
    small_velocity = (1 + tolerance(s.qvel[1], margin=5.0)) / 2
    return upright * small_control * small_velocity * centred


def finger_start(u, env, turn):  # suite/finger.py
    candidates = jnp.pad(u[4:].reshape(CANDIDATES, 3), ((0, 0), (4, 0)))
    qpos = first_free(jax.vmap(lambda v: random_joints(v, env.model))(candidates), env.min_distance)
    target = 0.13 * direction(between(u[0], -jnp.pi, jnp.pi)) if turn else None
    return DMCState(qpos, jnp.zeros(3), 0, jnp.zeros(2), target)


def finger_tip(s):
    return 0.13 * direction(s.qpos[2]) * jnp.array([-1, 1])


def finger_distance(s, radius):
    return jnp.linalg.norm(s.target - finger_tip(s)) - radius


def finger_observe(s, radius=None):
    obs = [s.qpos[:2], finger_tip(s), s.qvel, jnp.log1p(s.touch)]
    return obs if radius is None else obs + [s.target, finger_distance(s, radius)[None]]


def spin_reward(s, ctrl):
    return s.qvel[2] <= -15.0


def turn_reward(s, ctrl, radius):
    return finger_distance(s, radius) <= 0


def pendulum_start(u, env):  # suite/pendulum.py
    return DMCState(random_joints(u, env.model), jnp.zeros(1), 0)


def pendulum_observe(s):
    return [jnp.cos(s.qpos), jnp.sin(s.qpos), s.qvel]


def pendulum_reward(s, ctrl):
    return jnp.cos(s.qpos[0]) >= math.cos(math.radians(8))


def point_mass_start(u, env, hard):  # suite/point_mass.py
    wrap_prm = None
    if hard:  # the second direction is anything whose |cosine| with the first is at most 0.9, to either side
        near = math.acos(0.9)
        first = between(u[0], 0, 2 * jnp.pi)
        second = first + between(u[1], near, math.pi - near) * jnp.where(u[2] < 0.5, -1, 1)
        wrap_prm = jnp.concatenate([direction(first), direction(second)])
    return DMCState(random_joints(u, env.model), jnp.zeros(2), 0, wrap_prm=wrap_prm)


def point_mass_reward(s, ctrl):
    near_target = tolerance(jnp.linalg.norm(s.qpos), upper=0.015, margin=0.015)
    return near_target * (4 + tolerance(ctrl, margin=1.0, quadratic=True).mean()) / 5


def reacher_start(u, env):  # suite/reacher.py
    target = between(u[1], 0.05, 0.2) * direction(between(u[0], 0, 2 * jnp.pi))
    return DMCState(random_joints(u, env.model), jnp.zeros(2), 0, target=target)


def reacher_to_target(s):
    upper, lower = s.qpos[0], s.qpos[0] + s.qpos[1]  # angles of the two links, both 0.12 long
    return s.target - 0.12 * jnp.stack([jnp.cos(upper) + jnp.cos(lower), jnp.sin(upper) + jnp.sin(lower)])


def reacher_observe(s):
    return [s.qpos, reacher_to_target(s), s.qvel]


def reacher_reward(s, ctrl, radius):
    return jnp.linalg.norm(reacher_to_target(s)) <= radius + 0.01  # of the target, of the finger


class Task(NamedTuple):
    model: str  # MJCF
    substeps: int  # physics steps in a control step
    obs_dim: int
    start: Callable  # ((NUM_UNIFORM,) numbers in (0, 1), env) -> DMCState
    observe: Callable  # (state) -> list of (k,) arrays, dm_control's observation in its order
    reward: Callable  # (state after the step, ctrl as given) -> scalar


part = functools.partial


def cartpole(swingup):
    return Task(CARTPOLE, 1, 5, part(cartpole_start, swingup=swingup), cartpole_observe, cartpole_reward)


def finger_turn(radius):
    return Task(FINGER.replace("HINGE_DAMPING", ".5"), 2, 12, part(finger_start, turn=True),
                part(finger_observe, radius=radius), part(turn_reward, radius=radius))


def point_mass(hard):
    return Task(POINT_MASS, 1, 4, part(point_mass_start, hard=hard), positions, point_mass_reward)


def reacher(radius):
    return Task(REACHER, 1, 6, reacher_start, reacher_observe, part(reacher_reward, radius=radius))


TASKS = {
    "ball_in_cup-catch": Task(BALL_IN_CUP, 10, 8, cup_start, positions, cup_reward),
    "cartpole-swingup": cartpole(swingup=True),
    "finger-spin": Task(FINGER.replace("HINGE_DAMPING", ".03"), 2, 9, part(finger_start, turn=False),
                        finger_observe, spin_reward),
    "finger-turn_hard": finger_turn(0.03),
    "point_mass-easy": point_mass(hard=False),
    "reacher-easy": reacher(0.05),
    # held out from training
    "cartpole-balance": cartpole(swingup=False),
    "finger-turn_easy": finger_turn(0.07),
    "pendulum-swingup": Task(PENDULUM, 1, 3, pendulum_start, pendulum_observe, pendulum_reward),
    "point_mass-hard": point_mass(hard=True),
    "reacher-hard": reacher(0.015),
}
TRAIN_TASKS, HELD_OUT_TASKS = tuple(TASKS)[:6], tuple(TASKS)[6:]


# ---------------------------------------------------------------------------------------------------------
# Environments with gymnax's interface
# ---------------------------------------------------------------------------------------------------------
@struct.dataclass
class EnvParams(environment.EnvParams):
    max_steps_in_episode: int = 1000


class DMC(environment.Environment):
    """A DMControl task, such as DMC("finger-spin"); gymnax 1.x environment.

    Observations are float32 (obs_dim,), dm_control's observation dictionary flattened in its order; rewards
    float32 in [0, 1]. Actions are (act_dim,) in [-1, 1]; what lies outside is clipped by the actuators (as in
    MuJoCo) but not in the reward (as in dm_control). An episode ends by time only. backend: "fused" or "mjx",
    see physics.make_step.
    """

    def __init__(self, task, backend="fused"):
        super().__init__()
        self.task = task
        self.model = mujoco.MjModel.from_xml_string(TASKS[task].model)
        self.physics_step = physics.make_step(self.model, TASKS[task].substeps, backend)
        self.min_distance = physics.make_min_distance(self.model)

    @property
    def name(self):
        return f"dmc:{self.task}"

    @property
    def default_params(self):
        return EnvParams()

    def get_obs(self, state, params=None, key=None):
        return jnp.concatenate(TASKS[self.task].observe(state)).astype(jnp.float32)

    def reset_env(self, key, params):
        u = jax.random.uniform(key, (NUM_UNIFORM,), minval=1e-7)  # 0 would be an infinite normal variate
        state = TASKS[self.task].start(u, self).replace(time=jnp.int32(0))
        return self.get_obs(state), state

    def step_env(self, key, state, action, params):
        qpos, qvel, touch = self.physics_step(state.qpos, state.qvel, action, state.wrap_prm)
        state = state.replace(qpos=qpos, qvel=qvel, time=state.time + 1,
                              touch=None if state.touch is None else touch)
        reward = TASKS[self.task].reward(state, action).astype(jnp.float32)
        return self.get_obs(state), state, reward, jnp.array(False), {"discount": jnp.float32(1)}

    def is_terminated(self, state, params):
        return jnp.array(False)

    def action_space(self, params=None):
        return spaces.Box(-1.0, 1.0, (self.model.nu,), jnp.float32)

    def observation_space(self, params=None):
        return spaces.Box(-jnp.inf, jnp.inf, (TASKS[self.task].obs_dim,), jnp.float32)


@struct.dataclass
class BraxState:
    brax: Any  # brax.envs.State
    time: jax.Array  # () int32


class Brax(environment.Environment):
    """A brax environment with gymnax's interface: `done` is termination, 1000 steps truncation.

    kwargs go to the brax environment's constructor (backend="spring", ...).
    """

    def __init__(self, name, **kwargs):
        super().__init__()
        import brax.envs

        self.env, self.env_name = brax.envs.get_environment(name, **kwargs), name

    @property
    def name(self):
        return f"brax:{self.env_name}"

    @property
    def default_params(self):
        return EnvParams()

    def reset_env(self, key, params):
        state = self.env.reset(key)
        return state.obs, BraxState(state, jnp.int32(0))

    def step_env(self, key, state, action, params):
        brax = self.env.step(state.brax, action)
        state = BraxState(brax, state.time + 1)
        return brax.obs, state, brax.reward, brax.done > 0, {"discount": 1 - brax.done}

    def is_terminated(self, state, params):
        return state.brax.done > 0

    def action_space(self, params=None):
        return spaces.Box(-1.0, 1.0, (self.env.action_size,), jnp.float32)

    def observation_space(self, params=None):
        return spaces.Box(-jnp.inf, jnp.inf, (self.env.observation_size,), jnp.float32)


def is_dmc(name):
    """Whether `name` is one of the eleven DMControl tasks, with or without "dmc:"."""
    return name.removeprefix("dmc:") in TASKS


def make(name, backend="fused", **kwargs):
    """The environment called `name` and its default parameters, as gymnax.make.

    name: "dmc:finger-spin" ("dmc:" may be left out), any gymnax name, or "brax:ant". backend: physics of
    DMControl ("fused", "mjx"); for brax, any but "fused" replaces brax's default. kwargs: fields of the
    parameters (max_steps_in_episode, memory_length, ...), else arguments of the environment's constructor.
    Raises ValueError for an unknown name, with the nearest known ones; TypeError for an unknown argument.
    """
    known = [f"dmc:{task}" for task in TASKS] + list(TASKS) + list(gymnax.registered_envs)
    if name.startswith("brax:"):
        import brax.envs

        known = [f"brax:{env}" for env in brax.envs._envs]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
        raise ValueError(f"unknown environment {name!r}; nearest: {', '.join(near)}")
    if is_dmc(name):
        build = part(DMC, name.removeprefix("dmc:"), backend)
    elif name.startswith("brax:"):
        build = part(Brax, name.removeprefix("brax:"), **({} if backend == "fused" else {"backend": backend}))
    else:
        build = lambda **arguments: gymnax.make(name, **arguments)[0]  # noqa: E731
    fields = {f.name for f in dataclasses.fields(build().default_params)} if kwargs else ()
    env = build(**{k: v for k, v in kwargs.items() if k not in fields})
    return env, env.default_params.replace(**{k: v for k, v in kwargs.items() if k in fields})


# ---------------------------------------------------------------------------------------------------------
# Projections and trials
# ---------------------------------------------------------------------------------------------------------
PROJECTIONS = ("gaussian", "orthogonal", "rademacher", "identity", "none")


def sample_matrix(key, kind, rows, cols):
    """A random float32 (rows, cols) matrix of one of PROJECTIONS (but "none").

    Every random kind has entries of mean 0 and variance 1/fan_in with fan_in = cols, so that inputs of
    variance 1 give outputs of variance 1. gaussian: independent normal entries. rademacher: independent
    +-1/sqrt(cols). orthogonal: Haar-distributed orthonormal columns (rows >= cols) or rows, times the factor
    that gives that variance: sqrt(rows/cols), or 1. identity: ones on the diagonal (keeps the first
    components, pads with zeros).
    """
    return shape_matrix(jax.random.normal(key, (rows, cols), jnp.float32), kind)


def shape_matrix(normal, kind):
    """sample_matrix from independent standard normal entries (..., rows, cols)."""
    rows, cols = normal.shape[-2:]
    if kind == "gaussian":
        return normal / math.sqrt(cols)
    if kind == "rademacher":
        return jnp.where(normal < 0, -1.0, 1.0) / math.sqrt(cols)
    if kind == "orthogonal":
        if rows < cols:
            return shape_matrix(normal.mT, kind).mT / math.sqrt(cols / rows)
        q, r = jnp.linalg.qr(normal)
        sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)  # makes the distribution uniform
        return q * sign[..., None, :] * math.sqrt(rows / cols)
    return jnp.broadcast_to(jnp.eye(rows, cols, dtype=normal.dtype), normal.shape)


class Start(NamedTuple):
    """What a lane takes at the start of an episode (env, obs) and of a trial (matrices)."""

    env: tuple  # per task: environment states, leading axis the task's lanes
    obs: jax.Array  # (N, largest obs_dim) raw observation, zero-padded
    obs_matrix: Any  # (N, obs_size, largest obs_dim), zero-padded; None without projection
    act_matrix: Any  # (N, largest act_dim, action_size), zero-padded; None without projection


@struct.dataclass
class LanesState:
    """State of all lanes: a pytree of arrays. N lanes in blocks of tasks."""

    env: tuple  # per task: its environments' states (DMCState: env[i].qpos is (N / tasks, nq))
    obs_matrix: Any  # as in Start, of the running trials
    act_matrix: Any
    spare: Start
    input: jax.Array  # (N, input_size) float32, what the agent sees now
    clock: jax.Array  # (N,) int32, steps of this episode, those a staggered lane did not live included
    episode: jax.Array  # (N,) int32, episodes of this trial that are over
    elapsed: jax.Array  # (N,) int32, steps of this trial
    complete: jax.Array  # (N,) bool, this episode was seen from its start
    episode_return: jax.Array  # (N,) float32
    key: jax.Array


class LaneStep(NamedTuple):
    """What happened in one step of N lanes."""

    reward: jax.Array  # (N,) float32, raw; 0 where diverged
    terminated: jax.Array  # (N,) bool, the task is over: nothing to bootstrap
    truncated: jax.Array  # (N,) bool, and not terminated: out of time, or diverged
    episode_end: jax.Array  # (N,) bool, terminated or truncated
    trial_end: jax.Array  # (N,) bool, the memory is to be reset before the next input
    final_input: jax.Array  # (N, input_size) float32, agent input made from the observation before any reset
    episode_return: jax.Array  # (N,) float32, sum of raw rewards of this episode so far
    episode_complete: jax.Array  # (N,) bool, this episode was seen from its true start (not a staggered one)
    diverged: jax.Array  # (N,) bool
    time: jax.Array  # (N,) int32, index of this step within its trial


def select(mask, new, old):
    """Leaves of `new` where mask (N,), else of `old`, which has the dtypes."""

    def pick(a, b):
        return jnp.where(jnp.expand_dims(mask, tuple(range(1, b.ndim))), a, b).astype(b.dtype)

    return jax.tree.map(pick, new, old)


def matvec(matrix, x):
    """(N, rows, cols), (N, cols) -> (N, rows), in full float32 and fused with what surrounds it."""
    return (matrix * x[:, None, :]).sum(-1)


def pad_to(x, shape):
    """x (n, ...) with zeros up to (n, *shape)."""
    return jnp.pad(x, [(0, 0)] + [(0, want - have) for want, have in zip(shape, x.shape[1:])])


class Lanes:
    """Many environments side by side, as an in-context agent meets them.

    Lanes are split statically and equally among `tasks`, in contiguous blocks, and each task steps its own
    lanes only. A *trial* is `episodes_per_trial` episodes under one pair of projections, o' = Mo o and
    a = clip(Ma a', -1, 1), with Mo (obs_size, obs_dim) and Ma (act_dim, action_size) drawn independently, see
    sample_matrix; bounded action spaces other than [-1, 1] are scaled to. projection="none" passes
    observation and action (clipped to its space) as they are. Discrete actions are never projected.
    obs_transform="symlog", whatever the projection, shows sign(o') log(1 + |o'|), because velocities reach
    +-100; "none" shows o'.

    The agent sees [o', previous a' as it gave it (one-hot if discrete), previous reward, episode-start flag,
    trial-start flag], with delta=True also o' minus the previous o' (0 at episode starts). Action and reward
    carry over into the next episode of a trial and are 0 at a trial's start.

    A step is `action_repeat` steps of the environment with one action, fewer where the episode ends in between;
    its reward is their sum. All counts of steps here are of such steps.

    stagger: a lane's first trial begins with a uniformly random part of its time already spent. Only the
    clock knows: the physical state is a fresh reset, `time` counts from 0, and `episode_complete` is False.

    Resets of DMControl tasks (collision-free starts, new matrices) are not paid in every step: a lane that
    ends takes the one spare start it holds, and all spares are drawn anew at steps t with
    t % refresh_every == 0, at most half an episode apart. So a lane meets a spare twice only if it diverges
    twice in between. As soon as one task is not from DMControl, with episodes of unknown length, all are
    drawn in every step, as gymnax does.

    A lane diverges if its action, observation, reward, qpos or qvel is not finite, or |qvel| > 1e4: it is
    then truncated, its reward 0 and its final_input the last input, so that no NaN reaches the learner.

    Attributes: tasks, num_lanes, lane_task (num_lanes,) numpy int, obs_size, input_size, discrete,
    action_size (number of actions if discrete), max_episode_steps and trial_length (the shortest among
    tasks, None if there is no limit), refresh_every. Raises ValueError if lanes cannot be split equally, if
    tasks do not go together, or if a size is too small.
    """

    def __init__(self, tasks, num_lanes, projection="gaussian", obs_size=12, action_size=2,
                 episodes_per_trial=1, action_repeat=1, stagger=True, delta=False, obs_transform="symlog",
                 backend="fused", env_kwargs=None):
        self.tasks, self.num_lanes, self.projection = tuple(tasks), num_lanes, projection
        self.episodes_per_trial, self.action_repeat, self.delta = episodes_per_trial, action_repeat, delta
        self.obs_transform = obs_transform
        if not self.tasks or num_lanes < 1 or num_lanes % len(self.tasks):
            raise ValueError(f"cannot split num_lanes={num_lanes} equally among {len(self.tasks)} tasks")
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
        if obs_transform not in ("none", "symlog"):
            raise ValueError(f"obs_transform must be none or symlog, got {obs_transform!r}")
        for name, value in (("episodes_per_trial", episodes_per_trial), ("action_repeat", action_repeat)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.envs, self.params = zip(*(make(task, backend, **(env_kwargs or {})) for task in self.tasks))
        self.lane_task = np.repeat(np.arange(len(self.tasks)), num_lanes // len(self.tasks))

        obs_spaces = [env.observation_space(params) for env, params in zip(self.envs, self.params)]
        act_spaces = [env.action_space(params) for env, params in zip(self.envs, self.params)]
        self.one_hot_obs = [space.n if isinstance(space, spaces.Discrete) else 0 for space in obs_spaces]
        self.obs_dims = [n or math.prod(space.shape) for n, space in zip(self.one_hot_obs, obs_spaces)]
        self.act_shapes = [space.shape for space in act_spaces]
        self.act_dims = [math.prod(shape) for shape in self.act_shapes]
        discrete = [isinstance(space, spaces.Discrete) for space in act_spaces]
        self.discrete = all(discrete)
        if self.discrete != any(discrete) or self.discrete and len({space.n for space in act_spaces}) > 1:
            raise ValueError(f"tasks {', '.join(self.tasks)} do not share one kind of action")
        if projection == "none" and len(set(zip(self.obs_dims, self.act_dims))) > 1:
            raise ValueError(f"projection='none' needs tasks of equal sizes, got (observation, action) sizes "
                             f"{list(zip(self.obs_dims, self.act_dims))}; use a projection")
        if not self.discrete:
            self.low, self.high = np.zeros((2, num_lanes, max(self.act_dims)), np.float32)
            for i, (space, dim) in enumerate(zip(act_spaces, self.act_dims)):
                for ours, theirs in ((self.low, space.low), (self.high, space.high)):
                    ours[self.lane_task == i, :dim] = np.broadcast_to(theirs, space.shape).ravel()
        self.obs_size = self.obs_dims[0] if projection == "none" else obs_size
        self.action_size = (act_spaces[0].n if self.discrete else
                            self.act_dims[0] if projection == "none" else action_size)
        if projection in ("identity", "orthogonal"):
            for task, obs_dim, act_dim in zip(self.tasks, self.obs_dims, self.act_dims):
                if obs_size < obs_dim or not self.discrete and action_size < act_dim:
                    raise ValueError(
                        f"the {projection} projection needs obs_size >= {obs_dim} and action_size >= "
                        f"{act_dim} for {task}, got obs_size={obs_size} and action_size={action_size}")
        self.input_size = self.obs_size * (1 + delta) + self.action_size + 3

        limits = [getattr(params, "max_steps_in_episode", None) for params in self.params]
        limits = [n and -(-n // action_repeat) for n in limits]
        self.max_episode_steps = min((n for n in limits if n is not None), default=None)
        self.trial_length = self.max_episode_steps and self.max_episode_steps * episodes_per_trial
        self.stagger = stagger and None not in limits
        self.limits = np.array([2**30 if n is None else n for n in limits], np.int32)[self.lane_task]
        only_dmc = all(isinstance(env, DMC) for env in self.envs)
        self.refresh_every = max(1, min(500, self.max_episode_steps // 2)) if only_dmc else 1

    # -- observations and starts ----------------------------------------------------------------------------
    def _blocks(self, x):
        """x (N, ...) cut into the tasks' blocks."""
        return jnp.split(x, len(self.tasks))

    def _flat_obs(self, i, obs):
        """Observations of task i's lanes, flattened to float32 (n, obs_dim) and padded to the largest."""
        obs = jax.nn.one_hot(obs, self.one_hot_obs[i]) if self.one_hot_obs[i] else obs
        return pad_to(obs.reshape(obs.shape[0], -1).astype(jnp.float32), (max(self.obs_dims),))

    def _matrices(self, key, rows, cols):
        """A matrix for every lane, of its task's sizes and zero-padded: (N, largest rows, largest cols)."""
        largest = max(rows), max(cols)
        normal = jax.random.normal(key, (self.num_lanes, *largest), jnp.float32)
        return jnp.concatenate([pad_to(shape_matrix(block[:, :r, :c], self.projection), largest)
                                for block, r, c in zip(self._blocks(normal), rows, cols)])

    def _draw(self, key):
        """A fresh Start for every lane."""
        reset_key, obs_key, act_key = jax.random.split(key, 3)
        blocks = []
        for i, keys in enumerate(self._blocks(jax.random.split(reset_key, self.num_lanes))):
            obs, state = jax.vmap(self.envs[i].reset_env, (0, None))(keys, self.params[i])
            state = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)  # no weak types
            blocks.append((state, self._flat_obs(i, obs)))
        states, obs = zip(*blocks)
        obs_matrix = act_matrix = None
        if self.projection != "none":
            obs_matrix = self._matrices(obs_key, [self.obs_size] * len(self.tasks), self.obs_dims)
            if not self.discrete:
                act_matrix = self._matrices(act_key, self.act_dims, [self.action_size] * len(self.tasks))
        return Start(states, jnp.concatenate(obs), obs_matrix, act_matrix)

    def show(self, obs_matrix, obs):
        """Raw observations (N, .) as the agent sees them (N, obs_size)."""
        shown = obs if obs_matrix is None else matvec(obs_matrix, obs)
        return jnp.sign(shown) * jnp.log1p(jnp.abs(shown)) if self.obs_transform == "symlog" else shown

    def _input(self, shown, change, action, reward, episode_start, trial_start):
        flags = jnp.stack([reward, episode_start, trial_start], -1).astype(jnp.float32)
        return jnp.concatenate([shown, action, flags] + [change] * self.delta, -1)

    def _control(self, act_matrix, action):
        """The agent's actions as the environments take them, padded: (N, largest act_dim) or (N,) int."""
        if self.discrete:
            return action
        if act_matrix is None:
            return jnp.clip(action, self.low, self.high)
        action = jnp.clip(matvec(act_matrix, action), -1.0, 1.0)
        return 0.5 * (self.low + self.high) + 0.5 * (self.high - self.low) * action

    def _advance(self, i, keys, state, action):
        """action_repeat steps of task i's n lanes: (flat observation, state, reward, terminated, truncated)."""
        env, params = self.envs[i], self.params[i]

        def once(k, old):
            repeat_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
            obs, state, reward, terminated, _ = jax.vmap(env.step_env, (0, 0, 0, None))(
                repeat_keys, old[1], action, params)
            reward = old[2] + reward.reshape(-1).astype(jnp.float32)
            truncated = jax.vmap(env.is_truncated, (0, None))(state, params)
            new = self._flat_obs(i, obs), state, reward, terminated, truncated
            return select(~(old[3] | old[4]), new, old)

        n, no = action.shape[0], jnp.zeros(action.shape[0], bool)
        none = jnp.zeros((n, max(self.obs_dims))), state, jnp.zeros(n), no, no
        return jax.lax.fori_loop(0, self.action_repeat, once, none)

    # -- interface ------------------------------------------------------------------------------------------
    def reset(self, key):
        """All lanes at the start of a trial: (LanesState, inputs (num_lanes, input_size) float32)."""
        N = self.num_lanes
        key, draw_key, stagger_key = jax.random.split(key, 3)
        both = jax.vmap(self._draw)(jax.random.split(draw_key))
        first, spare = (jax.tree.map(lambda x: x[k], both) for k in range(2))
        spent = jnp.zeros(N, jnp.int32)
        if self.stagger:
            spent = jax.random.randint(stagger_key, (N,), 0, self.limits * self.episodes_per_trial)
        zeros, ones = jnp.zeros(N, jnp.float32), jnp.ones(N, jnp.float32)
        shown = self.show(first.obs_matrix, first.obs)
        inputs = self._input(shown, 0.0 * shown, jnp.zeros((N, self.action_size), jnp.float32),
                             zeros, ones, ones)
        clock = spent % self.limits
        state = LanesState(
            env=first.env, obs_matrix=first.obs_matrix, act_matrix=first.act_matrix, spare=spare,
            input=inputs, clock=clock, episode=spent // self.limits, elapsed=jnp.zeros(N, jnp.int32),
            complete=clock == 0, episode_return=zeros, key=key)
        return state, inputs

    def step(self, state, action, t=0):
        """One step of every lane.

        action: (num_lanes, action_size) float, or (num_lanes,) int if discrete. t: int, step index within the
        rollout; decides when spares are drawn (0: now). Under vmap over seeds it should stay unbatched
        (scanned over, not part of the state), so that this remains a true branch. Returns (LanesState,
        inputs, LaneStep).
        """
        key, step_key, draw_key = jax.random.split(state.key, 3)
        if self.refresh_every == 1:
            spare = self._draw(draw_key)
        else:
            spare = jax.lax.cond(t % self.refresh_every == 0, self._draw, lambda _: state.spare, draw_key)

        control = self._control(state.act_matrix, action)
        stepped, outs = [], []
        step_keys = self._blocks(jax.random.split(step_key, self.num_lanes))
        for i, (env, block) in enumerate(zip(self.envs, self._blocks(control))):
            if not self.discrete:
                block = block[:, :self.act_dims[i]].reshape(-1, *self.act_shapes[i])
            obs, env_state, reward, terminated, truncated = self._advance(i, step_keys[i], state.env[i], block)
            sound = jnp.isfinite(obs).all(-1) & jnp.isfinite(reward)
            if isinstance(env, DMC):  # NaN fails the comparison
                sound &= jnp.isfinite(env_state.qpos).all(-1) & (jnp.abs(env_state.qvel) <= 1e4).all(-1)
            stepped.append(env_state)
            outs.append((obs, reward, terminated, truncated, sound))
        obs, reward, terminated, truncated, sound = jax.tree.map(lambda *xs: jnp.concatenate(xs), *outs)

        last_action = jax.nn.one_hot(action, self.action_size) if self.discrete else action
        diverged = ~(sound & jnp.isfinite(last_action).all(-1))
        last_action = jnp.where(diverged[:, None], 0.0, last_action).astype(jnp.float32)
        reward = jnp.where(diverged, 0.0, reward)
        terminated &= ~diverged
        truncated = (truncated | (state.clock + 1 >= self.limits) | diverged) & ~terminated
        end = terminated | truncated
        episode = state.episode + end
        trial_end = end & (episode >= self.episodes_per_trial)

        no = jnp.zeros_like(end)
        old_shown = state.input[:, :self.obs_size]
        shown = self.show(state.obs_matrix, obs)
        final_input = self._input(shown, shown - old_shown, last_action, reward, no, no)
        final_input = jnp.where(diverged[:, None], state.input, final_input)

        obs = select(end, spare.obs, obs)
        obs_matrix, act_matrix = select(trial_end, (spare.obs_matrix, spare.act_matrix),
                                        (state.obs_matrix, state.act_matrix))
        shown = self.show(obs_matrix, obs)
        inputs = self._input(shown, jnp.where(end[:, None], 0.0, shown - old_shown),
                             jnp.where(trial_end[:, None], 0.0, last_action),
                             jnp.where(trial_end, 0.0, reward), end, trial_end)
        env_states = tuple(
            select(ended, fresh, jax.tree.map(lambda new, old: new.astype(old.dtype), new, old))
            for ended, fresh, new, old in zip(self._blocks(end), spare.env, stepped, state.env))

        episode_return = state.episode_return + reward
        out = LaneStep(reward, terminated, truncated, end, trial_end, final_input, episode_return,
                       state.complete, diverged, state.elapsed)
        state = LanesState(
            env=env_states, obs_matrix=obs_matrix, act_matrix=act_matrix, spare=spare, input=inputs,
            clock=jnp.where(end, 0, state.clock + 1), episode=jnp.where(trial_end, 0, episode),
            elapsed=jnp.where(trial_end, 0, state.elapsed + 1), complete=state.complete | end,
            episode_return=jnp.where(end, 0.0, episode_return), key=key)
        return state, inputs, out
