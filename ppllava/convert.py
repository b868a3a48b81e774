"""From a checkpoint of the original implementation, whole or partial, to one folder that `from_pretrained` reads."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import original
from .configuration_ppllava import PPLlavaConfig
from .lora import find_adapter, merge_adapter, split_adapter
from .modeling_ppllava import PPLlavaForConditionalGeneration
from .processing_ppllava import PPLlavaProcessor
from .stretch import stretch_position_embedding
from .weights import (
    Weight,
    Weights,
    check_regular,
    check_tied,
    finite,
    first_of,
    put,
    read_weights,
    write_folder,
    write_weights,
)

GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
# Names of a text tower, a norm and projections in a CLIP or SigLIP model -> those of the guide.
CLIP_RENAMES = (
    ("text_model.", "model.guide.text_model."),
    ("vision_model.post_layernorm.", "model.guide.norm."),
    ("vision_model.head.", "model.guide.head."),
    ("visual_projection.", "model.guide.visual_projection."),
    ("text_projection.", "model.guide.text_projection."),
    ("logit_scale", original.LOGIT_SCALE),
)


@dataclass
class Conversion:
    """What :func:`convert_checkpoint` did; `str()` is a report.

    read       weights of the source, by file
    dropped    its weights that no output depends on
    merged     modules with a merged LoRA adapter
    filled     weights that the source lacks, by the folder they came from
    written    names of the files
    parameters of the model
    processor  what it was made of, or why none was written
    """

    source: Path
    destination: Path
    read: dict[str, int] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    filled: dict[str, list[str]] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    parameters: int = 0
    processor: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.source} -> {self.destination}",
            f"read       {', '.join(f'{count} weights of {file}' for file, count in self.read.items())}",
            *(f"filled     {len(names)} from {folder}: {first_of(names, 3)}" for folder, names in self.filled.items()),
            f"written    {self.parameters:,} parameters: {', '.join(self.written)}",
            f"processor  {self.processor}",
        ]
        if self.merged:
            lines.insert(2, f"merged     LoRA into {len(self.merged)}: {first_of(self.merged, 3)}")
        if self.dropped:
            lines.insert(2, f"dropped    {len(self.dropped)} that no output depends on: {first_of(self.dropped, 3)}")
        return "\n".join(lines)


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    guide_tokenizer: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Write a checkpoint as `PPLlavaForConditionalGeneration.save_pretrained` would, and the processor beside it.

    The weights are mapped from their files and copied shard by shard; only those that a LoRA adapter changes are held.

    Args:
        source: folder of the original's checkpoint, or of this package's: config.json with `model*` and
            `non_lora_trainable*` files, .safetensors or .bin, which may hold a LoRA adapter; or a folder of PEFT.
        destination: folder that does not exist, or is empty.
        base: where weights come from that the source lacks: LLaVA-NeXT or LLaVA-OneVision in the format of
            transformers, old or new, or another PPLLaVA.
        clip: the CLIP or SigLIP model of the guide, for weights that source and base lack, and for its config.json.
            Default: the folder in the source that `clip_weight` names; for weights, only without `clip_post_pretrain`.
        adapter: folder of a LoRA adapter; its adapter_config.json alone, if the weights are in the source.
        tokenizer: folder of the language model's tokenizer. Default: source, then base.
        guide_tokenizer: folder of the guide's. Default: clip.
        dtype: of the written weights; None leaves each as it is.

    Raises:
        ValueError, OSError, ImportError: with one sentence that names files and weights; nothing is written.
    """
    source, destination = _folder("source", source), Path(destination)
    given = dict(base=base, clip=clip, adapter=adapter, tokenizer=tokenizer, guide_tokenizer=guide_tokenizer)
    base, clip, adapter, tokenizer, guide_tokenizer = (
        None if path is None else _folder(name, path) for name, path in given.items()
    )
    _check_destination(source, destination)
    config, model, named, retrained = _model(source, base, clip)
    tied = model.all_tied_weights_keys
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    report = Conversion(source, destination)

    found = read_weights(source, required=not (source / "adapter_config.json").exists())
    plain, lora = split_adapter(found, expected)
    lora_folder, lora = find_adapter(source, adapter, lora, expected)
    files = {(weight.file, weight.key) for weight in (*found.values(), *lora.values())}
    report.read = dict(sorted(Counter(file.name for file, _ in files).items()))
    ours, wrong = _place(plain, expected, tied, original.unused_keys(config), report)
    others: list[tuple[Path, Weights]] = []
    if base is not None:
        weights, unmerged = split_adapter(read_weights(base), expected)
        if unmerged:
            raise ValueError(
                f"base must be a model without LoRA weights, got {len(unmerged)} in {str(base)!r}; convert it first "
                "and pass the result"
            )
        others.append((base, _base_weights(weights)))
    guide = clip or named
    lacking = _lacking(expected, [ours, *(weights for _, weights in others)])
    if lacking and retrained and clip is None:
        raise ValueError(
            f"{str(source)!r} must hold all weights of the guide, for clip_post_pretrain {retrained!r} is not "
            f"clip_weight, got {len(lacking)} missing: {first_of(lacking)}; pass the folder of that model with --clip"
        )
    if lacking and guide is not None:
        length = config.guide_config.max_position_embeddings
        others.append((guide, _clip_weights(read_weights(guide, required=clip is not None), length)))
    weights = _fill(expected, ours, others, report)
    _check(source, weights, expected, wrong)
    for placed in (ours, *(found for _, found in others)):
        for name in tied.keys() & placed.keys():
            check_tied(placed[name], placed.get(tied[name], weights[tied[name]]))
    if lora:
        report.merged = merge_adapter(model, weights, lora, lora_folder, dtype)

    processor = _processor(config, tokenizer, guide_tokenizer, (source, base), guide, report)
    dtypes = {name: dtype or weight.tensor.dtype for name, weight in weights.items()}
    dtypes[original.LOGIT_SCALE] = torch.float32
    elements: Counter = Counter()
    for name, tensor in expected.items():
        elements[dtypes[name]] += tensor.numel()
    config.architectures = [PPLlavaForConditionalGeneration.__name__]
    config.dtype = elements.most_common(1)[0][0]
    report.parameters = elements.total()

    def write(folder: Path) -> None:
        write_weights(folder, {name: weights[name].tensor for name in expected}, dtypes)
        config.save_pretrained(folder)
        for model_folder in (source, base):
            if model_folder is not None and (model_folder / GENERATION).exists():
                check_regular(model_folder / GENERATION)
                shutil.copyfile(model_folder / GENERATION, folder / GENERATION)
                break
        if processor is not None:
            processor.save_pretrained(folder)

    write_folder(destination, write)
    report.written = sorted(path.name for path in destination.iterdir())
    return report


