"""What games do in every script that has them, with gymnasium and with EnvPool: frames, lives, seeds, ends, names."""

from typing import NamedTuple

import numpy as np
import pytest
from test_atari_envs import ALIKE, Emulator, needs_envpool, newest, watch

import ppo_atari
import ppo_atari_envpool
import ppo_atari_lstm

CASES = {
    "ppo_atari": (ppo_atari, "gymnasium"), "ppo_atari_envpool": (ppo_atari_envpool, "envpool"),
    "ppo_atari_lstm-gymnasium": (ppo_atari_lstm, "gymnasium"), "ppo_atari_lstm-envpool": (ppo_atari_lstm, "envpool"),
}  # fmt: skip
MARKS = {"envpool": needs_envpool, "gymnasium": ()}
EACH_SCRIPT = [pytest.param(ppo_atari, id="ppo_atari"), pytest.param(ppo_atari_lstm, id="ppo_atari_lstm"),
               pytest.param(ppo_atari_envpool, id="ppo_atari_envpool", marks=needs_envpool)]  # fmt: skip


class Case(NamedTuple):
    """A script and one of its backends."""

    script: object
    backend: str

    def args(self, **changed):
        """Settings of the script."""
        backend = {"env_backend": self.backend} if self.script is ppo_atari_lstm else {}
        return self.script.Args(**{"num_envs": 1, "num_minibatches": 1, "cuda": False} | backend | changed)

    def envs(self, game: str, **changed):
        """Environments of the script."""
        return self.script.make_envs(self.args(env_id=game, **changed))


@pytest.fixture(params=[pytest.param(case, id=name, marks=MARKS[case[1]]) for name, case in CASES.items()])
def case(request):
    return Case(*request.param)


def watch_memory(case: Case, envs):
    """A function that tells the consoles' memory [N, 128] after the last call of environments made for a case."""
    if case.backend == "envpool":
        seen, _ = watch(envs)
        return lambda: seen[-1]
    return lambda: np.stack([env.unwrapped.ale.getRAM() for env in envs.envs])


def play(envs, steps: int, seed=1, action=None) -> tuple[np.ndarray, np.ndarray, np.ndarray, list]:
    """Frames, rewards, dones and ends of steps of one game with the given action, or with actions drawn by the seed."""
    random, rows, all_ends = np.random.default_rng(seed), [], []
    frames = [newest(envs.reset(seed))[0]]
    for step in range(steps):
        chosen = random.integers(envs.action_space.n) if action is None else action
        obs, rewards, dones, ends = envs.step(np.array([chosen]))
        frames.append(newest(obs)[0])
        rows.append((rewards[0], dones[0]))
        all_ends += [(step, end) for end in ends]
    rewards, dones = zip(*rows)
    return np.stack(frames), np.array(rewards), np.array(dones), all_ends


# Frames ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("noop_max", [0, 2, 30])
def test_atari_1_noops(case, noop_max):
    """1 to noop_max frames of doing nothing begin a game, and nothing else does where there is no FIRE.

    EnvPool cannot do without.
    """
    console, after = Emulator("ms_pacman"), {}
    for number in range(31):
        after[console.ale.getRAM().tobytes()] = number
        console.frames(0)
    assert len(after) == 31
    envs, found = case.envs("MsPacman", noop_max=noop_max), []
    memory = watch_memory(case, envs)
    for seed in range(8 if noop_max > 1 else 2):
        envs.reset(seed)
        found.append(after[memory()[0].tobytes()])
    if noop_max == 30:
        assert len(set(found)) > 4 and min(found) >= 1 and max(found) <= noop_max
    elif noop_max == 0 and case.backend == "gymnasium":
        assert set(found) == {0}
    else:
        assert set(found) == set(range(1, max(noop_max, 1) + 1))


