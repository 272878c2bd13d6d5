import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import build, evaluators, metrics, objectives, partitioning
from md4vmd.evaluators import Answers, Likelihood, ZeroShot
from md4vmd.evaluators.answers import conditional_bounds
from md4vmd.evaluators.likelihood import Scorer
from tests import shrunken, three_documents, toys
from tests.evaluators_test import Fake
from tests.multi_process_test import random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, E = 257, 256


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A model of bytes in sequences of 16, in batches of 8."""
  config = shrunken.config("owt", "small", folder=tmp_path_factory.mktemp("data"))
  return build.model(config)


def knows(model, log_odds, **changes):
  """The model whose predictions are the same everywhere; its nats by token."""
  logits_V = np.zeros(V)
  for mark, value in log_odds.items():
    logits_V[mark] = value
  nats_V = np.log(np.exp(logits_V).sum()) - logits_V
  fake = Fake(toys.constant(np.tile(logits_V, (16, 1)).astype(np.float32)))
  return dataclasses.replace(model, network=fake, **changes), nats_V


def run(evaluator, params=None):
  with partitioning.use(evaluator.model.mesh):
    return evaluator.run(0, params or {})


@pytest.fixture(scope="module")
def constant(text):
  """An a is e^2 and an end e times as likely as any other byte; one bound for all tests."""
  return knows(text, {ord("a"): 2.0, E: 1.0}, objective=objectives.TABLE["ar"](V))[0]


@pytest.fixture
def sets(tmp_path):
  """Three passages of LAMBADA and three lines of news, as name=path."""
  (tmp_path / "lambada.txt").write_text("one ee\ntwo e e\nthree x\n")
  (tmp_path / "news.jsonl").write_text(
    "".join(json.dumps({"text": text}) + "\n" for text in ("abcdefgh", "ijklmnop", "qrst"))
  )
  return {"lambada": tmp_path / "lambada.txt", "ag_news": tmp_path / "news.jsonl"}


def named(sets, *names):
  return tuple(f"{name}={sets[name]}" for name in names)


@pytest.mark.parametrize("convention", ["radd-v1", "mdlm-v1"])
@pytest.mark.parametrize("name", sorted(three_documents.SETS))
def test_the_score_of_three_documents_by_hand(constant, tmp_path, name, convention):
  three, path = three_documents.SETS[name], three_documents.write(tmp_path, name)
  count, dropped, a, ends = three.chunks[convention]
  figures = run(ZeroShot(constant, (f"{name}={path}",), (convention,), draws=1))
  get = lambda quantity: figures[f"{name}/{convention}/{quantity}"]
  nats = 16 * count * math.log(math.exp(2) + math.exp(1) + V - 2) - 2 * a - ends
  assert (get("tokens"), get("documents"), get("words")) == (16 * count, 3, three.words)
  assert (get("tokens_of_the_set"), get("tokens_dropped")) == (three.tokens, dropped)
  assert (get("bytes"), get("tokens_over_limit")) == (three.tokens - 3, 0)
  assert get("nelbo_nats_per_token") == pytest.approx(nats / (16 * count), rel=1e-6)
  assert get("perplexity_bound") == pytest.approx(math.exp(nats / (16 * count)), rel=1e-5)
  # Frames are scored and are no text: the nats of a chunk are those of its text.
  text = {"radd-v1": 16, "mdlm-v1": 14}[convention] * count
  whole = nats * three.tokens / text
  assert get("bits_per_byte") == pytest.approx(whole / (three.tokens - 3) / math.log(2), rel=1e-6)
  assert math.log(get("perplexity_per_word")) == pytest.approx(whole / three.words, rel=1e-6)


def test_the_table_has_a_line_for_each_set_and_convention(constant, tmp_path):
  paths = [f"{name}={three_documents.write(tmp_path, name)}" for name in ("ptb", "arxiv")]
  figures = run(ZeroShot(constant, tuple(paths), draws=1, limit=1))
  lines = figures["table"].strip().splitlines()
  assert [line.split()[:2] for line in lines[1:]] == [
    [name, convention] for name in ("ptb", "arxiv") for convention in ("radd-v1", "mdlm-v1")
  ]
  assert len({len(line) for line in lines}) == 1
  shown = [line.split()[6:9] for line in lines[1:]]  # scored, dropped, over the limit
  assert shown == [["16", "6", "16"], ["16", "10", "14"], ["16", "0", "16"], ["16", "4", "14"]]
  assert figures["arxiv/mdlm-v1/tokens_over_limit"] == 14


def test_last_words_are_found_if_every_token_is(text, sets):
  """A network that reads the token before: a space behind a letter, an e behind a space."""

  def denoise(zt_BxL, t_BxG, **inputs):
    del t_BxG, inputs
    before_BxL = jnp.roll(zt_BxL, 1, axis=1)
    next_BxL = jnp.where(before_BxL == 32, ord("e"), 32)
    is_next_BxLxV = next_BxL[:, :, None] == jnp.arange(V)[None, None]
    return toys.Logits(3.0 * is_next_BxLxV * (before_BxL != V)[:, :, None])

  sets["lambada"].write_text("one e\ntwo ee\nthree x\n")
  model = dataclasses.replace(text, network=Fake(toys.ModelFns(denoise)))
  figures = run(ZeroShot(model, named(sets, "lambada"), ("radd-v1",), draws=1, calls=3))
  assert figures["lambada/last_word_accuracy"] == pytest.approx(1 / 3)
  assert figures["lambada/last_word_accuracy_standard_error"] == pytest.approx((2 / 27) ** 0.5)
  assert (figures["lambada/passages"], figures["lambada/passages_shortened"]) == (3, 0)


def test_draws_and_limit_are_those_that_were_asked_for(text, sets):
  model, nats_V = knows(text, {})
  (sets["ag_news"]).write_text(json.dumps({"text": "x" * 100}) + "\n")
  figures = run(ZeroShot(model, named(sets, "ag_news"), ("radd-v1",), draws=3, limit=2))
  assert figures["ag_news/radd-v1/tokens"] == 32 and figures["draws"] == 3
  assert figures["ag_news/radd-v1/nelbo_nats_per_token"] == pytest.approx(nats_V[0], rel=1e-6)


def test_what_more_draws_would_buy_stands_in_a_line_for_each_text(text, sets):
  model, _ = knows(text, {ord("a"): 2.0})
  (sets["ag_news"]).write_text(json.dumps({"text": "ab" * 50}) + "\n")
  for draws, words in ((2, "from 2 draws"), (1, "set draws to 2 or more")):
    figures = run(ZeroShot(model, named(sets, "ag_news"), draws=draws))
    lines = figures["standard_error_by_draws"].strip().splitlines()
    assert [line.split()[:2] for line in lines] == [
      ["ag_news", "radd-v1"],
      ["ag_news", "mdlm-v1"],
    ]
    assert all(line.endswith(words) for line in lines)
  exact = knows(text, {}, objective=objectives.TABLE["ar"](V))[0]
  assert run(Likelihood(exact, limit=4))["standard_error_by_draws"] == "nothing is drawn"
  assert "draws to 2" in run(Likelihood(model, limit=4))["standard_error_by_draws"]


def test_without_sets_the_evaluator_says_how_to_name_them(text):
  figures = run(ZeroShot(text, ()))
  assert "evaluators.zero_shot.sets" in figures["convention"]
  assert "evaluators.answers.path" in run(Answers(text))["convention"]


def test_sets_and_data_that_do_not_fit_are_refused(text, sets, tmp_path):
  with pytest.raises(ValueError, match="'ag_news' is not of the form name=path"):
    ZeroShot(text, ("ag_news",))
  with pytest.raises(ValueError, match="names a set twice: ptb=a, ptb=b"):
    ZeroShot(text, ("ptb=a", "ptb=b"))
  with pytest.raises(FileNotFoundError, match="of the set 'ptb'"):
    ZeroShot(text, (f"ptb={tmp_path}/none",))
  boards = build.model(shrunken.config("sudoku", "4x4"))
  with pytest.raises(ValueError, match=r"zero_shot reads text and this data has no tokenizer"):
    ZeroShot(boards, named(sets, "ag_news"))


@pytest.mark.parametrize("variant", ["genmd4", "vmd", "sedd"])
def test_every_kind_of_model_finds_last_words_and_scores_answers(tmp_path, sets, variant):
  config = shrunken.config("owt", variant, folder=tmp_path)
  config.evaluators.zero_shot.update({"sets": named(sets, "lambada"), "draws": 2, "calls": 2})
  config.evaluators.zero_shot.conventions = ("radd-v1",)
  config.run.evaluators = ("zero_shot", "answers")
  model, figures = build.model(config), {}
  with partitioning.use(model.mesh):
    params = random_params(model)
    for evaluator in build.evaluators(model, evaluators.TABLE).values():
      figures |= evaluator.run(0, params)
  assert figures["lambada/passages"] == 3 and 0 <= figures["lambada/last_word_accuracy"] <= 1
  for name in ("lambada/radd-v1/nelbo_nats_per_token", "answers/nelbo_nats_per_token"):
    assert 1 < figures[name] < 1e4  # finite


# Answers.


@pytest.fixture
def questions(tmp_path):
  path = tmp_path / "q.jsonl"
  rows = [
    {"ctx": "p", "endings": ["a", "b", "aab"], "label": 0},  # the nearest by all measures
    {"ctx": "p", "endings": ["b", "aaaab"], "label": 1},  # by nats per byte alone
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_choices_are_scored_by_their_bound_and_per_byte(text, questions):
  model, nats_V = knows(text, {ord("a"): 4.0, 32: 4.0}, objective=objectives.TABLE["ar"](V))
  figures = run(Answers(model, questions, draws=1))
  a, b, space = nats_V[ord("a")], nats_V[ord("b")], nats_V[32]
  assert figures["answers/accuracy"] == 0.5
  assert figures["answers/accuracy_per_byte"] == 1.0
  assert figures["answers/accuracy_standard_error"] == pytest.approx(math.sqrt(0.25 / 2))
  nats = (space + a) + (space + 4 * a + b)
  assert figures["answers/nelbo_nats_per_token"] == pytest.approx(nats / 8, rel=1e-6)
  assert figures["answers/questions"] == 2 and figures["answers/prompts_shortened"] == 0
  assert run(Answers(model, questions, draws=1, limit=1))["answers/accuracy"] == 1.0


def test_the_conditional_bound_is_that_of_the_answer_given_the_prompt(text):
  """A network that copies the byte before: exact for an answer of one token, whatever the draw."""

  def denoise(zt_BxL, t_BxG, **inputs):
    del t_BxG, inputs
    before_BxL = jnp.roll(zt_BxL, 1, axis=1)
    return toys.Logits(3.0 * (before_BxL[:, :, None] == jnp.arange(V)[None, None]))

  model = dataclasses.replace(text, network=Fake(toys.ModelFns(denoise)))
  with partitioning.use(model.mesh):
    pairs = [("ab", "b"), ("ab", "c"), ("ab", "bb")]
    bounds, shortened = conditional_bounds(Scorer(model, draws=8), {}, pairs)
  right = math.log(math.exp(3) + V - 1) - 3
  nats_NxK = bounds.nats_NxK["nelbo"]
  assert bounds.tokens_N.tolist() == [1, 1, 2] and shortened == 0
  np.testing.assert_allclose(nats_NxK[0], right, rtol=1e-6)
  np.testing.assert_allclose(nats_NxK[1], right + 3, rtol=1e-6)
  # Of two masked tokens the second is seen behind a mask: nothing to copy, log V.
  seen = sorted({round(float(value), 4) for value in nats_NxK[2]})
  assert seen == [round(2 * right, 4), round(right + math.log(V), 4)]


# What more draws would buy.


def test_the_noise_of_draws_is_told_from_that_of_examples():
  rng = np.random.default_rng(0)
  tokens_N = np.full(4000, 10.0)
  own_N, noise_NxK = rng.normal(size=4000), rng.normal(size=(4000, 4))
  nats_NxK = 50 + 3 * own_N[:, None] + 6 * noise_NxK
  figures = metrics.draws_report("valid/nelbo", nats_NxK, tokens_N)
  get = lambda name: figures[f"valid/nelbo_nats_per_token_{name}"]
  assert get("deviation_of_a_draw") == pytest.approx(0.6, rel=0.03)
  assert get("deviation_of_examples") == pytest.approx(0.3, rel=0.1)
  for draws in (1, 4, 16, 64):
    expected = math.sqrt((9 + 36 / draws) / 4000) / 10
    assert get(f"standard_error_with_{draws}_draws") == pytest.approx(expected, rel=0.05)
  ours = metrics.ratio_report("valid/nelbo", nats_NxK.mean(1), tokens_N, unit="token")
  assert get("standard_error_with_4_draws") == pytest.approx(
    ours["valid/nelbo_nats_per_token_standard_error"], rel=1e-3
  )
  words = metrics.draws_words("valid/nelbo", figures, 4)
  assert words == "1: 0.0106, 4: 0.00681, 16: 0.00545, 64: 0.00506 nats per token, from 4 draws"
  assert "set draws to 2 or more" in metrics.draws_words("valid/nelbo", {}, 1)
  assert metrics.draws_words("valid/nelbo", {}, 2) == "draws do not differ"
  assert metrics.draws_report("valid/nelbo", nats_NxK[:, :1], tokens_N) == {}
  assert metrics.draws_report("valid/nelbo", np.ones((3, 2)), tokens_N[:3]) == {}
