"""What a bundle says of its shop, with every word of it as tokens. No torch: it is read while torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from shoplm.bundle import ShopManifest, manifest_hash, read_manifest
from shoplm.catalog.items import Catalog, read_catalog
from shoplm.engine.spec import EngineSpec
from shoplm.errors import BundleError
from shoplm.model.tokenizer import Tokenizer
from shoplm.vocabulary import SPECIAL_TEXTS


class ShopTexts(NamedTuple):
    """Of one bundle."""

    manifest: ShopManifest
    catalog: Catalog
    tokens: list[list[int]] | None  # the words behind each shop token; None for codes of several tokens


def read_shop_texts(spec: EngineSpec) -> ShopTexts | None:
    """Of the spec's bundle; None where it has none. Raises BundleError and BaseModelError."""
    if spec.bundle_folder is None:
        return None
    # The API process has compared the hashes; here only the metadata are read again.
    bundle = Path(spec.bundle_folder)
    if spec.bundle_hash is not None and manifest_hash(bundle) != spec.bundle_hash:
        raise BundleError(f"{bundle} is another bundle than when the server started: restart the server")
    manifest, catalog = read_manifest(bundle, verify=False), read_catalog(bundle)
    if manifest.depth > 1:  # the bundle stores the rows of its codes
        return ShopTexts(manifest, catalog, None)
    texts = [*SPECIAL_TEXTS.values(), *(catalog.text(row) for row in range(len(catalog))), *catalog.type_texts]
    # Many items share their words: each text is encoded once.
    distinct = list(dict.fromkeys(texts))
    tokenizer = Tokenizer.from_folder(Path(spec.base_folder))
    encoded = dict(zip(distinct, tokenizer.encode_all(distinct), strict=True))
    return ShopTexts(manifest, catalog, [encoded[text] for text in texts])
