"""The forward pass of a decoder for many beams over one shared context a user.

A prompt is read once, and its keys and values are kept once a user. The beams of a user attend to
them together; the few tokens that a beam has written itself lie in a small cache apart, which is
reordered when beams die and split. So neither the memory of the context nor the work on it depends
on the number of beams but for the attention itself.

The weights are those of a causal language model of Transformers of the Llama family (Llama, Qwen2,
Qwen3, Mistral, Hunyuan dense): RMS norms before each block, rotary positions, grouped-query
attention, a gated MLP. Opening compares a few tokens with the model's own forward pass, so that a
model that differs in anything is refused and not decoded wrongly.

What a plain forward pass does and this one leaves out: the prompt's last layer beyond keys and
values, logits of the prompt, padding on the left, and, on CPUs, the slower of two matrix kernels.

Knows nothing of Semantic IDs, of what may follow, or of how beams are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from leadre_lib.errors import LeadreError

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}  # of the largest logit
CHECKED_TOKENS = 12
PACKED_FOR = 1024  # rows of an input for which oneDNN lays weights out; any number can come
# Numbers of logits held at once: what stays in a CPU's cache, what a GPU holds easily (512 MiB).
LOGITS_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 27}
LEAST_ROWS = 64  # of a product with the vocabulary
FAMILY = ("llama", "qwen2", "qwen3", "mistral", "hunyuan_v1_dense")  # Transformers' model types


@dataclass
class Context:
    """What is kept of the prompts of some users, and of their beams.

    Attributes:
        keys, values: [users, key heads, tokens, head] of each layer. Prompts that are shorter than
            the longest leave the end of their rows unused.
        lengths: int64 [users]: tokens of each prompt.
        padding: what the unused places add to attention, [users, 1, 1, tokens]; None without any.
        own: of each layer the keys and values of the tokens that each beam has written, [users, key
            heads, beams, steps, head].
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    padding: Tensor | None = None
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the longest prompt."""
        return self.keys[0].shape[2]

    @property
    def bytes(self) -> int:
        """Memory of the prompts' keys and values, without the beams' own."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


@dataclass(frozen=True)
class _Layer:
    norm: Tensor
    query_key_value: _Linear
    head_norms: Tensor | None  # [query and key heads, head]
    out: _Linear
    mlp_norm: Tensor
    gate: _Linear
    up: _Linear
    down: _Linear