@pytest.mark.parametrize("frame_skip", [1, 2, 4])
def test_atari_2_actions_are_repeated_and_never_sticky(case, frame_skip):
    """The console does each action in so many frames, none more, and the action before never comes back."""
    envs, console, random = (
        case.envs("Pong", frame_skip=frame_skip, **ALIKE),
        Emulator("pong"),
        np.random.default_rng(1),
    )
    memory = watch_memory(case, envs)
    envs.reset(1)
    console.frames(0)
    np.testing.assert_array_equal(memory()[0], console.ale.getRAM())
    for _ in range(100):
        action = int(random.integers(6))
        rewards = envs.step(np.array([action]))[1]
        assert rewards[0] == console.frames(*[action] * frame_skip)
        np.testing.assert_array_equal(memory()[0], console.ale.getRAM())


@pytest.mark.parametrize("script", [ppo_atari, ppo_atari_lstm])
def test_atari_2_frames_are_not_skipped_twice(script):
    case = Case(script, "gymnasium")
    with pytest.raises(script.InputError, match="use --frame-skip"):
        case.envs("Pong", env_kwargs='{"frameskip": 4}')


def test_atari_4_fire_starts_breakout(case):
    """Without it the field stays as it is; the ball is there from the first frames on."""
    still, _, _, _ = play(case.envs("Breakout", fire_reset=False), 20, action=0)
    moving, _, _, _ = play(case.envs("Breakout"), 20, action=0)
    assert (still == still[0]).all()
    assert not (moving == moving[0]).all()


def test_atari_5_area_resize(case):
    """The other interpolation gives other pixels of the same image; area averages are never sharper."""
    images = [play(case.envs("BeamRider", area_resize=area), 20, action=0)[0] for area in (True, False)]
    area, bilinear = (image.astype(float) for image in images)
    assert area.shape == (21, 84, 84) and not np.array_equal(area, bilinear)
    assert np.abs(area - bilinear).mean() < 10
    sharpness = [np.abs(np.diff(image, axis=1)).mean() for image in (area, bilinear)]
    assert sharpness[0] < sharpness[1]


def test_atari_5_area_averages_of_gray(case):
    """The mean of the luminance over each of the 84 x 84 areas, by definition."""
    frame = newest(case.envs("Breakout", **ALIKE).reset(3))[0]
    console = Emulator("breakout")
    console.frames(0)
    gray = np.rint(console.ale.getScreenRGB().astype(float) @ [0.299, 0.587, 0.114])
    rows, columns = (np.zeros((84, size)) for size in (210, 160))
    for weights in (rows, columns):
        size = weights.shape[1] / 84
        for i in range(84):
            for j in range(weights.shape[1]):
                weights[i, j] = max(0, min(j + 1, (i + 1) * size) - max(j, i * size)) / size
    np.testing.assert_allclose(frame, rows @ gray @ columns.T, atol=1.01)
    assert frame.std() > 10


# Rewards, lives and ends ----------------------------------------------------------------------------------------------
def test_atari_6_the_sign_of_the_reward_is_learned_from(case, monkeypatch, tmp_path):
    """In the environments, and in what is logged, points stay points."""
    rewards, learned = np.float32([[7, 0], [-400, 0.25], [0, -1]]), []
    collect_rollout, compute_gae = case.script.collect_rollout, case.script.compute_gae
    monkeypatch.setattr(
        case.script, "collect_rollout", lambda *inputs: collect_rollout(*inputs)._replace(rewards=rewards)
    )

    def watched(rewards, *inputs):
        learned.append(rewards.numpy().copy())
        return compute_gae(rewards, *inputs)

    monkeypatch.setattr(case.script, "compute_gae", watched)
    for clip_reward in (True, False):
        args = case.args(env_id="Pong", num_envs=2, num_steps=3, total_timesteps=6, clip_reward=clip_reward)
        args.update_epochs, args.runs_dir = 1, str(tmp_path)
        case.script.train(args)
        np.testing.assert_array_equal(learned.pop(), np.sign(rewards) if clip_reward else rewards)


