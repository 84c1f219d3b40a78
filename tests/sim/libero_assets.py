"""Stand-in assets for LIBERO, made of primitives: `python libero_assets.py FOLDER`.

hf-libero's wheel has the tasks, initial states, controllers and predicates, but no meshes and textures. What the code needs of an
asset is its name, its bodies, joints, sites and rough size; with those alone all 20 tasks of libero_spatial and libero_object
run. The joints are those of the shipped initial states. Sizes are metres, half lengths as MuJoCo has them.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SOLID = 'group="0" friction="0.95 0.3 0.1" solref="0.001 1" solimp="0.998 0.998 0.001" rgba="0.8 0.8 0.8 0.3"'
SEEN = 'group="1" contype="0" conaffinity="0" density="0"'
HIDDEN = 'rgba="0 0 0 0"'
DARK, WOOD, PALE, GREY = (0.13, 0.13, 0.14), (0.2, 0.14, 0.1), (0.9, 0.89, 0.87), (0.75, 0.75, 0.75)
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Shape:
    """One MuJoCo primitive: `size` and `at` in metres, turned about z by `yaw` radians."""

    kind: str
    size: tuple[float, ...]
    at: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw: float = 0.0

    @property
    def attributes(self) -> str:
        turn = f"{math.cos(self.yaw / 2):.9f} 0 0 {math.sin(self.yaw / 2):.9f}"
        return f'type="{self.kind}" size="{numbers(self.size)}" pos="{numbers(self.at)}" quat="{turn}"'


def numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def box(x: float, y: float, z: float, at: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Shape:
    return Shape("box", (x, y, z), at)


def disc(radius: float, half_height: float, z: float = 0.0) -> Shape:
    return Shape("cylinder", (radius, half_height), (0.0, 0.0, z))


def ring(radius: float, half_height: float, z: float, thickness: float = 0.002, sides: int = 12) -> list[Shape]:
    """A round wall of flat boxes: the inside stays hollow, which one cylinder would not."""
    angles = [2 * math.pi * side / sides for side in range(sides)]
    size = (thickness, radius * math.tan(math.pi / sides), half_height)
    return [Shape("box", size, (radius * math.cos(a), radius * math.sin(a), z), a) for a in angles]


def geoms(shapes: Sequence[Shape], colour: Colour, density: float = 100.0) -> str:
    """Every shape twice: one that touches, one that the cameras see."""
    rows = []
    for shape in shapes:
        rows.append(f'<geom {shape.attributes} {SOLID} density="{density:g}"/>')
        rows.append(f'<geom {shape.attributes} {SEEN} rgba="{numbers(colour)} 1"/>')
    return "\n".join(rows)


def box_site(name: str, at: Sequence[float], size: Sequence[float]) -> str:
    """A region that LIBERO's predicates ask about."""
    return (
        f'<site name="{name}" type="box" group="0" pos="{numbers(at)}" size="{numbers(size)}" quat="1 0 0 0" {HIDDEN}/>'
    )


def model(name: str, body: str, *, bottom: float = -0.06, top: float = 0.04, radius: float = 0.03) -> str:
    """An object as robosuite loads it; the three sites tell its placement samplers how large it is."""
    marks = {"bottom_site": (0, 0, bottom), "top_site": (0, 0, top), "horizontal_radius_site": (radius, radius, 0)}
    sites = "\n".join(f'<site name="{n}" pos="{numbers(at)}" size="0.005" {HIDDEN}/>' for n, at in marks.items())
    return (
        f'<mujoco model="{name}"><asset/><worldbody><body>\n<body name="object">\n{body}\n</body>\n{sites}\n'
        "</body></worldbody></mujoco>\n"
    )


# What can be picked up. Bowl, ramekin and plate are hollow, so that one can stand in another and fingers can close on a rim.
SCANNED: dict[str, tuple[list[Shape], Colour]] = {
    "akita_black_bowl": ([disc(0.034, 0.003, 0.005), *ring(0.036, 0.010, 0.012), *ring(0.047, 0.016, 0.036)], DARK),
    "glazed_rim_porcelain_ramekin": ([disc(0.036, 0.002, 0.003), *ring(0.039, 0.020, 0.022)], PALE),
    "plate": ([disc(0.045, 0.003, 0.001), *ring(0.057, 0.003, 0.006, thickness=0.012)], PALE),
}
GROCERIES = {
    "alphabet_soup": (0.031, 0.036, 0.031),
    "bbq_sauce": (0.025, 0.073, 0.018),
    "butter": (0.038, 0.020, 0.009),
    "chocolate_pudding": (0.041, 0.030, 0.012),
    "cookies": (0.031, 0.041, 0.009),
    "cream_cheese": (0.041, 0.021, 0.009),
    "ketchup": (0.025, 0.073, 0.018),
    "milk": (0.026, 0.065, 0.026),
    "new_salad_dressing": (0.025, 0.073, 0.018),
    "orange_juice": (0.026, 0.065, 0.026),
    "salad_dressing": (0.025, 0.073, 0.018),
    "tomato_sauce": (0.031, 0.036, 0.031),
}


