"""lab/tracker.py: what each tracker is given, with stand-ins for the packages."""

import sys
import tomllib
from types import ModuleType

import pytest

from lab import tracker
from lab.metrics import Metrics
from lab.recipe import RecipeError, load_recipe, to_toml

ROWS = [
    dict(kind="rl", step=10, stage=1, loss=0.5, entropy=None, verdicts={"wrong": 2}),
    dict(kind="eval", step=10, stage=1, name="held-out", avg=0.4, final=False),
]
SENT = [{"rl/loss": 0.5, "rl/verdicts/wrong": 2}, {"eval/held-out/avg": 0.4}]
GROUP = dict(
    step=10, kind="training", problem_id="a/1", prompt="3 + 4", answers=["7"], temperature=1.2, fate="rescued", replaced=0,
    responses=[dict(sample=0, verdict="right", text="x" * 5000 + "7"), dict(sample=1, verdict="wrong", text="8")],
)  # fmt: skip
SHOWN = dict(step=10, kind="training", problem_id="a/1", prompt="3 + 4", answers="['7']", temperature=1.2, fate="rescued",
             sample=0, verdict="right", text="... " + "x" * 3999 + "7")


def recipe_with(name):
    return load_recipe("recipes/tiny.toml", [f"run.tracker={name}"])


def stand_in(monkeypatch, name, **functions):
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def write_all(folder, recipe, first_step=None):
    metrics = Metrics(folder)
    metrics.tracker = tracker.open_tracker(folder, recipe, first_step)
    for row in ROWS:
        metrics.write(row)
    metrics.write_rollouts([GROUP])
    metrics.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_recipe_numbers_and_a_table(tmp_path, monkeypatch, name):
    calls = []
    stand_in(
        monkeypatch, name, init=lambda **options: calls.append(options), finish=lambda: calls.append("finish"),
        log=lambda numbers, step: calls.append((numbers, step)), Table=lambda columns, data: (columns, data),
    )  # fmt: skip
    recipe = recipe_with(name)
    for _ in range(2):  # the second launch resumes
        write_all(tmp_path, recipe)
    assert len(calls) == 10 and calls[:5] == calls[5:]
    first, *logged, last = calls[:5]
    assert first["config"] == tomllib.loads(to_toml(recipe)) and first["resume"] == "allow"
    assert first["name"] == (tmp_path / "tracker-id").read_text() and first["name"].startswith(tmp_path.name)
    assert logged[:2] == [(numbers, 10) for numbers in SENT] and last == "finish"
    assert logged[2] == ({"rollouts": (list(SHOWN), [list(SHOWN.values())])}, 10)


def test_a_tracker_that_does_not_start_is_one_sentence(tmp_path, monkeypatch):
    def init(**options):
        raise ValueError("api_key not configured (no-tty)\nmore")

    stand_in(monkeypatch, "wandb", init=init)
    with pytest.raises(RecipeError, match=r'"wandb" cannot start \(api_key not configured \(no-tty\)\): log in'):
        tracker.open_tracker(tmp_path, recipe_with("wandb"), None)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="needs a package: `pip install trackio`"):
        tracker.require_tracker("trackio")
    tracker.require_tracker("")


def test_tensorboard_gets_scalars_and_purges_dropped_steps(tmp_path, monkeypatch):
    calls = []

    class Board:
        def __init__(self, folder, purge_step=None):
            calls.append(("open", purge_step))

        def add_text(self, tag, text, step):
            calls.append((tag, text, step))

        def add_scalar(self, tag, value, step):
            calls.append({tag: value})

        def close(self):
            calls.append("close")

    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Board)
    write_all(tmp_path, recipe_with("tensorboard"), first_step=4)
    texts = [call for call in calls if isinstance(call, tuple)]
    assert texts[0] == ("open", 4) and "| `reward_mean` | rl |" in texts[1][1] and "kind = " in texts[2][1]
    assert texts[3][0] == "rollouts/0" and "**temperature**\n\n```\n1.2\n```" in texts[3][1] and len(texts) == 4
    assert [call for call in calls if isinstance(call, dict)] == [{k: v} for row in SENT for k, v in row.items()]
    assert calls[-1] == "close"
