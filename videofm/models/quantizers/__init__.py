"""Quantizers: one contract (`base.Quantizer`), one file a kind, named in `registry.QUANTIZERS`."""

from videofm.models.quantizers.base import Quantizer, QuantizerOutput
from videofm.models.quantizers.config import QuantizerConfig, quantizer_config
from videofm.registry import QUANTIZERS, lookup

__all__ = ["Quantizer", "QuantizerConfig", "QuantizerOutput", "build_quantizer", "quantizer_config"]


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that `config` describes.

    Raises:
        ConfigError: a kind that is not registered.
    """
    quantizer: Quantizer = lookup(QUANTIZERS, config.kind, "quantizer")(config)
    return quantizer
