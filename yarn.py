"""Rotary position embedding and YaRN, as pure functions of explicit parameters.

The POLARIS recipe trains with plain RoPE and extends the window at inference with YaRN (factor 1.5),
with YaRN's attention temperature switched off. Libraries disagree on what the config keys for that
switch mean (RECIPE.md section 3), so here every parameter has one name and one meaning:

    factor                             how many times longer the window becomes
    original_max_position_embeddings   the window, in tokens, that the model was trained at
    attention_factor                   multiplies cos and sin, hence attention logits by its square; 1.0 = off
    beta_fast, beta_slow               rotations over the original window above which a dimension is left
                                       alone, and below which it is interpolated by the full factor

Sources: RoFormer (arXiv 2104.09864) equation 34; YaRN (arXiv 2309.00071) section 3.2 with the ramp of its
reference code (over floored and ceiled dimension indices, as transformers has it); the Llama 3.1 release
for `Llama3Scaling`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters. The defaults are the recipe's: attention temperature off."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """The frequency scaling that Llama 3.1 and 3.2 were trained with."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class Rope:
    """Everything that fixes a model's position embedding."""

    theta: float
    head_dim: int
    scaling: Yarn | Llama3Scaling | None = None


def plain_frequencies(theta: float, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: theta^(-2i/d), float32 (head_dim / 2,)."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def yarn_ramp(theta: float, head_dim: int, original: int, beta_fast: float, beta_slow: float) -> Tensor:
    """Share of interpolation of each pair of dimensions, 0 (fast, left alone) to 1, float32 (head_dim / 2,)."""

    def pair_index(rotations: float) -> float:  # the pair that turns this often over the original window
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_index(beta_fast)), 0)
    high = min(math.ceil(pair_index(beta_slow)), head_dim - 1)
    width = high - low or 0.001  # a tiny head may have no pair between the two: a step instead of a ramp
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def yarn_frequencies(
    theta: float, head_dim: int, factor: float, original: int, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> Tensor:
    """YaRN's blend of the plain and the `factor` times slower frequencies, float32 (head_dim / 2,)."""
    keep = 1 - yarn_ramp(theta, head_dim, original, beta_fast, beta_slow)
    # rounded step by step as transformers does: one bit of difference is 1e-4 radians at position 100,000
    slow = 1.0 / (factor * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    return slow * (1 - keep) + plain_frequencies(theta, head_dim) * keep


def llama3_frequencies(theta: float, head_dim: int, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1's blend: wavelengths beyond the window are slowed, short ones kept, float32 (head_dim / 2,)."""
    plain = plain_frequencies(theta, head_dim)
    rotations = scaling.original_max_position_embeddings / (2 * math.pi / plain)
    keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * plain / scaling.factor + keep * plain  # rounded as transformers does, see above


def frequencies(rope: Rope) -> Tensor:
    """Radians per position of each pair of dimensions for any `Rope`, float32 (head_dim / 2,)."""
    match rope.scaling:
        case None:
            return plain_frequencies(rope.theta, rope.head_dim)
        case Yarn() as yarn:
            original = yarn.original_max_position_embeddings
            return yarn_frequencies(rope.theta, rope.head_dim, yarn.factor, original, yarn.beta_fast, yarn.beta_slow)
        case Llama3Scaling() as llama3:
            return llama3_frequencies(rope.theta, rope.head_dim, llama3)


def attention_factor(rope: Rope) -> float:
    """What multiplies cos and sin; 1.0 without YaRN."""
    return rope.scaling.attention_factor if isinstance(rope.scaling, Yarn) else 1.0


def rotation(inverse_frequencies: Tensor, positions: Tensor, attention_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle. Positions (T,) -> two float32 tensors (T, head_dim / 2).

    Angles are taken in float32 even when the model computes in bfloat16, which cannot tell 40,000 from 40,001.
    """
    angles = positions[:, None].float() * inverse_frequencies  # (T, D/2)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys (T, H, D) by their positions' angles (T, D/2): pair i is dimensions i and i + D/2."""
    cos = torch.cat((cos, cos), dim=-1)[:, None].to(x.dtype)  # (T, 1, D)
    sin = torch.cat((-sin, sin), dim=-1)[:, None].to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
