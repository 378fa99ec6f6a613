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
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batches import TokenBatch, TrainingSequence, pack
from engine.distributed import Processes
from engine.fingerprint import own_functions
from engine.memory import out_of_memory
from engine.own_function import FunctionError, describe, load, read_function
from grpo import Group, PolicyLoss, RatioStats, TokenLoss, UpdateStats, advantages, ratio_sums, training_sequences
from lab.recipe import Recipe, RlStage, VariantSettings

# -------------------------------------------------------------------------------------- functions of one's own

RESULTS = {"advantage": ("iuf", "finite array"), "loss": ("", "tensor"), "filter": ("b", "bool array")}  # numpy's kinds


@cache
def own_function(what: str, given: str) -> Callable[..., Any] | None:
    """Return the advantage, loss or filter FILE.py:NAME; its results must have the shape of its first argument.

    Calls raise FunctionError, but pass on that memory ran out: the update may continue with smaller micro-batches.
    """
    if (function := read_function(given)) is None:
        return None

    def checked(values: np.ndarray | Tensor, *rest: Any) -> Any:
        try:
            result = load(function)(values, *rest)
        except (Exception, SystemExit) as error:
            if out_of_memory(error):
                raise
            raise FunctionError(f"the {what} {given} cannot be used: {describe(error, function)}; fix it") from error
        kinds, wanted = RESULTS[what]
        fits = isinstance(result, type(values)) and result.shape == values.shape
        if not fits or kinds and not (result.dtype.kind in kinds and np.isfinite(result).all()):
            wanted, found = f"{wanted} of shape {tuple(values.shape)}", " ".join(repr(result).split())
            raise FunctionError(f"the {what} {given} must return a {wanted}, not {found:.80}")
        return result

    return checked


def try_functions(recipe: Recipe, processes: Processes) -> None:
    """Call a variant's functions on small examples; all processes must have the same files. Raises FunctionError."""
    examples = [TrainingSequence(np.arange(4), 2, sign, np.full(2, -1, np.float32)) for sign in (1.0, -1.0)]
    batch = pack(examples, processes.device)
    for stage in (stage for stage in recipe.stage if getattr(stage, "variant", VariantSettings()) != VariantSettings()):
        for right in (1, 0, stage.group_size):  # groups without a signal too: a division by zero would come late
            choose_advantages(stage)((np.arange(stage.group_size) < right).astype(float))
        logprobs = batch.old_logprobs.clone().requires_grad_()
        losses = VariantLoss(stage)(logprobs, batch)
        gradient = torch.autograd.grad(losses.sum(), logprobs)[0] if losses.requires_grad else losses / 0
        if not (losses + gradient).isfinite().all():
            what = f"the value {losses.tolist()} and the gradient {gradient.tolist()} on policy, not finite ones"
            raise FunctionError(f"the loss {stage.variant.loss} has {what}: fix it")
        if rule := own_function("filter", stage.variant.filter):
            rule(np.array([0.0, 0.5, 1.0]))
    files = processes.all_gather(own_functions(recipe))
    if files.count(files[0]) < len(files):
        raise FunctionError(f"the {' or the '.join(files[0])} differs between machines: copy it to all of them")


# ----------------------------------------------------------------------------------------------------- losses


def response_ratio(logprobs: Tensor, batch: TokenBatch) -> Tensor:
    """Return the ratio of each token's response (N,): the geometric mean of its tokens' ratios."""
    lengths, difference = batch.sequence.bincount(), logprobs - batch.old_logprobs
    sums = difference.new_zeros(len(lengths)).index_add(0, batch.sequence, difference)  # (S,)
    return (sums / lengths).exp()[batch.sequence]


def gspo(logprobs: Tensor, batch: TokenBatch, clip_low: float, clip_high: float) -> Tensor:
    """Group Sequence Policy Optimization (arXiv 2507.18071, equations 5 and 7): one ratio for the response.

    It is a geometric mean, hence the narrow clip range (section 5.1: 3e-4 and 4e-4). The paper averages over responses:
    every token has the loss of its response, and the mean over sequences averages them.
    """
    ratio, advantage = response_ratio(logprobs, batch), batch.advantages
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def cispo(logprobs: Tensor, batch: TokenBatch, cap: float) -> Tensor:
    """Clipped IS-weight Policy Optimization (MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

    REINFORCE with the clipped ratio as a constant weight: a token beyond the clip still has a gradient. As in the paper
    there is no lower bound; the paper does not state the upper one (ScaleRL, arXiv 2510.13786: 4 to 8). On policy the
    loss is not near 0, because it contains the log-probs themselves.
    """
    weight = (logprobs.detach() - batch.old_logprobs).exp().clamp(max=cap)
    return -weight * batch.advantages * logprobs


