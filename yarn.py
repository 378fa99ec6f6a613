"""Rotary position embedding and YaRN, as pure functions of explicit parameters.

POLARIS trains with plain RoPE and extends the window at inference with YaRN (factor 1.5) without YaRN's
attention temperature. Libraries disagree on the meaning of the config keys for that temperature (RECIPE.md
section 3), so every parameter of this file has one name and one meaning:

    factor                             the extended window / the original one
    original_max_position_embeddings   the window, in tokens, that the model was trained with
    attention_factor                   multiplies cos and sin, hence attention logits by its square; 1.0 = off
    beta_fast, beta_slow               rotations over the original window above which a dimension keeps its
                                       frequency, and below which its frequency is divided by the full factor

Sources: RoFormer (arXiv 2104.09864) equation 34; YaRN (arXiv 2309.00071) section 3.2, with the ramp of its
reference code (over floored and ceiled dimension indices, as in transformers); the Llama 3.1 release for
`Llama3Scaling`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters, described above. The defaults are those of POLARIS."""

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
    """All parameters of a model's position embedding."""

    theta: float
    head_dim: int
    scaling: Yarn | Llama3Scaling | None = None


def plain_frequencies(theta: float, head_dim: int) -> Tensor:
    """Return the radians per position of each pair of dimensions: theta^(-2i/d), float32 (head_dim / 2,)."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def yarn_ramp(theta: float, head_dim: int, original: int, beta_fast: float, beta_slow: float) -> Tensor:
    """Return the share of interpolation of each pair of dimensions, 0 (fast) to 1 (slow), float32 (head_dim / 2,)."""

    def pair_index(rotations: float) -> float:  # the pair with this many rotations over the original window
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_index(beta_fast)), 0)
    high = min(math.ceil(pair_index(beta_slow)), head_dim - 1)
    width = high - low or 0.001  # a tiny head may have no pair in between: a step
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def yarn_frequencies(theta: float, head_dim: int, yarn: Yarn) -> Tensor:
    """Blend the plain and the `factor` times slower frequencies by YaRN's ramp, float32 (head_dim / 2,)."""
    original = yarn.original_max_position_embeddings
    keep = 1 - yarn_ramp(theta, head_dim, original, yarn.beta_fast, yarn.beta_slow)
    # the operations of transformers, in its order: one bit of difference is 1e-4 radians at position 100,000
    slow = 1.0 / (yarn.factor * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    return slow * (1 - keep) + plain_frequencies(theta, head_dim) * keep


def describe_ramp(rope: Rope) -> str:
    """Return how many pairs of dimensions YaRN leaves at their frequency, with a warning if these are few.

    Below a quarter, a model loses the offsets that it computes with (RECIPE.md section 9).
    """
    yarn, pairs = rope.scaling, rope.head_dim // 2
    window, fast = yarn.original_max_position_embeddings, yarn.beta_fast
    kept = int((yarn_ramp(rope.theta, rope.head_dim, window, fast, yarn.beta_slow) == 0).sum())
    text = f"YaRN x {yarn.factor:g} leaves {kept} of {pairs} pairs of dimensions as they are"
    few = (
        f"warning: {text}, fewer than a quarter: lower beta_fast ({fast:g}) for a window as short as {window:,} tokens"
    )
    return few if 4 * kept < pairs else text


def llama3_frequencies(theta: float, head_dim: int, scaling: Llama3Scaling) -> Tensor:
    """Slow long wavelengths by the factor, keep short ones, blend in between; float32 (head_dim / 2,)."""
    plain = plain_frequencies(theta, head_dim)
    rotations = scaling.original_max_position_embeddings / (2 * math.pi / plain)
    keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * plain / scaling.factor + keep * plain  # transformers' order, see above


def frequencies(rope: Rope) -> Tensor:
    """Return the radians per position of each pair of dimensions, with scaling, float32 (head_dim / 2,)."""
    match rope.scaling:
        case None:
            return plain_frequencies(rope.theta, rope.head_dim)
        case Yarn():
            return yarn_frequencies(rope.theta, rope.head_dim, rope.scaling)
        case Llama3Scaling():
            return llama3_frequencies(rope.theta, rope.head_dim, rope.scaling)


def attention_factor(rope: Rope) -> float:
    """Return the factor on cos and sin; 1.0 without YaRN."""
    return rope.scaling.attention_factor if isinstance(rope.scaling, Yarn) else 1.0


def rotation(
    inverse_frequencies: Tensor, positions: Tensor, attention_factor: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute what `rotate` needs, once for all layers: cos and signed sin (T, 1, D) of the angles at positions (T,).

    Angles are float32 even in a bfloat16 model: bfloat16 cannot tell position 40,000 from 40,001.
    """
    angles = positions[:, None, None].float() * inverse_frequencies  # (T, 1, D/2)
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (T, H, D) by the angles of `rotation`: pair i is dimensions i and i + D/2."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
