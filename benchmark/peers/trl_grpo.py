"""TRL's GRPOTrainer and ppo_rlvr.py on the same small Hugging Face model: tokens per second of processor time.

    python benchmark/peers/trl_grpo.py       # needs requirements-llm.txt, trl, and this repository on PYTHONPATH

Settings are the same: 64 answers of at most 16 tokens to 8 prompts, two gradient steps, a reference model, one thread.
The model has random weights, so that answers are about as long in both. What is counted are the answers' tokens, and
the time from the end of the first update to the end of the last one, so that neither start-up nor tests count.
"""

import os
import random
import statistics
import sys
import tempfile
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import datasets
import tokenizers
import torch
import transformers
from trl import GRPOConfig, GRPOTrainer

import ppo_rlvr as rlvr

UPDATES, ROUNDS, LEARNING_RATE, WIDTH, LAYERS = 8, 5, 1e-4, 64, 2


def make_model(path: str) -> None:
    """A random Llama, whose tokens are characters."""
    names = ["<pad>", "<eos>", *map(chr, range(32, 127)), "\n"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("<eos>|[\\s\\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(path)
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(names), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )).save_pretrained(path)  # fmt: skip


def ours(path: str, folder: str, seed: int) -> float:
    """Tokens per second of ppo_rlvr.py."""
    ends, tokens, end_update = [], [], rlvr.Run.end_update

    def noted(run, values, *rest):
        ends.append(time.process_time())
        tokens.append(64 * values["charts/episodic_length"])
        end_update(run, values, *rest)

    rlvr.Run.end_update = noted
    rlvr.train(rlvr.Args(
        env_id="largest", model=path, advantage="group", num_envs=64, num_steps=16, num_minibatches=2, update_epochs=1,
        total_timesteps=UPDATES * 64 * 16, learning_rate=LEARNING_RATE, anneal_lr=False, kl_coef=0.01, kl_in="loss",
        eval_interval=1000, num_test=1, runs_dir=folder, seed=seed,
    ))  # fmt: skip
    rlvr.Run.end_update = end_update
    return sum(tokens[1:-1]) / (ends[-2] - ends[0])  # before the last one, there is a test


class Ends(transformers.TrainerCallback):
    """Notes when gradient steps end."""

    def __init__(self):
        self.times = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.process_time())


def theirs(path: str, folder: str, seed: int) -> float:
    """Tokens per second of TRL."""
    task, rng, lengths, ends = rlvr.Largest(), random.Random(seed), [], Ends()
    problems = [task.problem(rng) for _ in range(8 * UPDATES)]
    prompts = [[{"role": "user", "content": task.prompt(problem)}] for problem in problems]

    def reward(completions, completion_ids, problem, **kwargs):
        lengths.append(sum(map(len, completion_ids)))
        return [task.reward(p, completion[0]["content"]) for p, completion in zip(problem, completions)]

    trainer = GRPOTrainer(
        model=path, reward_funcs=reward, callbacks=[ends],
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "problem": problems}),
        args=GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", seed=seed,
            per_device_train_batch_size=32, steps_per_generation=2, gradient_accumulation_steps=1, num_generations=8,
            max_completion_length=16, max_steps=2 * UPDATES, num_iterations=1, beta=0.01, epsilon=0.2,
            loss_type="dapo", scale_rewards="group", learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            max_grad_norm=1.0, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    return sum(lengths[1:]) / (ends.times[-1] - ends.times[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    speeds = {"ppo_rlvr.py": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(f"{folder}/model")
        for turn in range(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
            for name, measure in (("ppo_rlvr.py", ours), ("TRL", theirs)):
                speeds[name].append(measure(f"{folder}/model", folder, turn))
                print(f"{name}: {speeds[name][-1]:.0f} tokens/s", flush=True)
    for name, found in speeds.items():
        print(f"{name}: median {statistics.median(found):.0f}, {min(found):.0f} to {max(found):.0f} tokens/s")
    ratios = [one / other for one, other in zip(*speeds.values())]
    print(f"median of the rounds' ratios: {statistics.median(ratios):.2f}")