def test_extra_27_returns_are_those_of_whole_games_and_unclipped(case):
    """SpaceInvaders gives 5 to 30 points; lost lives are dones, but only the third ends the game, and the return."""
    _, rewards, dones, ends = play(case.envs("SpaceInvaders", clip_reward=True), 1000)
    assert set(rewards) - {0} and min(set(rewards) - {0}) >= 5
    assert len(ends) >= 1 and 2 * len(ends) < dones.sum()
    start = 0
    for step, end in ends:
        assert dones[step]
        inside = float(rewards[start : step + 1].sum())
        # gymnasium's count also the no-op, FIRE and action 2 that follow a lost life.
        assert inside <= end.episodic_return <= inside + (30 if case.backend == "gymnasium" else 0)
        assert step + 1 - start <= end.length <= step + 1 - start + (20 if case.backend == "gymnasium" else 0)
        assert end.env == 0 and not end.truncated
        start = step + 1


@pytest.mark.parametrize("episodic_life", [True, False])
def test_atari_3_episodic_life(case, episodic_life):
    """A lost life is a done; off, only the game's end is one."""
    _, _, dones, ends = play(case.envs("SpaceInvaders", episodic_life=episodic_life), 700)
    assert (dones.sum() > len(ends)) == episodic_life
    assert len(ends) > 0


@needs_envpool
def test_pong_is_the_same_without_three_details():
    """It has no lives, waits for no FIRE, and its points are -1 or 1: an agent learns exactly the same without them.

    EnvPool's FIRE stands in the place of the last no-op, so that not even the number of frames differs.
    """
    played = []
    for changed in ({}, {"fire_reset": False}, {"episodic_life": False}):
        case = Case(ppo_atari_envpool, "envpool")
        played.append(play(case.envs("Pong", **changed), 1000))
        assert len(played[-1][3]) == 1
    for other in played[1:]:
        for ours, theirs in zip(played[0][:3], other[:3]):
            np.testing.assert_array_equal(ours, theirs)
    assert set(played[0][1]) == {-1, 0, 1}


def test_returns_begin_anew(case):
    """With each game and each reset."""
    envs = case.envs("Pong", max_game_frames=800)
    for seed in (1, 1):
        _, rewards, _, ends = play(envs, 450, seed, action=0)
        start = 0
        for step, end in ends:
            assert end.episodic_return == rewards[start : step + 1].sum()
            start = step + 1
        assert len(ends) == 2 and ends[0][1].episodic_return < 0 and ends[1][1].episodic_return < 0
        assert ends[1][1].length <= 200


def test_extra_28_games_are_cut_off(case):
    """After max_game_frames, as truncated; what follows is the next game."""
    _, _, dones, ends = play(case.envs("Pong", max_game_frames=400, noop_max=1), 250, action=0)
    assert len(ends) == 2 and all(end.truncated for _, end in ends)
    assert dones.sum() == 2
    assert all(90 <= end.length <= 100 for _, end in ends)


def test_games_are_cut_off_in_evaluation(case):
    """After eval_max_steps, if that is earlier."""
    for changed, steps in (({}, 50), ({"max_game_frames": 160}, 40)):
        envs = case.envs("Pong", noop_max=1, evaluate="a run", eval_max_steps=50, **changed)
        _, _, _, ends = play(envs, 90, action=0)
        assert ends and all(end.truncated and steps - 5 <= end.length <= steps for _, end in ends)


# Seeds ----------------------------------------------------------------------------------------------------------------
def test_extra_35_environments_are_seeded_apart(case):
    """Environment i gets seed + i: environment 1 of seed 10 plays like environment 0 of seed 11."""
    played = {}
    for seed in (10, 11):
        envs = case.envs("BeamRider", num_envs=3)
        memory = watch_memory(case, envs)
        played[seed] = [newest(envs.reset(seed))]
        played[seed, "memory"] = memory()
        played[seed] += [newest(envs.step(np.full(4, step % 3))[0]) for step in range(20)]
    np.testing.assert_array_equal(np.stack(played[10])[:, 1:], np.stack(played[11])[:, :2])
    assert len(np.unique(played[10, "memory"], axis=0)) > 1
    assert not np.array_equal(np.stack(played[10])[:, 0], np.stack(played[11])[:, 0])


