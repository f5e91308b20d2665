"""Steps a script's environments with random actions and nothing else: the bound of what training can reach.

    python -m benchmark.env_only ppo --total-timesteps 100000 --num-envs 4

The flags are those of the script.
"""

import importlib
import sys

from gymnasium.vector.utils import batch_space

if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1])
    args = script.parse_args(sys.argv[2:])
    envs = script.make_envs(args)
    envs.reset(seed=args.seed)
    space = batch_space(envs.action_space, args.num_envs)
    space.seed(args.seed)
    actions = [space.sample() for _ in range(1000)]
    for step in range(int(args.total_timesteps // args.num_envs)):
        envs.step(actions[step % 1000])
