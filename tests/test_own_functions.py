"""An advantage, a loss and a filter of one's own: README's examples run, faults are one sentence, edits are noticed."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_traps import fast_update, ragged_groups, run_stage
from test_variants import SIZE, assert_same, responses, stage_of, updates_of

import train
from data_filter import History, Visit, drop_easy, filter_mirrored_j
from engine.fingerprint import differences, function_identity, own_functions
from engine.own_function import FunctionError
from engine.run_folder import run_fingerprint
from lab.problems import Problem
from lab.recipe import Recipe, RlStage, VariantSettings, to_toml
from lab.variants import VariantLoss, own_function, try_functions

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """README's file mine.py, as it stands there."""
    section = (ROOT / "README.md").read_text().split("### An advantage, a loss, a filter of your own\n")[1]
    blocks = re.findall(r"(?:^    .*\n|^\n)+", section.split("\n### ")[0], re.MULTILINE)
    code = next(block for block in blocks if "def " in block)
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(re.sub("^    ", "", code, flags=re.MULTILINE))
    return path


def write(folder, text, name="own.py"):
    path = folder / name
    path.write_text(f"import numpy as np, torch\n{text}\n")
    return path


def try_out(stage):
    """What the start of a run does with one stage."""
    try_functions(Recipe("test", "none", (stage,)), SimpleNamespace(device=CPU, all_gather=lambda mine: [mine]))


@pytest.fixture(params=range(3))
def batch(request):
    return ragged_groups(request.param, size=SIZE)


# --------------------------------------------------------------------------------------------- README's examples


def test_readmes_advantage_is_leave_one_out(mine, batch):
    """RLOO, rollout by rollout: the reward minus the mean of the other rewards."""
    groups, logprobs = batch
    loss, gradient = 0.0, [0.0] * len(logprobs)

    def others(rewards):
        return [r - sum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1) for i, r in enumerate(rewards)]

    for names, new, old, advantage, _ in responses(groups, logprobs, others):
        for name, n, o in zip(names, new, old, strict=True):
            weight = min(math.exp(n - o), 5.0)
            loss -= weight * advantage * n / len(logprobs)
            gradient[name] -= weight * advantage / len(logprobs)
    stage = stage_of(advantage=f"{mine}:loo", loss="cispo")
    try_out(stage)
    [found] = updates_of(stage, groups, logprobs)
    assert_same(found, loss, gradient)


def test_readmes_loss_is_the_soft_gate(mine, batch):
    """SAPO (arXiv 2511.20347): -A 4 / tau sigmoid(tau (r - 1)), tau 1 for good and 1.05 for bad tokens."""
    groups, logprobs = batch
    loss, gradient = 0.0, [0.0] * len(logprobs)
    for names, new, old, advantage, _ in responses(groups, logprobs):
        for name, n, o in zip(names, new, old, strict=True):
            ratio, tau = math.exp(n - o), 1.0 if advantage > 0 else 1.05
            gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
            loss -= advantage * 4 / tau * gate / len(logprobs)
            gradient[name] -= advantage * 4 * gate * (1 - gate) * ratio / len(logprobs)
    stage = stage_of(loss=f"{mine}:soft")
    try_out(stage)
    [found] = updates_of(stage, groups, logprobs)
    assert_same(found, loss, gradient)
    ratios = found[0].ratios
    assert ratios.ratio_mean > 0 and ratios.logprob_diff_mean > 0.1 and ratios.clip_high_share == 0


def history_of(rates, stage=0):
    history = History()
    for name, rate in rates.items():
        history.append(Visit(name, stage, 0, tuple(float(i < 8 * rate) for i in range(8))))
    return history, [Problem(name, "?", ("1",)) for name in rates]


def test_readmes_filter_keeps_what_is_sometimes_solved_and_is_asked_before_and_after(mine):
    rule = own_function("filter", f"{mine}:sometimes")
    history, problems = history_of({"a": 0, "b": 0.125, "c": 1, "d": 0.5, "e": 0.875})
    for filtered in (filter_mirrored_j(problems, history, rule), drop_easy(problems, history, 0, rule)):
        assert [p.id for p in filtered.kept] == ["b", "d", "e"] and [p.id for p in filtered.dropped] == ["a", "c"]
    unvisited = [*problems, Problem("f", "?", ("1",))]
    assert [p.id for p in drop_easy(unvisited, history, 0, rule).kept] == ["b", "d", "e", "f"]
    assert [p.id for p in filter_mirrored_j(problems, history).kept] == ["a", "b", "d", "e"]  # without it, as before


