"""Groups of rollouts and the update: rescue, substitution, advantages, the clipped loss, the optimizer step.

    rollouts of a problem + their rewards = a Group, which moves only as a whole
    Sinks.rescue    an all-wrong group gets one correct response from an earlier visit
    substitute      groups without a signal are overwritten by whole groups that have one
    advantages      A_i = (r_i - mean(r)) / (std(r) + 1e-6) inside the group
    PolicyLoss      clip 0.2 below, 0.28 above, dual clip 3.0; no KL term, no entropy term, no reference model
    optimizer_step  packed micro-batches, the mean over all response tokens of the global batch

Old log-probs are the sampler's own, so the ratio also shows any difference between the two forwards. With one
optimizer step per batch it is 1 up to rounding; the clips act on rescued rollouts.

Source: RECIPE.md sections 4 and 5; GRPO (arXiv 2402.03300) equation 3; DAPO (arXiv 2503.14476) equation 8 for
clip-higher and the token mean; dual clip (arXiv 1912.09729) equation 5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.batches import TokenBatch, TrainingSequence, even_length, idle_share, micro_batches, pack, work_of
from engine.distributed import Interrupted, note_place
from engine.memory import UpdateError as UpdateError
from engine.memory import step_within_memory, with_smaller_batches
from lab.problems import Problem
from model import Transformer
from rollout import Rollout

ADVANTAGE_EPSILON = 1e-6

# ----------------------------------------------------------------------------------------------------- groups


@dataclass
class Group:
    """One problem with its rollouts and what they earned."""

    problem: Problem
    rollouts: list[Rollout]
    rewards: np.ndarray  # float64 (G,), the weighted sum that is learned from
    correct: np.ndarray  # bool (G,), whether the answer is right
    rescued: int | None = None  # which rollout came from the sink

    @property
    def informative(self) -> bool:
        """Rewards that differ give advantages that are not all zero."""
        return bool(np.ptp(self.rewards) > 0)


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Rewards (G,) -> advantages (G,): (r - mean) / (std + 1e-6), std with Bessel's correction (RECIPE section 5)."""
    if len(rewards) < 2:
        raise ValueError("a group needs at least 2 rollouts to compare")
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + ADVANTAGE_EPSILON)


@dataclass
class Sinks:
    """For every problem the newest correct response seen, with its reward: Rollout Rescue's memory."""

    held: dict[str, tuple[Rollout, float]] = field(default_factory=dict)

    def remember(self, groups: Sequence[Group]) -> None:
        """Keep one correct response of each group that has one; it replaces an older one."""
        for group in groups:
            if group.correct.any():
                newest = int(np.flatnonzero(group.correct)[-1])
                self.held[group.problem.id] = (group.rollouts[newest], float(group.rewards[newest]))

    def rescue(self, groups: Sequence[Group], seed: int, step: int) -> list[Group]:
        """Rollout Rescue (RECIPE section 4): a random rollout of a group in which nothing is right becomes its sink's.

        The response keeps the log-probs and the temperature of the policy that wrote it: it is off-policy, and
        the ratio says so. Returns new groups; which of them were rescued is in Group.rescued.
        """
        groups = list(groups)
        for i, group in enumerate(groups):
            if group.correct.any() or group.problem.id not in self.held:
                continue
            response, reward = self.held[group.problem.id]
            name = [seed, step, *group.problem.id.encode()]  # counted randomness: the batch's order changes nothing
            place = int(np.random.default_rng(name).integers(len(group.rollouts)))
            rollouts, rewards, correct = list(group.rollouts), group.rewards.copy(), group.correct.copy()
            rollouts[place], rewards[place], correct[place] = response, reward, True
            groups[i] = Group(group.problem, rollouts, rewards, correct, rescued=place)
        return groups


@dataclass(frozen=True)
class Substitution:
    """The batch after Informative Substitution."""

    groups: list[Group]
    substituted: int
    skip_update: bool  # too few informative groups to learn from


