"""The conformance kit: what every component is asked, whoever wrote it.

``kexue check``, and in a plugin's own tests::

    from kexue.core.conformance import conformance

    @conformance("mine")
    def test_keeps_the_contract(check):
        check()

What is asked of several processes is in :mod:`kexue.core.conformance.distributed`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from kexue.core.conformance.asking import (
        check_all as check_all,
    )
    from kexue.core.conformance.asking import (
        check_component as check_component,
    )
    from kexue.core.conformance.kit import (
        Check as Check,
    )
    from kexue.core.conformance.kit import (
        Finding as Finding,
    )
    from kexue.core.conformance.kit import (
        Subject as Subject,
    )
    from kexue.core.conformance.kit import (
        require as require,
    )
    from kexue.core.conformance.parametrize import conformance as conformance

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "asking": ["check_all", "check_component"],
        "kit": ["Check", "Finding", "Subject", "require"],
        "parametrize": ["conformance"],
    },
)
