"""One simulator in a process of its own, driven over a local socket. One self-contained file: NumPy and Python 3.8 are enough.

    ENV_PYTHON sim_worker.py --socket FOLDER/worker

It runs in the simulator's own environment, connects to the Unix domain socket at which the evaluator listens (in a folder that
only its user can enter) and then answers one request after another until the evaluator hangs up: a thread watches for that, so
that no worker outlives its evaluator, not even in the middle of a step.

An environment is any object with

    facts            dict: max_steps (an episode without success ends there), control_hz (steps per second), action_names,
                     settle_steps (taken by `reset` before the first observation; 0 where there are none)
    reset(seed, trial) -> (observation, instruction): the simulator's own observation dictionary, and what to do, in words.
                     seed fixes everything random; trial chooses among fixed starts where there are such.
    step(command) -> (observation, success, done, info): command is what the embodiment's `command` makes of a row of actions;
                     success is of this very step; done says that the environment takes no further step; info is a dict of
                     numbers, strings and arrays
    render() -> uint8 [H, W, 3], RGB, upright: the picture for the video
    close()
    blind_step(command) -> as `step`; need not exist. It may leave the cameras as they were, and is called where nobody looks:
                     for all but the last of several commands, unless pictures are wanted

and is made by `ENVIRONMENTS[name](**options)`, or by any other function as "module:function".

The wire: 4 bytes of length (big endian), a JSON header of that length, then the raw bytes of the arrays that the header lists.
An answer is {"ok": result} or {"error": {type, message, traceback}}; after an error the connection is as good as before.
Two pictures of 256 x 256 cross in 0.3 ms (measured on an AMD EPYC), so there is no shared memory.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # this file's folder, whose modules would be found before the standard library's
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]

import argparse
import importlib
import json
import platform
import select
import signal
import socket
import struct
import threading
import traceback
from importlib import metadata
from typing import Any, ClassVar

import numpy as np

PROTOCOL = 1
MAX_HEADER = 64 << 20
MAX_ARRAYS = 1 << 30


class Tabletop:
    """The world that ships with dit4dit; seed is the layout's, trial means nothing here."""

    def __init__(self, picture: int = 64, max_steps: int = 60, paraphrase: int | None = 0) -> None:
        from dit4dit.envs import tabletop

        self._env = tabletop.TabletopEnv(0, picture=picture, max_steps=max_steps, paraphrase=paraphrase)
        self.facts = {
            "max_steps": max_steps,
            "control_hz": tabletop.HZ,
            "action_names": ["x", "y", "grip"],
            "settle_steps": 0,
        }

    def reset(self, seed: int, trial: int) -> Any:
        frame = self._env.reset(seed)
        return frame.observation, frame.instruction

    def step(self, command: Any) -> Any:
        result = self._env.step(command)
        return result.observation, result.success, result.success or result.truncated, {}

    def render(self) -> Any:
        return self._env.observation()["image"]

    def close(self) -> None:
        pass


class Libero:
    """LIBERO (hf-libero) as the published evaluation runs it: two cameras of 256 x 256, initial state number `trial`, 10 steps in
    which the objects come to rest. seed places what no initial state covers: cabinet and stove, within a centimetre or two.
    """

    MAX_STEPS: ClassVar = {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    }
    ACTIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
    STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # the published waiting action; -1 opens the gripper

    def __init__(
        self, suite: str, task: int, max_steps: int | None = None, settle_steps: int = 10, camera: int = 256
    ) -> None:
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        if suite not in self.MAX_STEPS:
            raise ValueError(f"suite {suite!r}: expected one of {', '.join(self.MAX_STEPS)}")
        tasks = benchmark.get_benchmark_dict()[suite]()
        if not 0 <= task < tasks.n_tasks:
            raise ValueError(f"task {task!r}: {suite} has tasks 0 to {tasks.n_tasks - 1}")
        found = tasks.get_task(task)
        file = os.path.join(get_libero_path("bddl_files"), found.problem_folder, found.bddl_file)
        self._language = found.language
        self._starts = tasks.get_task_init_states(task)
        self._env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=camera, camera_widths=camera)
        self._initializers = len(self._env.env.object_property_initializers)
        self._cameras: list[Camera] = []
        self._observation: Any = None
        self._settle = settle_steps
        self.facts = {
            "max_steps": max_steps or self.MAX_STEPS[suite],
            "control_hz": float(self._env.env.control_freq),
            "action_names": list(self.ACTIONS),
            "settle_steps": settle_steps,
        }

    def reset(self, seed: int, trial: int) -> Any:
        if not 0 <= trial < len(self._starts):
            raise ValueError(f"trial {trial!r}: this task has initial states 0 to {len(self._starts) - 1}")
        # LIBERO adds to this list at every reset and draws a number for each entry: a later episode of this process would
        # differ from the same episode in a new one.
        del self._env.env.object_property_initializers[self._initializers :]
        self._env.seed(seed)
        self._env.reset()
        self._cameras = [Camera(self._env.env, name) for name in self.CAMERAS]
        self._observation = self._env.set_init_state(self._starts[trial])
        for i in range(self._settle):
            (self.step if i + 1 == self._settle else self.blind_step)(self.STILL)
        return self._observation, self._language

    def step(self, command: Any) -> Any:
        self._observation, _, done, _ = self._env.step([float(number) for number in command])
        return self._observation, bool(done), bool(done), {}

    def blind_step(self, command: Any) -> Any:
        for camera in self._cameras:
            camera.on = False
        try:
            return self.step(command)
        finally:
            for camera in self._cameras:
                camera.on = True

    def render(self) -> Any:
        return np.concatenate([self._observation[name][::-1, ::-1] for name in self.CAMERAS], axis=1)

    def close(self) -> None:
        self._env.close()


