"""`dit4dit serve` with a real (tiny) policy: the same actions as `Policy` gives directly, and the command's own life."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hostile import HOSTILE_MESSAGES
from serving_stand import ask, running
from waiting import WAIT, eventually

from dit4dit import Noise, Policy, cli
from dit4dit.errors import InputError
from dit4dit.serving import backend as module
from dit4dit.serving import wire
from dit4dit.serving.backend import PolicyBackend
from dit4dit.serving.client import Client, ConnectionLost, ServerError


@pytest.fixture(scope="module")
def served(libero_policy: Policy):
    with running(PolicyBackend(libero_policy, "libero_tiny", "abc")) as server:
        yield server


EXAMPLE = {"image": [np.full((32, 64, 3), 7, np.uint8)], "lang": "go", "state": np.full((1, 16), 0.25, np.float32)}


def test_raw_observations_give_the_policy_s_own_actions(served, libero_policy: Policy, make_observation) -> None:
    with Client(port=served.port) as client:
        assert client.reset(7) == 7
        for chunk in range(3):
            observation = make_observation(chunk, side=48)
            got = client.infer(observation, "open the drawer")
            want = libero_policy.infer(observation, "open the drawer", noise=Noise.from_seed(7, chunk))
            assert np.array_equal(got.actions, want.actions)
            assert np.array_equal(got.normalized, want.normalized)
            assert (got.names, got.control_hz, got.seed, got.chunk) == (want.names, want.control_hz, 7, chunk)
            assert (got.actions.dtype, got.actions.shape) == (np.float32, (8, 7))


def test_published_examples_give_the_published_result_and_actions(served, libero_policy: Policy) -> None:
    with Client(port=served.port) as client:
        client.reset(3)
        got = client.predict_action([EXAMPLE, {**EXAMPLE, "lang": "stop"}])
        noise = [Noise.from_seed(3, 0), Noise.from_seed(3, 1)]
        want = libero_policy.predict_action([EXAMPLE, {**EXAMPLE, "lang": "stop"}], noise=noise)["normalized_actions"]
        assert np.array_equal(got["normalized_actions"], want)
        assert (got["actions"].dtype, got["actions"].shape) == (np.float32, (2, 8, 7))
        assert np.array_equal(got["actions"], libero_policy.codec.action.inverse(want))
        assert client.predict_action(EXAMPLE)["actions"].shape == (1, 8, 7)  # chunk 2 of the session
    with served.raw() as connection:
        connection.recv()
        ask(connection, {"type": "reset", "seed": 3, "chunk": 1})
        answer = ask(connection, {"examples": [{**EXAMPLE, "lang": "stop"}], "do_sample": False, "use_ddim": True})
        assert np.abs(answer["data"]["normalized_actions"][0] - want[1]).max() < 1e-5  # alone: equal to rounding


def test_two_clients_in_one_pass(served, libero_policy: Policy, make_observation) -> None:
    eventually(lambda: not served.server._clients)  # those of the tests before
    with (
        Client(port=served.port) as a,
        Client(port=served.port) as b,
        ThreadPoolExecutor(2) as pool,
        served.waiting_for_all(),
    ):
        a.reset(1), b.reset(2)
        before = served.server.statistics.batches[2]
        jobs = [pool.submit(c.infer, make_observation(i, side=48), "go") for i, c in enumerate((a, b))]
        chunks = [job.result(WAIT) for job in jobs]
        assert served.server.statistics.batches[2] == before + 2
        for i, chunk in enumerate(chunks):
            want = libero_policy.infer(make_observation(i, side=48), "go", noise=Noise.from_seed(i + 1, 0))
            assert np.abs(chunk.normalized - want.normalized).max() / np.abs(want.normalized).max() < 1e-5
        jobs = [pool.submit(c.predict_action, EXAMPLE) for c in (a, b)]
        assert [job.result(WAIT)["actions"].shape for job in jobs] == [(1, 8, 7)] * 2
        assert served.server.statistics.batches[2] == before + 4


def test_metadata_is_all_that_a_robot_needs(served, libero_policy: Policy) -> None:
    with Client(port=served.port) as client:
        found = client.metadata
    assert [view["name"] for view in found["views"]] == ["primary_image", "wrist_image"]
    assert {(view["height"], view["width"]) for view in found["views"]} == {(32, 32)}
    assert [key["name"] for key in found["state_keys"]] == [key.name for key in libero_policy.embodiment.state]
    assert found["action_names"] == list(libero_policy.embodiment.action_names)
    expected = {"embodiment": "libero", "statistics": "franka", "action_horizon": 8, "control_hz": 20.0, "chunk_seconds": 0.4,
                "steps": 4, "checkpoint": "libero_tiny", "checkpoint_hash": "abc", "joined_picture": [32, 64],
                "encoded_state_dim": 16, "model_action_dim": 8, "protocol": 1}  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_what_does_not_fit_the_policy(served, make_observation, monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_observation(0, side=48)
    picture = good.images["wrist_image"]
    bad = [
        ({"observation": 5, "instruction": "go"}, "expected a map with images and state"),
        ({"observation": {"picture": {}}, "instruction": "go"}, "unknown key"),
        ({"observation": {"images": {"wrist_image": picture}}, "instruction": "go"}, "'primary_image': missing"),
        ({"observation": {"images": None}, "instruction": "go"}, "images: expected a mapping"),
        ({"observation": {"images": good.images, "state": {}}, "instruction": "go"}, "state 'x': missing"),
        ({"observation": {"images": good.images, "state": {**good.state, "x": [np.nan]}}, "instruction": "go"}, "NaN"),
        ({"observation": {"images": good.images, "state": good.state}}, "expected words"),
        ({"observation": {"images": good.images, "state": good.state}, "instruction": "x" * 5000}, "at most 4096"),
        ({"observation": {}, "examples": []}, "send one of them"),
        ({}, "examples: expected a dict or a list"),
        ({"examples": [EXAMPLE] * 65}, "at most 64"),
        ({"examples": [EXAMPLE, 5]}, r"examples[1]"),
        ({"examples": [{**EXAMPLE, "lang": ""}]}, "expected words"),
        ({"examples": [EXAMPLE, {**EXAMPLE, "lang": "x" * 5000}]}, "lang: expected at most 4096 letters, got 5000"),
        ({"examples": [{**EXAMPLE, "image": np.zeros((32, 64, 3), np.float32)}]}, "expected uint8"),
        ({"examples": [{**EXAMPLE, "image": np.zeros((1024, 1024, 3), np.uint8)}]}, "too large for a joined picture"),
        ({"examples": [{**EXAMPLE, "state": np.zeros((1, 3))}]}, "expected shape [1, 16]"),
        ({"examples": [{**EXAMPLE, "state": np.array(["a"])}]}, "expected 16 numbers"),
    ]
    with served.raw() as connection:
        connection.recv()
        for message, reason in bad:
            answer = ask(connection, message)
            assert (answer["ok"], answer["type"]) == (False, "inference_result"), message
            assert reason in answer["error"]["message"]
        surrogates = wire.pack({"examples": [EXAMPLE]}).replace(b"\xa2go", b"\xa2\xed\xa0")
        assert ask(connection, surrogates)["ok"] is False
        assert ask(connection, {"examples": [EXAMPLE]})["ok"]


@pytest.mark.parametrize("name", HOSTILE_MESSAGES)
def test_a_hostile_message_is_the_peer_s_mistake(name: str, served, caplog: pytest.LogCaptureFixture) -> None:
    with served.raw() as connection:
        connection.recv()
        answer = ask(connection, HOSTILE_MESSAGES[name])
        assert (answer["status"], answer["ok"]) == ("error", False)
        assert "internal error" not in answer["error"]["message"]
        assert ask(connection, {"type": "ping"})["ok"]
    assert not [record for record in caplog.records if record.exc_info], "a traceback for what a stranger sent"


@pytest.mark.parametrize("height, width", [(2160, 3840), (3840, 2160), (1, 3840), (48, 48)])
def test_raw_images_up_to_4k_are_taken(height: int, width: int, libero_policy: Policy, make_observation) -> None:
    good = make_observation(0, side=48)
    image = np.zeros((height, width, 3), np.uint8)
    images = {**good.images, "wrist_image": image}
    backend = PolicyBackend(libero_policy, "libero_tiny", "abc")
    [request] = backend.check({"observation": {"images": images, "state": good.state}, "instruction": "go"})
    assert request.pictures[1] is image
    for longer in (np.zeros((height + 1, width, 3), np.uint8), np.zeros((height, width + 1, 3), np.uint8)):
        message = {
            "observation": {"images": {**images, "wrist_image": longer}, "state": good.state},
            "instruction": "go",
        }
        if max(longer.shape) > 3840 or min(longer.shape[:2]) > 2160:
            with pytest.raises(
                InputError, match=r"'wrist_image': expected at most 3840 x 2160 pixels, either way round"
            ):
                backend.check(message)
        else:
            backend.check(message)


def test_the_policy_never_looks_at_more_letters_than_a_stranger_may_send(make_observation) -> None:
    """It would look for the nearest of the instructions that it knows."""
    policy = SimpleNamespace(
        **{name: lambda *_: pytest.fail("reached") for name in ("request", "published_requests", "run")}
    )
    backend = PolicyBackend.__new__(PolicyBackend)
    backend.policy = policy
    good = make_observation(0, side=48)
    raw = {"observation": {"images": good.images, "state": good.state}, "instruction": "x" * 5000}
    for message in (raw, {"examples": [EXAMPLE, {**EXAMPLE, "lang": "x" * 5000}]}):
        with pytest.raises(InputError, match="at most 4096 letters, got 5000"):
            backend.check(message)


def test_a_bad_request_in_a_pass_fails_alone(served, libero_policy: Policy, monkeypatch) -> None:
    """Found only when the pass has begun: an instruction without its pack."""

    def get(instruction: str):
        if instruction == "bad":
            raise InputError("no pack of it")
        return have(instruction)

    have = libero_policy._texts.get
    monkeypatch.setattr(libero_policy._texts, "get", get)
    backend = served.backend
    good, bad = backend.check({"examples": [EXAMPLE]}), backend.check({"examples": [{**EXAMPLE, "lang": "bad"}]})
    assert good[0].kind == bad[0].kind
    with pytest.raises(InputError, match="no pack of it"):
        backend.run([*good, *bad])
    assert backend.run(good)[0].actions.shape == (8, 7)
    with pytest.raises(InputError, match="not valid Unicode"):  # this one does not come so far
        backend.check({"examples": [{**EXAMPLE, "lang": "\ud800"}]})
    assert module.MAX_EXAMPLES == 64


@pytest.mark.slow
def test_the_command_serves_stops_on_sigterm_and_reports(small_libero: Path, tmp_path: Path, make_observation) -> None:
    words = tmp_path / "words.txt"
    words.write_text("go\n")
    report = tmp_path / "report.json"
    command = [str(Path(sys.executable).with_name("dit4dit")), "serve", "--checkpoint", str(small_libero), "--port", "0",
               "--device", "cpu", "--instructions", str(words), "--warm-up", "--max-batch", "2",
               "--picture", "primary_image=48x48", "--picture", "wrist_image=48x48", "--json", str(report)]  # fmt: skip
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("serving libero at ws://127.0.0.1:"), server.stderr.read()
            with Client(line.split()[-1]) as client:
                assert len(client.metadata["checkpoint_hash"]) == 32
                assert client.infer(make_observation(0, side=48), "go").actions.shape == (8, 7)
                server.send_signal(signal.SIGTERM)
                assert server.wait(4 * WAIT) == 0
                with pytest.raises(ConnectionLost, match="1001"):
                    client.ping()
        finally:
            server.kill()
        assert "1 requests" in server.stderr.read()
    found = json.loads(report.read_text())
    assert (found["requests"], found["total_ms"]["samples"]) == (1, 1)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--host", "0.0.0.0"], "there is no key"),
        (["--max-batch", "17"], "--max-batch: expected 1 to 16"),
        (["--picture", "wrist_image=48x48"], "give both"),
        (["--warm-up", "--picture", "wrist_image"], "expected VIEW=HEIGHTxWIDTH"),
        (["--instructions", "none.txt"], "no such file"),
        (["--api-key-file", "none.txt"], "the key cannot be read"),
        pytest.param(["--api-key", "on-the-command-line"], "--api-key", id="words6-"),
    ],
)
def test_mistakes_are_said_before_the_checkpoint_is_read(words, reason: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        cli.main(["serve", "--checkpoint", "nowhere", *words])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "no such file or folder" not in error, "that is what is said of the checkpoint"


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(SystemExit) as done:
        cli.main(["serve", "--checkpoint", "nowhere"])
    assert done.value.code == 2
    assert "dit4dit[serve]" in capsys.readouterr().err


def test_the_server_s_words_reach_the_robot(served) -> None:
    with Client(port=served.port) as client, pytest.raises(ServerError, match="did you mean 'wrist_image'"):
        client.infer({"images": {"wrist": np.zeros((8, 8, 3), np.uint8)}, "state": {}}, "go")
