"""torchrun itself, whose workers begin with the imports done (forked.py) and are waited for less long at the end."""

from multiprocessing.forkserver import _forkserver

import forked
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import PContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler


def start(args, env, **options):
    """A worker, as torchrun starts it: python -u script, in a session of its own."""
    python, unbuffered, *words = args
    assert unbuffered == "-u"
    return forked.Popen([python, *words], env=env | {"PYTHONUNBUFFERED": "1"}, **options)


if __name__ == "__main__":
    # torchrun is forked too, and its server serves the workers as well; Python 3.11 would start another
    _forkserver.ensure_running = lambda: None
    subprocess_handler.Popen = start
    # half a minute is its own patience with a worker that hangs, --shutdown-timeout does not reach this
    PContext.close.__defaults__ = None, 2
    run.main()
