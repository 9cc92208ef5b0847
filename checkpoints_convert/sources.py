"""Opens what a user names, a file or a folder, as one flat mapping from tensor name to the tensor's place."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.safetensors_file import read_safetensors
from checkpoints_convert.tensors import StoredTensor
from checkpoints_convert.torch_zip import read_torch
from rfjax.config import read_mapping
from rfjax.errors import UserError, nearest
from rfjax.io.paths import kind_of, list_folder

# In order of preference; the last one of each network is a diffusers or transformers folder.
_FILES = {
    "transformer": ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    "vae": ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "diffusion_pytorch_model.safetensors"),
    "text_encoder": (
        *("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc.safetensors"),
        *("model.safetensors.index.json", "model.safetensors"),
    ),
}
_INDEX = ".safetensors.index.json"
_SUFFIXES = (_INDEX, ".safetensors", ".pt", ".pth")
_PREFERRED_KEYS = ("generator_ema", "generator")
_CLASSES = ("WanModel", "WanTransformer3DModel", "AutoencoderKLWan")


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint of one network."""

    label: str
    """File, and the key inside it, for messages."""
    tensors: Mapping[str, StoredTensor]
    """Every tensor by the name it has in the file."""
    settings: Mapping[str, Any]
    """The `config.json` of Wan or diffusers beside the file, empty if there is none."""


def open_source(path: Path, network: str, key: str | None = None, preferred: str | None = None) -> Source:
    """Open a checkpoint without reading its values.

    Args:
        path: A `.pt`, `.pth`, `.safetensors` or `.safetensors.index.json` file, the folder of one, or a folder with
            the subfolder `network` that diffusers would write.
        network: `transformer`, `vae` or `text_encoder`.
        key: Which of several state dicts in a `.pt` file; `generator_ema`, `generator` or the only one by default.
        preferred: Key to be taken before these defaults, if the file has it.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it has no such key.
    """
    file = _find_file(path, network)
    if file.name.endswith((_INDEX, ".safetensors")):
        if key is not None:
            raise UserError(f"{file} has no keys to choose from; leave out --{network}-key {key}")
        tensors = _read_shards(file) if file.name.endswith(_INDEX) else read_safetensors(file)
    else:
        key, tensors = _state_dict(file, read_torch(file), key, preferred)
    label = f"{file} [{key}]" if key else str(file)
    if not tensors:
        raise UserError(f"{label} holds no tensors")
    return Source(label, tensors, _settings(file.parent))


def find_tokenizer(path: Path) -> Path:
    """Return the folder with `tokenizer.json`: the given one or the subfolder that Wan or diffusers use.

    Raises:
        UserError: there is none.
    """
    for folder in (path, path / "tokenizer", path / "google" / "umt5-xxl"):
        if kind_of(folder / "tokenizer.json", "the tokenizer") == "file":
            return folder
    raise UserError(f"{path} holds no tokenizer.json; --tokenizer needs the folder google/umt5-xxl or tokenizer")


def _find_file(path: Path, network: str) -> Path:
    kind = kind_of(path, "the checkpoint")
    if kind == "file":
        return path
    if kind == "missing":
        raise UserError(f"{path} does not exist; --{network.replace('_', '-')} needs a checkpoint file or its folder")
    folder = path / network if kind_of(path / network, "the folder") == "folder" else path
    for name in _FILES[network]:
        if kind_of(folder / name, "the checkpoint") == "file":
            return folder / name
    files = [file for file in list_folder(folder, "the folder") if file.name.endswith(_SUFFIXES)]
    indices = [file for file in files if file.name.endswith(_INDEX)]
    if len(indices or files) == 1:
        return (indices or files)[0]
    if not files:
        raise UserError(f"{folder} holds no .pt, .pth or .safetensors file; a checkpoint file or its folder is needed")
    if all("-of-" in file.name for file in files):
        raise UserError(f"{folder} holds {len(files)} shards without their index; add the {_INDEX} file beside them")
    raise UserError(f"{folder} holds several checkpoints; name one of them: {', '.join(file.name for file in files)}")


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
        if any(Path(shard).name != shard for shard in shards):
            raise ValueError("a shard outside its folder")
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of safetensors shards: {error}") from None
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_safetensors(index.parent / shard).items():
            if name in tensors:
                raise UserError(f"{index.parent} holds {name} twice: in {tensors[name].path.name} and in {shard}")
            if places.get(name) != shard:
                raise UserError(f"{shard} holds {name}, which {index} places in {places.get(name, 'no shard')}")
            tensors[name] = tensor
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise UserError(f"{index} names {len(absent)} tensors that its shards lack: {', '.join(absent[:20])}")
    return tensors


def _state_dict(
    file: Path, content: dict[Any, Any], key: str | None, preferred: str | None
) -> tuple[str | None, dict[str, StoredTensor]]:
    """Choose the state dict in what a `.pt` file holds, and drop its numbers and text."""
    groups = {name: value for name, value in content.items() if _tensors(value)}
    direct = _tensors(content)
    # Scalar tensors beside state dicts are counters of the training run.
    plain = any(tensor.shape for tensor in direct.values())
    keys = ", ".join(str(name) for name in content)
    if key is not None and key not in groups:
        if plain:
            raise UserError(f"{file} is a plain state dict without keys; leave out the key {key!r}")
        raise UserError(f"{file} has no key {key!r} with tensors; it holds: {keys}{nearest(key, map(str, content))}")
    if key is None and plain:
        if groups:
            raise UserError(f"{file} mixes tensors with groups of them ({', '.join(map(str, groups))}); choose a key")
        return None, direct
    chosen = key or next((name for name in (preferred, *_PREFERRED_KEYS) if name in groups), None)
    if chosen is None and len(groups) == 1:
        chosen = next(iter(groups))
    if chosen is None:
        raise UserError(f"{file} holds no single state dict; choose a key of those it holds: {keys}")
    deeper = [str(name) for name, value in groups[chosen].items() if _tensors(value)]
    if deeper:
        raise UserError(f"{file} [{chosen}] is no state dict; it holds groups of tensors: {', '.join(deeper)}")
    return chosen, _tensors(groups[chosen])


def _tensors(value: Any) -> dict[str, StoredTensor]:
    if not isinstance(value, dict):
        return {}
    return {str(name): item for name, item in value.items() if isinstance(item, StoredTensor)}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    values = read_mapping(path) if kind_of(path, "the settings") == "file" else {}
    return values if values.get("_class_name") in _CLASSES else {}
