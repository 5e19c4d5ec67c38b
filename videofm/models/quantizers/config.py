"""What is common to the configs of quantizers, and from a mapping to a config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from videofm.errors import ConfigError
from videofm.registry import QUANTIZERS, lookup, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Fields that every kind has. Each kind is a frozen dataclass below this one, with a default for every field.

    `usage_tokens` is the length of the window over which the use of codes is measured, in tokens for each code; `probe_size`
    is the number of vectors whose indices are watched for churn.
    """

    kind: str = ""
    usage_tokens: int = 20
    probe_size: int = 256

    def __post_init__(self) -> None:
        if self.kind != type(self).kind:
            raise ConfigError(
                f"{type(self).__name__} is for quantizers of kind {type(self).kind!r}, not {self.kind!r}: take "
                "quantizer_config, which picks the class by the kind."
            )
        for field in dataclasses.fields(self):
            self._check_type(field.name, field.default)
        self.within("usage_tokens", 1)
        self.within("probe_size", 1)

    def within(self, name: str, low: float, high: float | None = None, below: bool = False) -> None:
        """Refuse a field outside of `[low, high]`, or of `[low, high)` with `below`.

        Raises:
            ConfigError: it is outside.
        """
        value = getattr(self, name)
        if value < low or (high is not None and (value >= high if below else value > high)):
            end = "" if high is None else f" and {'below' if below else 'at most'} {high}"
            raise ConfigError(f"quantizer {self.kind}: {name} is {value}; it must be at least {low}{end}.")

    def only_with(self, switch: str, off: int, *names: str) -> None:
        """Refuse values of the fields `names`, other than their defaults, where `switch` is `off`: nothing would read them.

        Raises:
            ConfigError: there is one.
        """
        for name in names:
            value, default = getattr(self, name), getattr(type(self), name)
            if getattr(self, switch) == off and value != default:
                raise ConfigError(
                    f"quantizer {self.kind}: {name} is {value}, but with {switch} {off} nothing reads it. Leave it out, or set "
                    f"{switch} above {off}."
                )

    def _check_type(self, name: str, default: object) -> None:
        """Refuse a value of another type than the default's; a whole number also stands where any number does."""
        value = getattr(self, name)
        if isinstance(default, bool):
            wanted, fits = "true or false", isinstance(value, bool)
        elif isinstance(default, int):
            wanted, fits = "a whole number", is_whole(value)
        elif isinstance(default, float):
            wanted, fits = "a finite number", is_whole(value) or (isinstance(value, float) and math.isfinite(value))
        elif isinstance(default, tuple):
            wanted, fits = "a list of whole numbers", isinstance(value, tuple) and all(is_whole(part) for part in value)
        else:
            wanted, fits = "a text", isinstance(value, str)
        if not fits:
            raise ConfigError(f"quantizer {self.kind}: {name} is {value!r}; it must be {wanted}, such as {default!r}.")


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def quantizer_config(values: Mapping[str, Any]) -> QuantizerConfig:
    """The config that `values` describe: `kind` and some of its fields, as from YAML or `dataclasses.asdict`.

    Raises:
        ConfigError: not a mapping, no such kind or field, or a value of another type or out of range.
    """
    kinds = ", ".join(sorted(QUANTIZERS))
    if not isinstance(values, Mapping):
        raise ConfigError(f"a quantizer is a mapping with a 'kind' (one of: {kinds}) and its fields, not {values!r}.")
    if "kind" not in values:
        raise ConfigError(f"a quantizer needs a 'kind', one of: {kinds}.")
    if not isinstance(values["kind"], str):
        raise ConfigError(f"the kind of a quantizer is {values['kind']!r}; it must be one of: {kinds}.")
    kind = lookup(QUANTIZERS, values["kind"], "quantizer").config_class
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"quantizer {values['kind']} has no option {name!r}{nearest(str(name), fields)}. There are: "
                f"{', '.join(fields)}."
            )
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
