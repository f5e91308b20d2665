"""Writes docs/details.md, the index of all details: where each is, its flag, its test and its measured effect.

    python docs/index_details.py

The lines come from the tags in the scripts and the effects from benchmark/results/ablations_*.csv; a test holds the
page up to date.
"""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("ppo.py", "ppo_atari.py", "ppo_continuous.py", "ppo_lstm.py")
ABLATIONS = {"ppo.py": "ablations_classic.csv", "ppo_continuous.py": "ablations_mujoco.csv",
             "ppo_lstm.py": "ablations_lstm.csv"}  # fmt: skip

# tag: (what it is, flags that switch it, test)
DETAILS = {
    "core-1": ("Vectorized architecture: fixed-length rollouts that continue", "--num-envs --num-steps",
               "test_details.py::test_core_1_rollouts_have_a_fixed_shape_and_continue"),
    "core-2": ("Orthogonal initialization, biases 0", "--no-orthogonal-init",
               "test_details.py::test_core_2_initialization"),
    "core-3": ("Adam's epsilon 1e-5", "--adam-eps", "test_details.py::test_core_3_epsilon_and_extra_1_its_place"),
    "core-4": ("Learning-rate annealing", "--no-anneal-lr", "test_details.py::test_core_4_and_aux_1_annealing"),
    "core-5": ("Generalized advantage estimation", "--gae-lambda --no-gae", "test_gae.py::test_equals_the_definition"),
    "core-6": ("Minibatches from a fresh permutation", "--num-minibatches --minibatch-replacement",
               "test_details.py::test_core_6_an_epoch_uses_every_sample_once"),
    "core-7": ("Advantage normalization per minibatch", "--no-norm-adv --norm-adv-per-batch",
               "test_details.py::test_core_7_normalization"),
    "core-8": ("Clipped surrogate objective", "--no-clip-policy",
               "test_details.py::test_core_8_no_gradient_where_the_ratio_left_the_range_for_gain"),
    "core-9": ("Value loss clipping", "--no-clip-vloss",
               "test_details.py::test_core_9_value_gradient_stops_where_the_clipped_error_is_larger"),
    "core-10": ("Overall loss and entropy bonus", "--ent-coef --vf-coef",
                "test_details.py::test_core_10_coefficients_weigh_the_terms"),
    "core-11": ("Global gradient clipping", "--max-grad-norm", "test_details.py::test_core_11_global_norm"),
    "core-12": ("Debug variables", "", "test_details.py::test_core_12_metrics_are_means_over_all_minibatches"),
    "core-13": ("Separate networks for policy and value function", "--shared-network",
                "test_details.py::test_core_13_separate_or_shared_networks"),
    "atari-1": ("No-ops at the start of a game", "--noop-max",
                "test_atari_envs.py::test_atari_1_number_of_noops"),
    "atari-2": ("Frames are skipped, and the maximum of the last two is shown", "--frame-skip",
                "test_atari_envs.py::test_atari_2_skipping"),
    "atari-3": ("A lost life ends the episode", "--no-episodic-life", "test_atari_envs.py::test_atari_3_lives"),
    "atari-4": ("FIRE at the start of an episode", "--no-fire-reset",
                "test_atari_envs.py::test_atari_4_fire_and_action_2"),
    "atari-5": ("Gray images of 84 x 84 pixels", "--no-area-resize",
                "test_atari_envs.py::test_official_image_processing"),
    "atari-6": ("Reward clipping to its sign", "--no-clip-reward",
                "test_atari_envs.py::test_atari_6_sign_of_the_reward"),
    "atari-7": ("Four frames stacked", "--frame-stack", "test_atari_envs.py::test_atari_7_stacks_by_definition"),
    "atari-8": ("Policy and value function share the Nature-CNN", "--no-shared-network",
                "test_atari.py::test_atari_8_number_of_parameters"),
    "atari-9": ("Pixels divided by 255", "--no-scale-images", "test_atari.py::test_atari_9_scaling"),
    "continuous-1": ("Gaussian policy", "",
                     "test_continuous.py::test_continuous_1_actions_follow_the_policy"),
    "continuous-2": ("State-independent log standard deviation, initially 0", "--state-dependent-std",
                     "test_continuous.py::test_continuous_2_one_deviation_for_each_action"),
    "continuous-3": ("Independent action components", "",
                     "test_continuous.py::test_continuous_1_and_3_density_and_entropy_equal_torch_distributions"),
    "continuous-4": ("Separate networks for policy and value function", "--shared-network",
                     "test_continuous.py::test_continuous_4_and_core_13_separate_or_shared_networks"),
    "continuous-5": ("Action clipping", "--no-clip-action --squash-action",
                     "test_continuous.py::test_continuous_5_actions_are_clipped_for_the_environment_only"),
    "continuous-6": ("Observation normalization", "--no-norm-obs",
                     "test_parity_continuous.py::test_running_statistics"),
    "continuous-7": ("Observation clipping", "--no-clip-obs",
                     "test_continuous.py::test_continuous_7_normalized_observations_are_clipped"),
    "continuous-8": ("Reward scaling", "--no-norm-reward", "test_parity_continuous.py::test_running_statistics"),
    "continuous-9": ("Reward clipping", "--no-clip-reward",
                     "test_continuous.py::test_continuous_8_and_9_rewards_are_scaled_step_by_step"),
    "lstm-1": ("Orthogonal initialization of the LSTM, biases 0", "--no-lstm-orthogonal-init",
               "test_lstm.py::test_lstm_1_orthogonal_initialization"),
    "lstm-2": ("The first state is 0", "", "test_lstm.py::test_lstm_2_and_3_states_of_the_rollouts"),
    "lstm-3": ("The state becomes 0 where an episode ends", "--no-reset-lstm-state",
               "test_lstm.py::test_lstm_3_and_5_unroll_is_one_step_after_the_other"),
    "lstm-4": ("Minibatches of whole environments, with their steps in order", "--shuffle-lstm-steps",
               "test_lstm.py::test_lstm_4_minibatches_are_whole_environments"),
    "lstm-5": ("Training starts from the state that the rollout started from", "--no-reconstruct-lstm-state",
               "test_lstm.py::test_lstm_5_ratio_is_1_in_the_first_minibatch_of_every_update"),
    "aux-1": ("Clip-range annealing", "--anneal-clip", "test_details.py::test_core_4_and_aux_1_annealing"),
    "aux-2": ("Gradients averaged over processes (torchrun)", "",
              "test_distributed.py::test_two_ranks_train_like_one_process"),
    "aux-3": ("Early stopping by KL divergence", "--target-kl", "test_details.py::test_aux_3_early_stopping"),
    "extra-1": ("Adam's epsilon is added to the root of the uncorrected second moment", "--no-adam-eps-hat",
                "test_parity.py::test_pytorch_habits_do_not_match"),
    "extra-3": ("Advantages divided by the population's standard deviation", "--no-population-std",
                "test_details.py::test_extra_3_population_deviation"),
    "extra-4": ("The advantage is recomputed as return - value", "",
                "test_parity.py::test_normalized_advantages"),
    "extra-5": ("Gradient clipping adds nothing to the norm", "", "test_details.py::test_core_11_global_norm"),
    "extra-6": ("The value loss has a factor 1/2 besides vf_coef", "--vf-coef",
                "test_parity.py::test_statistics_gradients_and_parameters_over_five_updates"),
    "extra-7": ("The official approxkl is half the mean squared log-ratio", "",
                "test_parity.py::test_statistics_gradients_and_parameters_over_five_updates"),
    "extra-8": ("Logged losses are means over all minibatches", "",
                "test_details.py::test_core_12_metrics_are_means_over_all_minibatches"),
    "extra-9": ("The clip range is constant by default", "--anneal-clip", "test_parity.py::test_schedules"),
    "extra-10": ("The last update's learning rate is not 0", "", "test_parity.py::test_schedules"),
    "extra-11": ("The step budget is floored to whole rollouts", "--total-timesteps",
                 "test_details.py::test_extra_11_only_whole_rollouts"),
    "extra-12": ("A batch is cut into equal minibatches, without a remainder", "--num-minibatches",
                 "test_details.py::test_core_6_an_epoch_uses_every_sample_once"),
    "extra-13": ("The advantage recursion runs in float64", "", "test_parity.py::test_gae"),
    "extra-14": ("A time limit counts as an end", "--bootstrap-truncated",
                 "test_boundaries.py::test_bootstrap_truncated_adds_the_value_of_the_last_observation"),
    "extra-16": ("Separate networks are drawn independently", "",
                 "test_details.py::test_core_13_separate_or_shared_networks"),
    "extra-18": ("Features are flattened with the channels last", "",
                 "test_parity_atari.py::test_forward_pass"),
    "extra-20": ("The LSTM has one bias", "", "test_parity_lstm.py::test_extra_20_a_second_bias_leaves_parity"),
    "extra-21": ("The bias of the LSTM's forget gate is 0 too", "",
                 "test_lstm.py::test_lstm_1_orthogonal_initialization"),
    "extra-22": ("Vectors go into the official LSTM directly", "--no-encoder",
                 "test_lstm.py::test_extra_22_no_encoder"),
    "extra-23": ("Minibatches share the environments equally", "--num-minibatches",
                 "test_lstm.py::test_lstm_4_minibatches_are_whole_environments"),
    "extra-24": ("After every done the older frames of the stack are black", "--no-zero-stack",
                 "test_atari_envs.py::test_official_recording"),
    "extra-25": ("Gray before it is resized, and resized by areas", "--no-area-resize",
                 "test_atari_envs.py::test_official_image_processing"),
    "extra-26": ("A reset takes steps that the agent never sees", "--no-fire-reset --no-episodic-life",
                 "test_atari_envs.py::test_all_wrappers_together"),
    "extra-27": ("Episode statistics are of whole games, hidden steps included", "",
                 "test_atari_envs.py::test_official_recording"),
    "extra-28": ("Games are cut off after 400,000 frames", "--max-game-frames",
                 "test_atari_envs.py::test_extra_28_games_are_cut_off"),
    "extra-30": ("Normalization divides by the standard deviation, not the variance", "",
                 "test_parity_continuous.py::test_running_statistics"),
    "extra-31": ("Statistics are updated before they are used and start with a count of 1e-4", "",
                 "test_parity_continuous.py::test_running_statistics"),
    "extra-32": ("The discounted return is reset after the episode's last reward; no mean is subtracted", "",
                 "test_parity_continuous.py::test_running_statistics"),
    "extra-33": ("Observations are normalized in float64", "", "test_parity_continuous.py::test_running_statistics"),
    "extra-34": ("Actions that are not a number become 0", "--no-clip-action",
                 "test_continuous.py::test_extra_34_not_a_number_becomes_0"),
    "extra-35": ("Environment i is seeded with seed + i", "--seed",
                 "test_boundaries.py::test_environments_are_seeded_apart"),
}  # fmt: skip

