"""Python's garbage collector in a process that loads for seconds and then serves for weeks."""

from __future__ import annotations

import gc


def pause_collector() -> None:
    """While things are loaded that stay: looking through them again and again takes a tenth of a start."""
    gc.disable()


def keep_loaded() -> None:
    """From now on, with what there is left out of every collection: modules and a catalogue are many objects."""
    if gc.isenabled():  # else there is only what a start has made, and little of that is garbage
        gc.collect()
    gc.freeze()
    gc.enable()