def colour_of(name: str) -> Colour:
    """Some colour, always the same for a name."""
    word = zlib.crc32(name.encode())
    red, green, blue = ((word >> shift & 255) / 255 for shift in (0, 8, 16))
    return red, green, blue


def basket() -> str:
    walls = [box(0.003, 0.076, 0.065, (x, 0, 0.076)) for x in (0.08, -0.08)]
    walls += [box(0.08, 0.003, 0.065, (0, y, 0.076)) for y in (0.075, -0.075)]
    region = box_site("contain_region", (0, 0, 0.072), (0.061, 0.061, 0.07))
    return model("basket", region + geoms([box(0.078, 0.076, 0.004, (0, 0, 0.008)), *walls], (0.75, 0.6, 0.38)))


def drawer(name: str, z: float) -> str:
    sides = [box(0.003, 0.08, 0.03, (x, 0.01, z)) for x in (-0.102, 0.106)]
    ends = [box(0.105, 0.004, 0.03, (0, y, z)) for y in (-0.072, 0.09)]
    handle = [box(0.04, 0.006, 0.007, (0, -0.1, z)), *(box(0.005, 0.012, 0.005, (x, -0.085, z)) for x in (0.03, -0.03))]
    return (
        f'<body name="cabinet_{name}"><inertial pos="0 0 0" mass="1" diaginertia="0.01 0.01 0.01"/>\n'
        f'<joint name="{name}_level" type="slide" axis="0 1 0" range="-0.16 0.01" limited="true" damping="50" '
        'frictionloss="5"/>\n'
        + box_site(f"{name}_region", (0, 0.011, z), (0.1, 0.075, 0.03))
        + geoms([box(0.105, 0.08, 0.004, (0, 0.01, z - 0.028)), *ends, *sides, *handle], (0.24, 0.17, 0.12))
        + "</body>"
    )


def wooden_cabinet() -> str:
    walls = [
        box(0.12, 0.003, 0.11, (0, 0.11, 0.113)),
        *(box(0.005, 0.095, 0.106, (x, 0.016, 0.114)) for x in (-0.113, 0.119)),
    ]
    floors = [box(0.12, 0.094, 0.002, (0, 0.016, 0.007)), box(0.127, 0.094, 0.0015, (0, 0.016, 0.2215))]
    drawers = "".join(drawer(name, z) for name, z in (("top", 0.185), ("middle", 0.116), ("bottom", 0.047)))
    top = box_site("top_side", (0, 0.015, 0.222), (0.125, 0.094, 0.0015))
    body = f'<body name="base">{top}{geoms([*walls, *floors], WOOD)}{drawers}</body>'
    return model("wooden_cabinet", body, bottom=-0.045, top=0.045, radius=0.045)


def flat_stove() -> str:
    burner = (
        '<body name="burner" pos="0.15 0 0">'
        + box_site("cook_region", (0, 0, 0), (0.075, 0.075, 0.0025))
        + geoms([box(0.095, 0.095, 0.02), box(0.095, 0.095, 0.0005, (0, 0, 0.025))], GREY)
        + f'<geom {disc(0.06, 0.001, 0.026).attributes} {SEEN} rgba="0.25 0.25 0.25 1"/>'
        + '<site name="burner" type="cylinder" group="1" pos="0 0 0.028" size="0.0625 0.0005" rgba="1 0 0 0"/></body>'
    )
    button = (
        '<body name="button" quat="0.7071068 0 0 0.7071068"><inertial pos="0 0 0" mass="0.1" diaginertia="0.001 0.001 0.001"/>'
        '<joint name="button" type="hinge" axis="0 0 1" range="-0.005 2.1" limited="true" damping="1" frictionloss="0.05"/>'
        + geoms([disc(0.034, 0.006, 0.007), box(0.008, 0.03, 0.012, (0, 0, 0.025))], (0.1, 0.1, 0.1))
        + "</body>"
    )
    return model("flat_stove", f'<body name="base">{burner}{button}</body>', bottom=-0.045, top=0.045, radius=0.045)


FLOOR, WALL, TABLE = "light-gray-floor-tile.png", "light-gray-plaster.png", "table.png"
TEXTURES = {
    FLOOR: ((150, 150, 150), (165, 165, 165)),
    WALL: ((200, 200, 198), (205, 205, 203)),
    TABLE: ((205, 180, 150), (198, 172, 142)),
    "tile_grigia_caldera_porcelain_floor.png": ((130, 120, 110), (140, 128, 118)),
    "seamless_wood_planks_floor.png": ((130, 110, 90), (140, 118, 98)),
    "rustic_floor.png": ((120, 112, 100), (132, 122, 110)),
}


