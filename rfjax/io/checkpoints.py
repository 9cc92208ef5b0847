"""Checkpoint folders: `config.json`, one Orbax tree a network, and the tokenizer.

FOLDER/config.json                              the sizes, as `ModelConfig.to_dict`
FOLDER/transformer/, vae/, text_encoder/        Orbax PyTree checkpoints; the last two may be absent
FOLDER/tokenizer/tokenizer.json                 may be absent
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from jax.sharding import Mesh, Sharding

from rfjax.config import ModelConfig, load_model_config
from rfjax.errors import UserError, nearest
from rfjax.io.atomic import temporary_name, write_json
from rfjax.io.paths import existing_above, kind_of, list_folder
from rfjax.io.remote import local
from rfjax.models.functional import Params, abstract_params
from rfjax.models.model import Model
from rfjax.models.text_encoder import UMT5Encoder
from rfjax.models.tokenizer import Tokenizer
from rfjax.models.transformer import WanTransformer
from rfjax.models.vae import WanVAE
from rfjax.parallel.division import network_shardings

DTYPES = ("float32", "bfloat16")
CONFIG = "config.json"
TOKENIZER = "tokenizer"
_PIECE_BYTES = 2**28
"""Bytes of a lazy leaf in memory at a time, or one layer where that is more."""


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read, as opposed to one that does not fit."""


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """A leaf that is computed while it is written, piece by piece along its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stacked: bool
    """Whether the first axis counts layers; they are then stored and written one by one."""
    read: Callable[[int, int], np.ndarray]
    """Returns rows `start` to `stop` of the first axis."""


class _LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes `LazyArray` so that the result is an ordinary array to Orbax, holding one piece at a time."""

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        # Every wait costs a commit to the disk, so small pieces are written together.
        writes, size = [], 0
        for leaf, info in zip(values, infos, strict=True):
            store = await self._create(leaf, info)
            chunk: Any = store.chunk_layout.write_chunk.shape
            for start in range(0, leaf.shape[0], chunk[0]):
                stop = min(start + chunk[0], leaf.shape[0])
                piece = await asyncio.to_thread(leaf.read, start, stop)
                writes.append(store[start:stop].write(piece))
                size += piece.nbytes
                if size >= _PIECE_BYTES:
                    await asyncio.gather(*writes)
                    writes, size = [], 0
        await asyncio.gather(*writes)
        return []

    async def _create(self, leaf: LazyArray, info: ocp.type_handlers.ParamInfo) -> tensorstore.TensorStore:
        chunks = ocp.SaveArgs(shard_axes=(0,)) if leaf.stacked else ocp.SaveArgs(chunk_byte_size=_PIECE_BYTES)
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=True,
            global_shape=leaf.shape,
            local_shape=leaf.shape,
            dtype=leaf.dtype,
            process_index=0,
            arg=chunks,
        )
        return await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context)


def parameter_trees(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Params]:
    """Return the abstract parameters of every network that a configuration has, by the name of its folder."""
    networks: dict[str, tuple[Callable[..., nnx.Module], Any]] = {
        "transformer": (WanTransformer, config.transformer),
        "vae": (WanVAE, config.vae),
        "text_encoder": (UMT5Encoder, config.umt5),
    }
    return {
        name: abstract_params(network, sizes, dtype) for name, (network, sizes) in networks.items() if sizes is not None
    }


def check_dtype(name: str) -> np.dtype[Any]:
    """Return the type of this name.

    Raises:
        UserError: it is not `float32` or `bfloat16`.
    """
    if name not in DTYPES:
        raise UserError(f"dtype is {name!r}; it must be {' or '.join(DTYPES)}{nearest(str(name), DTYPES)}")
    return jnp.dtype(name)


