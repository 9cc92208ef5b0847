"""How parameters and sizes are divided, as far as one device can tell."""

import jax
import pytest
from jax.sharding import PartitionSpec

from rfjax.config import load_model_config, preset_path
from rfjax.errors import UserError
from rfjax.io.checkpoints import parameter_trees
from rfjax.models.layout import parameter_spec, path_of, used_spec
from rfjax.parallel.division import Sizes, check_heads, check_tokens, fill, parameter_shardings

MESH = jax.sharding.AbstractMesh((2, 4, 2), ("data", "sequence", "tensor"))


@pytest.mark.parametrize("name", ["tiny", "moving_shapes", "wan_1_3b", "wan_14b"])
def test_every_parameter_matches_one_line_of_the_table(name):
    for tree in parameter_trees(load_model_config(preset_path("models", name))).values():
        for keys, _ in jax.tree_util.tree_leaves_with_path(tree):
            parameter_spec(path_of(keys))  # raises where none or two do


def test_a_parameter_that_matches_no_line_or_two_is_refused():
    with pytest.raises(UserError, match=r"parameter blocks\.new\.kernel must match one line .*; it matches none"):
        parameter_spec("blocks.new.kernel")
    twice = (("a.*", PartitionSpec()), (".*b", PartitionSpec()))
    with pytest.raises(UserError, match=r"it matches 'a\.\*' and '\.\*b'"):
        parameter_spec("ab", twice)


def test_parameters_of_14b_are_cut_over_the_group_where_they_are_kept_and_over_tensor_where_they_are_used():
    tree = parameter_trees(load_model_config(preset_path("models", "wan_14b")))["transformer"]
    for fully, expected in ((True, PartitionSpec(None, "sequence", "tensor")), (False, (None, None, "tensor"))):
        shardings = parameter_shardings(MESH, tree, fully)
        assert tuple(shardings["blocks"]["ffn"]["fc1"]["kernel"].spec) == tuple(expected)
    assert used_spec("blocks.ffn.fc1.kernel") == PartitionSpec(None, "tensor")

    def kept(leaf, sharding):
        return sharding.shard_shape(leaf.shape)

    whole = sum(leaf.size for leaf in jax.tree.leaves(tree))
    shapes = jax.tree.leaves(jax.tree.map(kept, tree, parameter_shardings(MESH, tree, True)), is_leaf=_is_shape)
    parts = sum(int(jax.numpy.prod(jax.numpy.array(shape, "float32"))) for shape in shapes)
    assert parts < 1.02 * whole / 8


def _is_shape(value):
    return isinstance(value, tuple)


def test_data_takes_the_devices_that_are_left():
    assert fill(Sizes(0, 2, 2), 8) == Sizes(2, 2, 2)
    assert fill(Sizes(0, 3, 1), 8) == Sizes(2, 3, 1)  # two devices stay idle
    assert fill(Sizes(1, 2, 1), 8) == Sizes(1, 2, 1)


@pytest.mark.parametrize(
    ("sizes", "exactly", "message"),
    [
        (Sizes(3, 2, 2), False, "mesh is data=3,sequence=2,tensor=2, but there are 8 devices; data=2 would make them"),
        (Sizes(0, 16, 1), False, r"mesh is sequence=16,tensor=1, but there are 8 devices; .* each one of 1, 2, 4, 8"),
        (Sizes(0, 3, 1), True, "data x sequence x tensor must be 8"),
    ],
)
def test_sizes_that_do_not_multiply_are_refused(sizes, exactly, message):
    with pytest.raises(UserError, match=message):
        fill(sizes, 8, exactly)


def test_heads_and_tokens_must_divide():
    network = load_model_config(preset_path("models", "wan_1_3b")).transformer
    check_heads(network, Sizes(1, 8, 4))
    with pytest.raises(UserError, match="tensor is 8, which does not divide 12 heads; 1, 2, 4 would"):
        check_heads(network, Sizes(1, 1, 8))
    check_tokens(network, (60, 104), 8)
    with pytest.raises(UserError, match="sequence is 7, which does not divide the 1560 tokens of a frame; 1, 2, 3, 4"):
        check_tokens(network, (60, 104), 7)
