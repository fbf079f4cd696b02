"""The contract suite of drivers. Whoever writes one subclasses it in a test module, and pytest does the rest:

    class TestMine(DriverContract):
        tolerance = 1e-4

        def make_driver(self, page_size: int | None = None) -> Driver:
            return load_mine(page_size or 16)

Every field of a batch and every method of `Driver` is exercised for the features that the driver declares; methods of
features it does not declare must be refused by a typed error that names driver and feature.
"""

from __future__ import annotations

from pie_core.testing.driver_contract.attachments import AdapterContract, AudioContract, MediaContract
from pie_core.testing.driver_contract.caching import CachingContract
from pie_core.testing.driver_contract.life import GenerationContract, LifeContract
from pie_core.testing.driver_contract.masks import MaskContract
from pie_core.testing.driver_contract.moving import MovingContract
from pie_core.testing.driver_contract.sampling import ProbeContract, SamplingContract
from pie_core.testing.driver_contract.tickets import TicketContract


class DriverContract(
    CachingContract,
    MaskContract,
    SamplingContract,
    ProbeContract,
    TicketContract,
    MovingContract,
    AdapterContract,
    MediaContract,
    AudioContract,
    LifeContract,
    GenerationContract,
):
    """All of it; see `DriverSubject` for what a subclass says."""
