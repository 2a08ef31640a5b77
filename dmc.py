"""DeepMind Control tasks in JAX. For each domain: its model, then start, observation and reward of its tasks.

    env = DMC("finger-spin")                         # a gymnax 1.x environment; all names: TASKS
    params = env.default_params
    obs, state = env.reset(key, params)
    obs, state, reward, terminated, truncated, info = env.step(key, state, action, params)

The reference is dm_control (Tassa et al. 2018, arXiv 1801.00690; Apache-2.0). Masses, lengths, control step, order of
the observation, reward and distribution of initial states are dm_control's. The models are written anew and contain the
physics only. dm_control is not needed to run: this file needs physics.py, jax, mujoco and gymnax. Most of the file is
the table of 23 tasks, so that every task is read in one place.

Units are metres, kilograms, seconds, newtons and radians; angles inside the models are degrees.
"""
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

import physics


# ---- What the domains share --------------------------------------------------------------------------------
@struct.dataclass
class DMCState:
    """State of one DMControl task. Fields that a task does not have are None (no leaf in the pytree)."""

    qpos: jax.Array  # (nq,) metres, radians
    qvel: jax.Array  # (nv,) per second
    time: jax.Array  # () int32, control steps since the episode's start
    touch: Any = None  # (2,) newtons (finger, hopper)
    target: Any = None  # (2,) metres, in the plane (finger turn: from the hinge; reacher: from the shoulder)
    wrap_prm: Any = None  # (4,) the two actuators' directions (point_mass hard)


class Task(NamedTuple):
    """What makes a DMControl task."""

    model: str  # MJCF
    substeps: int  # physics steps in a control step
    obs_dim: int
    start: Callable  # ((NUM_UNIFORM,) numbers in (0, 1), DMC) -> DMCState
    observe: Callable  # (state) -> list of (k,) arrays, dm_control's observation in its order
    reward: Callable  # (state after the step, ctrl as given, DMC) -> scalar
    start_steps: int = 0  # physics steps of DMC.start_physics, which a start may call


def tolerance(x, lower=0.0, upper=0.0, margin=0.0, sigmoid="gaussian", value_at_margin=0.1):
    """1 where lower <= x <= upper, less the farther x is from there (dm_control utils/rewards.py).

    Args:
      x: float array of any shape.
      lower: smallest value that earns 1.
      upper: largest value that earns 1.
      margin: distance, in units of x, in which the value falls to value_at_margin; 0 makes it a step.
      sigmoid: how it falls: "gaussian", or "linear" or "quadratic" down to 0.
      value_at_margin: in [0, 1), over 0 for "gaussian".

    Returns:
      An array like x, in [0, 1].
    """
    distance = jnp.maximum(lower - x, x - upper)
    if margin == 0.0:
        return (distance <= 0).astype(x.dtype)
    distance = jnp.maximum(distance, 0.0) / margin
    if sigmoid == "gaussian":
        return jnp.exp(math.log(value_at_margin) * distance**2)
    power = {"linear": 1, "quadratic": 2}[sigmoid]
    return jnp.maximum(1 - (1 - value_at_margin) * distance**power, 0.0)


def direction(angle):
    """(2,) unit vector (sin, cos): dm_control counts target angles from the second axis."""
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)])


# Every start is a function of NUM_UNIFORM uniform random numbers in (0, 1), because one draw of many numbers
# compiles far faster than many draws of a few. The first four are for targets and the like.
CANDIDATES = 20
NUM_UNIFORM = 4 + 3 * CANDIDATES


def between(u, low, high):
    """Uniform random numbers in (low, high) from uniform ones in (0, 1)."""
    return low + (high - low) * u


def random_joints(u, model):
    """Joint positions: uniform within limits; hinges without limits in [-pi, pi], slides without at 0.

    Source: dm_control suite/utils/randomizers.py.
    """
    turn = np.pi * (model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE)
    low, high = np.where(model.jnt_limited[:, None], model.jnt_range, np.stack([-turn, turn], 1)).T
    return between(u[4:4 + model.nq], low, high)


def first_free(qpos, min_distance):
    """The first of CANDIDATES positions (., nq) in which nothing touches: rejection sampling without a loop.

    One candidate touches with probability 0.10 (finger) or 0.18 (ball_in_cup), all with less than 1e-14.
    """
    return qpos[jnp.argmax(jax.vmap(min_distance)(qpos) >= 0)]


