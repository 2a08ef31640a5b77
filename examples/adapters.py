"""Environments of other libraries: Craftax, navix, XLand-MiniGrid and MuJoCo Playground.

    python train_s5.py --env examples.adapters:Craftax --num-envs 32
    python train_s5.py --env examples.adapters:Navix --env-kwargs task=Navix-DoorKey-5x5-v0
    python train_s5.py --env examples.adapters:XLandMiniGrid --env-kwargs task=MiniGrid-MemoryS8 --devices 1
    python train_s5.py --env examples.adapters:Playground --env-kwargs task=CartpoleSwingup

Each class has the interface that own_environment.py describes, and imports its library when it is made.
The libraries are not in requirements.txt. They are installed without their dependencies, most of which
are of no use here:

    pip install --no-deps craftax && pip install imageio pygame
    pip install --no-deps navix && pip install chex rlax pillow wandb
    pip install --no-deps xminigrid && pip install chex rich imageio imageio-ffmpeg
    pip install --no-deps playground && pip install lxml ml-collections mediapy

`Trials` begins the next episode itself, so an adapter takes the library's step without automatic reset, or, with navix,
a step that resets only what is stepped again after its end.
An end that is the task's own is termination. The time limit stands in `default_params`, so `Trials`
truncates there and the value of the last observation counts. Dictionaries of observations, such as those
of Playground's robots, are flattened whole, privileged parts included.

Craftax is slow here: making a world costs many times what a step costs, and `Trials` makes spare worlds
in every step. XLandMiniGrid needs --devices 1: with several, the compiler of JAX 0.11 crashes on its empty arrays.
"""

from types import SimpleNamespace

import jax
from flax import struct


@struct.dataclass
class Params:
    max_steps_in_episode: int


class Adapter:
    """The member that is the same in all adapters."""

    def observation_space(self, params):
        return jax.eval_shape(self.reset_env, jax.random.PRNGKey(0), params)[0]


class Craftax(Adapter):
    """An open world. Craftax-Symbolic-v1 is the whole game, which takes long to compile on a CPU."""

    def __init__(self, task="Craftax-Classic-Symbolic-v1"):
        from craftax.craftax_env import make_craftax_env_from_name

        self.env = make_craftax_env_from_name(task, auto_reset=False)
        params = self.env.default_params
        self.default_params = Params(params.max_timesteps)
        self.params = params.replace(max_timesteps=2**30)  # its own time limit counts as termination

    def action_space(self, params):
        return self.env.action_space()

    def reset_env(self, key, params):
        return self.env.reset_env(key, self.params)

    def step_env(self, key, state, action, params):
        return self.env.step_env(key, state, action, self.params)


class Navix(Adapter):
    """MiniGrid's tasks, observed in first person; every number of a cell is one-hot."""

    def __init__(self, task="Navix-DoorKey-8x8-v0"):
        import navix

        self.env = navix.make(task, observation_fn=navix.observations.symbolic_first_person)
        self.default_params = Params(self.env.max_steps)

    def action_space(self, params):
        return self.env.action_space

    def reset_env(self, key, params):
        state = self.env.reset(key)
        return jax.nn.one_hot(state.observation, 11), state

    def step_env(self, key, state, action, params):
        state = self.env.step(state, action)
        return jax.nn.one_hot(state.observation, 11), state, state.reward, state.step_type == 2, {}


class XLandMiniGrid(Adapter):
    """MiniGrid's tasks and XLand's; every number of a cell is one-hot."""

    def __init__(self, task="MiniGrid-MemoryS16"):
        import xminigrid

        self.env, self.params = xminigrid.make(task)
        self.default_params = Params(self.params.max_steps)

    def action_space(self, params):
        return SimpleNamespace(n=self.env.num_actions(self.params))

    def reset_env(self, key, params):
        state = self.env.reset(self.params, key)
        return jax.nn.one_hot(state.observation, 13), state

    def step_env(self, key, state, action, params):
        state = self.env.step(self.params, state, action)
        return jax.nn.one_hot(state.observation, 13), state, state.reward, state.discount == 0, {}


class Playground(Adapter):
    """MuJoCo Playground's own ports of DMControl and its robots, stepped by MJX."""

    def __init__(self, task="CartpoleSwingup"):
        from mujoco_playground import registry

        self.env = registry.load(task, config_overrides={"impl": "jax"})  # Warp needs a GPU
        self.default_params = Params(registry.get_default_config(task).episode_length)

    def action_space(self, params):
        return SimpleNamespace(shape=(self.env.action_size,), low=-1.0, high=1.0)

    def reset_env(self, key, params):
        state = self.env.reset(key)
        return state.obs, state

    def step_env(self, key, state, action, params):
        state = self.env.step(state, action)
        return state.obs, state, state.reward, state.done > 0, {}