class Camera:
    """A robosuite camera that gives its last picture again while it is not `on`. The clocks of robosuite's observables, which
    decide at which instant of a control step a picture is taken, go on as if it were.
    """

    def __init__(self, env: Any, name: str) -> None:
        self.on = True
        self._sensor = env._observables[name]._sensor
        self._last: Any = None
        self.__modality__ = self._sensor.__modality__
        self.__name__ = name
        env.modify_observable(observable_name=name, attribute="sensor", modifier=self)

    def __call__(self, cache: Any) -> Any:
        if self.on or self._last is None:
            self._last = self._sensor(cache)
        return self._last


class Gr1:
    """A RoboCasa-GR1 tabletop environment through gymnasium. environment: its id, as "module:id" where a module has to be
    imported that registers it. It never ends by itself, not even on success.
    """

    VIEW = "video.ego_view_bg_crop_pad_res256_freq20"
    INSTRUCTION = "annotation.human.coarse_action"
    PARTS = (("left_arm", 7), ("right_arm", 7), ("left_hand", 6), ("right_hand", 6), ("waist", 3))

    def __init__(self, environment: str, max_steps: int = 720) -> None:
        import gymnasium

        # the checker holds observations to spaces that the real environment does not keep to
        self._env = gymnasium.make(environment, enable_render=True, disable_env_checker=True)
        self._picture: Any = None
        self.facts = {
            "max_steps": max_steps,
            "control_hz": float(getattr(self._simulator, "control_freq", 20.0)),
            "action_names": [f"{part}.{i}" for part, size in self.PARTS for i in range(size)],
            "settle_steps": 0,
        }

    @property
    def _simulator(self) -> Any:
        """The robosuite environment inside."""
        return getattr(self._env.unwrapped, "env", None)

    def reset(self, seed: int, trial: int) -> Any:
        import random

        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (what placement samplers draw from)
        if hasattr(self._simulator, "rng"):
            # what robosuite 1.5 draws from; its samplers keep the very generator, and reset's seed does not reach it
            self._simulator.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        observation, _ = self._env.reset(seed=seed)
        self._picture = observation[self.VIEW]
        return dict(observation), observation[self.INSTRUCTION]

    def step(self, command: Any) -> Any:
        observation, _, terminated, truncated, info = self._env.step(dict(command))
        self._picture = observation[self.VIEW]
        told = {name: bool(info[name]) for name in ("success", "grasp_distractor_obj") if name in info}
        return dict(observation), bool(info["success"]), bool(terminated or truncated), told

    def render(self) -> Any:
        return self._picture

    def close(self) -> None:
        self._env.close()


ENVIRONMENTS: Any = {"tabletop": Tabletop, "libero": Libero, "gr1": Gr1}


def make(name: str, options: dict[str, Any]) -> Any:
    """The environment of this name, or what "module:function" returns for the options."""
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name](**options)
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"environment {name!r}: expected one of {', '.join(sorted(ENVIRONMENTS))}, or module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's simulator may lie beside the shell that started the evaluation
    return getattr(importlib.import_module(module), function)(**options)


class Host:
    """The one environment of this process, and what can be asked of it."""

    def __init__(self) -> None:
        self._env: Any = None

    def answer(self, request: dict[str, Any]) -> Any:
        """request {"do": name, ...} -> result."""
        name = request.pop("do")
        if name not in ("make", "reset", "step", "render", "close"):
            raise ValueError(f"request {name!r}: unknown")
        if self._env is None and name not in ("make", "close"):
            raise RuntimeError(f"{name}: there is no environment; ask for make first")
        return getattr(self, name)(**request)

    def make(self, environment: str, options: dict[str, Any]) -> dict[str, Any]:
        """Close what there is, then make another. -> its facts, and versions."""
        self.close()
        self._env = make(environment, options)
        return {"facts": dict(self._env.facts), "versions": versions()}

    def reset(self, seed: int, trial: int, pictures: bool) -> dict[str, Any]:
        observation, instruction = self._env.reset(seed=seed, trial=trial)
        result = {"observation": observation, "instruction": instruction}
        if pictures:
            result["picture"] = self.render()
        return result

    def step(self, commands: list[Any], pictures: bool) -> dict[str, Any]:
        """Take the commands one after another until one of them ends the episode.

        -> observation after the last step taken; success [steps taken]; done; info of each step; with `pictures` one each.
        """
        successes, infos, shown, done, observation = [], [], [], False, None
        blind = self._env.step if pictures else getattr(self._env, "blind_step", self._env.step)
        for i, command in enumerate(commands):
            step = blind if i + 1 < len(commands) else self._env.step
            observation, success, done, info = step(command)
            successes.append(bool(success))
            infos.append(info)
            if pictures:
                shown.append(self.render())
            if done:
                break
        result = {"observation": observation, "success": successes, "done": bool(done), "infos": infos}
        if pictures:
            result["pictures"] = shown
        return result

    def render(self) -> Any:
        return np.array(self._env.render())  # a copy: many renderers hand out their own buffer

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = None


