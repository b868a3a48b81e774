"""The configuration: a CLIP vision tower, the CLIP text tower that guides it, a language model, the windows."""

from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ppllava_kernels.shapes import triple


@strict
class PPLlavaConfig(PreTrainedConfig):
    """Configuration of :class:`PPLlavaForConditionalGeneration`; the defaults are those of the 7B model.

    Args:
        vision_config: CLIP vision tower, default ViT-L/14 at 336 pixels. Described whole; only the layers up to
            `vision_feature_layer` are built.
        guide_config: CLIP text tower that reads the user's question, default that of ViT-L/14 with its position table
            stretched to 248.
        text_config: the language model, any causal LM that `AutoModel` knows; default Llama 7B.
        projection_dim: C, width of the space in which patches and question are compared; CLIP's own.
        logit_scale_init_value: logarithm of the scale s of the cosines; trained CLIP models have ln(100).
        projector_hidden_act: "gelu" is the exact erf form.
        vision_feature_layer: which of the hidden states of the vision tower becomes the patches, as in LLaVA.
        pooling_kernel_size, pooling_stride: windows over (frames, rows, columns); None as stride means the kernel size.
        pooling_output_size: a fixed number of tokens over (frames, rows, columns) for a clip of any length; when given,
            it replaces kernel and stride.
        pooling_temperature: of the softmax inside each window. (`temperature` would become generate's.)
        video_token_index: id of the placeholder `<video>`, alias `video_token_id`.
        vision_chunk: frames that go through the vision tower at once; None is all of them. Bounds the memory of its
            activations, changes nothing else.

    Raises:
        ValueError: for a combination that cannot work; the message says what to do.
    """

    model_type = "ppllava"
    attribute_map = {"video_token_id": "video_token_index"}  # noqa: RUF012
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        ),
        "guide_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_text_model",
            init_kwargs={
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "projection_dim": 768,
                "max_position_embeddings": 248,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 32064}),
    }

    vision_config: dict | PreTrainedConfig | None = None
    guide_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 768
    logit_scale_init_value: float | int = 4.6052
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int = -2
    pooling_kernel_size: list[int] | tuple[int, ...] | int = (2, 3, 3)
    pooling_stride: list[int] | tuple[int, ...] | int | None = None
    pooling_output_size: list[int] | tuple[int, ...] | int | None = None
    pooling_temperature: float | int = 0.01
    video_token_index: int = 32000
    vision_chunk: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        for name in ("pooling_kernel_size", "pooling_stride", "pooling_output_size"):
            if getattr(self, name) is not None:
                setattr(self, name, list(triple(name, getattr(self, name))))  # a list, as in config.json
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        self._check()

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(H, W): patches of one frame."""
        image, patch = _pair(self.vision_config.image_size), _pair(self.vision_config.patch_size)
        return image[0] // patch[0], image[1] // patch[1]

    @property
    def vision_layers(self) -> int:
        """Layers of the vision tower that `vision_feature_layer` needs: hidden state k is the output of layer k."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def pooling(self) -> dict[str, list[int] | None]:
        """The windows as arguments of the ops of `ppllava_kernels`."""
        if self.pooling_output_size is not None:
            return {"output_size": self.pooling_output_size}
        return {"kernel_size": self.pooling_kernel_size, "stride": self.pooling_stride}

    def _check(self) -> None:
        for name, expected in (("vision_config", "clip_vision_model"), ("guide_config", "clip_text_model")):
            got = getattr(self, name).model_type
            if got != expected:
                raise ValueError(
                    f"{name} must have model_type {expected!r}, got {got!r}; use the towers of a CLIP model, the only "
                    "guide supported"
                )
        layers = self.vision_config.num_hidden_layers
        if not 1 <= self.vision_layers <= layers:
            raise ValueError(
                f"vision_feature_layer must name the output of one of the {layers} layers of vision_config, "
                f"{-layers} ... -1 or 1 ... {layers}, got {self.vision_feature_layer}; the original model uses -2"
            )
        kernel, grid = self.pooling_kernel_size[1:], self.patch_grid
        if self.pooling_output_size is None and any(k > n for k, n in zip(kernel, grid)):
            raise ValueError(
                f"pooling_kernel_size must fit into the {grid[0]} x {grid[1]} patches of a frame, got "
                f"{self.pooling_kernel_size}; use a smaller one, or pooling_output_size"
            )
        if not self.pooling_temperature > 0:
            got = self.pooling_temperature
            raise ValueError(f"pooling_temperature must be positive, got {got}; the original model uses 0.01")
        if self.vision_chunk is not None and self.vision_chunk < 1:
            raise ValueError(f"vision_chunk must be at least 1 frame, got {self.vision_chunk}; None is all at once")
        vocabulary = self.text_config.vocab_size
        if not 0 <= self.video_token_index < vocabulary:
            raise ValueError(
                f"video_token_index must be an id of text_config, 0 ... {vocabulary - 1}, got "
                f"{self.video_token_index}; use the tokenizer's id of <video>, and a larger vocab_size if it was added"
            )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


__all__ = ["PPLlavaConfig"]
