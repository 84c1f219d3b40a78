"""A stand-in for RoboCasa-GR1 on the package index's robosuite alone: gymnasium's "gr1_standin:dit4dit/PushCube-v0".

The robot is robosuite's GR1 with its legs and head fixed and Fourier hands. Names, shapes, dtypes, units and rates of what it
sees and takes are the real environments', and as there an episode never ends by itself. The task is the stand-in's own: push the
cube on the table by 5 cm.
"""

from __future__ import annotations

import cv2
import gymnasium
import numpy as np
import robosuite
from gymnasium import spaces
from robosuite.controllers import load_composite_controller_config
from robosuite.environments.manipulation.lift import Lift
from robosuite.models.robots import GR1
from robosuite.robots import register_robot_class
from robosuite.utils.mjcf_utils import find_elements, new_element

PARTS = {"left_arm": ("left", 7), "right_arm": ("right", 7), "left_hand": ("left_gripper", 6)}
PARTS |= {"right_hand": ("right_gripper", 6), "waist": ("torso", 3)}
HAND_JOINTS = (10, 8, 6, 4, 1, 0)
"""Of a hand's eleven joints, those that its state tells, in its order; a hand's action has another one."""
VIEWS = ("video.ego_view_pad_res256_freq20", "video.ego_view_bg_crop_pad_res256_freq20")
PUSHED = 0.05  # m


@register_robot_class("LeggedRobot")
class SeatedGR1(GR1):
    """GR1 with arms, hands and waist that move, and a camera in its head."""

    def __init__(self, idn=0):
        super().__init__(idn=idn)
        for part in ("leg", "head"):
            self._remove_joint_actuation(part)
        self._remove_free_joint()
        head = find_elements(root=self.root, tags="body", attribs={"name": f"{self.naming_prefix}head_pitch"})
        eye = {"mode": "fixed", "pos": "0.23 0 0.09", "quat": "0.676 0.205 -0.205 -0.676", "fovy": "77"}
        head.append(new_element("camera", f"{self.naming_prefix}ego", **eye))
        self.cameras = self.get_element_names(self.worldbody, "camera")

    @property
    def init_qpos(self):
        elbows_bent = np.zeros(17)
        elbows_bent[3:10] = [0, -0.1, 0, -1.57, 0, 0, 0]
        elbows_bent[10:17] = [0, 0.1, 0, -1.57, 0, 0, 0]
        return elbows_bent


class StandinTable(Lift):
    """robosuite makes it by its name."""


def padded(picture):
    """The picture in a black square, brought to 256 x 256."""
    height, width = picture.shape[:2]
    side = max(height, width)
    above, left = (side - height) // 2, (side - width) // 2
    square = np.pad(picture, ((above, above), (left, left), (0, 0)))
    return cv2.resize(square, (256, 256), interpolation=cv2.INTER_AREA)


class PushCube(gymnasium.Env):
    """camera: height and width of what is drawn; the real one's are 800 and 1280, which a CPU needs long for."""

    def __init__(self, enable_render=True, camera=(160, 256)):
        controllers = load_composite_controller_config(controller=None, robot="GR1")
        controllers |= {"type": "BASIC", "composite_controller_specific_configs": {}}
        for part in ("head", "base", "legs"):
            controllers["body_parts"].pop(part, None)
        self._draws, self._camera = enable_render, camera
        self.env = robosuite.make(
            "StandinTable",
            robots=["SeatedGR1"],
            controller_configs=controllers,
            has_renderer=False,
            has_offscreen_renderer=enable_render,
            use_camera_obs=enable_render,
            camera_names=["robot0_ego"],
            camera_heights=camera[0],
            camera_widths=camera[1],
            control_freq=20,
            horizon=1000,
            ignore_done=True,
        )
        sizes = {part: size for part, (_, size) in PARTS.items()}
        self.action_space = spaces.Dict({f"action.{p}": spaces.Box(-1, 1, (n,), np.float32) for p, n in sizes.items()})
        seen = {f"state.{p}": spaces.Box(-1, 1, (n,), np.float32) for p, n in sizes.items()}
        seen |= {view: spaces.Box(0, 255, (256, 256, 3), np.uint8) for view in VIEWS}
        self.observation_space = spaces.Dict({**seen, "annotation.human.coarse_action": spaces.Text(256)})

    def reset(self, seed=None, options=None):
        np.random.seed(seed)  # noqa: NPY002  (what robosuite's placement samplers draw from)
        raw = self.env.reset()
        self._start = self._cube()
        return self._observation(raw), {"success": False, "grasp_distractor_obj": False}

    def step(self, action):
        command = np.zeros(self.env.action_dim)
        places = self.env.robots[0].composite_controller._action_split_indexes
        for part, (joints, _) in PARTS.items():
            first, end = places[joints]
            command[first:end] = action[f"action.{part}"]
        raw, _, done, _ = self.env.step(command)
        success = bool(np.linalg.norm((self._cube() - self._start)[:2]) >= PUSHED)
        return self._observation(raw), float(success), done, False, {"success": success, "grasp_distractor_obj": False}

    def close(self):
        self.env.close()

    def _cube(self):
        return self.env.sim.data.body_xpos[self.env.cube_body_id].copy()

    def _joints(self, part):
        simulation = self.env.sim
        indices = self.env.robots[0]._ref_joints_indexes_dict[part]
        values = np.array([simulation.data.qpos[simulation.model.jnt_qposadr[j]] for j in indices], np.float32)
        return values[list(HAND_JOINTS)] if "gripper" in part else values

    def _observation(self, raw):
        seen = {f"state.{part}": self._joints(joints) for part, (joints, _) in PARTS.items()}
        height, width = self._camera
        drawn = raw["robot0_ego_image"][::-1] if self._draws else np.zeros((height, width, 3), np.uint8)
        # the same cut of the picture as the real environment's, in parts of its 800 x 1280
        cut = drawn[height * 310 // 800 : height * 770 // 800, width * 110 // 1280 : width * 1130 // 1280]
        seen[VIEWS[0]] = padded(drawn)
        seen[VIEWS[1]] = padded(cv2.resize(cut, (720, 480), interpolation=cv2.INTER_AREA))
        seen["annotation.human.coarse_action"] = "unlocked_waist: push the cube"
        return seen


gymnasium.register("dit4dit/PushCube-v0", entry_point=PushCube)
