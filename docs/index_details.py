"""Writes docs/details.md, the index of all details: where each is, its flag, its test and its measured effect.

    python docs/index_details.py

The lines come from the tags in the scripts and the effects from benchmark/results/*_effects.csv; a test holds the
page up to date.
"""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "ppo.py",
    "ppo_continuous.py",
    "ppo_atari.py",
    "ppo_atari_envpool.py",
    "ppo_atari_multigpu.py",
    "ppo_lstm.py",
    "ppo_atari_lstm.py",
    "ppo_procgen.py",
    "ppo_multidiscrete.py",
)
EFFECTS_OF = {
    "ppo.py": ["study_classic"], "ppo_continuous.py": ["study_mujoco", "study_walker2d"],
    "ppo_lstm.py": ["study_lstm"], "ppo_multidiscrete.py": ["study_multidiscrete"],
    "ppo_procgen.py": ["ablations_procgen"],
}  # fmt: skip

# tag: (what it is, flags that switch it, name of its test)
DETAILS = {
    "core-1": ("Vectorized architecture: fixed-length rollouts that continue", "--num-envs --num-steps",
               "test_core_1_rollouts_have_a_fixed_shape_and_continue"),
    "core-2": ("Orthogonal initialization, biases 0", "--no-orthogonal-init",
               "test_core_2_initialization"),
    "core-3": ("Adam's epsilon 1e-5", "--adam-eps", "test_core_3_epsilon_and_extra_1_its_place"),
    "core-4": ("Learning-rate annealing", "--no-anneal-lr", "test_core_4_and_aux_1_annealing"),
    "core-5": ("Generalized advantage estimation", "--gae-lambda", "test_equals_the_definition"),
    "core-6": ("Minibatches from a fresh permutation", "--num-minibatches --minibatch-replacement",
               "test_core_6_an_epoch_uses_every_sample_once"),
    "core-7": ("Advantage normalization per minibatch", "--no-norm-adv --norm-adv-per-batch",
               "test_core_7_normalization"),
    "core-8": ("Clipped surrogate objective", "--no-clip-policy",
               "test_core_8_no_gradient_where_the_ratio_left_the_range_for_gain"),
    "core-9": ("Value loss clipping", "--no-clip-vloss",
               "test_core_9_value_gradient_stops_where_the_clipped_error_is_larger"),
    "core-10": ("Overall loss and entropy bonus", "--ent-coef --vf-coef",
                "test_core_10_coefficients_weigh_the_terms"),
    "core-11": ("Global gradient clipping", "--max-grad-norm", "test_core_11_global_norm"),
    "core-12": ("Debug variables", "", "test_core_12_metrics_are_means_over_all_minibatches"),
    "core-13": ("Separate networks for policy and value function", "--shared-network",
                "test_core_13_separate_or_shared_networks"),
    "atari-1": ("No-ops at the start of a game", "--noop-max",
                "test_atari_1_number_of_noops"),
    "atari-2": ("Frames are skipped, and the maximum of the last two is shown", "--frame-skip",
                "test_atari_2_skipping"),
    "atari-3": ("A lost life ends the episode", "--no-episodic-life", "test_atari_3_lives"),
    "atari-4": ("FIRE at the start of an episode", "--no-fire-reset",
                "test_atari_4_fire_and_action_2"),
    "atari-5": ("Gray images of 84 x 84 pixels", "--no-area-resize",
                "test_official_image_processing"),
    "atari-6": ("Reward clipping to its sign", "--no-clip-reward",
                "test_every_sample_is_learned_from_with_its_own_numbers"),
    "atari-7": ("Four frames stacked", "--frame-stack", "test_atari_7_stacks_by_definition"),
    "atari-8": ("Policy and value function share the Nature-CNN", "--no-shared-network",
                "test_atari_8_number_of_parameters"),
    "atari-9": ("Pixels divided by 255", "--no-scale-images", "test_atari_9_scaling"),
    "continuous-1": ("Gaussian policy", "",
                     "test_continuous_1_actions_follow_the_policy"),
    "continuous-2": ("State-independent log standard deviation, initially 0", "--state-dependent-std",
                     "test_continuous_2_one_deviation_for_each_action"),
    "continuous-3": ("Independent action components", "",
                     "test_continuous_1_and_3_density_and_entropy_equal_torch_distributions"),
    "continuous-4": ("Separate networks for policy and value function", "--shared-network",
                     "test_continuous_4_and_core_13_separate_or_shared_networks"),
    "continuous-5": ("Action clipping", "--no-clip-action --squash-action",
                     "test_continuous_5_actions_are_clipped_for_the_environment_only"),
    "continuous-6": ("Observation normalization", "--no-norm-obs",
                     "test_running_statistics"),
    "continuous-7": ("Observation clipping", "--no-clip-obs",
                     "test_continuous_7_normalized_observations_are_clipped"),
    "continuous-8": ("Reward scaling", "--no-norm-reward", "test_running_statistics"),
    "continuous-9": ("Reward clipping", "--no-clip-reward",
                     "test_continuous_8_and_9_rewards_are_scaled_step_by_step"),
    "procgen-1": ("IMPALA network", "", "test_procgen_1_network"),
    "procgen-2": ("Reward scaling", "--no-norm-reward --no-clip-reward",
                  "test_procgen_2_rewards_by_definition"),
    "lstm-1": ("Orthogonal initialization of the LSTM, biases 0", "--no-lstm-orthogonal-init",
               "test_lstm_1_orthogonal_initialization"),
    "lstm-2": ("The first state is 0", "", "test_lstm_2_and_3_states_of_the_rollouts"),
    "lstm-3": ("The state becomes 0 where an episode ends", "--no-reset-lstm-state",
               "test_lstm_3_and_5_unroll_is_one_step_after_the_other"),
    "lstm-4": ("Minibatches of whole environments, with their steps in order", "--shuffle-lstm-steps",
               "test_lstm_4_minibatches_are_whole_environments"),
    "lstm-5": ("Training starts from the state that the rollout started from", "--no-reconstruct-lstm-state",
               "test_lstm_5_ratio_is_1_in_the_first_minibatch_of_every_update"),
    "multidiscrete-1": ("Independent components, whose log-probabilities and entropies are summed", "",
                        "test_multidiscrete_1_log_probabilities_and_entropies_are_summed"),
    "aux-1": ("Clip-range annealing", "--anneal-clip", "test_core_4_and_aux_1_annealing"),
    "aux-2": ("Gradients averaged over processes (torchrun)", "",
              "test_two_ranks_train_like_one_process"),
    "aux-3": ("Early stopping by KL divergence", "--target-kl", "test_aux_3_early_stopping"),
    "aux-4": ("Invalid-action masks", "--no-mask-actions --no-mask-loss --joint-actions",
              "test_aux_4_log_probabilities_and_entropy_are_those_of_the_valid_values"),
    "extra-1": ("Adam's epsilon is added to the root of the uncorrected second moment", "--no-adam-eps-hat",
                "test_pytorch_habits_do_not_match"),
    "extra-3": ("Advantages divided by the population's standard deviation", "--no-population-std",
                "test_extra_3_population_deviation"),
    "extra-4": ("The advantage is recomputed as return - value", "", "test_gae"),
    "extra-5": ("Gradient clipping adds nothing to the norm", "", "test_core_11_global_norm"),
    "extra-6": ("The value loss has a factor 1/2 besides vf_coef", "--vf-coef",
                "test_statistics_gradients_and_parameters_over_five_updates"),
    "extra-7": ("The official approxkl is half the mean squared log-ratio", "",
                "test_statistics_gradients_and_parameters_over_five_updates"),
    "extra-8": ("Logged losses are means over all minibatches", "",
                "test_core_12_metrics_are_means_over_all_minibatches"),
    "extra-9": ("The clip range is constant by default", "--anneal-clip", "test_core_4_and_aux_1_annealing"),
    "extra-10": ("The last update's learning rate is not 0", "", "test_schedules"),
    "extra-11": ("The step budget is floored to whole rollouts", "--total-timesteps",
                 "test_extra_11_only_whole_rollouts"),
    "extra-12": ("A batch is cut into equal minibatches, without a remainder", "--num-minibatches",
                 "test_core_6_an_epoch_uses_every_sample_once"),
    "extra-13": ("The advantage recursion runs in float64", "", "test_gae"),
    "extra-14": ("A time limit counts as an end", "--bootstrap-truncated",
                 "test_bootstrap_truncated_adds_the_value_of_the_last_observation"),
    "extra-16": ("Separate networks are drawn independently", "",
                 "test_core_13_separate_or_shared_networks"),
    "extra-18": ("Features are flattened with the channels last", "",
                 "test_forward_pass"),
    "extra-20": ("The LSTM has one bias", "", "test_extra_20_a_second_bias_leaves_parity"),
    "extra-21": ("The bias of the LSTM's forget gate is 0 too", "",
                 "test_lstm_1_orthogonal_initialization"),
    "extra-22": ("Vectors go into the official LSTM directly", "--no-encoder",
                 "test_extra_22_no_encoder"),
    "extra-23": ("Minibatches share the environments equally", "--num-minibatches",
                 "test_lstm_4_minibatches_are_whole_environments"),
    "extra-24": ("After every done the older frames of the stack are black", "--no-zero-stack",
                 "test_official_recording"),
    "extra-25": ("Gray before it is resized, and resized by areas", "--no-area-resize",
                 "test_official_image_processing"),
    "extra-26": ("A reset takes steps that the agent never sees", "--no-fire-reset --no-episodic-life",
                 "test_all_wrappers_together"),
    "extra-27": ("Episode statistics are of whole games, hidden steps included", "",
                 "test_official_recording"),
    "extra-28": ("Games are cut off after 400,000 frames", "--max-game-frames",
                 "test_extra_28_games_are_cut_off"),
    "extra-30": ("Normalization divides by the standard deviation, not the variance", "",
                 "test_running_statistics"),
    "extra-31": ("Statistics are updated before they are used and start with a count of 1e-4", "",
                 "test_running_statistics"),
    "extra-32": ("The discounted return is reset after the episode's last reward; no mean is subtracted", "",
                 "test_running_statistics"),
    "extra-33": ("Observations are normalized in float64", "", "test_running_statistics"),
    "extra-34": ("Actions that are not a number become 0", "--no-clip-action",
                 "test_extra_34_not_a_number_becomes_0"),
    "extra-35": ("Environment i is seeded with seed + i", "--seed",
                 "test_environments_are_seeded_apart"),
    "extra-37": ("Procgen's network: Glorot-uniform weights, biases 0", "--no-glorot-init",
                 "test_extra_37_initialization"),
    "extra-38": ("Procgen's pooling pads at the bottom and the right", "--no-same-pooling",
                 "test_procgen_1_network"),
    "extra-39": ("Procgen's features are flattened with the channels last", "--no-channels-last",
                 "test_procgen_1_network"),
    "extra-40": ("Procgen's rewards are scaled with a discount factor of their own", "--reward-gamma",
                 "test_procgen_2_rewards_by_definition"),
}  # fmt: skip

