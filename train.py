"""The POLARIS recipe, from a model to a better one: read it straight down.

    torchrun train.py                                            # the laptop world, from nothing to a report
    torchrun --nproc-per-node 8 train.py recipes/polaris-4b.toml
    python train.py recipes/tiny.toml --set stage.1.temperature=1.1
    torchrun train.py recipes/tiny.toml --resume                 # go on where it stopped, or begin
    python train.py recipes/polaris-4b.toml --plan --device 80GB --gpus 8    # will it fit, what does it cost?

A recipe is a list of stages. An `sft` stage imitates worked solutions. An `rl` stage learns from the answer alone:

    filter      once, before training: drop the problems that the model always solves
    temperature the recipe's, or the one that restores the diversity of the stage before
    each step   8 rollouts of each problem -> rewards -> rescue -> substitute -> advantages -> one update
    drop        after the stage: problems solved more than 9 times in 10

At the end the model is evaluated longer than it was trained, with and without YaRN, and report.html is written.
Departures from the official code are listed in the README.
"""

import argparse
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from data_filter import (
    BEFORE_STAGE,
    ESTIMATE_DRAW,
    DataOrder,
    Filtered,
    Visit,
    draw_histogram,
    drop_easy,
    estimate,
    filter_mirrored_j,
    require_batch,
    zero_variance_share,
)
from engine import device as devices
from engine.attempts import Attempt, AttemptStats, GraderError
from engine.batches import TrainingSequence
from engine.checkpoint import CheckpointError
from engine.device import Interrupted, RankError
from engine.fingerprint import fingerprint
from engine.run import (
    SEARCH_DRAW,
    Run,
    Stopped,
    by_ids,
    data_path,
    describe_update,
    end_step,
    evaluation_sampling,
    how_to_go_on,
    make_optimizer,
    save_and_stop,
    save_whole_step,
    set_learning_rate,
    stage_problems,
    start_run,
    training_problems,
    training_sampling,
    update_model,
)
from engine.run_folder import FINISHED, WANTS_RESUMING, final_config, problems_of, steps_left
from eval import evaluate, match_diversity, measure_temperature
from grpo import Group, Substitution, UpdateError, substitute, supervised_loss
from lab.evaluation import print_evaluation
from lab.page import write_report
from lab.plan import add_plan_options, read_machine, show_plan
from lab.problems import DataError, Problem
from lab.recipe import Recipe, RecipeError, RlStage, SftStage, load_recipe
from lab.report import MetricsError
from lab.responses import respond
from lab.scores import Evaluation, Response, summarise
from lab.variants import choose_loss, mini_batches, over_steps, punish_overlong
from model import ModelError, save
from rollout import RolloutError, distinct_ngrams

# what a person can put right: one sentence, no traceback
EXPECTED_ERRORS = (
    RecipeError,
    ModelError,
    DataError,
    RolloutError,
    GraderError,
    CheckpointError,
    UpdateError,
    MetricsError,
    RankError,
    ImportError,
    OSError,
)


# ------------------------------------------------------------------------------------------------------ the run


def train(run: Run) -> None:
    """Stages in order, then the last evaluation and the report."""
    state = run.state
    for index in range(state.stage, len(run.recipe.stage)):
        stage = run.recipe.stage[index]
        run.stage_began, run.stage_first_step = time.perf_counter(), state.stage_step
        if isinstance(stage, SftStage):
            sft_stage(run, index, stage)
        else:
            rl_stage(run, index, stage)
        export = run.folder / f"stage-{index}"
        if run.device.is_main and export.exists() and state.stage_step > run.stage_first_step:
            # of steps that came after the checkpoint that this launch goes on from: `save` removes it
            export.rename(export.with_name(f"{export.name}.unfinished"))
        if not run.device.share(export.exists()):
            save(run.model, export, run.device.compute_dtype, tokenizer_from=run.model_folder)
        if isinstance(stage, RlStage):
            drop_and_hand_on(run, index, stage)
        state.stage, state.stage_step, state.stage_tokens, state.position = index + 1, 0, 0, 0
        state.prepared = False
    final_evaluation(run)