def check_output(path: Path) -> Path:
    """Make sure that a new folder can be created at `path`, without creating it.

    Returns:
        The folder to create: `path`, absolute, with its links followed.

    Raises:
        UserError: something is there already, it cannot be replaced, or the folder above cannot be written to.
    """
    kind = kind_of(path, "the output")
    if kind == "file":
        raise UserError(f"{path} is a file; the output must be a new or empty folder")
    if kind == "folder" and list_folder(path, "the output"):
        raise UserError(f"{path} already holds files; the output must be a new or empty folder")
    target = Path(os.path.realpath(path))
    if target == Path.cwd():
        raise UserError(f"{path} is the current folder, which cannot be replaced; name a new folder in it")
    if os.path.ismount(target):
        raise UserError(f"{path} is a mount point, which cannot be replaced; name a new folder in it")
    above = existing_above(target)
    if kind_of(above, "the folder") == "file":
        raise UserError(f"cannot write {path}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: no permission to write in {above}")
    return target


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Create a folder as a whole: it appears under its name only when `write` has filled a temporary one beside it.

    Raises:
        UserError: see `check_output`; or the disk is full or fails.
    """
    target = check_output(path)
    temporary = temporary_name(target)
    created = [folder for folder in target.parents if kind_of(folder, "the folder") == "missing"]
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    except ValueError as error:  # how tensorstore says that the disk is full
        if "RESOURCE_EXHAUSTED" in str(error) or "No space" in str(error):
            raise UserError(f"cannot write {path}: no space left on the disk") from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in created:  # those that hold the result now are not empty and stay
            with contextlib.suppress(OSError):
                folder.rmdir()


def save(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Params],
    tokenizer: Path | None = None,
    rest: Path | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        path: Folder to create.
        config: Sizes; it must have the networks of `params` and no others.
        params: Parameters by network (`transformer`, `vae`, `text_encoder`); a leaf may be a `LazyArray`.
        tokenizer: Folder whose tokenizer files to copy.
        rest: Checkpoint folder whose copies stand for the networks that `params` lacks.

    Raises:
        UserError: `path` holds something already or cannot be written.
        ValueError: `params` and `config` do not have the same networks.
    """
    networks = parameter_trees(config).keys()
    copied = networks - params.keys() if rest is not None else set()
    if networks != params.keys() | copied:
        raise ValueError(f"parameters of {sorted(params)} with the configuration of {sorted(networks)}")

    def write(folder: Path) -> None:
        for name, tree in params.items():
            _write_tree(folder / name, tree)
        for name in copied:
            shutil.copytree(Path(rest or "") / name, folder / name)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder / TOKENIZER)
        write_json(folder / CONFIG, config.to_dict())

    write_folder(Path(path), write)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files that a UMT5 tokenizer consists of."""
    target.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_tree(folder: Path, tree: Params) -> None:
    handlers = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyArrayHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    # Of several processes one writes, and Orbax is not to wait for the others.
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    # Weights hardly compress, and loading is several times faster without.
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=handlers, use_compression=False, multiprocessing_options=alone
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(_text_keys(tree)))


def _text_keys(tree: Any) -> Any:
    """Name a list's items by text: Orbax restores the numbers of an `nnx.List` as text anyway."""
    return {str(key): _text_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def load(path: str | Path, dtype: str = "float32", *, mesh: Mesh | None = None, fully_sharded: bool = False) -> Model:
    """Load a checkpoint folder.

    Args:
        path: A folder that `rfjax convert` or training wrote, or its address, such as `gs://bucket/checkpoint`, which
            is then copied once (`rfjax.io.remote`).
        dtype: `float32` or `bfloat16`: type of the parameters and of the networks' computation.
        mesh: From `rfjax.make_mesh`: each device is given its part of every parameter alone. None: one device.
        fully_sharded: See `rfjax.parallelize`.

    Returns:
        The model with those networks that the folder holds, every parameter a `jax.Array` of `dtype`.

    Raises:
        UserError: the folder is missing, incomplete or damaged, `dtype` is unknown, or the model does not divide over
            the mesh.
    """
    kind = check_dtype(dtype)
    folder = local(path)
    config = load_checkpoint_config(folder)
    shapes = parameter_trees(config)
    shardings = network_shardings(config, mesh, shapes, fully_sharded)
    trees = {name: _restore(folder / name, tree, kind, shardings.get(name)) for name, tree in shapes.items()}
    tokenizer = folder / TOKENIZER
    return Model(
        config,
        trees["transformer"],
        trees.get("vae"),
        trees.get("text_encoder"),
        tokenizer=Tokenizer.load(tokenizer, config.transformer.text_len)
        if kind_of(tokenizer, "the folder") == "folder"
        else None,
        dtype=kind,
        mesh=mesh,
    )


def load_network(folder: Path, name: str, dtype: str = "float32") -> Params:
    """Load one network of a checkpoint folder (`transformer`, `vae` or `text_encoder`).

    Raises:
        UserError: as `load`, or the checkpoint has no such network.
    """
    trees = parameter_trees(load_checkpoint_config(folder))
    if name not in trees:
        raise UserError(f"the checkpoint {folder} has no {name}; it has {', '.join(trees)}")
    return _restore(folder / name, trees[name], check_dtype(dtype))


def load_checkpoint_config(folder: Path) -> ModelConfig:
    """Read the sizes of a checkpoint folder.

    Raises:
        UserError: the folder or its `config.json` is missing or damaged.
    """
    kind = kind_of(folder, "the checkpoint folder")
    if kind == "missing":
        raise UserError(f"the checkpoint folder {folder} does not exist")
    if kind == "file":
        raise UserError(f"the checkpoint {folder} is a file; a folder that `rfjax convert` wrote is needed")
    if kind_of(folder / CONFIG, "the configuration") != "file":
        raise UserError(f"{folder} has no {CONFIG}; a folder that `rfjax convert` wrote is needed")
    return load_model_config(folder / CONFIG)


def stored_types(folder: Path, expected: Params) -> dict[str, str]:
    """Return the type of every parameter in a network's folder, by its path joined by dots.

    Raises:
        UserError: the folder is missing or damaged, or holds other parameters than `expected`.
    """
    return {path: store.dtype.name for path, store in _open_all(folder, expected).items()}


def read_leaf(folder: Path, path: str, layers: int | None = None) -> Iterator[np.ndarray]:
    """Read one parameter of a network's folder in the type it was stored in.

    Args:
        folder: The network's Orbax checkpoint.
        path: The parameter's, joined by dots.
        layers: Size of its first axis, to yield it layer by layer; None to yield it whole.

    Raises:
        UserError: the folder is damaged.
    """
    with readable(folder):
        store = open_arrays(folder, [path])[path]
        for index in [...] if layers is None else range(layers):
            yield store[index].read().result()


def _restore(folder: Path, expected: Params, dtype: np.dtype[Any], shardings: Params | None = None) -> Params:
    stores = _open_all(folder, expected)

    # One after another, so that the host holds a single parameter on its way to the device, or devices.
    def leaf(keys: tuple[Any, ...], _: Any, *sharding: Sharding) -> jax.Array:
        return jax.device_put(tensorstore.cast(stores[_path(keys)], dtype).read().result(), *sharding)

    with readable(folder):
        return jax.tree_util.tree_map_with_path(leaf, expected, *([] if shardings is None else [shardings]))


def _open_all(folder: Path, expected: Params) -> dict[str, tensorstore.TensorStore]:
    """Open every parameter of a network's folder after comparing it with what its configuration asks for."""
    if kind_of(folder, "the folder") != "folder":
        raise UserError(f"{folder} is missing, but {folder.parent / CONFIG} has this network")
    wanted = {_path(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    with readable(folder):
        tree = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"]
        found = {".".join(key["key"] for key in entry["key_metadata"]) for entry in tree.values()}
    for name in sorted(wanted.keys() - found):
        raise UserError(f"{folder} lacks the parameter {name}, which {CONFIG} asks for{nearest(name, found)}")
    for name in sorted(found - wanted.keys()):
        raise UserError(f"{folder} has the parameter {name}, which {CONFIG} does not ask for{nearest(name, wanted)}")
    with readable(folder):
        stores = open_arrays(folder, wanted)
    for name, shape in wanted.items():
        if stores[name].shape != shape:
            shapes = f"{list(stores[name].shape)}; {CONFIG} asks for {list(shape)}"
            raise UserError(f"{folder} has {name} with the shape {shapes}")
    return stores


def open_arrays(folder: Path, paths: Iterable[str]) -> dict[str, tensorstore.TensorStore]:
    """Open arrays of an Orbax tree by their paths, reading nothing yet but their sizes."""
    # By tensorstore itself: where an array is damaged, Orbax's own reader leaves tracebacks of its tasks behind.
    parent: Any = folder.absolute()
    context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
    stores = {}
    for path in paths:
        info = ocp.type_handlers.ParamInfo(name=path, parent_dir=parent, ts_context=context)
        spec = tensorstore.Spec(ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True))
        stores[path] = tensorstore.open(spec, open=True, context=context).result()
    return stores


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in keys)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn whatever Orbax and tensorstore raise on a damaged folder into a `DamagedCheckpointError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # neither library says what it may raise
        if "RESOURCE_EXHAUSTED" in str(error):  # the device is full, which says nothing of the folder
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedCheckpointError(f"{folder} is damaged or no Orbax checkpoint: {reason}") from None
