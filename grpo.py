"""Groups of rollouts and the update: rescue, substitution, advantages, the clipped loss, the optimizer step.

    Group           the rollouts of one problem and their rewards; never split or mixed
    Sinks.rescue    an all-wrong group gets one correct response from an earlier visit
    substitute      groups without a signal are replaced by copies of groups that have one
    advantages      A_i = (r_i - mean(r)) / (std(r) + 1e-6) within the group
    PolicyLoss      clip 0.2 below, 0.28 above, dual clip 3.0; no KL term, no entropy term, no reference model
    optimizer_step  packed micro-batches, the mean over all response tokens of the global batch

The old log-probs come from the sampler, so the ratio also shows any difference between its forward and the
trainer's. With one optimizer step per batch the ratio is 1 up to rounding, and the clips act on rescued rollouts.

Source: RECIPE.md sections 4 and 5; GRPO (arXiv 2402.03300) equation 3; DAPO (arXiv 2503.14476) equation 8 for
clip-higher and the token mean; dual clip (arXiv 1912.09729) equation 5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.batches import TokenBatch, TrainingSequence, break_even_length, cost, idle_share, micro_batches, pack
from engine.distributed import Interrupted, note_place
from engine.memory import retry_with_smaller_batches, step_within_memory
from lab.problems import Problem
from model import Transformer
from rollout import Rollout

ADVANTAGE_EPSILON = 1e-6

# ----------------------------------------------------------------------------------------------------- groups


@dataclass
class Group:
    """One problem with its rollouts and their rewards."""

    problem: Problem
    rollouts: list[Rollout]
    rewards: np.ndarray  # float64 (G,), the weighted sum used for learning
    correct: np.ndarray  # bool (G,), whether the answer is right
    rescued: int | None = None  # index of the rollout that came from the sink

    @property
    def informative(self) -> bool:
        """Whether the rewards differ, so that the advantages are not all zero."""
        return bool(np.ptp(self.rewards) > 0)


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Rewards (G,) -> advantages (G,): (r - mean) / (std + 1e-6), std with Bessel's correction (RECIPE section 5)."""
    if len(rewards) < 2:
        raise ValueError("advantages need a group of at least 2 rollouts")
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + ADVANTAGE_EPSILON)


@dataclass
class Sinks:
    """The newest correct response to each problem, with its reward, for Rollout Rescue."""

    held: dict[str, tuple[Rollout, float]] = field(default_factory=dict)

    def remember(self, groups: Sequence[Group]) -> None:
        """Keep one correct response of each group that has one, in place of an older one."""
        for group in groups:
            if group.correct.any():
                newest = int(np.flatnonzero(group.correct)[-1])
                self.held[group.problem.id] = (group.rollouts[newest], float(group.rewards[newest]))

    def rescue(self, groups: Sequence[Group], seed: int, step: int) -> list[Group]:
        """Replace a random rollout of each all-wrong group by the sink's response (Rollout Rescue, RECIPE section 4).

        The response keeps the log-probs and the temperature of the policy that wrote it: it is off-policy, and
        the ratio shows it. Return new groups; `Group.rescued` marks the replaced rollout.
        """
        groups = list(groups)
        for i, group in enumerate(groups):
            if group.correct.any() or group.problem.id not in self.held:
                continue
            response, reward = self.held[group.problem.id]
            key = [seed, step, *group.problem.id.encode()]  # a seed per problem: the order of the batch has no effect
            index = int(np.random.default_rng(key).integers(len(group.rollouts)))
            rollouts, rewards, correct = list(group.rollouts), group.rewards.copy(), group.correct.copy()
            rollouts[index], rewards[index], correct[index] = response, reward, True
            groups[i] = Group(group.problem, rollouts, rewards, correct, rescued=index)
        return groups


@dataclass(frozen=True)
class Substitution:
    """The batch after Informative Substitution."""

    groups: list[Group]
    substituted: int
    skip_update: bool  # too few informative groups to learn from


