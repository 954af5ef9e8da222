"""A bundle on disk: what `shoplm train` writes and `shoplm serve` reads. Metadata only; no torch.

shop.toml            everything in `ShopManifest`
items.parquet        one row per known item: item_id, title, category, product_type, price, in_stock, row, type_index
                     `row` is the catalogue row (null: too rare for a token of its own; `type_index` stands for it)
types.parquet        one row per product type: title, description (in order of type_index)
weights.safetensors  output rows, popularity, habits, heads (see `shoplm.model.shop_weights`)
customers.parquet    demo customers' events: customer_id, item_id, type, time, quantity, price, basket_id
card.md              data, splits, metrics beside baselines, limits
report.html          the card's numbers as charts, where the bundle was written by a version that makes it
metrics.json         the card's numbers as data
adapter_*            where the base was adapted: a LoRA adapter in PEFT's format
base/                where the base was trained for this shop alone: a Hugging Face folder, known by its fingerprint
knowledge/*.md       the shop's own texts for chat
"""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from shoplm.errors import BundleError

# Written. 2 has habits beside the count: `loyalty_weight`, `goes_with_weight` and their tables; 3 has `rebuy_weight`,
# 4 `adopt_weight`, 5 `attribute_values`.
FORMAT = 5
Recommends = Literal["purchase", "cart", "view"]
_READ = (1, 2, 3, 4, 5)
REQUIRED_FILES = ("items.parquet", "types.parquet", "weights.safetensors")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FOLDER = "base"

