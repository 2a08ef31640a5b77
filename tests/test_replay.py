"""replay.py: poses and outlines against MuJoCo, the page, the GIF."""

import json
import re

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
from small_runs import make_run

import dmc
import envs
import evaluate
import physics
import replay

TASK, STEPS, TRIALS = "reacher-easy", 60, 3


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    return evaluate.load(make_run(tmp_path_factory.mktemp("runs") / "s5", env=(TASK,), memory="s5", sysid=True))


@pytest.fixture(scope="module")
def data(agent):
    return evaluate.record_trial(agent, TASK, TRIALS)


@pytest.mark.parametrize("task", dmc.TASKS)
def test_poses_and_shapes_equal_the_model(task):
    """Bodies as physics.py places them, outlines as C MuJoCo places the geoms, at random joint positions."""
    model = mujoco.MjModel.from_xml_string(dmc.TASKS[task].model)
    scene = replay.SCENES.get(task, replay.SCENES.get(task.split("-")[0]))
    assert len(scene.obs) >= dmc.TASKS[task].obs_dim
    axes = list(scene.axes)
    qpos = np.random.default_rng(0).uniform(-1, 1, (4, model.nq))
    pose = replay.poses(model, qpos, scene.axes)
    kinematics, data = physics.make_kinematics(model), mujoco.MjData(model)
    rest = np.asarray(kinematics(jnp.asarray(model.qpos0, jnp.float32)).xmat)
    geoms = {"CAPSULE": "capsule", "SPHERE": "circle", "CYLINDER": "circle", "BOX": "box"}
    drawn = [[s for s in body["shapes"]] for body in replay.shapes(model, replay.Scene(scene.axes, (), ()))]
    assert sum(map(len, drawn)) == model.ngeom - (model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE).sum()
    for q, p in zip(qpos, pose):
        k = kinematics(jnp.asarray(q, jnp.float32))
        np.testing.assert_allclose(p[:, :2], np.asarray(k.xpos)[1:, axes], atol=1e-5)
        turn = np.einsum("bij,bkj->bik", np.asarray(k.xmat), rest)[1:][:, axes][:, :, axes]
        c, s = np.cos(p[:, 2]), np.sin(p[:, 2])
        expected = np.array([[c, -s], [s, c]]).transpose(2, 0, 1)
        np.testing.assert_allclose(turn, expected, atol=1e-5)
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        place = {b + 1: lambda v, t=turn[b], o=p[b, :2]: o + t @ np.array(v) for b in range(model.nbody - 1)}
        for b in place:
            for shape, g in zip(drawn[b], range(model.body_geomadr[b], model.ngeom)):
                assert shape["kind"] == geoms[mujoco.mjtGeom(model.geom_type[g]).name[7:]]
                if shape["kind"] == "capsule":
                    reach = data.geom_xmat[g].reshape(3, 3)[axes, 2] * model.geom_size[g, 1]
                    ends = data.geom_xpos[g, axes] + np.stack([-reach, reach])
                    np.testing.assert_allclose([place[b](shape[e]) for e in "ab"], ends, atol=1e-5)
                else:
                    np.testing.assert_allclose(place[b](shape["c"]), data.geom_xpos[g, axes], atol=1e-5)


