"""A recorded trial as one HTML file that plays in any browser without a network, or as a GIF.

    write_html(data, path)     # data of evaluate.record_trial; replay.html is the template
    write_gif(data, path)

Every DMControl task here moves in a plane, so that the capsules, spheres and boxes of its model can be
drawn on a canvas. Nothing is simulated again: poses are computed from the recorded joint positions.
"""

import json
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

import dmc

TEMPLATE = Path(__file__).resolve().parent / "replay.html"


class Scene(NamedTuple):
    """What a task's model does not contain. Lengths are in metres, in the plane of the task."""

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
    return Scene((0, 2), (-2 - poles, 2 + poles, 0.75 - poles, 1.25 + poles), ("x", *angles, "speed", *speeds),
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
    """Nested lists of rounded numbers: the digits make up the size of the file."""
    return np.round(np.asarray(x, np.float64), digits).tolist()


def page(data):
    """What replay.html draws, a dictionary for JSON, from `data` of evaluate.record_trial."""
    task = data["task"]
    scene = SCENES.get(task, SCENES.get(task.split("-")[0]))
    model = mujoco.MjModel.from_xml_string(dmc.TASKS[task].model)

    def side(recorded):
        target, qpos = recorded["target"], recorded["qpos"]
        return recorded | {
            "pose": rounded(poses(model, qpos, scene.axes).reshape(len(qpos), -1)), "qpos": None,
            "target": None if target is None else rounded(target + TARGETS[task][0]),
            "reward": rounded(recorded["reward"]), "observed": rounded(recorded["observed"], 3),
            "action": rounded(recorded["action"], 3), "control": rounded(recorded["control"], 3)}

    return data | {
        "seconds": model.opt.timestep * dmc.TASKS[task].substeps * data["action_repeat"],
        "axes": ["xyz"[a] for a in scene.axes], "view": scene.view, "follow": scene.follow,
        "bodies": shapes(model, scene), "string": string(model, scene),
        "target_radius": TARGETS[task][1] if task in TARGETS else 0,
        "ctrl_names": [model.actuator(i).name for i in range(model.nu)],
        "obs_names": scene.obs[:dmc.TASKS[task].obs_dim], "obs_matrix": rounded(data["obs_matrix"], 3),
        "act_matrix": rounded(data["act_matrix"], 3), "sides": [side(x) for x in data["sides"]]}


def write_html(data, path):
    """Writes the page for `data` of evaluate.record_trial to `path`."""
    text = json.dumps(page(data), separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")  # only strings hold "<"; none may open a tag or comment in a script
    path.write_text(TEMPLATE.read_text().replace("/*REPLAY*/null", text))


# ---- GIF -----------------------------------------------------------------------------------------
COLOURS = {"self": "#7fa8c9", "effector": "#e69f00", "joint": "#9aa5b1", "frame": "#c6ccd4",
           "tip": "#cc79a7", "target": "#a6dcca"}  # as in replay.html
BAR = "#0072b2"


def write_gif(data, path, max_bytes=1_500_000):
    """Writes the first side of `data` as a GIF of at most `max_bytes`, in real time or faster.

    A frame shows the bodies, time, reward and return so far, and what the agent observes. Where the
    file would be too large, it has fewer frames a second. ValueError if one frame is too large.
    """
    drawn = page(data)
    every = max(1, round(0.08 / drawn["seconds"]))
    while True:
        steps = range(0, len(drawn["sides"][0]["reward"]), every)
        images = [image.quantize(palette=palette(), dither=0) for image in frames(drawn, steps)]
        images[0].save(path, save_all=True, append_images=images[1:], loop=0, optimize=True,
                       duration=max(20, round(1000 * every * drawn["seconds"] / 10) * 10))
        if path.stat().st_size <= max_bytes:
            return
        if len(images) == 1:
            path.unlink()
            raise ValueError(f"no GIF of {drawn['task']} has at most {max_bytes} bytes")
        every *= 2


def palette():
    """PIL image that holds every colour of a frame in eight shades, down to white."""
    from PIL import Image

    colours = [[int(colour[i:i + 2], 16) for i in (1, 3, 5)] for colour in (*COLOURS.values(), BAR, "#000000")]
    shades = 255 + np.linspace(0, 1, 8)[:, None, None] * (np.array(colours) - 255)
    image = Image.new("P", (1, 1))
    image.putpalette(shades.round().astype(int).ravel().tolist())
    return image


def frames(drawn, steps):
    """PIL images of the first side of a page at `steps`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    side, total = drawn["sides"][0], np.cumsum(drawn["sides"][0]["reward"])
    observed = np.array(side["observed"])
    figure = Figure(figsize=(4.8, 3.6), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    world, bars = figure.subplots(2, 1, height_ratios=(3, 1))
    title = figure.suptitle("", fontsize=9, family="monospace")
    bars.set(xlim=(-0.6, observed.shape[1] - 0.4), ylim=np.array([-1.05, 1.05]) * np.abs(observed).max(),
             xticks=[], yticks=[])
    bars.set_xlabel("what the agent observes: the state through a random projection"
                    if drawn["family"] not in ("none", "identity") else "what the agent observes", fontsize=8)
    heights = bars.bar(range(observed.shape[1]), observed[0], color=BAR)
    bars.axhline(0, color="#aab4bf", lw=0.8)
    for t in steps:
        world.clear()
        draw_world(world, drawn, side, t)
        for bar, value in zip(heights, observed[t]):
            bar.set_height(value)
        reward = side["reward"][t] / drawn["action_repeat"]
        title.set_text(f"{drawn['task']}  {t * drawn['seconds']:5.2f} s  reward {reward:4.2f}  return {total[t]:5.1f}")
        canvas.draw()
        yield Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def draw_world(axis, drawn, side, t):
    """Draws the bodies at step t into a matplotlib axis, as replay.html does."""
    from matplotlib.patches import Circle, Polygon

    west, east, bottom, top = drawn["view"]
    pose = [(0.0, 0.0, 0.0), *np.reshape(side["pose"][t], (-1, 3))]
    ahead = pose[1][0] if drawn["follow"] else 0.0
    axis.set(xlim=(west + ahead, east + ahead), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])

    def place(body, points):
        x, y, angle = pose[body]
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        return np.reshape(points, (-1, 2)) @ turn + (x, y)

    def draw(body, shape):
        colour = COLOURS[shape["colour"]]
        if shape["kind"] == "circle":
            axis.add_patch(Circle(place(body, shape["c"])[0], shape["r"], color=colour, lw=0))
        elif shape["kind"] == "box":
            corners = np.array(shape["c"]) + np.array(shape["half"]) * [(1, 1), (1, -1), (-1, -1), (-1, 1)]
            axis.add_patch(Polygon(place(body, corners), color=colour, lw=0))
        else:
            a, b = place(body, [shape["a"], shape["b"]])
            across = np.array([a[1] - b[1], b[0] - a[0]]) / (np.hypot(*(b - a)) or 1.0) * shape["r"]
            axis.add_patch(Polygon([a + across, b + across, b - across, a - across], color=colour, lw=0.5))
            for end in (a, b):
                axis.add_patch(Circle(end, shape["r"], color=colour, lw=0))

    if side["target"] is not None:
        axis.add_patch(Circle(side["target"][t], drawn["target_radius"], color=COLOURS["target"], lw=0))
    every = [(b, shape) for b, body in enumerate(drawn["bodies"]) for shape in body["shapes"]]
    for b, shape in sorted(every, key=lambda x: x[1]["colour"] != "target"):  # targets lie behind
        draw(b, shape)
    if drawn["string"]:
        axis.plot(*np.concatenate([place(b, point) for b, point in drawn["string"]]).T, color="#1d2733", lw=1)