def test_resumed_games_are_others(case):
    """A resumed run gets other no-ops; the same seed at the same step gets the same."""
    envs = case.envs("BeamRider", num_envs=2)
    starts = [newest(envs.reset(1, first_step)) for first_step in (0, 0, 4096, 8192)]
    assert np.array_equal(starts[0], starts[1])
    assert all(not np.array_equal(starts[0], start) for start in starts[2:])
    np.testing.assert_array_equal(starts[2], newest(envs.reset(1 + 4096)))


# The scripts beside each other ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("changed", [
    {"env_id": "SpaceInvaders"},
    {"env_id": "Breakout", "max_game_frames": 600, "frame_skip": 2, "area_resize": False},
    {"env_id": "Seaquest", "max_game_frames": 1200, "noop_max": 3, "fire_reset": False, "episodic_life": False},
])  # fmt: skip
@pytest.mark.parametrize(("script", "backend"), [
    (ppo_atari, "gymnasium"), pytest.param(ppo_atari_envpool, "envpool", marks=needs_envpool),
])  # fmt: skip
def test_scripts_play_the_same_games(script, backend, changed):
    """Whether they show one frame or stacks of them: frames, rewards, dones, and all that is known of ends."""
    ours, theirs = (Case(one, backend).envs(changed["env_id"], **{"num_envs": 2} | {
        name: value for name, value in changed.items() if name != "env_id"
    }) for one in (script, ppo_atari_lstm))  # fmt: skip
    random, games = np.random.default_rng(1), 0
    np.testing.assert_array_equal(newest(ours.reset(5, 8)), theirs.reset(5, 8))
    for _ in range(400):
        actions = random.integers(0, ours.action_space.n, 2)
        a, b = ours.step(actions), theirs.step(actions)
        np.testing.assert_array_equal(newest(a[0]), b[0])
        for x, y in zip(a[1:3], b[1:3]):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        assert len(a[3]) == len(b[3])
        for x, y in zip(a[3], b[3]):
            assert (x.env, x.episodic_return, x.length, x.truncated) == (
                y.env,
                y.episodic_return,
                y.length,
                y.truncated,
            )
            np.testing.assert_array_equal(x.last_obs[-1], y.last_obs)
            games += 1
    assert games


# Names ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", EACH_SCRIPT)
def test_every_spelling_of_a_game(script):
    """What users have in their scripts means one game."""
    for env_id in ("Breakout", "Breakout-v5", "ALE/Breakout-v5", "BreakoutNoFrameskip-v4"):
        assert script.find_game(env_id) == "Breakout"


CLOSE_NAMES = {
    "Brekout": "Breakout", "pong": "Pong", "space invaders": "SpaceInvaders", "ALE/Brekout-v5": "Breakout",
    "spaceinvaders": "SpaceInvaders", "Pongg-v5": "Pong",
}  # fmt: skip


@pytest.mark.parametrize("script", EACH_SCRIPT)
@pytest.mark.parametrize("env_id", CLOSE_NAMES)
def test_close_names_of_games(script, env_id):
    """The game that was probably meant is named."""
    said = f"no Atari game {env_id}; did you mean.* {CLOSE_NAMES[env_id]}"
    with pytest.raises(script.InputError, match=said):
        script.find_game(env_id)


@pytest.mark.parametrize("script", EACH_SCRIPT)
@pytest.mark.parametrize("env_id", ["Breakout-v4", "Breakout-v0", "BreakoutDeterministic-v4", "BreakoutNoFrameskip-v0"])
def test_games_that_skip_frames_by_themselves(script, env_id):
    with pytest.raises(script.InputError, match=f"{env_id} skips frames .*: use Breakout"):
        script.find_game(env_id)
