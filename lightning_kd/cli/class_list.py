"""``lightning-kd list``: all that can be named in a config or a command."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lightning_kd.cli.config_names import config_folder, config_names

__all__ = ["class_list", "main"]


def main(args: Sequence[str]) -> None:
    """The command line.

    Raises:
        ValueError: where it is given anything.
    """
    if args:
        raise ValueError(f"list takes no arguments, got {' '.join(args)}")
    print(class_list())


def class_list() -> str:
    """Methods, optimizers, callbacks and data modules with a sentence each, networks and configs."""
    import lightning as L
    from torch.optim import Optimizer

    import lightning_kd.callbacks
    import lightning_kd.core
    import lightning_kd.data
    from lightning_kd.core.registry import family_packages
    from lightning_kd.core.task import Task
    from lightning_kd.nets import network_names

    def classes(packages: list[Any], base: type) -> list[str]:
        named = {name: getattr(package, name) for package in packages for name in package.__all__}
        return [
            f"  {name:<26} {(inspect.getdoc(value) or '').partition(chr(10))[0]}"
            for name, value in sorted(named.items())
            if inspect.isclass(value)
            and issubclass(value, base)
            and not name.endswith("Task")  # bases
            and not inspect.isabstract(value)
        ]

    lines = ["methods:", *classes([lightning_kd.core, *family_packages()], Task)]
    lines += ["optimizers:", *classes(family_packages(), Optimizer)]
    lines += ["callbacks:", *classes([lightning_kd.callbacks, *family_packages()], L.Callback)]
    lines += ["data modules:", *classes([lightning_kd.data], L.LightningDataModule)]
    lines += ["networks:", f"  {', '.join(network_names())}", "  timm/NAME, torchvision/NAME", "configs:"]
    for name in config_names():
        first = (config_folder() / f"{name}.yaml").read_text().partition("\n")[0]
        lines.append(f"  {name:<48} {first.lstrip('# ') if first.startswith('#') else ''}")
    return "\n".join(lines)
