"""transformers as an oracle: what keeps it from being imported, or from running on a CPU, is put out of its sight."""

from __future__ import annotations

import sys
from typing import Any

import pytest


def library(module: str = "") -> Any:
    """The library, or a module of it such as ``models.mamba.modeling_mamba``; skips the tests where there is none."""
    for kernels in ("fla", "mamba_ssm", "causal_conv1d"):  # it would bind their GPU kernels when imported
        sys.modules.setdefault(kernels, None)  # type: ignore[arg-type]
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # made for another torch, which its import of everything would trip over
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    name = f"transformers.{module}" if module else "transformers"
    return pytest.importorskip(name, reason="install the extra 'oracles' to compare with transformers")
