"""A recorded trial as one HTML file that plays in any browser, with neither server nor network.

    write(data, path)     # data as from evaluate.record_trial; the page itself is replay.html, beside this file

Every DMControl task here moves in a plane, so that its model's capsules, spheres and boxes can be drawn on a
canvas. Nothing is simulated again: poses come from the recorded joint positions.
"""

import json
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

import dmc

TEMPLATE = Path(__file__).resolve().parent / "replay.html"


class Scene(NamedTuple):
    """What a task's model leaves out. Lengths in metres, in the plane (axes) that the task moves in."""

    axes: tuple  # which world axes point right and up
    view: tuple  # left, right, bottom, top
    obs: tuple  # names of the raw observations
    decoration: tuple = ()  # (body or "world", shape): drawn, without a role in the physics
    follow: bool = False  # keep the first body in the middle


def line(a, b, r, colour):
    return dict(kind="capsule", a=a, b=b, r=r, colour=colour)


def circle(centre, r, colour):
    return dict(kind="circle", c=centre, r=r, colour=colour)


def box(centre, size, colour):
    return dict(kind="box", c=centre, half=size, colour=colour)


CORNERS = (-0.3, -0.3), (0.3, -0.3), (0.3, 0.3), (-0.3, 0.3)
WALLS = tuple(("world", line(a, b, 0.004, "frame")) for a, b in zip(CORNERS, CORNERS[1:] + CORNERS[:1]))
FINGER_OBS = ("proximal", "distal", "tip x", "tip z", "proximal speed", "distal speed", "spin", "touch top",
              "touch bottom")
def cartpole(poles):
    angles = [f"{name} {n + 1}" for n in range(poles) for name in ("cos", "sin")]
    speeds = [f"pole {n + 1} speed" for n in range(poles)]
    return Scene((0, 2), (-2.1, 2.1, 0.75 - poles, 1.25 + poles), ("x", *angles, "speed", *speeds),
                 (("world", line((-2, 1), (2, 1), 0.02, "frame")),))


FLOOR = (("world", line((-1000, 0), (1000, 0), 0.004, "frame")),)
CHEETAH_JOINTS = "back thigh", "back shin", "back foot", "front thigh", "front shin", "front foot"
HOPPER_JOINTS = "waist", "hip", "knee", "ankle"
WALKER_PARTS = [f"{side} {part}" for side in ("right", "left") for part in ("thigh", "leg", "foot")]
WALKER_JOINTS = [f"{side} {joint}" for side in ("right", "left") for joint in ("hip", "knee", "ankle")]
SCENES = {  # of a domain, or of one task
    "acrobot": Scene((0, 2), (-2.3, 2.3, -0.2, 4.3), (
        "sin upper", "sin lower", "cos upper", "cos lower", "shoulder speed", "elbow speed"), (
        ("world", line((-3, 0), (3, 0), 0.004, "frame")), ("world", circle((0, 4), 0.2, "target")))),
    "ball_in_cup": Scene((0, 2), (-0.5, 0.5, 0.0, 1.0), (
        "cup x", "cup z", "ball x", "ball z", "cup speed x", "cup speed z", "ball speed x", "ball speed z"),
        (("cup", box((0, -0.05), (0.05, 0.05), "target")),
         ("world", line((-0.6, 0), (0.6, 0), 0.004, "frame")))),
    "cartpole": cartpole(1), "cartpole-two_poles": cartpole(2), "cartpole-three_poles": cartpole(3),
    "cheetah": Scene((0, 2), (-1.6, 1.6, -0.15, 1.45), (
        "z", "pitch", *CHEETAH_JOINTS, "speed x", "speed z", "pitch speed",
        *(f"{name} speed" for name in CHEETAH_JOINTS)), FLOOR, follow=True),
    "finger": Scene((0, 2), (-0.55, 0.55, 0.0, 0.8), (*FINGER_OBS, "target x", "target z", "distance"), (
        ("spinner", circle((0, 0.13), 0.02, "tip")),)),
    "hopper": Scene((0, 2), (-1.2, 1.2, -0.15, 2.1), (
        "z", "pitch", *HOPPER_JOINTS, "speed x", "speed z", "pitch speed", *(f"{name} speed" for name in HOPPER_JOINTS),
        "touch toe", "touch heel"), FLOOR, follow=True),
    "pendulum": Scene((0, 2), (-0.8, 0.8, -0.1, 1.3), ("cos", "sin", "speed"), (
        ("pole", line((0, 0), (0, 0.5), 0.02, "self")), ("world", circle((0, 1.1), 0.07, "target")))),
    "point_mass": Scene((0, 1), (-0.33, 0.33, -0.33, 0.33), ("x", "y", "speed x", "speed y"), (
        *WALLS, ("world", circle((0, 0), 0.015, "target")))),
    "reacher": Scene((0, 1), (-0.33, 0.33, -0.33, 0.33), (
        "shoulder", "wrist", "to target x", "to target y", "shoulder speed", "wrist speed"), WALLS),
    "walker": Scene((0, 2), (-1.6, 1.6, -0.15, 2.75), (
        *(f"{name} {part}" for part in ("torso", *WALKER_PARTS) for name in ("cos", "sin")), "height",
        "speed z", "speed x", "pitch speed", *(f"{name} speed" for name in WALKER_JOINTS)), FLOOR, follow=True)}
