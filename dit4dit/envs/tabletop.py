"""A small tabletop world in NumPy: put the named block on the named plate, seen by one fixed camera from above.

It needs no simulator and no display, so that the whole path (pictures, language, actions, closed loop) can be tried, trained and
tested on a laptop. Language and vision both matter: three of four block colours and two plates lie at random places, and only the
instruction tells which block goes on which plate.

Units: metres, seconds (one step is 0.1 s). The table is 0.5 m x 0.5 m, x to the right, y to the top of the picture, origin in the
middle. Everything is deterministic; a layout is a function of its seed alone. Seeds below `TEST_SEEDS_FROM` are for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dit4dit.errors import InputError, did_you_mean, shown

TABLE = 0.5  # m, side of the table, all of it in the picture
REACH = 0.21  # m, the gripper stays within +-REACH of the middle
SPAWN = 0.18  # m, objects start within +-SPAWN of the middle
SERVO = 0.5  # of the way to the commanded position, per step: the controller's gain
MAX_STEP = 0.12  # m per step and axis, the controller's limit
HZ = 10.0
BLOCK = 0.08  # m, side of a block: 10 px of a 64 px picture, a little more than one latent of the VAE
PLATE_RADIUS = 0.058  # m
GRASP_RADIUS = 0.04  # m, fingers that close catch the nearest block whose centre is this near
PLACE_RADIUS = 0.05  # m, a block rests on a plate when their centres are this near
OPENING_SPEED = 0.5  # of the full opening, per step
CONTACT_OPENING = 0.4  # where the fingers stop on a block
FINGERS = (0.034, 0.034)  # m from the middle to a finger's centre, closed, and what a full opening adds
TEST_SEEDS_FROM = 1_000_000  # layouts with seeds from here on are never trained on
PICTURES = (64, 96, 128)  # px, sides of the square picture

BLOCK_COLOURS = {"red": (206, 40, 44), "green": (34, 150, 76), "blue": (36, 84, 214), "yellow": (246, 200, 30)}
PLATE_COLOURS = {"white": (244, 244, 240), "black": (38, 38, 42)}
INSTRUCTIONS = (
    "put the {block} block on the {plate} plate",
    "place the {block} block onto the {plate} plate",
    "move the {block} block to the {plate} plate",
    "pick up the {block} block and set it down on the {plate} plate",
)

Observation = dict[
    str, NDArray[np.generic]
]  # {"image": uint8 [P, P, 3], "state": float32 [3]}, the raw dict at the rim


@dataclass(frozen=True)
class Goal:
    """Which block belongs on which plate."""

    block: str
    plate: str

    def __post_init__(self) -> None:
        for what, got, known in (("block", self.block, BLOCK_COLOURS), ("plate", self.plate, PLATE_COLOURS)):
            if got not in known:
                raise InputError(
                    f"Goal.{what}: expected one of {list(known)}, got {shown(got)}{did_you_mean(got, list(known))}"
                )

    def instruction(self, paraphrase: int = 0) -> str:
        """The goal in words; `paraphrase` counts through `INSTRUCTIONS`."""
        if not 0 <= paraphrase < len(INSTRUCTIONS):
            raise InputError(f"Goal.instruction: paraphrase must be in 0..{len(INSTRUCTIONS) - 1}, got {paraphrase}")
        return INSTRUCTIONS[paraphrase].format(block=self.block, plate=self.plate)


@dataclass(frozen=True)
class Body:
    """A block or a plate: its colour's name, centre [m] and rotation [rad]."""

    colour: str
    x: float
    y: float
    yaw: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything there is: ground truth for the picture, the expert and the success check."""

    blocks: tuple[Body, ...]  # bottom to top: the block that was let go last lies on top
    plates: tuple[Body, ...]
    x: float  # gripper [m]
    y: float
    opening: float  # 0 closed .. 1 open
    held: str | None  # colour of the block between the fingers

    def block(self, colour: str) -> Body:
        """The block of that colour; InputError when the scene has none."""
        return _of_colour("block", self.blocks, colour)

    def plate(self, colour: str) -> Body:
        """The plate of that colour; InputError when the scene has none."""
        return _of_colour("plate", self.plates, colour)

    def reached(self, goal: Goal) -> bool:
        """True when the named block rests on the named plate and the gripper is fully open."""
        block, plate = self.block(goal.block), self.plate(goal.plate)
        near = np.hypot(block.x - plate.x, block.y - plate.y) <= PLACE_RADIUS
        return bool(near and self.held is None and self.opening >= 1.0)


@dataclass(frozen=True)
class Frame:
    """What `reset` gives: the first observation, and the words that go with the episode."""

    observation: Observation
    instruction: str
    seed: int


@dataclass(frozen=True)
class StepResult:
    """What `step` gives. The episode is over with `success` or `truncated` (out of steps without success)."""

    observation: Observation
    success: bool
    steps: int
    truncated: bool


def _of_colour(what: str, bodies: Sequence[Body], colour: str) -> Body:
    for body in bodies:
        if body.colour == colour:
            return body
    raise InputError(f"tabletop scene: no {shown(colour)} {what} on the table, only {[body.colour for body in bodies]}")


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"tabletop seed: expected an integer >= 0, got {shown(seed)}")
    return int(seed)


def layout(seed: int) -> tuple[Scene, Goal, int]:
    """The scene, goal and paraphrase that belong to a seed: three blocks and both plates, none touching another."""
    rng = np.random.default_rng(_checked_seed(seed))
    colours = rng.permutation(list(BLOCK_COLOURS))[:3].tolist()
    clearances = [PLATE_RADIUS] * 2 + [0.65 * BLOCK] * 3  # 0.65 of the side: as far as a turned block's corner is
    places: list[NDArray[np.float64]] = []
    tries = 0
    while len(places) < len(clearances):
        tries += 1
        if tries % 200 == 0:  # the first ones lie so that there is no room for the others
            places.clear()
        place = rng.uniform(-SPAWN, SPAWN, 2)
        gaps = (np.hypot(*(place - other)) - clearances[i] - clearances[len(places)] for i, other in enumerate(places))
        if all(gap > 0.012 for gap in gaps):
            places.append(place)
    centres = [(float(x), float(y)) for x, y in places]
    plates = tuple(Body(colour, *centre) for colour, centre in zip(PLATE_COLOURS, centres[:2], strict=True))
    yaws = rng.uniform(-0.35, 0.35, 3).tolist()
    blocks = tuple(Body(*named) for named in ((colours[i], *centres[2 + i], yaws[i]) for i in range(3)))
    x, y = rng.uniform(-SPAWN, SPAWN, 2).tolist()
    goal = Goal(colours[rng.integers(3)], list(PLATE_COLOURS)[rng.integers(2)])
    return Scene(blocks, plates, x, y, opening=1.0, held=None), goal, int(rng.integers(len(INSTRUCTIONS)))


def advance(scene: Scene, action: NDArray[np.float64]) -> Scene:
    """One step of 0.1 s under a finite action [3] = (x, y [m], grip): a servo moves the gripper towards (x, y)."""
    here = np.array([scene.x, scene.y])
    way = SERVO * (np.clip(action[:2], -REACH, REACH) - here)
    x, y = (here + np.clip(way, -MAX_STEP, MAX_STEP)).tolist()
    blocks, held = scene.blocks, scene.held
    if held is not None:
        body = scene.block(held)
        moved = replace(body, x=body.x + x - scene.x, y=body.y + y - scene.y)
        blocks = tuple(moved if other is body else other for other in blocks)

    closes = bool(action[2] >= 0.5)
    floor = 0.0 if held is None else CONTACT_OPENING
    opening = max(floor, scene.opening - OPENING_SPEED) if closes else min(1.0, scene.opening + OPENING_SPEED)
    if held is None and scene.opening > 0.5 >= opening:  # fingers meet whatever is between them just now
        nearest = min(blocks, key=lambda body: np.hypot(body.x - x, body.y - y))
        if np.hypot(nearest.x - x, nearest.y - y) <= GRASP_RADIUS:
            held = nearest.colour
            # a parallel gripper turns and centres what it catches, along its own x only
            blocks = (*(body for body in blocks if body is not nearest), replace(nearest, x=x, yaw=0.0))
    elif held is not None and opening > 0.5:
        held = None
    return Scene(blocks, scene.plates, x, y, opening, held)


class TabletopEnv:
    """One tabletop episode after another.

    `seed`       names the layout, goal and start of the gripper.
    `picture`    side of the square picture, 64, 96 or 128 px.
    `max_steps`  an episode without success ends here.
    `paraphrase` which of `INSTRUCTIONS` words the goal; None lets the seed choose.
    """

    def __init__(self, seed: int, *, picture: int = 64, max_steps: int = 60, paraphrase: int | None = 0) -> None:
        if picture not in PICTURES:
            raise InputError(f"TabletopEnv: picture must be one of {PICTURES} px, got {shown(picture)}")
        if max_steps < 1:
            raise InputError(f"TabletopEnv: max_steps must be at least 1, got {shown(max_steps)}")
        self.picture = picture
        self.max_steps = max_steps
        self.paraphrase = paraphrase
        self.seed = _checked_seed(seed)
        self.reset()

    def reset(self, seed: int | None = None, goal: Goal | None = None) -> Frame:
        """Begin the episode of `seed` (None: the last one again). `goal` asks for another one than the seed's own."""
        self.seed = self.seed if seed is None else _checked_seed(seed)
        scene, own_goal, own_paraphrase = layout(self.seed)
        wanted = own_goal if goal is None else goal
        scene.block(wanted.block)  # a goal that the table cannot meet is refused here
        self.scene = scene
        self.goal = wanted
        self.steps = 0
        self.instruction = wanted.instruction(own_paraphrase if self.paraphrase is None else self.paraphrase)
        return Frame(self.observation(), self.instruction, self.seed)

    def step(self, action: ArrayLike) -> StepResult:
        """One step of 0.1 s under action [3] = (x, y, grip): where the gripper shall go [m, clipped to +-0.21], >= 0.5 closes it.

        The position is a servo's target: a step goes half of the way there, at most 0.12 m along each axis.
        """
        try:
            values = np.asarray(action, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"TabletopEnv.step: expected 3 numbers (x, y, grip), got {shown(action)}") from error
        if values.shape != (3,):
            raise InputError(
                f"TabletopEnv.step: expected an action of shape (3,) = (x, y, grip), got shape {values.shape}"
            )
        if not np.isfinite(values).all():
            raise InputError(f"TabletopEnv.step: expected finite numbers (x, y, grip), got {values.tolist()}")
        if self.steps >= self.max_steps:
            raise InputError(f"TabletopEnv.step: the episode ended after max_steps={self.max_steps}; call reset()")
        self.scene = advance(self.scene, values)
        self.steps += 1
        success = self.scene.reached(self.goal)
        return StepResult(
            self.observation(), success, self.steps, truncated=self.steps >= self.max_steps and not success
        )

    def observation(self) -> Observation:
        """{"image": uint8 [P, P, 3] RGB, "state": float32 [3] = (x, y [m], opening 0..1)} of this moment."""
        scene = self.scene
        state = np.array([scene.x, scene.y, scene.opening], dtype=np.float32)
        return {"image": render(scene, self.picture), "state": state}


