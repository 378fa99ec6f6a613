"""Faster decoding than the plain path of rollout.py, which is the reference.

A decode step does little arithmetic per weight: memory reads and kernel launches limit its speed.

    PackedModel       float32 on a CPU: q/k/v and gate/up fused, norm weights folded in, all in oneDNN's layout. The
                      packed copy lives as long as one call of `generate`; training never uses it.
    StepGraphs        half precision on CUDA: one launch per token, which replays the step as a CUDA graph.

Attention over the pages is in engine/paged_attention.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.paged_attention import has_paged_attention
from model import AttentionContext, Layer, Transformer
from yarn import rotate, rotation

Project = Callable[[Tensor], Tensor]  # (T, in) -> (T, out)


def pack_linears(linears: Sequence[nn.Linear], norm: nn.RMSNorm | None, rows: int) -> Project:
    """Fuse linear layers that read the same input, and fold in a norm's weight; `rows` is the expected batch size.

    The weights get oneDNN's layout, as torch.compile gives frozen weights on a CPU: much faster than F.linear at tens
    of rows. A LoRA update stays separate, as in training.
    """
    scale = 1.0 if norm is None else norm.weight * len(norm.weight) ** 0.5  # (in,), see `unit`
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat([x.weight for x in linears]) * scale, rows)
    biases = [x.bias for x in linears if x.bias is not None]
    bias = torch.cat(biases) if biases else None
    updates, start = [], 0  # columns of the output, A^T (in, rank), B^T (rank, out)
    for linear in linears:
        if getattr(linear, "lora_A", None) is not None:  # the head is a plain nn.Linear
            columns = slice(start, start + linear.out_features)
            updates.append((columns, (linear.lora_A * scale).T, linear.lora_B.T * linear.lora_scale))
        start += linear.out_features

    def project(x: Tensor) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        for columns, down, up in updates:
            y[:, columns].addmm_(x @ down, up)
        return y

    return project


def unit(x: Tensor, floor: Tensor) -> Tensor:
    """Scale x (..., C) to unit length: RMSNorm, with sqrt(C) left to its weight; floor = sqrt(C eps)."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)


@dataclass
class PackedLayer:
    """A decoder layer's packed weights."""

    qkv: Project
    qk_norm: Tensor | None  # (H + K, D), norm weights of each head times sqrt(D)
    o: Project
    gate_up: Project
    down: Project


class PackedModel:
    """A float32 model's forward from packed copies of its weights; equal up to rounding."""

    def __init__(self, model: Transformer, rows: int):
        self.model, config = model, model.config
        self.head_dim = config.head_dim
        self.floor = torch.tensor(config.hidden_size * config.rms_norm_eps).sqrt()
        self.head_floor = torch.tensor(config.head_dim * config.rms_norm_eps).sqrt()
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.layers = [self._pack(layer, rows) for layer in model.model.layers]
        self.logits = pack_linears([model.lm_head], model.model.norm, rows)  # hidden states (N, C) -> (N, V)

    def _pack(self, layer: Layer, rows: int) -> PackedLayer:
        attention, mlp, qk_norm = layer.self_attn, layer.mlp, None
        if attention.q_norm is not None:
            norms = [attention.q_norm.weight] * self.heads + [attention.k_norm.weight] * self.key_heads
            qk_norm = torch.stack(norms) * self.head_dim**0.5
        return PackedLayer(
            qkv=pack_linears([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm, rows),
            qk_norm=qk_norm,
            o=pack_linears([attention.o_proj], None, rows),
            gate_up=pack_linears([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm, rows),
            down=pack_linears([mlp.down_proj], None, rows),
        )

    def hidden(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """Tokens (T,) -> last hidden states (T, C), of unit length; the last norm's weight is folded into `logits`."""
        cos, sin = rotation(self.model.inverse_frequencies, context.positions, self.model.attention_factor)
        x = F.embedding(tokens, self.model.model.embed_tokens.weight)  # (T, C)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(unit(x, self.floor)).unflatten(-1, (-1, self.head_dim))  # (T, H + 2K, D)
            qk, v = qkv.split((self.heads + self.key_heads, self.key_heads), dim=1)
            if layer.qk_norm is not None:
                qk = unit(qk, self.head_floor) * layer.qk_norm
            q, k = rotate(qk, cos, sin).split((self.heads, self.key_heads), dim=1)
            x += layer.o(context.attend(i, q, k, v).flatten(-2))  # (T, H, D) -> (T, C)
            gate, up = layer.gate_up(unit(x, self.floor)).chunk(2, dim=-1)
            x += layer.down(F.silu(gate).mul_(up))
        return unit(x, self.floor)


def sampling_forward(model: Transformer, rows: int) -> "Transformer | PackedModel":
    """Return what computes hidden states and logits: a packed copy for float32 on a CPU, else the model itself."""
    weight = model.lm_head.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return PackedModel(model, rows)
    return model


def capture_graph(step: Callable[[], None], pool: object) -> tuple[Callable[[], None], object]:
    """Record a step as a CUDA graph; return a function that replays it, and the memory pool that graphs share."""
    graph = torch.cuda.CUDAGraph()
    # a failed capture must not leave its stream current; thread_local lets NCCL's watchdog thread call CUDA meanwhile
    with torch.cuda.stream(torch.cuda.current_stream()):
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    return graph.replay, graph.pool()


class StepGraphs:
    """CUDA graphs of a decode step for a few batch sizes; idle rows pad a batch to the next one.

    A step of a 4B model launches over a thousand kernels: without graphs the host limits the speed, not memory.
    """

    def __init__(self, max_rows: int):
        self.max_rows = max_rows
        self.replays: dict[int, Callable[[], None]] = {}
        self.pool = None

    def run(self, step: Callable[[int], None], rows: int) -> None:
        """Run `step(B)` for a batch size B of at least `rows`; every call must read and update the same tensors.

        The step is not stored: a reference cycle would keep the KV cache alive during the update.
        """
        size = padded_rows(rows, self.max_rows)
        if size in self.replays:
            self.replays[size]()
            return
        step(size)  # without a graph: handles and workspaces, created on first use, must exist before recording
        self.replays[size], self.pool = capture_graph(lambda: step(size), self.pool)

    def forget(self) -> None:
        """Release all graphs and their memory; the next steps are recorded again."""
        self.replays.clear()
        self.pool = None


def step_graphs(max_rows: int, device: torch.device, dtype: torch.dtype) -> StepGraphs | None:
    """Return graphs where the paged kernel is used: it reads growing lengths on the device, so replays work."""
    return StepGraphs(max_rows) if has_paged_attention(device, dtype) else None


def padded_rows(rows: int, max_rows: int) -> int:
    """Return the recorded batch size: 1, 2, 4, 8, then multiples of an eighth of the next power of two."""
    power = 1 << (rows - 1).bit_length()
    step = power // 8 if rows > 8 else power
    return min(-(-rows // step) * step, max_rows)