INTRO = """# Index of the details

<!-- written by docs/index_details.py; edit there -->

Tags are those of the comments in the scripts: `core` and `aux` are details of "The 37 Implementation Details of PPO"
(Huang et al., ICLR Blog Track 2022), as are `atari`, `continuous` and `lstm` for the scripts of these names; `extra`
are behaviours of the official code that the article leaves out or states differently. The flag is the one that switches
the detail off or changes it; `-` stands where there is nothing to switch. `ppo_lstm.py` shows single frames [atari-7]
and always shares its network [core-13], and so lacks the flags of these two, `--state-dependent-std` and
`--squash-action`.
"""

NOT_REPRODUCED = """
## What the official code does and the scripts do not

- `extra-17`: where a task has exactly 64 actions the official code builds no policy head, and the tanh outputs are the
  logits. That is an accident of one comparison and bounds the logits to +-1; the scripts always have a head.
- `extra-15`: PyTorch's orthogonal initialization draws from the same distribution by another algorithm, so equal seeds
  give other numbers.
"""

MEASURED = """
Effects: difference to the defaults in mean return, over the whole learning curve and for the last 100 episodes, with
95% intervals (Welch's t) over 3 seeds each, after 200,000 steps: `ppo.py` on CartPole-v1 (return at most 500),
`ppo_continuous.py` on HalfCheetah-v4, `ppo_lstm.py` on CartPole-v1 with hidden velocities and `--bootstrap-truncated`.
Differences smaller than their interval are no evidence of an effect. [How they were measured](results.md#ablations).
"""


