"""The transformer: one decoder for the Qwen3, Qwen2 and Llama families.

    python model.py MODEL OUT --yarn 1.5          # export a checkpoint with the scaling in its config
    python model.py ADAPTER OUT                   # merge a LoRA adapter into its base
    python model.py RUN/checkpoints/step-N OUT    # the model of a checkpoint inside a stage

The T tokens of a forward pass are one packed row: several sequences end to end, without padding. An attention context
decides which tokens see each other: `Packed` in training, the paged KV cache of rollout.py in sampling. Everything
else is the same code for both. Parameters have their Hugging Face names, so checkpoints need no name mapping.

Shapes: T tokens, S sequences, C hidden size, H query heads, K key/value heads, D head dimension, V vocabulary,
N predicted positions.
"""

if __name__ == "__main__":  # --help and usage errors must not wait for the import of torch
    from engine.terminal import prepare_terminal

    prepare_terminal()
    from lab.export import export_arguments

    arguments = export_arguments()

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine import adapter, huggingface
from engine.adapter import Lora, add_lora
from engine.attention import PackedLayout, SharedLayout, packed_attention
from engine.huggingface import ModelError, resolve_folder
from engine.offload import Offload, recomputed
from engine.sharding import full_tensor
from yarn import Rope, Yarn, attention_factor, frequencies, rotate, rotation

LOGIT_CHUNK_BYTES = 512 * 2**20  # of float32 logits in memory at once: 883 positions of a 152K vocabulary


# --------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelConfig:
    """The shape and arithmetic of a model. `source` is the config.json it was read from."""

    model_type: str  # qwen3 | qwen2 | llama
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int  # the window in tokens, prompt + response, after the scaling in `rope`
    rope: Rope
    source: dict

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises each head's queries and keys."""
        return self.model_type == "qwen3"


def parse_config(source: dict, where: str | Path = "config.json") -> ModelConfig:
    """Read a Hugging Face config. ModelError if it describes a model that this file does not compute."""
    with huggingface.named(where):
        return ModelConfig(**huggingface.config_fields(source, where))


def read_config(folder: Path, name: str = "config.json") -> ModelConfig:
    """Read the config of a Hugging Face model folder."""
    return parse_config(huggingface.read_config(folder, name), folder / name)