class ScriptedExpert:
    """Solves the episode from the ground truth of `env.scene`; closed loop, so that it recovers from what disturbs it.

    Its intention is a function of the scene alone: whoever sees the scene can tell what it is about to do.

    `goal`  solve this goal instead of the env's own (to see that the instruction matters).
    `noise` standard deviation [m] of a slowly wandering error added to x and y; 0.02 is lively. `seed` belongs to it.
    `detours` probability per step of heading for some other place instead, as long as the target is not near (`CALM`).
    `intended` the last action without both.
    """

    NEAR = 0.025  # m, near enough to close or open the fingers
    CALM = 0.06  # m, whoever is about to grasp is careful

    def __init__(
        self, env: TabletopEnv, *, goal: Goal | None = None, noise: float = 0.0, detours: float = 0.0, seed: int = 0
    ) -> None:
        if not noise >= 0.0:
            raise InputError(f"ScriptedExpert: noise must be a standard deviation in metres >= 0, got {shown(noise)}")
        if not 0.0 <= detours < 1.0:
            raise InputError(
                f"ScriptedExpert: detours must be a probability per step in 0..1 (1 excluded), got {shown(detours)}"
            )
        self.env = env
        self.goal = goal
        self.noise = noise
        self.detours = detours
        self.reset(seed)

    def reset(self, seed: int = 0) -> None:
        """Forget the motion so far; call it after `env.reset`."""
        self._rng = np.random.default_rng(_checked_seed(seed))
        self.intended = np.zeros(3, dtype=np.float32)
        self._error = np.zeros(2)

    def act(self) -> NDArray[np.float32]:
        """The next action [3] = (x, y [m], grip)."""
        scene, goal = self.env.scene, self.goal or self.env.goal
        block, plate = scene.block(goal.block), scene.plate(goal.plate)
        carries, rests = scene.held == goal.block, scene.held is None and _rests_on(scene, goal)
        # it is the block that has to end on the plate, and the gripper that has to end on the block
        target, moves = (plate, block) if carries or rests else (block, scene)
        rest = np.array([target.x - moves.x, target.y - moves.y])
        near = float(np.hypot(*rest)) <= self.NEAR
        closes = not near if carries else scene.held is None and near and scene.opening >= 1.0
        return self._reach(rest, grip=float(closes and not rests))

    def _reach(self, rest: NDArray[np.float64], grip: float) -> NDArray[np.float32]:
        wanted = np.array([self.env.scene.x, self.env.scene.y]) + rest
        self._error = 0.7 * self._error + self._rng.normal(0.0, self.noise * np.sqrt(1 - 0.7**2), 2)
        self.intended = np.array([*wanted, grip], dtype=np.float32)
        distance = float(np.hypot(*rest))
        elsewhere, astray = self._rng.uniform(-SPAWN, SPAWN, 2), self._rng.random() < self.detours
        executed = wanted + min(1.0, distance / self.CALM) * self._error
        if astray and distance > self.CALM:
            executed = elsewhere
        return np.array([*executed, grip], dtype=np.float32)


