"""The field's other losses and advantages, a few lines each, so that grpo.py stays POLARIS alone.

Each is a key of a stage's `variant` table in the recipe, alone or with others; what is left out stays POLARIS:

    key                      POLARIS                                   and here
    loss = "gspo"            the ratio of a token, clipped             of the whole response
    loss = "cispo"           a clipped token has no gradient           the clipped ratio is a weight
    divide_by_std = false    (reward - mean) / (std + 1e-6)            reward - mean (Dr. GRPO)
    average                  over the tokens of the batch              over "sequences"; by a "constant" (Dr. GRPO)
    drop_zero_variance       groups without a signal are overwritten   left out
    drop_truncated           a response cut at the limit is wrong      left out of the loss
    punish_last_tokens       the reward does not look at the length    falls by up to 1 before the limit
    importance_cap           ratio to the sampler, clipped             ratio to the sampler as a weight, cut at the cap
    optimizer_steps          one per batch                             several, each on its share of the groups

A loss is called like grpo.PolicyLoss: log-probs (N,) and their TokenBatch -> losses (N,), which optimizer_step adds up
and divides; its `sums` count the tokens that its clips act on. Old log-probs are the sampler's, in every one of several
steps. A stage without a variant runs through nothing of this file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.batches import TokenBatch, TrainingSequence
from grpo import Group, PolicyLoss, RatioStats, TokenLoss, UpdateStats, advantages, ratio_sums, training_sequences
from lab.recipe import RlStage

# ----------------------------------------------------------------------------------------------------- losses


def cap_sums(logprobs: Tensor, batch: TokenBatch, cap: float) -> dict[str, Tensor]:
    """`PolicyLoss.sums` of a loss that weighs by the ratio: its cap cuts good and bad tokens alike."""
    high = (batch.advantages != 0) & ((logprobs - batch.old_logprobs).exp() > cap)
    return ratio_sums(logprobs, batch) | {"clipped_high": high.sum()}


@dataclass(frozen=True)
class GspoLoss:
    """Group Sequence Policy Optimization (arXiv 2507.18071, equations 5 and 7): a ratio for the whole response.

    It is the geometric mean of its tokens' ratios, hence the narrow range (section 5.1: 3e-4 and 4e-4). The paper
    averages over responses: every token carries its response's loss, and SequenceMean makes them one.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def ratio(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Of each token's response (N,)."""
        lengths, difference = batch.sequence.bincount(), logprobs - batch.old_logprobs
        sums = difference.new_zeros(len(lengths)).index_add(0, batch.sequence, difference)  # (S,)
        return (sums / lengths).exp()[batch.sequence]

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        ratio, advantage = self.ratio(logprobs, batch), batch.advantages
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -torch.minimum(ratio * advantage, clipped * advantage)

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """A clip acts on all tokens of a response, or on none."""
        ratio = self.ratio(logprobs, batch)
        return ratio_sums(logprobs, batch) | {
            "clipped_low": ((batch.advantages < 0) & (ratio < 1 - self.clip_low)).sum(),
            "clipped_high": ((batch.advantages > 0) & (ratio > 1 + self.clip_high)).sum(),
        }


@dataclass(frozen=True)
class CispoLoss:
    """Clipped IS-weight Policy Optimization (MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

    REINFORCE with the clipped ratio as a constant weight: a token beyond the clip still has a gradient. As in the paper
    there is no lower bound; it does not publish the upper one (ScaleRL, arXiv 2510.13786: 4 to 8). On policy the loss
    is not near 0, because it contains the log-probs themselves.
    """

    cap: float = 5.0

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        weight = (logprobs.detach() - batch.old_logprobs).exp().clamp(max=self.cap)
        return -weight * batch.advantages * logprobs

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        return cap_sums(logprobs, batch, self.cap)


@dataclass(frozen=True)
class TruncatedImportance:
    """Truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"): min(trainer's old policy / sampler, cap) weighs each token, and the loss's ratio is new / trainer's old.

    The trainer's old log-probs are the new ones, detached: the ratio is 1 and no clip of the inner loss acts. So it
    is in each of several steps, as true old log-probs would cost a forward over the whole batch before the first: the
    weight then includes the drift of earlier steps, and the cap is all that bounds it.
    """

    loss: TokenLoss
    cap: float

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        trainer = logprobs.detach()
        weight = (trainer - batch.old_logprobs).exp().clamp(max=self.cap)
        return weight * self.loss(logprobs, replace(batch, old_logprobs=trainer))

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        return cap_sums(logprobs, batch, self.cap)


@dataclass(frozen=True)
class SequenceMean:
    """The mean over a response's tokens, to be summed over responses (GRPO, arXiv 2402.03300, equation 3)."""

    loss: TokenLoss

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        return self.loss(logprobs, batch) / batch.sequence.bincount()[batch.sequence]

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        return self.loss.sums(logprobs, batch)


def average_of(stage: RlStage) -> str:
    """What the losses are averaged over: the recipe's word, or that of the loss's paper."""
    return stage.variant.average or ("sequences" if stage.variant.loss == "gspo" else "tokens")


def choose_loss(stage: RlStage) -> TokenLoss:
    """The loss of a stage: grpo.PolicyLoss, unless it asks for another."""
    variant = stage.variant
    loss = {
        "polaris": PolicyLoss(stage.clip_low, stage.clip_high, stage.dual_clip),
        "gspo": GspoLoss(variant.gspo_clip_low, variant.gspo_clip_high),
        "cispo": CispoLoss(variant.cispo_cap),
    }[variant.loss]
    loss = TruncatedImportance(loss, variant.importance_cap) if variant.importance_cap else loss
    return SequenceMean(loss) if average_of(stage) == "sequences" else loss


# --------------------------------------------------------------------------------------- rewards and advantages


def punish_overlong(groups: list[Group], stage: RlStage) -> list[Group]:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13): rewards fall by 0 to 1 before the limit.

    L_max is max_response_tokens, L_cache is punish_last_tokens. The paper's rewards are 1 and -1, POLARIS's 1 and 0:
    the punishment weighs twice as much here. Pass rates and sinks keep the original rewards.
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