def substitute(groups: Sequence[Group], seed: int, step: int, min_share: float = 1 / 3) -> Substitution:
    """Replace each group without a signal by a random informative group of the batch, including problem and rewards.

    If informative groups are not more than `min_share` of the batch, replace none and ask to skip the update.
    Draw without replacement if there are enough informative groups, else with (RECIPE section 4).
    """
    informative = [group for group in groups if group.informative]
    empty = len(groups) - len(informative)
    if len(informative) <= min_share * len(groups):
        return Substitution(list(groups), 0, skip_update=True)
    random = np.random.default_rng([seed, step])
    drawn = iter(random.choice(len(informative), size=empty, replace=empty > len(informative)))
    filled = [group if group.informative else informative[next(drawn)] for group in groups]
    return Substitution(filled, empty, skip_update=False)


def training_sequences(
    groups: Sequence[Group], advantages_of: Callable[[np.ndarray], np.ndarray] = advantages
) -> list[TrainingSequence]:
    """Return all rollouts of a batch with their advantages."""
    return [
        TrainingSequence(
            np.concatenate([rollout.prompt, rollout.tokens]),
            len(rollout.prompt),
            float(advantage),
            rollout.logprobs,
            rollout.temperature,
            rescued=i == group.rescued,
        )
        for group in groups
        for i, (rollout, advantage) in enumerate(zip(group.rollouts, advantages_of(group.rewards), strict=True))
    ]


# ------------------------------------------------------------------------------------------------------- loss


# log-probs (N,) and their batch -> losses (N,); an RL loss also has a method `sums` with the same arguments
TokenLoss = Callable[[Tensor, TokenBatch], Tensor]


