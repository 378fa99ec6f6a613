"""The meaning of every key of metrics.jsonl: one table for README.md, report.html and TensorBoard.

`python -m lab.glossary` prints it for README's section "Every metric".
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """`keys` and kinds of `rows` are separated by spaces. `varies`: with time, memory or number of processes."""

    keys: str
    rows: str
    meaning: str
    varies: bool = False


STEPS, ALL = "sft rl", "sft rl eval filter temperature premises guard"
GLOSSARY = (
    Entry("kind step stage", ALL, "the kind of row; the step, from 1 over all stages; the stage, counted from 0"),
    Entry("reward_mean", "rl", "mean reward of all rollouts as sampled: before rescue and substitution"),
    Entry("accuracy", "rl", "share of right answers, of all rollouts as sampled"),
    Entry("reward_correct reward_format reward_steps", "rl", "parts of the reward, unweighted: right answer, form, "
          "worked steps that hold"),
    Entry("verdicts", "rl eval", "responses by verdict: right, wrong, no answer, timed out (exceeded its time or "
          "memory), grader failed, reward failed (a reward function)", varies=True),
    Entry("response_length_mean response_length_max", "rl", "tokens in a response, its end-of-sequence token included"),
    Entry("max_response_tokens", "rl", "the stage's limit on response tokens"),
    Entry("truncated_share", "rl eval", "share of responses cut at the limit"),
    Entry("temperature", "rl eval", "divides the logits, in the sampler and in the loss alike"),
    Entry("distinct4", "rl eval", "distinct 4-grams / all 4-grams over a problem's responses, mean over problems; 1 = "
          "all different"),
    Entry("distinct4_left_out", "rl", "problems without any 4-gram, left out of distinct4"),
    Entry("entropy", "rl", "mean of -log-prob of the sampled tokens: an unbiased estimate, in nats per token, at the "
          "sampling temperature"),
    Entry("groups", "rl", "groups of the step, each a problem with its rollouts"),
    Entry("solve_none solve_all zero_variance", "rl", "groups with no right rollout; with only right ones; with equal "
          "rewards, which give no gradient"),
    Entry("rescued", "rl", "failed groups in which one rollout was replaced by an earlier correct one of the same "
          "problem"),
    Entry("substituted", "rl", "groups without a signal, replaced by informative groups of the batch"),
    Entry("skipped", "rl", "1 if the update was skipped because too few groups were informative"),
    Entry("nonfinite", STEPS, "1 if a loss or gradient was not finite, whose optimizer step was not taken"),
    Entry("optimizer_steps", "rl", "optimizer steps on the batch: 1, unless the stage's variant makes more; then "
          "loss, grad_norm, ratio_mean and the clip shares are means over them, and logprob_diff_* are of the first"),
    Entry("loss", STEPS, "rl: token-mean clipped surrogate, in value near 0 on policy, since a group's advantages sum "
          "to 0 (its gradient is not; CISPO's value is not either); sft: cross-entropy in nats per token"),
    Entry("grad_norm lr", STEPS, "norm of the gradient before clipping; learning rate"),
    Entry("ratio_mean rescued_ratio_mean", "rl", "new policy / sampler per token: of the step's own rollouts (1 with "
          "one update per batch); of rescued ones"),
    Entry("logprob_diff_mean logprob_diff_max", "rl", "abs(trainer - sampler) of on-policy tokens' log-probs: "
          "rounding in float32, more in bfloat16"),
    Entry("clip_low_share clip_high_share dual_clip_share", "rl", "share of tokens that each clip bound affects: 0 if "
          "everything is on-policy"),
    Entry("tokens", "sft rl eval filter temperature", "of sampled responses; of sft, of prompts and solutions"),
    Entry("problems", "rl eval", "problems in the stage's training set, or in the evaluation's set"),
    Entry("epoch", "rl", "passes over the stage's training set"),
    Entry("problems_hash tokens_hash", "rl", "hashes of the step's problem ids and sampled tokens: equal if two runs "
          "sampled the same"),
    Entry("tokens_per_s", "sft eval", "tokens per second of the step, or of an evaluation's sampling", varies=True),
    Entry("sample_tokens_per_s update_tokens_per_s", "rl", "tokens per second of sampling and of the update",
          varies=True),
    Entry("seconds", STEPS, "wall time of the step", varies=True),
    Entry("seconds_sample seconds_grade seconds_update", "rl", "its phases; grading overlaps sampling, so only the "
          "wait after sampling counts", varies=True),
    Entry("idle_share idle_shares", "rl", "share of time that processes wait for the slowest one to sample: all "
          "together; each", varies=True),
    Entry("update_idle_share", "rl", "the same in the update, estimated from tokens and attention", varies=True),
    Entry("preemptions", "rl", "rows that had to wait for KV cache", varies=True),
    Entry("micro_batch_tokens memory_retries", STEPS, "most tokens of one forward and backward; how often the step "
          "was restarted with fewer because memory ran out", varies=True),
    Entry("sample_memory_retries", "rl", "how often sampling ran out of memory and continued with fewer rows",
          varies=True),
    Entry("peak_memory_gib", "rl eval", "most memory of one device", varies=True),
    Entry("name final", "eval", "which evaluation; whether it ran after training"),
    Entry("avg low high n", "eval", "avg@n with its 95% interval, clustered by problem; samples per problem"),
    Entry("by_type by_difficulty by_problem", "eval", "accuracy by problem type, difficulty and problem id"),
    Entry("pass_at maj_at by_length", "eval", "pass@k and maj@k with both intervals; accuracy by response length"),
    Entry("length_mean no_box_share", "eval", "mean tokens of a response; share without a final boxed answer"),
    Entry("unanswerable", "eval", "problems without a usable answer, counted as wrong"),
    Entry("label", "filter temperature premises", "when it ran"),
    Entry("rule before after kept dropped", "filter", "what is dropped; number of problems solved 0, 1, ... times "
          "before and after; how many were kept and dropped"),
    Entry("target_distinct4 restores chosen curve", "temperature", "the diversity to restore; of which stage's start: "
          "previous or first; the chosen temperature; all measured temperatures"),
    Entry("table predicted seen", "premises", "mechanism, figure and verdict before a stage; figures of the stage: "
          "foreseen at unchanged pass rates (mean, low, high) and, after it, seen"),
    Entry("data rows", "guard", "a training file and its rows"),
    Entry("duplicates contamination", "guard", "rows that repeat an earlier row; rows that occur in a benchmark"),
    Entry("duplicates_first contamination_first", "guard", "the first such pairs"),
    Entry("duplicates_rule contamination_rule", "guard", "what the recipe does with them"),
    Entry("excluded excluded_ids", "guard", "rows left out of training"),
)  # fmt: skip
# keys that are equal in an interrupted and an uninterrupted run, and in two runs on the same CPU
DETERMINISTIC = tuple(key for entry in GLOSSARY if not entry.varies for key in entry.keys.split())


def markdown_table() -> str:
    """Format the glossary as a Markdown table."""

    def row(entry: Entry) -> str:
        keys = ", ".join(f"`{key}`" for key in entry.keys.split())
        return f"| {keys} | {'all' if entry.rows == ALL else ', '.join(entry.rows.split())} | {entry.meaning} |"

    return "\n".join(["| key | rows | meaning |", "|---|---|---|", *map(row, GLOSSARY)])


if __name__ == "__main__":
    print(markdown_table())