def substitute(groups: Sequence[Group], seed: int, step: int, least_share: float = 1 / 3) -> Substitution:
    """Overwrite every group without a signal by a random informative one of the batch, problem, rewards and all.

    Only when informative groups exceed `least_share` of the batch; otherwise the update is to be skipped.
    Without replacement when there are enough informative groups, else with (RECIPE section 4).
    """
    informative = [group for group in groups if group.informative]
    empty = len(groups) - len(informative)
    if len(informative) <= least_share * len(groups):
        return Substitution(list(groups), 0, skip_update=True)
    random = np.random.default_rng([seed, step])
    drawn = random.choice(len(informative), size=empty, replace=empty > len(informative))
    spare = iter(drawn.tolist())
    filled = [group if group.informative else informative[next(spare)] for group in groups]
    return Substitution(filled, empty, skip_update=False)


def training_sequences(
    groups: Sequence[Group], advantages_of: Callable[[np.ndarray], np.ndarray] = advantages
) -> list[TrainingSequence]:
    """All rollouts of a batch with their advantages."""
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


TokenLoss = Callable[[Tensor, TokenBatch], Tensor]  # log-probs (N,) and their batch -> losses (N,)
# a loss of rollouts also has `sums`, of the same arguments: what `ratio_stats` adds up over micro-batches and ranks