def _model(
    source: Path, base: Path | None, clip: Path | None
) -> tuple[PPLlavaConfig, PPLlavaForConditionalGeneration, Path | None, str | None]:
    """(configuration, model without weights, folder of the CLIP model that is named and there, clip_post_pretrain)."""
    own = source if (source / "config.json").exists() or base is None else base
    content, named, retrained = original.read_config(own), None, None
    if original.is_original(content):
        content, config = original.translate_config(content, own, clip), content
        named = original.clip_folder(config.get("clip_weight"), own)
        retrained = config.get("clip_post_pretrain") or None
    elif content.get("model_type") != "ppllava":
        raise ValueError(
            f"{str(own / 'config.json')!r} must be that of a PPLLaVA, got model_type {content.get('model_type')!r}; "
            "pass the folder of its checkpoint, and LLaVA as base"
        )
    with original.describing(own / "config.json"), torch.device("meta"):
        config = PPLlavaConfig.from_dict(content)
        model = PPLlavaForConditionalGeneration(config)
    return config, model, named if named is not None and named.is_dir() else None, retrained


# From keys to names


def _place(
    weights: Weights, expected: dict[str, Tensor], tied: Iterable[str], unused: list[str], report: Conversion
) -> tuple[Weights, list[str]]:
    """The source's weights by their names in the model, and the keys that are neither those nor unused."""
    placed, pattern = {}, re.compile("|".join(unused))
    named, wrong = original.by_name(weights)
    for name, weight in named.items():
        if name in expected or name in tied or name in (original.POSITION, original.POSITION_TAIL):
            placed[name] = weight
        if name in tied or (name not in placed and pattern.search(name)):
            report.dropped.append(weight.key)
        elif name not in placed:
            wrong.append(weight.key)
    return placed, wrong