# shop.toml has no hash, and people edit it: what can be meant is checked. No number is NaN or infinite.
_FAR = 1e12
Finite = Annotated[float, msgspec.Meta(ge=-_FAR, le=_FAR)]
Positive = Annotated[float, msgspec.Meta(gt=0.0, le=_FAR)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class BaseReference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base model that the bundle was trained on. A bundle fits one base."""

    name: str
    fingerprint: str  # of the base's weights; see shoplm.model.base
    hidden_size: int
    vocab_size: int


class ScoreWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """score = log p_model + popularity_weight * log popularity + the terms of `shoplm.readout.habits`."""

    repeat_weight: Finite
    popularity_weight: Finite
    decay_days: Positive
    loyalty_weight: Finite = 0.0
    goes_with_weight: Finite = 0.0
    rebuy_weight: Finite = 0.0
    adopt_weight: Finite = 0.0

    @property
    def formula(self) -> str:
        """The score for people. Terms that are left out are not named."""
        terms = ["log p(item)"]
        if self.repeat_weight:
            terms.append(f"{self.repeat_weight:g} log(1 + own count, decay {self.decay_days:g} d)")
        if self.loyalty_weight:
            terms.append(f"{self.loyalty_weight:g} loyalty of own items")
        if self.rebuy_weight:
            terms.append(f"{self.rebuy_weight:g} log-odds that an own item is bought again")
        if self.goes_with_weight:
            terms.append(f"{self.goes_with_weight:g} strength of neighbours among own items")
        if self.adopt_weight:
            terms.append(f"{self.adopt_weight:g} log-odds that another item is bought for the first time")
        return " + ".join([*terms, f"{self.popularity_weight:g} log popularity"])


class PromptSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a customer becomes a prompt."""

    preamble: str
    attributes: tuple[str, ...] = ()
    attribute_values: dict[str, tuple[str, ...]] = {}  # that training saw, of the attributes that have few
    history_budget_tokens: Count = 1024
    chat_reads_item_tokens: bool = True  # False: the base was never trained on them, so chat gets the history in words
    history_block_tokens: Count = 256  # the oldest baskets are dropped in blocks of this, so that the prefix stays put


class HeadSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One target of PredictionService and how its raw head values become an answer (`shoplm.readout.targets`)."""

    kind: str  # purchase | purchase_count | spend | churn | coupon_redemption
    transform: str  # how to read the values: see shoplm.readout.targets
    outputs: tuple[int, ...]  # indices into the head's raw values
    base_rate: Finite
    horizon_days: int = 0  # 0: no horizon
    campaign_type: str = ""
    parameters: dict[str, Finite] = {}  # calibration and interval parameters of the transform
    active_within_days: float = 0.0  # 0: applies to everyone; else only to customers who bought within these days

    @property
    def label(self) -> str:
        """The target's name for people."""
        return f"{self.kind.replace('_', ' ')} {self.campaign_type or f'{self.horizon_days} d'}"


class DemoCustomer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A demo customer: events are in customers.parquet."""

    customer_id: str
    as_of: str  # RFC 3339
    attributes: dict[str, str] = {}


class ShopManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """shop.toml."""

    format: int
    name: str
    version: str
    title: str
    currency: str
    notice: str
    trained_until: str  # RFC 3339: the last moment of the training data
    base: BaseReference
    score: ScoreWeights
    prompt: PromptSchema
    depth: int
    level_sizes: tuple[int, ...]
    type_count: int
    feature_version: int
    hashes: dict[str, str]  # file -> SHA-256, for every file but shop.toml, card.md, report.html and knowledge/
    targets: tuple[HeadSpec, ...] = ()
    customers: tuple[DemoCustomer, ...] = ()
    recommends: Recommends = "purchase"  # the events that are foreseen, and a customer's counted
    cpu_formats: tuple[str, ...] = ()  # of weights, with which the C++ decoder has kept to the quality gate's limits

    @property
    def has_adapter(self) -> bool:
        """The base is served with the adapter that lies in the bundle."""
        return ADAPTER_WEIGHTS in self.hashes


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest_hash(folder: Path) -> str:
    """SHA-256 of a bundle's shop.toml, which holds the hashes of its other files. Raises OSError where it cannot be
    read."""
    return file_hash(folder / "shop.toml")


def read_manifest(folder: Path, *, verify: bool = True) -> ShopManifest:
    """Read and check shop.toml. Raises BundleError naming the file and field that is wrong.

    `verify` compares each file's SHA-256 with the manifest, so that a half-copied bundle is never served.
    """
    path = folder / "shop.toml"
    try:
        data = tomllib.loads(path.read_text("utf-8"))
        # First of all: a later format may have fields that this code does not know.
        if data.get("format", FORMAT) not in _READ:
            known = ", ".join(map(str, _READ))
            raise BundleError(f"{path}: bundle format {data['format']}, this server reads {known}; train it again")
        manifest = msgspec.convert(data, ShopManifest)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{folder}: no bundle there (shop.toml is missing); make one with `shoplm train`") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise BundleError(f"{path}: {error}") from error
    if len(manifest.level_sizes) != manifest.depth:
        raise BundleError(f"{path}: depth {manifest.depth} but {len(manifest.level_sizes)} level_sizes")
    if unnamed := [name for name in REQUIRED_FILES if name not in manifest.hashes]:
        raise BundleError(f"{path}: hashes lacks {', '.join(unnamed)}: nothing says what these files should hold")
    for name, expected in manifest.hashes.items():
        if Path(name).name != name:
            raise BundleError(f"{path}: hashes names {name!r}, which is not a file of the bundle")
        if not (folder / name).is_file():
            raise BundleError(f"{folder / name}: missing")
        if verify and file_hash(folder / name) != expected:
            raise BundleError(f"{folder / name}: differs from its SHA-256 in shop.toml; copy or train the bundle again")
    return manifest


def write_manifest(folder: Path, manifest: ShopManifest) -> None:
    """Write shop.toml, atomically."""
    import tomli_w  # needed for training only

    text = tomli_w.dumps(msgspec.to_builtins(manifest))
    temporary = folder / ".shop.toml.partial"
    temporary.write_text(text, "utf-8")
    temporary.replace(folder / "shop.toml")
