"""``gpdfx train``: runs that can be stopped and resumed."""

from .config import TrainConfig as TrainConfig
from .run import train as train