def motors(**gears):
    """MJCF of the motors of joints of these names."""
    return "<actuator>" + "".join(f'<motor name="{joint}" joint="{joint}" gear="{gear}"/>'
                                  for joint, gear in gears.items()) + "</actuator>"


ROOT = ('<joint name="rootx" class="root" type="slide" axis="1 0 0"/>'  # of bodies that move freely in the plane
        '<joint name="rootz" class="root" type="slide" axis="0 0 1"/><joint name="rooty" class="root"/>')


def positions(s):
    """The observation of tasks that show positions and velocities as they are."""
    return [s.qpos, s.qvel]


def without_x(s):
    """The observation of bodies that run: the same wherever they are."""
    return [s.qpos[1:], s.qvel]


# ---- acrobot (dm_control suite/acrobot.py) -----------------------------------------------------------------
ACROBOT = """<mujoco>
  <option timestep=".01" integrator="RK4"><flag constraint="disable"/></option>
  <default><joint axis="0 1 0" damping=".05"/><geom type="capsule" fromto="0 0 0  0 0 1" mass="1"/></default>
  <worldbody>
    <body name="upper_arm" pos="0 0 2">
      <joint name="shoulder"/>
      <geom name="upper_arm" size=".05"/>
      <body name="lower_arm" pos="0 0 1">
        <joint name="elbow"/>
        <geom name="lower_arm" size=".049"/>
      </body></body>
  </worldbody>
  <actuator><motor name="elbow" joint="elbow" gear="2" ctrlrange="-1 1"/></actuator>
</mujoco>"""


def acrobot_start(u, env):
    return DMCState(random_joints(u, env.model), jnp.zeros(2), 0)


def acrobot_observe(s):
    arms = jnp.cumsum(s.qpos)  # angles to the vertical
    return [jnp.sin(arms), jnp.cos(arms), s.qvel]


def acrobot_reward(s, ctrl, env, margin):
    """1 while the tip is in a ball around the place that it reaches when both arms stand upright."""
    arms = jnp.cumsum(s.qpos)
    tip = jnp.stack([jnp.sin(arms).sum(), jnp.cos(arms).sum()])
    return tolerance(jnp.linalg.norm(jnp.array([0, 2]) - tip), upper=0.2, margin=margin)


# ---- ball_in_cup (dm_control suite/ball_in_cup.py) ---------------------------------------------------------
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


def cup_start(u, env):
    ball = u[4:4 + 2 * CANDIDATES].reshape(CANDIDATES, 2)
    ball = between(ball, jnp.array([-0.2, 0.2]), jnp.array([0.2, 0.5]))
    return DMCState(first_free(jnp.pad(ball, ((0, 0), (2, 0))), env.min_distance), jnp.zeros(4), 0)


def cup_reward(s, ctrl, env):
    """1 while the ball is inside the cup."""
    cup = s.qpos[:2] + jnp.array([0, 0.55])  # the centre of its inner square
    ball = s.qpos[2:] + jnp.array([0, 0.2])
    return (jnp.abs(cup - ball) < 0.05 - 0.025).all()


# ---- cartpole (dm_control suite/cartpole.py) ---------------------------------------------------------------
def cartpole_model(poles):
    """A cart with a chain of `poles` poles."""
    chain = ""
    for n in range(poles, 0, -1):
        chain = f"""<body name="pole_{n}" pos="0 0 {int(n > 1)}">
        <joint name="hinge_{n}" axis="0 1 0" damping="2e-6"/>
        <geom name="pole_{n}" type="capsule" fromto="0 0 0  0 0 1" size=".045" mass=".1"/>
        {chain}
      </body>"""
    return f"""<mujoco>
  <option timestep=".01" integrator="RK4"><flag contact="disable"/></option>
  <worldbody>
    <body name="cart" pos="0 0 1">
      <joint name="slider" type="slide" axis="1 0 0" range="-1.8 1.8" solreflimit=".08 1" damping="5e-4"/>
      <geom name="cart" type="box" size=".2 .15 .1" mass="1"/>
      {chain}
    </body>
  </worldbody>
  <actuator><motor name="slide" joint="slider" gear="10" ctrlrange="-1 1"/></actuator>
</mujoco>"""


