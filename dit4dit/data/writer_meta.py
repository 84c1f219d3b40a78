"""The meta folder of a data set that `Writer` made: tasks, episodes, their statistics, info.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dit4dit.data.layout import V2_DATA, V2_VIDEO, V3_DATA, V3_VIDEO, Version
from dit4dit.data.writer_episode import INDEX_FEATURES, Feature, Moments, cameras
from dit4dit.data.writer_video import VideoCodec
from dit4dit.errors import require


class Recorded(Protocol):
    """What `Writer` knows of the data set that it made; see there."""

    root: Path
    fps: float
    version: Version
    robot: str | None
    codec: VideoCodec
    chunks_size: int
    features: dict[str, Feature]
    tasks: dict[str, int]
    episodes: list[dict[str, Any]]
    moments: list[dict[str, Moments]]
    frames: int


def write(made: Recorded) -> None:
    """Everything but info.json and modality.json."""
    meta = made.root / "meta"
    if made.version == "v3.0":
        _tasks_parquet(made, meta / "tasks.parquet")
        _episodes_parquet(made, meta / "episodes" / "chunk-000" / "file-000.parquet")
    else:
        _lines(meta / "tasks.jsonl", [{"task_index": i, "task": words} for words, i in made.tasks.items()])
        _lines(meta / "episodes.jsonl", made.episodes)
    if made.version == "v2.1":
        each = [{"episode_index": i, "stats": stats} for i, stats in enumerate(made.moments)]
        _lines(meta / "episodes_stats.jsonl", each)
    else:
        (meta / "stats.json").write_text(json.dumps(_merge(made.moments), indent=4) + "\n")


def info(made: Recorded) -> dict[str, Any]:
    """Content of info.json."""
    features: dict[str, dict[str, Any]] = {}
    for name, (dtype, shape) in made.features.items():
        features[name] = {"dtype": dtype, "shape": list(shape), "names": None}
        if dtype == "video":
            height, width, channels = shape
            facts = {"height": height, "width": width, "channels": channels, "fps": made.fps, "codec": made.codec.name}
            facts |= {"pix_fmt": made.codec.pixels, "is_depth_map": False}
            features[name]["names"] = ["height", "width", "channels"]
            features[name]["info"] = {f"video.{k}": v for k, v in facts.items()} | {"has_audio": False}
    for name, dtype in INDEX_FEATURES.items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    videos = cameras(made.features)
    fps = int(made.fps) if float(made.fps).is_integer() else made.fps
    count = len(made.episodes)
    data: dict[str, Any] = {
        "codebase_version": made.version,
        "robot_type": made.robot,
        "total_episodes": count,
        "total_frames": made.frames,
        "total_tasks": len(made.tasks),
        "chunks_size": made.chunks_size,
        "fps": fps,
        "splits": {"train": f"0:{count}"},
    }
    if made.version == "v3.0":
        data |= {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
        data |= {"data_path": V3_DATA, "video_path": V3_VIDEO if videos else None}
    else:
        data |= {"total_videos": count * len(videos), "total_chunks": (count - 1) // made.chunks_size + 1}
        data |= {"data_path": V2_DATA, "video_path": V2_VIDEO if videos else None}
    return {**data, "features": features}


def _lines(path: Path, items: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    # some readers take these for ends of lines too
    for mark in "\u0085\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    path.write_text(text, encoding="utf-8", newline="\n")


def _tasks_parquet(made: Recorded, path: Path) -> None:
    """One row a task. lerobot reads the file with pandas and takes the words from its index, so the file names one."""
    pa = require("pyarrow", "train")
    table = pa.table({"task_index": list(made.tasks.values()), "__index_level_0__": list(made.tasks)})
    columns = [
        {
            "name": "task_index",
            "field_name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        },
        {
            "name": None,
            "field_name": "__index_level_0__",
            "pandas_type": "unicode",
            "numpy_type": "object",
            "metadata": None,
        },
    ]
    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [],
        "columns": columns,
        "pandas_version": "2.0.0",
    }
    require("pyarrow.parquet", "train").write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def _episodes_parquet(made: Recorded, path: Path) -> None:
    pa = require("pyarrow", "train")
    rows: dict[str, list[Any]] = {key: [episode[key] for episode in made.episodes] for key in made.episodes[0]}
    for feature, stats in made.moments[0].items():
        for name in stats:
            rows[f"stats/{feature}/{name}"] = [each[feature][name] for each in made.moments]
    rows |= {
        "meta/episodes/chunk_index": [0] * len(made.episodes),
        "meta/episodes/file_index": [0] * len(made.episodes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    require("pyarrow.parquet", "train").write_table(pa.table(rows), path)


def _merge(each: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Statistics of all episodes from those of each."""
    out: dict[str, dict[str, Any]] = {}
    for name in each[0]:
        get = lambda key, name=name: np.array([stats[name][key] for stats in each], dtype=np.float64)  # noqa: E731
        count = get("count")
        weight = (count / count.sum()).reshape(-1, *([1] * (get("mean").ndim - 1)))
        mean = (weight * get("mean")).sum(axis=0)
        # around the common mean: a difference of large squares would lose a small spread
        spread = np.sqrt((weight * (get("std") ** 2 + (get("mean") - mean) ** 2)).sum(axis=0))
        merged = {"min": get("min").min(axis=0), "max": get("max").max(axis=0), "mean": mean, "std": spread}
        out[name] = {key: value.tolist() for key, value in merged.items()} | {"count": [int(count.sum())]}
    return out
