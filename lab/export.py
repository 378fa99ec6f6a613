"""The command line of model.py, parsed without importing torch."""

import argparse
from collections.abc import Sequence
from os.path import expanduser

from lab.options import user_path


def export_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of model.py; exit with a message on a usage error."""
    parser = argparse.ArgumentParser("model.py", description="Export a model folder, optionally with YaRN.")
    parser.add_argument("model", type=expanduser, help="a model folder or hub id; an adapter is merged into its base")
    parser.add_argument("out", type=user_path, help="the folder to write; it must not exist")
    parser.add_argument("--yarn", type=float, metavar="FACTOR", help="extend the window by this factor")
    parser.add_argument("--original-window", type=int, metavar="TOKENS", help="the window to extend (the config's)")
    parser.add_argument("--attention-factor", type=float, default=1.0, help="YaRN's scale of cos and sin (1.0 = off)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    return parser.parse_args(command_line)
