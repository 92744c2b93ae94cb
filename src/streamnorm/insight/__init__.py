"""What the layers of a model do: watched while it trains, and looked at once."""

from .diagnosis import Diagnosis, LayerDiagnosis
from .monitor import Monitor
from .page import write as write_page
from .readings import Reading
from .record import Event, LayerFacts, Record, Sample
from .sinks import lightning_callback, tensorboard, transformers_callback, wandb

__all__ = [
    "Diagnosis",
    "Event",
    "LayerDiagnosis",
    "LayerFacts",
    "Monitor",
    "Reading",
    "Record",
    "Sample",
    "lightning_callback",
    "tensorboard",
    "transformers_callback",
    "wandb",
    "write_page",
]