def where(tag: str) -> list[str]:
    """Links to the lines where the comments name the tag; flags' help texts do not count."""
    links = []
    for script in SCRIPTS:
        for number, line in enumerate((ROOT / script).read_text().splitlines(), 1):
            is_flag = re.match(r"    \w+: [^=]+ = ", line)
            if f"[{tag}]" in line and ("#" in line or '"""' in line) and not is_flag:
                links.append(f"[{script}:{number}](../{script}#L{number})")
    return links


def effects() -> dict[str, str]:
    """Text of the measured effect for each tag that was ablated."""
    texts: dict[str, list[str]] = {}
    for script, name in ABLATIONS.items():
        path = ROOT / "benchmark/results" / name
        for row in csv.DictReader(path.read_text().splitlines()) if path.exists() else []:
            texts.setdefault(row["tag"], []).append(f"{script} `{row['flags']}`: {row['effect']}")
    return {tag: "<br>".join(parts) for tag, parts in texts.items()}


def page() -> str:
    """The whole page."""
    measured = effects()
    header = "| tag | detail | where | flag | test | measured effect of changing it |"
    lines = [INTRO, header, "|---|---|---|---|---|---|"]
    for tag, (title, flags, test) in DETAILS.items():
        file, name = test.split("::")
        shown = " ".join(f"`{flag}`" for flag in flags.split()) or "-"
        cells = [tag, title, ", ".join(where(tag)), shown, f"[{name}](../tests/{file})", measured.get(tag, "-")]
        lines.append("| " + " | ".join(cells) + " |")
    if measured:
        lines.append(MEASURED)
    return "\n".join(lines) + "\n" + NOT_REPRODUCED


if __name__ == "__main__":
    (ROOT / "docs/details.md").write_text(page())
