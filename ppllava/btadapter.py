"""The BT-Adapter (Liu et al., CVPR 2024): CLIP with a branch beside its last layers that sees all frames of a clip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat import CLIPAttention, CLIPEncoderLayer, init

# Some attention kernels have one block per sequence along an axis of the grid that ends here (pytorch/pytorch#142228);
# 114 images of 24 x 24 patches are more temporal sequences than that.
MAX_SEQUENCES = 2**16 - 1


@strict
class BTAdapterVisionConfig(CLIPVisionConfig):
    """Configuration of :class:`BTAdapterVisionModel`.

    Args:
        adapter_depth: layers of the adapter, 1 ... num_hidden_layers; they stand beside the last ones of the tower.
        adapter_max_frames: rows of the adapter's time embedding, the longest clip.
    """

    model_type = "ppllava_btadapter_vision_model"

    adapter_depth: int = 4
    adapter_max_frames: int = 64

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if not 1 <= self.adapter_depth <= self.num_hidden_layers:
            raise ValueError(
                f"adapter_depth must be 1 ... num_hidden_layers = {self.num_hidden_layers}, got {self.adapter_depth}; "
                "use a CLIPVisionModel for a tower without adapter"
            )


@dataclass(frozen=True)
class _Clips:
    """N clips of F frames in all, those of equal length side by side: (number n, frames T of each) per length."""

    groups: list[tuple[int, int]]

    def stack(self, x: Tensor) -> list[Tensor]:
        """[F, ...] -> [n, T, ...] of every length."""
        parts = x.split([n * length for n, length in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups)]

    def mean(self, x: Tensor) -> Tensor:
        """[F, D] -> [N, D]: over the frames of each clip."""
        return torch.cat([part.mean(1) for part in self.stack(x)])

    def repeat(self, x: Tensor) -> Tensor:
        """[N, D] -> [F, D]: to each frame of the clip."""
        parts = x.split([n for n, _ in self.groups])
        return torch.cat([part.repeat_interleave(length, 0) for part, (_, length) in zip(parts, self.groups)])

    def times(self, device: torch.device) -> Tensor:
        """[F] int64: which frame of its clip each frame is."""
        return torch.cat([torch.arange(length, device=device).repeat(n) for n, length in self.groups])


class _ZeroLinear(nn.Linear):
    """Starts from zeros. A class, for transformers shows `_init_weights` only modules with parameters of their own."""


class BTAdapterTemporalLayer(GradientCheckpointingLayer):
    """x + temporal_fc(attention(norm(x))) over the frames of a clip, each patch by itself; the CLS token stays."""

    def __init__(self, config: BTAdapterVisionConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_fc = _ZeroLinear(config.hidden_size, config.hidden_size)

    def forward(self, patches: Tensor, clips: _Clips, **kwargs) -> Tensor:
        def layer(x: Tensor) -> Tensor:  # [n * P, T, D]
            return x + self.temporal_fc(self.self_attn(self.layer_norm1(x), **kwargs)[0])

        out = []
        for part in clips.stack(patches):
            x = part.transpose(1, 2)  # [n, P, T, D]
            x = _by_chunk(layer, MAX_SEQUENCES, x.flatten(0, 1)).unflatten(0, x.shape[:2])
            out.append(x.transpose(1, 2).flatten(0, 1))
        return torch.cat(out)  # [F, P, D]


class BTAdapterSpatialLayer(CLIPEncoderLayer):
    """A CLIP layer on every frame, each with the CLS token of its clip, whose update is the mean over the frames."""

    def forward(
        self, classes: Tensor, patches: Tensor, clips: _Clips, chunk: int | None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        def frame(classes: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.cat((classes[:, None], patches), 1)  # [f, 1 + P, D]
            update = self.self_attn(self.layer_norm1(x), **kwargs)[0]
            return update[:, 0], self._feed_forward(patches + update[:, 1:])

        updates, patches = _by_chunk(frame, chunk, clips.repeat(classes), patches)  # [F, D], [F, P, D]
        return self._feed_forward(classes + clips.mean(updates)), patches

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.layer_norm2(x))


class BTAdapter(nn.Module):
    """The branch: a stream of patches of every frame, and one CLS token per clip."""

    def __init__(self, config: BTAdapterVisionConfig) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.time_embedding = nn.Embedding(config.adapter_max_frames, config.hidden_size)
        self.spatial_layers = nn.ModuleList(BTAdapterSpatialLayer(config) for _ in range(config.adapter_depth))
        self.temporal_layers = nn.ModuleList(BTAdapterTemporalLayer(config) for _ in range(config.adapter_depth))

    def forward(
        self,
        i: int,
        x: Tensor,  # [F, 1 + P, D], from the encoder layer
        stream: tuple[Tensor, Tensor] | None,  # [N, D], [F, P, D], from adapter layer i - 1
        position: Tensor,  # [1 + P, D]
        clips: _Clips,
        chunk: int | None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        classes, patches = clips.mean(x[:, 0]), x[:, 1:]
        if stream is None:
            classes = (classes + self.class_token[0] + position[:1]) / 2
            time = self.time_embedding(clips.times(x.device))  # [F, D]
            patches = patches + position[1:] + time[:, None]
        else:
            classes, patches = stream[0] + classes, stream[1] + patches
        patches = self.temporal_layers[i](patches, clips, **kwargs)
        return self.spatial_layers[i](classes, patches, clips, chunk, **kwargs)


class BTAdapterVisionModel(CLIPVisionModel):
    """CLIPVisionModel with a BT-Adapter beside its last `adapter_depth` layers; frames of several clips in one call.

    With n layers, adapter layer i reads the output of encoder layer n - depth + i. The hidden state after an encoder
    layer that has one beside it is the mean of tower and adapter in the patches, and the tower alone in the CLS token.

    Clips are told by `frames` and never guessed from shapes: the original reads a clip of three frames with frames and
    channels swapped, and this does not. The stochastic depth of the original's training is not implemented.
    """

    config: BTAdapterVisionConfig
    _no_split_modules = ["BTAdapterVisionModel"]  # noqa: RUF012

    def __init__(self, config: BTAdapterVisionConfig) -> None:
        super().__init__(config)
        self.adapter = BTAdapter(config)
        self._first = config.num_hidden_layers - config.adapter_depth  # the encoder layer beside adapter layer 0
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BTAdapter):  # the original's start: time is not mixed until temporal_fc has learned
            init.zeros_(module.class_token)
            init.normal_(module.time_embedding.weight)
        elif isinstance(module, _ZeroLinear):
            init.zeros_(module.weight)

    def truncate(self, layers: int) -> None:
        """Keep only what hidden state number `layers` needs; 0 are the embeddings. ValueError if it is not there.

        `config.num_hidden_layers` stays, for the adapter counts from it. Where no layer of the adapter is left, no
        weight of it is: with depth 1 the adapter has no effect on hidden state -2.
        """
        if not 0 <= layers <= len(self.encoder.layers):
            raise ValueError(
                f"layers must be 0 ... {len(self.encoder.layers)}, the layers that the tower has, got {layers}; "
                "truncate a tower that is whole"
            )
        self.encoder.layers = self.encoder.layers[:layers]
        kept = layers - self._first
        if self.adapter is not None and kept > 0:
            self.adapter.spatial_layers = self.adapter.spatial_layers[:kept]
            self.adapter.temporal_layers = self.adapter.temporal_layers[:kept]
        else:
            self.adapter = None

    def copy_spatial_layers(self) -> None:
        """Start the adapter's spatial layers from the encoder layers that they stand beside."""
        for i, layer in enumerate(self.adapter.spatial_layers if self.adapter is not None else ()):
            layer.load_state_dict(self.encoder.layers[self._first + i].state_dict())

    def forward(
        self, pixel_values: Tensor, frames: Sequence[int] | None = None, chunk: int | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: [F, 3, S, S]: the frames of all clips, one clip after the other.
            frames: how many frames each of the N clips has; None: every frame is a clip of its own.
            chunk: frames that go through a layer at once, None is all; bounds the memory, changes nothing else.
            kwargs: for the attention. Of the hidden states only the last is returned; :meth:`truncate` for another.

        Returns:
            last_hidden_state [F, 1 + P, D], combined, after the last layer that the tower has; pooler_output [F, D],
            post_layernorm(CLS of the frame + adapter's CLS of its clip).

        Raises:
            ValueError: for wrong shapes, `frames` that are not those of pixel_values, too long a clip.
        """
        frames = [1] * len(pixel_values) if frames is None else list(frames)
        self._check(pixel_values, frames)
        clips = _Clips([(len(list(group)), length) for length, group in groupby(sorted(frames))])
        order = _by_length(frames, pixel_values.device)
        if order is not None:
            pixel_values = pixel_values[order]
        x = _by_chunk(lambda part: self.pre_layrnorm(self.embeddings(part)), chunk, pixel_values)  # [F, 1 + P, D]
        position = self.embeddings.position_embedding(self.embeddings.position_ids)[0]  # [1 + P, D]
        stream = None
        for i, layer in enumerate(self.encoder.layers):
            x = _by_chunk(partial(layer, attention_mask=None, **kwargs), chunk, x)
            if i >= self._first:
                stream = self.adapter(i - self._first, x, stream, position, clips, chunk, **kwargs)
        pooled = x[:, 0]
        if stream is not None:
            classes, patches = stream
            pooled = pooled + clips.repeat(classes)
            x = torch.cat((x[:, :1], (x[:, 1:] + patches) / 2), 1)
        pooled = self.post_layernorm(pooled)
        if order is not None:
            back = order.argsort()
            x, pooled = x[back], pooled[back]
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)

    def _check(self, pixel_values: Tensor, frames: list[int]) -> None:
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values must be [F, 3, S, S], got {list(pixel_values.shape)}; put the frames of all clips one "
                "after the other and say in frames how many each has"
            )
        if sum(frames) != len(pixel_values) or min(frames, default=0) < 1:
            raise ValueError(
                f"frames must be positive and sum to the {len(pixel_values)} frames of pixel_values, got {frames}; "
                "name the frames of each clip"
            )
        limit = self.config.adapter_max_frames
        if self.adapter is not None and max(frames) > limit:
            raise ValueError(
                f"a clip must have at most adapter_max_frames = {limit} frames, got {max(frames)}; sample fewer "
                f"frames, e.g. num_frames={limit}"
            )


def _by_chunk(function: Callable, chunk: int | None, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """function(*tensors), computed for `chunk` elements of their first axis at a time."""
    if chunk is None or len(tensors[0]) <= chunk:
        return function(*tensors)
    parts = [function(*part) for part in zip(*(x.split(chunk) for x in tensors))]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts)))


def _by_length(frames: list[int], device: torch.device) -> Tensor | None:
    """[F] int64: the frames with clips of equal length side by side; None if they stand so."""
    if frames == sorted(frames):
        return None
    ends = list(accumulate(frames))
    clips = sorted(range(len(frames)), key=frames.__getitem__)
    return torch.tensor([frame for i in clips for frame in range(ends[i] - frames[i], ends[i])], device=device)


AutoConfig.register(BTAdapterVisionConfig.model_type, BTAdapterVisionConfig)
AutoModel.register(BTAdapterVisionConfig, BTAdapterVisionModel)

__all__ = ["BTAdapterVisionConfig", "BTAdapterVisionModel"]
