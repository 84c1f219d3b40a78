"""What `data.check` found as one HTML page: facts, what is wrong, sample frames and joint curves of each data set."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit4dit.data.lerobot import LeRobot
from dit4dit.data.video import Frames
from dit4dit.errors import DataError

EPISODES = 4
FRAMES = 6
HEIGHT = 96  # px of one sample frame
STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em;color:#222}
h2{margin-top:2em;border-bottom:1px solid #ccc}table{border-collapse:collapse;margin:.6em 0}
td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}
.bad{color:#a3262a}.good{color:#2a7f62}.warn{color:#8a6100}img{max-width:100%;display:block;margin:.3em 0}
figcaption{color:#555;font-size:13px}figure{margin:.8em 0}"""


def write(folder: Path, results: Sequence[Mapping[str, Any]]) -> Path:
    """Write index.html into `folder`; returns its path. The page is one file: its pictures are inside."""
    folder.mkdir(parents=True, exist_ok=True)
    return page(folder / "index.html", "Data check", "\n".join(_dataset(result) for result in results))


def page(file: Path, title: str, body: str) -> Path:
    """Write a page in the style of all reports of data; returns its path."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    file.write_text(f"{head}<h1>{html.escape(title)}</h1>\n{body}\n</html>\n", encoding="utf-8")
    return file


def _dataset(result: Mapping[str, Any]) -> str:
    parts = [f"<h2>{html.escape(result['dataset'])}</h2>"]
    if "version" not in result:
        return parts[0] + _list(result["errors"], result["warnings"])
    cameras = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in result["cameras"].items())
    facts = {
        "format": f"LeRobot {result['version']}",
        "episodes": f"{result['episodes']:,}",
        "frames": f"{result['frames']:,} ({result['seconds']:,.0f} s at {result['fps']:g} fps)",
        "cameras": cameras,
        "robot": result["robot"] or "not given: not checked against one",
        "pictures": "every one was decoded" if result["decoded"] else "headers only; nothing was decoded",
    }
    rows = "".join(f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    parts += [f"<table>{rows}</table>", _list(result["errors"], result["warnings"]), _tasks(result["tasks"])]
    parts += _pictures(result)
    parts += [_ranges(name, found) for name, found in result["columns"].items()]
    return "\n".join(parts)


def _list(errors: Sequence[Mapping[str, Any]], warnings: Sequence[str]) -> str:
    if not errors:
        text = "<p class=good>No errors.</p>"
    else:
        lines = "".join(f"<li>{html.escape(describe(error))}</li>" for error in errors[:200])
        more = f"<li>and {len(errors) - 200} more, in the JSON file</li>" if len(errors) > 200 else ""
        text = f"<p class=bad>{len(errors)} error{'s' * (len(errors) != 1)}</p><ul class=bad>{lines}{more}</ul>"
    return text + (f"<ul class=warn>{''.join(f'<li>{html.escape(w)}</li>' for w in warnings)}</ul>" if warnings else "")


def describe(error: Mapping[str, Any]) -> str:
    """One error of a check's result as a line."""
    row = "" if error["row"] is None else f", row {error['row']}"
    return f"{error['file']}{row}: {error['message']}"


def _tasks(tasks: Mapping[str, int]) -> str:
    rows = sorted(tasks.items(), key=lambda item: -item[1])[:30]
    cells = "".join(f"<tr><td class=n>{count:,}</td><td>{html.escape(words)}</td></tr>" for words, count in rows)
    more = f"<p>and {len(tasks) - 30} more</p>" if len(tasks) > 30 else ""
    return f"<h3>{len(tasks)} instructions</h3><table><tr><th>frames</th><th></th></tr>{cells}</table>{more}"


def _pictures(result: Mapping[str, Any]) -> list[str]:
    """Sample frames and joint curves of a few undamaged episodes, spread over the data set."""
    data = LeRobot.open(Path(result["dataset"]), modality=result["modality"] and Path(result["modality"]))
    spoilt = {error["episode"] for error in result["errors"]}
    good = [i for i, episode in enumerate(data.meta.episodes) if episode.index not in spoilt]
    if not good:
        return []
    chosen = [good[round(k)] for k in np.linspace(0, len(good) - 1, min(EPISODES, len(good)))]
    out = ["<h3>Sample frames</h3>"]
    for i in chosen:
        frames = np.linspace(0, data.meta.episodes[i].length - 1, FRAMES).round().astype(int).tolist()
        for camera in data.meta.episodes[i].videos:
            try:
                strip = _strip(data.pictures(camera, i, frames))
            except DataError as error:  # found by the check already when it decoded
                out.append(f"<p class=bad>{html.escape(str(error))}</p>")
                continue
            caption = f"episode {data.meta.episodes[i].index}, {camera}, frames {', '.join(map(str, frames))}"
            out.append(f"<figure><img src='{strip}'><figcaption>{html.escape(caption)}</figcaption></figure>")
    out.append("<h3>Curves</h3>")
    for name in result["columns"]:
        out.append(
            f"<figure><img src='{_curves(data, name, chosen)}'><figcaption>{html.escape(name)}</figcaption></figure>"
        )
    return out


def _strip(pictures: Frames) -> str:
    from PIL import Image

    scaled = []
    for picture in pictures:
        image = Image.fromarray(picture)
        scaled.append(image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT)))
    sheet = Image.new("RGB", (sum(image.width + 4 for image in scaled), HEIGHT), "white")
    x = 0
    for image in scaled:
        sheet.paste(image, (x, 0))
        x += image.width + 4
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return _inline(buffer)


def _curves(data: LeRobot, column: str, episodes: Sequence[int]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(episodes), figsize=(3.6 * len(episodes), 2.8), sharey=True, squeeze=False)
    for axis, i in zip(axes[0], episodes, strict=True):
        values = data.column(column, i)
        lines = axis.plot(np.arange(len(values)) / data.fps, values, linewidth=0.9)
        axis.set_title(f"episode {data.meta.episodes[i].index}", fontsize=9)
        axis.set_xlabel("s")
    labels = _labels(data, column)
    columns = min(len(labels), 3 * len(episodes))
    figure.tight_layout(rect=(0, 0.08 * -(-len(labels) // columns), 1, 1))
    figure.legend(lines, labels, loc="lower center", ncol=columns, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return _inline(buffer)


def _labels(data: LeRobot, column: str) -> list[str]:
    """One name for each value of a column: the narrowest key that holds it."""
    out = [str(d) for d in range(data.columns.columns[column].width)]
    keys = [(key, where) for part in ("state", "action") for key, where in data.modality.part(part).items()]
    for key, where in sorted((k for k in keys if k[1].column == column), key=lambda item: -item[1].size):
        for d in range(where.start, where.end):
            out[d] = key if where.size == 1 else f"{key}.{d - where.start}"
    return out


def _ranges(name: str, found: Mapping[str, Sequence[float]]) -> str:
    header = "".join(f"<th>{key}</th>" for key in found)
    rows = "".join(
        f"<tr><td class=n>{d}</td>{''.join(f'<td class=n>{found[key][d]:.5g}</td>' for key in found)}</tr>"
        for d in range(len(found["min"]))
    )
    return f"<h3>{html.escape(name)}</h3><table><tr><th></th>{header}</tr>{rows}</table>"


def _inline(buffer: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
