"""Groups of rollouts and the update: rescue, substitution, advantages, the clipped loss, the optimizer step.

    rollouts of a problem + their rewards = a Group, which moves only as a whole
    Sinks.rescue    an all-wrong group gets one correct response from an earlier visit
    substitute      groups without a signal are overwritten by whole groups that have one
    advantages      (r - mean) / (std + 1e-6) inside the group
    PolicyLoss      clip 0.2 below, 0.28 above, dual clip 3.0; no KL term, no entropy term, no reference model
    optimizer_step  packed micro-batches, the mean over all response tokens of the global batch

Old log-probs are the sampler's own, so the ratio also shows any difference between the two forwards. With one
optimizer step per batch it is 1 up to rounding; the clips act on rescued rollouts.

Source: RECIPE.md sections 4 and 5; GRPO (arXiv 2402.03300) equation 3; DAPO (arXiv 2503.14476) equation 8 for
clip-higher and the token mean; dual clip (arXiv 1912.09729) equation 5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from engine.batches import (
    TokenBatch,
    TrainingSequence,
    even_length,
    idle_share,
    micro_batches,
    pack,
    packed_tokens,
    work_of,
)
from engine.device import Interrupted, enter
from engine.memory import forget_half_done_pass, out_of_memory
from lab.problems import Problem
from model import Transformer
from rollout import Rollout

ADVANTAGE_EPSILON = 1e-6


class UpdateError(RuntimeError):
    """An update that cannot be made, in one sentence."""


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
    """Group-relative advantages (G,) -> (G,): the standard deviation has Bessel's correction."""
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
        """Groups in which nothing is right get their sink's response in place of a random one of their own.

        The response keeps the log-probs and the temperature of the policy that wrote it: it is off-policy, and
        the ratio says so. Returns new groups; which of them were rescued is in Group.rescued.
        """
        return [self._rescue_one(group, seed, step) for group in groups]

    def _rescue_one(self, group: Group, seed: int, step: int) -> Group:
        if group.correct.any() or group.problem.id not in self.held:
            return group
        response, reward = self.held[group.problem.id]
        name = [seed, step, *group.problem.id.encode()]  # counted randomness: the batch's order changes nothing
        place = int(np.random.default_rng(name).integers(len(group.rollouts)))
        rollouts, rewards, correct = list(group.rollouts), group.rewards.copy(), group.correct.copy()
        rollouts[place], rewards[place], correct[place] = response, reward, True
        return Group(group.problem, rollouts, rewards, correct, rescued=place)


@dataclass(frozen=True)
class Substitution:
    """The batch after Informative Substitution."""

    groups: list[Group]
    substituted: int
    skip_update: bool  # too few informative groups to learn from