def _rests_on(scene: Scene, goal: Goal) -> bool:
    block, plate = scene.block(goal.block), scene.plate(goal.plate)
    return bool(np.hypot(block.x - plate.x, block.y - plate.y) <= PLACE_RADIUS)


# The picture: every shape is a rounded box (a disc is one with full rounding), drawn bottom to top through its signed distance.

METAL, METAL_LIGHT, TIP = (104, 92, 140), (184, 176, 216), (236, 84, 190)
SHADOW = (40, 34, 30)
WINDOW = 0.17  # m, holds the largest shape with its soft edge


def render(scene: Scene, picture: int = 64) -> NDArray[np.uint8]:
    """The camera's picture of the scene: uint8 [picture, picture, 3] RGB, y = +0.25 m in row 0, edges anti-aliased."""
    shapes = np.array(_shapes(scene, pixel=TABLE / picture), dtype=np.float32)
    scale = picture / TABLE
    side = int(np.ceil(WINDOW * scale))
    centre = np.stack([shapes[:, 0] + TABLE / 2, TABLE / 2 - shapes[:, 1]], axis=1) * scale  # px, column and row
    corner = np.rint(centre - side / 2).astype(np.int64)
    pixel = np.arange(side, dtype=np.float32) + 0.5
    right = ((corner[:, :1] + pixel - centre[:, :1]) / scale)[:, None, :].astype(
        np.float32
    )  # m from the shape's centre
    up = (-(corner[:, 1:] + pixel - centre[:, 1:]) / scale)[:, :, None].astype(np.float32)
    half_x, half_y, rounding, cos, sin, soft, alpha = (shapes[:, i, None, None] for i in range(2, 9))
    from_x = np.abs(cos * right + sin * up) - (half_x - rounding)
    from_y = np.abs(cos * up - sin * right) - (half_y - rounding)
    outside = np.sqrt(np.square(np.maximum(from_x, 0.0)) + np.square(np.maximum(from_y, 0.0)))
    distance = outside + np.minimum(np.maximum(from_x, from_y), 0.0) - rounding
    cover = (alpha * np.clip(0.5 - distance / soft, 0.0, 1.0))[..., None]

    canvas = _table(picture, side).copy()
    for (column, row), weight, colour in zip((corner + side).tolist(), cover, shapes[:, 9:12], strict=True):
        window = canvas[row : row + side, column : column + side]
        window += weight * (colour - window)
    seen = canvas[side : side + picture, side : side + picture]
    return (seen + 0.5).astype(np.uint8)


