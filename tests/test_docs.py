"""Numbers in the documents that follow from the code."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from rfjax import memory
from rfjax.config import preset_names
from rfjax.memory import MemoryShape, footprint

DOCS = Path(__file__).parents[1] / "docs"
SHAPE = MemoryShape(layers=30, batch=1, heads=12, head_dim=128, rows=30, columns=52, chunk_frames=3)
FRAME = 2 * 30 * 1560 * 1536 * 2


def policy_rows():
    text = (DOCS / "memory_policies.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[2:5] for row in rows}


def test_the_table_of_policies_has_every_policy_and_preset():
    assert set(policy_rows()) == {*memory.POLICIES, *preset_names("policies")}


@pytest.mark.parametrize(("name", "cells"), policy_rows().items())
def test_the_table_of_policies_says_what_is_stored(name, cells):
    size = footprint(memory.create(name), SHAPE, 81, jnp.bfloat16)
    numbers = f"{size.attended_frames}", f"{size.state_bytes / FRAME:.0f}"
    assert cells == [*numbers, f"{(size.state_bytes + size.view_bytes) / 1e9:.1f}"]


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