def checkers(first: tuple[int, int, int], second: tuple[int, int, int], side: int = 32, cell: int = 8) -> Image.Image:
    image = Image.new("RGB", (side, side), first)
    for x in range(side):
        for y in range(side):
            if (x // cell + y // cell) % 2:
                image.putpixel((x, y), second)
    return image


def scene(name: str, ground: str) -> str:
    """An arena: floor, three walls, two lights, two cameras, and `ground`, the body that objects stand on."""
    half = "0.70710678"
    walls = (
        ("wall_rear_visual", "3 1.5 0.01", "-2 0 1.5", "0.5 0.5 0.5 0.5"),
        ("wall_left_visual", "3 1.5 0.01", "1 3 1.5", f"{half} {half} 0 0"),
        ("wall_right_visual", "3 1.5 0.01", "1 -3 1.5", f"{half} -{half} 0 0"),
    )
    panes = "".join(
        f'<geom name="{n}" type="box" size="{size}" pos="{pos}" quat="{quat}" material="walls_mat" {SEEN}/>\n'
        for n, size, pos, quat in walls
    )
    return f"""<mujoco model="{name}">
<asset>
<texture type="skybox" builtin="gradient" width="64" height="64" rgb1="0.9 0.9 1" rgb2="0.3 0.3 0.4"/>
<texture name="texplane" type="2d" file="../textures/{FLOOR}"/>
<material name="floorplane" texture="texplane" texrepeat="4 4" texuniform="true"/>
<texture name="tex-wall" type="2d" file="../textures/{WALL}"/>
<material name="walls_mat" texture="tex-wall" texrepeat="3 3" texuniform="true"/>
<texture name="tex-table" type="cube" file="../textures/{TABLE}"/>
<material name="table_texture" texture="tex-table"/>
</asset>
<worldbody>
<geom name="floor" type="plane" group="1" pos="0 0 0" size="3 3 0.125" condim="3" material="floorplane"/>
{panes}{ground}
<light name="light1" diffuse="0.7 0.7 0.7" specular="0.2 0.2 0.2" pos="1 1 4" dir="0 -0.15 -1" castshadow="false"/>
<light name="light2" diffuse="0.5 0.5 0.5" specular="0.2 0.2 0.2" pos="-2 -2 4" dir="0.2 0.2 -1" castshadow="false"/>
<camera name="frontview" mode="fixed" pos="1 0 1.45" quat="0.56 0.43 0.43 0.56"/>
<camera name="agentview" mode="fixed" pos="0.5 0 1.35" quat="0.653 0.271 0.271 0.653"/>
</worldbody>
</mujoco>
"""


def table() -> str:
    legs = "".join(
        f'<geom name="table_leg{i}_visual" type="cylinder" size="0.05 0.1" {SEEN} rgba="0.6 0.5 0.4 1"/>\n'
        for i in range(1, 5)
    )
    return (
        '<body name="table" pos="0 0 0.4">\n'
        '<geom name="table_collision" type="box" group="0" size="0.4 0.4 0.4" friction="1 0.005 0.0001"/>\n'
        f'<geom name="table_visual" type="box" size="0.4 0.4 0.4" material="table_texture" {SEEN}/>\n'
        f'<site name="table_top" pos="0 0 0.4" size="0.001 0.001 0.001" {HIDDEN}/>\n{legs}</body>'
    )


def files() -> dict[str, str]:
    """Path in the asset folder -> its text."""
    out = {
        "stable_scanned_objects/basket/basket.xml": basket(),
        "articulated_objects/wooden_cabinet.xml": wooden_cabinet(),
        "articulated_objects/flat_stove.xml": flat_stove(),
        "scenes/libero_tabletop_base_style.xml": scene("tabletop", table()),
        "scenes/libero_floor_base_style.xml": scene("floor", '<body name="floor"/>'),
    }
    for name, (shapes, colour) in SCANNED.items():
        out[f"stable_scanned_objects/{name}/{name}.xml"] = model(name, geoms(shapes, colour))
    for name, size in GROCERIES.items():
        out[f"stable_hope_objects/{name}/{name}.xml"] = model(name, geoms([box(*size)], colour_of(name)))
    return out


def write(folder: Path) -> None:
    """Write the whole tree; the same bytes every time."""
    for relative, text in files().items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "textures").mkdir(parents=True, exist_ok=True)
    for name, colours in TEXTURES.items():
        checkers(*colours).save(folder / "textures" / name)
    # hf-libero looks for it before it takes a folder for complete
    (folder / "turbosquid_objects").mkdir(exist_ok=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
