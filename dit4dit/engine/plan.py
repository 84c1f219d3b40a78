"""One shape of request, ready to run: all buffers allocated, and on a GPU the whole step recorded as a CUDA graph.

uint8 pictures go in and actions in robot units come out through page-locked memory. Between the two nothing is allocated, nothing
is compiled, and the host waits once, for the event behind the last copy. What exists because of a shape hangs on its plan and on
nothing else, so that it is freed with it: nothing here refers to itself in a circle, which a frozen garbage collector would keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit4dit import ops
from dit4dit.engine.capture import capture
from dit4dit.engine.engine import Engine
from dit4dit.engine.graph_pool import GraphPool
from dit4dit.engine.packs import PromptPack
from dit4dit.engine.programmatic import chosen as launched_early
from dit4dit.engine.staging import Fields, Staging
from dit4dit.model.flow import GuidanceTensors, guidance_arrays
from dit4dit.noise import STREAMS, Noise
from dit4dit.ops import device_tables, programmatic
from dit4dit.types import Guidance

_WARM_UPS = 3  # before recording: kernels compiled, library handles and workspaces made


@dataclass(frozen=True)
class RequestShape:
    """What decides a plan.

    Attributes:
        batch: requests in one pass, 1 to MAX_BATCH.
        views: height and width of each view's picture as it comes.
        size: height and width that each view is brought to; None leaves them as they are.
        resize: filter that brings it there ("cv2_area" or "bilinear").
        state: whether the requests have a state.
        text_length: tokens of an instruction's pack.
        max_guidance: bound of the strength of guided requests; None for requests without guidance, whose plan knows nothing
            of it.
    """

    batch: int
    views: tuple[tuple[int, int], ...]
    size: tuple[int, int] | None
    resize: Literal["cv2_area", "bilinear"]
    state: bool
    text_length: int
    max_guidance: float | None = None

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of the joined views."""
        sizes = [self.size or view for view in self.views]
        return sizes[0][0], sum(width for _, width in sizes)

    @property
    def text(self) -> str:
        """What tells it from others in a verdict; not the bound of the guidance, which changes no speed."""
        views = " ".join(f"{height}x{width}" for height, width in self.views)
        to = "" if self.size is None else f" by {self.resize} to {self.size[0]}x{self.size[1]}"
        kinds = ["state"] * self.state + ["guided"] * (self.max_guidance is not None)
        return ", ".join([f"batch {self.batch}", f"views {views}{to}", f"text {self.text_length}", *kinds])