def sft_stage(run: Run, index: int, stage: SftStage) -> None:
    """Imitate worked solutions: cross-entropy on the assistant's tokens, packed, the mean over all of them."""
    state = run.state
    sequences = run.sft_sequences[index]
    run.device.say(f"stage {index}: sft on {len(sequences):,} solutions, {stage.steps} steps")
    optimizer = make_optimizer(run, stage)
    while state.stage_step < stage.steps:
        begun = time.perf_counter()
        epoch_order = [run.recipe.seed, index]
        batch = sft_batch(sequences, stage.batch_sequences, state.stage_step, epoch_order)
        set_learning_rate(optimizer, learning_rate(stage, state.stage_step))
        update = update_model(run, optimizer, batch, supervised_loss, stage)
        seconds = time.perf_counter() - begun
        row = {
            "kind": "sft",
            "loss": update.loss,
            "grad_norm": update.grad_norm,
            "nonfinite": int(not update.stepped),
            "lr": learning_rate(stage, state.stage_step),
            "tokens": sum(len(sequence.tokens) for sequence in batch),
            "micro_batch_tokens": update.micro_batch_tokens,
            "memory_retries": update.memory_retries,
            "seconds": seconds,
        }
        row["tokens_per_s"] = row["tokens"] / seconds
        end_step(run, index, stage, row, optimizer)


def rl_stage(run: Run, index: int, stage: RlStage) -> None:
    """Learn from verifiable rewards: see the top of this file."""
    state, recipe = run.state, run.recipe
    problems = stage_problems(run, index, stage)
    if not state.prepared:
        if stage.filter_before:
            problems = estimate_and_filter(run, index, stage, problems)
        choose_temperature(run, index, stage, problems)
        held_out_evaluation(run, index, f"before stage {index}")
        state.problem_ids, state.prepared = [problem.id for problem in problems], True
        state.metrics_position = list(run.metrics.position)  # a stop in the first step must not lose their rows
    order = DataOrder(problems, stage.batch_problems, recipe.seed, index)
    loss = choose_loss(stage)  # grpo.PolicyLoss, unless the stage asks for a variant
    sink_is_used = any(isinstance(later, RlStage) and later.rescue for later in recipe.stage[index:])
    optimizer = make_optimizer(run, stage)
    run.device.say(
        f"stage {index}: rl on {len(problems):,} problems, {stage.steps} steps of {stage.batch_problems} x "
        f"{stage.group_size}, temperature {state.temperature:g}, {stage.max_response_tokens:,} tokens"
    )
    while steps_left(stage, state):
        begun = time.perf_counter()
        # sample and grade: 8 rollouts of each problem of the batch
        batch = order.batch(state.position)
        sampling = training_sampling(run, stage, state.temperature, draw=state.step)
        try:
            if recipe.eval.every_steps and state.stage_step and state.stage_step % recipe.eval.every_steps == 0:
                held_out_evaluation(run, index, f"after step {state.step}", within_stage=True)
            lengths = [state.history.response_tokens(problem.id) for problem in batch]
            attempts, work = run.respondent.attempt(batch, stage.group_size, sampling, expected_tokens=lengths)
        except Interrupted:  # nothing of this step has been recorded or learned
            save_and_stop(run, optimizer)
        except GraderError:
            save_whole_step(run, optimizer)
            raise
        groups = make_groups(recipe, batch, attempts)
        row = describe(groups, attempts, work)  # of the original rewards: before rescue and substitution
        record_visits(run, index, groups)
        write_rollouts(run, groups, attempts)

        # give a signal to groups that have none
        if sink_is_used:
            state.sinks.remember(groups)
        if stage.rescue:
            groups = state.sinks.rescue(groups, recipe.seed, state.step)
        row["rescued"] = sum(group.rescued is not None for group in groups)
        groups = punish_overlong(groups, stage)  # a variant: POLARIS leaves the rewards as they are
        substitution = Substitution(groups, 0, skip_update=False)
        if stage.substitute:
            substitution = substitute(groups, recipe.seed, state.step, stage.informative_share)
        row["substituted"] = substitution.substituted

        # learn: one optimizer step on the whole batch; a variant may leave some of it out, or make several steps
        set_learning_rate(optimizer, learning_rate(stage, state.stage_step))
        updates, update_begun = [], time.perf_counter()
        if not substitution.skip_update:
            for sequences, divisor in mini_batches(substitution.groups, stage):
                begun_already = any(one.stepped for one in updates)
                updates.append(update_model(run, optimizer, sequences, loss, stage, divisor, begun_already))
        update = over_steps(updates)
        state.position += stage.batch_problems
        state.stage_tokens += row["tokens"]
        row |= describe_update(update, time.perf_counter() - update_begun)
        row |= {
            "micro_batch_tokens": run.micro_batch_tokens,
            "memory_retries": update.memory_retries if update else 0,
            "optimizer_steps": sum(one.stepped for one in updates),
            "temperature": state.temperature,
            "lr": learning_rate(stage, state.stage_step),
            "seconds": time.perf_counter() - begun,
            "problems": len(problems),
            "epoch": state.position / len(problems),
            "max_response_tokens": stage.max_response_tokens,
            "peak_memory_gib": run.device.peak_memory_gib(),
        }
        end_step(run, index, stage, row, optimizer)