INTRO = """# Index of the details

<!-- written by docs/index_details.py; edit there -->

A tag stands in the scripts at the line where its detail happens. `core`, `atari`, `continuous`, `lstm`, `multidiscrete`
and `aux` are details of "The 37 Implementation Details of PPO" (Huang et al., ICLR Blog Track 2022), `procgen` those of
its appendix. `extra` are behaviours of the official code that the article leaves out or states differently. The numbers
in a script's column are line numbers and lead to the detail there. The flag switches the detail off or changes it. The
test would fail without the detail.
"""

NOT_REPRODUCED = """
## Numbers that are missing above

Some behaviours of the official code have a number and no place in these scripts:

- `extra-2`: the article gives 1e-7 as TensorFlow's default for Adam's epsilon. In TensorFlow 1 it is 1e-8. The official
  code sets 1e-5 in any case, so that nothing depends on it.
- `extra-15`: PyTorch's orthogonal initialization draws from the same distribution as the official one, by another
  algorithm. Equal seeds therefore give other numbers.
- `extra-17`: where a task has exactly 64 actions, the official code builds no policy head, and its tanh outputs are the
  logits. That is an accident of one comparison. The scripts always have a head.
- `extra-19`: the official code has no tuned settings for classic control. Its command line then trains one environment
  with rollouts of 2048 steps and a constant learning rate of 3e-4. `ppo.py` follows the article's settings instead.
- `extra-29`: Breakout and Pong are the same in the emulator of the official code and in today's, BeamRider is not.
- `extra-36`: CartPole, Acrobot and MountainCar are the same in gym 0.17.3 and in gymnasium 1.4.0.
"""