class Plan:
    """The engine's step for one `RequestShape`. Not for two threads at a time: the buffers are the plan's own."""

    def __init__(self, engine: Engine, shape: RequestShape, table: Tensor | None) -> None:
        """table: of `ops.unnormalize`, float64 [5, A]; None where only normalised actions are wanted.

        BackendError: on a GPU, the step cannot be captured as a graph; its cause is what failed.
        """
        self.engine, self.shape = engine, shape
        device, config = engine.device, engine.config
        self._table = None if table is None else table.to(device)
        batch, head = shape.batch, config.head
        inputs: Fields = {f"view{i}": ((batch, *size, 3), torch.uint8) for i, size in enumerate(shape.views)}
        inputs["requests"] = ((batch, 3), torch.int64)
        if shape.state:
            assert head.state_dim is not None
            inputs["state"] = ((batch, 1, head.state_dim), torch.float32)
        actions = (batch, head.action_horizon, head.action_dim)
        if shape.max_guidance is not None:
            inputs |= {"previous": (actions, torch.float32), "weights": (actions[:2], torch.float32)}
        self.inputs = Staging(inputs, device)
        self.draws = config.noise_shapes(*shape.frame)
        self.noise = Staging({name: ((batch, *draw), torch.float32) for name, draw in self.draws.items()}, device)
        outputs: Fields = {"normalized": (actions, torch.float32)}
        if table is not None:
            outputs["actions"] = ((*actions[:2], table.shape[1]), torch.float32)
        self.outputs = Staging(outputs, device)
        self._slots = engine.slots(batch, shape.text_length)
        self._pack = self._slots.of(batch)
        self._stream = engine.stream
        self._pools: list[GraphPool] = []
        self._tables: list[device_tables.Sized] = []
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        self._choices = engine.choices()
        self.programmatic = self._stream is not None and launched_early(engine, shape.text)
        """Whether its kernels are launched programmatically (`ops.programmatic`)."""
        self._graph: Callable[[], None] | None = None
        if self._stream is not None:
            self._graph = self.record(self._compute, "the step", self._choices)

    @property
    def ran(self) -> dict[str, dict[str, int]]:
        """op -> implementation -> number of calls in the last step; {} before the first one."""
        return self._choices.ran

    @property
    def head(self) -> Literal["library", "one_launch"]:
        """What runs the action head in a step, after the first one."""
        return "library" if set(self.ran.get("action_ode", ())) <= {"loop", "torch"} else "one_launch"

    @property
    def bytes(self) -> int:
        """Memory, the host's and the device's, that would be free without this plan.

        On a GPU its part of the holes in the memory of all graphs (`GraphPool.share`) is among it; `Slots`, which all plans of a
        text length share, are not.
        """
        staged = self.inputs.bytes + self.noise.bytes + self.outputs.bytes
        tables = {id(table): table.nbytes for table in self._tables}  # several graphs may read one
        return staged + sum(tables.values()) + sum(pool.share for pool in self._pools)

    def record(
        self, function: Callable[[], None], what: str = "a stage", choices: ops.Choices | None = None
    ) -> Callable[[], None]:
        """A function of fixed buffers, or on a GPU the replay of its kernels as one graph, which has been replayed once.

        what: names it in an error. choices: new ones of the engine when None; they are made in the first run.
        BackendError, DeviceError: as `capture`; the engine can record again afterwards.
        """
        function = (self.engine.choices() if choices is None else choices).around(function)
        if self._stream is None:
            return function
        function = programmatic.around(self.programmatic, function)
        self._stream.wait_stream(torch.cuda.current_stream(self.engine.device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for _ in range(_WARM_UPS):
                function()
            pool = self.engine.graph_pool
            try:
                with device_tables.collected() as read, pool.growing(self):
                    graph = capture(what, function, self._stream, pool.handle)
            except BaseException:
                self.engine.drop_graph_pool()
                raise
        self._tables += read  # the graph reads them by address
        if pool not in self._pools:
            self._pools.append(pool)
        replay: Callable[[], None] = graph.replay
        return replay

    def draw_noise(self) -> None:
        """Draw the noise of all requests but those that have brought theirs; nothing on a CPU, where NumPy has drawn it."""
        if not self.engine.branches:
            return
        draws = tuple((stream, self.draws[name]) for name, stream in STREAMS.items())
        places = tuple(self.noise.device[name] for name in STREAMS)
        ops.philox_normal(self.inputs.device["requests"], draws, out=places)

    def _compute(self) -> None:
        given, noise = self.inputs.device, self.noise.device
        views = [given[f"view{i}"] for i in range(len(self.shape.views))]
        with ops.stage("preprocess"):
            frame = ops.preprocess(
                views,
                self.shape.size,
                self.shape.resize,
                self._pack.keys.dtype,
                channels=self.engine.encoder.channels,
            )
        tokens: list[Tensor | None] = []

        def early() -> None:
            self.draw_noise()
            tokens.append(self.engine.token(given.get("state")))

        features = self.engine.features(frame, self._pack, noise["posterior"], noise["latent"], early)
        most = self.shape.max_guidance
        guidance = None if most is None else GuidanceTensors(given["previous"], given["weights"], most)
        with ops.stage("action_head"):
            normalized = self.engine.actions_behind(features, tokens[0], noise["action"], guidance)
        with ops.stage("outputs"):
            places = self.outputs.device
            if self._table is None:
                places["normalized"].copy_(normalized)
            else:
                ops.unnormalize(normalized, self._table, out=places["actions"], copy=places["normalized"])

    def compute(self) -> None:
        """All that the device does for one pass, on whatever the buffers hold."""
        if self._graph is not None:
            self._graph()
        else:
            with self._choices:
                self._compute()

    @torch.no_grad()
    def run(
        self,
        pictures: Sequence[Sequence[NDArray[np.uint8]]],
        state: NDArray[np.float32] | None,
        noise: Sequence[Noise],
        packs: Sequence[PromptPack],
        guidance: Sequence[Guidance] = (),
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Normalised actions [B, K, A_model], and actions in robot units [B, K, A] where the plan has a table.

        Args:
            pictures: uint8 [H, W, 3] per request and view, sizes as the plan's.
            state: encoded states [B, 1, state_dim], or None, as the plan's.
            noise, packs: one per request.
            guidance: likewise where the plan's requests are guided, with the plan's bound; none otherwise.
        """
        for i, views in enumerate(pictures):
            for v, picture in enumerate(views):
                self.inputs.host[f"view{v}"][i] = picture
        if state is not None:
            self.inputs.host["state"][:] = state
        for i, one in enumerate(guidance):
            arrays = guidance_arrays(one, self.engine.config.head.action_horizon)
            self.inputs.host["previous"][i], self.inputs.host["weights"][i] = arrays
        drawn = self._stage_noise(noise)
        if self._stream is None or self._done is None:
            self._launch(packs, drawn)
        else:
            with torch.cuda.stream(self._stream):
                try:
                    self._launch(packs, drawn)
                    self._done.record()
                    self._done.synchronize()
                except BaseException:
                    self._stream.synchronize()  # the page-locked buffers are free again
                    raise
        actions = self.outputs.host.get("actions")
        return self.outputs.host["normalized"].copy(), None if actions is None else actions.copy()

    def rehearse(self) -> None:
        """Run the step once on whatever the buffers hold, so that its memory and its kernels are there."""
        if self._stream is None:  # on a GPU recording has done so, and has replayed the graph
            with torch.no_grad():
                self.compute()

    def _stage_noise(self, noise: Sequence[Noise]) -> list[bool]:
        """Per request, whether its noise is to be drawn on the device from its seed; the others' is drawn or copied here."""
        drawn = [self.engine.branches and not one.given for one in noise]
        for i, one in enumerate(noise):
            request = (one.seed, one.chunk, 0) if drawn[i] else (0, 0, 1)
            self.inputs.host["requests"][i] = np.array(request, dtype=np.uint64).view(np.int64)
            if not drawn[i]:
                for name, array in one.draw(self.draws).items():
                    self.noise.host[name][i] = array
        return drawn

    def _launch(self, packs: Sequence[PromptPack], drawn: Sequence[bool]) -> None:
        self.inputs.upload()
        self._slots.fill(packs)
        if any(drawn):
            self.noise.upload_rows([i for i, here in enumerate(drawn) if not here])
        else:
            self.noise.upload()
        self.compute()
        self.outputs.download()
