"""Other losses and advantages of the field, kept out of grpo.py so that it remains POLARIS alone.

Each is a key of a stage's `variant` table in the recipe; keys can be combined, and the default of each is POLARIS.
Advantage, loss and filter can be functions of one's own file, FILE.py:NAME, which are called as these here are:

    key                      POLARIS                                   variant
    advantage = "centred"    (reward - mean) / (std + 1e-6)            reward - mean (Dr. GRPO)
    advantage = "maxrl"                                                (reward - mean) / mean (MaxRL)
    loss = "gspo"            the ratio of a token, clipped             the ratio of the response, clipped
    loss = "cispo"           a clipped token has no gradient           the clipped ratio is a weight
    average                  over the tokens of the batch              over "sequences"; by a "constant" (Dr. GRPO)
    drop_zero_variance       groups without a signal are replaced      dropped
    drop_truncated           a truncated response is wrong             dropped from the loss
    punish_last_tokens       the reward ignores the length             falls by up to 1 before the limit
    importance_cap           ratio to the sampler, clipped             ratio to the sampler as a weight, capped
    optimizer_steps          one per batch                             several, each on its share of the groups

A loss has the interface of grpo.PolicyLoss: log-probs (N,) and their TokenBatch -> losses (N,), which optimizer_step
sums and divides; its `sums` count the tokens that its clips act on. Old log-probs are the sampler's in every step.
A stage without a variant does not use this file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batches import TokenBatch, TrainingSequence, pack
from engine.function_file import FunctionError, describe, load, read_function
from engine.memory import out_of_memory
from grpo import (
    ADVANTAGE_EPSILON,
    Group,
    PolicyLoss,
    RatioStats,
    TokenLoss,
    UpdateStats,
    advantages,
    ratio_sums,
    training_sequences,
)
from lab.recipe import RlStage

# -------------------------------------------------------------------------------------- functions of one's own

RESULTS = {"advantage": "an array of finite numbers", "loss": "a tensor", "filter": "an array of bools"}


@cache
def own_function(what: str, given: str) -> Callable[..., Any]:
    """Load FILE.py:NAME, an advantage, loss or filter; each result must have the shape of the first argument.

    Raises FunctionError. If memory runs out in it, the error is passed on: the update may go on with less.
    """
    function = read_function(given, what)
    try:
        call = load(function)
    except (Exception, SystemExit) as error:
        why = describe(error, function)
        raise FunctionError(f"the {what} {given} cannot be used: {why}; fix its file or its name") from None

    def checked(values: np.ndarray | Tensor, *rest: Any) -> Any:
        try:
            result = call(values, *rest)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise FunctionError(f"the {what} {given} cannot be used: {describe(error, function)}; fix it") from error
        if not is_result(what, result, values):
            found, shape = " ".join(repr(result).split()), tuple(values.shape)
            raise FunctionError(f"the {what} {given} must return {RESULTS[what]} of shape {shape}, not {found:.80}")
        return result

    return checked


def is_result(what: str, result: Any, values: np.ndarray | Tensor) -> bool:
    """Whether a function of one's own may return this for these values."""
    if not isinstance(result, type(values)) or result.shape != values.shape or what == "loss":
        return isinstance(result, Tensor) and result.shape == values.shape
    return result.dtype.kind in ("b" if what == "filter" else "iuf") and bool(np.isfinite(result).all())


def try_out(stage: RlStage, device: torch.device) -> None:
    """Call a stage's advantage, loss and filter on small examples. Raises FunctionError."""
    for right in (1, 0, stage.group_size):  # groups without a signal too: a division by zero would come late
        choose_advantages(stage)((np.arange(stage.group_size) < right).astype(float))
    examples = [TrainingSequence(np.arange(4), 2, sign, np.full(2, -1, np.float32)) for sign in (1.0, -1.0)]
    batch = pack(examples, device)
    logprobs = batch.old_logprobs.clone().requires_grad_()
    losses = choose_loss(stage)(logprobs, batch)
    gradient = torch.autograd.grad(losses.sum(), logprobs)[0] if losses.requires_grad else losses / 0
    if not (losses + gradient).isfinite().all():
        what = f"losses {losses.tolist()} with the gradient {gradient.tolist()}"
        raise FunctionError(f"the loss {stage.variant.loss} has {what} where the policy is the sampler's: fix it")
    if own := own_filter(stage):
        own(np.array([0.0, 0.5, 1.0]))


def own_filter(stage: RlStage) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return a stage's filter from pass rates (P,) to what is kept, bool (P,); None: drop_at and drop_above decide."""
    return own_function("filter", stage.variant.filter) if stage.variant.filter else None


