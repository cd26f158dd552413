"""Sliding windows in a `config.json`: their length, and which layers have one."""

from __future__ import annotations

from dataclasses import dataclass

from ml_models.architecture import Architecture
from ml_models.families.config_json import Config, value_of
from ml_models.families.entries import Fields

_WINDOW, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Windows:
    """`sliding_window`, and `layer_types` or an older key for the layers that have none."""

    default: int
    """What a missing length means; null means that there are no windows."""
    every: int = 2
    """Without `layer_types` every so-manieth layer has none."""
    every_key: str | None = None
    """Older key of that number."""

    def read(self, config: Config) -> Fields:
        """Read which layers have windows.

        Raises:
            ValueError: The layers contradict the number of layers, or the length.
        """
        given = config.get("sliding_window", self.default)
        marks = self._marks(config)
        if not any(marks):
            return {}
        if given is None:
            raise ValueError(
                f"config.json: layer_types has {_WINDOW}, but sliding_window has no length"
            )
        length = value_of({"sliding_window": given}, "sliding_window", int)
        pattern = None if all(marks) else tuple(map(int, marks))
        return {"sliding_window": length, "window_attn_skip_freq": pattern}

    def write(self, arch: Architecture) -> Fields:
        """Write all spellings."""
        types = [_FULL if window is None else _WINDOW for window in arch.windows]
        fields: Fields = {"sliding_window": arch.sliding_window, "layer_types": types}
        if self.every_key and len(arch.window_attn_skip_freq or ()) == 1:
            (fields[self.every_key],) = arch.window_attn_skip_freq or ()
        return fields

    def _marks(self, config: Config) -> list[bool]:
        """Tell for each layer whether it has a window."""
        layers = value_of(config, "num_hidden_layers", int)
        types = config.get("layer_types")
        if types is None:
            every = self.every
            if self.every_key and config.get(self.every_key) is not None:
                every = value_of(config, self.every_key, int)
            return [(layer + 1) % every != 0 for layer in range(layers)]
        if (
            not isinstance(types, (list, tuple))
            or len(types) != layers
            or not set(types) <= {_WINDOW, _FULL}
        ):
            raise ValueError(
                f"config.json: layer_types must be {_WINDOW} or {_FULL} for each of "
                f"num_hidden_layers {layers}, not {types!r}"
            )
        return [kind == _WINDOW for kind in types]