def centred(rewards: np.ndarray) -> np.ndarray:
    """Dr. GRPO's advantages (arXiv 2503.20783, section 3.2): without the std, hard and easy problems weigh alike."""
    return rewards - rewards.mean()


# ----------------------------------------------------------------------------------------------------- the update


def update(run_update: Callable[..., UpdateStats], groups: Sequence[Group], stage: RlStage) -> UpdateStats | None:
    """Learn from a batch as the stage's variant does; None if nothing of it is left to learn from.

    Every optimizer step is `run_update(sequences, loss, stage, divisor, begun)`: the sum of losses is divided by
    `divisor` (None: the response tokens), and an earlier step has `begun` to change the weights, or none has.
    """
    loss, updates = choose_loss(stage), []
    for sequences, divisor in mini_batches(groups, stage):
        begun = any(one.stepped for one in updates)
        updates.append(run_update(sequences, loss, stage, divisor, begun))
    return over_steps(updates)


def mini_batches(groups: Sequence[Group], stage: RlStage) -> list[tuple[list[TrainingSequence], float | None]]:
    """A batch as its optimizer steps take it: of each its sequences, which are whole groups, and its divisor.

    Zero-variance filtering is DAPO's dynamic sampling (section 3.2) without drawing others instead, as in ScaleRL.
    Overlong filtering (DAPO, section 3.4) leaves cut responses out of the loss; they still count in their group's mean.
    Dr. GRPO's divisor is the budget of tokens (Listing 1): the limit, for every response sampled, whatever is left out.
    """
    variant, parts = stage.variant, []
    if variant.drop_zero_variance:
        groups = [group for group in groups if group.informative]
    for start in range(variant.optimizer_steps):
        part = groups[start :: variant.optimizer_steps]
        sequences = training_sequences(part, advantages if variant.divide_by_std else centred)
        if variant.drop_truncated:
            ends = [rollout.finish_reason for group in part for rollout in group.rollouts]
            sequences = [sequence for sequence, end in zip(sequences, ends, strict=True) if end != "length"]
        share = stage.batch_problems * stage.group_size / variant.optimizer_steps
        divisors = {"tokens": None, "sequences": len(sequences), "constant": share * stage.max_response_tokens}
        if sequences:
            parts.append((sequences, divisors[average_of(stage)]))
    return parts


def over_steps(updates: Sequence[UpdateStats]) -> UpdateStats | None:
    """The optimizer steps of a batch as one line of metrics, means over the steps; None if there was none.

    The log-prob difference is the first step's, the only one on policy, where it is that of sampler and trainer alone.
    """
    if len(updates) <= 1:
        return updates[0] if updates else None

    def mean(name: str, of: Sequence[UpdateStats | RatioStats]) -> float | None:
        known = [value for value in (getattr(one, name) for one in of) if value is not None]
        return sum(known) / len(known) if known else None

    names = ("clip_low_share", "clip_high_share", "dual_clip_share", "ratio_mean", "rescued_ratio_mean")
    ratios = [one.ratios for one in updates]
    return replace(
        updates[-1],  # whose micro_batch_tokens hold from now on
        loss=mean("loss", updates),
        grad_norm=mean("grad_norm", updates),
        tokens=sum(one.tokens for one in updates),
        stepped=all(one.stepped for one in updates),
        memory_retries=sum(one.memory_retries for one in updates),
        ratios=replace(ratios[0], **{name: mean(name, ratios) for name in names}),
        optimizer_steps=sum(one.optimizer_steps for one in updates),
    )
