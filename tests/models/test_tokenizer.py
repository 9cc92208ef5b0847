import warnings

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from rfjax.errors import UserError
from rfjax.models.tokenizer import Tokenizer, clean_prompt

VOCABULARY = ["<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁dog", "▁and", "▁sees", "▁the", "s"]
PAD, END, UNKNOWN, A, CAT, DOG, AND, SEES, THE, S = range(len(VOCABULARY))


def write_tokenizer(folder, vocabulary=VOCABULARY, template=True, padding=False):
    """Write a tokenizer.json like UMT5's: unigrams, words marked by a leading bar, `</s>` added by a template."""
    entries = [(piece, 0.0 if piece.startswith("<") else -float(i)) for i, piece in enumerate(vocabulary)]
    rules = tokenizers.Tokenizer(models.Unigram(entries, unk_id=vocabulary.index("<unk>"), byte_fallback=False))
    rules.pre_tokenizer = pre_tokenizers.Metaspace()
    rules.add_special_tokens([piece for piece in vocabulary if piece.startswith("<")])
    if template:
        rules.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    if padding:
        rules.enable_padding(length=20)
        rules.enable_truncation(4)
    folder.mkdir(exist_ok=True)
    rules.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_end_of_sequence_once_then_padding(tmp_path, template, padding):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=template, padding=padding), max_tokens=8)
    ids, mask = tokenizer(["a cat sees the dogs", "a dog"])
    assert ids.dtype == mask.dtype == np.int32
    assert ids.tolist() == [[A, CAT, SEES, THE, DOG, S, END, PAD], [A, DOG, END, PAD, PAD, PAD, PAD, PAD]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0]]


def test_prompt_of_exactly_the_length_is_whole(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path), max_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask = tokenizer(["a cat and"])
    assert ids.tolist() == [[A, CAT, AND, END]]
    assert mask.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("template", [True, False])
def test_longer_prompt_is_cut_with_a_warning_and_keeps_its_end(tmp_path, template):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=template), max_tokens=4)
    with pytest.warns(UserWarning, match=r"'a cat and the dog'\.\.\. has 6 tokens; the network reads the first 4"):
        ids, mask = tokenizer(["a cat and the dog"])
    assert ids.tolist() == [[A, CAT, AND, END]]
    assert mask.tolist() == [[1, 1, 1, 1]]


def test_default_length_is_512(tmp_path):
    ids, mask = Tokenizer.load(write_tokenizer(tmp_path))(["a"])
    assert ids.shape == mask.shape == (1, 512)


def test_numbers_of_special_tokens_come_from_the_file(tmp_path):
    vocabulary = ["<unk>", "</s>", "▁a", "<pad>"]
    ids, _ = Tokenizer.load(write_tokenizer(tmp_path, vocabulary, template=False), max_tokens=5)(["a zebra"])
    assert ids.tolist() == [[2, 0, 1, 3, 3]]


@pytest.mark.parametrize("prompt", ["", "  \n\t ", "&nbsp;"])
def test_empty_prompt_is_refused(tmp_path, prompt):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path), max_tokens=8)
    with pytest.raises(UserError, match=r"^prompt number 2 is '.*'; it needs at least one word$"):
        tokenizer(["a cat", prompt])


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a\n\n cat\tsees \u3000 it ", "a cat sees it"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("1 < 2 &amp;amp; 3", "1 < 2 & 3"),  # ftfy itself resolves entities only where there is no "<"
        ("it\u2019s a caf\u00c3\u00a9", "it's a caf\u00e9"),
        ("a&nbsp;cat", "a cat"),
    ],
)
def test_cleaning(text, clean):
    assert clean_prompt(text) == clean


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist; a tokenizer folder needs"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"{\n", b"\xff\xfe\x00", b'{"version": "1.0", "model": {"type": "None"}}']
)
def test_damaged_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"tokenizer\.json is not a tokenizer\.json of the tokenizers library"
    ) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lacking", ["<pad>", "</s>"])
def test_tokenizer_of_another_kind(tmp_path, lacking):
    vocabulary = [piece for piece in VOCABULARY if piece != lacking]
    with pytest.raises(UserError, match=f"has no token {lacking}; a UMT5 tokenizer is needed"):
        Tokenizer.load(write_tokenizer(tmp_path, vocabulary, template=False))


def test_the_empty_prompt_is_its_end_alone(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path), max_tokens=4)
    ids, mask = tokenizer.nothing()
    assert ids.tolist() == [[tokenizer.end_id, *[tokenizer.pad_id] * 3]]
    assert mask.tolist() == [[1, 0, 0, 0]]
