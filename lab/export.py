"""The command of model.py: export a model folder. The command line is parsed without importing torch."""

import argparse
import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from lab.options import user_path


def export_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of model.py; exit with a message on a usage error."""
    parser = argparse.ArgumentParser("model.py", description="Export a model, or a checkpoint of a run, as a folder.")
    parser.add_argument(
        "model", type=expanduser, help="model folder, hub id, or RUN/checkpoints/step-N; adapters are merged"
    )
    parser.add_argument("out", type=user_path, help="the folder to write; it must not exist")
    parser.add_argument("--yarn", type=float, metavar="FACTOR", help="extend the window by this factor")
    parser.add_argument("--original-window", type=int, metavar="TOKENS", help="the window to extend (the config's)")
    parser.add_argument("--attention-factor", type=float, default=1.0, help="YaRN's scale of cos and sin (1.0 = off)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    return parser.parse_args(command_line)


def main(arguments: argparse.Namespace) -> None:
    """Export a model folder or a run's checkpoint, with its adapter merged and with YaRN if requested."""
    import torch  # imported late, with all that needs it

    from engine.adapter import merge_lora, tokenizer_folder
    from engine.checkpoint import MANIFEST
    from engine.errors import UserError, sentence
    from engine.start import load_checkpoint
    from model import extend_window, load, resolve_folder, save

    try:
        if (Path(arguments.model) / MANIFEST).exists():
            model, folder = load_checkpoint(Path(arguments.model))
        else:
            model, folder = load(arguments.model), tokenizer_folder(resolve_folder(arguments.model))
        merge_lora(model)
        if arguments.yarn is not None:
            model.config = extend_window(
                model.config, arguments.yarn, arguments.original_window, arguments.attention_factor
            )
        save(model, arguments.out, getattr(torch, arguments.dtype), folder)
    except (UserError, OSError) as error:
        sys.exit(f"model.py: {sentence(error)}")
    print(f"wrote {arguments.out}: window {model.config.max_position_embeddings:,} tokens, {model.config.rope}")
