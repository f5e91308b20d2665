"""Agreement of the LSTM scripts' networks, rollouts and updates with numbers recorded from the official implementation.

The fixtures' README says how they were recorded. Tolerances are float32 rounding, a few times the deviations that
were seen when the recordings were re-derived by hand; where another bound is used the test says why.
"""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import ppo_atari_lstm
import ppo_lstm

SIZE = 128
GATES = [0, 1, 3, 2]  # TensorFlow's order is i, f, o, u; PyTorch's i, f, u, o (it calls u g)
# The official layers in the order of the agent's parameters; the LSTM's are wx, wh and b.
LAYERS = {
    "lstm": ["pi/lstm", "pi", "vf"],
    "update_cnn_lstm": ["pi/c1", "pi/c2", "pi/c3", "pi/fc1", "pi/lstm", "pi", "vf"],
}
UPDATES = {"lstm": 4, "update_cnn_lstm": 2}


def names_of(fixture: str) -> list[str]:
    """The official variables in the order of the agent's parameters."""
    return [f"{layer}/{part}" for layer in LAYERS[fixture] for part in (("wx", "wh", "b") if "lstm" in layer else "wb")]


def torch_layout(name: str, variable: np.ndarray) -> np.ndarray:
    """A TensorFlow variable as PyTorch has it: weights [out, in, ...], biases [out], gates in PyTorch's order."""
    if "lstm" in name:
        blocks = np.split(variable.T, 4)
        return np.concatenate([blocks[gate] for gate in GATES])
    if name.endswith("/b"):
        return variable.reshape(-1)
    return variable.transpose(3, 2, 0, 1) if variable.ndim == 4 else variable.T