def extend_window(
    config: ModelConfig,
    factor: float,
    original_window: int | None = None,
    attention_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> ModelConfig:
    """Add YaRN to a config: a window of factor x original_window tokens (default: the config's window)."""
    if factor <= 1:
        raise ModelError(f"a YaRN factor must be above 1, not {factor}")
    if config.rope.scaling is not None:
        raise ModelError(f"the model already has {type(config.rope.scaling).__name__} scaling: extend the unscaled one")
    if not beta_fast > beta_slow > 0 or attention_factor <= 0:
        raise ModelError(
            f"YaRN needs beta_fast > beta_slow > 0 and attention_factor > 0, not {beta_fast:g}, {beta_slow:g} and "
            f"{attention_factor:g}"
        )
    original = original_window or config.max_position_embeddings
    rope = replace(config.rope, scaling=Yarn(factor, original, attention_factor, beta_fast, beta_slow))
    return replace(config, rope=rope, max_position_embeddings=round(factor * original))


# -------------------------------------------------------------------------------------------------- attention


class AttentionContext(Protocol):
    """Which tokens the T tokens of one forward pass attend to."""

    positions: Tensor  # (T,) int64, each token's position in its own sequence

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return causal attention (T, H, D) of rotated q (T, H, D), k (T, K, D) and v (T, K, D)."""
        ...


class Packed:
    """Sequences packed end to end; a token sees itself and the earlier tokens of its own sequence."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.layout = PackedLayout(list(lengths), device)
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (T,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, self.layout)


class SharedPrompts(Packed):
    """Packed sequences whose common prompts are in the row once, so that each prompt is computed once."""

    def __init__(self, layout: SharedLayout):
        self.layout = layout
        self.positions = torch.cat([torch.arange(n) for n in layout.lengths]).to(layout.device)[layout.share]  # (T,)


# -------------------------------------------------------------------------------------------------- the model
# nn.RMSNorm (arXiv 1910.07467, equation 4) computes in float32 and rounds once; on CUDA it is one fused kernel


class Linear(nn.Linear):
    """A projection with an optional adapter: x W^T + b + scale (x A^T) B^T (LoRA, arXiv 2106.09685, equation 3)."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias)
        self.register_parameter("lora_A", None)  # (rank, inputs)
        self.register_parameter("lora_B", None)  # (outputs, rank)
        self.lora_scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (T, outputs)
        if self.lora_A is None:
            return y
        # in place, since backward does not need y: another tensor of its size would raise the memory peak
        return y.addmm_(F.linear(x, self.lora_A), self.lora_B.t(), alpha=self.lora_scale)


class Attention(nn.Module):
    """Grouped-query attention with rotary position embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        qkv_bias = config.model_type == "qwen2"  # which includes DeepSeek-R1-Distill-Qwen
        self.q_proj = Linear(config.hidden_size, queries, bias=qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext, layer: int) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attended = context.attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # (T, H, D)
        return self.o_proj(attended.flatten(-2))  # (T, C)


class SwiGLU(torch.autograd.Function):
    """silu(gate) x up (arXiv 2002.05202); plain autograd would also keep silu(gate) for backward."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class MLP(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """A pre-norm decoder layer. With `recompute`, backward runs its forward again instead of keeping activations."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.recompute = False
        self.offload: Offload | None = None  # with recompute: keeps the layer's input in host memory

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext, layer: int) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._forward, self.offload, layer, x, cos, sin, context, layer)
        return self._forward(x, cos, sin, context, layer)

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, final norm: named `model` in Hugging Face checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model. `load_weights` or `initialise` must fill its weights."""

    name = "the model"  # its folder or hub id, for errors

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.lora: Lora | None = None
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        # bfloat16 logits would be the largest difference between sampler and trainer, and save only memory
        self.float32_head = True
        self.set_rope(config.rope)

    def tie(self) -> None:
        """Share the embedding's weights with the head, if the config says so; needed again after to_empty."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def set_rope(self, rope: Rope) -> None:
        """Replace the rotary frequencies (evaluation switches YaRN on and off on one set of weights)."""
        with torch.device("cpu"):  # even inside torch.device("meta")
            self.inverse_frequencies = frequencies(rope)
        self.attention_factor = attention_factor(rope)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.lm_head.weight.device

    def hidden(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """Compute the hidden states (T, C) of tokens (T,), after the final norm."""
        if self.inverse_frequencies.device != tokens.device:
            self.inverse_frequencies = self.inverse_frequencies.to(tokens.device)
        x = self.model.embed_tokens(tokens)  # (T, C)
        cos, sin = rotation(self.inverse_frequencies, context.positions, self.attention_factor, x.dtype)
        for i, layer in enumerate(self.model.layers):
            # __call__ runs FSDP's hooks: training needs them, sampling uses weights that are already gathered
            x = layer(x, cos, sin, context, i) if torch.is_grad_enabled() else layer.forward(x, cos, sin, context, i)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (N, V) from hidden states (N, C), in float32 if `float32_head`, else in the compute dtype."""
        return head_logits(hidden, self.lm_head.weight, self.float32_head)

    def forward(
        self,
        tokens: Tensor,
        context: AttentionContext,
        predict: Tensor,
        targets: Tensor,
        temperature: Tensor | float = 1.0,
    ) -> Tensor:
        """Compute log-probs, float32 (N,), of `targets` (N,) as the tokens after the row's positions `predict` (N,).

        The softmax is of logits / temperature (a number, or one per target). See `TokenLogprobs` for memory.
        """
        hidden = self.hidden(tokens, context).index_select(0, predict)
        temperature = torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device).expand(len(targets))
        return TokenLogprobs.apply(hidden, self.lm_head.weight, targets, temperature, self.float32_head)


def initialise(model: Transformer, seed: int) -> None:
    """Draw fresh weights: normal, std 0.02; for the projections into the residual stream 0.02 / sqrt(2 x layers)."""
    generator = torch.Generator(model.device).manual_seed(seed)
    residual_std = 0.02 / (2 * model.config.num_hidden_layers) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, residual_std if into_residual else 0.02, generator=generator)


# -------------------------------------------------------------------------------------------------- log-probs


def head_logits(hidden: Tensor, weight: Tensor, float32: bool) -> Tensor:
    """Compute logits (N, V) from hidden (N, C) and the head's weight (V, C), in the inputs' dtype or in float32."""
    if not float32 or hidden.dtype == torch.float32:
        return F.linear(hidden, weight)
    if hidden.is_cuda and not torch.is_grad_enabled():  # half-precision inputs, float32 sums; not differentiable
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return F.linear(hidden.float(), weight.float())


class TokenLogprobs(torch.autograd.Function):
    """Log-probs, float32 (N,), of targets under the softmax of logits / temperature, a chunk of logits at a time.

    hidden (N, C), weight (V, C), targets int64 (N,), temperature float32 (N,). No more than LOGIT_CHUNK_BYTES of
    logits are in memory at once: backward computes them again or, with a frozen head, scales slopes kept by forward.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, float32: bool) -> Tensor:
        targets, divisors = targets[:, None], temperature[:, None]  # (N, 1)
        logprobs, normalisers = temperature.new_empty(len(hidden)), torch.empty_like(divisors)
        frozen_head = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        slopes = torch.empty_like(hidden) if frozen_head else None  # d log-prob / d hidden (N, C)
        for part in _chunks(len(hidden), len(weight)):
            scaled = head_logits(hidden[part], weight, float32).float().div_(divisors[part])  # (n, V)
            largest, picked = scaled.amax(1, keepdim=True), scaled.gather(1, targets[part])
            sums = scaled.sub_(largest).exp_().sum(1, keepdim=True)
            normalisers[part] = largest + sums.log()
            logprobs[part] = (picked - normalisers[part]).squeeze(1)
            if frozen_head:  # scaled becomes (one-hot - softmax) / temperature
                scaled.div_(-sums * divisors[part]).scatter_add_(1, targets[part], 1 / divisors[part])
                torch.mm(scaled.to(weight.dtype), weight, out=slopes[part])
            del scaled  # before the next chunk is made
        ctx.float32 = float32
        if frozen_head:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(hidden, weight, targets, divisors, normalisers)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient[:, None]  # (N, 1)
        if len(ctx.saved_tensors) == 1:
            (slopes,) = ctx.saved_tensors
            return (slopes * gradient).to(slopes.dtype), None, None, None, None
        hidden, weight, targets, divisors, normalisers = ctx.saved_tensors
        hidden_gradient = torch.empty_like(hidden)
        # float32, since a bfloat16 sum over chunks would lose small terms
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        gradient = gradient / divisors
        for part in _chunks(len(hidden), len(weight)):
            scaled = head_logits(hidden[part], weight, ctx.float32).float().div_(divisors[part])  # (n, V)
            softmax = scaled.sub_(normalisers[part]).exp_()
            slope = softmax.mul_(-gradient[part]).scatter_add_(1, targets[part], gradient[part]).to(weight.dtype)
            del scaled, softmax
            torch.mm(slope, weight, out=hidden_gradient[part])
            if weight.is_cuda and weight.dtype != torch.float32:  # half-precision inputs, float32 sums
                torch.addmm(weight_gradient, slope.t(), hidden[part], out_dtype=torch.float32, out=weight_gradient)
            else:
                weight_gradient.addmm_(slope.t().float(), hidden[part].float())
            del slope  # before the next chunk is made
        return hidden_gradient, weight_gradient.to(weight.dtype), None, None, None


