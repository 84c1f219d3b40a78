"""A robot of a user's own, as a file of robots and mixtures: LIBERO's keys, and what its data say of each action."""

from __future__ import annotations

import json
from pathlib import Path

from dit4dit.data.catalogue import catalogue

GOLDEN = Path(__file__).parents[1] / "golden"
MODALITY = catalogue().robot("libero_franka").modality
KEYS = MODALITY["action"].items()
SAID = {**MODALITY, "action": {key: {**slot, "absolute": key == "x"} for key, slot in KEYS if key != "gripper"}}
SAID["action"]["gripper"] = MODALITY["action"]["gripper"]
MINE = f"""
robots:
  my_arm:
    video: [primary_image, wrist_image]
    state: [x, y, z, roll, pitch, yaw, pad, gripper]
    action: [x, y, z, roll, pitch, yaw, gripper]
    normalization: {{action.x: min_max, action.gripper: binary}}
    sin_cos_state: true
    action_steps: 8
    language: annotation.human.action.task_description
    modality: {json.dumps(SAID)}
mixtures:
  franka: [{{dataset: lerobot_v3, robot: libero_franka}}]
  mine: [{{dataset: lerobot_v3, robot: my_arm}}]
"""
