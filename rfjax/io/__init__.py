"""Files: checkpoints, videos, plots and the output folder."""