def _chunks(positions: int, vocabulary: int) -> list[slice]:
    """Split positions so that a chunk's logits take LOGIT_CHUNK_BYTES."""
    rows = max(1, LOGIT_CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, start + rows) for start in range(0, positions, rows)]


# ----------------------------------------------------------------------------------------- loading and saving


def load_weights(
    model: Transformer, folder: Path, device: torch.device | str, adapter_folder: Path | None = None
) -> None:
    """Allocate a model of the meta device, sharded or not, and copy a folder's tensors, and an adapter's, into it.

    ModelError, before anything is allocated, if any tensor does not fit. Without its folder an adapter stays empty.
    """

    def parameters() -> dict[str, nn.Parameter]:
        base = {name: parameter for name, parameter in model.named_parameters() if ".lora_" not in name}
        return base | adapter.peft_names(adapter.adapter_parameters(model) if adapter_folder else {})

    paths = huggingface.weight_files(folder)
    if adapter_folder:
        paths[adapter_folder / adapter.ADAPTER_WEIGHTS] = set()
    files = huggingface.find_tensors(paths, parameters(), model.config.tie_word_embeddings)
    model.to_empty(device=device)
    model.tie()
    huggingface.read_tensors(files, parameters())


def load(name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """Load an unsharded model from a folder or hub id (evaluation, tests, export).

    An adapter folder gives its base with the adapter, both in `dtype`, and the window used in training.
    """
    folder = resolve_folder(name)
    lora = adapter.read_config(folder)
    base = resolve_folder(lora.base) if lora else folder
    trained = (folder / adapter.TRAINED_CONFIG).exists()
    config = read_config(folder, adapter.TRAINED_CONFIG) if trained else read_config(base)
    with torch.device("meta"):
        model = Transformer(config)
        if lora:
            add_lora(model, lora)
    model.name = str(name)
    load_weights(model.to(dtype), base, device, folder if lora else None)
    return model


def save(
    model: Transformer,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tokenizer_from: Path | None = None,
    settings: Mapping[str, dict] = {},
) -> None:
    """Write a model folder that transformers loads with the same logits. Every rank calls it; rank 0 writes.

    For a model with an adapter, write the adapter alone, in float32, for PEFT. `settings` are further JSON files by
    name. The folder appears complete or not at all; an existing one raises ModelError. Tensors are gathered one file at
    a time.
    """
    parameters = adapter.adapter_parameters(model) if model.lora else dict(model.named_parameters())
    if dist.is_initialized() and dist.get_rank() != 0:
        for parameter in parameters.values():
            full_tensor(parameter)  # a collective, in rank 0's order
        return
    config = huggingface.config_to_json(vars(model.config), dtype)
    with huggingface.new_folder(folder, tokenizer_from) as unfinished:
        if model.lora:
            adapter.write_adapter(unfinished, parameters, model.lora, config)
        else:
            huggingface.write_model(unfinished, parameters, dtype, config)
        for name, value in settings.items():
            huggingface.write_json(unfinished / name, value)


if __name__ == "__main__":
    from lab.export import main

    main(arguments)
