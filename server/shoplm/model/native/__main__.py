"""`python -m shoplm.model.native`: the decoder for every set of instructions, into the cache.

For an image or a shared cache whose machines have no compiler, and maybe another CPU than this one.
"""

from __future__ import annotations

import typer
from shoplm.model.base_cache import cache_folder
from shoplm.model.native.library import InstructionSet, built


def main() -> None:
    folder = cache_folder() / "native"
    for instructions in InstructionSet:
        built(instructions)
        typer.echo(f"{instructions}: {folder}")


if __name__ == "__main__":
    main()
