"""What the public encoders accept."""

import numpy as np
import pytest
from conftest import golden

from rfjax.errors import UserError
from rfjax.sampling.codec import encode_prompt, encode_tokens


def test_a_single_string_is_no_list_of_prompts(tiny_model):
    with pytest.raises(UserError, match=r"prompts is 'a fox'; pass a list of prompts, such as \['a fox'\]"):
        encode_prompt(tiny_model, "a fox")


@pytest.mark.parametrize("prompts", [["a fox"], ("a fox",)])
def test_prompts_are_any_sequence(tiny_model, prompts):
    with pytest.raises(UserError, match="they do not belong together"):  # so far the prompts themselves are accepted
        encode_prompt(tiny_model, prompts)


def test_mask_may_be_boolean(tiny_model):
    data = golden("umt5")
    expected = encode_tokens(tiny_model, data["ids"], data["mask"])
    np.testing.assert_array_equal(encode_tokens(tiny_model, data["ids"], data["mask"].astype(bool)), expected)
