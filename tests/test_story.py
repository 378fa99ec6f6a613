"""lab/story.py: every sentence from hand-made rows, and runs that lack what a sentence is about."""

import numpy as np

from lab import story
from lab.console import new_alarms


def evaluation(step: int, avg: float, half: float = 0.05, problems: int = 100, **more) -> dict:
    return dict(kind="eval", step=step, stage=0, name="held-out", final=False, problems=problems, n=4, temperature=1.0,
                avg=avg, low=avg - half, high=avg + half) | more


def rl(step: int, stage: int, **more) -> dict:
    return dict(kind="rl", step=step, stage=stage, reward_mean=0.5, groups=10, zero_variance=3, rescued=1, substituted=2,
                skipped=0, temperature=1.0, problems=50, max_response_tokens=40, response_length_mean=20.0,
                truncated_share=0.02, distinct4=0.4, entropy=0.3, accuracy=0.5, nonfinite=0) | more


def told(rows: list[dict], start: str) -> str:
    found = [sentence for sentence in story.what_happened(rows) if sentence.startswith(start)]
    assert len(found) <= 1
    return found[0] if found else ""


def test_the_gain_is_that_of_the_same_problems():
    rows = [evaluation(0, 0.4), rl(1, 0), evaluation(1, 0.9, problems=20), rl(2, 0), evaluation(2, 0.6), rl(3, 0),
            evaluation(3, 0.95, problems=20)]
    assert told(rows, "Held-out") == (
        "Held-out accuracy went from 40.0% (35.0 to 45.0) before RL to 60.0% (55.0 to 65.0) at step 2: +20.0 points.")
    for row, share in zip(rows[::4], (0.7, 0.8), strict=True):
        row["pass_at"] = {"4": {"value": share}}
    assert told(rows, "Held-out").endswith("; at least one of 4 responses is right for 80.0% of the problems, 70.0% before.")


def test_a_change_has_the_interval_of_its_differences_by_problem():
    before = dict(avg=0.5, by_problem=[["a", 0.5], ["b", 1.0], ["c", 0.25], ["d", 0.25]])
    after = dict(avg=0.25, by_problem=[["d", 0.25], ["c", 0.0], ["b", 0.75], ["a", 0.0]])
    half = 100 * 3.182 * np.std([-0.5, -0.25, -0.25, 0.0], ddof=1) / 2  # Student's t with 3 degrees of freedom
    interval = f"(95% {-25 - half:+.1f} to {-25 + half:+.1f}, paired by problem)"
    assert story.change(before, after) == f"-25.0 points {interval}"
    others = dict(avg=0.25, by_problem=[["e", 0.25], *after["by_problem"][1:]])
    assert story.change(before, others) == story.change(before, dict(avg=0.25)) == "-25.0 points"


def test_without_a_second_evaluation_there_is_no_gain():
    alone = "Held-out accuracy was 40.0% (35.0 to 45.0) at step 0; no other evaluation compares with it."
    assert told([evaluation(0, 0.4), rl(1, 0), evaluation(1, 0.9, problems=20)], "Held-out") == alone
    assert "at step 5; no other" in told([rl(5, 0), evaluation(5, 0.4)], "Held-out")


def test_without_held_out_problems_the_reward_or_the_loss_is_told():
    steps = [rl(step, 0, reward_mean=step / 40) for step in range(1, 21)]
    assert story.what_happened(steps)[0] == (
        "No held-out problems were evaluated; the reward went from 0.138 to 0.388 in 20 steps.")
    sft = [dict(kind="sft", step=step, stage=0, loss=loss) for step, loss in ((1, 3.0), (2, 1.0))]
    assert story.what_happened(sft) == ["No held-out problems were evaluated; the loss went from 3 to 1 in 2 steps."]
    assert story.what_happened([]) == story.what_happened([dict(kind="sft", step=1, stage=0, loss=None)]) == []


def test_filter_and_drops_are_counted():
    drop = dict(kind="filter", step=1, stage=0, label="after stage 0", rule="accuracy above 0.9", kept=40, dropped=10)
    before = drop | dict(label="before stage 0", rule="pass rate below 1", kept=50, dropped=14)
    rows = [before, rl(1, 0), drop, rl(2, 1, problems=40), drop | dict(kept=37, dropped=3)]
    assert told(rows, "Of the problems") == (
        "Of the problems, the filter before a stage took out 14 of 64 (pass rate below 1) and the drop after each stage "
        "took out 10 of 50 and 3 of 40 (accuracy above 0.9); RL 2 trained on 40 problems.")
    assert told([rl(1, 0)], "No problem was") == "No problem was filtered or dropped."


def search(stage: int, chosen: float, points: dict[float, tuple[float, float]], target: float | None = 0.4) -> dict:
    curve = [dict(temperature=t, accuracy=accuracy, distinct4=d4) for t, (accuracy, d4) in points.items()]
    return dict(kind="temperature", step=1, stage=stage, target_distinct4=target, chosen=chosen, curve=curve)