def cartpole_start(u, env, swingup):
    """The cart near the middle, the first pole hanging (swingup) or all upright, and all nearly still."""
    n = env.model.nq
    normal = jax.scipy.special.ndtri(u[:2 * n])
    if swingup:
        qpos = jnp.zeros(n).at[1].set(jnp.pi) + jnp.array([0.01, 0.01, 0.1, 0.1][:n]) * normal[:n]
    else:
        qpos = jnp.array([0.1] + [0.034] * (n - 1)) * between(u[:n], -1, 1)
    return DMCState(qpos, 0.01 * normal[n:], 0)


def cartpole_observe(s):
    poles = jnp.cumsum(s.qpos[1:])  # angles to the vertical
    return [s.qpos[:1], jnp.stack([jnp.cos(poles), jnp.sin(poles)], 1).ravel(), s.qvel]


def cartpole_reward(s, ctrl, env):
    """How upright all poles are, less for being off the middle, for force, and for the fastest joint."""
    upright = (jnp.cos(jnp.cumsum(s.qpos[1:])) + 1) / 2
    centred = (1 + tolerance(s.qpos[0], margin=2.0)) / 2
    small_control = (4 + tolerance(ctrl[0], margin=1.0, sigmoid="quadratic", value_at_margin=0.0)) / 5
    small_velocity = (1 + tolerance(s.qvel[1:], margin=5.0).min()) / 2
    return upright.mean() * small_control * small_velocity * centred


def cartpole_sparse_reward(s, ctrl, env):
    """1 while the cart is near the middle and all poles are within 6 degrees of upright."""
    return (jnp.abs(s.qpos[0]) <= 0.25) & (jnp.cos(jnp.cumsum(s.qpos[1:])) >= 0.995).all()


# ---- cheetah (dm_control suite/cheetah.py) -----------------------------------------------------------------
def cheetah_leg(*links):
    """MJCF of a leg from its links, hip first: name, place, range, stiffness and damping of the joint, then the
    capsule's half length, centre and angle."""
    name, pos, limits, stiffness, damping, half_length, centre, angle = links[0]
    return (f'<body name="{name}" pos="{pos}">'
            f'<joint name="{name}" range="{limits}" stiffness="{stiffness}" damping="{damping}"/>'
            f'<geom name="{name}" size=".046 {half_length}" pos="{centre}" euler="0 {angle} 0"/>'
            f'{cheetah_leg(*links[1:]) if links[1:] else ""}</body>')


CHEETAH = f"""<mujoco>
  <option timestep=".01"/>
  <default>
    <joint axis="0 1 0" armature=".1"/>
    <geom type="capsule" density="660.8849500774736" friction=".4 .1 .1"/>
    <motor ctrlrange="-1 1"/>
    <default class="root"><joint armature="0"/></default>
  </default>
  <worldbody>
    <geom name="ground" type="plane" pos="98 0 0" size="100 .8 .5" friction="1 .005 .0001"/>
    <body name="torso" pos="0 0 .7">
      {ROOT}
      <geom name="torso" size=".046" fromto="-.5 0 0  .5 0 0"/>
      <geom name="head" size=".046 .15" pos=".6 0 .1" euler="0 50 0"/>
      {cheetah_leg(("bthigh", "-.5 0 0", "-30 60", 240, 6, .145, ".1 0 -.13", -218),
                   ("bshin", ".16 0 -.25", "-50 50", 180, 4.5, .15, "-.14 0 -.07", -116),
                   ("bfoot", "-.28 0 -.14", "-230 50", 120, 3, .094, ".03 0 -.097", -15))}
      {cheetah_leg(("fthigh", ".5 0 0", "-57 .4", 180, 4.5, .133, "-.07 0 -.12", 30),
                   ("fshin", "-.14 0 -.24", "-70 50", 120, 3, .106, ".065 0 -.09", -34),
                   ("ffoot", ".13 0 -.18", "-28 28", 60, 1.5, .07, ".045 0 -.07", -34))}
    </body>
  </worldbody>
  {motors(bthigh=120, bshin=90, bfoot=60, fthigh=90, fshin=60, ffoot=30)}
</mujoco>"""  # 14 kg in all


def cheetah_start(u, env):
    """200 physics steps after a fall from random joint positions.

    dm_control takes the first of them with the forces of the model's own posture, where nothing touches and all
    springs are at rest: it falls freely.
    """
    h = env.model.opt.timestep
    qvel = jnp.zeros(9).at[1].set(h * env.model.opt.gravity[2])
    qpos = random_joints(u, env.model).at[2].set(0.0) + h * qvel  # the torso is level
    qpos, qvel, _ = env.start_physics(qpos, qvel, jnp.zeros(6))
    return DMCState(qpos, qvel, 0)


