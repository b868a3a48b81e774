"""Weights of a checkpoint folder: mapped from its files, written in shards."""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_SIZE = "5GB"
TRAINED = "non_lora_trainable"


class Weight(NamedTuple):
    """A tensor, mapped from its file and not read, and what it is called there."""

    tensor: Tensor
    key: str
    file: Path

    def __str__(self) -> str:
        return f"{self.key} in {str(self.file)!r}"


Weights = dict[str, Weight]


def put(weights: Weights, name: str, weight: Weight) -> None:
    """Add a weight; of two for one name, that of `non_lora_trainable*` wins.

    Raises:
        ValueError: for two of the same rank.
    """
    other = weights.get(name)
    trained = [w is not None and w.file.name.startswith(TRAINED) for w in (other, weight)]
    if other is not None and trained[0] == trained[1]:
        raise ValueError(f"{name} must be given once, got {other} and {weight}; remove one of them")
    if other is None or trained[1]:
        weights[name] = weight


def check_tied(weight: Weight, partner: Weight) -> None:
    """A tied weight that a file holds all the same must be that of its partner.

    Raises:
        ValueError: if it is not.
    """
    if not torch.equal(weight.tensor.to(partner.tensor.dtype), partner.tensor):
        raise ValueError(
            f"{weight} must equal {partner.key} where tie_word_embeddings is true, got other numbers; correct "
            "config.json"
        )


def read_weights(folder: Path, required: bool = True) -> Weights:
    """Weights by key, of the files `model*` (or else `pytorch_model*`) and `non_lora_trainable*`, which win.

    Raises:
        FileNotFoundError: if there are none though they are `required`, or if a shard is missing.
        ValueError: for a file that cannot be read, is not plain tensors, or a weight that is in two of them.
    """
    names = sorted(os.listdir(folder))
    files = weight_files(folder, names, "model") or weight_files(folder, names, "pytorch_model")
    trained = weight_files(folder, names, TRAINED)
    if required and not files and not trained:
        raise FileNotFoundError(
            f"{str(folder)!r} must hold weights, model*.safetensors or model*.bin, got none; pass the folder that does"
        )
    return {**read_files(files), **read_files(trained)}


def weight_files(folder: Path, names: list[str], stem: str) -> list[Path]:
    """The files `stem*` with weights, those of one checkpoint in shards all there."""
    found = [name for name in names if re.fullmatch(rf"{stem}.*\.(safetensors|bin)", name)]
    wanted: set[str] = set()
    for name in names:
        if re.fullmatch(rf"{stem}.*\.index\.json", name) and isinstance(
            files := read_json(folder / name).get("weight_map"), dict
        ):
            wanted.update(map(str, files.values()))
    for name in found:
        if shard := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.\w+)", name):
            wanted.update(f"{shard[1]}{i + 1:05}{shard[2]}" for i in range(int(shard[3])))
    _check_shards(folder, wanted.difference(found))
    return [folder / name for name in found]


def loaded_files(folder: Path) -> list[Path]:
    """The files with weights that transformers' `from_pretrained` reads in a folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file() and isinstance(files := read_json(index).get("weight_map"), dict):
            shards = sorted(set(map(str, files.values())))
            _check_shards(folder, [name for name in shards if not (folder / name).is_file()])
            return [folder / name for name in shards]
    return []


def _check_shards(folder: Path, missing: Iterable[str]) -> None:
    if missing:
        raise FileNotFoundError(
            f"{str(folder)!r} must hold all shards of its weights, got no {first_of(missing)}; download it again"
        )


def read_files(files: list[Path]) -> Weights:
    weights: Weights = {}
    for file in files:
        for key, tensor in _read_file(file).items():
            if key in weights:
                raise ValueError(
                    f"{key} must be in one file, got {weights[key].file.name} and {file}; remove one of them"
                )
            weights[key] = Weight(tensor, key, file)
    return weights


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as reader:
                return {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118, it is no dict
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{str(file)!r} must be a whole safetensors file, got {error}; download it again"
            ) from None
    try:
        content = _load(file)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        got = kind[1] if kind else "another kind of file"
        raise _not_plain(file, got) from None
    except Exception as error:  # damage makes torch.load raise almost anything
        first = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        raise ValueError(f"{str(file)!r} must be a whole file of torch.save, got {first}; download it again") from None
    if not isinstance(content, dict):
        raise _not_plain(file, type(content).__name__)
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise _not_plain(file, f"{type(value).__name__} for {key}")
        if value.is_meta or value.layout != torch.strided:
            raise _not_plain(file, f"a {'meta' if value.is_meta else value.layout} tensor for {key}")
    return content


def _load(file: Path) -> Any:
    with open(file, "rb") as start:
        mapped = start.read(4) == b"PK\x03\x04"  # else a format of before torch 1.6, which cannot be mapped
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _not_plain(file: Path, got: str) -> ValueError:
    return ValueError(
        f"{str(file)!r} must hold plain tensors by name, got {got}; nothing else is unpickled, save it as safetensors "
        "where you trust it"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if the file is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{str(path)!r} must be JSON, got {error}; download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must be a JSON object, got {type(content).__name__}; download it again")
    return content


def write_weights(
    folder: Path,
    weights: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write model*.safetensors as `save_pretrained` does, each weight in its dtype; one shard at a time is held.

    Raises:
        ValueError: for a weight that its dtype cannot hold.
    """
    shapes = {name: torch.empty(x.shape, dtype=dtypes[name], device="meta") for name, x in weights.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            tensor = weights[name].to(dtypes[name]).contiguous()
            if tensor.dtype != weights[name].dtype and not finite(tensor):
                raise ValueError(f"{name} must fit into {tensor.dtype}, got larger numbers; use torch.bfloat16 instead")
            # Two names of one tensor in a .bin are two weights here.
            shared = any(tensor.data_ptr() == x.data_ptr() for x in shard.values())
            shard[name] = tensor.clone() if shared else tensor
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(f"{text}\n", encoding="utf-8")


def write_folder(destination: Path, write: Callable[[Path], None]) -> None:
    """Write into a temporary folder, beside the destination or in it if it is there, and move it when it is whole.

    Nothing is left of an error.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        _write_folder(Path(os.path.realpath(destination)), write)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{str(destination)!r} must be a folder that can be written, got {error}; make room there, or name another"
        ) from None


def _write_folder(destination: Path, write: Callable[[Path], None]) -> None:
    inside = destination.is_dir()  # it may be a mount point, which cannot be replaced
    if not inside:
        destination.parent.mkdir(parents=True, exist_ok=True)
    place = destination if inside else destination.parent
    folder = place / f".{destination.name}.{secrets.token_hex(8)}"
    folder.mkdir()  # with the mode that the user's umask leaves, as a folder of mkdtemp has not
    moved: list[Path] = []
    try:
        write(folder)
        if inside:
            for path in sorted(folder.iterdir()):
                moved.append(destination / path.name)
                path.rename(moved[-1])
            folder.rmdir()
        else:
            folder.rename(destination)
    except BaseException:
        for path in (folder, *moved):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def finite(tensor: Tensor) -> bool:
    """Whether all elements are: the least and the greatest are NaN if one is. Needs no memory; quantised ones pass."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.is_meta or tensor.numel() == 0:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def first_of(names: Iterable[str], limit: int = 10) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {more} more" if more > 0 else "")


__all__ = [
    "TRAINED",
    "Weight",
    "Weights",
    "check_tied",
    "finite",
    "first_of",
    "loaded_files",
    "put",
    "read_files",
    "read_json",
    "read_weights",
    "weight_files",
    "write_folder",
    "write_weights",
]
