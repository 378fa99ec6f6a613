"""Say before training which mechanisms of the recipe can matter, from pass rates alone (RECIPE section 9).

A stage is played REPLAYS times by the run's rules, with coins in place of the model, at unchanged chances of a right
rollout. These are not the measured rates, since 8 of 8 is no certainty: they are drawn from posteriors, under a prior
fitted to all counts by ROUNDS steps of EM from Jeffreys' prior (Laird and Louis 1991, "smoothing by roughening").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from numpy.random import Generator

from data_filter import History, Rule, Visit, kept_by
from lab.recipe import Recipe, RlStage
from lab.variants import own_function
from yarn import Rope, yarn_ramp

GRID = np.sin((np.arange(100) + 0.5) * np.pi / 200) ** 2  # chances; Jeffreys' prior is uniform over them
ROUNDS, REPLAYS, INTERVAL = 200, 100, (0.025, 0.975)
LEAST = 0.01  # a choice: what touches fewer groups, problems or responses cannot matter
PREDICTED = {  # of a stage: how it is written
    "zero_variance": ("{:.0%}", "of groups without a signal"), "skipped": ("{:.0f}", "skipped updates"),
    "rescued": ("{:.0f}", "rescues"), "dropped": ("{:.0f}", "problems dropped"),
    "truncated_share": ("{:.1%}", "of responses cut"),
}  # fmt: skip


@dataclass
class Premises:
    """Rows of mechanism, figure and verdict, and what a stage's metrics will be compared with: mean, low, high."""

    title: str
    table: list[list[str]] = field(default_factory=list)
    predicted: dict[str, list[float]] = field(default_factory=dict)

    def add(self, mechanism: str, figure: str, useless: bool | None, why: str = "", on: bool = True) -> None:
        """Add a row: whether (None: not known) and why the mechanism cannot matter, and whether the recipe uses it."""
        answer = {None: "pass rates decide: data_filter.py estimate", True: f"no: {why}", False: "yes"}[useless]
        self.table.append([mechanism + " (off)" * (not on), figure, answer])

    def __str__(self) -> str:
        rows = [["mechanism", "figure", "does it matter here?"], *self.table]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join([self.title, *(f"  {a:{first}}  {b:{second}}  {c}" for a, b, c in rows)])


def draw_chances(solved: np.ndarray, samples: np.ndarray, random: Generator) -> np.ndarray:
    """Draw the chances of N problems (REPLAYS, N), of which `solved` of `samples` rollouts (N,) were right."""
    counts, place = np.unique(solved + 1j * samples, return_inverse=True)
    right, wrong = counts.real, counts.imag - counts.real
    likelihood = np.outer(right, np.log(GRID)) + np.outer(wrong, np.log1p(-GRID))  # (counts, grid)
    likelihood = np.exp(likelihood - likelihood.max(1, keepdims=True))
    problems, prior = np.bincount(place), np.full(len(GRID), 1 / len(GRID))
    for _ in range(ROUNDS + 1):
        posterior = likelihood * prior
        posterior /= posterior.sum(1, keepdims=True)
        prior = problems @ posterior / len(place)
    chances = np.empty((REPLAYS, len(place)))
    for kind, size in enumerate(problems):
        chances[:, place == kind] = random.choice(GRID, (REPLAYS, size), p=posterior[kind])
    return chances