def substitute(groups: Sequence[Group], seed: int, step: int, least_share: float = 1 / 3) -> Substitution:
    """Overwrite every group without a signal by a random informative one of the batch, problem, rewards and all.

    Only when informative groups exceed `least_share` of the batch; otherwise the update is to be skipped.
    Without replacement when there are enough informative groups, else with (RECIPE.md section 4).
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
    sequences = []
    for group in groups:
        for i, (rollout, advantage) in enumerate(zip(group.rollouts, advantages_of(group.rewards), strict=True)):
            tokens = np.concatenate([rollout.prompt, rollout.tokens])
            sequence = TrainingSequence(
                tokens, len(rollout.prompt), float(advantage), rollout.logprobs, rollout.temperature
            )
            sequences.append(replace(sequence, rescued=i == group.rescued))
    return sequences


TokenLoss = Callable[[Tensor, TokenBatch], Tensor]  # log-probs (N,) and their batch -> losses (N,)
# a loss of rollouts also has `sums`, of the same arguments: what RatioStats is made of, over the batch's tokens


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

    The ratio is clipped to [1 - clip_low, 1 + clip_high], the loss of a bad token to dual_clip x |advantage|.
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
    optimizer_steps: int = 1  # several only in a variant
    idle_share: float = 0.0  # reckoned: see the function of that name


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

    All ranks call it with the same sequences and take their share of the micro-batches; how the batch is cut, and
    over how many ranks, does not change the gradient. A non-finite gradient leaves the weights as they are.
    Where memory runs out, the step begins again with smaller micro-batches; UpdateError when there are none.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    enter("the update")
    tokens = sum(sequence.response_length for sequence in sequences)
    total = divisor or tokens
    lengths, retries = [len(sequence.tokens) for sequence in sequences], 0
    even_at = even_length(model) if ranks > 1 else math.inf  # alone, micro-batches alike in memory are best
    while True:
        batches = micro_batches(sequences, most_tokens, ranks, even_at)
        optimizer.zero_grad(set_to_none=True)
        try:
            loss_sum, parts = accumulate_gradient(model, sequences, batches[rank::ranks], loss, total, ranks, abandon)
            break
        except Interrupted:
            optimizer.zero_grad(set_to_none=True)
            raise
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            loads = [packed_tokens([sequences[i] for i in batch]) for batch in batches if len(batch) > 1]
            if not loads:
                raise UpdateError(
                    f"out of memory in the update with one sequence at a time, of at most {max(lengths):,} tokens: "
                    "train a LoRA adapter, set offload_activations or offload_optimizer, or shorten the stage"
                ) from None
            # the other processes wait in a collective of this micro-batch and cannot be told to begin again; a torch
            # without this method cannot undo the half-done pass of a sharded model
            if ranks > 1 or (isinstance(model, FSDPModule) and not hasattr(model, "reset_iter_state")):
                raise UpdateError(
                    f"out of memory in the update: set micro_batch_tokens to {max(loads) // 2} or less and resume the "
                    "run; a smaller one is found by itself only in a run of one process, on torch 2.13 or newer"
                ) from None
            most_tokens, retries = max(loads) // 2, retries + 1
        # only here, where the error is forgotten, do the frames of its traceback let go of what they held
        forget_half_done_pass(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if ranks > 1:
        dist.all_reduce(loss_sum)
    stepped = math.isfinite(norm) and math.isfinite(float(loss_sum))
    if stepped:
        try:
            optimizer.step()  # the first one makes the moments
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UpdateError(
                "out of memory in the optimizer's step: set offload_optimizer = true or train a LoRA adapter"
            ) from None
    optimizer.zero_grad(set_to_none=True)
    ratios = ratio_stats(parts, tokens, model.device, ranks) if hasattr(loss, "sums") else None
    idle = idle_share([work_of([sequences[i] for i in batch], even_at) for batch in batches], ranks)
    return UpdateStats(float(loss_sum) / total, norm, tokens, stepped, most_tokens, retries, ratios, int(stepped), idle)


def accumulate_gradient(
    model: Transformer,
    sequences: Sequence[TrainingSequence],
    batches: list[list[int]],
    loss: TokenLoss,
    total: float,
    ranks: int,
    abandon: Callable[[], bool],
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Forward and backward of this rank's micro-batches; the sum of the losses, and what RatioStats is made of."""
    loss_sum, parts = torch.zeros((), dtype=torch.float64, device=model.device), []
    for indices in batches:
        if abandon():  # on all ranks alike: each has as many micro-batches
            raise Interrupted
        # a rank without work still takes part in the collectives of forward and backward, with weight zero
        batch = pack([sequences[i] for i in indices or [0]], model.device)
        logprobs = model(batch.tokens, batch.context, batch.predict, batch.targets, batch.temperature)
        summed = loss(logprobs, batch).sum() * (1.0 if indices else 0.0)
        (summed * ranks / total).backward()  # FSDP averages gradients over ranks, the loss is a sum over them
        loss_sum += summed.detach()
        if indices and hasattr(loss, "sums"):
            parts.append(loss.sums(logprobs.detach(), batch))
    return loss_sum, parts


def ratio_stats(parts: list[dict[str, Tensor]], total: int, device: torch.device, ranks: int) -> RatioStats:
    """Add up what every micro-batch of every rank has seen of `total` tokens."""
    names = (
        "clipped_low", "clipped_high", "dual_clipped", "own_ratio", "own_difference", "rescued_ratio", "rescued_tokens",
    )  # fmt: skip
    sums = torch.tensor(
        [sum(float(part[name]) for part in parts) for name in names], dtype=torch.float64, device=device
    )
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