def test_replay_page(data, tmp_path):
    """The page of a task with a target: nothing from a network, and the data that were recorded."""
    path = tmp_path / "replay.html"
    replay.write_html(data, path)
    text = path.read_text()
    assert path.stat().st_size < 3e6
    assert not re.search(r"https?:|//[a-z]+\.|src\s*=|<link|@import|url\(|fetch\(|XMLHttp|\bimport\b", text)
    page = json.loads(re.search(r"const R = (\{.*\});\n", text).group(1))
    model = mujoco.MjModel.from_xml_string(dmc.TASKS["reacher-easy"].model)
    kinematics = jax.jit(jax.vmap(physics.make_kinematics(model)))
    assert [side["name"] for side in page["sides"]] == [
        "with memory", "hidden state reset at every step"]
    for side, recorded in zip(page["sides"], data["sides"]):
        pose = np.array(side["pose"]).reshape(STEPS, 3, 3)
        k = kinematics(jnp.asarray(recorded["qpos"], jnp.float32))
        np.testing.assert_allclose(pose[..., :2], k.xpos[:, 1:, :2], atol=2e-4)
        np.testing.assert_allclose(np.cos(pose[..., 2]), k.xmat[:, 1:, 0, 0], atol=2e-4)
        control = np.clip(recorded["action"] @ data["act_matrix"].T, -1, 1)
        np.testing.assert_allclose(side["control"], control, atol=1e-3)
        # the recorded matrix projects the recorded state to what was observed
        env, state = envs.make("reacher-easy")[0], dmc.DMCState(*[None] * 3)
        velocity = np.diff(recorded["qpos"], axis=0) / 0.02  # one step later, semi-implicit Euler's velocity
        state = state.replace(qpos=recorded["qpos"][1:], qvel=velocity, target=recorded["target"][1:])
        obs = jax.vmap(lambda s, env=env: env.get_obs(s))(jax.tree.map(jnp.float32, state))
        projected = np.asarray(obs, np.float64) @ data["obs_matrix"].T
        projected = np.sign(projected) * np.log1p(np.abs(projected))
        np.testing.assert_allclose(np.array(side["observed"])[1:], projected, atol=5e-3)
        reach = np.linalg.norm(pose[:, 2, :2] - np.array(side["target"]), axis=-1)  # finger to target
        paid = np.array(side["reward"])[:-1] > 0  # the reward of a step is that of the state after it
        clear = np.abs(reach[1:] - 0.06) > 1e-3
        np.testing.assert_array_equal(paid[clear], (reach[1:] < 0.06)[clear])
    first = [np.array(side["pose"][0]) for side in page["sides"]]
    np.testing.assert_array_equal(*first)  # the same trial
    assert not np.array_equal(page["sides"][0]["pose"], page["sides"][1]["pose"])


def test_a_hostile_run_name_stays_text(data, tmp_path):
    """Nothing in the embedded data can open a tag or a comment, or end the script."""
    name = "<!--<script>alert(1)</script>-->"
    replay.write_html(data | {"run": name}, tmp_path / "replay.html")
    text = (tmp_path / "replay.html").read_text()
    embedded = re.search(r"const R = (\{.*\});\n", text).group(1)
    assert "<" not in embedded and json.loads(embedded)["run"] == name
    assert "<!--" not in text and text.count("<script") == text.count("</script") == 1


def test_the_gif_plays_in_real_time_and_stays_small(data, tmp_path):
    """Its frames differ and cover the trial; a smaller limit leaves frames out."""
    durations = []
    for limit in (1_500_000, 15_000):
        replay.write_gif(data, tmp_path / "trial.gif", max_bytes=limit)
        assert (tmp_path / "trial.gif").stat().st_size <= limit
        with PIL.Image.open(tmp_path / "trial.gif") as image:
            shown = [np.asarray(frame.convert("RGB")) for frame in PIL.ImageSequence.Iterator(image)]
            durations.append(len(shown) * image.info["duration"])
        assert len(shown) > 1 and (shown[0] != shown[-1]).any()
    np.testing.assert_allclose(durations, STEPS * 0.02 * 1000, rtol=0.35)
    with pytest.raises(ValueError, match="no GIF of reacher-easy has at most 100 bytes"):
        replay.write_gif(data, tmp_path / "trial.gif", max_bytes=100)
    assert not (tmp_path / "trial.gif").exists()


def test_a_replay_is_a_trial_of_the_table(agent, data):
    """The recorded trial is that of median return, and both its sides have the returns of the table."""
    result = evaluate.measure(agent, (TASK,), TRIALS)
    for side, policy in zip(data["sides"], ("memory", "reset")):
        expected = result.returns[policy][0, 0, data["trial"]]
        np.testing.assert_allclose(side["reward"].sum(), expected, rtol=1e-3, atol=1e-3)
    assert sorted(result.returns["memory"][0, 0])[(TRIALS - 1) // 2] == result.returns["memory"][0, 0, data["trial"]]
