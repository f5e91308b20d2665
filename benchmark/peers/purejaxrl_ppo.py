"""PureJaxRL's ppo.py on CartPole-v1, for the speed comparison with ppo.py.

    python benchmark/peers/purejaxrl_ppo.py /path/to/purejaxrl STEPS [NUM_ENVS]       # needs jax, flax, distrax, gymnax

The settings are those of ppo.py. The environment is JAX code too, and compiled together with the algorithm.
"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import jax

path, steps, num_envs = Path(sys.argv[1]), int(sys.argv[2]), int((*sys.argv[3:], 4)[0])
sys.path.insert(0, str(path / "purejaxrl"))
# Its wrappers import libraries of environments that are not needed here.
sys.modules |= dict.fromkeys(["brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training", "navix"],
                             MagicMock())  # fmt: skip

import ppo  # noqa: E402  PureJaxRL's

settings = {"ENV_NAME": "CartPole-v1", "TOTAL_TIMESTEPS": steps, "NUM_ENVS": num_envs, "NUM_STEPS": 128, "LR": 2.5e-4}
settings |= {"ANNEAL_LR": True, "GAMMA": 0.99, "GAE_LAMBDA": 0.95, "NUM_MINIBATCHES": 4, "UPDATE_EPOCHS": 4}
settings |= {"CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5, "ACTIVATION": "tanh"}
result = jax.jit(ppo.make_train(settings | {"DEBUG": False}))(jax.random.PRNGKey(1))
returns = result["metrics"]["returned_episode_returns"][-1]  # of the last episode of each environment
print(f"mean return {returns.mean():.1f}")
