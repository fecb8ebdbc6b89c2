"""The sweeper of `kd-train --multirun`. Hydra instantiates plugins from this namespace alone; the work is in `kd.sweeps`."""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class Points(BasicSweeper):
    """Hydra's basic sweeper, except that a point that fails, even while it is composed, does not stop the others."""

    def sweep(self, arguments: list[str]) -> Any:
        """Make every point.

        Raises:
            kd.sweeps.PointsFailed: at the end, if any of them failed.
        """
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from kd.sweeps import sweep

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        configured = [f"{key}={value}" for key, value in self.params.items()]  # `hydra.sweeper.params`
        overrides = parser.parse_overrides([*configured, *arguments])
        (points,) = self.split_arguments(overrides, None)
        return sweep(points, list(self.config.hydra.overrides.hydra), self.launcher.launch)
