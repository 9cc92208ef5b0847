"""From prompts to the token numbers that UMT5 reads, with the checkpoint's own `tokenizer.json`.

Cleaning and cutting follow `HuggingfaceTokenizer(clean="whitespace")` of Wan-Video/Wan2.1, `wan/modules/tokenizers.py`
(Apache-2.0).
"""

import dataclasses
import html
import warnings
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Int

from rfjax.errors import UserError

END_TOKEN = "</s>"
PAD_TOKEN = "<pad>"


def clean_prompt(text: str) -> str:
    """Mend broken Unicode, resolve HTML entities (also doubly escaped ones) and fold white space to single spaces."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _special_id(vocabulary: tokenizers.Tokenizer, token: str, path: Path) -> int:
    number = vocabulary.token_to_id(token)
    if number is None:
        raise UserError(f"{path} has no token {token}; a UMT5 tokenizer is needed")
    return number


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer, padding every prompt to one length."""

    vocabulary: tokenizers.Tokenizer
    """The rules read from `tokenizer.json`, without padding or truncation of their own."""
    end_id: int
    """Number of the end-of-sequence token, which closes every prompt."""
    pad_id: int
    """Number of the token that fills up the rest."""
    max_tokens: int = 512
    """Length of every returned row, end of sequence included."""

    @classmethod
    def load(cls, folder: Path, max_tokens: int = 512) -> "Tokenizer":
        """Read `tokenizer.json` from a checkpoint's tokenizer folder.

        Raises:
            UserError: the file is missing, is not a tokenizer, or has no `</s>` or `<pad>`.
        """
        path = folder / "tokenizer.json"
        try:
            vocabulary = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist; a tokenizer folder needs the checkpoint's tokenizer.json"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except Exception as error:  # the library raises nothing more specific
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {reason}") from None
        vocabulary.no_padding()
        vocabulary.no_truncation()
        end_id, pad_id = (_special_id(vocabulary, token, path) for token in (END_TOKEN, PAD_TOKEN))
        return cls(vocabulary, end_id, pad_id, max_tokens)

    def __call__(self, prompts: list[str]) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
        """Tokenise prompts after cleaning them.

        A prompt beyond `max_tokens` is cut with a `UserWarning`, keeping the end of sequence.

        Returns:
            Token numbers and mask, both int32 `[B, max_tokens]`. The mask is 1 on the prompt and its end of sequence, 0
            on padding.

        Raises:
            UserError: a prompt is empty.
        """
        ids = np.full((len(prompts), self.max_tokens), self.pad_id, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self._tokens(prompt, row)
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def nothing(self) -> tuple[Int[np.ndarray, "1 L"], Int[np.ndarray, "1 L"]]:
        """Return token numbers and mask of the empty prompt: the end of sequence alone."""
        ids = np.full((1, self.max_tokens), self.pad_id, np.int32)
        ids[0, 0] = self.end_id
        return ids, np.eye(1, self.max_tokens, dtype=np.int32)

    def _tokens(self, prompt: str, row: int) -> list[int]:
        text = clean_prompt(prompt)
        if not text:
            raise UserError(f"prompt number {row + 1} is {prompt!r}; it needs at least one word")
        # Without the file's own template, which may or may not end the sequence, there is one way to end it.
        tokens = self.vocabulary.encode(text, add_special_tokens=False).ids
        count = len(tokens) + 1
        if count > self.max_tokens:
            start = " ".join(text.split()[:6])[:60]
            warnings.warn(
                f"the prompt {start!r}... has {count} tokens; the network reads the first {self.max_tokens}",
                UserWarning,
                stacklevel=3,
            )
        return [*tokens[: self.max_tokens - 1], self.end_id]