def ratio_sums(logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """Sum policy-to-sampler ratios and log-prob differences over the batch's tokens; `max_difference` is a maximum."""
    difference = (logprobs - batch.old_logprobs).double()
    ratio, on_policy = difference.exp(), ~batch.rescued
    return {
        "ratio": (ratio * on_policy).sum(),
        "difference": (difference.abs() * on_policy).sum(),
        "rescued_ratio": (ratio * batch.rescued).sum(),
        "rescued": batch.rescued.sum(),
        "max_difference": (difference.abs() * on_policy).max(),
    }


@dataclass(frozen=True)
class PolicyLoss:
    """The POLARIS loss of each token; the update averages it over all response tokens of the batch.

    ratio = policy / sampler = exp(logprob - old_logprob)
    J     = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)     DAPO equation 8
    J     = max(J, dual_clip A) where A < 0                              dual clip, equation 5
    loss  = -J
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """New log-probs (N,) -> losses (N,)."""
        ratio = (logprobs - batch.old_logprobs).exp()
        advantage = batch.advantages
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        # without the dual clip, the surrogate of a bad token that became much likelier is unbounded
        return -torch.where(advantage < 0, torch.maximum(surrogate, self.dual_clip * advantage), surrogate)

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """Count the tokens that each clip acts on, and add `ratio_sums`."""
        ratio = (logprobs - batch.old_logprobs).double().exp()
        good, bad = batch.advantages > 0, batch.advantages < 0
        return ratio_sums(logprobs, batch) | {
            "clipped_low": (bad & (ratio < 1 - self.clip_low)).sum(),
            "clipped_high": (good & (ratio > 1 + self.clip_high)).sum(),
            "dual_clipped": (bad & (ratio > self.dual_clip)).sum(),
        }


def supervised_loss(logprobs: Tensor, batch: TokenBatch) -> Tensor:
    """Return the cross-entropy of the solution's tokens (N,)."""
    return -logprobs


# ----------------------------------------------------------------------------------------------------- update


@dataclass
class RatioStats:
    """The ratio of new policy to sampler, per token, over the batch of one step."""

    clip_low_share: float
    clip_high_share: float
    dual_clip_share: float
    ratio_mean: float  # of on-policy tokens
    logprob_diff_mean: float  # |trainer - sampler| of on-policy tokens
    logprob_diff_max: float
    rescued_ratio_mean: float | None  # of tokens of rescued rollouts


@dataclass
class UpdateStats:
    """One optimizer step over the global batch."""

    loss: float
    grad_norm: float  # before clipping
    tokens: int  # response tokens
    stepped: bool  # False: the loss or the gradient was not finite, and the weights are unchanged
    micro_batch_tokens: int  # the requested size, or a smaller one after memory ran out
    memory_retries: int
    ratios: RatioStats | None = None  # None in supervised fine-tuning
    idle_share: float = 0.0  # estimated by engine.batches.idle_share
    optimizer_steps: int = 1  # 0 if not stepped, more than 1 only in a variant


def optimizer_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    sequences: Sequence[TrainingSequence],
    loss: TokenLoss,
    max_tokens: int,
    max_grad_norm: float = 1.0,
    divisor: float | None = None,
    abandon: Callable[[], bool] = lambda: False,
) -> UpdateStats:
    """Make one step on the mean loss over all response tokens of the global batch, or on sum of losses / `divisor`.

    The token mean is DAPO's (equation 8): 1 / (|o_1| + ... + |o_n|) x the sum over responses and their tokens.
    All ranks pass the same sequences, and each computes its share of the micro-batches; the gradient does not depend
    on their size or on the world size. A non-finite loss or gradient leaves the weights unchanged.
    `abandon` is called before every micro-batch, equally often on all ranks; if it returns True, raise Interrupted.
    If memory runs out, restart with smaller micro-batches; raise UpdateError if that is not possible.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    note_place("the update")
    tokens = sum(sequence.response_length for sequence in sequences)
    total = divisor or tokens
    # one rank waits for nobody: balance its micro-batches by memory alone
    break_even = break_even_length(model) if ranks > 1 else math.inf

    def forward_and_backward(batches: list[list[TrainingSequence]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Accumulate the gradient of this rank's micro-batches; return the sum of their losses and their `sums`."""
        optimizer.zero_grad(set_to_none=True)
        loss_sum, parts = torch.zeros((), dtype=torch.float64, device=model.device), []
        for mine in batches[rank::ranks]:
            if abandon():
                optimizer.zero_grad(set_to_none=True)
                raise Interrupted
            # a rank without work still joins the collectives of forward and backward, with weight zero
            batch = pack(mine or sequences[:1], model.device)
            logprobs = model(batch.tokens, batch.context, batch.predict, batch.targets, batch.temperature)  # (N,)
            summed = loss(logprobs, batch).sum() * (1.0 if mine else 0.0)
            (summed * ranks / total).backward()  # FSDP averages gradients over ranks, the loss is a sum over them
            loss_sum += summed.detach()
            if mine and hasattr(loss, "sums"):
                parts.append(loss.sums(logprobs.detach(), batch))
        return loss_sum, parts

    (loss_sum, parts), batches, max_tokens, retries = retry_with_smaller_batches(
        forward_and_backward, lambda size: micro_batches(sequences, size, ranks, break_even), max_tokens, model, ranks
    )
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if ranks > 1:
        dist.all_reduce(loss_sum)
    stepped = math.isfinite(norm) and math.isfinite(float(loss_sum))
    if stepped:
        step_within_memory(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return UpdateStats(
        loss=float(loss_sum) / total,
        grad_norm=norm,
        tokens=tokens,
        stepped=stepped,
        micro_batch_tokens=max_tokens,
        memory_retries=retries,
        ratios=ratio_stats(parts, tokens, model.device, ranks) if hasattr(loss, "sums") else None,
        idle_share=idle_share([cost(batch, break_even) for batch in batches], ranks),
        optimizer_steps=int(stepped),
    )


def ratio_stats(parts: list[dict[str, Tensor]], total: int, device: torch.device, ranks: int) -> RatioStats:
    """Add up the `sums` of all micro-batches and ranks, `total` tokens together; a loss may lack some clips."""
    names = ("clipped_low", "clipped_high", "dual_clipped", "ratio", "difference", "rescued_ratio", "rescued")
    values = [sum(float(part.get(name, 0.0)) for part in parts) for name in names]
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    largest = torch.tensor(max((float(part["max_difference"]) for part in parts), default=0.0), device=device)
    if ranks > 1:
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    low, high, dual, ratio, difference, rescued_ratio, rescued = sums.tolist()
    on_policy = max(total - rescued, 1)
    return RatioStats(
        clip_low_share=low / total,
        clip_high_share=high / total,
        dual_clip_share=dual / total,
        ratio_mean=ratio / on_policy,
        logprob_diff_mean=difference / on_policy,
        logprob_diff_max=float(largest),
        rescued_ratio_mean=rescued_ratio / rescued if rescued else None,
    )
