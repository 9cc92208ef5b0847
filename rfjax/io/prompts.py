"""Prompts in text files, a prompt a line."""

from pathlib import Path

from rfjax.errors import UserError


def read_prompt_file(path: Path) -> list[str]:
    """Return a file's prompts without the white space around them; empty lines are left out.

    Raises:
        UserError: the file is missing, not UTF-8 or empty, or a line has no word.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt file {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    prompts = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} holds no prompt; write one a line")
    for number, prompt in prompts:
        if not has_word(prompt):
            raise UserError(f"line {number} of the prompt file {path} is {prompt!r}; it needs at least one word")
    return [prompt for _, prompt in prompts]


def has_word(prompt: str) -> bool:
    """Whether anything is left of a prompt when the tokenizer has cleaned it."""
    from rfjax.models.tokenizer import clean_prompt  # imports JAX

    return bool(clean_prompt(prompt))