EFFECTS = """
## What changing a detail did to learning

Each number is the difference in mean return from the defaults, over the whole learning curve and for the last 100
episodes, with a 95% interval by Student's t. A difference smaller than its interval is no evidence of an effect. One
in 20 exceeds its interval by chance, and many are shown: those in bold survive Holm's correction for all rows of
their script (Walker2d-v4, in which only ten changes were made, by itself), where there are seeds enough for that.
What the defaults reach at the end: `ppo.py` {ppo.py CartPole-v1} of at most 500 in CartPole-v1 and
{ppo.py Acrobot-v1} in Acrobot-v1, `ppo_lstm.py` with hidden velocities and `--bootstrap-truncated`
{ppo_lstm.py CartPole-v1} in CartPole-v1, in 200,000 steps each, and {ppo_lstm.py Pendulum-v1} in Pendulum-v1 in
300,000; `ppo.py` {ppo.py LunarLander-v3} in LunarLander-v3 and `ppo_continuous.py`
{ppo_continuous.py HalfCheetah-v4} in HalfCheetah-v4, {ppo_continuous.py Hopper-v4} in Hopper-v4 and
{ppo_continuous.py Walker2d-v4} in Walker2d-v4, in 500,000; `ppo_multidiscrete.py`
{ppo_multidiscrete.py Jumanji/Cleaner-v0}, and `ppo_procgen.py` {ppo_procgen.py StarpilotEasy-v0} on one level in only
16,384 steps. [How they were measured](results.md#ablations).

| tag | script and flag | task | seeds | over the run | at its end |
|---|---|---|---|---|---|"""


