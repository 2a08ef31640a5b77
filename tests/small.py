"""The trainers with tiny sizes."""

import functools

import jax
import numpy as np

import train_lstm
import train_s5

TRAINERS = {"s5": (train_s5, {}), "lstm": (train_lstm, {}), "gru": (train_lstm, {"cell": "gru"})}
SMALL = dict(width=8, layers=1, num_envs=8, num_steps=16, num_minibatches=2, update_epochs=2, log_every=2,
             action_repeat=(1,), env=("CartPole-v1",), total_timesteps=512)
bitwise = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


def small(trainer=train_s5, **changes):
    return trainer.Config(**SMALL | changes)