def test_a_stage_learns_with_all_three_and_drops_by_its_own_filter(mine, monkeypatch):
    script = [{"a": [0, 1, 0, 0], "b": [0, 0, 0, 0], "c": [0, 1, 1, 1], "d": [1, 1, 1, 1]}] * 2
    names = {"advantage": "loo", "loss": "soft", "filter": "sometimes"}
    variant = VariantSettings(**{what: f"{mine}:{name}" for what, name in names.items()})
    rows, updates, run = run_stage(script, substitute=False, rescue=False, variant=variant)
    assert all(row["grad_norm"] > 0 and math.isfinite(row["loss"]) for row in rows)
    by_problem = {int(s.tokens[1]): [] for s in updates[0][1]}
    for sequence in updates[0][1]:
        by_problem[int(sequence.tokens[1])].append(sequence.advantage)
    np.testing.assert_allclose(by_problem[1], [-1 / 3, 1, -1 / 3, -1 / 3], atol=1e-6)
    reported = []
    monkeypatch.setattr(train, "report_filter", lambda run, index, label, rule, filtered, tokens=0: reported.append(rule))
    train.drop_and_hand_on(run, 0, run.recipe.stage[0])
    assert run.state.problem_ids == ["a", "c"] and reported == [f"{mine}:sometimes"]


# -------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "what, code, why",
    [
        ("advantage", "f = 1", r"cannot be used: AttributeError: it has no callable f \(.*own.py\); fix it"),
        ("advantage", "def f(", r"SyntaxError: '\(' was never closed \(.*own.py, line 2\)"),
        ("advantage", "raise SystemExit(3)", "cannot be used: SystemExit: 3"),
        ("advantage", "def f(): pass", r"TypeError: f\(\) takes 0 positional arguments but 1 was given"),
        ("advantage", "def f(r):\n  return r['x']", r"IndexError: .*own.py, line 3\); fix it"),
        ("advantage", "def f(r): return r.mean()", r"must return a finite array of shape \(6,\), not np"),
        ("advantage", "def f(r): return r[:3]", r"of shape \(6,\), not array\(\[1., 0., 0.\]\)"),
        ("advantage", "def f(r): return list(r)", r"of shape \(6,\), not \["),
        ("advantage", "def f(r): return (r - r.mean()) / r.std()", r"not array\(\[nan, nan, nan, nan, nan, nan\]\)"),
        ("advantage", "def f(r): return r.astype(str)", "must return a finite array"),
        ("loss", "def f(l): return -l", r"f\(\) takes 1 positional argument but 2 were given"),
        ("loss", "def f(l, b): return (-l).mean()", r"must return a tensor of shape \(4,\), not tensor\(1., grad"),
        ("loss", "def f(l, b): return -l.detach()", "has the value .* and the gradient .* on policy, not finite ones"),
        ("loss", "def f(l, b): return -b.advantages.log() * l", "the loss .* has the value .*nan.* and the gradient"),
        ("loss", "def f(l, b): return ((l - b.old_logprobs) ** 2).sqrt()", r"gradient \[nan, nan, nan, nan\] on"),
        ("loss", "def f(l, b): return -l.detach().numpy()", "must return a tensor of shape"),
        ("loss", "def f(l, b): return b.advantage * l", r"has no attribute 'advantage'"),
        ("filter", "def f(r): return r < 1, 3", r"must return a bool array of shape \(3,\), not \(array"),
        ("filter", "def f(r): return np.flatnonzero(r < 3)", r"a bool array of shape \(3,\), not array\(\[0, 1"),
    ],
)
def test_a_fault_is_one_sentence_before_anything_is_sampled(tmp_path, what, code, why):
    stage = stage_of(**{what: f"{write(tmp_path, code)}:f"})
    with pytest.raises(FunctionError, match=why) as raised:
        try_out(stage)
    assert "\n" not in str(raised.value) and f"the {what} {tmp_path}/own.py:f" in str(raised.value)


@pytest.mark.parametrize("given, why", [("mine.txt:f", "cannot be read .No such file"), (":f", "must be FILE.py:FUN")])
def test_a_file_that_is_not_there(given, why):
    with pytest.raises(FunctionError, match=f"the function '?{given}'?.*{why}"):
        try_out(stage_of(loss=given))