def replay(
    stage: RlStage, steps: int, stays: Rule, chances: np.ndarray, known: np.ndarray, held: np.ndarray, random: Generator
) -> dict[str, float]:
    """Play a stage on N problems: their chances, earlier (right, all) rollouts (2, N), whether a sink holds one."""
    problems, visits, group = len(chances), steps * stage.batch_problems, stage.group_size
    epochs = math.ceil(visits / problems)
    order = random.permuted(np.tile(np.arange(problems), (epochs, 1)), axis=1)
    visited = np.ones((epochs, problems), dtype=bool)
    visited[-1, order[-1, visits - (epochs - 1) * problems :]] = False
    right = random.binomial(group, chances, (epochs, problems)) * visited
    solved_before = np.maximum.accumulate(np.vstack([held, right > 0]))[:-1]
    rescued, informative = visited & (right == 0) & solved_before, (right > 0) & (right < group)
    signals = np.take_along_axis(informative | (rescued & stage.rescue), order, 1).ravel()[:visits]
    signals = signals.reshape(steps, stage.batch_problems).sum(1)
    seen = np.stack([right.sum(0), group * visited.sum(0)])
    solved, samples = known + seen if stage.drop_window == "all" else np.where(visited.any(0), seen, known)
    return {
        "zero_variance": 1 - informative.sum() / visits,
        "skipped": float(np.sum(signals <= stage.informative_share * stage.batch_problems)),
        "rescued": float(rescued.sum()),
        "dropped": float(np.sum(~stays(solved[samples > 0] / samples[samples > 0]))),
    }


