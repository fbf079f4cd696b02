"""Options and a checkpoint's vocabulary size -> the dummy driver."""

from __future__ import annotations

import json
from pathlib import Path

from pie_core.contracts.driver import DriverRequest
from pie_core.errors import LoadError
from pie_plugins.drivers.dummy import CHECKPOINT
from pie_plugins.drivers.dummy.driver import DummyDriver
from pie_plugins.drivers.dummy.options import DummyOptions, check_options


def load_dummy(request: DriverRequest) -> DummyDriver:
    options = request.options
    assert isinstance(options, DummyOptions)
    check_options(options)
    return DummyDriver(options, options.vocab_size or _vocab_size(request.model_path or CHECKPOINT))


def _vocab_size(checkpoint: Path) -> int:
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoadError(
            f"driver dummy: {path} cannot be read ({error}); set the option vocab_size"
        ) from error
    size = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(size, int) or size < 2:
        raise LoadError(
            f"driver dummy: vocab_size in {path} is {size!r}; expected a number from 2; set the option"
        )
    return size
