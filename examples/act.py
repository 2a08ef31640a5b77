"""Plays dm_control's own cartpole-swingup through a random projection: python examples/act.py [runs/NAME]
The default agent is that of results/default. Without dm_control the task is that of dmc.py.
"""
import sys
from pathlib import Path
import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import envs
from agent import load

try:
    from dm_control import suite
    dm_env = suite.load("cartpole", "swingup", task_kwargs={"random": 0})
    source, state = "dm_control", dm_env.reset()
    step = lambda state, control: dm_env.step(control)
    read = lambda state: (np.concatenate([*state.observation.values()]), state.reward or 0.0)
except ImportError:
    env, params = envs.make("cartpole-swingup")
    source, state = "dmc", (*env.reset_env(jax.random.PRNGKey(0), params), 0.0)
    step = jax.jit(lambda state, control: env.step_env(None, state[1], control, params)[:3])
    read = lambda state: (state[0], float(state[2]))

agent = load(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results/default")
rng = np.random.default_rng(0)
obs_matrix = rng.normal(size=(agent.trials.obs_size, 5)) / np.sqrt(5)
act_matrix = rng.normal(size=(1, agent.trials.action_dims)) / np.sqrt(agent.trials.action_dims)
hidden, inputs = agent.start((obs_matrix @ read(state)[0])[None])
total = 0.0
for t in range(1000 // agent.trials.mean_repeat):
    action, hidden = agent.act(hidden, inputs, jax.random.PRNGKey(t))
    control, reward = np.clip(act_matrix @ action.value[0], -1, 1), 0.0
    for _ in range(agent.trials.mean_repeat):
        state = step(state, control)
        reward += read(state)[1]
    inputs = agent.observe(inputs, action, [reward], (obs_matrix @ read(state)[0])[None], [False])
    total += reward
print(f"{source}'s cartpole-swingup through a random projection: return {total:.1f}")