def final_evaluation(run: Run) -> None:
    """Held-out problems once more, then longer responses than training allowed, with and without YaRN."""
    recipe, final = run.recipe, run.recipe.final
    held_out_evaluation(run, len(recipe.stage) - 1, "after training", final=True)
    if final.data:
        problems = problems_of(data_path(run, final.data))
        trained = run.model.config
        extended = final_config(trained, recipe)
        # without scaling, the same positions: rotary angles have no end, only an untrained part
        unscaled = replace(trained, max_position_embeddings=extended.max_position_embeddings)
        for name, config in {"beyond the window, no YaRN": unscaled, "beyond the window, YaRN": extended}.items():
            run.model.config = config
            run.model.set_rope(config.rope)
            sampling = evaluation_sampling(run, final)
            groups = evaluate(run.respondent, name, problems, final.samples, sampling, label=name)
            found = summarise(name, problems, groups, sampling.temperature, sampling.max_new_tokens)
            report_evaluation(run, len(recipe.stage) - 1, found, final=True)
        run.model.config = trained
        run.model.set_rope(trained.rope)


# ----------------------------------------------------------------------------------------- preparing an rl stage


def estimate_and_filter(run: Run, index: int, stage: RlStage, problems: list[Problem]) -> list[Problem]:
    """Pass rates of the model about to be trained, 8 rollouts each; the always solved are dropped.

    Estimates are kept in pass-rates-INDEX.jsonl, and an interrupted run goes on from there.
    """
    path = run.folder / f"pass-rates-{index}.jsonl"
    sampling = training_sampling(run, stage, run_temperature(run, stage), draw=ESTIMATE_DRAW)
    trained = run.folder / f"stage-{index - 1}" if index else run.model_folder  # the model in hand, as files
    weights = run.device.share(fingerprint(trained) if run.device.is_main else None)
    visits = (index + BEFORE_STAGE, run.state.step)
    known = estimate(run.respondent, problems, stage.group_size, sampling, path, weights, *visits)
    for problem in problems:
        for visit in known.visits(problem.id):
            run.state.history.append(visit)
    filtered = filter_mirrored_j(problems, run.state.history, stage.drop_at, group_size=stage.group_size)
    tokens = sum(visit.tokens for problem in problems for visit in known.visits(problem.id))
    report_filter(run, index, f"before stage {index}", f"pass rate below {stage.drop_at:g}", filtered, tokens)
    require_batch(filtered, stage.batch_problems)
    share = zero_variance_share(filtered.known_rates(filtered.kept), stage.group_size)
    run.device.say(f"expected share of groups without a signal: {share:.0%}")
    return filtered.kept


