"""The guide: CLIP's or SigLIP's own way to compare each patch of the vision tower with the user's question."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, SiglipTextModel

from .compat import SiglipMultiheadAttentionPoolingHead, from_config
from .configuration_ppllava import PPLlavaConfig

FRAMES = 4  # that SigLIP's head looks at together: its MLP is wider than D


class PPLlavaGuide(nn.Module):
    """Patches and questions in one space; their cosine times `scale` is how relevant a patch is.

        CLIP    e_i = P_v LN(x_i),                c = P_t text(question)
        SigLIP  e_i = v_i + MLP(LN'(v_i)),        c = text(question),         v_i = the value of LN(x_i) in the tower's
                                                                              pooling head, without mixing patches

    `head.attention.out_proj` comes with SigLIP's pooling head and is not used, nor are its probe, queries and keys
    without `valuew_plus`.
    """

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__()
        vision, text = config.vision_config, config.guide_config
        self.config = config
        self.text_model = from_config(SiglipTextModel if config.siglip else CLIPTextModel, text)
        self.norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        if config.siglip:
            self.head = SiglipMultiheadAttentionPoolingHead(vision)
        else:
            self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
            self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value), dtype=dtype))

    def _apply(self, fn, recurse: bool = True) -> PPLlavaGuide:
        """`to`, `half` and the like leave the scale in float32: exp(4.6052) in bfloat16 is 99, off by one per cent."""
        before = self.logit_scale.data
        super()._apply(fn, recurse)
        if self.logit_scale.dtype.itemsize < 4:
            self.logit_scale.data = before.to(self.logit_scale.device)
        return self

    @property
    def scale(self) -> Tensor:
        """s = exp(logit_scale)."""
        return self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32)).exp()

    def embed_text(self, guide_input_ids: Tensor, guide_attention_mask: Tensor | None = None) -> Tensor:
        """ids and mask [B, L] of the questions -> text_embeds [B, C], not normalised."""
        limit = self.config.guide_config.max_position_embeddings
        if guide_input_ids.dim() != 2 or guide_input_ids.shape[1] > limit:
            raise ValueError(
                f"guide_input_ids must be [B, L] with at most the {limit} positions of the guide, got shape "
                f"{list(guide_input_ids.shape)}; let PPLlavaProcessor truncate the question"
            )
        if guide_input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"guide_input_ids must be int64 or int32, got {guide_input_ids.dtype}; pass them as PPLlavaProcessor "
                "makes them"
            )
        if guide_attention_mask is not None and guide_attention_mask.shape != guide_input_ids.shape:
            raise ValueError(
                f"guide_attention_mask must have the shape of guide_input_ids, {list(guide_input_ids.shape)}, got "
                f"{list(guide_attention_mask.shape)}; pass both as PPLlavaProcessor makes them"
            )
        # Padding on the left would shift the question, and pipelines pad so.
        known = guide_attention_mask is not None and not torch.compiler.is_compiling()
        if known and (guide_attention_mask[:, 1:] > guide_attention_mask[:, :-1]).any():
            raise ValueError(
                "guide_attention_mask must be ones and then zeros, got padding on the left; pass it as "
                "PPLlavaProcessor makes it, and to pipelines batch_size=1"
            )
        pooled = self.text_model(guide_input_ids, attention_mask=guide_attention_mask).pooler_output
        return pooled if self.config.siglip else self.text_projection(pooled)

    def embed_patches(self, features: Tensor) -> Tensor:
        """features [..., V] of the vision tower -> image_embeds [..., C], not normalised."""
        features = self.norm(features)
        if not self.config.siglip:
            return self.visual_projection(features)
        attention = self.head.attention
        # [3 * V, V] holds queries, keys and values one after the other.
        values = F.linear(features, attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2])
        return values + self.head.mlp(self.head.layernorm(values))

    def look(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """SigLIP's :meth:`embed_patches` [F, H, W, C] and, with `valuew_plus`, :meth:`attend` [F, H, W] of features
        [F, H, W, V], a few frames at a time, which are computed again for the gradient."""
        chunks = features.split(FRAMES)
        learns = any(x.requires_grad for x in (features, *self.norm.parameters(), *self.head.parameters()))
        if len(chunks) > 1 and learns and torch.is_grad_enabled():
            options = dict(use_reentrant=False, preserve_rng_state=False)  # nothing in there is random
            parts = [checkpoint(self._look, chunk, **options) for chunk in chunks]
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            parts = [self._look(chunk) for chunk in chunks]
        else:
            return self._look_into(chunks, len(features))
        embeds, attention = zip(*parts)
        return torch.cat(embeds), torch.cat(attention) if self.config.valuew_plus else None

    def _look_into(self, chunks: tuple[Tensor, ...], frames: int) -> tuple[Tensor, Tensor | None]:
        """Without a second copy of what may be an hour of embeddings."""
        results, start = None, 0
        for chunk in chunks:
            parts = [x for x in self._look(chunk) if x is not None]
            results = results or [x.new_empty(frames, *x.shape[1:]) for x in parts]
            for result, part in zip(results, parts):
                result[start : start + len(chunk)] = part
            start += len(chunk)
        return results[0], results[1] if self.config.valuew_plus else None

    def _look(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.embed_patches(features), self.attend(features) if self.config.valuew_plus else None

    def attend(self, features: Tensor) -> Tensor:
        """features [F, H, W, V] -> the attention of SigLIP's probe to the patches of each frame, float32 [F, H, W]:
        a softmax over H * W in each head, the mean over heads."""
        attention, (frames, height, width, channels) = self.head.attention, features.shape
        (query_weight, key_weight, _), biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        heads = attention.num_heads
        query = F.linear(self.head.probe[0], query_weight, biases[0]).view(heads, -1)  # [heads, V / heads]
        key = F.linear(self.norm(features), key_weight, biases[1]).view(frames, height * width, heads, -1)
        scores = torch.einsum("hd,flhd->fhl", query, key) * (channels // heads) ** -0.5  # [F, heads, H * W]
        dtype = torch.promote_types(scores.dtype, torch.float32)
        return scores.softmax(-1, dtype=dtype).mean(1).view(frames, height, width)


__all__ = ["PPLlavaGuide"]