def empty_table(picture: int = 64) -> NDArray[np.uint8]:
    """The picture of the bare table: uint8 [picture, picture, 3] RGB."""
    return (_table(picture, 0) + 0.5).astype(np.uint8)


@lru_cache(maxsize=2 * len(PICTURES))
def _table(picture: int, margin: int) -> NDArray[np.float32]:
    """The empty table, float32 [picture + 2 margin, ..., 3]: light from the upper left and a faint grain along x."""
    at = (np.arange(-margin, picture + margin) + 0.5) / picture
    x, y = np.meshgrid(at, at)
    light = 1.04 - 0.06 * x - 0.06 * y
    grain = 0.012 * np.sin(2 * np.pi * (7 * y + 0.35 * np.sin(2 * np.pi * 1.3 * x)))
    return ((light + grain)[..., None] * np.array([196, 178, 152])).astype(np.float32)


def _shapes(scene: Scene, pixel: float) -> list[tuple[float, ...]]:
    """Rows (x, y, half x, half y, rounding, cos, sin, soft edge [m], alpha, r, g, b), bottom to top."""
    rows: list[tuple[float, ...]] = []

    def box(
        x: float, y: float, half: tuple[float, float], rounding: float, colour: Sequence[float], yaw: float = 0.0
    ) -> None:
        rows.append((x, y, *half, rounding, float(np.cos(yaw)), float(np.sin(yaw)), pixel, 1.0, *colour))

    def shadow(x: float, y: float, half: tuple[float, float], rounding: float, height: float, yaw: float = 0.0) -> None:
        soft = 0.012 + 0.5 * height
        shade = (x + height, y - height, *half, rounding, float(np.cos(yaw)), float(np.sin(yaw)), soft, 0.45, *SHADOW)
        rows.append(shade)

    for plate in scene.plates:
        colour = PLATE_COLOURS[plate.colour]
        rim = tuple(0.86 * c + 8 for c in colour) if plate.colour == "white" else tuple(c + 42 for c in colour)
        shadow(plate.x, plate.y, (PLATE_RADIUS, PLATE_RADIUS), PLATE_RADIUS, height=0.005)
        box(plate.x, plate.y, (PLATE_RADIUS, PLATE_RADIUS), PLATE_RADIUS, rim)
        inner = PLATE_RADIUS - 0.010
        box(plate.x, plate.y, (inner, inner), inner, colour)

    for block in scene.blocks:
        held = block.colour == scene.held
        half = BLOCK / 2 * (1.08 if held else 1.0)  # a lifted block is nearer to the camera
        colour = BLOCK_COLOURS[block.colour]
        shadow(block.x, block.y, (half, half), 0.006, height=0.014 if held else 0.007, yaw=block.yaw)
        box(block.x, block.y, (half, half), 0.006, tuple(0.72 * c for c in colour), block.yaw)
        box(block.x, block.y, (half - 0.006, half - 0.006), 0.004, colour, block.yaw)

    x, y = scene.x, scene.y
    reach = FINGERS[0] + FINGERS[1] * scene.opening
    shadow(x, y + 0.034, (0.074, 0.010), 0.006, height=0.014)
    box(x, y + 0.034, (0.074, 0.010), 0.006, METAL)
    box(x, y + 0.034, (0.012, 0.006), 0.006, METAL_LIGHT)
    for side in (-reach, reach):
        box(x + side, y + 0.006, (0.0085, 0.034), 0.004, METAL)
        box(x + side, y - 0.018, (0.0085, 0.012), 0.004, TIP)
    return rows
