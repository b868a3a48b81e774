"""Weights of a checkpoint folder: mapped from its files, written in shards."""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_SIZE = "5GB"
MAX_JSON_BYTES = 64 * 2**20  # an index of 100,000 weights has 10 MB
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


def check_regular(path: Path) -> None:
    """Refuse what is no regular file before it is opened: reading a pipe or a device may never end.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for a folder, a pipe, a socket or a device, or a link to one of them.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{str(path)!r} must be a file, got none; download it again") from None
    except OSError as error:  # links in a circle
        raise ValueError(f"{str(path)!r} must be a file, got {error.strerror}; download it again") from None
    if not stat.S_ISREG(mode):
        got = next((name for name, is_kind in _KINDS.items() if is_kind(mode)), "something else")
        raise ValueError(f"{str(path)!r} must be a regular file, got {got}; remove it, and download the file again")


_KINDS = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def read_weights(folder: Path, required: bool = True) -> Weights:
    """Weights by key, of the files `model*` (or else `pytorch_model*`) and `non_lora_trainable*`, which win.

    Raises:
        FileNotFoundError: if there are none though they are `required`, or if a shard is missing.
        ValueError: for a file that is no regular one, cannot be read or is not plain tensors, for an index that names
            files elsewhere, or for a weight that two files have.
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
        if re.fullmatch(rf"{stem}.*\.index\.json", name):
            wanted.update(indexed_files(folder / name))
    for name in found:
        if shard := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.\w+)", name):
            wanted.update(f"{shard[1]}{i + 1:05}{shard[2]}" for i in range(int(shard[3])))
    _check_shards(folder, wanted.difference(found))
    return [folder / name for name in found]


def loaded_files(folder: Path) -> list[Path]:
    """The files with weights that transformers' `from_pretrained` reads in a folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists() and (shards := indexed_files(index)):
            _check_shards(folder, [name for name in shards if not (folder / name).exists()])
            return [folder / name for name in shards]
    return []


def indexed_files(index: Path) -> list[str]:
    """The names of the files that a `*.index.json` of transformers distributes the weights over.

    Raises:
        ValueError: if it cannot be read, or names a file that does not lie beside it.
    """
    files = read_json(index).get("weight_map")
    names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
    if elsewhere := [name for name in names if name in ("", ".", "..") or re.search(r"[/\\\0]", name)]:
        raise ValueError(
            f"{str(index)!r} must name files that lie beside it, got {elsewhere[0]!r}; download the model again"
        )
    return names


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
    check_regular(file)
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
        FileNotFoundError: if there is no such file.
        ValueError: if the file is something else, or larger than any such file.
    """
    check_regular(path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(
            f"{str(path)!r} must be JSON of at most {MAX_JSON_BYTES:,} bytes, got {size:,}; download it again"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
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

    Nothing is left of an error. Files are on the disk before they get their place: a power cut leaves no empty one.

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
    folder.mkdir()  # with the rights of any new folder
    moved: list[Path] = []
    try:
        write(folder)
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        if inside:
            for path in sorted(folder.iterdir()):
                moved.append(destination / path.name)
                path.rename(moved[-1])
            folder.rmdir()
        else:
            folder.rename(destination)
        _sync(place)
    except BaseException:
        for path in (folder, *moved):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    "check_regular",
    "check_tied",
    "finite",
    "first_of",
    "indexed_files",
    "loaded_files",
    "put",
    "read_files",
    "read_json",
    "read_weights",
    "weight_files",
    "write_folder",
    "write_weights",
]
