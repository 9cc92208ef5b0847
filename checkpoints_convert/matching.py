"""Which tensor of a file fills which parameter, and everything that does not fit."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import einops
import jax
import numpy as np

from checkpoints_convert.names import TIED, Rule, bare_name, flat_up_blocks, nested_up_block
from checkpoints_convert.networks import Network, identify
from rfjax.errors import UserError, nearest
from rfjax.models.functional import Params

PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Matched:
    """A file's tensors sorted into the parameters of a network."""

    label: str
    """The file, for messages."""
    network: Network
    layout: str
    """A key of `network.layouts`."""
    slots: Mapping[tuple[str, int], tuple[str, ...]]
    """Names in the file of the tensors for a parameter's path and layer (0 where layers are not stacked)."""
    unmapped: tuple[str, ...]
    """Names in the file that the layout's table does not know."""
    resnets: int
    """Residual blocks a level of diffusers' decoder."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The layout's table."""
        return self.network.layouts[self.layout]

    def rule(self, path: str) -> tuple[Rule, dict[str, str]]:
        """Return the rule that fills a parameter, and its placeholders' values."""
        return rule_for(path, self.rules)

    def expected_name(self, path: str, layer: int) -> str:
        """Return the name that the file should have for a parameter's layer."""
        rule, values = self.rule(path)
        name = rule.source.format(**{**values, "layer": layer})
        return nested_up_block(name, self.resnets) if self.layout == "diffusers" else name

    def layers(self) -> int:
        """Return one more than the highest number of a layer in the file."""
        return 1 + max((layer for path, layer in self.slots if path.startswith("blocks.")), default=0)


def rule_for(path: str, rules: Iterable[Rule]) -> tuple[Rule, dict[str, str]]:
    """Return the first rule that fills a parameter, and its placeholders' values.

    Raises:
        KeyError: the table has no rule for it.
    """
    for rule in rules:
        if (values := rule.find_target(path)) is not None:
            return rule, values
    raise KeyError(path)


def match(label: str, network: Network, tensors: Iterable[str]) -> Matched:
    """Sort tensor names into parameters.

    Raises:
        UserError: the names are those of another network, or of none that is known.
    """
    bare = {name: bare_name(name) for name in tensors}
    found = identify(bare.values())
    if found is None:
        first = ", ".join(list(bare)[:3])
        raise UserError(f"{label} is not {network.title} in a known layout; its first tensors are {first}")
    if found[0] is not network:
        raise UserError(
            f"{label} was given as {network.option} but looks like {found[0].title} ({found[1]} names); "
            f"give it as {found[0].option}"
        )
    flat = flat_up_blocks(bare.values())
    slots: dict[tuple[str, int], tuple[str, ...]] = defaultdict(tuple)
    unmapped = []
    for name in bare:
        slot = _slot(flat[bare[name]], network.layouts[found[1]], len(bare))
        if slot is None:
            unmapped.append(name)
        else:
            slots[slot] += (name,)
    resnets = sum(name.startswith("decoder.up_blocks.0.resnets.") and name.endswith(".conv1.bias") for name in flat)
    return Matched(label, network, found[1], dict(slots), tuple(unmapped), max(resnets, 1))


def _slot(name: str, rules: Iterable[Rule], tensors: int) -> tuple[str, int] | None:
    """Return a tensor's place; None where no rule applies or its block's number exceeds those of the file's tensors."""
    for rule in rules:
        if (values := rule.find(name)) is not None:
            layer = int(values.get("layer", 0))
            return (rule.target.format(**values), layer) if max(layer, int(values.get("i", 0))) < tensors else None
    return None


def flatten(tree: Params) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a parameter tree with their paths, joined by dots."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield ".".join(str(key.key) for key in keys), leaf


def source_shape(pattern: str, shape: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that PyTorch's tensor has for one layer of a parameter."""
    return to_torch(np.broadcast_to(np.zeros((), np.int8), shape), pattern, patch).shape


def to_rfjax(values: np.ndarray, pattern: str) -> np.ndarray:
    """Bring a tensor's axes into rfjax's order, as a view where that is possible."""
    return einops.rearrange(values, pattern)


def to_torch(values: np.ndarray, pattern: str, patch: tuple[int, ...]) -> np.ndarray:
    """Undo `to_rfjax`, as a view."""
    source, target = pattern.split(" -> ")
    sizes = dict(zip(("pt", "ph", "pw"), patch, strict=True)) if "pt" in pattern else {}
    return einops.rearrange(values, f"{target} -> {source}", **sizes)


def check(
    matched: Matched,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    expected: Params,
    patch: tuple[int, ...],
) -> None:
    """Make sure that every tensor is used exactly once and every parameter is filled.

    Args:
        matched: The names, sorted.
        shapes: Shape of each tensor in the file.
        dtypes: Type of each tensor in the file.
        expected: The network's parameters, abstract.
        patch: Patch size of the transformer.

    Raises:
        UserError: lists what is missing, unexpected, doubled, misshaped or of a type that no parameter has.
    """
    missing, doubled, misshaped, mistyped = [], [], [], []
    used = set()
    for path, leaf in flatten(expected):
        rule, _ = matched.rule(path)
        shape = leaf.shape[1:] if rule.stacked else leaf.shape
        wanted = source_shape(rule.pattern, shape, patch)
        for layer in range(leaf.shape[0] if rule.stacked else 1):
            found = matched.slots.get((path, layer), ())
            used.add((path, layer))
            if not found:
                missing.append(matched.expected_name(path, layer))
            if (len(found) > 1 and {bare_name(name) for name in found} != TIED) or len(found) > 2:
                doubled.append(" and ".join(found))
            misshaped += [f"{n} is {list(shapes[n])}, not {list(wanted)}" for n in found if shapes[n] != wanted]
            mistyped += [f"{n} is {dtypes[n]}" for n in found if dtypes[n] not in PARAMETER_DTYPES]
    unexpected = [*matched.unmapped, *(n for slot, found in matched.slots.items() if slot not in used for n in found)]
    known = missing or [matched.expected_name(path, layer) for path, layer in used]
    if missing or unexpected or doubled or misshaped or mistyped:
        raise misfit(matched, missing, unexpected, doubled, misshaped, mistyped, known)


def misfit(
    matched: Matched,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    doubled: Sequence[str] = (),
    misshaped: Sequence[str] = (),
    mistyped: Sequence[str] = (),
    known: Sequence[str] = (),
) -> UserError:
    """Return the error that lists in one line everything that does not fit, with the nearest names.

    Args:
        matched: The names, sorted.
        missing: Names that the file should have.
        unexpected: Names that it should not have.
        doubled: Groups of names for the same parameter.
        misshaped: Tensors with their shape and the right one.
        mistyped: Tensors with their type.
        known: Names that an unexpected one may have been meant for.
    """
    problems = (
        _listed("missing", missing, [bare_name(name) for name in unexpected]),
        _listed("unexpected", unexpected, known),
        _listed("doubled", doubled),
        _listed("misshaped", misshaped),
        _listed(f"of a type other than {', '.join(PARAMETER_DTYPES)}", mistyped),
    )
    return UserError(f"{matched.label} does not fit {matched.network.title}: {'; '.join(filter(None, problems))}")


def _listed(what: str, items: Sequence[str], candidates: Sequence[str] = ()) -> str:
    if not items:
        return ""
    shown = [item + nearest(bare_name(item), candidates).replace("; did", " - did") for item in items[:_LISTED]]
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{len(items)} {what} ({', '.join(shown)}{more})"
