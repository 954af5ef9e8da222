"""The server's settings: one model, and how it is written as a settings file. No torch.

The setting `max_events` is the file's key `max_events`, the variable `SHOPLM_MAX_EVENTS` and the flag `--max-events`
(`shoplm.config_sources` reads them). Unknown keys are refused in all three, with the nearest known name.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from shoplm.engine.spec import EngineSpec, SyntheticTrie
from shoplm.errors import ConfigurationError
from shoplm.request import NEAR_LANES, OWN_LANES, Service
from shoplm.scheduler.config import SchedulingPolicy

ENVIRONMENT_PREFIX = "SHOPLM_"


def _split(value: object) -> object:
    """`a,b` and `["a", "b"]` are both lists where they come from the environment or a flag."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"is not a JSON list: {error}") from error
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _split_secrets(value: object) -> object:
    """Like `_split`, but refuses an empty text: a secret was forgotten, nobody wished to do without one."""
    if isinstance(value, str) and not value.strip(", "):
        raise ValueError("is empty: name a token, or leave the setting out for no authentication")
    return _split(value)


Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_secrets)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def _weights(entries: Iterable[str]) -> dict[str, float]:
    """`NAME=WEIGHT` entries. ValueError names the one that is wrong."""
    weights: dict[str, float] = {}
    for entry in entries:
        name, equals, written = entry.rpartition("=")
        try:
            weights[name] = float(written)
        except ValueError:
            equals = ""
        if not equals or not 0 < weights[name] < math.inf:
            raise ValueError(f"{entry!r} is not of the form NAME=WEIGHT with a positive weight, such as gold=3")
    return weights


_TOKEN = re.compile(r"[!-~]+")  # what a header's value may hold, without spaces
_KEY = re.compile(r"[a-z0-9_.-]*")  # gRPC's rule
_TRIE = re.compile(r"(?P<name>[\w-]+)=(?P<items>\d+):(?P<sizes>\d+(x\d+)*)")


