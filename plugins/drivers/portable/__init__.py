"""The portable driver: torch on the CPU, the embedded default."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pie_core.contracts.driver import Driver, DriverDeclaration, DriverRequest
from pie_core.hookspecs import hookimpl
from pie_plugins.drivers.portable.options import PortableOptions

# GNU OpenMP spins for milliseconds between parallel regions. Beside other busy processes that took decoding on two
# cores from 27 tokens/s (with a count of 1,000) to 1.4. This count gave 16 tokens/s against 6 in another, busier run;
# it has not been compared with shorter and longer ones on an idle machine.
SPIN_COUNT = "5000"


def load(request: DriverRequest) -> Driver:
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is first imported
    from pie_plugins.drivers.portable.driver import load_portable  # torch: not before a model is loaded

    return load_portable(request)


@hookimpl
def pie_drivers() -> Sequence[DriverDeclaration]:
    return [
        DriverDeclaration(
            name="portable",
            summary="torch on the CPU: every architecture, no GPU needed",
            options=PortableOptions,
            load=load,
            requires=("torch",),
        )
    ]