def tensorflow_layout(name: str, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of torch_layout, to a variable of that shape."""
    if "lstm" in name:
        part = np.concatenate([np.split(part, 4)[gate] for gate in GATES])  # GATES is its own inverse
    return (part.transpose(2, 3, 1, 0) if part.ndim == 4 else part.T).reshape(shape)


def lstm_state(rows: np.ndarray) -> torch.Tensor:
    """Official states [N, 256], cells first, as ppo_lstm.py has them: [2, N, 128], outputs first."""
    return torch.from_numpy(np.stack([rows[:, SIZE:], rows[:, :SIZE]]))


class Setup:
    """An agent with the official initial variables, and the recorded rollout and minibatches."""

    def __init__(self, load_fixture, fixture: str, **settings):
        self.fixture, self.data = fixture, load_fixture(fixture)
        data = self.data
        self.images = fixture == "update_cnn_lstm"
        self.script = ppo_atari_lstm if self.images else ppo_lstm
        settings |= {} if self.images else {"encoder": False, "norm_obs": False}
        self.args = self.script.Args(
            ent_coef=float(data["ent_coef"]),
            vf_coef=float(data["vf_coef"]),
            max_grad_norm=float(data["max_grad_norm"]),
            num_envs=4,
            num_steps=len(data["masks"]) // 4,
            num_minibatches=2,
            **settings,
        )
        space = Box(0, 255, (84, 84), np.uint8) if self.images else Box(-10, 10, (5,))
        self.agent = self.script.Agent(space, Discrete(data["out_pi"].shape[-1]), self.args)
        self.adam = self.script.Adam(self.agent)
        if self.images:
            random, self.variables = np.random.RandomState(int(data["init_seed"])), {}
            for name, row in zip(data["var_names"], data["var_shapes"]):
                shape = [int(size) for size in row if size]
                scale = 0.05 if name.endswith("/b") else np.sqrt(2 / np.prod(shape[:-1]))
                self.variables[str(name)] = (random.randn(*shape) * scale).astype(np.float32)
            self.variables["pi/w"] *= np.float32(0.3)
        else:
            self.variables = {str(name): data[f"vars0/{name}"] for name in data["var_names"]}
        self.adam.parameters.copy_(self.vector(self.variables))

    def vector(self, variables: dict[str, np.ndarray]) -> torch.Tensor:
        """Official variables as one vector in the order of the agent's parameters."""
        assert set(variables) == set(names_of(self.fixture))
        parts = [torch_layout(name, variables[name]).reshape(-1) for name in names_of(self.fixture)]
        return torch.from_numpy(np.concatenate(parts))

    def steps(self, key: str) -> torch.Tensor:
        """A recorded array, which lies environment by environment, as [T, N, ...]."""
        array = self.data[key]
        return torch.from_numpy(array.reshape(4, -1, *array.shape[1:]).swapaxes(0, 1).copy())

    def images_of(self, blocks: np.ndarray) -> np.ndarray:
        """Recorded images [..., 12, 12, 1] in full size [..., 84, 84]."""
        return blocks[..., 0].repeat(7, -2).repeat(7, -1)

    def obs(self) -> torch.Tensor:
        """The recorded observations [T, N, ...]."""
        if not self.images:
            return self.steps("obs")
        obs = self.images_of(self.data["obs_blocks"])
        return torch.from_numpy(obs.reshape(4, -1, 84, 84).swapaxes(0, 1).copy())

    def dones(self) -> torch.Tensor:
        """Which steps ended their episode [T, N]; the recording says which ones began one."""
        firsts, last = self.steps("masks"), torch.from_numpy(self.data["next_dones"])
        return torch.cat([firsts[1:], last.bool()[None]]).bool()

    def state(self) -> torch.Tensor:
        """The state [2, N, 128] before the rollout, which the script sets to 0 where an episode has ended."""
        return lstm_state(self.data["states"]) * ~self.steps("masks")[0].bool()[:, None]

    def log_probabilities(self, logits: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of the policy."""
        owner = self.script if self.images else self.agent.actor
        return owner.log_probabilities(logits, actions)

    def step(self, update: int):
        """One official `Model.train` call: returns the loss terms and the log-ratios before it."""
        clip_coef, learning_rate = float(self.data["cliprange"]), float(self.data["lr"])
        inputs = clip_coef, *self.adam.coefficients(learning_rate, self.args)
        return self.script.gradient_step(self.agent, self.adam, self.minibatch(update), *inputs, self.args)

    def minibatch(self, update: int) -> tuple:
        """Inputs of gradient_step for one of the updates, advantages normalized by the script."""
        envs = self.data["mb_envinds"][update]
        returns, values = self.steps("returns"), self.steps("old_values")
        advantages = (returns - values)[:, envs]
        if self.args.norm_adv:
            advantages = self.script.normalize(advantages.flatten(), self.args).view_as(advantages)
        rest = (
            self.obs(),
            self.steps("actions"),
            -self.steps("old_neglogpacs"),
            returns,
            values,
            self.dones(),
            self.state(),
        )
        obs, actions, log_probs, returns, values, dones, state = (tensor[:, envs] for tensor in rest)
        return self.script.Batch(obs, actions, log_probs, advantages, returns, values, dones, state)

    def recorded(self, key: str, update: int) -> torch.Tensor:
        """A recorded array of a minibatch as [T, n, ...]."""
        array = self.data[key][update]
        return torch.from_numpy(array.reshape(2, -1, *array.shape[1:]).swapaxes(0, 1).copy())

    def check(self, stage: str, vector: torch.Tensor, rtol: float, atol: float) -> None:
        """Asserts that a vector of all parameters is the official one: sums, norms and recorded entries."""
        start = 0
        for name in names_of(self.fixture):
            shape = torch_layout(name, self.variables[name]).shape
            part = vector[start : start + np.prod(shape)].numpy().reshape(shape)
            start += part.size
            ours = tensorflow_layout(name, part, self.variables[name].shape)
            official = {key: self.data[f"{stage}/{name}/{key}"] for key in ("sum", "l2", "idx", "val")}
            close = dict(rtol=rtol, err_msg=f"{stage}/{name}")
            np.testing.assert_allclose(ours.reshape(-1)[official["idx"]], official["val"], atol=atol, **close)
            norm = np.sqrt(np.square(ours, dtype=np.float64).sum())
            np.testing.assert_allclose(norm, official["l2"], atol=10 * atol, **close)
            np.testing.assert_allclose(ours.sum(dtype=np.float64), official["sum"], atol=atol * ours.size, **close)
        assert start == len(vector)


@pytest.fixture(params=UPDATES)
def setup(load_fixture, request):
    return Setup(load_fixture, request.param)


def test_minibatches_are_whole_environments(setup):
    """The recording's flat indices and environment indices mean the same samples. [lstm-4]"""
    steps = len(setup.data["masks"]) // 4
    for envs, indices in zip(setup.data["mb_envinds"], setup.data["mb_flatinds"]):
        assert indices.tolist() == [env * steps + t for env in envs for t in range(steps)]


def test_rollout_step_by_step(setup):
    """Values, log-probabilities and the state, one step after another; the state is 0 after each done. [lstm-3]"""
    obs, dones, actions, state = setup.obs(), setup.dones(), setup.steps("actions"), setup.state()
    assert dones.any() and state.any()
    for t in range(len(obs)):
        with torch.no_grad():
            logits, values, state = setup.agent.step(obs[t], state)
        log_probs, _ = setup.log_probabilities(logits, actions[t])
        torch.testing.assert_close(values, setup.steps("values")[t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(-log_probs, setup.steps("neglogpacs")[t], rtol=1e-5, atol=1e-5)
        if t < len(obs) - 1:
            state = state * ~dones[t][:, None]
    torch.testing.assert_close(state, lstm_state(setup.data["final_states"]), rtol=1e-5, atol=1e-5)


def test_returns(setup):
    """GAE over the recorded rollout, with the value of what came after it."""
    next_obs = setup.data["next_obs_blocks"] if setup.images else setup.data["next_obs"]
    next_obs = torch.from_numpy(setup.images_of(next_obs).copy() if setup.images else next_obs)
    state = lstm_state(setup.data["final_states"]) * ~torch.from_numpy(setup.data["next_dones"]).bool()[:, None]
    with torch.no_grad():
        last_values = setup.agent.step(next_obs, state)[1]
    torch.testing.assert_close(last_values, torch.from_numpy(setup.data["last_values"]), rtol=1e-5, atol=1e-5)
    values = torch.cat([setup.steps("values"), last_values[None]])
    gamma, lam = float(setup.data["gamma"]), float(setup.data["lam"])
    _, returns = setup.script.compute_gae(setup.steps("rewards").float(), values, setup.dones(), gamma, lam)
    torch.testing.assert_close(returns, setup.steps("returns"), rtol=1e-5, atol=1e-5)


def test_forward_pass_of_whole_sequences(setup):
    """The training-time pass: logits, values, log-probabilities, entropies and the state at its end. [lstm-5]"""
    batch = setup.minibatch(0)
    with torch.no_grad():
        logits, values = setup.agent(batch.obs, batch.state, batch.dones)
    log_probs, entropy = setup.log_probabilities(logits, batch.actions)
    torch.testing.assert_close(logits, setup.recorded("out_pi", 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, setup.recorded("out_vf", 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-log_probs, setup.recorded("out_neglogp", 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, setup.recorded("out_entropy", 0), rtol=1e-5, atol=1e-5)


def test_updates(setup):
    """Loss terms, gradients, their norm and parameters, stage by stage through all recorded updates."""
    data = setup.data
    # With convolutions, ReLUs near zero switch with rounding: gradients agreed to 2e-4 when re-derived by hand.
    tolerance = (2e-4, 5e-5, 5e-5) if setup.images else (1e-5, 2e-6, 1e-5)
    for update in range(UPDATES[setup.fixture]):
        batch, clip_coef = setup.minibatch(update), float(data["cliprange"])
        normalized = setup.recorded("advs_normalized", update)
        torch.testing.assert_close(batch.advantages, normalized, rtol=1e-5, atol=1e-6)
        logits, values = setup.agent(batch.obs, batch.state, batch.dones)
        log_probs, entropy = setup.log_probabilities(logits, batch.actions)
        loss, _, _ = setup.script.ppo_loss(log_probs, entropy, values, batch, clip_coef, setup.args)
        np.testing.assert_allclose(loss.item(), data["loss"][update], rtol=tolerance[2])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, setup.adam.tensors)])
        norm = gradient.square().sum().sqrt().item()
        np.testing.assert_allclose(norm, data["grad_norm"][update], rtol=1e-5)
        setup.check(f"grads{update + 1}", gradient, *tolerance[:2])
        terms, log_ratio = setup.step(update)
        change = setup.script.policy_change(log_ratio, clip_coef)
        ours = [*terms.tolist(), change["losses/official_approx_kl"], change["losses/clipfrac"]]
        np.testing.assert_allclose(ours, data["stats"][update], rtol=tolerance[2], atol=2e-6)
        setup.check(f"vars{update + 1}", setup.adam.parameters, 1e-6, 3e-7)
        if f"vars{update + 1}_full/pi/w" in data:
            full = {name: data[f"vars{update + 1}_full/{name}"] for name in setup.variables}
            torch.testing.assert_close(setup.adam.parameters, setup.vector(full), rtol=0, atol=3e-7)


@pytest.mark.parametrize("setting", ["adam_eps_hat", "population_std", "clip_vloss", "clip_policy"])
def test_other_settings_leave_parity(load_fixture, setting):
    """The comparison above is sharp enough to notice every one of these."""
    setup = Setup(load_fixture, "lstm", **{setting: False})
    setup.step(0)
    with pytest.raises(AssertionError):
        setup.check("vars1", setup.adam.parameters, 1e-6, 3e-7)


def test_extra_20_a_second_bias_leaves_parity(load_fixture):
    """With PyTorch's two trained biases their sum moves about twice as far as the official one."""

    def moved(both: bool) -> np.ndarray:
        setup = Setup(load_fixture, "lstm")
        lstm = setup.agent.lstm
        if both:
            lstm.bias_hh_l0.requires_grad_(True)
            setup.adam = ppo_lstm.Adam(setup.agent)
        start = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().clone()
        for update in range(4):
            setup.step(update)
        return (lstm.bias_ih_l0 + lstm.bias_hh_l0 - start).detach().norm().item()

    assert moved(True) / moved(False) == pytest.approx(1.98, abs=0.1)  # the factor that was measured officially


class Recorded:
    """Plays back the recorded observations, rewards and dones, whatever the actions."""

    def __init__(self, setup: Setup):
        self.script, self.obs, self.rewards, self.dones = (
            setup.script,
            setup.obs(),
            setup.steps("rewards"),
            setup.dones(),
        )
        self.next_obs, self.t = setup.data["next_obs_blocks" if setup.images else "next_obs"], 0
        self.next_obs = setup.images_of(self.next_obs) if setup.images else self.next_obs
        self.action_space = Discrete(setup.data["out_pi"].shape[-1])

    def step(self, actions: np.ndarray):
        """The next recorded step."""
        t, self.t = self.t, self.t + 1
        obs = self.obs[t + 1].numpy() if t + 1 < len(self.obs) else self.next_obs
        dones = self.dones[t].numpy()
        ends = [self.script.EpisodeEnd(env, 0.0, 1, obs[env], False) for env in np.flatnonzero(dones)]
        return obs, self.rewards[t].numpy(), dones, ends


def test_collect_rollout_on_the_recording(setup):
    """The scripts' own rollouts: values, rewards, dones, and the state with which the next one goes on."""
    obs = setup.obs()[0].numpy()
    rollout = setup.script.collect_rollout(setup.agent, Recorded(setup), obs, setup.state(), setup.args)
    torch.testing.assert_close(rollout.values[:-1], setup.steps("values"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollout.values[-1], torch.from_numpy(setup.data["last_values"]), rtol=1e-5, atol=1e-5)
    assert (torch.from_numpy(rollout.dones) == setup.dones()).all()
    assert (torch.from_numpy(rollout.rewards) == setup.steps("rewards")).all()
    final = lstm_state(setup.data["final_states"]) * ~setup.dones()[-1][:, None]
    torch.testing.assert_close(rollout.state, final, rtol=1e-5, atol=1e-5)