def expect(recipe: Recipe, index: int | None, history: History, ids: list[str], rope: Rope | None = None) -> Premises:
    """Return the premises of an rl stage (None: the first) that is about to filter or train on the problems `ids`.

    Their latest visits count; one without any gets the prior of the others. `rope` is the model's.
    """
    rl = {i: s for i, s in enumerate(recipe.stage) if isinstance(s, RlStage) and i >= (index or 0)}
    index, stage = next(iter(rl.items()))
    users = [stage, *takewhile(lambda s: not s.data, [*rl.values()][1:])]  # stages that train on these problems
    planned = sum(s.steps * s.batch_problems for s in users) / max(1, len(ids))  # epochs
    found = Premises(f"stage {index}: {stage.steps:,} x {stage.batch_problems} x {stage.group_size} rollouts")
    visits = [history.visits(problem_id) or [Visit(problem_id, index, 0, ())] for problem_id in ids]
    solved, samples, tokens = np.array([(sum(v.rewards), len(v.rewards), v.tokens) for *_, v in visits] or [(0,) * 3]).T
    if samples.any():
        found.title += f", at unchanged pass rates (95% of {REPLAYS} replays)"
        if (measured := (history.settings or {}).get("temperature", stage.temperature)) != stage.temperature:
            found.title += f"\n  measured at temperature {measured}, the stage has {stage.temperature}"
        if recipe.reward.function or recipe.reward.format or recipe.reward.steps:
            found.title += "\n  by right answers alone; the reward tells more groups apart"
        rates, own = {i: history.estimate(i) for i in ids}, own_function("filter", stage.variant.filter)
        filters = stage.filter_before or history.settings is not None  # a file of pass rates is there to filter
        kept = kept_by(own or (lambda some: some < stage.drop_at), rates) if filters else rates
        keep = np.array([i in kept for i in ids])
        if filters:
            wasted = tokens[~keep].sum() / max(1, tokens.sum())
            pays = samples.mean() / stage.group_size / wasted if wasted else math.inf  # after so many epochs
            why = f"it pays after {pays:,.1f} epochs, not {planned:.1f}" if wasted else "it drops nothing"
            found.add("filter", f"drops {sum(~keep):,} of {len(ids):,}, {wasted:.1%} of tokens", planned < pays, why)
        if not keep.any():
            return found
        per_step = stage.batch_problems * stage.group_size * tokens[keep].sum() / max(1, samples[keep].sum())
        steps = int(min(stage.steps, np.ceil((stage.generated_tokens or np.inf) / max(1, per_step))))
        random = np.random.default_rng([recipe.seed, index])
        chances = draw_chances(solved, samples, random)[:, keep]
        held = np.array([any(sum(visit.rewards) for visit in own if visit.stage % 1 == 0) for own in visits])
        window = [[v for v in own if stage.drop_window == "all" or v.stage == own[-1].stage] for own in visits]
        known = np.array([(sum(sum(v.rewards) for v in own), sum(len(v.rewards) for v in own)) for own in window]).T
        stays = own or (lambda some: some <= stage.drop_above)
        played = [replay(stage, steps, stays, some, known[:, keep], held[keep], random) for some in chances]
        values = {name: [outcome[name] for outcome in played] for name in played[0]}
        found.predicted = {key: [float(np.mean(v)), *np.quantile(v, INTERVAL).tolist()] for key, v in values.items()}
        shown = ["{} ({} to {})".format(*map(PREDICTED[key][0].format, own)) for key, own in found.predicted.items()]
        empty, skipped, rescued, dropped = (mean for mean, _, _ in found.predicted.values())
        groups, problems, on = steps * stage.batch_problems, keep.sum(), stage.substitute
        found.add("substitution", f"{shown[0]} of groups lack a signal", empty < LEAST, "nearly all have one", on)
        found.add(
            "rule of a third", f"skips {shown[1]} of {steps:,} updates", skipped < 0.5, "enough have a signal", on
        )
        figure, why = f"{shown[2]}, at {groups / problems:.1f} visits a problem", "too few failures were solved before"
        found.add("rescue", figure, rescued < LEAST * groups, why, stage.rescue)
        why = "no later stage uses the rest" if users == [stage] else "too few are learned"
        found.add("drop", f"{shown[3]} of {problems:,} problems", users == [stage] or dropped < LEAST * problems, why)
        lengths = np.concatenate([visit.lengths for *_, visit in visits if visit.problem_id in kept])
        if lengths.size:
            longest, limits = lengths.max(), [user.max_response_tokens for user in users]
            shares = {limit: float(np.mean(lengths >= min(limit, longest))) for limit in limits}
            figure = ", ".join(f"{'<=' if n > longest else ''}{x:.1%} reach {n:,}" for n, x in shares.items())
            found.add("response limits", figure, max(shares.values()) < LEAST, "nearly all end before")
            if limits[0] <= longest:
                found.predicted["truncated_share"] = [shares[limits[0]]] * 3
        off = {"skipped": not stage.substitute, "rescued": not stage.rescue}
        found.predicted = {key: value for key, value in found.predicted.items() if not off.get(key)}
    else:
        figure, once = (f"{planned:.1f} visits a problem", planned <= 1 or None) if ids else ("problems unknown", None)
        found.add("rescue", figure, once, "hardly a problem comes twice", stage.rescue)
        found.add("filter, substitution, drop", "", None)
    updates = stage.variant.optimizer_steps
    why = "only rescued rollouts are off policy" if "rescued" in found.predicted else "it is on policy"
    found.add("clip-higher", f"{updates} update{'s' * (updates > 1)} a batch", updates == 1, why)
    if rope and (final := recipe.final).data:
        window, betas = final.yarn_original_window, (final.yarn_beta_fast, final.yarn_beta_slow)
        kept, pairs = np.sum(yarn_ramp(rope.theta, rope.head_dim, window, *betas).numpy() == 0), rope.head_dim // 2
        answer = "it harms: under a quarter, lower yarn_beta_fast" if 4 * kept < pairs else "yes"
        found.table.append(["YaRN", f"leaves {kept} of {pairs} pairs as they are", answer])
    return found


def compare(predicted: dict[str, list[float]], steps: Sequence[dict], dropped: int) -> tuple[dict[str, float], str]:
    """Return what a stage's "rl" rows and its drop have shown of what was predicted, and a sentence with both."""
    per = {"zero_variance": sum(row["groups"] for row in steps), "truncated_share": len(steps)}
    seen = {key: sum(row.get(key, 0) for row in steps) / per.get(key, 1) for key in predicted} | {"dropped": dropped}
    rows = [(*PREDICTED[key], own[0], seen[key]) for key, own in predicted.items()]
    words = "\n  ".join(f"predicted {how.format(was)} {what}, seen {how.format(now)}" for how, what, was, now in rows)
    return seen, f"at the pass rates before it\n  {words}"