def _base_weights(weights: Weights) -> Weights:
    """Weights of LLaVA by their names in the model; its new format has the language model without its head."""
    new = "lm_head.weight" in weights or "model.language_model.embed_tokens.weight" in weights
    renamed: Weights = {}
    for key, weight in weights.items():
        key = re.sub(r"^model\.vision_tower\.vision_model\.", "vision_tower.vision_model.", key)
        if new:
            key = re.sub(r"^lm_head\.", "language_model.lm_head.", key)
            key = re.sub(r"^model\.language_model\.", "language_model.model.", key)
        put(renamed, original.rename(key), weight)
    return renamed


def _clip_weights(weights: Weights, length: int) -> Weights:
    """The guide's weights of a CLIP or SigLIP model, the position table stretched to `length` rows."""
    placed = {}
    for key, weight in weights.items():
        for theirs, ours in CLIP_RENAMES:
            if key.startswith(theirs):
                placed[ours + key.removeprefix(theirs)] = weight
    table = placed.get(original.POSITION_WEIGHT)
    # Tables of other shapes stay as they are, for the check of shapes.
    if table is not None and table.tensor.dim() == 2 and 4 * len(table.tensor) - 3 * original.KEPT_POSITIONS == length:
        placed[original.POSITION_WEIGHT] = table._replace(tensor=stretch_position_embedding(table.tensor))
    return placed


def _lacking(expected: Iterable[str], sources: list[Weights]) -> list[str]:
    """The weights of the guide that no source has."""
    names = set().union(*sources)
    if {original.POSITION, original.POSITION_TAIL} <= names:
        names.add(original.POSITION_WEIGHT)
    return [name for name in expected if name.startswith("model.guide.") and name not in names]


def _fill(
    expected: dict[str, Tensor], ours: Weights, others: list[tuple[Path, Weights]], report: Conversion
) -> Weights:
    """Each weight from the first folder that has it."""
    folders = [(report.source, ours), *others]

    def find(*names: str) -> tuple[Path, Weight] | tuple[None, None]:
        for folder, weights in folders:
            for name in names:
                if name in weights:
                    return folder, weights[name]
        return None, None

    filled: Weights = {}
    for name, tensor in expected.items():
        (folder, weight), label = find(name), name
        if name == original.POSITION_WEIGHT:
            # In a partial checkpoint the frozen one of the two tables is missing.
            (folder, weight), (_, tail) = find(original.POSITION, name), find(original.POSITION_TAIL, name)
            if weight is None or tail is None:
                continue
            if weight is not tail:
                label = f"{name} (first rows)"
                folded = original.fold_positions(weight.tensor, tail.tensor, tensor.shape)
                weight = tail if folded is tail.tensor else weight._replace(tensor=folded)
        if weight is None:
            continue
        if name == original.LOGIT_SCALE and weight.tensor.numel() == 1:
            weight = weight._replace(tensor=weight.tensor.reshape(()).float())
        filled[name] = weight
        if folder != report.source:
            report.filled.setdefault(str(folder), []).append(label)
    return filled