def ratio_sums(logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """How far the policy is from the sampler, summed over the batch's tokens; `largest_difference` is a maximum."""
    difference = (logprobs - batch.old_logprobs).double()
    ratio, own = difference.exp(), ~batch.rescued
    return {
        "own_ratio": (ratio * own).sum(),
        "own_difference": (difference.abs() * own).sum(),
        "rescued_ratio": (ratio * batch.rescued).sum(),
        "rescued_tokens": batch.rescued.sum(),
        "largest_difference": (difference.abs() * own).max(),
    }


@dataclass(frozen=True)
class PolicyLoss:
    """The POLARIS objective, token by token, to be averaged over all response tokens of the batch.

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
        # a bad token that became much likelier has an unbounded surrogate: dual clip bounds it
        return -torch.where(advantage < 0, torch.maximum(surrogate, self.dual_clip * advantage), surrogate)

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """What the metrics are made of: the tokens that each clip acts on, and `ratio_sums`."""
        ratio = (logprobs - batch.old_logprobs).double().exp()
        good, bad = batch.advantages > 0, batch.advantages < 0
        return ratio_sums(logprobs, batch) | {
            "clipped_low": (bad & (ratio < 1 - self.clip_low)).sum(),
            "clipped_high": (good & (ratio > 1 + self.clip_high)).sum(),
            "dual_clipped": (bad & (ratio > self.dual_clip)).sum(),
        }


def supervised_loss(logprobs: Tensor, batch: TokenBatch) -> Tensor:
    """Cross-entropy of the worked solution's tokens."""
    return -logprobs


# ----------------------------------------------------------------------------------------------------- update


@dataclass
class RatioStats:
    """New policy / sampler, token by token, over the batch of one step."""

    clip_low_share: float
    clip_high_share: float
    dual_clip_share: float
    ratio_mean: float  # of on-policy tokens
    logprob_diff_mean: float  # |trainer - sampler| of on-policy tokens
    logprob_diff_max: float
    rescued_ratio_mean: float | None  # of tokens of rescued rollouts


@dataclass
class UpdateStats:
    """One optimizer step over the whole batch, on all ranks."""

    loss: float
    grad_norm: float  # before clipping
    tokens: int  # response tokens
    stepped: bool  # False: the loss or the gradient was not finite, and nothing was changed
    micro_batch_tokens: int  # what was asked for, or less where memory ran out
    memory_retries: int  # how often it did
    ratios: RatioStats | None = None  # None in supervised fine-tuning
    idle_share: float = 0.0  # estimated: see the function of that name
    optimizer_steps: int = 1  # made: 0 where not stepped, several only in a variant


def optimizer_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    sequences: Sequence[TrainingSequence],
    loss: TokenLoss,
    most_tokens: int,
    max_grad_norm: float = 1.0,
    divisor: float | None = None,
    abandon: Callable[[], bool] = lambda: False,
) -> UpdateStats:
    """One step on the mean loss over every response token of the global batch, or on the sum of losses / `divisor`.

    The token mean is DAPO's (equation 8): 1 / (|o_1| + ... + |o_n|) x the sum over responses and their tokens.
    All ranks call it with the same sequences and take their share of the micro-batches; how the batch is cut, and
    over how many ranks, does not change the gradient. A non-finite gradient leaves the weights as they are.
    `abandon` is asked before every micro-batch, equally often on all ranks; after a yes it raises Interrupted.
    Where memory runs out, the step begins again with smaller micro-batches; UpdateError when there are none.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    note_place("the update")
    tokens = sum(sequence.response_length for sequence in sequences)
    total = divisor or tokens
    even_at = even_length(model) if ranks > 1 else math.inf  # alone, micro-batches alike in memory are best

    def forward_and_backward(batches: list[list[TrainingSequence]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Accumulate the gradient of this rank's micro-batches; the sum of their losses, and of each its `sums`."""
        optimizer.zero_grad(set_to_none=True)
        loss_sum, parts = torch.zeros((), dtype=torch.float64, device=model.device), []
        for mine in batches[rank::ranks]:
            if abandon():
                optimizer.zero_grad(set_to_none=True)
                raise Interrupted
            # a rank without work still takes part in the collectives of forward and backward, with weight zero
            batch = pack(mine or sequences[:1], model.device)
            logprobs = model(batch.tokens, batch.context, batch.predict, batch.targets, batch.temperature)  # (N,)
            summed = loss(logprobs, batch).sum() * (1.0 if mine else 0.0)
            (summed * ranks / total).backward()  # FSDP averages gradients over ranks, the loss is a sum over them
            loss_sum += summed.detach()
            if mine and hasattr(loss, "sums"):
                parts.append(loss.sums(logprobs.detach(), batch))
        return loss_sum, parts

    cut = partial(micro_batches, sequences, ranks=ranks, even_at=even_at)
    (loss_sum, parts), batches, most_tokens, retries = with_smaller_batches(
        forward_and_backward, cut, most_tokens, model, ranks
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
        micro_batch_tokens=most_tokens,
        memory_retries=retries,
        ratios=ratio_stats(parts, tokens, model.device, ranks) if hasattr(loss, "sums") else None,
        idle_share=idle_share([work_of(batch, even_at) for batch in batches], ranks),
        optimizer_steps=int(stepped),
    )


def ratio_stats(parts: list[dict[str, Tensor]], total: int, device: torch.device, ranks: int) -> RatioStats:
    """Add up the `sums` of every micro-batch of every rank, `total` tokens in all; a loss need not have every clip."""
    names = ("clipped_low", "clipped_high", "dual_clipped", "own_ratio", "own_difference")
    names += ("rescued_ratio", "rescued_tokens")
    values = [sum(float(part.get(name, 0.0)) for part in parts) for name in names]
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    largest = torch.tensor(max((float(part["largest_difference"]) for part in parts), default=0.0), device=device)
    if ranks > 1:
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    low, high, dual, own_ratio, own_difference, rescued_ratio, rescued = sums.tolist()
    own = max(total - rescued, 1)
    return RatioStats(
        clip_low_share=low / total,
        clip_high_share=high / total,
        dual_clip_share=dual / total,
        ratio_mean=own_ratio / own,
        logprob_diff_mean=own_difference / own,
        logprob_diff_max=float(largest),
        rescued_ratio_mean=rescued_ratio / rescued if rescued else None,
    )
