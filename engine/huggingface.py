"""What the keys of a Hugging Face config mean."""

import math

from yarn import Llama3Scaling, Rope, RopeError, Yarn


def rope_from_config(config: dict, head_dim: int) -> tuple[Rope, list[str]]:
    """Read the rotary keys of a Hugging Face config, old style and new. Returns what they mean and notes to show.

    Raises RopeError on a kind of scaling, or a key, that would change the frequencies in a way not computed here.
    """
    keys: dict = {}
    for block in ("rope_scaling", "rope_parameters"):
        stated = {key: value for key, value in (config.get(block) or {}).items() if value is not None}
        if "type" in stated:
            stated.setdefault("rope_type", stated.pop("type"))
        for key, value in stated.items():
            if isinstance(value, dict):
                raise RopeError(f"{block} of one kind of layer ({key}) is not supported")
            if keys.setdefault(key, value) != value:
                raise RopeError(f"rope_scaling and rope_parameters disagree about {key}: keep one of the two")
    theta = float(keys.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0)
    kind = keys.pop("rope_type", "default")
    if keys.pop("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise RopeError("partial_rotary_factor other than 1 (rotating part of each head) is not supported")

    notes: list[str] = []
    if kind == "default":
        return Rope(theta, head_dim), notes
    if kind not in ("yarn", "llama3"):
        raise RopeError(f"rope scaling {kind!r} is not supported (known: default, yarn, llama3)")
    window = keys.pop("original_max_position_embeddings", None) or config.get("max_position_embeddings")
    if not window:
        raise RopeError(f"rope scaling {kind!r} needs original_max_position_embeddings: add it to config.json")
    try:
        if kind == "yarn":
            factor = float(keys.pop("factor"))
            stated, misspelt = keys.pop("attention_factor", None), keys.pop("attn_factor", None)
            if stated is None and misspelt is not None:
                stated = misspelt
                notes.append(
                    f'YaRN: "attn_factor": {misspelt} is read as attention_factor, as POLARIS meant it '
                    f"(transformers ignores the key and applies {0.1 * math.log(factor) + 1:.4f})"
                )
            elif stated is None:  # somebody else's YaRN: the paper's default is what the model was shipped with
                stated = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
                notes.append(f"YaRN: no attention_factor in the config: the paper's {stated:.4f} is applied")
            betas = float(keys.pop("beta_fast", 32.0)), float(keys.pop("beta_slow", 1.0))
            scaling = Yarn(factor, int(window), float(stated), *betas)
            if keys.pop("truncate", True) is not True:
                raise RopeError("YaRN with truncate=false is not supported")
        else:
            low, high = float(keys.pop("low_freq_factor")), float(keys.pop("high_freq_factor"))
            scaling = Llama3Scaling(float(keys.pop("factor")), int(window), low, high)
    except KeyError as missing:
        raise RopeError(f"rope scaling {kind!r} lacks {missing} in config.json") from None
    if keys:
        raise RopeError(f"rope scaling {kind!r} has keys that are not understood: {', '.join(sorted(keys))}")
    return Rope(theta, head_dim, scaling), notes


def rope_to_config(rope: Rope) -> dict:
    """The config.json keys that make transformers (4 and 5) compute the very same frequencies and scale."""
    match rope.scaling:
        case None:
            scaling = None
        case Yarn() as yarn:
            scaling = {"rope_type": "yarn", **vars(yarn)}
        case Llama3Scaling() as llama3:
            scaling = {"rope_type": "llama3", **vars(llama3)}
    parameters = {"rope_theta": rope.theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": parameters}
