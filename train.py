"""The POLARIS recipe, from a model to a better one: read it straight down.

    torchrun train.py                                            # the laptop world, from nothing to a report
    torchrun --nproc-per-node 8 train.py recipes/polaris-4b.toml
    python train.py recipes/tiny.toml --set stage.1.temperature=1.1
    python train.py --set stage.rl.learning_rate=1e-4,3e-4 --seeds 0 1 2     # a sweep, with a page that compares
    torchrun train.py recipes/tiny.toml --resume                 # go on where it stopped, or begin
    python train.py recipes/polaris-4b.toml --plan --device 80GB --gpus 8    # will it fit, what does it cost?

A recipe is a list of stages. An `sft` stage imitates worked solutions. An `rl` stage learns from the answer alone:

    filter      once, before training: drop the problems that the model always solves
    temperature the recipe's, or the one that restores the previous (or the first) stage's diversity
    each step   8 rollouts of each problem -> rewards -> rescue -> substitute -> advantages -> one update
    drop        after the stage: problems solved more than 9 times in 10

At the end the model is evaluated longer than it was trained, with and without YaRN, where the recipe has [final].
Every run writes report.html.
RECIPE.md has the facts, and where this project departs from the published recipe and code.
"""

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    from engine.terminal import prepare_terminal

    prepare_terminal()
    from lab.options import training_arguments

    ARGUMENTS = training_arguments(__doc__)

import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from textwrap import fill

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
)
from engine import distributed
from engine.distributed import Interrupted, StopRequest
from engine.grader import GraderError
from engine.rollout_worker import Attempt
from engine.run import Run
from engine.start import final_config, start_run
from eval import Response, evaluate, match_diversity, measure_temperature
from grpo import (
    Group,
    PolicyLoss,
    Substitution,
    TrainingSequence,
    substitute,
    supervised_loss,
    training_sequences,
)
from lab import premises, rows, variants
from lab.problems import Problem
from lab.recipe import Recipe, RlStage, SftStage, VariantSettings
from lab.scores import Evaluation, print_evaluation, summarise

MOMENTS = 10  # of a stage, at most, at which groups are written for people to read
SEARCH_DRAW = -3  # temperature searches draw from a place that no training step counts from


# ------------------------------------------------------------------------------------------------------ the run


def train(run: Run) -> None:
    """Stages in order, then the last evaluation."""
    state = run.state
    for index in range(state.stage, len(run.recipe.stage)):
        stage = run.recipe.stage[index]
        run.stage_began, run.stage_first_step = time.perf_counter(), state.stage_step
        try:
            if isinstance(stage, SftStage):
                sft_stage(run, index, stage)
            else:
                rl_stage(run, index, stage)
        except (Interrupted, GraderError):  # nothing of the step under way has been learned
            run.save()
            raise
        run.optimizer = None
        run.export_model(index)
        if isinstance(stage, RlStage):
            drop_and_hand_on(run, index, stage)
        state.stage, state.stage_step, state.stage_tokens, state.position = index + 1, 0, 0, 0
        state.prepared = False
    final_evaluation(run)


def sft_stage(run: Run, index: int, stage: SftStage) -> None:
    """Imitate worked solutions: cross-entropy on the assistant's tokens, packed, the mean over all of them."""
    state, sequences = run.state, run.sft_sequences[index]
    run.processes.say(f"stage {index}: sft on {len(sequences):,} solutions, {stage.steps} steps")
    run.begin_steps(stage)
    while state.steps_left(stage):
        begun = time.perf_counter()
        batch = sft_batch(sequences, stage.batch_sequences, state.stage_step, [run.recipe.seed, index])
        rate = learning_rate(stage, state.stage_step)
        update = run.update(batch, supervised_loss, stage, learning_rate=rate)
        run.end_step(index, stage, rows.sft_row(batch, update, rate, time.perf_counter() - begun))


