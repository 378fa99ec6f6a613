from lab.alarms import *  # noqa: F403
from lab.console import *  # noqa: F403
from lab.glossary import DETERMINISTIC  # noqa: F401
from lab.metrics import *  # noqa: F403