def where(tag: str, script: str) -> str:
    """A link to the first line of a script where a comment names the tag; flags' help texts do not count."""
    path = ROOT / script
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        is_flag = re.match(r"    \w+: [^=]+ = ", line)
        if f"[{tag}]" in line and ("#" in line or '"""' in line) and not is_flag:
            return f"[{number}](../{script}#L{number})"
    return ""


def test_file(name: str) -> str:
    """The file that has the test; raises StopIteration if none has."""
    return next(path.name for path in sorted((ROOT / "tests").glob("*.py")) if f"def {name}(" in path.read_text())


def effects() -> list[str]:
    """What stands in the section of the effects: its text, and a row for each detail that was changed."""
    defaults, rows = {}, []
    for script, names in EFFECTS_OF.items():
        changes = {}
        tables = [(ROOT / f"benchmark/results/{name}_effects.csv").read_text() for name in names]
        for row in (row for table in tables for row in csv.DictReader(table.splitlines())):
            if not row["difference"] and row["measure"] == "final":
                defaults[f"{script} {row['env_id']}"] = f"{float(row['mean']):.3g}"
            elif row["difference"]:
                middle, half = float(row["difference"]), (float(row["high"]) - float(row["low"])) / 2
                digits = 0 if abs(float(defaults[f"{script} {row['env_id']}"])) > 100 else 1
                effect = f"{middle:+.{digits}f} +- {half:.{digits}f}"
                effect = f"**{effect}**" if row["holm"] == "1" else effect
                tasks = changes.setdefault((row["tags"], row["flags"]), {})
                cells = tasks.setdefault(row["env_id"].rpartition("/")[2], {"seeds": row["seeds"]})
                cells[row["measure"]] = effect
        for (tags, flags), tasks in changes.items():
            for task, cells in tasks.items():
                ends = f"{cells['seeds']} | {cells['curve']} | {cells['final']}"
                rows.append(f"| {tags} | {script} `{flags}` | {task} | {ends} |")
    text = re.sub(r"{(ppo[^}]*)}", lambda match: defaults[match[1]], EFFECTS)
    return [text, *rows]


def page() -> str:
    """The whole page."""
    lines = [INTRO, "| tag | detail | " + " | ".join(f"`{script}`" for script in SCRIPTS) + " | flag | test |"]
    lines.append("|---|---|" + "---|" * len(SCRIPTS) + "---|---|")
    for tag, (title, flags, test) in DETAILS.items():
        shown = " ".join(f"`{flag}`" for flag in flags.split())
        cells = [tag, title, *(where(tag, script) for script in SCRIPTS), shown]
        lines.append("| " + " | ".join(cells) + f" | [{test}](../tests/{test_file(test)}) |")
    return "\n".join([*lines, *effects()]) + "\n" + NOT_REPRODUCED


if __name__ == "__main__":
    (ROOT / "docs/details.md").write_text(page())