def test_a_search_that_could_not_restore_the_diversity_says_where_it_ended():
    failed = search(1, 1.2, {1.0: (0.6, 0.2), 1.2: (0.5, 0.3), 1.4: (0.3, 0.5)})
    rows = [search(0, 1.0, {1.0: (0.5, 0.4)}, None), rl(1, 0), failed, rl(2, 1, temperature=1.2)]
    assert told(rows, "The temperature") == (
        "The temperature went from 1 to 1.2, to restore a distinct-4 of 0.400; it could not all be restored: RL 2 began "
        "with 0.300, as the search ended at 1.4, where accuracy was 30.0%, not 60.0%.")
    rows[2] = search(1, 1.2, {1.0: (0.6, 0.2), 1.2: (0.5, 0.41)})
    assert told(rows, "The temperature").endswith("of 0.400, and every search restored it.")
    assert told([rl(1, 0), rl(2, 1)], "The temperature") == "The temperature was 1."


def test_each_search_names_its_own_target():
    """Guards: of a search for the previous stage's diversity that fell short, the target of the last one was told."""
    failed = search(1, 1.2, {1.0: (0.6, 0.2), 1.2: (0.5, 0.3), 1.4: (0.3, 0.5)})
    restored = search(2, 1.2, {1.2: (0.5, 0.31)}, 0.3)
    rows = [rl(1, 0), failed, rl(2, 1, temperature=1.2), restored, rl(3, 2, temperature=1.2)]
    sentence = told(rows, "The temperature")
    assert "to restore a distinct-4 of 0.400 and 0.300; it could not all be restored: RL 2 began with 0.300 of 0.400, as" in sentence


def test_a_fall_of_the_reward_names_what_changed_between_the_stages():
    changed = dict(reward_mean=0.3, temperature=1.2, problems=40)
    rows = [rl(1, 0), search(1, 1.2, {1.0: (0.6, 0.2), 1.2: (0.5, 0.41)}), rl(2, 1, **changed), rl(3, 2, **changed)]
    assert told(rows, "The reward falls") == (
        "The reward falls where a stage begins, with the weights unchanged: from 0.50 to 0.30 at RL 2 (temperature 1 → "
        "1.2, which alone costs 10.0 points by its search; problems 50 → 40).")
    assert "(no other setting changed)" in told([rl(1, 0), rl(2, 1, reward_mean=0.3)], "The reward")
    assert not told([rl(1, 0), rl(2, 1, reward_mean=0.49)], "The reward falls")
    assert not told([rl(1, 0), dict(kind="sft", step=2, stage=1), rl(3, 2, reward_mean=0.3)], "The reward falls")


def test_rescue_substitution_and_skipped_updates_are_summed():
    assert told([rl(1, 0), rl(2, 0, skipped=1, substituted=0)], "Of 20 groups") == (
        "Of 20 groups 6 had equal rewards and no signal (30.0%); rescue gave 2 failed groups an earlier right response, "
        "substitution overwrote 2 groups with informative ones, and 1 of 2 updates were skipped for want of them.")


def test_lengths_and_what_longer_responses_gave():
    rows = [rl(1, 0), rl(2, 1, max_response_tokens=60, response_length_mean=30.0, truncated_share=0.0),
            evaluation(2, 0.5, name="no YaRN", final=True), evaluation(2, 0.6, name="YaRN", final=True)]
    assert told(rows, "The limit") == (
        "The limit on a response went from 40 to 60 tokens; their mean length went from 20 to 30 tokens, the share cut "
        "off from 2.0% to 0.0%.")
    rows.insert(0, evaluation(0, 0.4))
    assert told(rows, "Longer") == (
        "Longer than trained, the final model reaches no YaRN: 50.0% (45.0 to 55.0) and YaRN: 60.0% (55.0 to 65.0); the "
        "last against the first +10.0 points.")


def test_alarms_are_those_that_the_console_printed():
    rows = [rl(step, 0, distinct4=0.4 if step <= 20 else 0.1, nonfinite=int(step == 7)) for step in range(1, 41)]
    sentence = told(rows, "Alarms")
    printed = [step for step in range(1, 41) if new_alarms(rows[:step])]
    assert sentence.startswith(f"Alarms: 1 of diversity, first at step {printed[0]} (diversity collapses") and len(printed) == 1
    assert sentence.endswith("; 1 of a gradient that was not finite.")
    quiet = "No alarm of signal, lengths, diversity, entropy, gradients or grading rang."
    assert told(rows[:6], "No alarm") == quiet


def test_a_whole_run_takes_eight_sentences_and_an_interrupted_one_fewer():
    rows = [evaluation(0, 0.4), rl(1, 0), search(1, 1.2, {1.0: (0.6, 0.2), 1.2: (0.5, 0.41)}), rl(2, 1, reward_mean=0.3),
            evaluation(2, 0.6), evaluation(2, 0.5, name="longer", final=True)]
    assert len(story.what_happened(rows)) == 8
    for end in range(len(rows)):
        assert len(story.what_happened(rows[:end])) <= 8
