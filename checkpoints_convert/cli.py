"""The command `rfjax convert`."""

import argparse
from pathlib import Path

from checkpoints_convert.convert import convert
from checkpoints_convert.export import export
from rfjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the converter's options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--transformer", type=Path, metavar="FILE|DIR", help="transformer: .pt, .pth, .safetensors or its folder"
    )
    source.add_argument(
        "--to-torch", type=Path, metavar="DIR", help="the reverse: an rfjax checkpoint to write as safetensors"
    )
    parser.add_argument(
        "--transformer-key", metavar="KEY", help="state dict in a .pt file (default: generator_ema if there is one)"
    )
    parser.add_argument("--vae", type=Path, metavar="FILE|DIR", help="video autoencoder")
    parser.add_argument("--text-encoder", type=Path, metavar="FILE|DIR", help="UMT5 encoder")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="schedule and key of a published model: self_forcing (the default), causvid or rolling_forcing",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML or JSON settings that the tensors do not tell"
    )
    parser.add_argument("--dtype", help="float32 or bfloat16, the type to write (default: float32)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to create")


def run(args: argparse.Namespace) -> None:
    """Convert as asked.

    Raises:
        UserError: anything that the user can mend; nothing has been written then.
    """
    options = ("transformer_key", "vae", "text_encoder", "tokenizer", "config", "preset", "dtype")
    if args.to_torch is None:
        given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
        convert(args.transformer, args.output, **given)
        return
    for name in options:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} does not go with --to-torch, which takes --output only")
    export(args.to_torch, args.output)