@dataclass(frozen=True)
class VariantLoss:
    """The loss of a stage's variant, with its importance weights and its average over sequences.

    Truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"): min(trainer's old policy / sampler, cap) weighs each token, and the loss's ratio is new / trainer's old.
    The new log-probs, detached, stand for the trainer's old ones, which would cost another forward over the batch. So
    the inner loss has ratio 1 and never clips; after the first of several steps the weight also includes the drift of
    the policy, and only the cap bounds it. The mean over sequences is GRPO's (arXiv 2402.03300, equation 3).
    """

    stage: RlStage

    @property
    def token_loss(self) -> TokenLoss:
        """The loss by its name, or FILE.py:NAME; the default is grpo.PolicyLoss."""
        stage, variant = self.stage, self.stage.variant
        built_in = {
            "polaris": PolicyLoss(stage.clip_low, stage.clip_high, stage.dual_clip),
            "gspo": partial(gspo, clip_low=variant.gspo_clip_low, clip_high=variant.gspo_clip_high),
            "cispo": partial(cispo, cap=variant.cispo_cap),
        }
        return built_in.get(variant.loss) or own_function("loss", variant.loss)

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        cap, trainer = self.stage.variant.importance_cap, logprobs.detach()
        losses = self.token_loss(logprobs, replace(batch, old_logprobs=trainer) if cap else batch)
        if cap:
            losses = (trainer - batch.old_logprobs).exp().clamp(max=cap) * losses
        return losses / batch.sequence.bincount()[batch.sequence] if self.average == "sequences" else losses

    def sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """Count the tokens that the clips act on; those of a loss of one's own are not known."""
        variant, good, bad, clipped = self.stage.variant, batch.advantages > 0, batch.advantages < 0, {}
        if cap := variant.importance_cap or variant.cispo_cap * (variant.loss == "cispo"):  # of good and bad tokens
            clipped = {"clipped_high": ((good | bad) & ((logprobs - batch.old_logprobs).exp() > cap)).sum()}
        elif variant.loss == "gspo":
            ratio = response_ratio(logprobs, batch)
            clipped = {"clipped_low": (bad & (ratio < 1 - variant.gspo_clip_low)).sum()}
            clipped |= {"clipped_high": (good & (ratio > 1 + variant.gspo_clip_high)).sum()}
        elif variant.loss == "polaris":
            return self.token_loss.sums(logprobs, batch)
        return ratio_sums(logprobs, batch) | clipped

    @property
    def average(self) -> str:
        """Over "tokens", "sequences" or by a "constant": the recipe's choice, or that of the loss's paper."""
        return self.stage.variant.average or ("sequences" if self.stage.variant.loss == "gspo" else "tokens")


# --------------------------------------------------------------------------------------- rewards and advantages


def punish_overlong(groups: list[Group], stage: RlStage) -> list[Group]:
    """Subtract DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 to 1, growing before the limit.

    L_max is max_response_tokens, L_cache is punish_last_tokens. The paper's rewards are 1 and -1, POLARIS's 1 and 0,
    so the punishment weighs twice as much as in the paper. Pass rates and sinks keep the original rewards.
    """
    last = stage.variant.punish_last_tokens

    def penalty(group: Group) -> np.ndarray:  # (G,)
        lengths = np.array([len(rollout.tokens) for rollout in group.rollouts])
        return np.clip((stage.max_response_tokens - last - lengths) / last, -1, 0)

    return [replace(group, rewards=group.rewards + penalty(group)) for group in groups] if last else groups


def centred_advantages(rewards: np.ndarray) -> np.ndarray:
    """Dr. GRPO's advantages (arXiv 2503.20783, section 3.2): without the std, hard and easy problems weigh the same."""
    return rewards - rewards.mean()


def maxrl_advantages(rewards: np.ndarray) -> np.ndarray:
    """MaxRL's advantages (arXiv 2602.02710): the rarer a success, the more it weighs, as in the gradient of log p."""
    return (rewards - rewards.mean()) / (rewards.mean() + 1e-6)


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
    loss, updates = VariantLoss(stage), []
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
            parts.append((sequences, divisors[VariantLoss(stage).average]))
    return parts


def merge_updates(updates: Sequence[UpdateStats]) -> UpdateStats | None:
    """Merge the statistics of a batch's optimizer steps, as means over the steps; return None if there are none.

    The log-prob difference is that of the first step: only there does it compare sampler and trainer on one policy.
    """
    if len(updates) <= 1:
        return updates[0] if updates else None

    def means(stats: Sequence[UpdateStats | RatioStats], *names: str) -> dict[str, float | None]:
        values = {name: [v for one in stats if (v := getattr(one, name)) is not None] for name in names}
        return {name: sum(found) / len(found) if found else None for name, found in values.items()}

    shares = "clip_low_share", "clip_high_share", "dual_clip_share", "ratio_mean", "rescued_ratio_mean"
    ratios = [update.ratios for update in updates]
    return replace(
        updates[-1],  # its micro_batch_tokens hold for the following steps
        **means(updates, "loss", "grad_norm"),
        **{
            name: sum(getattr(one, name) for one in updates) for name in ("tokens", "memory_retries", "optimizer_steps")
        },
        stepped=all(update.stepped for update in updates),
        ratios=replace(ratios[0], **means(ratios, *shares)),
    )