class ServerConfig(BaseSettings):
    """Everything that can be set. Sizes in bytes, times in seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, populate_by_name=True)

    # What is served
    base: str | None = Field(None, description="base model: folder, GGUF file or hub id; unset: the packaged default")
    bundle: Path | None = Field(None, description="bundle folder of the shop; unset: chat only")
    adapter: Path | None = Field(None, description="LoRA adapter in PEFT's format for a base without a bundle")
    adapter_mode: Literal["auto", "merged", "apart"] = Field(
        "auto",
        description="an adapter, the bundle's too, is added to the weights as they are loaded, or kept apart as "
        "products of its own; auto: apart where weights are int4, which would round it away, else merged",
    )
    verify_bundle: bool = Field(True, description="compare the bundle's files with their SHA-256 at start")

    # Where
    host: str = Field("127.0.0.1", description="address of gRPC; 0.0.0.0 for all", min_length=1)
    port: int = Field(50051, description="port of gRPC; 0: any free one", ge=0, le=65535)
    metrics_host: str = Field("127.0.0.1", description="address of /metrics, /healthz and /readyz", min_length=1)
    metrics_port: int = Field(9464, description="its port; 0: any free one", ge=0, le=65535)

    # Engine
    backend: Literal["torch", "triton"] = Field("torch", description="what computes: torch a CPU, triton an NVIDIA GPU")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="type of weights and cache")
    threads: int = Field(0, description="CPU threads of the engine; 0: one per core", ge=0, le=1024)
    kv_cache_mib: int = Field(
        512, description="memory for keys and values, in MiB; unset on a GPU: what it has free, less a margin", ge=1
    )
    weight_format: Literal["auto", "model", "int8", "int4", "fp8"] = Field(
        "auto",
        description="the layers' products; int8, int4: a GPU's or the C++ decoder's; fp8: a GPU's; auto: int8 where "
        "that decoder runs and the bundle has passed the quality gate with it, else model",
    )
    kv_format: Literal["model", "int8", "fp8"] = Field(
        "model", description="keys and values; int8: a GPU's or the C++ decoder's; fp8: a GPU's"
    )
    graph_seconds: float = Field(30.0, description="GPU: time to capture steps as CUDA graphs; 0: none", ge=0, le=600)
    page_size: int = Field(16, description="tokens of a cache page", ge=1, le=1024)
    max_context_tokens: int = Field(0, description="tokens of a prompt with its answer; 0: the base model's", ge=0)
    max_step_tokens: int = Field(512, description="most tokens of one forward pass", ge=1)
    max_mixed_prompt_tokens: int = Field(128, description="prompt tokens of a pass in which answers go on", ge=1)
    max_draft_tokens: int = Field(
        7, description="CPU: tokens of an answer guessed from its prompt and checked in one pass; 0: none", ge=0, le=64
    )
    max_running_requests: int = Field(256, description="most requests in one forward pass", ge=1)
    max_queued_requests: int = Field(2048, description="more are refused with RESOURCE_EXHAUSTED", ge=1)
    max_queued_tokens: int = Field(1_000_000, description="the same, in prompt tokens", ge=1)
    engine_hang_seconds: float = Field(
        60.0,
        description="silence after which an engine with work to do is killed and started again, at least 1 and longer "
        "than any step; 0: never",
        ge=0,
        le=86_400,
    )

    # Scheduling (docs/scheduling.md)
    scheduling_policy: Literal["slack", "fcfs"] = Field("slack", description="by deadlines and shares, or by arrival")
    recommendation_target_seconds: float = Field(0.1, description="default target of a recommendation", gt=0)
    prediction_target_seconds: float = Field(0.05, description="default target of a prediction", gt=0)
    chat_first_target_seconds: float = Field(0.5, description="default target of a chat's first token", gt=0)
    chat_token_target_seconds: float = Field(0.06, description="target of each further token", gt=0)
    enforced_targets: Names = Field((), description="services whose target refuses as a caller's deadline would")
    service_weights: Names = Field(
        (), description="shares of a busy engine, each SERVICE=WEIGHT; 1 where unnamed; none: by what is asked for"
    )
    tenant_weights: Names = Field((), description="shares within a service, each TENANT=WEIGHT; 1 where unnamed")
    tenant_metadata_key: str = Field(
        "x-tenant-id", description="metadata key whose value is the tenant; empty: all callers are one"
    )
    synthetic_tries: Names = Field(
        (), description="random catalogues for the engine API, each NAME=ITEMS:SIZExSIZE… (a comma between two)"
    )
    engine_api: bool = Field(False, description="offer EngineService: raw token ids, for benchmarks and debugging")

    # Limits of a request; over one: INVALID_ARGUMENT, unless it says otherwise
    max_message_bytes: int = Field(8 * 2**20, description="largest request message", ge=1024, le=2**28)
    max_text_bytes: int = Field(128 * 1024, description="text of a conversation, all messages together", ge=1)
    max_messages: int = Field(256, description="messages of a conversation", ge=1)
    max_events: int = Field(
        10_000, description="events read of a customer; the oldest others are left out in blocks", ge=1
    )
    max_count: int = Field(200, description="items of a recommendation", ge=1, le=1024)
    max_candidates: int = Field(
        1000,
        description="items of one Rank call; at most max_step_tokens where items' codes have several tokens",
        ge=1,
    )
    max_filter_values: int = Field(10_000, description="entries of a list in a filter", ge=1)
    max_beam_width: int = Field(128, description="widest search", ge=1, le=1024)
    default_beam_width: int = Field(32, description="beams where a request does not say", ge=1)
    max_completion_tokens: int = Field(1024, description="longest chat answer", ge=1)
    default_completion_tokens: int = Field(256, description="longest answer where a request does not say", ge=1)
    max_stop_strings: int = Field(16, description="stop strings of a chat", ge=0)
    max_targets: int = Field(64, description="targets of one Predict call", ge=1)
    explanation_forks: int = Field(
        32, description="parts of a history that an explanation tries the answer without; 0: none", ge=0, le=256
    )
    max_passages: int = Field(3, description="passages that a chat is given, at most", ge=0, le=32)

    # Limits of the server; over one: RESOURCE_EXHAUSTED
    max_concurrent_calls: int = Field(4096, description="calls in flight in all", ge=1)
    max_concurrent_streams: int = Field(1024, description="calls in flight of one connection", ge=1, le=2**31 - 1)

    # Connections
    max_connection_age_seconds: float = Field(
        1800,
        description="connections are renewed after this, so that balancers can move them; 0: never",
        ge=0,
        le=2_000_000,
    )
    keepalive_seconds: float = Field(60, description="ping of idle connections; 0: none", ge=0, le=2_000_000)
    drain_seconds: float = Field(30, description="how long running calls may take after SIGTERM or SIGHUP", ge=0)
    lame_duck_seconds: float = Field(
        5,
        description="of them, how long new calls are still taken, until balancers and clients have seen NOT_SERVING; "
        "at most half of drain_seconds, none after Ctrl-C or SIGHUP",
        ge=0,
    )

    # Security
    auth_tokens: Secrets = Field((), description="bearer tokens that are let in; none: no authentication")
    auth_tokens_file: Path | None = Field(None, description="file of further tokens, one a line")
    tls_certificate: Path | None = Field(None, description="PEM certificate chain; unset: no TLS")
    tls_key: Path | None = Field(None, description="its PEM private key")
    tls_client_ca: Path | None = Field(None, description="PEM of the CA whose clients are let in (mutual TLS)")

    # Logs
    log_format: Literal["text", "json"] = Field("text", description="readable lines, or one JSON object a line")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug logs every call")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for default, limit in (
            ("default_beam_width", "max_beam_width"),
            ("default_completion_tokens", "max_completion_tokens"),
        ):
            if getattr(self, default) > getattr(self, limit):
                raise ValueError(f"{default} {getattr(self, default)} is over {limit} {getattr(self, limit)}")
        lanes = OWN_LANES + NEAR_LANES
        if self.default_beam_width + lanes > self.max_step_tokens:
            raise ValueError(
                f"default_beam_width {self.default_beam_width} is over max_step_tokens {self.max_step_tokens} less "
                f"{lanes}: a step holds a search's beams together, and {lanes} items that ride along"
            )
        if 0 < self.engine_hang_seconds < 1:  # it says something five times a second, if steps are short
            raise ValueError(f"engine_hang_seconds {self.engine_hang_seconds} is below 1: every step would be a hang")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key come together: set both or none")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self

    @field_validator("synthetic_tries")
    @classmethod
    def _tries_readable(cls, tries: tuple[str, ...]) -> tuple[str, ...]:
        for trie in tries:
            match = _TRIE.fullmatch(trie)
            if match is None:
                raise ValueError(f"{trie!r} is not of the form NAME=ITEMS:SIZExSIZE, such as big=50000:64x64x64")
            if math.prod(map(int, match["sizes"].split("x"))) < int(match["items"]):
                raise ValueError(f"{trie!r}: levels of {match['sizes']} codes hold fewer than {match['items']} items")
        return tries

    @field_validator("enforced_targets")
    @classmethod
    def _services_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in list(Service):
                raise ValueError(f"{name!r} is not one of {', '.join(Service)}")
        return names

    @field_validator("tenant_metadata_key")
    @classmethod
    def _key_usable(cls, key: str) -> str:
        if not _KEY.fullmatch(key) or key.endswith("-bin"):
            raise ValueError("expected lower-case letters, digits or _.- without -bin at the end, which means bytes")
        return key

    @field_validator("service_weights", "tenant_weights")
    @classmethod
    def _weights_readable(cls, entries: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for name in _weights(entries):
            if info.field_name == "service_weights" and name not in list(Service):
                raise ValueError(f"{name!r} is not one of {', '.join(Service)}")
        return entries

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: `load_config` reads the sources itself, to say where a wrong value came from."""
        return (init_settings,)

    def tokens(self) -> tuple[str, ...]:
        """All bearer tokens. Raises ConfigurationError if their file cannot be read or no caller could send one."""
        tokens = [token.get_secret_value() for token in self.auth_tokens]
        _check_tokens("auth_tokens", tokens)
        if self.auth_tokens_file is not None:
            # Each byte a character, for the check: a file in another encoding is no reason for a traceback.
            text = read_file("auth_tokens_file", self.auth_tokens_file).decode("latin-1")
            listed = [line.strip() for line in text.splitlines() if line.strip()]
            if not listed:
                raise ConfigurationError(f"auth_tokens_file: {self.auth_tokens_file} holds no token")
            _check_tokens(f"auth_tokens_file: {self.auth_tokens_file}", listed)
            tokens += listed
        return tuple(tokens)

    def engine_spec(self, base_folder: Path) -> EngineSpec:
        """What the engine process is started with."""
        takes_free_memory = self.backend == "triton" and "kv_cache_mib" not in self.model_fields_set
        tries = [match for trie in self.synthetic_tries if (match := _TRIE.fullmatch(trie))]
        return EngineSpec(
            base_folder=str(base_folder),
            bundle_folder=None if self.bundle is None else str(self.bundle),
            adapter_folder=None if self.adapter is None else str(self.adapter),
            adapter_mode=self.adapter_mode,
            backend=self.backend,
            dtype=self.dtype,
            threads=self.threads,
            weight_format=self.weight_format,
            kv_format=self.kv_format,
            graph_seconds=self.graph_seconds,
            kv_cache_bytes=0 if takes_free_memory else self.kv_cache_mib * 2**20,
            page_size=self.page_size,
            max_context_tokens=self.max_context_tokens,
            max_step_tokens=self.max_step_tokens,
            max_mixed_prompt_tokens=self.max_mixed_prompt_tokens,
            max_draft_tokens=self.max_draft_tokens,
            max_running_requests=self.max_running_requests,
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            policy=self._policy(),
            log_format=self.log_format,
            log_level=self.log_level,
            synthetic_tries=tuple(
                SyntheticTrie(match["name"], int(match["items"]), tuple(map(int, match["sizes"].split("x"))))
                for match in tries
            ),
        )

    def _policy(self) -> SchedulingPolicy:
        return SchedulingPolicy(
            order=self.scheduling_policy,
            target_seconds={
                Service.RECOMMENDATION: self.recommendation_target_seconds,
                Service.PREDICTION: self.prediction_target_seconds,
                Service.CHAT: self.chat_first_target_seconds,
            },
            token_target_seconds=self.chat_token_target_seconds,
            enforced=tuple(Service(name) for name in self.enforced_targets),
            service_weights={Service(name): weight for name, weight in _weights(self.service_weights).items()},
            tenant_weights=_weights(self.tenant_weights),
        )

    @property
    def is_public(self) -> bool:
        """Whether gRPC listens beyond this machine."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    def to_toml(self) -> str:
        """Write all settings as a file, each with its description, secrets as asterisks: what `--print-config`
        shows."""
        lines = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            written = "unset" if value is None else _toml_value(value)
            lines.append(f"# {field.description}\n{'# ' if value is None else ''}{name} = {written}\n")
        return "\n".join(lines)


def _check_tokens(where: str, tokens: Sequence[str]) -> None:
    """Raises ConfigurationError for a token that metadata cannot carry. It says which one, and not what it is."""
    for number, token in enumerate(tokens, start=1):
        if not _TOKEN.fullmatch(token):
            raise ConfigurationError(f"{where}: token {number} is empty or has other characters than printable ASCII")


def read_file(setting: str, path: Path) -> bytes:
    """A file that a setting names. Raises ConfigurationError naming both."""
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{setting}: {path} cannot be read: {error.strerror or error}") from error


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(each) for each in value)}]"
    return json.dumps(str(value))