def test_the_built_in_ones_pass_the_same_checks():
    for advantage in ("polaris", "centred", "maxrl"):
        for loss in ("polaris", "gspo", "cispo"):
            try_out(stage_of(advantage=advantage, loss=loss, importance_cap=2.0))


def test_a_fault_that_comes_late_is_a_sentence_too_but_memory_is_passed_on(tmp_path):
    code = "def f(l, b):\n  if len(l) > 9: raise ZeroDivisionError('late')\n  return -l\n"
    code += "def g(l, b): raise torch.OutOfMemoryError('CUDA out of memory')"
    path, (groups, logprobs) = write(tmp_path, code), ragged_groups(0, size=SIZE)
    try_out(stage_of(loss=f"{path}:f"))
    with pytest.raises(FunctionError, match=r"ZeroDivisionError: late \(.*own.py, line 3\)"):
        updates_of(stage_of(loss=f"{path}:f"), groups, logprobs)
    with pytest.raises(torch.OutOfMemoryError):  # the update may go on with smaller micro-batches
        VariantLoss(stage_of(loss=f"{path}:g"))(torch.zeros(2), None)


def test_it_is_averaged_as_the_variant_says(tmp_path):
    path, (groups, logprobs) = write(tmp_path, "def f(l, b): return -b.advantages * l"), ragged_groups(1, size=SIZE)
    loss = 0.0
    for _, new, _, advantage, _ in responses(groups, logprobs):
        loss -= sum(advantage * n for n in new) / len(new) / (SIZE * len(groups))
    [(stats, _)] = updates_of(stage_of(loss=f"{path}:f", average="sequences"), groups, logprobs)
    assert stats.loss == pytest.approx(loss, abs=1e-6)


# ------------------------------------------------------------------------------------------- the files of a run


def recipe_of(**own):
    stage = RlStage(data="d.jsonl", steps=1, variant=VariantSettings(**own))
    return Recipe("test", "none", (stage, stage))


def test_an_edit_is_noticed_by_a_resume_but_does_not_change_the_run(tmp_path, monkeypatch):
    path = write(tmp_path, "def f(r): return r - 1\ndef g(r): return r < 1")
    recipe = recipe_of(advantage=f"{path}:f", filter=f"{path}:g")
    assert own_functions(recipe) == {
        f"file of stage.{i}.variant.{what}": function_identity(f"{path}:{name}")
        for i in (0, 1) for what, name in [("advantage", "f"), ("filter", "g")]
    }
    monkeypatch.setattr("engine.run_folder.model_source", lambda recipe, folder: None)
    monkeypatch.setattr("engine.run_folder.model_identity", lambda folder: {})
    monkeypatch.setattr("engine.run_folder.sources", lambda recipe: set())
    then, function = run_fingerprint(recipe, tmp_path), own_function("advantage", f"{path}:f")
    path.write_text("def f(r): return r - 2")
    assert function(np.zeros(2)).tolist() == own_function("advantage", f"{path}:f")(np.zeros(2)).tolist() == [-1, -1]
    changed = differences(then, run_fingerprint(recipe, tmp_path))
    assert changed == [f"file of stage.{i}.variant.{what} changed" for i in (0, 1) for what in ("advantage", "filter")]
    assert own_functions(recipe_of()) == {} and function_identity("") is None


def test_all_processes_must_have_the_same_file(tmp_path):
    path = write(tmp_path, "def f(r): return r")
    recipe = recipe_of(advantage=f"{path}:f")

    def processes(elsewhere):
        return SimpleNamespace(device=CPU, all_gather=lambda mine: [mine, mine | elsewhere])

    try_functions(recipe, processes({}))
    with pytest.raises(FunctionError, match="the file of stage.0.variant.advantage or the file of .* differs between"):
        try_functions(recipe, processes({"file of stage.1.variant.advantage": "other"}))


def test_a_recipe_with_own_functions_survives_a_round_trip():
    assert 'filter = "mine.py:f"' in to_toml(recipe_of(filter="mine.py:f"))


def test_a_plain_update_still_has_no_variant(batch):
    groups, logprobs = batch
    [found] = updates_of(stage_of(), groups, logprobs)
    stats, gradient = fast_update(train.training_sequences(groups), logprobs, VariantLoss(stage_of()), 40)
    assert stats.loss == found[0].loss and gradient == found[1]
