"""`rfjax sweep`: the flags, and what a study file holds."""

import argparse

from rfjax.commands.flags import add_batch_size, add_dtype, input_path, output_folder, whole

_STUDY = """\
A study is a YAML file:

  description: one line                    # optional
  prompts: [a red fox in snow, a harbour]  # or prompt_file: a prompt a line
  num_samples: 2                           # videos of each prompt (default: 1)
  seed: 0
  seconds: 5                               # or latent_frames (default: 10 seconds)
  height: 480                              # with width and fps optional
  policies:
    - policy: relax_forcing                # as for rfjax generate --policy
      settings:
        redundancy_weight: [0.5, 1, 2]     # a list is tried value by value,
        history_frames: [1, 2]             # several lists make a grid,
        sink_frames: 2                     # and this is fixed
    - policy: relax_forcing
      settings: {redundancy_weight: {from: 0, to: 4, steps: 50}}
    - policy: attention_sink

Paths in it count from its own folder. Policies that differ in settings that are fractions share a compilation.

DIR receives <variant>/<prompt>-<sample>.mp4 with metadata.json and memory timelines as rfjax generate writes them, and:
  report.html     pictures and tables, to be opened in a browser
  results.csv     a row a video: policy, settings, measures, speed
  series.csv      a row a second of video
  study.yaml      the study with every default and grid written out
  vbench/         a folder of each variant's videos alone, as VBench reads them
A study that was interrupted goes on where it stopped, and one that has grown makes what is new.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rfjax sweep`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _STUDY
    parser.add_argument(
        "study",
        metavar="STUDY",
        help="a YAML file, or a study that comes with rfjax: policies (all that need no training, on the same prompts) "
        "or redundancy_weight (50 values of it)",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=output_folder, required=True, help="folder of everything that is made"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=input_path,
        help="written by rfjax convert (default: the small model of moving shapes that comes with rfjax)",
    )
    add_dtype(parser)
    add_batch_size(parser, "videos made together", default=1)
    parser.add_argument(
        "--together",
        metavar="N",
        type=whole(1, 10**6),
        default=1,
        help="variants made together, where they share a compilation; times --batch-size videos (default: 1)",
    )
    parser.add_argument(
        "--format", choices=("csv", "parquet"), default="csv", help="of results and series (default: csv)"
    )
    parser.add_argument("--overwrite", action="store_true", help="make and replace videos that are already there")


def run(args: argparse.Namespace) -> None:
    """Make the study's videos, measure them and write the report.

    Raises:
        UserError: an input is wrong; nothing has been written then.
    """
    from rfjax.commands import sweep_run  # imports JAX

    sweep_run.sweep(args)
