"""What figures and bug reports depend on: versions, devices, plugins and what they cost."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

from kexue.core.registry import Registry

__all__ = ["environment", "full_environment"]

_PACKAGES = ("numpy", "typer", "rich", "pluggy", "safetensors", "accelerate", "matplotlib")


def environment() -> dict[str, str]:
    """Return what figures depend on: versions, processor, accelerator."""
    return {
        "kexue": metadata.version("kexue"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        **_torch(),
    }


def _torch() -> dict[str, str]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001 -- a report on what is wrong must not fail of it
        return {"torch": f"cannot be imported: {type(error).__name__}: {error}"}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "accelerator": str(accelerator) if accelerator is not None else "none",
    }


def full_environment(registry: Registry) -> dict[str, Any]:
    """Return all that a bug report needs.

    Args:
        registry: Whose plugins to report, with the time that importing each manifest took.
    """
    plugins = registry.plugins  # before torch is imported, so that heavy manifests show
    rows = [
        {
            "plugin": plugin.slug,
            "owner": plugin.owner,
            "version": plugin.version,
            "state": plugin.state,
            "milliseconds": round(1e3 * plugin.seconds, 1),
            "imports": list(plugin.heavy),
            "reason": plugin.reason,
        }
        for plugin in plugins
    ]
    versions = {name: _version(name) for name in _PACKAGES}
    files = [str(document["path"]) for document in registry.settings.documents]
    return {
        **environment(),
        "executable": sys.executable,
        "packages": versions,
        "registry_files": files,
        "plugins": rows,
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