def _check(source: Path, weights: Weights, expected: dict[str, Tensor], unexpected: list[str]) -> None:
    missing = [name for name in expected if name not in weights]
    shapes, spoilt = [], []
    for name, weight in weights.items():
        tensor, place = weight.tensor, f"{weight.key} in {str(weight.file)!r}"
        if tensor.shape != expected[name].shape:
            shapes.append(f"{place} {list(tensor.shape)} instead of {list(expected[name].shape)}")
        elif not tensor.is_floating_point():
            shapes.append(f"{place} {tensor.dtype} instead of floating point")
        elif not finite(tensor):
            spoilt.append(place)
    found = {"missing": missing, "unexpected": unexpected, "mis-shaped": shapes, "not finite": spoilt}
    if wrong := "; ".join(f"{len(keys)} {kind}: {first_of(keys)}" for kind, keys in found.items() if keys):
        remedies = ["download or save it again"]
        if missing:
            guide = [name for name in missing if name.startswith("model.guide.")]
            options = [("--base", len(guide) < len(missing)), ("--clip", bool(guide))]
            remedies = ["pass the folder of a model that has them with " + " and ".join(o for o, on in options if on)]
        raise ValueError(f"the weights in {str(source)!r} must be those of its config.json, got {wrong}; {remedies[0]}")


# Processor


def _processor(
    config: PPLlavaConfig,
    tokenizer: Path | None,
    guide_tokenizer: Path | None,
    models: tuple[Path | None, ...],
    clip: Path | None,
    report: Conversion,
) -> PPLlavaProcessor | None:
    """The processor, and its ids of the placeholders in the configuration; None where a tokenizer is missing."""
    folder = tokenizer or next((path for path in models if path and _has_tokenizer(path)), None)
    saved = [path / "guide_tokenizer" for path in models if path is not None]  # as PPLlavaProcessor saves it
    guide_folder = guide_tokenizer or next((path for path in (clip, *saved) if path and _has_tokenizer(path)), None)
    if missing := [name for name, path in (("tokenizer", folder), ("guide-tokenizer", guide_folder)) if path is None]:
        options = " and ".join(f"its folder with --{name}" for name in missing)
        report.processor = f"not written, for want of the {' and the '.join(missing)}; pass {options}"
        return None
    words, guide = _tokenizer(folder, padding_side="left"), _tokenizer(guide_folder)
    rows, added = config.text_config.vocab_size, []
    for name in ("image", "video"):
        token = f"<{name}>"
        if words.convert_tokens_to_ids(token) in (None, words.unk_token_id):
            words.add_tokens([token], special_tokens=True)
            added.append(token)
        if (index := words.convert_tokens_to_ids(token)) >= rows:
            raise ValueError(
                f"the vocabulary of text_config must have a row for {token}, got {rows} rows and the id {index} from "
                f"{str(folder)!r}; pass the tokenizer of this language model"
            )
        setattr(config, f"{name}_token_index", index)
    for name, each, text in (("text_config", words, config.text_config), ("guide_config", guide, config.guide_config)):
        if (last := max(each.get_vocab().values())) >= text.vocab_size:
            raise ValueError(
                f"the vocabulary of {name} must have a row for each token, got {text.vocab_size} rows and the id "
                f"{last} from {each.name_or_path!r}; pass the tokenizer of this model"
            )
        if each.pad_token is None:
            each.pad_token = each.unk_token or each.eos_token
    report.processor = (
        f"tokenizer of {folder}{', with ' + ', '.join(added) if added else ''}; guide's of {guide_folder}"
    )
    return PPLlavaProcessor.from_config(config, words, guide)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def _tokenizer(folder: Path, **kwargs) -> PreTrainedTokenizerBase:
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            check_regular(folder / name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **kwargs)
    except Exception as error:  # of transformers, tokenizers and sentencepiece, each with its own
        first = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        raise ValueError(f"{str(folder)!r} must hold a tokenizer, got {first}; pass the folder of one") from None


# Folders


def _folder(name: str, path: str | os.PathLike) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{name} must be a folder, got {str(path)!r}; download the model and pass its folder")
    return Path(path)


def _check_destination(source: Path, destination: Path) -> None:
    if destination.exists() and destination.resolve() == source.resolve():
        raise ValueError(
            f"destination must be another folder than source, got {str(source)!r} for both; name a new one"
        )
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise ValueError(f"destination must be a new or an empty folder, got {str(destination)!r}; name a new one")


__all__ = ["Conversion", "convert_checkpoint"]