# ----------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class GspoLoss:
    """Group Sequence Policy Optimization (arXiv 2507.18071, equations 5 and 7): one ratio for the response.

    The ratio is the geometric mean of its tokens' ratios, hence the narrow clip range (section 5.1: 3e-4 and 4e-4).
    The paper averages over responses: every token has the loss of its response, and SequenceMean averages them.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def ratio(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Return the ratio of each token's response (N,)."""
        lengths, difference = batch.sequence.bincount(), logprobs - batch.old_logprobs
        sums = difference.new_zeros(len(lengths)).index_add(0, batch.sequence, difference)  # (S,)
        return (sums / lengths).exp()[batch.sequence]

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        ratio, advantage = self.ratio(logprobs, batch), batch.advantages
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -torch.minimum(ratio * advantage, clipped * advantage)

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        ratio = self.ratio(logprobs, batch)
        return ratio_sums(logprobs, batch) | {
            "clipped_low": ((batch.advantages < 0) & (ratio < 1 - self.clip_low)).sum(),
            "clipped_high": ((batch.advantages > 0) & (ratio > 1 + self.clip_high)).sum(),
        }


@dataclass(frozen=True)
class CispoLoss:
    """Clipped IS-weight Policy Optimization (MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

    REINFORCE with the clipped ratio as a constant weight: a token beyond the clip still has a gradient. As in the paper
    there is no lower bound; the paper does not state the upper one (ScaleRL, arXiv 2510.13786: 4 to 8). On policy the
    loss is not near 0, because it contains the log-probs themselves.
    """

    cap: float = 5.0

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        weight = (logprobs.detach() - batch.old_logprobs).exp().clamp(max=self.cap)
        return -weight * batch.advantages * logprobs

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        high = (batch.advantages != 0) & ((logprobs - batch.old_logprobs).exp() > self.cap)  # good and bad tokens
        return ratio_sums(logprobs, batch) | {"clipped_high": high.sum()}


@dataclass(frozen=True)
class TruncatedImportance:
    """Truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"): min(trainer's old policy / sampler, cap) weighs each token, and the loss's ratio is new / trainer's old.

    The new log-probs, detached, stand for the trainer's old ones, which would cost another forward over the batch. So
    the inner loss has ratio 1 and never clips; after the first of several steps the weight also includes the drift of
    the policy, and only the cap bounds it.
    """

    loss: TokenLoss
    cap: float

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        trainer = logprobs.detach()
        weight = (trainer - batch.old_logprobs).exp().clamp(max=self.cap)
        return weight * self.loss(logprobs, replace(batch, old_logprobs=trainer))

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        return CispoLoss(self.cap).sums(logprobs, batch)  # the same cap on the same ratio


@dataclass(frozen=True)
class SequenceMean:
    """The mean over a response's tokens, to be summed over responses (GRPO, arXiv 2402.03300, equation 3)."""

    loss: TokenLoss

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        return self.loss(logprobs, batch) / batch.sequence.bincount()[batch.sequence]

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        return self.loss.sums(logprobs, batch)


@dataclass(frozen=True)
class OwnLoss:
    """A loss of one's own, whose clips are not known."""

    function: TokenLoss
    sums = staticmethod(ratio_sums)

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        return self.function(logprobs, batch)


def averaged_over(stage: RlStage) -> str:
    """Return "tokens", "sequences" or "constant": the recipe's choice, or that of the loss's paper."""
    return stage.variant.average or ("sequences" if stage.variant.loss == "gspo" else "tokens")


def choose_loss(stage: RlStage) -> TokenLoss:
    """Return the loss of a stage; the default is grpo.PolicyLoss."""
    variant = stage.variant
    built_in = {
        "polaris": PolicyLoss(stage.clip_low, stage.clip_high, stage.dual_clip),
        "gspo": GspoLoss(variant.gspo_clip_low, variant.gspo_clip_high),
        "cispo": CispoLoss(variant.cispo_cap),
    }
    loss = built_in.get(variant.loss) or OwnLoss(own_function("loss", variant.loss))
    loss = TruncatedImportance(loss, variant.importance_cap) if variant.importance_cap else loss
    return SequenceMean(loss) if averaged_over(stage) == "sequences" else loss


# --------------------------------------------------------------------------------------- rewards and advantages


