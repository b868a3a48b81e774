"""Two video LLMs with random weights, as they are and compressed, and what they are asked about a video: without the
processors of transformers, which need torchvision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ppllava import preset_sizes, presets
from ppllava.swap.compress import compress_model
from ppllava.swap.guides import SwapGuide
from ppllava.swap.windows import Size, Windows

KERNEL, TEMPERATURE = (2, 3, 3), 0.01
TEXT = (8, 24)  # random tokens before the video and after it
QUESTION = 16  # tokens of the guide
PAD, BOS, EOS, START, END, VIDEO, IMAGE = range(7)  # of Qwen; text is above them
CLIP_POSITIONS = {"max_position_embeddings": 77}
LLAVA = {"tiny": "tiny", "small": "small", "7b": "vicuna-7b"}  # names of `presets`


def _clip(image_size: int, hidden: Sequence[int], layers: Sequence[int], heads: Sequence[int], projection: int) -> dict:
    """CLIP as an external guide; widths, layers and heads are (of the vision tower, of the text tower)."""
    return {
        "vision_config": preset_sizes.clip_tower(image_size, 16, hidden[0], layers[0], heads[0], projection),
        "text_config": preset_sizes.clip_guide(hidden[1], layers[1], heads[1], projection, 512) | CLIP_POSITIONS,
        "projection_dim": projection,
    }


def _qwen(vision: Sequence[int], full: Sequence[int], text: Sequence[int], mrope: Sequence[int], **kwargs) -> dict:
    names = ("depth", "hidden_size", "num_heads", "intermediate_size")
    vision_config = {**dict(zip(names, vision)), "fullatt_block_indexes": full, "patch_size": 14, "window_size": 112}
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    text_config = {"vocab_size": 320, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **kwargs}
    text_config |= dict(zip(names, text))
    text_config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [*mrope]}
    vision_config["out_hidden_size"] = text_config["hidden_size"]
    return {"vision_config": vision_config, "text_config": text_config}


# (Qwen2.5-VL, (H, W) of a frame in pixels, its guide); 7b: as published, with CLIP ViT-B/16.
QWEN = {
    "tiny": (
        _qwen((2, 32, 2, 64), [1], (2, 48, 4, 2, 96), (2, 2, 2), initializer_range=0.2),
        (84, 168),
        _clip(64, (32, 24), (2, 2), (2, 3), 16),
    ),
    "small": (
        _qwen((10, 128, 2, 344), [4, 9], (16, 512, 8, 2, 1408), (8, 12, 12)),
        (336, 504),
        _clip(224, (64, 64), (4, 2), (1, 1), 64),
    ),
    "7b": (
        _qwen((32, 1280, 16, 3420), [7, 15, 23, 31], (28, 3584, 28, 4, 18944), (16, 24, 24), vocab_size=152064),
        (336, 504),
        _clip(224, (768, 512), (12, 12), (12, 8), 512),
    ),
}


class Subject:
    """A video LLM as it is, and the guide of its compressed twins."""

    name: str
    pixels: tuple[int, int]  # (H, W) of a frame
    around: tuple[list[int], list[int]] = ([], [])  # tokens right before a video, right after it
    lowest = 8  # of the ids of text

    def __init__(self, model: PreTrainedModel, guide: SwapGuide, seed: int = 0):
        self.model, self.guide = model, guide.eval()
        self.device, self.dtype, self.seed = model.device, model.dtype, seed

    def size(self, frames: int) -> Size:
        """(T, H, W) in tokens of a video of so many frames."""
        raise NotImplementedError

    def media(self, frames: Tensor, packed: bool) -> dict[str, Tensor]:
        """frames [T, 3, H, W] -> inputs, packed: as the compressed processor makes them."""
        raise NotImplementedError

    def tokens(self, frames: int, kernel: Size) -> int:
        """Visual tokens of a video of so many frames, as many windows of this size as fit."""
        return math.prod(max(n // k, 1) for n, k in zip(self.size(frames), kernel))

    def twin(self, kernel: Size, guided: bool) -> PreTrainedModel:
        """Compressed, with the same weights."""
        windows = Windows.of(kernel, None, None, TEMPERATURE)
        return compress_model(self.model, windows, self.guide if guided else None)

    def inputs(self, frames: int, tokens: int, packed: bool = False, guided: bool = False) -> dict[str, Tensor]:
        """Of `generate`, with so many placeholders; the same frames and text each time."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (frames, *self.pixels)
        coarse = torch.randn(1, 3, 2 + frames // 4, 6, 6, generator=generator)
        smooth = F.interpolate(coarse, shape, mode="trilinear")[0].transpose(0, 1)  # [T, 3, H, W]
        highest = self.model.config.text_config.vocab_size
        before, after = (torch.randint(self.lowest, highest, (n,), generator=generator).tolist() for n in TEXT)
        video = self.model.config.video_token_id
        ids = torch.tensor([[*before, *self.around[0], *[video] * tokens, *self.around[1], *after]])  # [1, S]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.media(smooth, packed)}
        if guided:
            text = self.guide.guide.config.guide_config
            words = torch.randint(self.lowest, text.bos_token_id, (QUESTION - 2,), generator=generator).tolist()
            given["guide_input_ids"] = torch.tensor([[text.bos_token_id, *words, text.eos_token_id]])  # [1, L]
            given["guide_attention_mask"] = torch.ones_like(given["guide_input_ids"])
        return {name: self._move(x) for name, x in given.items()}

    def _move(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype if x.is_floating_point() and x.dim() > 1 else x.dtype)


class LlavaNextVideo(Subject):
    """Guided by a CLIP model with its own tower, which therefore runs once."""

    name = "LLaVA-NeXT-Video"

    def __init__(self, preset: str, dtype: torch.dtype, device: str):
        config = presets.peer_config(LLAVA[preset])
        model = presets._random(LlavaNextVideoForConditionalGeneration, config, dtype, device, 0)
        edge = config.vision_config.image_size
        self.pixels = (edge, edge)
        like, tower = presets.preset_config(LLAVA[preset]), model.model.vision_tower
        # A copy, since each becomes a part of a model of its own.
        vision = {**config.vision_config.to_dict(), "projection_dim": like.projection_dim}
        text = {**like.guide_config.to_dict(), **CLIP_POSITIONS}
        clip = CLIPConfig(vision_config=vision, text_config=text, projection_dim=like.projection_dim)
        clip = presets._random(CLIPModel, clip, dtype, device, 1)
        clip.vision_model.load_state_dict(tower.state_dict(), strict=False)
        super().__init__(model, SwapGuide(clip, tower, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def size(self, frames: int) -> Size:
        """(T, H, W) in tokens of a video of so many frames."""
        config = self.model.config
        side = self.pixels[0] // config.vision_config.patch_size // config.spatial_pool_stride
        return frames, side, side

    def media(self, frames: Tensor, packed: bool) -> dict[str, Tensor]:
        """[T, 3, S, S] and `video_frames`, or [1, T, 3, S, S]."""
        if packed:
            return {"pixel_values_videos": frames, "video_frames": torch.tensor([len(frames)])}
        return {"pixel_values_videos": frames[None]}


class QwenVL(Subject):
    """Guided by another CLIP model, which looks at the first of each two frames."""

    name = "Qwen2.5-VL"
    around = ([START], [END])

    def __init__(self, preset: str, dtype: torch.dtype, device: str):
        sizes, self.pixels, guide = QWEN[preset]
        ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
        config = Qwen2_5_VLConfig(**sizes, **ids, video_token_id=VIDEO)
        model = presets._random(Qwen2_5_VLForConditionalGeneration, config, dtype, device, 0)
        clip = presets._random(CLIPModel, CLIPConfig(**guide), dtype, device, 1)
        super().__init__(model, SwapGuide(clip, None, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def size(self, frames: int) -> Size:
        """(T, H, W) in tokens of a video of so many frames."""
        t, h, w = self.grid(frames)
        merge = self.model.config.vision_config.spatial_merge_size
        return t, h // merge, w // merge

    def grid(self, frames: int) -> Size:
        """(T, H, W) in patches of a video of so many frames."""
        vision = self.model.config.vision_config
        return frames // vision.temporal_patch_size, *(n // vision.patch_size for n in self.pixels)

    def media(self, frames: Tensor, packed: bool) -> dict[str, Tensor]:
        """[patches, 3 * 2 * p * p] in the order of the windows that the model merges, and their grid."""
        vision, (t, h, w) = self.model.config.vision_config, self.grid(len(frames))
        m, p = vision.spatial_merge_size, vision.patch_size
        patches = frames.reshape(t, vision.temporal_patch_size, 3, h // m, m, p, w // m, m, p)
        patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
        seconds = torch.full((1,), float(vision.temporal_patch_size))  # 1 frame per second
        return {
            "pixel_values_videos": patches,
            "video_grid_thw": torch.tensor([[t, h, w]]),
            "second_per_grid_ts": seconds,
        }

    def inputs(self, frames: int, tokens: int, packed: bool = False, guided: bool = False) -> dict[str, Tensor]:
        """Of `generate`, with so many placeholders; the same frames and text each time."""
        given = super().inputs(frames, tokens, packed, guided)
        return {**given, "mm_token_type_ids": 2 * (given["input_ids"] == VIDEO).int()}


SUBJECTS: tuple[type[Subject], ...] = (LlavaNextVideo, QwenVL)
