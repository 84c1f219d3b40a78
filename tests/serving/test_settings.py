"""Who is let in to the server, and which settings it refuses to start with."""

from __future__ import annotations

import inspect
import logging
import socket

import pytest
from serving_stand import UPGRADE, ask, raw_socket, running
from websockets.exceptions import InvalidStatus

from dit4dit.cli import main
from dit4dit.commands import serving as commands
from dit4dit.errors import ConfigError
from dit4dit.serving.settings import Settings, find_key

KEY = "a-key-of-more-than-16-letters"


def test_a_key_is_asked_for() -> None:
    with running(api_key=KEY) as server:
        for headers in (None, {"Authorization": "Api-Key wrong"}, {"Authorization": f"Bearer {KEY}"},
                        {"Authorization": f"Api-Key {KEY}x"}, {"Authorization": "Api-Key \u00e9"}):  # fmt: skip
            with pytest.raises(InvalidStatus) as refused:
                server.raw(additional_headers=headers, legacy=True)
            assert refused.value.response.status_code == 401
        with raw_socket(server, UPGRADE + b"Authorization: Api-Key \xff\xfe\r\n\r\n") as odd:
            assert not odd.recv(100).startswith(b"HTTP/1.1 101")
        with server.raw(additional_headers={"Authorization": f"Api-Key {KEY}"}) as connection:
            connection.recv()
            assert ask(connection, {"value": 1})["ok"]
        assert server.health()[0] == 200  # it tells nothing
        assert KEY not in repr(server.server.settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_others_are_not_served_without_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="there is no key"):
        Settings(host=host)
    assert Settings(host=host, api_key=KEY).host == host
    assert Settings(host=host, insecure=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert Settings(host=host).api_key is None


def test_keys_come_from_a_file_or_the_environment(tmp_path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    assert find_key(file, {}) == KEY
    assert find_key(None, {"DIT4DIT_API_KEY": KEY}) == KEY
    assert find_key(None, {"DIT4DIT_API_KEY": f" {KEY}\n"}) == KEY
    assert find_key(None, {}) is None
    for bad in ("short", "with a space in between", "ümlaut-ümlaut-ümlaut", ""):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="at least 16") as error:
            find_key(file, {})
        assert len(bad) < 2 or bad not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_key(tmp_path / "none", {})


def test_a_key_that_others_can_read_is_warned_of(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    for mode, warned in ((0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o620, True)):
        file.chmod(mode)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dit4dit.serving"):
            assert find_key(file, {}) == KEY
        assert (f"mode {mode:03o}" in caplog.text) == warned == ("chmod 600" in caplog.text), mode
        assert KEY not in caplog.text


def test_the_defaults_serve_64_clients_and_the_command_has_the_same() -> None:
    settings = Settings()
    assert (settings.max_clients, settings.max_queued, settings.ping_timeout_s) == (64, 128, 300)
    options = {name: option.default for name, option in inspect.signature(commands.serve).parameters.items()}
    assert options["max_frame_mib"] * 2**20 == settings.max_frame_bytes
    renamed = {"idle_timeout": "idle_timeout_s", "ping_timeout": "ping_timeout_s"}
    same = {renamed.get(name, name) for name in options} & {*Settings.__dataclass_fields__}
    assert same == {*Settings.__dataclass_fields__} - {"api_key", "max_frame_bytes"}
    for option, default in options.items():
        if renamed.get(option, option) in same:
            assert default == getattr(settings, renamed.get(option, option)), option


@pytest.mark.parametrize(
    "options",
    [{"port": 70000}, {"max_batch": 17}, {"max_batch": 0}, {"max_clients": 0}, {"idle_timeout_s": 0}, {"seed": -1},
     {"batch_window_ms": -1}, {"max_frame_bytes": 0}, {"host": "no.such.host.invalid"}, {"api_key": "short"},
     {"max_queued": 0}, {"ping_timeout_s": 0}, {"ping_timeout_s": 1e6}],
)  # fmt: skip
def test_bad_settings(options) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"^{name}( 'no.such.host.invalid')?: "):
        Settings(**options)


@pytest.mark.parametrize(
    "option, value, wanted",
    [("ping-timeout", "0", "1 to 36000 seconds"), ("idle-timeout", "0", "seconds"), ("max-frame-mib", "0", "1 to 2048"),
     ("max-batch", "17", "1 to 16"), ("port", "70000", "0 to 65535"), ("max-clients", "0", "1 to"), ("seed", "-1", "an integer")],
)  # fmt: skip
def test_the_command_names_the_option(option: str, value: str, wanted: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", "--checkpoint", str(tmp_path), f"--{option}", value])
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    assert f"error: --{option}: expected {wanted}" in said


def test_a_taken_port_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen there"):
        Settings(port=taken.getsockname()[1]).listen()