def run_temperature(run: Run, stage: RlStage) -> float:
    """The stage's own temperature, or the one before while a search is still to come."""
    return run.state.temperature if isinstance(stage.temperature, str) else float(stage.temperature)


def choose_temperature(run: Run, index: int, stage: RlStage, problems: list[Problem]) -> None:
    """Set the stage's temperature: the recipe's own, or the one that restores the diversity of the first stage.

    Diversity is measured in every stage on the same problems and with the same limit, those of the first.
    """
    search, state = run.recipe.search, run.state
    if not state.probe_ids:
        probe = DataOrder(problems, min(search.problems, len(problems)), run.recipe.seed, index).batch(0)
        state.probe_ids, state.probe_tokens = [problem.id for problem in probe], stage.max_response_tokens
    probe, tokens = probe_problems(run), 0

    def answer(problems: list[Problem], temperature: float) -> list[list[Response]]:
        nonlocal tokens
        sampling = training_sampling(run, stage, temperature, draw=SEARCH_DRAW)
        sampling = replace(sampling, max_new_tokens=state.probe_tokens)
        groups = respond(run.respondent, "temperature", problems, search.samples, sampling)
        tokens += sum(response.tokens for group in groups for response in group)
        return groups

    start, target = run_temperature(run, stage), state.diversity if stage.temperature == "match" else None
    if target is None:
        curve = [measure_temperature(answer, probe, start, search.margin)]
        state.temperature, state.diversity = curve[0].temperature, curve[0].distinct4
    else:
        state.temperature, curve = match_diversity(
            answer, probe, target, start, search.step, search.most, search.margin, run.device.say
        )
    chosen = next(point for point in curve if point.temperature == state.temperature)
    restored = "" if target is None else f" (to restore {target:.3f})"
    run.device.say(
        f"stage {index}: temperature {state.temperature:g}, distinct-4 {chosen.distinct4 or 0:.3f}{restored}"
    )
    row = {"kind": "temperature", "step": state.step, "stage": index, "label": f"before stage {index}"}
    row |= {"target_distinct4": target, "chosen": state.temperature, "curve": [point.row() for point in curve]}
    row |= {"tokens": tokens}
    run.metrics.write(row)


def probe_problems(run: Run) -> list[Problem]:
    """The problems on which diversity is measured, wherever they come from."""
    sources = [stage.data for stage in run.recipe.stage if isinstance(stage, RlStage) and stage.data]
    problems = [problem for source in sources for problem in training_problems(run, "rl", source)]
    return by_ids(problems, run.state.probe_ids, ", ".join(sources))


def drop_and_hand_on(run: Run, index: int, stage: RlStage) -> None:
    """Drop what the model has learned; the rest is the next stage's data."""
    problems = stage_problems(run, index, stage)
    filtered = drop_easy(
        problems, run.state.history, index, stage.drop_above, stage.drop_window, group_size=stage.group_size
    )
    report_filter(run, index, f"after stage {index}", f"accuracy above {stage.drop_above:g}", filtered)
    run.state.problem_ids = [problem.id for problem in filtered.kept]
    later = [s for s in run.recipe.stage[index + 1 :] if isinstance(s, RlStage)]
    if later and not later[0].data:
        require_batch(filtered, later[0].batch_problems)


def report_filter(run: Run, index: int, label: str, rule: str, filtered: Filtered, tokens: int = 0) -> None:
    """Show a filter's two histograms, and keep them for the report; `tokens` were generated to know the rates."""
    run.device.say(f"{label}: kept {len(filtered.kept):,}, dropped {len(filtered.dropped):,} (rule: {rule})")
    run.device.say(draw_histogram(filtered.before, filtered.after))
    row = {"kind": "filter", "step": run.state.step, "stage": index, "label": label, "rule": rule}
    row |= {"before": filtered.before, "after": filtered.after, "tokens": tokens}
    run.metrics.write(row | {"kept": len(filtered.kept), "dropped": len(filtered.dropped)})


# ----------------------------------------------------------------------------------------------- inside a step