class Transformer:
    """A model's weights, laid out for reading prompts and extending beams.

    Args:
        model: of the Llama family; not needed afterwards, nor changed.
        max_tokens: longest sequence, prompt and beams' tokens together.
        device: where to compute, such as `cpu` or `cuda`.
        dtype: of weights, keys and values; what is added up from layer to layer stays in float32.
        packed: lay weights out for oneDNN, where the device is a CPU that has it.

    Raises:
        LeadreError: the model is of another architecture.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_tokens: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        packed: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self._packed = packed and self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self._eps = float(getattr(model.config.get_text_config(), "rms_norm_eps", 1e-6))
        with torch.inference_mode():
            try:
                self._take(model, max_tokens)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
                raise LeadreError(f"the model does not fit into memory: {reason}") from None
            except (AttributeError, RuntimeError) as error:
                raise _refusal(model, str(error).partition("\n")[0]) from None
            self._check(model)

    def _take(self, model: Any, max_tokens: int) -> None:
        base, config = model.base_model, model.config.get_text_config()
        if config.model_type not in FAMILY:
            raise AttributeError(f"it is of type {config.model_type}")
        if config.hidden_act != "silu":
            raise AttributeError(f"its MLP has {config.hidden_act} where silu is known")
        if _slides(config):
            raise AttributeError("it attends through a sliding window")
        attention = base.layers[0].self_attn
        self.head = int(attention.head_dim)
        self.heads = attention.q_proj.weight.shape[0] // self.head
        self.key_heads = attention.k_proj.weight.shape[0] // self.head
        self._norm_after = hasattr(attention, "query_layernorm")
        longest = max(max_tokens, CHECKED_TOKENS)
        positions = torch.arange(longest, device=base.embed_tokens.weight.device)[None]
        cos, sin = base.rotary_emb(torch.zeros(1, device=positions.device), positions)
        half = self.head // 2
        rotation = torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())
        self._rotation = rotation.to(self.device)  # [positions, head / 2]
        self._embedding = self._move(base.embed_tokens.weight)
        self._layers = [self._layer(layer) for layer in base.layers]
        self._norm = self._move(base.norm.weight, torch.float32)
        output = model.get_output_embeddings()
        self._logits = self._linear(output)
        self.vocabulary = output.weight.shape[0]

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        names = ("query_layernorm", "key_layernorm") if self._norm_after else ("q_norm", "k_norm")
        head_norms = None
        if hasattr(attention, names[0]):
            weights = [_interleaved(getattr(attention, name).weight, 1) for name in names]
            counts = (self.heads, self.key_heads)
            rows = [w.expand(count, -1) for w, count in zip(weights, counts, strict=True)]
            rows[0] = rows[0] * attention.scaling
            head_norms = self._move(torch.cat(rows), torch.float32)
        # The scale of attention is taken into the queries' weights, or into their norm.
        scale = attention.scaling if head_norms is None else 1.0
        return _Layer(
            self._move(layer.input_layernorm.weight, torch.float32),
            self._linear(
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                heads=(self.heads, self.key_heads, 0),
                scales=(scale, 1.0, 1.0),
            ),
            head_norms,
            self._linear(attention.o_proj),
            self._move(layer.post_attention_layernorm.weight, torch.float32),
            self._linear(mlp.gate_proj),
            self._linear(mlp.up_proj),
            self._linear(mlp.down_proj),
        )

    def _linear(
        self, *modules: nn.Linear, heads: Sequence[int] = (0,), scales: Sequence[float] = (1.0,)
    ) -> _Linear:
        """Several layers of one input as one; those that have `heads` with rows interleaved."""
        parts = list(zip(modules, heads, scales, strict=True))
        weights = [_interleaved(m.weight, count) * scale for m, count, scale in parts]
        biases = [
            weight.new_zeros(len(weight)) if m.bias is None else _interleaved(m.bias, count) * scale
            for weight, (m, count, scale) in zip(weights, parts, strict=True)
        ]
        any_bias = any(m.bias is not None for m in modules)
        return _Linear(
            self._move(torch.cat(weights)),
            self._move(torch.cat(biases)) if any_bias else None,
            self._packed,
        )

    def _move(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.detach().to(self.device, dtype or self.dtype)

    def logits_of(self, model: PreTrainedModel, token_ids: Tensor) -> _Linear:
        """The output layer of the model for a few tokens only: [..., hidden] to [..., tokens]."""
        output: Any = model.get_output_embeddings()
        rows = token_ids.to(output.weight.device)
        bias = None if output.bias is None else self._move(output.bias[rows])
        return _Linear(self._move(output.weight[rows]), bias, self._packed)

    def read(self, ids: Tensor, lengths: Tensor, prefix: Context | None = None) -> Context:
        """Read prompts.

        Args:
            ids: int64 [users, tokens], each prompt from the left on; any token fills the rest.
            lengths: int64 [users], tokens of each prompt.
            prefix: of one user; what all prompts begin with, before `ids`.

        Returns:
            A context without beams.
        """
        users, width = ids.shape
        before = 0 if prefix is None else prefix.tokens
        rotation = self._rotation[before : before + width, None]
        context = Context([], [], lengths + before)
        hidden = F.embedding(ids, self._embedding).float()
        for number, layer in enumerate(self._layers):
            query, key, value = self._attention_inputs(hidden, layer, rotation)
            # Laid out once as every step reads them.
            key, value = key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()
            if prefix is not None:
                key = torch.cat([prefix.keys[number].expand(users, -1, -1, -1), key], 2)
                value = torch.cat([prefix.values[number].expand(users, -1, -1, -1), value], 2)
            context.keys.append(key)
            context.values.append(value)
            if number == len(self._layers) - 1 or not width:
                continue  # nothing reads what the prompt's positions become above
            # Places without a query stand for the prefix: square and causal is the fast kernel.
            query = F.pad(query.transpose(1, 2), (0, 0, before, 0))
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=1.0, enable_gqa=True
            )[:, :, before:]
            hidden = self._after_attention(hidden, mixed.transpose(1, 2).flatten(2), layer)
        if bool((lengths < width).any()):
            unused = torch.arange(context.tokens, device=self.device) >= context.lengths[:, None]
            padding = torch.zeros(unused.shape, dtype=self.dtype, device=self.device)
            context.padding = padding.masked_fill_(unused, -torch.inf)[:, None, None]
        return context

    def step(self, context: Context, ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """Feed one token a beam.

        Args:
            context: of `read`; the beams' own tokens are added to it.
            ids: int64 [users, beams].
            parents: int64 [users, beams], the beam of the step before that each one goes on; None
                in the first step.

        Returns:
            Normalised hidden states [users, beams, hidden].
        """
        done = context.own[0][0].shape[3] if context.own else 0
        rotation = self._rotation[context.lengths + done][:, None, None]
        hidden = F.embedding(ids, self._embedding).float()
        for number, layer in enumerate(self._layers):
            query, key, value = self._attention_inputs(hidden, layer, rotation)
            new = (key.transpose(1, 2)[:, :, :, None], value.transpose(1, 2)[:, :, :, None])
            if parents is None:
                context.own.append(new)
            else:
                context.own[number] = (
                    torch.cat([_reordered(context.own[number][0], parents), new[0]], 3),
                    torch.cat([_reordered(context.own[number][1], parents), new[1]], 3),
                )
            mixed = self._attend(query, context, number)
            hidden = self._after_attention(hidden, mixed, layer)
        return self._normed(hidden, self._norm)

    def log_normaliser(self, hidden: Tensor) -> Tensor:
        """Logarithm of the sum of the exponentials of all logits, float32 [users, beams]."""
        chunk = max(LEAST_ROWS, LOGITS_CHUNK[self.device.type] // self.vocabulary)
        parts = []
        for rows in hidden.flatten(0, 1).split(chunk):
            logits = self._logits(rows).float()
            # Half the passes over the logits of `logsumexp`.
            parts.append(logits[:, 0] - logits.log_softmax(-1)[:, 0])
        return torch.cat(parts).unflatten(0, hidden.shape[:2])

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], weight, self._eps).to(self.dtype)

    def _attention_inputs(
        self, hidden: Tensor, layer: _Layer, rotation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both with positions) and values [users, tokens, heads, head]."""
        turned = self.heads + self.key_heads
        all_three = layer.query_key_value(self._normed(hidden, layer.norm))
        all_three = all_three.unflatten(-1, (turned + self.key_heads, self.head))
        query_key = all_three[..., :turned, :].float()
        if layer.head_norms is not None and not self._norm_after:
            query_key = self._head_normed(query_key, layer.head_norms)
        pairs = torch.view_as_complex(query_key.unflatten(-1, (-1, 2)))
        query_key = torch.view_as_real(pairs * rotation).flatten(-2)
        if layer.head_norms is not None and self._norm_after:
            query_key = self._head_normed(query_key, layer.head_norms)
        query_key = query_key.to(self.dtype)
        return (
            query_key[..., : self.heads, :],
            query_key[..., self.heads :, :],
            all_three[..., turned:, :],
        )

    def _head_normed(self, query_key: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(query_key, query_key.shape[-1:], None, self._eps) * weight

    def _attend(self, query: Tensor, context: Context, number: int) -> Tensor:
        """Attention of beams to their user's prompt and their own tokens, [users, beams, all]."""
        users, beams = query.shape[:2]
        keys, values = context.keys[number], context.values[number]
        own_keys, own_values = context.own[number]
        group = self.heads // self.key_heads
        # All beams of a user are rows of one matrix product with its prompt.
        query = query.unflatten(2, (self.key_heads, group)).transpose(1, 2)
        scores = query.flatten(2, 3) @ keys.transpose(-1, -2)
        if context.padding is not None:
            scores = scores + context.padding
        own = (query.unsqueeze(4) * own_keys.unsqueeze(3)).sum(-1).flatten(2, 3)
        weights = torch.cat([scores, own], -1).softmax(-1, dtype=torch.float32).to(self.dtype)
        prompt, steps = weights.split([keys.shape[2], own.shape[-1]], -1)
        mixed = (prompt @ values).unflatten(2, (beams, group))
        steps = steps.unflatten(2, (beams, group)).unsqueeze(-1)
        mixed = mixed + (steps * own_values.unsqueeze(3)).sum(4)
        return mixed.transpose(1, 2).reshape(users, beams, -1)

    def _after_attention(self, hidden: Tensor, mixed: Tensor, layer: _Layer) -> Tensor:
        hidden = hidden + layer.out(mixed)
        normed = self._normed(hidden, layer.mlp_norm)
        return hidden + layer.down(layer.gate(normed, silu=True).mul_(layer.up(normed)))

    def _check(self, model: PreTrainedModel) -> None:
        """Compare with the model's own forward pass on a few tokens."""
        spread = max(1, self.vocabulary // (2 * CHECKED_TOKENS))
        ids = (torch.arange(2 * CHECKED_TOKENS) * spread % self.vocabulary).view(2, -1)
        theirs = model(input_ids=ids.to(model.device), use_cache=False).logits[:, -1]
        theirs = theirs.to(self.device).float()
        ids = ids.to(self.device)
        lengths = torch.full((2,), CHECKED_TOKENS - 1, device=self.device)
        ours = self._logits(self.step(self.read(ids[:, :-1], lengths), ids[:, -1:]))[:, 0].float()
        if not (torch.isfinite(theirs).all() and torch.isfinite(ours).all()):
            raise LeadreError("the model gives scores that are not finite: it is damaged")
        off = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()
        if not off <= TOLERANCE[self.dtype]:
            raise _refusal(model, f"its logits differ by {off:.1%}")


class _Linear:
    """A linear layer. On a CPU the weights are packed for oneDNN.

    Torch hands float32 products to MKL, which on some CPUs is a third slower; the call is what its
    compiler emits for linear layers.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, packed: bool) -> None:
        self._bias = bias
        self._packed = packed
        self._weight = weight.contiguous()
        if packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACKED_FOR)

    def __call__(self, x: Tensor, silu: bool = False) -> Tensor:
        """[..., in] to [..., out]."""
        if not self._packed:
            made = F.linear(x, self._weight, self._bias)
            return F.silu(made, inplace=True) if silu else made
        if not x.numel():
            return x.new_empty((*x.shape[:-1], self._weight.shape[0]))
        kind = "swish" if silu else "none"
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, kind, [], ""
        )
        return fused


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order in which rotary pairs are neighbours; 0 heads: as they are.

    Transformers pairs dimension i with i + half; as neighbours a pair is one complex number. Query
    and key are permuted alike, which leaves their products as they were.
    """
    if not heads:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _reordered(own: Tensor, parents: Tensor) -> Tensor:
    """Beams of [users, key heads, beams, steps, head] replaced by their parents'."""
    users = torch.arange(len(own), device=own.device)[:, None]
    return own.transpose(1, 2)[users, parents].transpose(1, 2)


def _slides(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return any(kind != "full_attention" for kind in types)
    return getattr(config, "sliding_window", None) is not None


def _refusal(model: PreTrainedModel, reason: str) -> LeadreError:
    return LeadreError(
        f"{type(model).__name__} cannot be decoded: {reason}; the decoder reads models of the Llama"
        f" family ({', '.join(FAMILY)}), without a sliding window"
    )