def rl_stage(run: Run, index: int, stage: RlStage) -> None:
    """Learn from verifiable rewards: see the top of this file."""
    state, recipe = run.state, run.recipe
    problems = run.stage_problems(index)
    if not state.prepared:
        unfiltered = problems
        if stage.filter_before:
            problems = estimate_and_filter(run, index, stage, problems)
        say_premises(run, index, unfiltered)
        choose_temperature(run, index, stage, problems)
        held_out_evaluation(run, index, f"before stage {index}")
        state.problem_ids, state.prepared = [problem.id for problem in problems], True
    order = DataOrder(problems, stage.batch_problems, recipe.seed, index)
    loss = PolicyLoss(stage.clip_low, stage.clip_high, stage.dual_clip)
    sinks_are_used = any(isinstance(later, RlStage) and later.rescue for later in recipe.stage[index:])
    is_variant = stage.variant != VariantSettings()
    run.begin_steps(stage)
    run.processes.say(
        f"stage {index}: rl on {len(problems):,} problems, {stage.steps} steps of {stage.batch_problems} x "
        f"{stage.group_size}, temperature {state.temperature:g}, {stage.max_response_tokens:,} tokens"
    )
    while state.steps_left(stage):
        if recipe.eval.every_steps and state.stage_step and state.stage_step % recipe.eval.every_steps == 0:
            held_out_evaluation(run, index, f"after step {state.step}", within_stage=True)
        begun = time.perf_counter()

        # sample and grade: a group of rollouts of each problem of the batch
        batch = order.batch(state.position)
        sampling = run.sampling(stage, state.temperature, draw=state.step)
        lengths = [state.history.response_tokens(problem.id, index, state.step) for problem in batch]
        attempts, work = run.worker.attempt(batch, stage.group_size, sampling, expected_tokens=lengths)
        groups = make_groups(recipe, batch, attempts)
        row = rows.describe_groups(groups, attempts, work)  # of the original rewards: before rescue and substitution
        record_visits(run, index, groups)

        # give a signal to groups that have none
        if sinks_are_used:
            state.sinks.remember(groups)
        if stage.rescue:
            groups = state.sinks.rescue(groups, recipe.seed, state.step)
        rescued = sum(group.rescued is not None for group in groups)
        if is_variant:
            groups = variants.punish_overlong(groups, stage)
        learned = Substitution(groups, 0, skip_update=False)
        if stage.substitute:
            learned = substitute(groups, recipe.seed, state.step, stage.informative_share)
        if (most := recipe.run.rollouts_written) and state.stage_step % -(-stage.steps // MOMENTS) == 0:
            where = {"step": state.step + 1, "stage": index, "kind": "training"}
            run.metrics.write_rollouts(rows.groups_to_read(where, run.worker, attempts, groups, learned.groups)[:most])

        # learn: advantages, loss, one optimizer step on the whole batch
        rate, update, update_begun = learning_rate(stage, state.stage_step), None, time.perf_counter()
        if is_variant and not learned.skip_update:
            update = variants.update(partial(run.update, learning_rate=rate), learned.groups, stage)
        elif not learned.skip_update:
            update = run.update(training_sequences(learned.groups), loss, stage, learning_rate=rate)
        now = time.perf_counter()
        state.position += stage.batch_problems
        state.stage_tokens += row["tokens"]
        row |= rows.describe_update(update, now - update_begun) | {
            "rescued": rescued,
            "substituted": learned.substituted,
            "micro_batch_tokens": run.micro_batch_tokens,
            "temperature": state.temperature,
            "lr": rate,
            "seconds": now - begun,
            "problems": len(problems),
            "epoch": state.position / len(problems),
            "max_response_tokens": stage.max_response_tokens,
            "peak_memory_gib": run.processes.peak_memory_gib(),
        }
        run.end_step(index, stage, row)


def final_evaluation(run: Run) -> None:
    """Held-out problems once more, then longer responses than training allowed, with and without YaRN."""
    recipe, final, model = run.recipe, run.recipe.final, run.model
    held_out_evaluation(run, len(recipe.stage) - 1, "after training", final=True)
    if final.data:
        problems, sampling = run.data.problems(final.data), run.evaluation_sampling(final)
        trained = model.config
        extended = final_config(trained, recipe)
        # without scaling, the same positions: rotary angles have no end, only an untrained part
        unscaled = replace(trained, max_position_embeddings=extended.max_position_embeddings)
        for name, config in {"beyond the window, no YaRN": unscaled, "beyond the window, YaRN": extended}.items():
            model.config = config
            model.set_rope(config.rope)
            groups = evaluate(run.worker, name, problems, final.samples, sampling, label=name)
            found = summarise(name, problems, groups, sampling.temperature, sampling.max_new_tokens)
            report_evaluation(run, len(recipe.stage) - 1, found, final=True)
        model.config = trained
        model.set_rope(trained.rope)


# ----------------------------------------------------------------------------------------- preparing an rl stage


def estimate_and_filter(run: Run, index: int, stage: RlStage, problems: list[Problem]) -> list[Problem]:
    """Pass rates of the model about to be trained, 8 rollouts each; the always solved are dropped.

    Estimates are kept in pass-rates-INDEX.jsonl, and an interrupted run resumes from there.
    """
    path, history = run.folder / f"pass-rates-{index}.jsonl", run.state.history
    sampling = run.sampling(stage, run_temperature(run, stage), draw=ESTIMATE_DRAW)
    identity = run.identity(index, problems)
    visits = (index + BEFORE_STAGE, run.state.step)
    known = estimate(run.worker, problems, stage.group_size, sampling, path, identity, *visits, restart=True)
    estimated = [visit for problem in problems for visit in known.visits(problem.id)]
    for visit in estimated:
        history.append(visit)
    drop_at = variants.own_function("filter", stage.variant.filter) or stage.drop_at
    filtered = filter_mirrored_j(problems, history, drop_at, group_size=stage.group_size)
    tokens = sum(visit.tokens for visit in estimated)
    rule = stage.variant.filter or f"pass rate below {stage.drop_at:g}"
    report_filter(run, index, f"before stage {index}", rule, filtered, tokens)
    require_batch(filtered, stage.batch_problems)
    return filtered.kept


def say_premises(run: Run, index: int, problems: list[Problem]) -> None:
    """Say which mechanisms can matter in the stage, where pass rates are known; its end compares what was predicted."""
    found = premises.expect(run.recipe, index, run.state.history, [problem.id for problem in problems])
    run.state.predicted = found.predicted
    if found.predicted:
        run.processes.say(f"premises of {found}")
        row = {"kind": "premises", "label": f"before stage {index}", "predicted": found.predicted}
        run.record(index, row | {"table": found.table})


def run_temperature(run: Run, stage: RlStage) -> float:
    """The stage's own temperature, or the one before while a search is still to come."""
    return run.state.temperature if isinstance(stage.temperature, str) else float(stage.temperature)


def choose_temperature(run: Run, index: int, stage: RlStage, problems: list[Problem]) -> None:
    """Set the stage's temperature: the recipe's own, or the one that restores an earlier diversity.

    The target is the diversity at the start of the previous rl stage, or of the first ("match-first"). It is measured
    in every stage on the same problems and with the same limit, those of the first.
    """
    search, state = run.recipe.search, run.state
    if not state.probe_ids:
        probe = DataOrder(problems, min(search.problems, len(problems)), run.recipe.seed, index).batch(0)
        state.probe_ids, state.probe_tokens = [problem.id for problem in probe], stage.max_response_tokens
    probe, tokens = run.probe_problems(), 0

    def answer(problems: list[Problem], temperature: float) -> list[list[Response]]:
        nonlocal tokens
        sampling = replace(run.sampling(stage, temperature, draw=SEARCH_DRAW), max_new_tokens=state.probe_tokens)
        groups = evaluate(run.worker, "temperature", problems, search.samples, sampling)
        tokens += sum(response.tokens for group in groups for response in group)
        return groups

    start, target, restores = run_temperature(run, stage), None, None
    if isinstance(stage.temperature, str) and state.diversity is not None:
        restores = stage.temperature.removeprefix("match-")
        # a checkpoint of an older version has the first one alone
        target = state.diversity if restores == "first" else state.previous_diversity or state.diversity
        bounds = search.step, search.most, search.margin
        state.temperature, curve = match_diversity(answer, probe, target, start, *bounds, run.processes.say)
    else:
        curve = [measure_temperature(answer, probe, start, search.margin)]
        state.temperature = curve[0].temperature
    chosen = next(point for point in curve if point.temperature == state.temperature)
    if chosen.distinct4 is not None:
        state.previous_diversity = chosen.distinct4
        state.diversity = chosen.distinct4 if state.diversity is None else state.diversity
    goal = f" (to restore the {restores} stage's {target:.3f})" if restores else ""
    run.processes.say(f"stage {index}: temperature {state.temperature:g}, distinct-4 {chosen.distinct4 or 0:.3f}{goal}")
    row = rows.temperature_row(f"before stage {index}", target, state.temperature, curve, tokens)
    run.record(index, row | {"restores": restores})


def drop_and_hand_on(run: Run, index: int, stage: RlStage) -> None:
    """Drop what the model has learned; the rest is the next stage's data."""
    problems, own = run.stage_problems(index), variants.own_function("filter", stage.variant.filter)
    limits, rule = (own or stage.drop_above, stage.drop_window), f"accuracy above {stage.drop_above:g}"
    filtered = drop_easy(problems, run.state.history, index, *limits, group_size=stage.group_size)
    report_filter(run, index, f"after stage {index}", stage.variant.filter or rule, filtered)
    run.state.problem_ids = [problem.id for problem in filtered.kept]
    if run.processes.is_main and run.state.predicted:
        seen, words = premises.compare(run.state.predicted, run.metrics.steps, len(filtered.dropped))
        run.processes.say(f"stage {index}: {words}")
        row = {"kind": "premises", "label": f"after stage {index}", "predicted": run.state.predicted}
        run.record(index, row | {"seen": seen})
    later = [s for s in run.recipe.stage[index + 1 :] if isinstance(s, RlStage)]
    if later and not later[0].data:
        require_batch(filtered, later[0].batch_problems)


def report_filter(run: Run, index: int, label: str, rule: str, filtered: Filtered, tokens: int = 0) -> None:
    """Show a filter's two histograms, and keep them for the report."""
    run.processes.say(f"{label}: kept {len(filtered.kept):,}, dropped {len(filtered.dropped):,} (rule: {rule})")
    run.processes.say(draw_histogram(filtered.before, filtered.after))
    run.record(index, rows.filter_row(label, rule, filtered, tokens))


# ----------------------------------------------------------------------------------------------- inside a step


def make_groups(recipe: Recipe, problems: list[Problem], attempts: list[list[Attempt]]) -> list[Group]:
    """One group per problem; the reward is the weighted sum of its parts."""
    weights, groups = recipe.reward, []
    for problem, group in zip(problems, attempts, strict=True):
        parts = np.array([(a.grade.correct, a.grade.format, a.grade.steps) for a in group])  # (G, 3)
        rewards = parts @ np.array([weights.correct, weights.format, weights.steps])
        right = np.array([attempt.grade.right for attempt in group])
        groups.append(Group(problem, [attempt.rollout for attempt in group], rewards, right))
    return groups


def record_visits(run: Run, index: int, groups: list[Group]) -> None:
    """Every problem's pass rate and length of responses follow the training; rewards are the original ones."""
    for group in groups:
        solved = tuple(float(right) for right in group.correct)
        lengths = tuple(len(rollout.tokens) for rollout in group.rollouts)
        run.state.history.append(Visit(group.problem.id, index, run.state.step, solved, sum(lengths), lengths))


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


# --------------------------------------------------------------------------------------------------- evaluation


def held_out_evaluation(run: Run, index: int, label: str, within_stage: bool = False, final: bool = False) -> None:
    """avg@k on problems that are never trained on."""
    settings = run.recipe.eval
    if not settings.data:
        return
    most = (settings.problems_within_stage if within_stage else 0) or settings.problems or None
    problems, sampling = run.data.problems(settings.data)[:most], run.evaluation_sampling(settings)
    groups = evaluate(run.worker, "held-out", problems, settings.samples, sampling, label=f"held-out, {label}")
    found = summarise("held-out", problems, groups, sampling.temperature, sampling.max_new_tokens)
    report_evaluation(run, index, found, final)
    where = {"step": run.state.step, "stage": index, "kind": "held-out"}
    some = zip(problems[: run.recipe.run.rollouts_written], groups, strict=False)
    message, temperature = run.worker.message, sampling.temperature
    to_read = [
        rows.group_to_read(where, problem, message(problem)["content"], own, temperature) for problem, own in some
    ]
    run.metrics.write_rollouts(to_read)


def report_evaluation(run: Run, index: int, found: Evaluation, final: bool) -> None:
    """Show an evaluation and keep it for the report."""
    if run.processes.is_main:
        print_evaluation(found)
    run.record(index, rows.evaluation_row(found, final))


def main(arguments: Namespace) -> None:
    """Run a recipe, or resume a run of it."""
    run, status, stop, then = None, 0, StopRequest(starting=True), "repeat the command"
    try:
        run = start_run(arguments, distributed.start(), stop)
        then = f"resume with: {run.resume_command()}"
        train(run)
        run.mark_finished()
        then = f"write the report of the finished run with: python -m lab.page {run.folder}"
        if run.processes.is_main:
            from lab.metrics import read_metrics
            from lab.page import write_report
            from lab.story import what_happened

            print(*(fill(sentence, 100) for sentence in what_happened(read_metrics(run.folder))), sep="\n")
            print(f"report in {write_report(run.folder)}")
    except Interrupted:
        status = distributed.stop_status()
        if run is not None:
            run.mark_stopped()
    except Exception as error:
        status = distributed.report_error(error, "train.py", then)
    finally:
        if run is not None:
            run.close()
        distributed.stop()
    distributed.exit_process(status)


if __name__ == "__main__":
    main(ARGUMENTS)
