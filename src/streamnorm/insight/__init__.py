"""The layers of a model, watched while it trains and looked at once; a rate and a memory to begin with."""

from ..training.updates import before_commit
from .diagnosis import Diagnosis, LayerDiagnosis
from .monitor import Monitor
from .page import write as write_page
from .readings import Reading
from .record import Event, LayerFacts, Record, Sample
from .sinks import lightning_callback, tensorboard, transformers_callback, wandb
from .suggestion import Suggestion

__all__ = [
    "Diagnosis",
    "Event",
    "LayerDiagnosis",
    "LayerFacts",
    "Monitor",
    "Reading",
    "Record",
    "Sample",
    "Suggestion",
    "before_commit",
    "lightning_callback",
    "tensorboard",
    "transformers_callback",
    "wandb",
    "write_page",
]