def cheetah_reward(s, ctrl, env):
    """Forward speed, up to 10 m/s."""
    return tolerance(env.speed(s), lower=10.0, upper=math.inf, margin=10.0, sigmoid="linear", value_at_margin=0.0)


# ---- finger (dm_control suite/finger.py) -------------------------------------------------------------------
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
      </body></body>
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


def finger_start(u, env, turn=False):
    candidates = jnp.pad(u[4:].reshape(CANDIDATES, 3), ((0, 0), (4, 0)))
    qpos = first_free(jax.vmap(lambda v: random_joints(v, env.model))(candidates), env.min_distance)
    target = 0.13 * direction(between(u[0], -jnp.pi, jnp.pi)) if turn else None
    return DMCState(qpos, jnp.zeros(3), 0, jnp.zeros(2), target)


def finger_tip(s):
    """(2,) the spinner's tip, from its hinge."""
    return 0.13 * direction(s.qpos[2]) * jnp.array([-1, 1])


def finger_distance(s, radius):
    """Distance of the spinner's tip to the edge of the target, negative inside."""
    return jnp.linalg.norm(s.target - finger_tip(s)) - radius


def finger_observe(s, radius=None):
    """Tip, touch and, in the turn tasks (which give the target's radius), the target."""
    obs = [s.qpos[:2], finger_tip(s), s.qvel, jnp.log1p(s.touch)]
    return obs if radius is None else obs + [s.target, finger_distance(s, radius)[None]]


def spin_reward(s, ctrl, env):
    """1 while the spinner turns at 15 rad/s or faster."""
    return s.qvel[2] <= -15.0


def turn_reward(s, ctrl, env, radius):
    """1 while the spinner's tip is in the target."""
    return finger_distance(s, radius) <= 0


# ---- hopper (dm_control suite/hopper.py) -------------------------------------------------------------------
HOPPER = f"""<mujoco>
  <option timestep=".005"/>
  <default>
    <joint axis="0 1 0" damping=".05" armature=".2"/>
    <geom type="capsule"/>
    <site size=".05"/>
    <motor ctrlrange="-1 1"/>
    <default class="root"><joint damping="0" armature="0"/></default>
  </default>
  <worldbody>
    <geom name="floor" type="plane" pos="48 0 0" size="50 1 .2"/>
    <body name="torso" pos="0 0 1">
      {ROOT}
      <geom name="torso" size=".0653" fromto="0 0 -.05  0 0 .2"/>
      <geom name="nose" size=".03" fromto=".08 0 .13  .15 0 .14"/>
      <body name="pelvis" pos="0 0 -.05"><joint name="waist" range="-30 30"/>
        <geom name="pelvis" size=".065" fromto="0 0 0  0 0 -.15"/>
        <body name="thigh" pos="0 0 -.2"><joint name="hip" range="-170 10"/>
          <geom name="thigh" size=".04" fromto="0 0 0  0 0 -.33"/>
          <body name="calf" pos="0 0 -.33"><joint name="knee" range="5 150"/>
            <geom name="calf" size=".03" fromto="0 0 0  0 0 -.32"/>
            <body name="foot" pos="0 0 -.32"><joint name="ankle" range="-45 45"/>
              <geom name="foot" size=".04" fromto="-.08 0 0  .17 0 0"/>
              <site name="touch_toe" pos=".17 0 0"/>
              <site name="touch_heel" pos="-.08 0 0"/>
            </body></body></body></body></body>
  </worldbody>
  {motors(waist=30, hip=40, knee=30, ankle=10)}
  <sensor><touch name="touch_toe" site="touch_toe"/><touch name="touch_heel" site="touch_heel"/></sensor>
</mujoco>"""


def hopper_start(u, env):
    """Random joint positions, which may touch the floor or one another."""
    qpos, qvel = random_joints(u, env.model), jnp.zeros(7)
    return DMCState(qpos, qvel, 0, env.start_physics(qpos, qvel, jnp.zeros(4))[2])


def hopper_observe(s):
    return [*without_x(s), jnp.log1p(s.touch)]


