"""ppo_rlvr.py --model: with a stand-in for transformers always, and with the real one where it is installed."""

import json
import random
import re
import signal
import string
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import ppo_rlvr as rlvr

STAND_IN = {"max_position_embeddings": 48, "dropout": 0.5, "ends": [1, 2], "chat_template": "<{}\2>"}


def make_stand_in(path, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(STAND_IN | changes))


def make_real(path):
    """A random Llama whose tokens are characters; one of its two ends also fills up texts."""
    import tokenizers
    import transformers

    names = ["_", "<eot>", "<eos>", *string.printable[:36], *" =?<>"]
    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("<e..>|."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{% for m in messages %}<{{ m['content'] }}<eot>{% endfor %}>"
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, attention_dropout=0.5, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=None, eos_token_id=[1, 2], pad_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)


@pytest.fixture(params=["stand-in", "transformers"])
def library(request, tmp_path, monkeypatch):
    """A folder with a model in "model", and the library that reads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rlvr.load_model.cache_clear(), rlvr.say.cache_clear()
    if request.param == "stand-in":
        monkeypatch.syspath_prepend(str(ROOT / "tests" / "no_transformers"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            monkeypatch.delitem(sys.modules, name)
        make_stand_in(tmp_path / "model")
    elif not find_spec("transformers"):
        pytest.skip("transformers is not installed: pip install -r requirements-llm.txt")
    else:
        make_real(tmp_path / "model")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield request.param
    rlvr.load_model.cache_clear()
    if request.param == "stand-in":
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Digit:
    """Begin with a digit, and come to an end: a random model does so now and then."""

    def problem(self, rng):
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, 9)))

    def prompt(self, problem):
        return f"{problem}?"

    def reward(self, problem, text):
        return float(text[:1].isdigit())


@pytest.fixture
def args(library, monkeypatch):
    monkeypatch.setitem(rlvr.TASKS, "digit", Digit)
    return rlvr.Args(env_id="digit", model="model", num_envs=64, num_steps=6, num_minibatches=2, num_test=40,
                     group_size=8, total_timesteps=4 * 64 * 6, eval_interval=2, checkpoint_interval=1)  # fmt: skip


def prepared(args, number=12):
    """A policy, and prompts of different lengths for it."""
    torch.manual_seed(0)
    task, tests = rlvr.make_task(args)
    return rlvr.HuggingFace(2, args), task, tests[:number], rlvr.make_prompts(task, tests[:number], args)


def test_llm_32_prompts_are_put_into_the_chat_template(args, library):
    *_, tests, (tokens, mask) = prepared(args)
    tokenizer = rlvr.load_model("model")[1]
    assert len({len(problem) for problem in tests}) > 3
    end = "\2" if library == "stand-in" else "<eot>"
    for problem, row, real in zip(tests, tokens, mask):
        assert "".join(tokenizer.batch_decode([[t] for t in row[real].tolist()])) == f"<{problem}?{end}>"
        assert real.sum() == len(problem) + 4 and real[-1]  # [llm-2] filled up on the left
    *_, (tokens, mask) = prepared(replace(args, chat=False))
    assert mask.sum(1).tolist() == [len(problem) + 1 for problem in tests]


@pytest.mark.parametrize("greedy", [True, False])
def test_llm_2_sampler_equals_a_forward_pass_without_cache_and_padding(args, greedy):
    policy, _, _, (prompts, mask) = prepared(args)
    answers = rlvr.generate(policy, prompts, mask, args, greedy, torch.Generator().manual_seed(1))
    assert 1 < len({tuple(row) for row in answers.tokens.tolist()})
    scored, _ = rlvr.score(policy, answers, 1.0)
    for i in range(len(prompts)):
        tokens = torch.cat([prompts[i][mask[i]], answers.tokens[i][answers.mask[i]]])[None]
        whole = {"attention_mask": torch.ones_like(tokens), "position_ids": torch.arange(tokens.shape[1])[None]}
        logits = policy.model(input_ids=tokens, **whole).logits[0, mask[i].sum() - 1 : -1]
        said = answers.tokens[i][answers.mask[i]]
        expected = logits.log_softmax(-1).gather(1, said[:, None])[:, 0]
        for log_probs in (answers.log_probs, scored):
            torch.testing.assert_close(log_probs[i][answers.mask[i]], expected, atol=1e-4, rtol=1e-4)
        if greedy:
            assert logits.argmax(-1).tolist() == said.tolist()


def test_llm_4_either_end_ends_an_answer(args):
    """And the second one, which is also what prompts are filled up with, is masked by its place alone."""
    policy, _, _, prompts = prepared(args, 40)
    args = replace(args, num_steps=30)
    policy.most = 31
    answers = rlvr.generate(policy, *prompts, args, generator=torch.Generator().manual_seed(2))
    last = set()
    for tokens, mask, cut, text in zip(
        answers.tokens.tolist(), answers.mask, answers.truncated, rlvr.read(answers, args)
    ):
        ends = [t for t, token in enumerate(tokens) if token in (1, 2)]
        length = ends[0] + 1 if ends else 30
        assert mask.tolist() == [t < length for t in range(len(tokens))] and cut == (not ends)
        assert len(text) == length - (not cut)
        last.add(tokens[length - 1])
    assert {1, 2} < last


def test_llm_31_dropout_is_off(args, library):
    policy, _, _, prompts = prepared(args)
    answers = rlvr.generate(policy, *prompts, args)
    one, other = (rlvr.score(policy, answers, 1.0)[0] for _ in range(2))
    assert torch.equal(one, other)
    policy.train()  # there is some
    assert not torch.equal(one, rlvr.score(policy, answers, 1.0)[0])
    assert not rlvr.Agent(replace(args, value_from_policy=False)).critic.model.training


def test_amp_rounds_and_no_more(args):
    policy, _, _, prompts = prepared(args)
    answers = rlvr.generate(policy, *prompts, args)
    exact = rlvr.score(policy, answers, 1.0)[0]
    policy.amp = True
    rounded = rlvr.score(policy, answers, 1.0)[0]
    assert rounded.dtype == exact.dtype and 0 < (rounded - exact).abs().max() < 0.3


def test_llm_9_the_value_network_starts_as_the_policy_and_says_0(args):
    for copied in (True, False):
        agent = rlvr.Agent(replace(args, value_from_policy=copied))
        weights, values = agent.policy.state_dict(), agent.critic.state_dict()
        head = rlvr.HuggingFace(1, args).model.get_output_embeddings().weight
        assert head.shape[0] == 1 and not head.any()
        same = [torch.equal(values[name], weights[name]) for name in values if "lm_head" not in name]
        assert all(same) == copied
        assert not any(parameter.requires_grad for parameter in agent.reference.parameters())


def rows_of(path) -> list[dict]:
    rows = map(json.loads, (Path(path) / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in ("wall_time", "charts/SPS")} for row in rows]


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_stop_resume_and_evaluate(args, advantage, capfd):
    args, end = replace(args, advantage=advantage), rlvr.Run.end_update
    whole = rlvr.train(args)["run_dir"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlvr.Run, "end_update", lambda run, *rest: (end(run, *rest), rlvr.SIGNALS.append(15)))
        path = rlvr.train(args)["run_dir"]
    assert len(rows_of(path)) == 2  # one before training
    assert rlvr.main(["--resume", path]) == 0
    assert rows_of(path) == rows_of(whole)
    first, second = (torch.load(f"{place}/checkpoint.pt", weights_only=True)["agent"] for place in (path, whole))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for search in ["greedy", "majority"] + ["best-of", "guided"] * (advantage == "gae"):
        capfd.readouterr()
        assert rlvr.main(["--evaluate", path, "--search", search, "--samples", "3"]) == 0
        printed = capfd.readouterr().out
        if search == "greedy":
            assert f"accuracy {rows_of(path)[-1]['eval/greedy_accuracy']:.3f} on 40 test problems" in printed


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_a_random_model_learns(args, advantage):
    result = rlvr.train(replace(args, advantage=advantage, total_timesteps=25 * 64 * 6, learning_rate=1e-2))
    rewards = [row["charts/reward"] for row in rows_of(result["run_dir"])[1:]]
    assert rewards[0] < 0.3 and rewards[-1] > 0.8


# ---- bad input


@pytest.mark.parametrize("library", ["stand-in"], indirect=True)
class TestBadInput:
    def refused(self, args, capfd, *more):
        flags = ["--env-id", "digit", "--num-envs", "64", "--num-steps", "6", "--num-test", "40", *more]
        before = sorted(Path.cwd().iterdir())
        assert rlvr.main(flags) == 2
        output = capfd.readouterr()
        lines = output.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("ppo_rlvr.py: error: ") and output.out == "", output
        assert sorted(Path.cwd().iterdir()) == before
        return lines[0]

    def test_without_transformers(self, args, capfd, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        assert "pip install -r requirements-llm.txt" in self.refused(args, capfd, "--model", "model")

    def test_without_gguf(self, args, capfd):
        Path("some.gguf").write_bytes(b"GGUF")
        message = self.refused(args, capfd, "--model", "some.gguf")
        assert "please install gguf" in message and "requirements-llm.txt" in message

    @pytest.mark.parametrize("path", ["nowhere", "."])
    def test_no_model(self, args, capfd, path):
        message = self.refused(args, capfd, "--model", path)
        assert message.startswith(f"ppo_rlvr.py: error: cannot load the model {path}: ")
        assert "requirements" not in message

    def test_no_eos(self, args, capfd):
        make_stand_in(Path("endless"), ends=None)
        assert "the model endless has no EOS" in self.refused(args, capfd, "--model", "endless")

    def test_no_chat_template(self, args, capfd):
        make_stand_in(Path("base"), chat_template=None)
        assert "--no-chat leaves prompts as they are" in self.refused(args, capfd, "--model", "base")

    def test_prompt_longer_than_the_context(self, args, capfd):
        make_stand_in(Path("short"), max_position_embeddings=18)
        message = self.refused(args, capfd, "--model", "short")
        assert re.search("room for prompts of 1 to 12 tokens, and one has 1[34]", message)

    def test_nothing_is_downloaded(self, args, capfd):
        """A name of the hub is no directory. Looking further would fail in other words, also with the stand-in."""
        message = self.refused(args, capfd, "--model", "someone/model")
        assert message.startswith("ppo_rlvr.py: error: cannot load the model someone/model: FileNotFoundError")


def test_largest_digit():
    task, rng = rlvr.Largest(), random.Random(0)
    assert task.reward([3, 9, 1, 2], "The largest number is 9.") == 1
    assert task.reward([3, 9, 1, 2], "9 is larger than 3") == task.reward([3, 9, 1, 2], "nine") == 0
    assert {len(set(map(type, task.problem(rng)))) for _ in range(9)} == {1}
    assert "list: 3, 9, 1, 2?" in task.prompt([3, 9, 1, 2])