EFFECTORS = ("ball", "finger", "fingertip", "mass", "pointmass")
TARGETS = {  # where a task's target offset counts from, and its radius
    "finger-turn_easy": ((0.2, 0.4), 0.07), "finger-turn_hard": ((0.2, 0.4), 0.03),
    "reacher-easy": ((0.0, 0.0), 0.05), "reacher-hard": ((0.0, 0.0), 0.015)}


def poses(model, qpos, axes):
    """Planar pose of every body but the world: qpos (T, nq) -> (T, nbody - 1, 3) right, up (m), angle (rad).

    Angles count counter-clockwise from the body's orientation at qpos0.
    """
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    rest = data.xmat.reshape(-1, 3, 3).copy()
    found = np.empty((len(qpos), model.nbody - 1, 3))
    for t, q in enumerate(qpos):
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        turn = (data.xmat.reshape(-1, 3, 3) @ rest.transpose(0, 2, 1))[1:]
        found[t, :, :2] = data.xpos[1:, axes]
        found[t, :, 2] = np.arctan2(turn[:, axes[1], axes[0]], turn[:, axes[0], axes[0]])
    return found


def shapes(model, scene):
    """Per body (the world first) its geoms' outlines in the plane, in the body's frame at qpos0."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    axes = list(scene.axes)
    bodies = [[] for _ in range(model.nbody)]
    for name, shape in scene.decoration:
        bodies[0 if name == "world" else model.body(name).id].append(shape)
    for g in range(model.ngeom):
        body, size, name = model.geom_bodyid[g], model.geom_size[g], model.geom(g).name
        axis = data.geom_xmat[g].reshape(3, 3)[axes]  # rows: the plane's axes in the geom's frame
        centre = (data.geom_xpos[g] - data.xpos[body])[axes]
        colour = "effector" if name in EFFECTORS else "self"
        kind = mujoco.mjtGeom(model.geom_type[g]).name.removeprefix("mjGEOM_")
        if kind == "CAPSULE":
            reach = axis[:, 2] * size[1]
            bodies[body].append(line(tuple(centre - reach), tuple(centre + reach), size[0], colour))
        elif kind in ("SPHERE", "CYLINDER"):  # the cylinders here lie across the plane
            bodies[body].append(circle(tuple(centre), size[0], colour if kind == "SPHERE" else "joint"))
        elif kind == "BOX":
            half = np.abs(axis) @ size  # boxes here stand upright at qpos0
            bodies[body].append(box(tuple(centre), tuple(half), colour))
        elif kind != "PLANE":  # planes are given as decoration
            raise ValueError(f"cannot draw geom {name!r} of type {kind}")
    return [{"name": "world" if b == 0 else model.body(b).name, "shapes": s} for b, s in enumerate(bodies)]


def string(model, scene):
    """The ends of a spatial tendon as [[body, (right, up) in the body], ...], or []."""
    if not np.any(model.wrap_type == mujoco.mjtWrap.mjWRAP_SITE):
        return []
    axes = list(scene.axes)
    return [[int(model.site_bodyid[s]), model.site_pos[s][axes].tolist()] for s in model.wrap_objid]


def rounded(x, digits=4):
    """Nested lists of numbers with few digits: that is what the file's size is made of."""
    return np.round(np.asarray(x, np.float64), digits).tolist()


def write(data, path):
    """Write the page for `data` (as from evaluate.record_trial) to `path`, its states as poses in the task's plane."""
    task, domain = data["task"], data["task"].split("-")[0]
    scene, model = SCENES.get(task, SCENES.get(domain)), mujoco.MjModel.from_xml_string(dmc.TASKS[data["task"]].model)
    sides = [side | {
        "pose": rounded(poses(model, side["qpos"], scene.axes).reshape(len(side["qpos"]), -1)), "qpos": None,
        "reward": rounded(side["reward"]), "sees": rounded(side["sees"], 3), "acts": rounded(side["acts"], 3),
        "control": rounded(side["control"], 3),
        "target": None if side["target"] is None else rounded(side["target"] + TARGETS[task][0])}
        for side in data["sides"]]
    page = data | {
        "seconds": model.opt.timestep * dmc.TASKS[task].substeps * data["action_repeat"],
        "axes": ["xyz"[a] for a in scene.axes], "view": scene.view, "follow": scene.follow,
        "bodies": shapes(model, scene), "string": string(model, scene),
        "target_radius": TARGETS[task][1] if task in TARGETS else 0,
        "ctrl_names": [model.actuator(i).name for i in range(model.nu)],
        "obs_names": scene.obs[:dmc.TASKS[task].obs_dim], "obs_matrix": rounded(data["obs_matrix"], 3),
        "act_matrix": rounded(data["act_matrix"], 3), "sides": sides}
    text = json.dumps(page, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")  # in JSON "<" is only found in strings; no tag or comment may begin in a script
    path.write_text(TEMPLATE.read_text().replace("/*REPLAY*/null", text))