def standing(s, env):
    """1 while the torso's centre of mass is well above the foot's."""
    torso, foot = (env.kinematics(s.qpos).xipos[env.model.body(name).id, 2] for name in ("torso", "foot"))
    return tolerance(torso - foot, lower=0.6, upper=2.0)


def hopper_stand_reward(s, ctrl, env):
    return standing(s, env) * (4 + tolerance(ctrl, margin=1.0, sigmoid="quadratic", value_at_margin=0.0).mean()) / 5


def hop_reward(s, ctrl, env):
    """Stand, and go forward at up to 2 m/s."""
    speed = tolerance(env.speed(s), lower=2.0, upper=math.inf, margin=1.0, sigmoid="linear", value_at_margin=0.5)
    return standing(s, env) * speed


# ---- pendulum (dm_control suite/pendulum.py) ---------------------------------------------------------------
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


def pendulum_start(u, env):
    return DMCState(random_joints(u, env.model), jnp.zeros(1), 0)


def pendulum_observe(s):
    return [jnp.cos(s.qpos), jnp.sin(s.qpos), s.qvel]


def pendulum_reward(s, ctrl, env):
    """1 while the pole is within 8 degrees of upright."""
    return jnp.cos(s.qpos[0]) >= math.cos(math.radians(8))


# ---- point_mass (dm_control suite/point_mass.py) -----------------------------------------------------------
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


def point_mass_start(u, env, hard=False):
    """A random place; in the hard task also random directions for the two actuators.

    The second is anything whose |cosine| with the first is at most 0.9, to either side.
    """
    wrap_prm = None
    if hard:
        near = math.acos(0.9)
        first = between(u[0], 0, 2 * jnp.pi)
        second = first + between(u[1], near, math.pi - near) * jnp.where(u[2] < 0.5, -1, 1)
        wrap_prm = jnp.concatenate([direction(first), direction(second)])
    return DMCState(random_joints(u, env.model), jnp.zeros(2), 0, wrap_prm=wrap_prm)


def point_mass_reward(s, ctrl, env):
    near_target = tolerance(jnp.linalg.norm(s.qpos), upper=0.015, margin=0.015)
    return near_target * (4 + tolerance(ctrl, margin=1.0, sigmoid="quadratic", value_at_margin=0.0).mean()) / 5


# ---- reacher (dm_control suite/reacher.py) -----------------------------------------------------------------
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
      </body></body>
  </worldbody>
  <actuator><motor name="shoulder" joint="shoulder"/><motor name="wrist" joint="wrist"/></actuator>
</mujoco>"""


def reacher_start(u, env):
    target = between(u[1], 0.05, 0.2) * direction(between(u[0], 0, 2 * jnp.pi))
    return DMCState(random_joints(u, env.model), jnp.zeros(2), 0, target=target)


def reacher_to_target(s):
    """(2,) from finger to target."""
    upper, lower = s.qpos[0], s.qpos[0] + s.qpos[1]  # angles of the two links, both 0.12 long
    return s.target - 0.12 * jnp.stack([jnp.cos(upper) + jnp.cos(lower), jnp.sin(upper) + jnp.sin(lower)])


def reacher_observe(s):
    return [s.qpos, reacher_to_target(s), s.qvel]


def reacher_reward(s, ctrl, env, radius):
    """1 while the finger touches the target."""
    return jnp.linalg.norm(reacher_to_target(s)) <= radius + 0.01  # of the target, of the finger


# ---- walker (dm_control suite/walker.py) -------------------------------------------------------------------
LEG = """<body name="SIDE_thigh" pos="0 OFFSET -.3">
        <joint name="SIDE_hip" range="-20 100"/>
        <geom name="SIDE_thigh" size=".05" fromto="0 0 0  0 0 -.45"/>
        <body name="SIDE_leg" pos="0 0 -.7">
          <joint name="SIDE_knee" pos="0 0 .25" range="-150 0"/>
          <geom name="SIDE_leg" size=".04 .25"/>
          <body name="SIDE_foot" pos=".06 0 -.25">
            <joint name="SIDE_ankle" pos="-.06 0 0" range="-45 45"/>
            <geom name="SIDE_foot" size=".05 .1" zaxis="1 0 0"/>
          </body></body>
      </body>"""
WALKER = f"""<mujoco>
  <option timestep=".0025"/>
  <default>
    <joint axis="0 -1 0" damping=".1" armature=".01" solimplimit="0 .99 .01"/>
    <geom type="capsule" conaffinity="0" friction=".7 .1 .1"/>
    <motor ctrlrange="-1 1"/>
    <default class="root"><joint damping="0" armature="0"/></default>
  </default>
  <worldbody>
    <geom name="floor" type="plane" conaffinity="1" pos="248 0 0" size="250 .8 .2"/>
    <body name="torso" pos="0 0 1.3">
      <joint name="rootz" class="root" type="slide" axis="0 0 1"/>
      <joint name="rootx" class="root" type="slide" axis="1 0 0"/>
      <joint name="rooty" class="root" axis="0 1 0"/>
      <geom name="torso" size=".07 .3"/>
      {LEG.replace("SIDE", "right").replace("OFFSET", "-.05")}
      {LEG.replace("SIDE", "left").replace("OFFSET", ".05")}
    </body>
  </worldbody>
  {motors(right_hip=100, right_knee=50, right_ankle=20, left_hip=100, left_knee=50, left_ankle=20)}
