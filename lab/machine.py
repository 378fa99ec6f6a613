"""The GPUs that a recipe is planned for: the options of `train.py RECIPE --plan`, parsed without torch."""

import argparse
import math
import re
from dataclasses import dataclass, replace

from lab.recipe import RecipeError

RESPONSE_SHARE = 0.4  # a choice: mean length of responses over their limit


@dataclass(frozen=True)
class Machine:
    """A number of equal GPUs, their peak rates and the share expected of them; a rate or price of 0 is unknown."""

    memory_gib: float  # of one card; one sold as 24 GB has 24 GiB
    gpus: int = 1
    name: str = ""
    tflops: float = 0.0  # bfloat16 with float32 accumulation, without sparsity
    bandwidth_gbs: float = 0.0  # of the card's memory, in 10^9 bytes per second
    price_per_hour: float = 0.0  # of one card, in dollars
    utilisation: float = 0.4  # expected share of both rates
    response_tokens: int = 0  # mean length; 0: RESPONSE_SHARE of the limit

    @property
    def timed(self) -> bool:
        """Whether the rates are known, so that time can be estimated."""
        return min(self.tflops, self.bandwidth_gbs) > 0

    def seconds(self, flops: float, read: float = 0.0) -> float:
        """Return one card's time for these FLOPs and bytes, whichever takes longer; 0 if its rates are unknown."""
        if not self.timed:
            return 0.0
        flops_per_s, bytes_per_s = self.tflops * 1e12 * self.utilisation, self.bandwidth_gbs * 1e9 * self.utilisation
        return max(read / bytes_per_s, flops / flops_per_s)


# Rates: NVIDIA's Ada GPU architecture whitepaper (appendix A, RTX 4090; a 3090 has 71 and 936) and its data sheets of
# H100 SXM and H200 SXM, whose 1,979 TFLOP/s are with sparsity. Prices are a choice: typical rents.
CARDS = {
    24.0: Machine(24, 1, "RTX 4090", 165, 1008, 0.4),
    80.0: Machine(80, 1, "H100 SXM", 989, 3350, 2.5),
    141.0: Machine(141, 1, "H200 SXM", 989, 4800, 3.5),
}


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of --plan."""
    group = parser.add_argument_group("for --plan")
    known = ", ".join(f"{card.memory_gib:g}GB ({card.name})" for card in CARDS.values())
    group.add_argument("--device", default="24GB", metavar="GB", help=f"memory of one card; known rates: {known}")
    group.add_argument("--gpus", type=int, metavar="N", help="number of cards, with a process on each (default 1)")
    group.add_argument("--tflops", type=float, help="of one card, bfloat16 without sparsity; default: the known card's")
    group.add_argument("--bandwidth-gbs", type=float, help="of its memory, in GB/s; default: the known card's")
    group.add_argument("--price-per-hour", type=float, help="of one card, in dollars; default: the known card's")
    group.add_argument("--utilisation", type=float, help="expected share of both rates (default 0.4)")
    mean = f"mean length of responses; default {RESPONSE_SHARE} of the limit"
    group.add_argument("--response-tokens", type=int, metavar="N", help=mean)


def read_machine(arguments: argparse.Namespace) -> Machine:
    """Return the machine that the options of --plan describe. Raises RecipeError at a bad value."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB)?", arguments.device, re.IGNORECASE)
    if not size or not float(size[1]):
        raise RecipeError(f"--device {arguments.device}: give the memory of one card, such as 24GB")
    card = CARDS.get(float(size[1]), Machine(float(size[1])))
    names = ("gpus", "tflops", "bandwidth_gbs", "price_per_hour", "utilisation", "response_tokens")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    for name, value in given.items():
        if not 0 < value < math.inf or (name == "utilisation" and value > 1):
            bound = "and at most 1" if name == "utilisation" else "and finite"
            raise RecipeError(f"--{name.replace('_', '-')} {value:g}: must be above 0 {bound}")
    return replace(card, **given)