def make_groups(recipe: Recipe, problems: list[Problem], attempts: list[list[Attempt]]) -> list[Group]:
    """One group per problem; the reward is the weighted sum of its parts."""
    weights, groups = recipe.reward, []
    for problem, group in zip(problems, attempts, strict=True):
        parts = np.array([(a.grade.correct, a.grade.format, a.grade.steps) for a in group])  # (G, 3)
        rewards = parts @ np.array([weights.correct, weights.format, weights.steps])
        groups.append(Group(problem, [attempt.rollout for attempt in group], rewards, parts[:, 0] > 0))
    return groups


def record_visits(run: Run, index: int, groups: list[Group]) -> None:
    """Every problem's pass rate and length of responses follow the training; rewards are the original ones."""
    for group in groups:
        solved = tuple(float(right) for right in group.correct)
        tokens = sum(len(rollout.tokens) for rollout in group.rollouts)
        run.state.history.append(Visit(group.problem.id, index, run.state.step, solved, tokens))


def describe(groups: list[Group], attempts: list[list[Attempt]], work: AttemptStats) -> dict:
    """The batch as it was sampled, in numbers."""
    flat = [attempt for group in attempts for attempt in group]
    lengths = np.array([len(attempt.rollout.tokens) for attempt in flat])
    solved = np.array([group.correct.mean() for group in groups])
    diversity, left_out = distinct_ngrams([[attempt.text for attempt in group] for group in attempts])
    return {
        "kind": "rl",
        "reward_mean": float(np.mean([group.rewards.mean() for group in groups])),
        "accuracy": float(solved.mean()),
        "reward_correct": float(np.mean([attempt.grade.correct for attempt in flat])),
        "reward_format": float(np.mean([attempt.grade.format for attempt in flat])),
        "reward_steps": float(np.mean([attempt.grade.steps for attempt in flat])),
        "verdicts": dict(Counter(attempt.grade.verdict for attempt in flat)),
        "response_length_mean": float(lengths.mean()),
        "response_length_max": int(lengths.max()),
        "truncated_share": float(np.mean([attempt.rollout.finish_reason == "length" for attempt in flat])),
        "distinct4": diversity,
        "distinct4_left_out": left_out,
        "entropy": float(-np.concatenate([attempt.rollout.logprobs for attempt in flat]).mean()),
        "groups": len(groups),
        "solve_none": int((solved == 0).sum()),
        "solve_all": int((solved == 1).sum()),
        "zero_variance": sum(not group.informative for group in groups),
        "tokens": int(lengths.sum()),
        "problems_hash": short_hash(group.problem.id.encode() for group in groups),
        "tokens_hash": short_hash(attempt.rollout.tokens.tobytes() for attempt in flat),
        "idle_share": work.idle_share,
        "idle_shares": list(work.idle_shares),
        "seconds_sample": work.sample_seconds,
        "seconds_grade": work.grade_seconds,
        "sample_tokens_per_s": work.tokens / work.sample_seconds,
        "preemptions": work.preemptions,
        "sample_memory_retries": work.memory_retries,
    }


def short_hash(parts: Iterable[bytes]) -> str:
    """Equal in two runs that drew the same, whatever their layout."""
    return hashlib.blake2b(b"/".join(parts), digest_size=8).hexdigest()


def write_rollouts(run: Run, groups: list[Group], attempts: list[list[Attempt]]) -> None:
    """A few whole rollouts of this step, for people to read."""
    rows = []
    for group, tried in list(zip(groups, attempts, strict=True))[: run.recipe.run.rollouts_written]:
        attempt = tried[0]
        rows.append(
            {
                "step": run.state.step + 1,
                "problem_id": group.problem.id,
                "problem_text": group.problem.text,
                "answers": list(group.problem.answers),
                "response": attempt.text,
                "verdict": attempt.grade.verdict,
                "reward": float(group.rewards[0]),
                "group_accuracy": float(group.correct.mean()),
                "tokens": len(attempt.rollout.tokens),
                "finish_reason": attempt.rollout.finish_reason,
                "temperature": attempt.rollout.temperature,
            }
        )
    run.metrics.write_rollouts(rows)