</mujoco>"""


def walker_start(u, env):
    """Random joint positions, which may touch the floor."""
    return DMCState(random_joints(u, env.model), jnp.zeros(9), 0)


def walker_observe(s):
    legs = s.qpos[2] - jnp.cumsum(s.qpos[3:].reshape(2, 3), 1)  # these joints turn the other way
    angles = jnp.concatenate([s.qpos[2:3], legs.ravel()])
    return [jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1).ravel(), 1.3 + s.qpos[:1], s.qvel]


def walker_reward(s, ctrl, env, speed=0.0):
    """Stand high and upright and, if a speed is asked for (m/s), go forward at least as fast."""
    high = tolerance(1.3 + s.qpos[0], lower=1.2, upper=math.inf, margin=0.6)
    stand = (3 * high + (1 + jnp.cos(s.qpos[2])) / 2) / 4
    if not speed:
        return stand
    fast = tolerance(env.speed(s), lower=speed, upper=math.inf, margin=speed / 2, sigmoid="linear", value_at_margin=0.5)
    return stand * (5 * fast + 1) / 6


# ---- The tasks ---------------------------------------------------------------------------------------------
def acrobot(margin):
    return Task(model=ACROBOT, substeps=1, obs_dim=6, start=acrobot_start, observe=acrobot_observe,
                reward=partial(acrobot_reward, margin=margin))


def cartpole(swingup, reward=cartpole_reward, poles=1):
    return Task(model=cartpole_model(poles), substeps=1, obs_dim=2 + 3 * poles,
                start=partial(cartpole_start, swingup=swingup), observe=cartpole_observe, reward=reward)


def finger_turn(radius):
    return Task(model=FINGER.replace("HINGE_DAMPING", ".5"), substeps=2, obs_dim=12,
                start=partial(finger_start, turn=True), observe=partial(finger_observe, radius=radius),
                reward=partial(turn_reward, radius=radius))


def hopper(reward):
    return Task(model=HOPPER, substeps=4, obs_dim=15, start=hopper_start, observe=hopper_observe,
                reward=reward, start_steps=1)


def point_mass(start):
    return Task(model=POINT_MASS, substeps=1, obs_dim=4, start=start, observe=positions,
                reward=point_mass_reward)


def reacher(radius):
    return Task(model=REACHER, substeps=1, obs_dim=6, start=reacher_start, observe=reacher_observe,
                reward=partial(reacher_reward, radius=radius))


def walker(reward):
    return Task(model=WALKER, substeps=10, obs_dim=24, start=walker_start, observe=walker_observe,
                reward=reward)


TASKS = {  # dm_control's "DOMAIN-TASK"
    "acrobot-swingup": acrobot(margin=1.0),
    "acrobot-swingup_sparse": acrobot(margin=0.0),
    "ball_in_cup-catch": Task(
        model=BALL_IN_CUP, substeps=10, obs_dim=8, start=cup_start, observe=positions, reward=cup_reward),
    "cartpole-balance": cartpole(swingup=False),
    "cartpole-balance_sparse": cartpole(swingup=False, reward=cartpole_sparse_reward),
    "cartpole-swingup": cartpole(swingup=True),
    "cartpole-swingup_sparse": cartpole(swingup=True, reward=cartpole_sparse_reward),
    "cartpole-two_poles": cartpole(swingup=True, poles=2),
    "cartpole-three_poles": cartpole(swingup=True, poles=3),
    "cheetah-run": Task(
        model=CHEETAH, substeps=1, obs_dim=17, start=cheetah_start, observe=without_x,
        reward=cheetah_reward, start_steps=199),
    "finger-spin": Task(
        model=FINGER.replace("HINGE_DAMPING", ".03"), substeps=2, obs_dim=9, start=finger_start,
        observe=finger_observe, reward=spin_reward),
    "finger-turn_easy": finger_turn(radius=0.07),
    "finger-turn_hard": finger_turn(radius=0.03),
    "hopper-hop": hopper(hop_reward),
    "hopper-stand": hopper(hopper_stand_reward),
    "pendulum-swingup": Task(
        model=PENDULUM, substeps=1, obs_dim=3, start=pendulum_start, observe=pendulum_observe,
        reward=pendulum_reward),
    "point_mass-easy": point_mass(point_mass_start),
    "point_mass-hard": point_mass(partial(point_mass_start, hard=True)),
    "reacher-easy": reacher(radius=0.05),
    "reacher-hard": reacher(radius=0.015),
    "walker-run": walker(partial(walker_reward, speed=8.0)),
    "walker-stand": walker(walker_reward),
    "walker-walk": walker(partial(walker_reward, speed=1.0)),
}


# ---- As environments with gymnax's interface ---------------------------------------------------------------
@struct.dataclass
class EnvParams(environment.EnvParams):
    max_steps_in_episode: int = 1000


class DMC(environment.Environment):
    """A DMControl task; gymnax 1.x environment.

    Observations are float32 (obs_dim,), dm_control's observation dictionary flattened in its order; rewards float32
    in [0, 1]. Actions are float (act_dim,) in [-1, 1]; what lies outside is clipped by the actuators (as in MuJoCo)
    but not in the reward (as in dm_control). An episode ends by time only, after 1000 steps.

    Args:
      task: a name in TASKS.
      backend: "fused" or "mjx", see physics.make_step.
      velocities: observe joint velocities; without them an agent has to infer them.
    """

    def __init__(self, task, backend="fused", velocities=True):
        super().__init__()
        self.task = task
        self.model = mujoco.MjModel.from_xml_string(TASKS[task].model)
        self.physics_step = physics.make_step(self.model, TASKS[task].substeps, backend)
        if TASKS[task].start_steps:
            self.start_physics = physics.make_step(self.model, TASKS[task].start_steps, backend)
        self.min_distance = physics.make_min_distance(self.model)
        self.kinematics = physics.make_kinematics(self.model)
        self.com_velocity = physics.make_com_velocity(self.model)
        self.velocities = velocities

    def speed(self, state):
        """Velocity of the centre of mass along x, metres per second."""
        return self.com_velocity(state.qpos, state.qvel)[0]

    @property
    def name(self):
        return f"dmc:{self.task}"

    @property
    def default_params(self):
        return EnvParams()

    def get_obs(self, state, params=None, key=None):
        parts = TASKS[self.task].observe(state)
        if not self.velocities:
            parts = [part for part in parts if part is not state.qvel]
        return jnp.concatenate(parts).astype(jnp.float32)

    def reset_env(self, key, params):
        u = jax.random.uniform(key, (NUM_UNIFORM,), minval=1e-7)  # 0 would be an infinite normal variate
        state = TASKS[self.task].start(u, self).replace(time=jnp.int32(0))
        return self.get_obs(state), state

    def step_env(self, key, state, action, params):
        qpos, qvel, touch = self.physics_step(state.qpos, state.qvel, action, state.wrap_prm)
        state = state.replace(qpos=qpos, qvel=qvel, time=state.time + 1,
                              touch=None if state.touch is None else touch)
        reward = TASKS[self.task].reward(state, action, self).astype(jnp.float32)
        return self.get_obs(state), state, reward, jnp.array(False), {"discount": jnp.float32(1)}

    def is_terminated(self, state, params):
        return jnp.array(False)

    def action_space(self, params=None):
        return spaces.Box(-1.0, 1.0, (self.model.nu,), jnp.float32)

    def observation_space(self, params=None):
        size = TASKS[self.task].obs_dim - (0 if self.velocities else self.model.nv)
        return spaces.Box(-jnp.inf, jnp.inf, (size,), jnp.float32)
