"""What is imported is not searched for garbage; everything else is."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

from lora_ggpo.workspace.libraries import importing


class Node:
    """One that refers to itself, so that only the search finds it to be garbage."""

    def __init__(self):
        self.itself = self


def test_imports_are_not_searched_for_garbage_and_what_comes_after_is():
    with suppress(ImportError), importing():
        kept = weakref.ref(Node())
        raise ImportError
    assert gc.isenabled()
    after = weakref.ref(Node())
    gc.collect()
    assert kept() is not None
    assert after() is None
