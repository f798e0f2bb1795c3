"""The earlier home of `train`, for scripts that import it from here."""

from adapters_kit.training.train import train as train
