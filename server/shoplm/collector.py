"""Python's garbage collector in a process that loads for seconds and then serves for weeks."""

from __future__ import annotations

import gc


def pause_collector() -> None:
    """Stop garbage collection while a process loads what it keeps: scanning that repeatedly takes a tenth of a
    start."""
    gc.disable()


def keep_loaded() -> None:
    """Start garbage collection again, leaving out what is loaded by now: modules and a catalogue are many objects."""
    if gc.isenabled():  # else there is only what a start has made, and little of that is garbage
        gc.collect()
    gc.freeze()
    gc.enable()
