"""The command of model.py: export a model folder. The command line is parsed without importing torch."""

import argparse
import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from lab.options import add_yarn_options, new_parser, user_path, yarn_settings


def export_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of model.py; exit with a message on a usage error."""
    parser = new_parser(
        "Export a model, or a checkpoint of a run, as a Hugging Face folder.\n\n"
        "    python model.py runs/tiny/checkpoints/step-1090 exported\n"
        "    python model.py runs/polaris-4b/stage-2 exported --yarn 1.5 --original-window 65536",
        prog="model.py",
    )
    parser.add_argument(
        "model", type=expanduser, help="model folder, hub id, or RUN/checkpoints/step-N; adapters are merged"
    )
    parser.add_argument("out", type=user_path, help="the folder to write; it must not exist")
    add_yarn_options(parser)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of the weights"
    )
    arguments = parser.parse_args(command_line)
    yarn_settings(parser, arguments)
    return arguments


def main(arguments: argparse.Namespace) -> None:
    """Export a model folder or a run's checkpoint, with its adapter merged and with YaRN if requested."""
    import torch  # imported late, with all that needs it

    from engine.adapter import merge_lora, tokenizer_folder
    from engine.checkpoint import MANIFEST
    from engine.errors import UserError, sentence
    from engine.start import load_checkpoint
    from model import extend_window, load, resolve_folder, save
    from yarn import describe_ramp

    try:
        if (Path(arguments.model) / MANIFEST).exists():
            model, folder = load_checkpoint(Path(arguments.model))
        else:
            model, folder = load(arguments.model), tokenizer_folder(resolve_folder(arguments.model))
        merge_lora(model)
        if arguments.yarn is not None:
            model.config = extend_window(model.config, **arguments.yarn)
            print(describe_ramp(model.config.rope))
        save(model, arguments.out, getattr(torch, arguments.dtype), folder)
    except (UserError, OSError) as error:
        sys.exit(f"model.py: {sentence(error)}")
    print(f"wrote {arguments.out}: window {model.config.max_position_embeddings:,} tokens, {model.config.rope}")