# --------------------------------------------------------------------------------------------------- evaluation


def held_out_evaluation(run: Run, index: int, label: str, within_stage: bool = False, final: bool = False) -> None:
    """avg@k on problems that are never trained on."""
    settings = run.recipe.eval
    if not settings.data:
        return
    most = (settings.problems_within_stage if within_stage else 0) or settings.problems or None
    problems = problems_of(data_path(run, settings.data))[:most]
    sampling = evaluation_sampling(run, settings)
    groups = evaluate(run.respondent, "held-out", problems, settings.samples, sampling, label=f"held-out, {label}")
    found = summarise("held-out", problems, groups, sampling.temperature, sampling.max_new_tokens)
    report_evaluation(run, index, found, final)


def report_evaluation(run: Run, index: int, found: Evaluation, final: bool) -> None:
    """Show an evaluation and keep it for the report."""
    if run.device.is_main:
        print_evaluation(found)
    row = {"kind": "eval", "step": run.state.step, "stage": index, "final": final} | asdict(found)
    for grouping in ("by_type", "by_difficulty"):
        row[grouping] = {label: group["avg"] for label, group in row[grouping].items()}
    run.metrics.write(row)


# ----------------------------------------------------------------------------------------- batches and optimizer


def sft_batch(sequences: list[TrainingSequence], size: int, step: int, seed: list[int]) -> list[TrainingSequence]:
    """The batch of a step: epochs are permutations drawn from the seed, so that the step alone says what it is."""
    per_epoch = len(sequences) // size
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([*seed, epoch]).permutation(len(sequences))
    return [sequences[i] for i in order[place * size : (place + 1) * size]]


def learning_rate(stage: SftStage | RlStage, step: int) -> float:
    """Constant, after a linear warm-up; an sft stage may fall linearly to a tenth at its end."""
    rate = stage.learning_rate * min(1.0, (step + 1) / max(stage.warmup_steps, 1))
    if isinstance(stage, RlStage) or not stage.decay_share:
        return rate
    return rate * max(0.1, min(1.0, (stage.steps - step) / (stage.decay_share * stage.steps)))


def main() -> None:
    """Run a recipe, or go on with one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=Path(__file__).parent / "recipes" / "tiny.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="such as stage.1.temperature=1.1"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the run's folder is made")
    parser.add_argument(
        "--resume", nargs="?", const=True, type=Path, metavar="RUN",
        help="go on with this run, or without a name with the newest unfinished one of the recipe, if there is one",
    )  # fmt: skip
    parser.add_argument(
        "--resume-anyway", action="store_true", help="although recipe, data, model or code are not what they were"
    )
    parser.add_argument("--plan", action="store_true", help="say what memory, time and money it takes, and run nothing")
    add_plan_options(parser)
    arguments = parser.parse_args()
    arguments.resume = arguments.resume or arguments.resume_anyway or None
    run, status = None, 0
    try:
        if arguments.plan:
            sys.exit(not show_plan(load_recipe(arguments.recipe, arguments.set), read_machine(arguments)))
        run = start_run(arguments, devices.start())
        train(run)
        run.metrics.close()
        if run.device.is_main:
            print(f"report in {write_report(run.folder)}")
            (run.folder / FINISHED).write_text(f"after step {run.state.step}\n")
    except (Stopped, Interrupted) as stopped:
        # Interrupted is raised between stages: what the last checkpoint holds is all there is
        if run.device.is_main:  # torchrun hides the exit code of its workers
            (run.folder / WANTS_RESUMING).write_text(f"{how_to_go_on(run)}\n")
        run.device.say(stopped if isinstance(stopped, Stopped) else f"stopped; go on with: {how_to_go_on(run)}")
    except Exception as error:
        status = devices.last_words(error, "train.py", EXPECTED_ERRORS)
    finally:
        if run is not None:
            run.respondent.grader.close()
            if run.lock is not None:
                os.close(run.lock)
        devices.stop()
    devices.leave(status)


if __name__ == "__main__":
    main()
