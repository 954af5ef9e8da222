"""Settings: where they come from, which wins, and what a wrong one says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from shoplm.config import ServerConfig
from shoplm.config_sources import load_config
from shoplm.engine.spec import SyntheticTrie
from shoplm.errors import ConfigurationError


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "shoplm.toml"
    file.write_text("max_events = 1\nmax_count = 2\nmax_targets = 3\n")
    environment = {"SHOPLM_MAX_COUNT": "20", "SHOPLM_MAX_TARGETS": "30"}
    config = load_config(["--config", str(file), "--max-targets", "40"], environment)
    assert (config.max_events, config.max_count, config.max_targets) == (1, 20, 40)


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "shoplm.toml"
    file.write_text('log_format = "json"\n')
    assert load_config([], {"SHOPLM_CONFIG": str(file)}).log_format == "json"


def test_defaults_listen_on_loopback_only() -> None:
    config = load_config([], {})
    assert (config.host, config.port, config.metrics_host, config.metrics_port) == (
        "127.0.0.1",
        50051,
        "127.0.0.1",
        9464,
    )
    assert not config.is_public
    assert load_config(["--host", "0.0.0.0"], {}).is_public


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--max-evnts", "3"], {}, "--max-evnts: no such flag; did you mean --max-events?"),
        ([], {"SHOPLM_MAX_EVNTS": "3"}, "SHOPLM_MAX_EVNTS: no such setting; did you mean SHOPLM_MAX_EVENTS?"),
        (["--port", "abc"], {}, "--port is 'abc': Input should be a valid integer"),
        ([], {"SHOPLM_MAX_EVENTS": "-3"}, "SHOPLM_MAX_EVENTS is '-3': Input should be greater than or equal to 1"),
        (["--dtype", "int3"], {}, "--dtype is 'int3': Input should be 'bfloat16' or 'float32'"),
        (["--default-beam-width", "500"], {}, "default_beam_width 500 is over max_beam_width 128"),
        (["--max-step-tokens", "16"], {}, "default_beam_width 32 is over max_step_tokens 16 less 32"),
        (["--max-step-tokens", "63"], {}, "default_beam_width 32 is over max_step_tokens 63 less 32"),
        (["--tls-key", "k.pem"], {}, "tls_certificate and tls_key come together"),
        (["--engine-hang-seconds", "0.2"], {}, "engine_hang_seconds 0.2 is below 1"),
        (["--max-message-bytes", "536870912"], {}, "--max-message-bytes is '536870912': Input should be less than or"),
        (
            ["--keepalive-seconds", "inf"],
            {},
            "--keepalive-seconds is 'inf': Input should be less than or equal to 2000000",
        ),
        (
            ["--max-connection-age-seconds", "3e6"],
            {},
            "--max-connection-age-seconds is '3e6': Input should be less than",
        ),
        (["--max-concurrent-streams", "3000000000"], {}, "--max-concurrent-streams is '3000000000': Input should be"),
        ([], {"SHOPLM_AUTH_TOKENS": " ,"}, "is empty: name a token, or leave the setting out for no authentication"),
        (["--port"], {}, "expected one argument"),
        (["stray"], {}, "unrecognized arguments: stray"),
        (["--synthetic-tries", "bench=9:2x4"], {}, "levels of 2x4 codes hold fewer than 9 items"),
        (["--synthetic-tries", "bench"], {}, "is not of the form NAME=ITEMS:SIZExSIZE"),
    ],
)
def test_a_wrong_setting_names_its_origin_and_value(
    flags: list[str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load_config(flags, environment)
    assert message in str(raised.value)


def test_an_unknown_key_of_the_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "shoplm.toml"
    file.write_text("drain_second = 3\n")
    with pytest.raises(ConfigurationError) as raised:
        load_config(["--config", str(file)], {})
    assert str(raised.value) == f"{file}: drain_second: no such setting; did you mean drain_seconds?"


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no-file\.toml cannot be read: No such file"):
        load_config(["--config", str(tmp_path / "no-file.toml")], {})
    broken = tmp_path / "broken.toml"
    broken.write_text("port = \n")
    with pytest.raises(ConfigurationError, match=r"broken\.toml"):
        load_config(["--config", str(broken)], {})


def test_variables_that_kubernetes_sets_for_a_service_called_shoplm_are_not_ours() -> None:
    links = {
        "SHOPLM_SERVICE_HOST": "10.0.0.1",
        "SHOPLM_SERVICE_PORT": "50051",
        "SHOPLM_SERVICE_PORT_GRPC": "50051",
        "SHOPLM_PORT": "tcp://10.0.0.1:50051",
        "SHOPLM_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "SHOPLM_PORT_50051_TCP_ADDR": "10.0.0.1",
        "SHOPLM_METRICS_PORT": "tcp://10.0.0.2:9464",
    }
    assert load_config([], links) == load_config([], {})


def test_what_other_parts_read_from_the_environment_is_left_alone() -> None:
    others = ("CACHE", "ADDRESS", "TOKEN", "TENANT", "CA_FILE", "CERT_FILE", "KEY_FILE")
    assert load_config([], {f"SHOPLM_{name}": "x" for name in others}) == load_config([], {})


def test_lists_are_separated_by_commas_or_json() -> None:
    for written in ("one,two", '["one", "two"]'):
        config = load_config([], {"SHOPLM_AUTH_TOKENS": written})
        assert config.tokens() == ("one", "two")
    assert load_config(["--auth-tokens", "one,two"], {}).tokens() == ("one", "two")


def test_tokens_of_a_file_are_added(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("two\n\nthree\n")
    assert load_config(["--auth-tokens", "one", "--auth-tokens-file", str(file)], {}).tokens() == (
        "one",
        "two",
        "three",
    )
    file.write_text("\n")
    with pytest.raises(ConfigurationError, match="holds no token"):
        load_config(["--auth-tokens-file", str(file)], {}).tokens()
    with pytest.raises(ConfigurationError, match=r"auth_tokens_file: .* cannot be read"):
        load_config(["--auth-tokens-file", str(tmp_path / "none")], {}).tokens()


@pytest.mark.parametrize("token", ["zwölf", "two words", "\x1b[31m"])
def test_a_token_that_no_caller_could_send_is_refused_without_being_shown(tmp_path: Path, token: str) -> None:
    file = tmp_path / "tokens"
    for encoding in ("utf-8", "latin-1"):
        file.write_bytes(f"fine\n\n{token}\n".encode(encoding))
        with pytest.raises(ConfigurationError, match=r"auth_tokens_file: .*: token 2 .* printable ASCII") as refused:
            load_config(["--auth-tokens-file", str(file)], {}).tokens()
        assert token not in str(refused.value)
    with pytest.raises(ConfigurationError, match=r"auth_tokens: token 1 .* printable ASCII"):
        load_config([], {"SHOPLM_AUTH_TOKENS": token}).tokens()


def test_the_printed_settings_are_a_file_that_gives_the_same_settings(tmp_path: Path) -> None:
    config = load_config(
        ["--bundle", "a b", "--max-events", "7", "--synthetic-tries", "x=8:2x4,y=3:3", "--engine-api"], {}
    )
    file = tmp_path / "printed.toml"
    file.write_text(config.to_toml())
    assert load_config(["--config", str(file)], {}) == config
    # Every setting is there, with what it means: those that are unset as comments.
    printed = config.to_toml()
    for name, field in ServerConfig.model_fields.items():
        assert f"{name} = " in printed
        assert field.description and f"# {field.description}" in printed


def test_secrets_are_not_shown() -> None:
    config = load_config(["--auth-tokens", "hunter2"], {})
    assert "hunter2" not in config.to_toml()
    assert "hunter2" not in repr(config)
    assert tomllib.loads(config.to_toml())["auth_tokens"] == ["**********"]
    with pytest.raises(ConfigurationError) as raised:
        load_config([], {"SHOPLM_AUTH_TOKENS": '["hunter2"'})
    assert "hunter2" not in str(raised.value)


def test_the_engine_gets_what_is_set() -> None:
    flags = ["--bundle", "shop", "--kv-cache-mib", "3", "--threads", "2", "--synthetic-tries", "bench=8:2x4"]
    spec = load_config([*flags, "--max-queued-tokens", "77"], {}).engine_spec(Path("base"))
    assert (spec.base_folder, spec.bundle_folder, spec.kv_cache_bytes, spec.threads) == ("base", "shop", 3 * 2**20, 2)
    assert spec.synthetic_tries == (SyntheticTrie("bench", 8, (2, 4)),)
    assert spec.max_queued_tokens == 77
    assert load_config([], {}).engine_spec(Path("base")).bundle_folder is None