def punish_overlong(groups: list[Group], stage: RlStage) -> list[Group]:
    """Subtract DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 to 1, growing before the limit.

    L_max is max_response_tokens, L_cache is punish_last_tokens. The paper's rewards are 1 and -1, POLARIS's 1 and 0,
    so the punishment weighs twice as much as in the paper. Pass rates and sinks keep the original rewards.
    """
    last = stage.variant.punish_last_tokens
    if not last:
        return groups
    punished = []
    for group in groups:
        lengths = np.array([len(rollout.tokens) for rollout in group.rollouts])
        penalty = np.clip((stage.max_response_tokens - last - lengths) / last, -1, 0)
        punished.append(replace(group, rewards=group.rewards + penalty))
    return punished


def centred_advantages(rewards: np.ndarray) -> np.ndarray:
    """Dr. GRPO's advantages (arXiv 2503.20783, section 3.2): without the std, hard and easy problems weigh the same."""
    return rewards - rewards.mean()


def maxrl_advantages(rewards: np.ndarray) -> np.ndarray:
    """MaxRL's advantages (arXiv 2602.02710): the rarer a success, the more it weighs, as in the gradient of log p."""
    return (rewards - rewards.mean()) / (rewards.mean() + ADVANTAGE_EPSILON)


def choose_advantages(stage: RlStage) -> Callable[[np.ndarray], np.ndarray]:
    """Return the advantages of a stage, from a group's rewards (G,); the default is grpo.advantages."""
    built_in = {"polaris": advantages, "centred": centred_advantages, "maxrl": maxrl_advantages}
    return built_in.get(stage.variant.advantage) or own_function("advantage", stage.variant.advantage)


# ----------------------------------------------------------------------------------------------------- the update


def update(run_update: Callable[..., UpdateStats], groups: Sequence[Group], stage: RlStage) -> UpdateStats | None:
    """Make the optimizer steps of a batch with the stage's variant; return None if every group is dropped.

    Each step is `run_update(sequences, loss, stage, divisor, begun)`: the sum of losses is divided by `divisor`
    (None: the number of response tokens), and `begun` says whether an earlier step has changed the weights.
    """
    loss, updates = choose_loss(stage), []
    for sequences, divisor in mini_batches(groups, stage):
        begun = any(one.stepped for one in updates)
        updates.append(run_update(sequences, loss, stage, divisor, begun))
    return merge_updates(updates)


def mini_batches(groups: Sequence[Group], stage: RlStage) -> list[tuple[list[TrainingSequence], float | None]]:
    """Split a batch, by groups, into (sequences, divisor) of each optimizer step.

    drop_zero_variance is DAPO's dynamic sampling (section 3.2) without sampling replacements, as in ScaleRL.
    drop_truncated (DAPO, section 3.4) drops responses from the loss; they still count in their group's mean.
    Dr. GRPO's constant divisor (Listing 1) is the token limit times the responses sampled, including dropped ones.
    """
    variant, parts = stage.variant, []
    if variant.drop_zero_variance:
        groups = [group for group in groups if group.informative]
    for start in range(variant.optimizer_steps):
        part = groups[start :: variant.optimizer_steps]
        sequences = training_sequences(part, choose_advantages(stage))
        if variant.drop_truncated:
            rollouts = [rollout for group in part for rollout in group.rollouts]
            sequences = [s for s, r in zip(sequences, rollouts, strict=True) if r.finish_reason != "length"]
        sampled = stage.batch_problems * stage.group_size / variant.optimizer_steps
        divisors = {"tokens": None, "sequences": len(sequences), "constant": sampled * stage.max_response_tokens}
        if sequences:
            parts.append((sequences, divisors[averaged_over(stage)]))
    return parts


def merge_updates(updates: Sequence[UpdateStats]) -> UpdateStats | None:
    """Merge the statistics of a batch's optimizer steps, as means over the steps; return None if there are none.

    The log-prob difference is that of the first step: only there does it compare sampler and trainer on one policy.
    """
    if len(updates) <= 1:
        return updates[0] if updates else None

    def mean(name: str, stats: Sequence[UpdateStats | RatioStats]) -> float | None:
        values = [value for value in (getattr(one, name) for one in stats) if value is not None]
        return sum(values) / len(values) if values else None

    names = ("clip_low_share", "clip_high_share", "dual_clip_share", "ratio_mean", "rescued_ratio_mean")
    ratios = [update.ratios for update in updates]
    return replace(
        updates[-1],  # its micro_batch_tokens hold for the following steps
        loss=mean("loss", updates),
        grad_norm=mean("grad_norm", updates),
        tokens=sum(update.tokens for update in updates),
        stepped=all(update.stepped for update in updates),
        memory_retries=sum(update.memory_retries for update in updates),
        ratios=replace(ratios[0], **{name: mean(name, ratios) for name in names}),
        optimizer_steps=sum(update.optimizer_steps for update in updates),
    )