def versions() -> dict[str, str]:
    """Of Python, NumPy and the simulators' packages that are loaded."""
    found = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("mujoco", "robosuite", "libero", "robocasa", "gymnasium", "dit4dit"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is None and name == "libero" and name in sys.modules:  # it does not say so itself
            version = metadata.version("hf-libero")
        if isinstance(version, str):
            found[name] = version
    return found


def send(connection: socket.socket, message: Any) -> None:
    """Write one message: a tree of dicts, lists, numbers, strings and arrays."""
    arrays: list[Any] = []
    tree = _without_arrays(message, arrays, "message")
    listed = [{"dtype": array.dtype.str, "shape": array.shape} for array in arrays]
    header = json.dumps({"tree": tree, "arrays": listed}).encode()
    connection.sendall(struct.pack(">I", len(header)) + header)
    for array in arrays:
        if array.size:
            connection.sendall(np.ascontiguousarray(array).data.cast("B"))


def receive(connection: socket.socket) -> Any:
    """Read one message; EOFError when the peer has hung up, ValueError when what comes is no message."""
    (length,) = struct.unpack(">I", _read(connection, 4))
    if length > MAX_HEADER:
        raise ValueError(f"message: a header of {length} bytes; at most {MAX_HEADER} are taken")
    header = json.loads(bytes(_read(connection, length)).decode())
    arrays: list[Any] = []
    for listed in header["arrays"]:
        dtype, shape = np.dtype(listed["dtype"]), tuple(listed["shape"])
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if dtype.kind not in "biuf" or not 0 <= size <= MAX_ARRAYS:
            raise ValueError(f"message: an array of {dtype} {shape} is not taken")
        arrays.append(np.frombuffer(_read(connection, size), dtype).reshape(shape))
    return _with_arrays(header["tree"], arrays)


def _read(connection: socket.socket, size: int) -> bytearray:
    """A writable buffer of exactly `size` bytes."""
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        count = connection.recv_into(view[done:])
        if not count:
            raise EOFError("the peer has hung up")
        done += count
    return buffer


def _without_arrays(node: Any, arrays: list[Any], where: str) -> Any:
    """The tree with each array replaced by its place in `arrays`, {"array": i}; a dict is {"dict": {...}}."""
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, (np.ndarray, np.generic)):
        array = np.asarray(node)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{where}: an array of {array.dtype} cannot be sent")
        arrays.append(array)
        return {"array": len(arrays) - 1}
    if isinstance(node, (list, tuple)):
        return [_without_arrays(item, arrays, f"{where}[{i}]") for i, item in enumerate(node)]
    if hasattr(node, "items"):  # OrderedDict, and what gymnasium and robosuite derive from it
        return {"dict": {str(k): _without_arrays(v, arrays, f"{where}[{k!r}]") for k, v in node.items()}}
    raise TypeError(f"{where}: a {type(node).__name__} cannot be sent; use numbers, strings, lists, dicts or arrays")


def _with_arrays(node: Any, arrays: list[Any]) -> Any:
    if isinstance(node, list):
        return [_with_arrays(item, arrays) for item in node]
    if isinstance(node, dict):
        if "array" in node:
            return arrays[node["array"]]
        return {key: _with_arrays(value, arrays) for key, value in node["dict"].items()}
    return node


def end_with(connection: socket.socket) -> None:
    """End this process when the peer hangs up, whatever it is doing then."""
    hung_up = getattr(select, "POLLRDHUP", select.POLLHUP)
    poller = select.poll()
    poller.register(connection, hung_up)

    def watch() -> None:
        poller.poll()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def serve(connection: socket.socket) -> None:
    """Answer until the peer hangs up."""
    host = Host()
    send(connection, {"protocol": PROTOCOL, "pid": os.getpid()})
    while True:
        try:
            request = receive(connection)
        except EOFError:
            return
        try:
            answer = {"ok": host.answer(request)}
        except Exception as error:  # whatever a simulator raises is the evaluator's to record, not this process's end
            answer = failure(error)
        try:
            send(connection, answer)
        except TypeError as error:  # something in the answer that cannot be sent
            send(connection, failure(error))


def failure(error: Exception) -> dict[str, Any]:
    """The answer that tells of an exception."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return {"error": {"type": type(error).__name__, "message": str(error), "traceback": text}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs one simulator for dit4dit eval.")
    parser.add_argument("--socket", required=True, help="Unix domain socket at which the evaluator listens")
    path = parser.parse_args().socket
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the evaluator's to handle
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    end_with(connection)
    serve(connection)


if __name__ == "__main__":
    main()
