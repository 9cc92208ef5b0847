"""The tables of a benchmark, for a terminal of 100 columns."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rfjax.benchmark import build
from rfjax.benchmark.machine import Machine
from rfjax.benchmark.summary import verdicts

LABELS = {
    build.TEXT_ENCODER: "text encoder (video)",
    build.TEXT_CONTEXT: "text context (video)",
    build.DECODE: "VAE decode",
    build.GATHER: "gather, selection",
    build.SELF_ATTENTION: "self-attention alone",
    build.DENOISE: "denoising passes",
    build.CLEAN: "clean pass, commit",
    build.STEP: "whole chunk",
    build.EARLY_STEP: "whole chunk, early",
}


def print_report(console: Console, summary: dict[str, Any]) -> None:
    """Print the tables, what they mean, and where they were measured."""
    console.print(_parts_table(summary), "")
    console.print(_policies_table(summary), "")
    for name, reason in summary["skipped"].items():
        console.print(f"Skipped: {LABELS[name].partition(' (')[0]}; {reason}.")
    for line in verdicts(summary):
        console.print(line)
    console.print(f"Measured on {Machine(**summary['machine'])}.")


def _parts_table(summary: dict[str, Any]) -> Table:
    settings, peak = summary["settings"], summary["peak_flops"]
    table = _table("part of a chunk", title=f"{settings['preset']['description']}; {settings['dtype']}")
    table.add_column("policy", overflow="fold")
    for head in ("ms/call", "calls", "ms/chunk", "GFLOP/s", *(["of peak"] if peak else []), "compile s"):
        table.add_column(head, justify="right")
    for name, part in summary["shared"].items():
        table.add_row(LABELS[name], "", *_part_cells(part, peak))
    for name in build.PER_POLICY:
        rows = [
            (policy, found["parts"][name]) for policy, found in summary["policies"].items() if name in found["parts"]
        ]
        for index, (policy, part) in enumerate(rows):
            table.add_row("" if index else LABELS[name], policy, *_part_cells(part, peak))
    return table


def _part_cells(part: dict[str, Any], peak: float | None) -> list[str]:
    rate = part["flops_per_second"]
    cells = [_ms(part["call_seconds"]), str(part["calls"]), _ms(part["seconds"])]
    cells.append("" if rate is None else f"{rate / 1e9:,.0f}")
    if peak:
        cells.append("" if rate is None else f"{rate / peak:.0%}")
    return [*cells, f"{part['compile_seconds']:.1f}"]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds < 10 else f"{1e3 * seconds:.0f}"


def _policies_table(summary: dict[str, Any]) -> Table:
    table = _table("policy")
    for head in ("frames", "memory GB", "program GB", "rollout fps", "end-to-end fps"):
        table.add_column(head, justify="right")
    for name, policy in summary["policies"].items():
        program = policy["chunk_memory"]
        table.add_row(
            name,
            str(policy["attended_frames"]),
            f"{(policy['state_bytes'] + policy['view_bytes']) / 1e9:.3g}",
            "unknown" if program is None else f"{program['total_bytes'] / 1e9:.3g}",
            f"{policy['frames_per_second']['rollout']:.3g}",
            f"{policy['frames_per_second']['end_to_end']:.3g}",
        )
    return table


def _table(first: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    return table
