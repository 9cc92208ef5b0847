"""Write the toy checkpoint that the package ships: random weights and a byte-level tokenizer, by a fixed seed.

python scripts/make_toy_checkpoint.py rfjax/assets/toy
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rfjax.config import load_model_config, preset_path
from rfjax.io.checkpoints import parameter_trees, save
from rfjax.models.functional import init_params
from rfjax.models.text_encoder import UMT5Encoder
from rfjax.models.transformer import WanTransformer
from rfjax.models.vae import WanVAE

NETWORKS = {"transformer": WanTransformer, "vae": WanVAE, "text_encoder": UMT5Encoder}

CORPUS = """a red square and a blue circle move, turn, bounce and cross over a dark background
a green triangle appears on the left and leaves on the right while a yellow star turns slowly in the middle
the camera follows a small orange ball that rolls over white ground, then stops; snow falls, waves break, birds fly"""


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """A byte-level BPE: every text has tokens, and common words of the corpus have few."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.save(str(path))


def main(output: str) -> None:
    """Write the checkpoint folder `output`, which must not exist."""
    config = load_model_config(preset_path("models", "toy"))
    assert config.umt5 is not None
    sizes = {"transformer": config.transformer, "vae": config.vae, "text_encoder": config.umt5}
    keys = jax.random.split(jax.random.key(2603), len(NETWORKS))
    params = {
        name: init_params(NETWORKS[name], sizes[name], key, jnp.bfloat16)
        for name, key in zip(parameter_trees(config), keys, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "tokenizer.json", config.umt5.vocab)
        save(output, config, params, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
